"""Between records and ROS messages; needs the message packages of a sourced ROS 2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ros_nodes.ego_motion import OdometrySample
from ros_nodes.motion import Trajectory
from ros_nodes.velocity_profile import velocity_profile
from vla_autoprune.errors import PlanError
from vla_autoprune.frame import Plan

if TYPE_CHECKING:
    from builtin_interfaces.msg import Time
    from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
    from geometry_msgs.msg import Quaternion
    from nav_msgs.msg import Odometry, Path
    from sensor_msgs.msg import CompressedImage, Image
    from visualization_msgs.msg import MarkerArray

    from ros_nodes.camera_images import ImageData

Level = Literal["ok", "warn", "error"]

NANOSECONDS = 1_000_000_000
STEEP = 0.26
"""Sine of half of 30 degrees: no road leans a car so far."""
UNNORMALISED = 0.01


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
    if not np.isfinite(plan.waypoints_in_ego).all():
        row = int(np.flatnonzero(~np.isfinite(plan.waypoints_in_ego).all(axis=1))[0])
        raise PlanError(f"waypoint {row} is {plan.waypoints_in_ego[row].tolist()}; a path must be finite")
    due_ns = np.array([stamp_ns + round(due_s * NANOSECONDS) for due_s in plan.times_s], dtype=np.int64)
    return trajectory_message(Trajectory(stamp_ns, frame_id, due_ns, plan.waypoints_in_ego))


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
        A heading is NaN where `heading_of_quaternion` is. The frame is that of the first pose
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
    """Rotation about z in radians; NaN if it is no rotation, or tilts further than any road."""
    x, y, z, w = quaternion.x, quaternion.y, quaternion.z, quaternion.w
    if math.hypot(x, y) < STEEP and abs(math.hypot(x, y, z, w) - 1.0) < UNNORMALISED:
        return math.atan2(2.0 * (w * z + x * y), 1.0 - 2.0 * (y * y + z * z))
    return math.nan


def diagnostics_message(
    stamp_ns: int, name: str, level: Level, summary: str, values: Mapping[str, object]
) -> DiagnosticArray:
    """One component's state, for status topics."""
    from diagnostic_msgs.msg import DiagnosticArray

    message = DiagnosticArray(status=[diagnostic_status(name, level, summary, values)])
    message.header.stamp = time_message(stamp_ns)
    return message


def diagnostic_status(
    name: str, level: Level, summary: str, values: Mapping[str, object]
) -> DiagnosticStatus:
    """One entry of a diagnostic array; numbers as people write them."""
    from diagnostic_msgs.msg import DiagnosticStatus, KeyValue

    levels = {"ok": DiagnosticStatus.OK, "warn": DiagnosticStatus.WARN, "error": DiagnosticStatus.ERROR}
    status = DiagnosticStatus(level=levels[level], name=name, message=summary)
    for key, value in values.items():
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        status.values.append(KeyValue(key=key, value=text))
    return status


def autoware_trajectory_message(
    plan: Plan, stamp_ns: int, speed_mps: float, frame_id: str, ego_pose: OdometrySample | None = None
) -> Any:
    """The plan as autoware_planning_msgs/Trajectory, speeds and accelerations filled in consistently.

    Args:
        plan: waypoints in the ego frame.
        stamp_ns: time of the frame the plan was made from.
        speed_mps: measured speed at that time.
        frame_id: frame of the poses, unless `ego_pose` names its own.
        ego_pose: the ego frame in that frame; None where the poses stay in the ego frame.

    Raises:
        ImportError: autoware_planning_msgs is not installed.
    """
    from autoware_planning_msgs.msg import Trajectory, TrajectoryPoint
    from builtin_interfaces.msg import Duration

    profile = velocity_profile(plan, speed_mps)
    trajectory = Trajectory()
    trajectory.header.stamp = time_message(stamp_ns)
    trajectory.header.frame_id = (ego_pose and ego_pose.frame_id) or frame_id
    poses = profile.poses_in_ego
    if ego_pose is not None:
        cos, sin = math.cos(ego_pose.heading), math.sin(ego_pose.heading)
        turn = np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])
        poses = poses @ turn + [ego_pose.x, ego_pose.y, ego_pose.heading]
    for index, (x, y, heading) in enumerate(poses.tolist()):
        seconds, nanoseconds = divmod(round(profile.times_s[index] * NANOSECONDS), NANOSECONDS)
        point = TrajectoryPoint()
        point.time_from_start = Duration(sec=seconds, nanosec=nanoseconds)
        point.pose.position.x = x
        point.pose.position.y = y
        point.pose.orientation = quaternion_of_heading(heading)
        point.longitudinal_velocity_mps = float(profile.speed_mps[index])
        point.acceleration_mps2 = float(profile.acceleration_mps2[index])
        point.heading_rate_rps = float(profile.heading_rate_rps[index])
        trajectory.points.append(point)
    return trajectory


def marker_message(path: Path, caption: str) -> MarkerArray:
    """A path as a line, its poses as dots, and a caption above the vehicle."""
    from geometry_msgs.msg import Point
    from std_msgs.msg import ColorRGBA
    from visualization_msgs.msg import Marker, MarkerArray

    points = [Point(), *(pose.pose.position for pose in path.poses)]
    markers = MarkerArray()
    for number, (kind, size_m) in enumerate(
        ((Marker.LINE_STRIP, 0.3), (Marker.SPHERE_LIST, 0.7), (Marker.TEXT_VIEW_FACING, 0.8))
    ):
        marker = Marker(header=path.header, ns="plan", id=number, type=kind, action=Marker.ADD)
        marker.pose.orientation.w = 1.0
        marker.scale.x = marker.scale.y = marker.scale.z = size_m
        marker.color = ColorRGBA(r=0.1, g=0.8, b=0.4, a=0.9)
        if kind == Marker.TEXT_VIEW_FACING:
            marker.text = caption
            marker.pose.position.z = 3.0
        else:
            marker.points = points
        markers.markers.append(marker)
    return markers


def yaw_of(quaternion: Quaternion) -> float:
    """Rotation about z in radians of any attitude: odometry may be on a slope."""
    q = quaternion
    return math.atan2(2.0 * (q.w * q.z + q.x * q.y), 1.0 - 2.0 * (q.y * q.y + q.z * q.z))


def odometry_sample(message: Odometry) -> OdometrySample:
    """What a plan needs of nav_msgs/Odometry."""
    pose, twist = message.pose.pose, message.twist.twist
    return OdometrySample(
        stamp_ns=stamp_ns_of(message.header.stamp),
        speed_mps=twist.linear.x,
        yaw_rate_rps=twist.angular.z,
        x=pose.position.x,
        y=pose.position.y,
        heading=yaw_of(pose.orientation),
        frame_id=message.header.frame_id,
    )


def image_data(message: CompressedImage | Image) -> ImageData:
    """What is in a camera message, not yet decoded and not copied."""
    from ros_nodes.camera_images import ImageData  # the guard needs no images

    if hasattr(message, "format"):
        return ImageData(message.data)
    return ImageData(message.data, message.encoding, message.width, message.height, message.step)
