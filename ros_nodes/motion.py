"""Where the vehicle is and where it is to go: poses, trajectories in time, odometry, and a stop along a path.

Pure numpy. Vehicle frames are x forward, y left, at the rear axle, in metres and radians; times ending in
`_ns` are ROS time in nanoseconds.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

STEP_S = 0.5
"""Between the poses of a stop."""
STOP_POSES = 6
CREEP_MPS = 0.3
"""Who is slower needs no path to stop along."""
ODOMETRY_KEPT_S = 5.0
BEYOND_REASON = 1e9
"""In any unit; as good as infinite."""
NANOSECONDS = 1e9


class Pose(NamedTuple):
    """x, y in metres, heading in radians."""

    x: float
    y: float
    heading: float


class Motion(NamedTuple):
    """Where the vehicle is in the map, and how it moves."""

    pose: Pose
    speed_mps: float
    yaw_rate_rps: float


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Poses of the rear axle in the frame that the vehicle had at `stamp_ns`.

    Attributes:
        stamp_ns: input time of a plan; when it was made, of a fallback.
        due_ns: [T] when each pose is due.
        poses: [T, 3] x, y, heading.
    """

    stamp_ns: int
    frame_id: str
    due_ns: NDArray[np.int64]
    poses: FloatArray

    @property
    def times_s(self) -> FloatArray:
        """[T + 1] seconds after the stamp, with the stamp itself first."""
        return np.concatenate([[0.0], (self.due_ns - self.stamp_ns) / NANOSECONDS])

    @property
    def points(self) -> FloatArray:
        """[T + 1, 3] the poses, with the origin first; headings do not wrap."""
        points = np.vstack([np.zeros(3), self.poses])
        points[:, 2] = np.unwrap(points[:, 2])
        return points

    @property
    def is_stop(self) -> bool:
        """It commands zero speed from its stamp on."""
        return not self.poses.any()

    def at(self, when_ns: int) -> Pose:
        """Where it is at a time, straight between poses and standing after the last."""
        after_s = (when_ns - self.stamp_ns) / NANOSECONDS
        return Pose(*(float(np.interp(after_s, self.times_s, column)) for column in self.points.T))


def stop_command(now_ns: int, frame_id: str) -> Trajectory:
    """Stand where you are: zero speed at once."""
    due = now_ns + np.arange(1, STOP_POSES + 1) * round(STEP_S * NANOSECONDS)
    return Trajectory(now_ns, frame_id, due, np.zeros((STOP_POSES, 3)))


def onward(motion: Motion, now_ns: int, frame_id: str) -> Trajectory:
    """Straight on, or on round the bend: at constant speed and yaw rate, in the vehicle's frame."""
    due = now_ns + np.arange(1, STOP_POSES + 1) * round(STEP_S * NANOSECONDS)
    here = (now_ns, motion._replace(pose=Pose(0.0, 0.0, 0.0)))
    return Trajectory(now_ns, frame_id, due, np.array([_moved_on(here, when_ns) for when_ns in due.tolist()]))


class OdometryTrack:
    """Where the vehicle was in the last seconds.

    Args:
        timeout_ms: longest gap to bridge between messages, or beyond the last.
        max_jump_m: a message further than this from where the last one leads has jumped.
    """

    def __init__(self, timeout_ms: float, max_jump_m: float) -> None:
        self.timeout_ms, self.max_jump_m = timeout_ms, max_jump_m
        self._kept: deque[tuple[int, Motion]] = deque()

    def add(self, stamp_ns: int, motion: Motion) -> str:
        """Take a message; one that is not finite or not newer is left out, one that jumps starts anew.

        Returns:
            What is wrong with it; "" if nothing is.
        """
        if not all(abs(value) < BEYOND_REASON for value in (*motion.pose, *motion[1:])):
            return "a value is not finite"
        fault = ""
        if self._kept:
            if stamp_ns <= self._kept[-1][0]:
                return "its stamp is not newer than the last one's"
            expected = _moved_on(self._kept[-1], stamp_ns)
            away = math.hypot(motion.pose.x - expected.x, motion.pose.y - expected.y)
            if not away <= self.max_jump_m:
                self._kept.clear()
                fault = f"jumped {away:.1f} m; allowed {self.max_jump_m:g} m"
        self._kept.append((stamp_ns, motion))
        while self._kept[0][0] < stamp_ns - ODOMETRY_KEPT_S * NANOSECONDS:
            self._kept.popleft()
        return fault

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()

    def at(self, stamp_ns: int) -> Motion | None:
        """The motion at a time: between messages, or shortly after the last; None when not known."""
        later = None
        for entry in reversed(self._kept):
            if entry[0] <= stamp_ns:
                gap_ns = (later[0] if later else stamp_ns) - entry[0]
                if gap_ns > self.timeout_ms * 1e6:
                    return None
                if later is None:
                    return entry[1]._replace(pose=_moved_on(entry, stamp_ns))
                share, (_, before), (_, after) = (stamp_ns - entry[0]) / gap_ns, entry, later
                turned = share * _wrapped(after.pose.heading - before.pose.heading)
                x, y, speed, yaw_rate = (
                    a + share * (b - a)
                    for a, b in zip(
                        (*before.pose[:2], *before[1:]), (*after.pose[:2], *after[1:]), strict=True
                    )
                )
                return Motion(Pose(x, y, before.pose.heading + turned), speed, yaw_rate)
            later = entry
        return None


