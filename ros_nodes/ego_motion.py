"""From odometry to the ego state at a frame's time. Knows no ROS."""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass
from typing import Literal

from ros_nodes.synchronisation import RESET_NS
from vla_autoprune.errors import InputError
from vla_autoprune.frame import EgoState

AccelerationSource = Literal["odometry", "topic"]

BUFFERED = 500
DIFFERENCE_NS = 500_000_000
"""Acceleration from odometry is the change of speed over up to this time before the frame."""
JUMP_M = 2.0
JUMP_MPS = 2.0
JUMP_MPS2 = 15.0
"""No car: between two messages the position leaves what the speed gives by more than `JUMP_M`, or the speed
changes by more than `JUMP_MPS` and `JUMP_MPS2` times the time between."""


@dataclass(frozen=True)
class OdometrySample:
    """One odometry message: twist in the ego frame, pose of the ego frame in `frame_id`, such as the map."""

    stamp_ns: int
    speed_mps: float
    yaw_rate_rps: float
    x: float = 0.0
    y: float = 0.0
    heading: float = 0.0
    frame_id: str = ""


class EgoMotion:
    """Keeps recent odometry and gives the ego state that belongs to a frame.

    Args:
        max_age_ms: how much older than the frame odometry, and acceleration where it has a topic, may be.
        acceleration_source: differences of odometry's speed, or messages of their own.
    """

    def __init__(self, max_age_ms: float, acceleration_source: AccelerationSource = "odometry") -> None:
        self.max_age_ns = round(max_age_ms * 1e6)
        self.acceleration_source = acceleration_source
        self.counts: Counter[str] = Counter()
        """Faults of messages, by name."""
        self.travelled_m = 0.0
        self._samples: deque[OdometrySample] = deque(maxlen=BUFFERED)
        self._accelerations: deque[tuple[int, float]] = deque(maxlen=BUFFERED)
        self._steady_since_ns = 0
        """Stamp of the first sample after the last jump: differences do not reach across it."""

    @property
    def newest(self) -> OdometrySample | None:
        """The last sample taken in."""
        return self._samples[-1] if self._samples else None

    @property
    def accelerations(self) -> int:
        """How many messages of the acceleration topic are kept."""
        return len(self._accelerations)

    def add(self, sample: OdometrySample) -> str | None:
        """Take odometry in.

        Returns:
            What is wrong with it, if anything: "not finite" and "out of order" are left out, "jump" and
            "clock went back" are taken in and begin a new history.
        """
        values = (sample.speed_mps, sample.yaw_rate_rps, sample.x, sample.y, sample.heading)
        fault = None
        if not all(map(math.isfinite, values)):
            fault = "not finite"
        elif self._samples:
            fault = self._follow(self._samples[-1], sample)
        if fault is not None:
            self.counts[f"odometry {fault}"] += 1
        if fault == "clock went back":
            self._samples.clear()
            while self._accelerations and self._accelerations[0][0] - sample.stamp_ns >= RESET_NS:
                self._accelerations.popleft()  # not those of the new time: the topics come in any order
        if fault in ("clock went back", "jump") or not self._samples:
            self._steady_since_ns = sample.stamp_ns
        if fault not in ("not finite", "out of order"):
            self._samples.append(sample)
        return fault

    def add_acceleration(self, stamp_ns: int, acceleration_mps2: float) -> str | None:
        """Take a message of the acceleration topic in; returns what is wrong with it, if anything."""
        fault = None
        if not math.isfinite(acceleration_mps2):
            fault = "not finite"
        elif self._accelerations and stamp_ns <= self._accelerations[-1][0]:
            fault = "out of order"
            if self._accelerations[-1][0] - stamp_ns >= RESET_NS:
                self._accelerations.clear()
                fault = None
        if fault is not None:
            self.counts[f"acceleration {fault}"] += 1
        else:
            self._accelerations.append((stamp_ns, acceleration_mps2))
        return fault

    def reached(self, stamp_ns: int) -> bool:
        """Whether nothing that matters for a frame of that time is still to come."""
        newest = [self._samples[-1].stamp_ns] if self._samples else [-1]
        if self.acceleration_source == "topic":
            newest.append(self._accelerations[-1][0] if self._accelerations else -1)
        # Stamps far ahead are from before a clock went back.
        return all(0 <= stamp - stamp_ns < RESET_NS for stamp in newest)

    def pose_at(self, stamp_ns: int) -> OdometrySample:
        """The newest sample at or before a time, else the first after it.

        Raises:
            InputError: there is none, or none near enough.
        """
        if not self._samples:
            raise InputError("no odometry has arrived; a plan needs the speed")
        before = (sample for sample in reversed(self._samples) if sample.stamp_ns <= stamp_ns)
        sample = next(before, self._samples[0])
        self._check_age("odometry", sample.stamp_ns, stamp_ns)
        return sample

    def at(self, stamp_ns: int) -> EgoState:
        """The ego state that belongs to a frame.

        Raises:
            InputError: odometry, or acceleration where it has a topic, is missing or too old.
        """
        sample = self.pose_at(stamp_ns)
        return EgoState(sample.speed_mps, self._acceleration(sample, stamp_ns), sample.yaw_rate_rps)

    def _acceleration(self, sample: OdometrySample, stamp_ns: int) -> float:
        if self.acceleration_source == "topic":
            if not self._accelerations:
                raise InputError("no acceleration has arrived; or set acceleration_source to odometry")
            before = (item for item in reversed(self._accelerations) if item[0] <= stamp_ns)
            stamp, value = next(before, self._accelerations[0])
            self._check_age("acceleration", stamp, stamp_ns)
            return value
        since_ns = max(self._steady_since_ns, sample.stamp_ns - DIFFERENCE_NS)
        first = next(item for item in self._samples if item.stamp_ns >= since_ns)
        if first.stamp_ns >= sample.stamp_ns:
            return 0.0
        return (sample.speed_mps - first.speed_mps) / ((sample.stamp_ns - first.stamp_ns) / 1e9)

    def _follow(self, last: OdometrySample, sample: OdometrySample) -> str | None:
        if sample.stamp_ns <= last.stamp_ns:
            return "clock went back" if last.stamp_ns - sample.stamp_ns >= RESET_NS else "out of order"
        seconds = (sample.stamp_ns - last.stamp_ns) / 1e9
        moved_m = math.hypot(sample.x - last.x, sample.y - last.y)
        expected_m = seconds * max(abs(last.speed_mps), abs(sample.speed_mps))
        self.travelled_m += seconds * abs(sample.speed_mps)
        if moved_m > expected_m + JUMP_M:
            return "jump"
        changed_mps = abs(sample.speed_mps - last.speed_mps)
        return "jump" if changed_mps > JUMP_MPS + JUMP_MPS2 * seconds else None

    def _check_age(self, what: str, stamp_ns: int, frame_ns: int) -> None:
        if abs(frame_ns - stamp_ns) > self.max_age_ns:
            raise InputError(
                f"{what} is {abs(frame_ns - stamp_ns) / 1e6:.0f} ms "
                f"{'older' if stamp_ns < frame_ns else 'newer'} than the image, "
                f"allowed {self.max_age_ns / 1e6:g}; it has stopped, or its clock is another"
            )
