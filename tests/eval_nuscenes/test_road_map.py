"""The map reader on the synthetic world's map, beside the devkit's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from eval_nuscenes.metrics import PROTOCOLS
from eval_nuscenes.nuscenes_reader import NuScenesSplit, Sample
from eval_nuscenes.road_map import RoadMap, in_ego, map_path, points_in_ego
from vla_autoprune.errors import InputError

shapely = pytest.importorskip("shapely")
pytest.importorskip("nuscenes")


@pytest.fixture(scope="module")
def samples(synthetic_root: Path) -> list[Sample]:
    return list(NuScenesSplit(synthetic_root, "v1.0-synth", "val", road_edges=True))


@pytest.fixture(scope="module")
def road(synthetic_root: Path, samples: list[Sample]) -> RoadMap:
    return RoadMap(synthetic_root, samples[0].location)


def test_polygons_are_those_of_the_devkit(synthetic_root: Path, road: RoadMap, samples: list[Sample]) -> None:
    from nuscenes.map_expansion.map_api import NuScenesMap

    devkit = NuScenesMap(dataroot=str(synthetic_root), map_name=samples[0].location)
    for layer in ("lane", "lane_connector", "road_segment", "ped_crossing", "walkway"):
        records = {record["token"]: record["polygon_token"] for record in getattr(devkit, layer)}
        assert len(road.shapes(layer)) == len(records) > 0
        for shape in road.shapes(layer):
            assert shape.polygon.equals(devkit.extract_polygon(records[shape.token]))
    tokens = [token for area in devkit.drivable_area for token in area["polygon_tokens"]]
    mine = shapely.union_all([shape.polygon for shape in road.shapes("drivable_area")])
    theirs = shapely.union_all([devkit.extract_polygon(token) for token in tokens])
    assert mine.symmetric_difference(theirs).area < 1e-6

    x, y, _ = samples[0].pose_in_map
    lane = next(shape for shape in road.shapes("lane", samples[0].pose_in_map))
    path = devkit.discretize_lanes([lane.token], 0.5)[lane.token]
    np.testing.assert_allclose(road.centreline(lane.token), path)
    assert set(road.successors(lane.token)) == set(devkit.get_outgoing_lane_ids(lane.token))
    assert devkit.record_on_point(x, y, "drivable_area")


def test_shapes_near_a_pose_are_a_part_of_all(road: RoadMap, samples: list[Sample]) -> None:
    pose = samples[0].pose_in_map
    near, everything = road.shapes("lane", pose, reach_m=20.0), road.shapes("lane")
    assert 0 < len(near) < len(everything)
    square = shapely.box(-20, -20, 20, 20)
    assert {shape.token for shape in near} == {
        shape.token for shape in everything if in_ego(shape.polygon, pose).intersects(square)
    }


def test_the_ego_frame_is_forward_and_left() -> None:
    ahead_and_left = points_in_ego(np.array([[10.0, 25.0], [7.0, 20.0]]), (10.0, 20.0, np.pi / 2))
    np.testing.assert_allclose(ahead_and_left, [[5.0, 0.0], [0.0, 3.0]], atol=1e-12)


def test_the_true_car_keeps_between_the_edges_and_a_swerve_does_not(samples: list[Sample]) -> None:
    complete = [sample for sample in samples if sample.truth.complete]
    assert complete
    crossed = []
    for sample in complete:
        edges = sample.truth.road_edges
        assert edges, sample.token
        assert all(edge.shape == (20, 2) for edge in edges)
        score = sample.scorer(PROTOCOLS["bevplanner"])
        truth = score(sample.future_in_ego)
        assert truth.intersection == (0.0, 0.0, 0.0)
        assert truth.l2_m == pytest.approx((0, 0, 0), abs=1e-5)
        swerve = np.column_stack([np.arange(1, 7) * 2.0, np.arange(1, 7) * 4.0, np.zeros(6)])
        crossed.append(score(swerve).intersection[2])
        assert not any(truth.edge_truth_hits)
    assert np.mean(crossed) > 0.8


def test_edges_lie_on_the_rim_of_the_road(road: RoadMap, samples: list[Sample]) -> None:
    pose = samples[0].pose_in_map
    lanes = [*road.shapes("lane", pose), *road.shapes("road_segment", pose)]
    rim = in_ego(shapely.union_all([shape.polygon for shape in lanes]), pose).boundary
    edges = road.road_edges(pose)
    assert edges
    for edge in edges:
        assert np.abs(edge[:, 0]).max() <= 51.0 + 1e-6
        assert np.abs(edge[:, 1]).max() <= 24.8 + 1e-6
        assert shapely.distance(rim, shapely.points(edge)).max() < 1e-6


def test_without_a_map_only_protocols_that_need_one_are_refused(synthetic_root: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(synthetic_root, tmp_path / "data"))
    split = NuScenesSplit(root, "v1.0-synth", "val")
    path = map_path(root, split[0].location)
    path.unlink()
    assert split[0].scorer(PROTOCOLS["uniad"])(split[0].future_in_ego).counted
    with pytest.raises(InputError, match=r"bevplanner needs road edges.* open the data with road_edges=True"):
        split[0].scorer(PROTOCOLS["bevplanner"])
    with pytest.raises(InputError, match=rf"no map of .*{path.name} is missing; get the map expansion pack"):
        NuScenesSplit(root, "v1.0-synth", "val", road_edges=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content.update(version="1.2"), "is of version 1.2; get the map expansion pack"),
        (lambda content: content.pop("lane"), r"is no map expansion \(KeyError: 'lane'\)"),
        (lambda content: content["node"].pop(), "is no map expansion"),
    ],
)
def test_a_damaged_map_is_named(
    road: RoadMap, tmp_path: Path, damage: Callable[[dict], object], message: str
) -> None:
    content = json.loads(road.path.read_text())
    damage(content)
    copy = map_path(tmp_path, "boston-seaport")
    copy.parent.mkdir(parents=True)
    copy.write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"{copy.name} {message}"):
        RoadMap(tmp_path, "boston-seaport")
    copy.write_text(copy.read_text()[:1000])
    with pytest.raises(InputError, match="is no map expansion"):
        RoadMap(tmp_path, "boston-seaport")


def test_a_damaged_polygon_is_named(road: RoadMap, tmp_path: Path) -> None:
    content = json.loads(road.path.read_text())
    broken = content["lane"][0]
    polygon = next(each for each in content["polygon"] if each["token"] == broken["polygon_token"])
    polygon["exterior_node_tokens"] = polygon["exterior_node_tokens"][:2]
    copy = map_path(tmp_path, "boston-seaport")
    copy.parent.mkdir(parents=True)
    copy.write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"{copy.name}: lane {broken['token']} is no polygon"):
        RoadMap(tmp_path, "boston-seaport").shapes("lane")
    assert RoadMap(tmp_path, "boston-seaport").shapes("walkway")
