"""The guard: which plans may be followed, and what happens when none comes.

Pure: no ROS and no clock of its own. Every trajectory that `Guard.output` returns has passed the limits, or
is a stop command. Times ending in `_ns` are ROS time in nanoseconds; `steady_s` is a clock that neither jumps
nor stops.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from enum import Enum

import numpy as np

from ros_nodes.limits import Fault, GuardSettings, faults_of
from ros_nodes.motion import (
    NANOSECONDS,
    STEP_S,
    Motion,
    OdometryTrack,
    Pose,
    Trajectory,
    onward,
    placed,
    relative,
    stop_along,
    stop_command,
)

CLOCK_NOISE_NS = 50_000_000


class State(str, Enum):
    """What the guard is doing; the order is that of the fallback."""

    FOLLOWING = "following"
    HOLDING = "holding"
    STOPPING = "stopping"
    STOPPED = "stopped"


class Guard:
    """Decides what goes to the controller. Feed it what arrives, ask `output` at least every watchdog period.

    Attributes:
        state: what it is doing.
        reason: why, when it is not following; "" otherwise.
        refused: how often each check refused a plan.
    """

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self.odometry = OdometryTrack(settings.odometry_timeout_ms, settings.max_odometry_jump_m)
        self.refused: Counter[str] = Counter()
        self.state, self.reason = State.STOPPED, "no plan yet"
        self._current: Trajectory | None = None
        self._since_s = 0.0
        self._last_passed: Trajectory | None = None
        self._passed_in_a_row = 0
        self._refusal: Fault | None = None
        self._newest_ns = 0

    def take_odometry(self, stamp_ns: int, motion: Motion, now_ns: int) -> str:
        """Take a message of the vehicle's motion, or leave it out.

        One from the future is left out: every message after it would be older than the newest.

        Args:
            stamp_ns: of its header.
            motion: as it came, also garbage.
            now_ns: ROS time.

        Returns:
            What is wrong with it; "" if nothing is.
        """
        self._notice_clock(now_ns)
        ahead_ms = (stamp_ns - now_ns) / 1e6
        if ahead_ms > self.settings.odometry_timeout_ms:
            allowed = f"{self.settings.odometry_timeout_ms:g} ms"
            return f"its stamp is {ahead_ms:.0f} ms ahead of the clock; allowed {allowed}"
        return self.odometry.add(stamp_ns, motion)

    def take_plan(self, plan: Trajectory, now_ns: int, steady_s: float, planners: int = 1) -> Fault | None:
        """Take a plan, or refuse it and return why.

        Args:
            plan: as it came, also garbage.
            now_ns: ROS time.
            steady_s: the steady clock.
            planners: publishers on its topic; with more than one nobody knows whose plan it is.
        """
        self._notice_clock(now_ns)
        fault = next(self._plan_faults(plan, now_ns, planners), None)
        if fault is not None:
            self.refused[fault.check] += 1
            self._refusal, self._passed_in_a_row = fault, 0
            return fault
        self._refusal, self._last_passed = None, plan
        self._passed_in_a_row += 1
        needed = self.settings.plans_to_recover
        if self.state in (State.STOPPING, State.STOPPED) and self._passed_in_a_row < needed:
            self.reason = f"{self._passed_in_a_row} of {needed} good plans to go on"
            return None
        self.state, self.reason = State.FOLLOWING, ""
        self._current, self._since_s = plan, steady_s
        return None

    def output(self, now_ns: int, steady_s: float) -> Trajectory:
        """What the controller is to follow from now on; moves the state machine on."""
        self._notice_clock(now_ns)
        settings, refusal = self.settings, self._refusal
        if self._current is None:
            return self.stop(now_ns)
        waited_ms = (steady_s - self._since_s) * 1e3
        if self.state is State.STOPPING:
            if waited_ms >= self._current.times_s[-1] * 1e3:
                self.state, self._current = State.STOPPED, None
        elif refusal is not None and refusal.check == "braking":
            self._begin_stop(self._current, now_ns, steady_s, hard=True)
        elif waited_ms > settings.hold_ms or now_ns >= self._current.due_ns[-1]:
            self._begin_stop(self._current, now_ns, steady_s)
        elif refusal is not None:
            self.state, self.reason = State.HOLDING, f"refused, {': '.join(refusal)}"
        elif waited_ms > settings.plan_timeout_ms:
            self.state, self.reason = State.HOLDING, f"no plan for {settings.plan_timeout_ms:g} ms"
        return self._current or self.stop(now_ns)

    def stop(self, now_ns: int) -> Trajectory:
        """A stop command, whatever the state."""
        return stop_command(now_ns, self.settings.base_frame)

    def _begin_stop(self, followed: Trajectory, now_ns: int, steady_s: float, hard: bool = False) -> None:
        limits = self.settings
        cause = ": ".join(self._refusal) if self._refusal else f"no plan for {limits.hold_ms:g} ms"
        self.reason, self._passed_in_a_row = f"stop, {cause}", 0
        before, now = self.odometry.at(followed.stamp_ns), self.odometry.at(now_ns)
        if before and now:
            vehicle, speed = relative(before.pose, now.pose), now.speed_mps
        else:  # nobody knows better: the vehicle is where the plan wanted it
            vehicle, soon = followed.at(now_ns), followed.at(now_ns + round(STEP_S * NANOSECONDS))
            speed = math.hypot(soon.x - vehicle.x, soon.y - vehicle.y) / STEP_S
        hardest = min(limits.max_braking_mps2, limits.max_jerk_mps3 * STEP_S)
        braking = hardest if hard else min(limits.comfort_braking_mps2, hardest)
        options = [(followed, vehicle, braking)]
        if now:  # where no stop leads from the vehicle to the plan: as it moves
            options.append((onward(now, now_ns, followed.frame_id), Pose(0.0, 0.0, 0.0), hardest))
        for path, start, wanted in options:
            stop = stop_along(path, now_ns, start, speed, wanted, hardest, limits.min_horizon_s)
            fault = stop and next(faults_of(stop, limits, speed), None)
            if stop and not fault:
                self.state, self._current, self._since_s = State.STOPPING, stop, steady_s
                return
            if path is followed and fault:
                self.reason += f"; not along the last plan from {speed:.1f} m/s, {': '.join(fault)}"
        self.state, self._current = State.STOPPED, None

    def _notice_clock(self, now_ns: int) -> None:
        if now_ns < self._newest_ns - CLOCK_NOISE_NS:  # all stamps so far belong to another time
            jump_s = (self._newest_ns - now_ns) / NANOSECONDS
            self.state, self.reason = State.STOPPED, f"the clock jumped back {jump_s:.2f} s"
            self._current = self._last_passed = self._refusal = None
            self._passed_in_a_row, self._newest_ns = 0, now_ns
            self.odometry.clear()
        self._newest_ns = max(now_ns, self._newest_ns)

    def _plan_faults(self, plan: Trajectory, now_ns: int, planners: int) -> Iterator[Fault]:
        limits, last = self.settings, self._last_passed
        age_ms = (now_ns - plan.stamp_ns) / 1e6
        if planners > 1:
            yield Fault("planners", f"{planners} nodes publish plans; allowed 1")
        if not -limits.max_ahead_ms <= age_ms <= limits.max_age_ms:
            allowed = f"{-limits.max_ahead_ms:g} to {limits.max_age_ms:g} ms"
            yield Fault("age", f"{age_ms:.0f} ms; allowed {allowed}")
        if last is not None and plan.stamp_ns <= last.stamp_ns:
            yield Fault("order", "its input is not newer than the last good plan's")
        before, now = self.odometry.at(plan.stamp_ns), self.odometry.at(now_ns)
        yield from faults_of(plan, limits, before and before.speed_mps)
        if before and now:
            vehicle, wanted = relative(before.pose, now.pose), plan.at(now_ns)
            away = math.hypot(vehicle.x - wanted.x, vehicle.y - wanted.y)
            if away > limits.max_distance_m:
                yield Fault("distance", f"{away:.2f} m from the vehicle; allowed {limits.max_distance_m:g} m")
        elif limits.require_odometry:
            yield Fault("odometry", f"none within {limits.odometry_timeout_ms:g} ms of plan and present")
        if last is not None and now_ns - last.stamp_ns <= (limits.hold_ms + limits.max_age_ms) * 1e6:
            at_last = self.odometry.at(last.stamp_ns)
            origin = relative(at_last.pose, before.pose) if at_last and before else last.at(plan.stamp_ns)
            for along, across in _deviations(last, plan, origin, limits.continuity_horizon_s):
                # Behind it is braking, which no guard may refuse as a surprise.
                if along > limits.max_advance_m or abs(across) > limits.max_lateral_jump_m:
                    yield Fault(
                        "continuity",
                        f"{along:.2f} m ahead of, {across:.2f} m beside the last good plan; allowed "
                        f"{limits.max_advance_m:g}, {limits.max_lateral_jump_m:g} m",
                    )


def _deviations(
    last: Trajectory, plan: Trajectory, origin: Pose, horizon_s: float
) -> Iterator[tuple[float, float]]:
    """How far the plan lies along and across the last one, in steps; origin is the plan's in last's frame."""
    for after_s in np.arange(STEP_S, horizon_s + 1e-9, STEP_S):
        when_ns = plan.stamp_ns + round(float(after_s) * NANOSECONDS)
        if when_ns > last.due_ns[-1]:
            return
        yield relative(last.at(when_ns), placed(origin, plan.at(when_ns)))[:2]
