"""The guard as a process: faults of every kind come over real DDS, and what it publishes is looked at."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path as FilePath

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2: pip install '.[ros-test]' or source ROS")
pytestmark = pytest.mark.ros

from diagnostic_msgs.msg import DiagnosticArray
from nav_msgs.msg import Odometry, Path
from rosgraph_msgs.msg import Clock

from ros_nodes import topics
from ros_nodes.limits import GuardSettings, faults_of
from ros_nodes.messages import (
    quaternion_of_heading,
    stamp_ns_of,
    time_message,
    trajectory_message,
    trajectory_of,
)
from ros_nodes.motion import Trajectory

HERE = FilePath(__file__).resolve().parent
SPEED_MPS = 5.0
HOLD_MS = 1500.0
PERIOD_MS = 100.0
PATIENT = {
    "plan_timeout_ms": 1000.0,
    "hold_ms": HOLD_MS,
    "odometry_timeout_ms": 2000.0,
    "max_age_ms": 5000.0,
    "max_ahead_ms": 5000.0,  # a simulated clock may lag behind
}
"""A busy machine is late with everything; what the defaults mean is the matter of test_guard.py."""
SETTINGS = GuardSettings(**PATIENT)
SLACK_MS = 2000.0
"""For messages on a loaded machine, beside what the guard says of its own lateness; docs/ros.md has what was
measured on a quiet one."""


def straight(stamp_ns: int, speed_mps: float = SPEED_MPS) -> Path:
    times = np.arange(1, 7) * 0.5
    poses = np.column_stack([speed_mps * times, 0 * times, 0 * times])
    due = stamp_ns + np.rint(times * 1e9).astype(np.int64)
    return trajectory_message(Trajectory(stamp_ns, "base_link", due, poses))


class Drive:
    """Straight on at constant speed, in the test's process: odometry at 10 Hz, plans at 2.5 Hz."""

    def __init__(self, bench, name: str, **parameters) -> None:
        namespace = f"/{name}"
        self.bench, node = bench, bench.node
        self.odometry = node.create_publisher(Odometry, f"{namespace}/odometry", topics.sensor_qos(depth=5))
        self.namespace, self.plans_on = namespace, False
        self.open_plans()
        self.heard: list[tuple[float, Trajectory]] = []
        self.sent: dict[int, Path] = {}
        node.create_subscription(
            Path,
            f"{namespace}/trajectory/path",
            lambda path: self.heard.append((time.monotonic(), trajectory_of(path, 100))),
            topics.record_qos(),
        )
        self.status = bench.listen(DiagnosticArray, f"{namespace}/guard/status", topics.record_qos())
        settings = {**PATIENT, "watchdog_period_ms": PERIOD_MS}
        self.guard = bench.start(
            "ros_nodes.guard_node", "trajectory_guard", "-r", f"__ns:={namespace}", **settings, **parameters
        )
        self.guard.name = f"{namespace}/trajectory_guard"
        self.began_ns, self.next_odometry_s, self.next_plan_s = time.time_ns(), 0.0, 0.0
        self.odometry_on = True
        self.now_ns = time.time_ns
        self.bent = lambda odometry: odometry
        self.plan = straight

    def open_plans(self) -> None:
        topic = f"{self.namespace}/planner/path"
        self.plans = self.bench.node.create_publisher(Path, topic, topics.plan_qos())
        self.plans_on = True

    def go(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= end_s, "the time")

    def until(self, happened: Callable[[], object], what: str) -> None:
        """Drive on until something is so."""

        def ticked() -> object:
            self.tick()
            return happened()

        self.bench.until(ticked, what)

    def tick(self) -> None:
        now_s = time.monotonic()
        if self.odometry_on and now_s >= self.next_odometry_s:
            odometry = Odometry(child_frame_id="base_link")
            odometry.header.frame_id = "map"
            stamp_ns = self.now_ns()
            odometry.header.stamp = time_message(stamp_ns)
            odometry.pose.pose.position.x = SPEED_MPS * (stamp_ns - self.began_ns) / 1e9
            odometry.pose.pose.orientation = quaternion_of_heading(0.0)
            odometry.twist.twist.linear.x = SPEED_MPS
            self.odometry.publish(self.bent(odometry))
            self.next_odometry_s = now_s + 0.1
        if self.plans_on and now_s >= self.next_plan_s:
            plan = self.plan(self.now_ns())
            self.sent[stamp_ns_of(plan.header.stamp)] = plan
            self.plans.publish(plan)
            self.next_plan_s = now_s + 0.4

    def state(self) -> str:
        return self.status[-1].status[0].message if self.status else ""

    def value(self, key: str) -> str:
        values = self.status[-1].status[0].values if self.status else ()
        return next((item.value for item in values if item.key == key), "")

    def count(self, key: str) -> int:
        return int(self.value(key) or 0)

    def last_is_stop(self) -> bool:
        return bool(self.heard) and self.heard[-1][1].is_stop

    def wait_for(self, *texts: str) -> None:
        self.until(lambda: all(text in self.state() for text in texts), f"a state with {', '.join(texts)}")

    def wait_for_refusal(self, check: str) -> None:
        """Until a plan more is refused; what was seen of it in a state depends on the state."""
        before = self.count(f"refused_{check}")
        self.until(lambda: self.count(f"refused_{check}") > before, f"a plan that is refused, {check}")

    def wait_for_motion(self) -> None:
        self.until(lambda: self.heard and not self.last_is_stop(), "a trajectory that moves")

    def check_that_a_stop_is_the_last(self) -> None:
        self.until(self.last_is_stop, "the stop")
        count = len(self.heard)
        self.go(0.5)
        assert len(self.heard) == count

    def begin(self) -> None:
        assert self.guard.transition("configure")
        assert self.guard.transition("activate")
        self.wait_for("following")

    def check_all(self) -> None:
        """Everything heard keeps the limits or is a stop."""
        for _, trajectory in self.heard:
            assert trajectory.is_stop or not list(faults_of(trajectory, SETTINGS))


