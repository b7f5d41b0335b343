from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from eval_nuscenes.world.expert import (
    FRONT_M,
    REAR_M,
    STEP_S,
    Conflict,
    Ego,
    Gate,
    Move,
    Neighbour,
    Obstacle,
    Route,
    Surroundings,
    Walker,
    comfortable_speed,
    follow,
    step,
    stop_before,
)
from eval_nuscenes.world.roads import DrivingPath, path_through
from vla_autoprune.frame import Command

LIMIT = 10.0
NOBODY = Surroundings([], [], [("green", "red")], [[]])
LINE_M, JUNCTION_M, BEYOND_M = 80.0, 85.0, 105.0


def straight_route(
    conflicts: tuple[Conflict, ...] = (), control: str = "signal", obstacles: tuple[Obstacle, ...] = ()
) -> Route:
    path, _ = path_through(np.stack([np.arange(301.0), np.zeros(301)], axis=1))
    gate = Gate(0, Command.LEFT, control, 0, LINE_M, JUNCTION_M, BEYOND_M, conflicts)
    return Route(DrivingPath(path, (), ()), [LIMIT] * 301, (gate,), obstacles, ())


def drive(
    route: Route,
    seconds: float,
    seen: Callable[[float], Surroundings] = lambda _: NOBODY,
    start: float = 20.0,
) -> list[Ego]:
    egos = [Ego(start, LIMIT, 0.0)]
    for count in range(round(seconds / STEP_S)):
        egos.append(step(route, egos[-1], seen(count * STEP_S)))
    return egos


def with_lights(colour: str) -> Surroundings:
    return replace(NOBODY, light_colours=[(colour, "red")])


def test_it_stops_gently_at_red_and_goes_at_green() -> None:
    egos = drive(straight_route(), 20.0, lambda time: with_lights("red" if time < 12.0 else "green"))
    waiting = egos[115]
    assert waiting.speed_mps < 0.05
    assert LINE_M - 1.5 < waiting.along_m + FRONT_M < LINE_M + 0.5
    assert min(ego.acceleration_mps2 for ego in egos) > -3.2
    assert egos[-1].along_m > BEYOND_M


@pytest.mark.parametrize(("from_line", "stops"), [(40.0, True), (8.0, False)])
def test_amber_stops_those_who_still_can(from_line: float, stops: bool) -> None:
    start = LINE_M - FRONT_M - from_line
    last = drive(straight_route(), 10.0, lambda _: with_lights("amber"), start)[-1]
    assert (last.along_m + FRONT_M < LINE_M + 0.5) is stops


def test_it_waits_for_a_pedestrian_until_the_lane_is_clear() -> None:
    crossing = 60.0

    def seen(time: float) -> Surroundings:
        return replace(NOBODY, walkers=[Walker(crossing, -6.0 + 1.5 * max(0.0, time - 4.0), True)])

    egos = drive(straight_route(), 16.0, seen)
    for count, ego in enumerate(egos):
        beside = seen(count * STEP_S).walkers[0].beside_m
        if abs(beside) < 1.5:
            assert not ego.along_m - REAR_M < crossing < ego.along_m + FRONT_M
    assert egos[-1].along_m > crossing


@pytest.mark.parametrize("has_priority", [True, False])
def test_it_gives_way_to_those_who_have_priority(has_priority: bool) -> None:
    conflict = Conflict(0, 50.0, 60.0, 90.0, 96.0, has_priority)
    route = straight_route((conflict,), "yield" if has_priority else "plain")

    def seen(time: float) -> Surroundings:
        return Surroundings([], [], [("", "")], [[(9.0 * (time - 1.0), 2.3, 9.0)]])

    egos = drive(route, 14.0, seen)
    slowest = min(ego.speed_mps for ego in egos)
    assert (slowest < 7.0) is has_priority
    for count, ego in enumerate(egos):
        along = seen(count * STEP_S).stream_vehicles[0][0][0]
        if has_priority and 50.0 < along < 60.0:
            assert ego.along_m + FRONT_M < 90.0
    assert egos[-1].along_m > 96.0


