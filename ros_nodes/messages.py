"""From the library's records to ROS messages; needs the message packages of a sourced ROS 2."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from vla_autoprune.errors import PlanError
from vla_autoprune.frame import Plan

if TYPE_CHECKING:
    from builtin_interfaces.msg import Time
    from geometry_msgs.msg import Quaternion
    from nav_msgs.msg import Path

NANOSECONDS = 1_000_000_000


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
