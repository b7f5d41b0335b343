from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from eval_nuscenes.world.roads import (
    LANE_WIDTH_M,
    Leg,
    Network,
    build_network,
    lane_names,
    path_through,
    road_map,
)
from eval_nuscenes.world.scene import Lane, RoadMap
from vla_autoprune.frame import Command


def leg(turn: Command, curve: float = 0.0, control: str = "signal", lanes: int = 1) -> Leg:
    return Leg(30, curve, 30.0, 40, 40, control, turn, lanes)


@pytest.fixture(scope="module")
def network() -> Network:
    legs = [leg(Command.STRAIGHT, 0.8), leg(Command.LEFT, -0.6, "yield", 2), leg(Command.RIGHT, 0.3, "plain")]
    built = build_network(1, legs, 0.3)
    assert built is not None
    return built


@pytest.fixture(scope="module")
def roads(network: Network) -> RoadMap:
    return road_map(network)


def direction(lane: Lane, end: int) -> float:
    line = lane.centreline
    step = line[1] - line[0] if end == 0 else line[-1] - line[-2]
    return math.atan2(step[1], step[0])


def test_every_lane_leads_on_smoothly_to_its_successors(roads: RoadMap) -> None:
    lanes = {lane.name: lane for lane in roads.lanes}
    assert len(lanes) == len(roads.lanes)
    followed = [(lane, lanes[name]) for lane in roads.lanes for name in lane.successors]
    assert followed
    for lane, after in followed:
        assert np.hypot(*(lane.centreline[-1] - after.centreline[0])) < 1e-9
        assert abs(math.remainder(direction(lane, -1) - direction(after, 0), 2 * math.pi)) < 0.06


def test_neighbours_know_each_other_and_lie_a_lane_apart(roads: RoadMap) -> None:
    lanes = {lane.name: lane for lane in roads.lanes}
    pairs = [(lane, lanes[lane.left_neighbour]) for lane in roads.lanes if lane.left_neighbour]
    assert pairs
    for lane, left in pairs:
        assert left.right_neighbour == lane.name
        gap = left.centreline - lane.centreline
        assert np.hypot(gap[:, 0], gap[:, 1]) == pytest.approx(LANE_WIDTH_M)


def test_outlines_run_counter_clockwise(roads: RoadMap) -> None:
    buildings = [outline for outline, _ in roads.buildings]
    for outline in (
        *roads.road_segments,
        *roads.intersections,
        *roads.crossings,
        *roads.walkways,
        *buildings,
    ):
        x, y = outline.T
        assert x @ np.roll(y, -1) - y @ np.roll(x, -1) > 1.0


def test_lanes_lie_on_the_road(roads: RoadMap) -> None:
    cv2 = pytest.importorskip("cv2")
    outlines = [np.float32(outline) for outline in (*roads.road_segments, *roads.intersections)]
    for lane in roads.lanes:
        for x, y in lane.centreline[::4]:
            inside = max(cv2.pointPolygonTest(outline, (float(x), float(y)), True) for outline in outlines)
            assert inside > -0.01, lane.name


def test_each_arm_of_a_signalled_junction_has_a_light_that_faces_its_traffic(roads: RoadMap) -> None:
    lanes = {lane.name: lane for lane in roads.lanes}
    assert len(roads.lights) == 4
    for light in roads.lights:
        for name in light.lanes:
            end = lanes[name].centreline[-1]
            facing = np.array([math.cos(light.heading), math.sin(light.heading)])
            assert math.cos(direction(lanes[name], -1) - light.heading) < -0.99
            stop = light.stop_line.mean(axis=0)
            assert 3.0 < (stop - end) @ facing < 7.0
            assert (stop - light.position[:2]) @ facing == pytest.approx(9.0)


def test_only_the_road_that_gives_way_has_yield_lines(roads: RoadMap) -> None:
    assert len(roads.yield_lines) == 2


def test_a_turning_path_keeps_to_its_lanes_and_can_be_steered(network: Network, roads: RoadMap) -> None:
    path = network.follow((0, 1, 0), 0, [(1, Command.LEFT, 0), (2, Command.RIGHT, 0)], 60.0)
    lanes = {lane.name: lane for lane in roads.lanes}
    names = lane_names(network, path)
    for name, after in itertools.pairwise(names):
        assert after in lanes[name].successors
    centrelines = np.concatenate([lanes[name].centreline for name in names])
    for point in path.path.points[::5]:
        assert np.hypot(*(centrelines - point).T).min() < 0.8
    assert np.abs(path.path.curvature).max() < 1 / 5.0
    assert [passage.turn for passage in path.passages] == [Command.STRAIGHT, Command.LEFT, Command.RIGHT]
    for passage in path.passages:
        turned = path.path.pose(passage.exit_m + 1)[2] - path.path.pose(passage.enter_m - 1)[2]
        expected = {Command.STRAIGHT: 0.0, Command.LEFT: math.pi / 2, Command.RIGHT: -math.pi / 2}
        assert turned == pytest.approx(expected[passage.turn], abs=0.05)
        assert 4.0 < passage.enter_m - passage.stop_m < 6.0


def test_paths_are_sampled_every_metre() -> None:
    angles = np.linspace(0, math.pi, 200)
    path, along = path_through(20.0 * np.stack([np.cos(angles), np.sin(angles)], axis=1))
    steps = np.hypot(*np.diff(path.points, axis=0).T)
    assert steps == pytest.approx(1.0, abs=1e-3)
    assert along[-1] == pytest.approx(20 * math.pi, rel=1e-3)
    assert path.curvature[4:-4] == pytest.approx(1 / 20, abs=2e-3)
    x, y, heading = path.pose(10.5)
    assert math.hypot(x, y) == pytest.approx(20.0, abs=0.02)
    assert heading == pytest.approx(10.5 / 20 + math.pi / 2, abs=0.01)


def test_roads_that_would_run_into_each_other_are_refused() -> None:
    assert build_network(1, [leg(Command.LEFT) for _ in range(4)], 0.0) is None


def test_with_or_without_lanes_the_roads_look_the_same(network: Network, roads: RoadMap) -> None:
    bare = road_map(network, with_lanes=False)
    assert bare.lanes == ()
    for one, other in zip(bare.road_segments, roads.road_segments, strict=True):
        assert np.array_equal(one, other)
    assert len(bare.lights) == len(roads.lights)