@pytest.fixture(scope="module")
def running(bench):
    made = Drive(bench, "vehicle")
    made.begin()
    return made


@pytest.fixture
def drive(running):
    """A guard that follows; whatever it publishes in a test is checked at its end."""
    running.heard.clear()
    running.wait_for("following")
    yield running
    running.check_all()


def first(drive: Drive, since_s: float, what) -> float:
    """When something that fits was first heard."""
    return next(when for when, trajectory in drive.heard if when > since_s and what(trajectory))


def test_plans_go_out_at_once_and_as_they_are(drive: Drive) -> None:
    def followed() -> dict[int, Trajectory]:
        heard = {trajectory.stamp_ns: trajectory for _, trajectory in drive.heard}
        return {stamp_ns: heard[stamp_ns] for stamp_ns in drive.sent if stamp_ns in heard}

    drive.until(lambda: len(followed()) >= 3, "three plans")
    for stamp_ns, trajectory in followed().items():
        wanted = trajectory_of(drive.sent[stamp_ns], 100)
        assert np.array_equal(trajectory.poses, wanted.poses)
        assert np.array_equal(trajectory.due_ns, wanted.due_ns)
    drive.until(lambda: drive.value("handling_ms_p50"), "how long a plan took")
    assert float(drive.value("handling_ms_p50")) > 0


PLANNER = """
import sys, time, rclpy
sys.path[:0] = {paths!r}
from nav_msgs.msg import Path
from ros_nodes import programs, topics
from test_guard_node import straight
programs.end_with_launch()
rclpy.init()
node = rclpy.create_node("planner")
plans = node.create_publisher(Path, {topic!r}, topics.plan_qos())
while True:
    plans.publish(straight(time.time_ns()))
    time.sleep(0.4)
"""


def planner_process(drive: Drive) -> subprocess.Popen[bytes]:
    source = PLANNER.format(paths=[str(HERE), str(HERE.parents[1])], topic=drive.plans.topic_name)
    return drive.bench.spawn([sys.executable, "-c", source])


def test_garbage_and_late_plans_never_get_through(drive: Drive) -> None:
    def nan(stamp_ns: int) -> Path:
        path = straight(stamp_ns)
        path.poses[2].pose.position.y = float("nan")
        return path

    def tilted(stamp_ns: int) -> Path:
        path = straight(stamp_ns)
        path.poses[1].pose.orientation.x = 0.9
        return path

    def foreign(stamp_ns: int) -> Path:
        path = straight(stamp_ns)
        path.poses[3].header.frame_id = "map"
        return path

    garbage = {
        "finite": nan,
        "frame": foreign,
        "age": lambda stamp_ns: straight(stamp_ns - 9_000_000_000),
        "spacing": lambda stamp_ns: Path(header=straight(stamp_ns).header),
        "acceleration": lambda stamp_ns: straight(stamp_ns, 8.0),
    }
    for check, make in [*garbage.items(), ("finite", tilted)]:
        drive.plan, drive.sent = make, {}
        drive.wait_for_refusal(check)
        drive.plan, bad = straight, set(drive.sent)
        drive.wait_for("following")
        assert not bad & {trajectory.stamp_ns for _, trajectory in drive.heard}