def test_it_passes_a_parked_car_and_comes_back() -> None:
    car = Obstacle(60.0, 64.5, 2.2)
    egos = drive(straight_route(obstacles=(car,)), 14.0)
    beside = {round(ego.along_m): ego.move.at(ego.along_m)[0] for ego in egos}
    assert all(offset > 1.9 for along, offset in beside.items() if 60.0 - FRONT_M < along < 64.5 + REAR_M)
    assert egos[-1].move.at(egos[-1].along_m)[0] == 0.0
    assert min(ego.speed_mps for ego in egos) > 0.7 * LIMIT


def test_it_waits_behind_a_parked_car_for_oncoming_traffic() -> None:
    car = Obstacle(60.0, 64.5, 2.2)

    def seen(time: float) -> Surroundings:
        oncoming = Neighbour(0, 130.0 - 9.0 * time, 3.5, -9.0, 2.3, 0.95, False)
        return replace(NOBODY, neighbours=[oncoming])

    egos = drive(straight_route(obstacles=(car,)), 22.0, seen)
    for count, ego in enumerate(egos):
        other = seen(count * STEP_S).neighbours[0]
        if abs(other.along_m - ego.along_m) < 7.0:
            assert ego.move.at(ego.along_m)[0] < 0.8
    assert min(ego.speed_mps for ego in egos) < 0.6 * LIMIT
    assert egos[-1].along_m > 66.0


def test_it_follows_a_slower_vehicle_at_a_distance() -> None:
    def seen(time: float) -> Surroundings:
        return replace(NOBODY, neighbours=[Neighbour(0, 50.0 + 4.0 * time, 0.1, 4.0, 2.3, 0.95, False)])

    last = drive(straight_route(), 20.0, seen)[-1]
    assert last.speed_mps == pytest.approx(4.0, abs=0.4)
    gap = 50.0 + 4.0 * 20.0 - 2.3 - last.along_m - FRONT_M
    assert 4.0 < gap < 12.0


def test_acceleration_changes_gradually() -> None:
    egos = drive(straight_route(), 14.0, lambda _: with_lights("red"))
    moving = [ego.acceleration_mps2 for ego in egos if ego.speed_mps > 0.2]
    assert np.abs(np.diff(moving)).max() <= 0.9 + 1e-9


def test_an_imagined_speed_leaves_time_to_stop() -> None:
    route, red = straight_route(), with_lights("red")
    for distance in (3.0, 8.0, 15.0, 30.0):
        ego = Ego(LINE_M - FRONT_M - distance, LIMIT, 0.0)
        ego = replace(ego, speed_mps=comfortable_speed(route, ego, red))
        for _ in range(80):
            ego = step(route, ego, red)
            assert ego.acceleration_mps2 > -5.0
        assert ego.along_m + FRONT_M < LINE_M + 1.0


def test_sideways_moves_begin_and_end_along_the_road() -> None:
    move = Move(10.0, 20.0, 0.0, 3.5)
    assert move.at(10.0) == (0.0, 0.0)
    assert move.at(30.0) == (3.5, 0.0)
    offset, slope = move.at(20.0)
    assert offset == pytest.approx(1.75)
    assert slope == pytest.approx((move.at(20.001)[0] - move.at(19.999)[0]) / 0.002, rel=1e-4)


def test_following_and_stopping_laws() -> None:
    assert follow(10.0, 10.0, 60.0, 10.0) > -0.5
    assert follow(10.0, 10.0, 8.0, 5.0) < -3.0
    assert stop_before(5.0, 60.0) == math.inf
    assert stop_before(10.0, 20.0) < -2.0


def test_the_command_is_announced_near_the_junction() -> None:
    route = straight_route()
    assert route.command(10.0) is Command.STRAIGHT
    assert route.command(60.0) is route.command(100.0) is Command.LEFT
    assert route.command(110.0) is Command.STRAIGHT