def stop_along(
    plan: Trajectory,
    now_ns: int,
    vehicle: Pose,
    speed_mps: float,
    comfort_mps2: float,
    hardest_mps2: float,
    horizon_s: float,
) -> Trajectory | None:
    """A comfortable stop along a plan, from where the vehicle is and as fast as it is.

    Where the plan is too short for a comfortable stop it brakes harder; where even the hardest braking does
    not suffice it goes on straight beyond the plan's end. An offset from the plan fades on the way.

    Args:
        plan: the geometry, and the frame's name.
        now_ns: becomes its stamp.
        vehicle: in the plan's frame.
        speed_mps: of the vehicle.
        comfort_mps2: braking to begin with.
        hardest_mps2: no more than this.
        horizon_s: it has poses up to here at least, standing if need be.

    Returns:
        In the vehicle's frame; None when there is nothing to stop along.
    """
    points = plan.points
    moves = np.concatenate([[True], np.hypot(*np.diff(points[:, :2], axis=0).T) > 1e-3])
    points = points[moves]
    if speed_mps < CREEP_MPS or len(points) < 2:
        return None
    chords = np.hypot(*np.diff(points[:, :2], axis=0).T)
    ends = np.concatenate([[0.0], np.cumsum(chords)])
    here = _metres_along(points, ends, vehicle)
    left = max(float(ends[-1]) - here, 1e-3)
    braking = min(max(comfort_mps2, speed_mps**2 / (2 * left)), hardest_mps2)
    lasts_s = speed_mps / braking
    poses = math.ceil(max(lasts_s / STEP_S + 1, horizon_s / STEP_S))
    times = STEP_S * np.arange(poses + 1)
    driven = speed_mps * np.minimum(times, lasts_s) - braking * np.minimum(times, lasts_s) ** 2 / 2
    local = _in_frame(vehicle, _along(points, ends, here + driven))
    share = driven / driven[-1]
    local -= local[0] * ((1 - share) ** 2 * (1 + 2 * share))[:, None]
    due = now_ns + np.rint(times[1:] * NANOSECONDS).astype(np.int64)
    return Trajectory(now_ns, plan.frame_id, due, local[1:])


def _along(points: FloatArray, ends: FloatArray, metres: FloatArray) -> FloatArray:
    """[n, 3] poses so many metres along cubic curves that honour positions and headings; straight beyond."""
    index = np.clip(np.searchsorted(ends, metres, side="right") - 1, 0, len(ends) - 2)
    chord = ends[index + 1] - ends[index]
    u = np.clip((metres - ends[index]) / chord, 0.0, 1.0)[:, None]
    first, last = points[index], points[index + 1]
    leave, arrive = (
        np.column_stack([np.cos(end[:, 2]), np.sin(end[:, 2])]) * chord[:, None] for end in (first, last)
    )
    position = (
        (1 + 2 * u) * (1 - u) ** 2 * first[:, :2]
        + u * (1 - u) ** 2 * leave
        + u**2 * (3 - 2 * u) * last[:, :2]
        - u**2 * (1 - u) * arrive
    )
    position += np.maximum(metres - ends[-1], 0.0)[:, None] * arrive / chord[:, None]
    return np.column_stack([position, first[:, 2] + u[:, 0] * (last[:, 2] - first[:, 2])])


def _metres_along(points: FloatArray, ends: FloatArray, vehicle: Pose) -> float:
    """Where along the chords the vehicle is nearest."""
    start, chord = points[:-1, :2], np.diff(points[:, :2], axis=0)
    to_vehicle = np.array([vehicle.x, vehicle.y]) - start
    share = np.clip((to_vehicle * chord).sum(axis=1) / (chord**2).sum(axis=1), 0.0, 1.0)
    nearest = int(np.argmin(np.hypot(*(to_vehicle - share[:, None] * chord).T)))
    return float(ends[nearest] + share[nearest] * (ends[nearest + 1] - ends[nearest]))


def _in_frame(frame: Pose, poses: FloatArray) -> FloatArray:
    x, y = poses[:, 0] - frame.x, poses[:, 1] - frame.y
    cosine, sine = math.cos(frame.heading), math.sin(frame.heading)
    return np.column_stack([cosine * x + sine * y, cosine * y - sine * x, poses[:, 2] - frame.heading])


def relative(frame: Pose, pose: Pose) -> Pose:
    """A pose as seen from another of the same frame."""
    x, y, heading = _in_frame(frame, np.array([pose]))[0].tolist()
    return Pose(x, y, _wrapped(heading))


def placed(frame: Pose, pose: Pose) -> Pose:
    """The opposite of `relative`: a pose seen from `frame`, in the frame that `frame` is given in."""
    cosine, sine = math.cos(frame.heading), math.sin(frame.heading)
    return Pose(
        frame.x + cosine * pose.x - sine * pose.y,
        frame.y + sine * pose.x + cosine * pose.y,
        frame.heading + pose.heading,
    )


def _moved_on(entry: tuple[int, Motion], stamp_ns: int) -> Pose:
    """The pose at a later time at constant speed and yaw rate."""
    stamp_before_ns, (pose, speed, yaw_rate) = entry
    seconds = (stamp_ns - stamp_before_ns) / NANOSECONDS
    turned = yaw_rate * seconds
    bearing = turned / 2
    ahead = speed * seconds
    return placed(pose, Pose(ahead * math.cos(bearing), ahead * math.sin(bearing), turned))


def _wrapped(angle: float) -> float:
    return (angle + math.pi) % (2 * math.pi) - math.pi
