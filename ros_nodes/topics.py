"""Topics the nodes share, relative so that namespaces and remaps reach them, and their quality of service."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rclpy.node import Node
    from rclpy.qos import QoSProfile
    from rclpy.subscription import Subscription

ODOMETRY = "odometry"
ACCELERATION = "acceleration"
COMMAND = "command"

PLANNER_PATH = "planner/path"
PLANNER_TRAJECTORY = "planner/trajectory"
PLANNER_MARKERS = "planner/markers"
PLANNER_TEXT = "planner/text"
PLANNER_STATUS = "planner/status"

GUARD_PATH = "trajectory/path"
GUARD_STATUS = "guard/status"

TRUTH_PATH = "truth/path"
DIAGNOSTICS = "/diagnostics"

MAP_FRAME = "map"
EGO_FRAME = "base_link"
"""The rear axle, x forward, y left, as in a plan."""

Reliability = Literal["reliable", "best_effort"]


def camera_topic(camera: str, raw: bool = False) -> str:
    """Topic of a camera's images: sensor_msgs/CompressedImage, or sensor_msgs/Image where `raw`."""
    return f"camera/{camera.lower()}/image" + ("" if raw else "/compressed")


def sensor_qos(reliability: Reliability = "reliable", depth: int = 1) -> QoSProfile:
    """Cameras, odometry, acceleration. A subscription of depth 1 gets the newest message after a stall.

    A best-effort subscription hears every publisher, a reliable one only reliable publishers, but over shared
    memory it loses no image.
    """
    from rclpy.qos import QoSProfile, ReliabilityPolicy

    policy = ReliabilityPolicy.RELIABLE if reliability == "reliable" else ReliabilityPolicy.BEST_EFFORT
    return QoSProfile(depth=depth, reliability=policy)


def plan_qos() -> QoSProfile:
    """Plans: reliable, and only the newest counts."""
    from rclpy.qos import QoSProfile, ReliabilityPolicy

    return QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)


def record_qos() -> QoSProfile:
    """Status, text, markers, truth, diagnostics: reliable, with some room for slow listeners."""
    from rclpy.qos import QoSProfile, ReliabilityPolicy

    return QoSProfile(depth=20, reliability=ReliabilityPolicy.RELIABLE)


def latched_qos() -> QoSProfile:
    """The driving command: whoever joins late hears the last one."""
    from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

    return QoSProfile(
        depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
    )


def publishers_of(node: Node, subscription: Subscription) -> str:
    """How many publishers a topic has, and which of them a subscription cannot hear, for people.

    Returns:
        Such as "/command, 1 publishers" and, behind a colon, who is not heard and why.
    """
    from rclpy.qos import QoSCompatibility, qos_check_compatible

    kind = subscription.msg_type
    wanted = f"{kind.__module__.partition('.')[0]}/msg/{kind.__name__}"
    found = node.get_publishers_info_by_topic(subscription.topic_name)
    unheard = []
    for publisher in found:
        verdict, reason = qos_check_compatible(publisher.qos_profile, subscription.qos_profile)
        name = f"{publisher.node_namespace.rstrip('/')}/{publisher.node_name}"
        if publisher.topic_type != wanted:
            unheard.append(f"{name} is not heard, it publishes {publisher.topic_type}, not {wanted}")
        elif verdict == QoSCompatibility.ERROR:
            unheard.append(f"{name} is not heard, {reason}")
    counted = f"{subscription.topic_name}, {len(found)} publishers"
    return f"{counted}: {'; '.join(unheard)}" if unheard else counted
