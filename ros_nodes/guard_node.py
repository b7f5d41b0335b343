"""`trajectory_guard`, the last node before the controller: republishes good plans, else stops the vehicle."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import State as LifecycleStates
from nav_msgs.msg import Odometry, Path
from rclpy.clock import Clock, ClockType
from rclpy.duration import Duration
from rclpy.lifecycle import LifecycleNode, LifecycleState

from ros_nodes import topics
from ros_nodes.guard import Guard, State
from ros_nodes.lifecycle import run, transition
from ros_nodes.limits import GuardSettings
from ros_nodes.messages import (
    Level,
    diagnostics_message,
    heading_of_quaternion,
    stamp_ns_of,
    trajectory_message,
    trajectory_of,
)
from ros_nodes.motion import Motion, Pose, Trajectory
from ros_nodes.parameters import NodeParameters, Parameter

PARAMETERS = (
    *(
        Parameter(name, setting.default, **setting.metadata)  # type: ignore[arg-type]  # each has a default
        for name, setting in GuardSettings.__dataclass_fields__.items()
    ),
    Parameter("watchdog_period_ms", 100.0, "Publishes at least so often, steady time.", 5.0, 1000.0),
)

LEVELS: dict[State, Level] = {
    State.FOLLOWING: "ok",
    State.HOLDING: "warn",
    State.STOPPING: "error",
    State.STOPPED: "error",
}
STATUS_PERIOD_S = 0.5
LAST_WORDS_S = 1.0
"""Longest that deactivating waits for the last stop to be acknowledged: a busy machine needs its time."""


class TrajectoryGuard(LifecycleNode):
    """Checks every plan and publishes what may be followed, at least every watchdog period.

    While active it publishes on each plan and on each tick of a steady-clock timer, which needs no message.
    The last thing it publishes is a stop command.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__("trajectory_guard", **options)
        self._declared = NodeParameters(self, PARAMETERS)

    @transition
    def on_configure(self, state: LifecycleState) -> None:
        """Check the parameters; make the publishers."""
        values = self._declared.read()
        try:
            self._period_s = values.pop("watchdog_period_ms") / 1e3
            self._settings = GuardSettings(**values)
        except Exception:
            self._declared.release()
            raise
        self._trajectory = self.create_lifecycle_publisher(Path, topics.GUARD_PATH, topics.plan_qos())
        self._status = self.create_lifecycle_publisher(
            DiagnosticArray, topics.GUARD_STATUS, topics.record_qos()
        )
        self._diagnostics = self.create_lifecycle_publisher(
            DiagnosticArray, topics.DIAGNOSTICS, topics.record_qos()
        )

    @transition
    def on_activate(self, state: LifecycleState) -> None:
        """Begin with a stop, knowing nothing; listen and start the watchdog."""
        super().on_activate(state)
        self._guard = Guard(self._settings)
        self._shown: tuple[State, str] | None = None
        self._status_due_s = 0.0
        self._odometry_faults, self._odometry_fault = 0, ""
        self._plans_taken = 0
        self._handling_ms: deque[float] = deque(maxlen=1000)
        self._late_ms: deque[float] = deque(maxlen=1000)
        self._plans = self.create_subscription(Path, topics.PLANNER_PATH, self._on_plan, topics.plan_qos())
        self._odometry = self.create_subscription(
            Odometry, topics.ODOMETRY, self._on_odometry, topics.sensor_qos("best_effort", depth=10)
        )
        self._watchdog = self.create_timer(
            self._period_s, self._on_tick, clock=Clock(clock_type=ClockType.STEADY_TIME)
        )
        self._ticked_s = time.monotonic()
        self._publish()

    @transition
    def on_deactivate(self, state: LifecycleState) -> None:
        """Publish a stop, and nothing after it."""
        self._end_with_stop()
        super().on_deactivate(state)

    @transition
    def on_cleanup(self, state: LifecycleState) -> None:
        """Take down what configuring made."""
        self._take_down()

    @transition
    def on_shutdown(self, state: LifecycleState) -> None:
        """From any state; rclpy would let an active node go on."""
        if state.state_id == LifecycleStates.PRIMARY_STATE_ACTIVE:
            self._end_with_stop()
        if state.state_id != LifecycleStates.PRIMARY_STATE_UNCONFIGURED:
            self._take_down()

    def _end_with_stop(self) -> None:
        self.destroy_timer(self._watchdog)
        self.destroy_subscription(self._plans)
        self.destroy_subscription(self._odometry)
        self._send(self._guard.stop(self._now_ns()))
        self._trajectory.wait_for_all_acked(Duration(seconds=LAST_WORDS_S))

    def _take_down(self) -> None:
        for publisher in (self._trajectory, self._status, self._diagnostics):
            self.destroy_lifecycle_publisher(publisher)
        self._declared.release()

    def _now_ns(self) -> int:
        return self.get_clock().now().nanoseconds

    def _on_odometry(self, message: Odometry) -> None:
        pose, twist = message.pose.pose, message.twist.twist
        fault = self._guard.take_odometry(
            stamp_ns_of(message.header.stamp),
            Motion(
                Pose(pose.position.x, pose.position.y, heading_of_quaternion(pose.orientation)),
                twist.linear.x,
                twist.angular.z,
            ),
            self._now_ns(),
        )
        if fault:
            self._odometry_faults += 1
            self._odometry_fault = fault
            self.get_logger().warning(f"odometry: {fault}", throttle_duration_sec=1.0)

    def _on_plan(self, message: Path) -> None:
        began_s = time.perf_counter()
        plan = trajectory_of(message, self._settings.max_poses)
        planners = self.count_publishers(self._plans.topic_name)
        fault = self._guard.take_plan(plan, self._now_ns(), time.monotonic(), planners)
        self._plans_taken += fault is None
        self._publish()
        self._handling_ms.append((time.perf_counter() - began_s) * 1e3)

    def _on_tick(self) -> None:
        steady_s = time.monotonic()
        self._late_ms.append(max(steady_s - self._ticked_s - self._period_s, 0.0) * 1e3)
        self._ticked_s = steady_s
        self._publish()

    def _publish(self) -> None:
        now_ns = self._now_ns()
        self._send(self._guard.output(now_ns, time.monotonic()))
        self._report(now_ns)

    def _send(self, trajectory: Trajectory) -> None:
        self._trajectory.publish(trajectory_message(trajectory))

    def _report(self, now_ns: int) -> None:
        guard, steady_s = self._guard, time.monotonic()
        shown = (guard.state, guard.reason)
        if shown == self._shown and steady_s < self._status_due_s:
            return
        if self._shown is None or guard.state is not self._shown[0]:
            self.get_logger().info(f"{guard.state.value}{guard.reason and ': ' + guard.reason}")
        self._shown, self._status_due_s = shown, steady_s + STATUS_PERIOD_S
        values: dict[str, object] = {
            "state": guard.state.value,
            "reason": guard.reason,
            "plans_taken": self._plans_taken,
            "plans_refused": guard.refused.total(),
            **{f"refused_{check}": count for check, count in sorted(guard.refused.items())},
            "odometry_faults": self._odometry_faults,
            "odometry_last_fault": self._odometry_fault,
            "plans_from": topics.publishers_of(self, self._plans),
            "odometry_from": topics.publishers_of(self, self._odometry),
        }
        for name, samples in (("handling_ms", self._handling_ms), ("watchdog_late_ms", self._late_ms)):
            if samples:
                ordered = sorted(samples)
                values[f"{name}_p50"], values[f"{name}_max"] = ordered[len(ordered) // 2], ordered[-1]
        summary = f"{guard.state.value}{guard.reason and ': ' + guard.reason}"
        name = self.get_fully_qualified_name()
        message = diagnostics_message(now_ns, name, LEVELS[guard.state], summary, values)
        self._status.publish(message)
        self._diagnostics.publish(message)


def main() -> int:
    """Run the node until it is interrupted; it stops the vehicle before it ends."""
    return run(TrajectoryGuard)


if __name__ == "__main__":
    sys.exit(main())
