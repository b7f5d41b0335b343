"""Published plans against the truth, frame by frame; knows no ROS."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np

from ros_nodes.motion import FloatArray, Trajectory
from vla_autoprune.frame import WAYPOINT_TIMES_S

HORIZONS_S = (1, 2, 3)
STEPS_PER_S = 2

CLOCK_JUMP_MS = 10_000.0
"""ROS time and steady time that differ so much over a plan: ROS time jumped, as between two drives."""


@dataclass
class Frame:
    """One frame's truth and what was planned for it.

    Attributes:
        truth: up to six poses, half a second apart.
        truth_came_s: when, on the steady clock.
        plan: the first one with the same stamp.
        latency_ms: from the truth's coming to the plan's, steady time.
        age_ms: of the plan's input when the plan came, ROS time; NaN where that jumped meanwhile.
    """

    truth: Trajectory
    truth_came_s: float
    plan: Trajectory | None = None
    latency_ms: float = math.nan
    age_ms: float = math.nan


class OnlineScores:
    """Matches plans with truths by their stamps.

    Args:
        scored_point_in_ego_m: x, y of the point whose distance counts; the rear axle is 0, 0. Open-loop
            protocols take the LIDAR.
    """

    def __init__(self, scored_point_in_ego_m: tuple[float, float] = (0.0, 0.0)) -> None:
        self.point = np.array(scored_point_in_ego_m)
        self.frames: list[Frame] = []
        self.unmatched = 0
        """Plans without a truth of their stamp, such as a guard's stops."""
        self._latest: dict[int, Frame] = {}

    def add_truth(self, truth: Trajectory, steady_s: float) -> None:
        """Take what really happened; a stamp that comes again begins another frame."""
        frame = Frame(truth, steady_s)
        self.frames.append(frame)
        self._latest[truth.stamp_ns] = frame

    def add_plan(self, plan: Trajectory, now_ns: int, steady_s: float) -> None:
        """Take a plan; only the first of a frame counts."""
        frame = self._latest.get(plan.stamp_ns)
        if frame is None:
            self.unmatched += 1
        elif frame.plan is None:
            frame.plan = plan
            frame.latency_ms = (steady_s - frame.truth_came_s) * 1e3
            age_ms = (now_ns - plan.stamp_ns) / 1e6
            if abs(age_ms - frame.latency_ms) < CLOCK_JUMP_MS:
                frame.age_ms = age_ms

    def distances_m(self, frame: Frame) -> FloatArray:
        """[6] metres between the planned and the true point, NaN where there is no truth or no plan."""
        distances = np.full(len(WAYPOINT_TIMES_S), np.nan)
        if frame.plan is not None and len(frame.truth.due_ns):
            planned = np.array([frame.plan.at(due) for due in frame.truth.due_ns.tolist()])
            apart = self._point(planned) - self._point(frame.truth.poses)
            distances[: len(apart)] = np.hypot(*apart.T)
        return distances

    def _point(self, poses: FloatArray) -> FloatArray:
        (x, y), cosine, sine = self.point, np.cos(poses[:, 2]), np.sin(poses[:, 2])
        return poses[:, :2] + np.column_stack([cosine * x - sine * y, sine * x + cosine * y])

    def summary(self, deadline_ms: float) -> Summary:
        """All frames so far.

        Args:
            deadline_ms: plans that take longer are late.
        """
        planned = [frame for frame in self.frames if frame.plan is not None]
        rows = [self.distances_m(frame) for frame in self.frames]
        distances = np.array(rows).reshape(-1, len(WAYPOINT_TIMES_S))
        complete = distances[~np.isnan(distances).any(axis=1)]
        ends = [STEPS_PER_S * horizon for horizon in HORIZONS_S]
        return Summary(
            frames=len(self.frames),
            planned=len(planned),
            missed=len(self.frames) - len(planned),
            late=sum(frame.latency_ms > deadline_ms for frame in planned),
            unmatched=self.unmatched,
            complete=len(complete),
            l2_at_m=tuple(float(complete[:, end - 1].mean()) for end in ends) if len(complete) else None,
            l2_mean_m=tuple(float(complete[:, :end].mean()) for end in ends) if len(complete) else None,
            latency_ms=_spread([frame.latency_ms for frame in planned]),
            age_ms=_spread([frame.age_ms for frame in planned if not math.isnan(frame.age_ms)]),
            distances_m={
                frame.truth.stamp_ns: [None if math.isnan(value) else value for value in row]
                for frame, row in zip(self.frames, distances.tolist(), strict=True)
            },
        )


@dataclass(frozen=True)
class Summary:
    """What a drive came to.

    Attributes:
        frames: truths that came.
        complete: frames with a plan and with truth up to 3 s; the two L2 figures are means over these.
        l2_at_m: at 1, 2, 3 s, as UniAD reports.
        l2_mean_m: mean of the steps up to 1, 2, 3 s, as ST-P3 and VAD report.
        latency_ms: p50, p95, max.
        age_ms: p50, p95, max of the frames in which ROS time did not jump.
        distances_m: by stamp, per step.
    """

    frames: int
    planned: int
    missed: int
    late: int
    unmatched: int
    complete: int
    l2_at_m: tuple[float, ...] | None
    l2_mean_m: tuple[float, ...] | None
    latency_ms: tuple[float, float, float] | None
    age_ms: tuple[float, float, float] | None
    distances_m: dict[int, list[float | None]]

    def as_json(self) -> bytes:
        """For files."""
        return (json.dumps(self.__dict__, indent=1) + "\n").encode()

    def lines(self) -> list[str]:
        """For people."""

        def shown(values: tuple[float, ...] | None, form: str) -> str:
            return "none" if values is None else " / ".join(format(value, form) for value in values)

        return [
            f"frames: {self.frames}, planned {self.planned}, missed {self.missed}, late {self.late}",
            f"L2 at 1 / 2 / 3 s, {self.complete} complete frames: {shown(self.l2_at_m, '.3f')} m",
            f"L2 mean up to 1 / 2 / 3 s: {shown(self.l2_mean_m, '.3f')} m",
            f"latency p50 / p95 / max: {shown(self.latency_ms, '.0f')} ms",
            f"age p50 / p95 / max: {shown(self.age_ms, '.0f')} ms",
        ]


def _spread(values: list[float]) -> tuple[float, float, float] | None:
    if not values:
        return None
    p50, p95, most = np.percentile(values, [50, 95, 100]).tolist()
    return p50, p95, most
