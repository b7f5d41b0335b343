"""How long the trajectory guard takes: from plan to trajectory over DDS, and from the last plan to a stop.

python benchmarks/guard.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import typer

PLANS_HZ, ODOMETRY_HZ, SPEED_MPS = 10.0, 50.0, 8.0


def main(
    seconds: float = typer.Option(20.0, help="Of driving before the planner falls silent, each time."),
    silences: int = typer.Option(5, help="How often it does."),
    domain: int = typer.Option(87, help="ROS domain of the measurement."),
) -> None:
    """Drive a guard in a process of its own with plans at 10 Hz and odometry at 50 Hz."""
    os.environ |= {
        "ROS_DOMAIN_ID": str(domain),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "PYTHONPATH": f"{Path(__file__).resolve().parents[1]}:{os.environ.get('PYTHONPATH', '')}",
    }
    import rclpy
    from diagnostic_msgs.msg import DiagnosticArray
    from lifecycle_msgs.msg import Transition
    from lifecycle_msgs.srv import ChangeState
    from nav_msgs.msg import Odometry
    from nav_msgs.msg import Path as PathMessage

    from ros_nodes import topics
    from ros_nodes.guard_node import PARAMETERS
    from ros_nodes.messages import stamp_ns_of, time_message, trajectory_message
    from ros_nodes.motion import Trajectory

    guard = subprocess.Popen([sys.executable, "-m", "ros_nodes.guard_node"])
    rclpy.init()
    node = rclpy.create_node("benchmark")
    change: Any = node.create_client(ChangeState, "/trajectory_guard/change_state")
    change.wait_for_service(30.0)
    for number in (Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE):
        future = change.call_async(ChangeState.Request(transition=Transition(id=number)))
        rclpy.spin_until_future_complete(node, future, timeout_sec=30.0)

    sent: dict[int, float] = {}
    through_ms: list[float] = []
    stops_s: list[float] = []
    status: list[DiagnosticArray] = []

    def on_path(path: PathMessage) -> None:
        since_s = sent.pop(stamp_ns_of(path.header.stamp), None)
        if since_s is not None:
            through_ms.append((time.monotonic() - since_s) * 1e3)
        ends = [pose.pose.position.x for pose in path.poses[-2:]]
        if ends[1] - ends[0] < 1e-6:
            stops_s.append(time.monotonic())

    node.create_subscription(PathMessage, topics.GUARD_PATH, on_path, topics.record_qos())
    node.create_subscription(DiagnosticArray, topics.GUARD_STATUS, status.append, topics.record_qos())
    plans = node.create_publisher(PathMessage, topics.PLANNER_PATH, topics.plan_qos())
    motion = node.create_publisher(Odometry, topics.ODOMETRY, topics.sensor_qos(depth=5))
    began_s = time.monotonic()
    due_s = {"plan": 0.0, "odometry": 0.0}

    def drive(for_s: float, with_plans: bool) -> float:
        last_s, end_s = 0.0, time.monotonic() + for_s
        while (now_s := time.monotonic()) < end_s:
            stamp_ns = time.time_ns()
            if now_s >= due_s["odometry"]:
                odometry = Odometry()
                odometry.header.stamp = time_message(stamp_ns)
                odometry.pose.pose.position.x = SPEED_MPS * (now_s - began_s)
                odometry.twist.twist.linear.x = SPEED_MPS
                motion.publish(odometry)
                due_s["odometry"] = now_s + 1 / ODOMETRY_HZ
            if with_plans and now_s >= due_s["plan"]:
                times = np.arange(1, 7) * 0.5
                due_ns = stamp_ns + np.rint(times * 1e9).astype(np.int64)
                poses = np.column_stack([SPEED_MPS * times, 0 * times, 0 * times])
                message = trajectory_message(Trajectory(stamp_ns, topics.EGO_FRAME, due_ns, poses))
                sent[stamp_ns], last_s = time.monotonic(), time.monotonic()
                plans.publish(message)
                due_s["plan"] = now_s + 1 / PLANS_HZ
            rclpy.spin_once(node, timeout_sec=0.002)
        return last_s

    try:
        drive(2.0, with_plans=True)
        through_ms.clear()
        waits_ms = []
        for _ in range(silences):
            last_s = drive(seconds / silences, with_plans=True)
            drive(3.0, with_plans=False)
            waits_ms.append((next(at for at in stops_s if at > last_s) - last_s) * 1e3)
        values = {item.key: item.value for item in status[-1].status[0].values}
    finally:
        guard.terminate()
        guard.wait(10.0)
        rclpy.shutdown()

    defaults = {parameter.name: parameter.default for parameter in PARAMETERS}
    measured = {"plan to trajectory, over DDS": through_ms, "last plan to first stop": waits_ms}
    for name, samples in measured.items():
        p50, p99, most = np.percentile(samples, [50, 99, 100])
        print(f"{name}: p50 {p50:.1f} ms, p99 {p99:.1f}, largest {most:.1f} of {len(samples)}")
    print(f"bound on the latter: {defaults['hold_ms']:g} + {defaults['watchdog_period_ms']:g} ms")
    for name in ("handling_ms", "watchdog_late_ms"):
        print(f"in the guard, {name}: p50 {values[f'{name}_p50']}, largest {values[f'{name}_max']}")


if __name__ == "__main__":
    typer.run(main)