def test_two_planners_are_refused_until_one_goes(drive: Drive) -> None:
    second = drive.bench.node.create_publisher(Path, drive.plans.topic_name, topics.plan_qos())
    drive.wait_for_refusal("planners")
    drive.wait_for("stop")
    drive.bench.node.destroy_publisher(second)
    drive.wait_for("following")


def test_odometry_that_fails_is_noticed_and_recovered_from(drive: Drive) -> None:
    def nan(odometry: Odometry) -> Odometry:
        odometry.pose.pose.position.x = float("nan")
        return odometry

    drive.bent = nan
    drive.wait_for("stop")
    drive.until(lambda: drive.count("odometry_faults"), "odometry's faults")
    drive.bent = lambda odometry: odometry
    drive.wait_for("following")

    def far(odometry: Odometry) -> Odometry:
        odometry.pose.pose.position.x += 500.0
        return odometry

    drive.bent = far
    drive.until(lambda: "jumped" in drive.value("odometry_last_fault"), "the jump")
    drive.wait_for("following")
    drive.odometry_on = False
    drive.wait_for("stop", "odometry")
    drive.odometry_on, drive.bent = True, lambda odometry: odometry


def test_deactivating_ends_with_a_stop_and_nothing_after_it(drive: Drive) -> None:
    drive.wait_for_motion()
    assert drive.guard.transition("deactivate")
    drive.check_that_a_stop_is_the_last()
    assert drive.guard.transition("activate")
    drive.wait_for("following")


def test_a_killed_planner_leads_to_a_comfortable_stop_within_the_bound(drive: Drive) -> None:
    planner = planner_process(drive)
    try:
        drive.wait_for_refusal("planners")
        drive.plans_on = False
        drive.bench.node.destroy_publisher(drive.plans)
        drive.wait_for("following")
    finally:
        planner.kill()
        planner.wait(5)
    killed_s = time.monotonic()
    drive.wait_for("stopping")
    # Steps of a followed plan are equal; those of a stop shrink to nothing.
    begun_s = first(drive, killed_s, lambda out: not out.is_stop and np.diff(out.poses[:, 0])[-1] < 1e-6)
    late_ms = float(drive.value("watchdog_late_ms_max"))
    assert (begun_s - killed_s) * 1e3 < HOLD_MS + PERIOD_MS + late_ms + SLACK_MS
    drive.wait_for("stopped")
    drive.until(drive.last_is_stop, "a stop")


def test_a_shutdown_transition_ends_with_a_stop_and_nothing_after_it(bench) -> None:
    drive = Drive(bench, "shut_down")
    drive.begin()
    drive.wait_for_motion()
    assert drive.guard.transition("active_shutdown")
    drive.check_that_a_stop_is_the_last()
    assert drive.guard.interrupt() == 0
    assert "Traceback" not in drive.guard.log


def test_wrong_settings_are_refused_a_clock_that_jumps_or_stops_and_an_interrupt_stop_it(bench) -> None:
    drive = Drive(bench, "timeless", use_sim_time=True, max_speed_mps=-1.0)
    assert not drive.guard.transition("configure")
    bench.until(lambda: "max_speed_mps" in drive.guard.log, "the reason")
    assert drive.guard.set(max_speed_mps=20.0, plan_timeout_ms=5000.0) == []
    assert not drive.guard.transition("configure")
    bench.until(lambda: "plan_timeout_ms is 5000.0" in drive.guard.log, "the reason")
    assert drive.guard.set(plan_timeout_ms=500.0) == []

    clock = bench.node.create_publisher(Clock, "/clock", topics.record_qos())
    shift_ns = [0]
    drive.now_ns = lambda: time.time_ns() + shift_ns[0]
    running = [True]

    def publish_clock() -> None:
        if running[0]:
            clock.publish(Clock(clock=time_message(drive.now_ns())))

    timer = bench.node.create_timer(0.02, publish_clock)
    try:
        drive.begin()
        drive.plans_on = False  # good plans soon say how many more are needed to go on
        shift_ns[0] = -100_000_000_000
        drive.wait_for("clock jumped back")
        drive.plans_on = True
        drive.wait_for("following")
        running[0] = drive.plans_on = drive.odometry_on = False  # a player that dies takes the clock with it
        drive.wait_for("stopping")
        running[0] = drive.plans_on = drive.odometry_on = True
        drive.wait_for("following")
        drive.wait_for_motion()
        drive.guard.process.send_signal(signal.SIGINT)
        drive.until(lambda: drive.guard.process.poll() is not None, "the guard to end")
        assert drive.guard.process.returncode == 0
        drive.check_that_a_stop_is_the_last()
        drive.check_all()
    finally:
        bench.node.destroy_timer(timer)
        bench.node.destroy_publisher(clock)
