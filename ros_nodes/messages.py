"""Between records and ROS messages; needs the message packages of a sourced ROS 2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

from ros_nodes.motion import Trajectory
from vla_autoprune.errors import PlanError
from vla_autoprune.frame import Plan

if TYPE_CHECKING:
    from builtin_interfaces.msg import Time
    from diagnostic_msgs.msg import DiagnosticArray
    from geometry_msgs.msg import Quaternion
    from nav_msgs.msg import Path

Level = Literal["ok", "warn", "error"]

NANOSECONDS = 1_000_000_000
TILT = 0.01
"""Of a quaternion that still counts as a rotation about z."""


def time_message(stamp_ns: int) -> Time:
    """ROS time of a stamp in nanoseconds since the epoch.

    Raises:
        ValueError: the stamp is negative.
    """
    from builtin_interfaces.msg import Time

    if stamp_ns < 0:
        raise ValueError(f"stamp_ns is {stamp_ns}; it must be >= 0")
    seconds, nanoseconds = divmod(stamp_ns, NANOSECONDS)
    return Time(sec=seconds, nanosec=nanoseconds)


def quaternion_of_heading(heading: float) -> Quaternion:
    """Rotation about z by `heading` radians (REP-103: counter-clockwise from x forward)."""
    from geometry_msgs.msg import Quaternion

    return Quaternion(x=0.0, y=0.0, z=math.sin(heading / 2.0), w=math.cos(heading / 2.0))


def path_message(plan: Plan, stamp_ns: int, frame_id: str = "base_link") -> Path:
    """The plan as nav_msgs/Path: the header carries the *input* time, every pose the time it is due.

    Args:
        plan: [T, 3] waypoints in the ego frame (x forward, y left, metres; heading in radians).
        stamp_ns: time of the frame the plan was made from, in nanoseconds.
        frame_id: the ego frame; the rear axle, as in the plan.

    Raises:
        PlanError: a waypoint is not finite; nothing that could be published is returned.
    """
    from geometry_msgs.msg import PoseStamped
    from nav_msgs.msg import Path

    if not np.isfinite(plan.waypoints_in_ego).all():
        row = int(np.flatnonzero(~np.isfinite(plan.waypoints_in_ego).all(axis=1))[0])
        raise PlanError(f"waypoint {row} is {plan.waypoints_in_ego[row].tolist()}; a path must be finite")
    path = Path()
    path.header.stamp = time_message(stamp_ns)
    path.header.frame_id = frame_id
    for (x, y, heading), due_s in zip(plan.waypoints_in_ego.tolist(), plan.times_s, strict=True):
        pose = PoseStamped()
        pose.header.stamp = time_message(stamp_ns + round(due_s * NANOSECONDS))
        pose.header.frame_id = frame_id
        pose.pose.position.x = x
        pose.pose.position.y = y
        pose.pose.orientation = quaternion_of_heading(heading)
        path.poses.append(pose)
    return path


def trajectory_message(trajectory: Trajectory) -> Path:
    """A trajectory as nav_msgs/Path: positions in the plane, headings about z, and nothing else."""
    from geometry_msgs.msg import PoseStamped
    from nav_msgs.msg import Path

    path = Path()
    path.header.stamp = time_message(trajectory.stamp_ns)
    path.header.frame_id = trajectory.frame_id
    for due_ns, (x, y, heading) in zip(trajectory.due_ns.tolist(), trajectory.poses.tolist(), strict=True):
        pose = PoseStamped()
        pose.header.stamp = time_message(due_ns)
        pose.header.frame_id = trajectory.frame_id
        pose.pose.position.x = x
        pose.pose.position.y = y
        pose.pose.orientation = quaternion_of_heading(heading)
        path.poses.append(pose)
    return path


def trajectory_of(path: Path, most_poses: int) -> Trajectory:
    """What a nav_msgs/Path says, for whoever checks it: garbage in, recognisable garbage out.

    Args:
        path: of any content.
        most_poses: one pose beyond these is enough to see that there are too many.

    Returns:
        A heading is NaN where a quaternion is not a rotation about z. The frame is that of the first pose
        which has another than the header, if one has.
    """
    poses = path.poses[: most_poses + 1]
    frames = [path.header.frame_id, *(pose.header.frame_id for pose in poses if pose.header.frame_id)]
    return Trajectory(
        stamp_ns=stamp_ns_of(path.header.stamp),
        frame_id=next((frame for frame in frames if frame != frames[0]), frames[0]),
        due_ns=np.array([stamp_ns_of(pose.header.stamp) for pose in poses], dtype=np.int64),
        poses=np.array(
            [
                (pose.pose.position.x, pose.pose.position.y, heading_of_quaternion(pose.pose.orientation))
                for pose in poses
            ],
            dtype=np.float64,
        ).reshape(-1, 3),
    )


def stamp_ns_of(stamp: Time) -> int:
    """A ROS stamp in nanoseconds."""
    return stamp.sec * NANOSECONDS + stamp.nanosec


def heading_of_quaternion(quaternion: Quaternion) -> float:
    """Rotation about z in radians; NaN if it is tilted, not normalised or not finite."""
    x, y, z, w = quaternion.x, quaternion.y, quaternion.z, quaternion.w
    upright = math.hypot(x, y) < TILT and abs(math.hypot(x, y, z, w) - 1.0) < TILT
    return 2.0 * math.atan2(z, w) if upright else math.nan


def diagnostics_message(
    stamp_ns: int, name: str, level: Level, summary: str, values: Mapping[str, object]
) -> DiagnosticArray:
    """One component's state, for /diagnostics and status topics; numbers as people write them."""
    from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

    levels = {"ok": DiagnosticStatus.OK, "warn": DiagnosticStatus.WARN, "error": DiagnosticStatus.ERROR}
    status = DiagnosticStatus(level=levels[level], name=name, message=summary)
    for key, value in values.items():
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        status.values.append(KeyValue(key=key, value=text))
    message = DiagnosticArray(status=[status])
    message.header.stamp = time_message(stamp_ns)
    return message
