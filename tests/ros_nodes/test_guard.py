"""The guard without ROS: what it refuses, how it falls back, and what it can never let out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ros_nodes.guard import Guard, State
from ros_nodes.limits import GuardSettings, faults_of
from ros_nodes.motion import Motion, OdometryTrack, Pose, Trajectory, stop_along, stop_command
from vla_autoprune.errors import InputError

SETTINGS = GuardSettings()
START_NS = 1_700_000_000_000_000_000
MS = 1_000_000


def drive(
    speed: float = 8.0, bend: float = 0.0, braking: float = 0.0, stamp_ns: int = START_NS
) -> Trajectory:
    """Six poses, half a second apart, on an arc."""
    times = np.arange(1, 7) * 0.5
    moving = np.minimum(times, speed / braking) if braking else times
    metres = speed * moving - braking * moving**2 / 2
    heading = bend * metres
    x, y = (metres, 0 * metres) if not bend else (np.sin(heading) / bend, (1 - np.cos(heading)) / bend)
    due = stamp_ns + np.rint(times * 1e9).astype(np.int64)
    return Trajectory(stamp_ns, "base_link", due, np.stack([x, y, heading], axis=1))


def speeds(plan: Trajectory, per_step: list[float]) -> Trajectory:
    """Straight on, each step at a speed of its own."""
    x = np.cumsum(per_step) * 0.5
    return replace(plan, poses=np.stack([x, 0 * x, 0 * x], axis=1))


def moved(plan: Trajectory, row: int | slice, column: int, by: float) -> Trajectory:
    poses = plan.poses.copy()
    with np.errstate(invalid="ignore"):  # infinity less infinity is among what is tried
        poses[row, column] += by
    return replace(plan, poses=poses)


class Car:
    """A guard whose vehicle drives straight along x at constant speed, with odometry every 50 ms."""

    def __init__(self, speed: float = 8.0, odometry: bool = True, **changes: object) -> None:
        self.guard = Guard(replace(SETTINGS, **changes))
        self.speed, self.odometry, self.ms = speed, odometry, 0
        self.wait(500)

    @property
    def now_ns(self) -> int:
        return START_NS + self.ms * MS

    def wait(self, milliseconds: int) -> None:
        for _ in range(milliseconds // 50):
            self.ms += 50
            if self.odometry:
                motion = Motion(Pose(self.speed * self.ms / 1e3, 0.0, 0.0), self.speed, 0.0)
                assert self.guard.take_odometry(self.now_ns, motion, self.now_ns) == ""

    def give(self, plan: Trajectory, **options: int) -> str | None:
        fault = self.guard.take_plan(plan, self.now_ns, self.ms / 1e3, **options)
        return fault and fault.check

    def good(self, **how: float) -> Trajectory:
        return drive(**{"speed": self.speed, **how}, stamp_ns=self.now_ns)

    def out(self) -> Trajectory:
        return self.guard.output(self.now_ns, self.ms / 1e3)

    def follow(self) -> Trajectory:
        """Plans every 500 ms until the guard follows; returns the one it follows."""
        for _ in range(self.guard.settings.plans_to_recover):
            self.wait(500)
            plan = self.good()
            assert self.give(plan) is None
        assert self.out() is plan
        return plan


def test_good_plans_go_out_as_they_came_once_two_have_passed() -> None:
    car = Car()
    assert car.out().is_stop
    assert car.give(car.good()) is None
    assert car.out().is_stop and car.guard.reason == "1 of 2 good plans to go on"
    car.wait(500)
    plan = car.good()
    assert car.give(plan) is None
    assert car.out() is plan
    assert car.guard.state is State.FOLLOWING


@pytest.mark.parametrize(
    ("check", "broken"),
    [
        ("frame", lambda plan: replace(plan, frame_id="map")),
        ("spacing", lambda plan: replace(plan, due_ns=plan.due_ns[:0], poses=plan.poses[:0])),
        ("spacing", lambda plan: replace(plan, due_ns=plan.due_ns[::-1])),
        ("spacing", lambda plan: replace(plan, due_ns=plan.due_ns - 10**9)),
        ("spacing", lambda plan: replace(plan, due_ns=plan.stamp_ns + 5 * (plan.due_ns - plan.stamp_ns))),
        ("horizon", lambda plan: replace(plan, due_ns=plan.due_ns[:3], poses=plan.poses[:3])),
        ("finite", lambda plan: moved(plan, 3, 1, np.nan)),
        ("finite", lambda plan: moved(plan, 3, 2, np.inf)),
        ("finite", lambda plan: moved(plan, 3, 0, 1e30)),
        ("direction", lambda plan: replace(plan, poses=plan.poses * [-1, 1, 1])),
        ("direction", lambda plan: moved(plan, slice(None), 2, 1.0)),
        ("speed", lambda plan: drive(40.0, stamp_ns=plan.stamp_ns)),
        ("curvature", lambda plan: drive(2.0, bend=0.35, stamp_ns=plan.stamp_ns)),
        ("lateral", lambda plan: drive(8.0, bend=0.12, stamp_ns=plan.stamp_ns)),
        ("acceleration", lambda plan: drive(10.0, stamp_ns=plan.stamp_ns)),
        ("braking", lambda plan: stop_command(plan.stamp_ns, "base_link")),
        ("jerk", lambda plan: moved(plan, 3, 0, 1.0)),
        ("direction", lambda plan: moved(plan, 3, 0, -4.5)),
        ("speed", lambda plan: moved(plan, slice(3, None), 0, 16.0)),
        ("curvature", lambda plan: drive(2.0, bend=-0.35, stamp_ns=plan.stamp_ns)),
        ("lateral", lambda plan: drive(8.0, bend=-0.12, stamp_ns=plan.stamp_ns)),
        ("jerk", lambda plan: speeds(plan, [8.0, 9.95, 11.9, 9.95, 8.0, 6.05])),
        ("continuity", lambda plan: drive(8.0, bend=0.05, stamp_ns=plan.stamp_ns)),
        ("continuity", lambda plan: drive(8.0, bend=-0.05, stamp_ns=plan.stamp_ns)),
        ("age", lambda plan: replace(plan, stamp_ns=plan.stamp_ns - 600 * MS, due_ns=plan.due_ns - 600 * MS)),
        ("age", lambda plan: replace(plan, stamp_ns=plan.stamp_ns + 60 * MS, due_ns=plan.due_ns + 60 * MS)),
        ("order", lambda plan: replace(plan, stamp_ns=plan.stamp_ns - 499 * MS)),
    ],
)
def test_each_check_refuses_and_the_last_good_plan_goes_on(check, broken) -> None:
    car = Car()
    followed = car.follow()
    car.wait(450)
    assert car.give(broken(car.good())) == check
    assert car.guard.refused == {check: 1}
    if check == "braking":  # refused, yet heeded
        assert not car.out().is_stop
        assert car.guard.state is State.STOPPING
    else:
        assert car.out() is followed
        assert car.guard.state is State.HOLDING
        assert check in car.guard.reason


def test_a_plan_far_from_where_the_vehicle_went_is_refused() -> None:
    car = Car()
    car.follow()
    car.wait(50)
    plan = car.good()
    for step in range(1, 9):  # it slides aside while the plan is made
        car.ms += 50
        motion = Motion(Pose(car.speed * car.ms / 1e3, 0.3 * step, 0.0), car.speed, 0.0)
        assert car.guard.take_odometry(car.now_ns, motion, car.now_ns) == ""
    assert car.give(plan) == "distance"


def test_two_planners_are_refused() -> None:
    car = Car()
    car.follow()
    car.wait(500)
    assert car.give(car.good(), planners=2) == "planners"


def test_a_gentler_plan_than_the_last_is_no_surprise() -> None:
    car = Car()
    car.follow()
    car.wait(500)
    plan = car.good(braking=7.9)
    assert car.give(plan) is None
    assert car.out() is plan


@pytest.mark.parametrize("odometry", [True, False])
def test_without_plans_it_holds_then_stops_comfortably_then_stands(odometry: bool) -> None:
    car = Car(6.0, odometry=odometry, require_odometry=odometry)
    followed = car.follow()
    seen, outputs = [], []
    for _ in range(200):
        car.wait(50)
        outputs.append(car.out())
        seen.append((car.guard.state, outputs[-1]))
    states = [state for state, _ in seen]
    assert states.index(State.HOLDING) * 50 + 50 == pytest.approx(SETTINGS.plan_timeout_ms, abs=50)
    assert states.index(State.STOPPING) * 50 + 50 == pytest.approx(SETTINGS.hold_ms, abs=50)
    assert [state for state in State if state in states] == list(State)
    assert states == sorted(states, key=list(State).index)
    assert all(out is followed for state, out in seen if state in (State.FOLLOWING, State.HOLDING))
    stop = outputs[states.index(State.STOPPING)]
    assert not any(faults_of(stop, SETTINGS, car.speed))
    braking = car.speed**2 / 2 / np.hypot(*stop.poses[-1, :2])
    assert braking == pytest.approx(SETTINGS.comfort_braking_mps2, rel=0.05)
    assert outputs[-1].is_stop


def test_a_stop_ends_when_good_plans_come_again() -> None:
    car = Car()
    car.follow()
    car.wait(1300)
    car.out()
    assert car.guard.state is State.STOPPING
    car.follow()
    assert car.guard.state is State.FOLLOWING


def test_a_stop_follows_the_bend_and_fades_an_offset_out() -> None:
    plan = drive(8.0, bend=0.04)
    now_ns = START_NS + 10**9
    on_plan = plan.at(now_ns)
    beside = on_plan._replace(y=on_plan.y + 0.5)
    stop = stop_along(plan, now_ns, beside, 8.0, 2.0, 6.0, 2.0)
    assert stop is not None and not any(faults_of(stop, SETTINGS, 8.0))
    cosine, sine = np.cos(beside.heading), np.sin(beside.heading)
    x = beside.x + cosine * stop.poses[:, 0] - sine * stop.poses[:, 1]
    y = beside.y + sine * stop.poses[:, 0] + cosine * stop.poses[:, 1]
    aside = 1 / 0.04 - np.hypot(x, y - 1 / 0.04)
    assert 0.3 < aside[0] < 0.5
    assert aside[-1] == pytest.approx(0.0, abs=0.05)
    end = stop.poses[-1, 2] + beside.heading
    assert end == pytest.approx(np.arctan2(x[-1], 1 / 0.04 - y[-1]), abs=0.02)


def test_a_stop_that_would_break_the_limits_becomes_a_stop_command() -> None:
    guard = Guard(replace(SETTINGS, plans_to_recover=1))
    plan = drive(5.0, bend=0.1)
    guard.take_odometry(START_NS, Motion(Pose(0.0, 0.0, 0.0), 5.0, 0.5), START_NS)
    assert guard.take_plan(plan, START_NS, 0.0) is None
    for ms in range(100, 1400, 100):  # on the bend, but meanwhile far too fast for it
        now_ns = START_NS + ms * MS
        motion = Motion(plan.at(now_ns), 5.0 if ms < 1000 else 20.0, 0.5)
        assert guard.take_odometry(now_ns, motion, now_ns) == ""
    assert guard.output(now_ns, 1.3).is_stop
    assert guard.state is State.STOPPED


@pytest.mark.parametrize("yaw_rate", [0.0, 0.3])
def test_where_no_stop_leads_back_to_the_plan_it_stops_as_it_moves(yaw_rate: float) -> None:
    car = Car(speed=3.0)
    car.follow()
    for step in range(1, 26):  # too far aside for the little way that a stop takes
        car.ms += 50
        motion = Motion(Pose(car.speed * car.ms / 1e3, 0.05 * step, 0.0), car.speed, yaw_rate)
        assert car.guard.take_odometry(car.now_ns, motion, car.now_ns) == ""
    stop = car.out()
    assert car.guard.state is State.STOPPING
    assert "not along the last plan from 3.0 m/s, direction" in car.guard.reason
    assert not any(faults_of(stop, SETTINGS, car.speed))
    assert np.hypot(*stop.poses[-1, :2]) == pytest.approx(3.0**2 / 2 / 7.5, rel=0.01)
    assert stop.poses[-1, 2] == pytest.approx(0.6 * yaw_rate / 3.0, abs=1e-3)


def test_a_vehicle_that_goes_on_though_its_plan_stands_is_stopped_as_it_moves() -> None:
    car = Car(speed=0.5)
    for _ in range(2):
        car.wait(500)
        standing = stop_command(car.now_ns, "base_link")
        assert car.give(standing) is None
    assert car.out() is standing
    car.wait(1300)
    assert not car.out().is_stop
    assert car.guard.state is State.STOPPING


def test_a_short_plan_makes_it_brake_harder() -> None:
    car = Car(speed=15.0)
    short = replace(drive(15.0), due_ns=drive(15.0).due_ns[:4], poses=drive(15.0).poses[:4])
    stop = stop_along(short, START_NS + 10**9, Pose(15.0, 0.0, 0.0), 15.0, 2.0, 6.0, 2.0)
    assert stop is not None
    assert stop.poses[-1, 0] == pytest.approx(18.75)  # 6 m/s² at most, so beyond the plan's last 15 m
    assert not any(faults_of(stop, car.guard.settings, 15.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_odometry_that_is_not_finite_is_left_out(bad: float) -> None:
    car = Car()
    car.follow()
    broken = Motion(Pose(bad, 0.0, 0.0), 8.0, 0.0)
    assert "finite" in car.guard.take_odometry(car.now_ns + MS, broken, car.now_ns)
    assert car.guard.odometry.at(car.now_ns) is not None


def test_odometry_that_stops_makes_it_refuse_then_stop() -> None:
    car = Car()
    car.follow()
    car.odometry = False
    refused = []
    for _ in range(12):
        car.wait(200)
        refused.append(car.give(car.good()))
        car.out()
    assert refused[0] is None and refused[-1] == "odometry"
    assert car.guard.state in (State.STOPPING, State.STOPPED)


def test_odometry_that_jumps_starts_anew() -> None:
    car = Car()
    car.follow()
    car.wait(450)
    plan = car.good()
    car.ms += 50
    far = Motion(Pose(900.0, 0.0, 0.0), 8.0, 0.0)
    assert "jumped" in car.guard.take_odometry(car.now_ns, far, car.now_ns)
    assert car.give(plan) == "odometry"  # nothing links its input to the present any more


def test_the_same_plan_again_is_refused() -> None:
    car = Car()
    assert car.give(car.follow()) == "order"


def test_only_good_plans_in_a_row_end_a_stop() -> None:
    car = Car()
    verdicts = []
    for broken in (False, True, False, False):
        car.wait(500)
        plan = car.good()
        verdicts.append((car.give(moved(plan, 3, 1, np.nan) if broken else plan), car.guard.state))
    assert verdicts == [
        (None, State.STOPPED),
        ("finite", State.STOPPED),
        (None, State.STOPPED),
        (None, State.FOLLOWING),
    ]


def test_a_plan_that_is_over_is_held_no_longer() -> None:
    car = Car(hold_ms=10_000.0)
    car.follow()
    car.wait(3000)
    car.out()
    assert car.guard.state in (State.STOPPING, State.STOPPED)


def test_a_stop_brakes_no_harder_than_its_jerk_allows() -> None:
    car = Car(max_jerk_mps3=4.0)
    car.follow()
    car.wait(500)
    assert car.give(stop_command(car.now_ns, "base_link")) == "braking"
    assert car.out().poses[-1, 0] == pytest.approx(16.0, abs=0.1)  # 2 m/s²


def test_headings_wrap_where_they_are_interpolated() -> None:
    track = OdometryTrack(timeout_ms=600.0, max_jump_m=2.0)
    assert track.add(START_NS, Motion(Pose(0.0, 0.0, 3.1), 1.0, 0.0)) == ""
    assert track.add(START_NS + 100 * MS, Motion(Pose(-0.1, 0.0, -3.1), 1.0, 0.0)) == ""
    assert track.at(START_NS + 50 * MS).pose.heading == pytest.approx(np.pi)
    assert "not newer" in track.add(START_NS + 100 * MS, Motion(Pose(-0.1, 0.0, -3.1), 1.0, 0.0))
    turning = Trajectory(
        START_NS, "base_link", START_NS + np.array([500, 1000]) * MS, np.array([[0, 0, 3.1], [0, 0, -3.1]])
    )
    assert turning.at(START_NS + 750 * MS).heading == pytest.approx(np.pi)


def test_who_hardly_moves_needs_no_path_to_stop_along() -> None:
    assert stop_along(drive(), START_NS, Pose(0.0, 0.0, 0.0), 0.2, 2.0, 6.0, 2.0) is None


def test_a_stamp_from_the_future_does_not_silence_odometry() -> None:
    car = Car()
    car.follow()
    astray = Motion(Pose(car.speed * car.ms / 1e3, 0.0, 0.0), car.speed, 0.0)
    assert "ahead of the clock" in car.guard.take_odometry(car.now_ns + 3_600_000 * MS, astray, car.now_ns)
    car.wait(500)
    assert car.give(car.good()) is None


def test_a_clock_that_jumps_back_ends_everything_known() -> None:
    car = Car()
    car.follow()
    car.ms -= 2000
    assert car.out().is_stop
    assert "clock jumped back 2.00 s" in car.guard.reason
    car.follow()
    assert car.guard.state is State.FOLLOWING


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(InputError, match="plan_timeout_ms is 2000"):
        GuardSettings(plan_timeout_ms=2000.0)
    with pytest.raises(InputError, match="min_spacing_s"):
        GuardSettings(min_spacing_s=0.8)


numbers = st.one_of(
    st.floats(-3.0, 3.0), st.sampled_from([0.0, 1e9, -1e9, float("nan"), float("inf"), float("-inf"), 1e308])
)
milliseconds = st.one_of(st.integers(-200, 1500), st.integers(-100_000, 100_000))
steps = st.one_of(
    st.tuples(st.just("wait"), st.integers(0, 1500), milliseconds),
    st.tuples(st.just("odometry"), milliseconds, st.lists(numbers, min_size=5, max_size=5)),
    st.tuples(
        st.just("plan"),
        st.floats(0.0, 20.0),
        st.floats(-0.3, 0.3),
        st.one_of(st.just(0.0), st.floats(0.5, 12.0)),
        milliseconds,
    ),
    st.tuples(
        st.just("garbage"),
        st.lists(st.tuples(st.integers(-4000, 4000), numbers, numbers, numbers), max_size=8),
        st.sampled_from(["base_link", "map", ""]),
    ),
    st.tuples(st.just("dent"), st.integers(0, 5), st.integers(0, 2), numbers),
)


@settings(max_examples=150)
@given(st.booleans(), st.floats(0.0, 15.0), st.lists(steps, min_size=1, max_size=25))
def test_whatever_comes_in_what_goes_out_keeps_the_limits_or_is_a_stop(odometry, speed, events) -> None:
    guard = Guard(replace(SETTINGS, require_odometry=odometry, plans_to_recover=1))
    now_ns, steady_s, x = START_NS, 0.0, 0.0
    plan = drive(speed)
    for event in events:
        if event[0] == "wait":
            _, steady_ms, clock_ms = event
            for _ in range(0, steady_ms, 100):
                steady_s, x = steady_s + 0.1, x + speed * 0.1
                now_ns += 100 * MS
                guard.take_odometry(now_ns, Motion(Pose(x, 0.0, 0.0), speed, 0.0), now_ns)
                check_output(guard, now_ns, steady_s)
            now_ns += (clock_ms * MS) if abs(clock_ms) > 1000 else 0
        elif event[0] == "odometry":
            a, b, c, d, e = event[2]
            guard.take_odometry(now_ns + event[1] * MS, Motion(Pose(a, b, c), d, e), now_ns)
        else:
            if event[0] == "plan":
                plan = drive(event[1], event[2], event[3], now_ns - event[4] * MS)
            elif event[0] == "garbage":
                rows = event[1]
                due = now_ns + np.array([row[0] for row in rows], dtype=np.int64) * MS
                poses = np.array([row[1:] for row in rows], dtype=np.float64).reshape(-1, 3)
                plan = Trajectory(now_ns, event[2], due, poses)
            elif len(plan.poses) > event[1]:
                plan = moved(replace(plan, stamp_ns=plan.stamp_ns + MS), event[1], event[2], event[3])
            guard.take_plan(plan, now_ns, steady_s)
        check_output(guard, now_ns, steady_s)


def check_output(guard: Guard, now_ns: int, steady_s: float) -> None:
    out = guard.output(now_ns, steady_s)
    assert out.is_stop or not list(faults_of(out, guard.settings))
    assert out.is_stop or guard.state is not State.STOPPED
