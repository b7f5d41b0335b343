from itertools import pairwise

import numpy as np
import pytest

from eval_nuscenes.map_expansion import arcline_path

pytest.importorskip("nuscenes")


def walk(heading: np.ndarray) -> np.ndarray:
    """Points a metre apart that follow these headings."""
    return np.cumsum(np.stack([np.cos(heading), np.sin(heading)], axis=1), axis=0)


ALONG = np.arange(0.0, 150.0)
LANES = {
    "straight": walk(0 * ALONG + 2.8),
    "gentle curve": walk(-ALONG / 300),
    "more than a full circle": walk(ALONG / 20),
    "clothoid": walk((ALONG / 60) ** 2),
    "winding": walk(0.5 * np.sin(ALONG / 20)),
    "corner": walk(np.clip((ALONG - 20) / 8, 0, np.pi / 2)),
    "two points": np.array([(3.0, 4.0), (9.0, 12.0)]),
}


@pytest.mark.parametrize("lane", LANES.values(), ids=LANES)
@pytest.mark.parametrize("resolution", [0.05, 0.5, 1.0])
def test_the_devkit_discretises_arcs_back_to_the_centreline(lane: np.ndarray, resolution: float) -> None:
    from nuscenes.map_expansion.arcline_path_utils import discretize_lane

    poses = np.array(discretize_lane(arcline_path(lane), resolution))
    gaps = np.linalg.norm(lane[:, None] - poses[None, :, :2], axis=2).min(axis=1)
    assert gaps.max() < 0.02 + resolution / 2
    np.testing.assert_allclose(poses[[0, -1], :2], lane[[0, -1]], atol=1e-6)
    steps = np.diff(poses[:, :2], axis=0)
    moved = np.linalg.norm(steps, axis=1) > 1e-6
    turn = np.arctan2(steps[moved, 1], steps[moved, 0]) - poses[:-1][moved, 2]
    assert np.abs(np.angle(np.exp(1j * turn))).max() < 0.1, "poses head where the path goes"


@pytest.mark.parametrize("lane", LANES.values(), ids=LANES)
def test_arcs_join_smoothly_and_are_as_long_as_the_lane(lane: np.ndarray) -> None:
    from nuscenes.map_expansion.arcline_path_utils import length_of_lane

    arcs = arcline_path(lane)
    for arc, following in pairwise(arcs):
        end, start = np.array(arc["end_pose"]), np.array(following["start_pose"])
        np.testing.assert_allclose(end[:2], start[:2], atol=1e-6)
        assert abs(np.angle(np.exp(1j * (end[2] - start[2])))) < 0.02
    length = np.linalg.norm(np.diff(lane, axis=0), axis=1).sum()
    assert length_of_lane(arcs) == pytest.approx(length, rel=2e-3)


def test_few_arcs_are_needed_where_the_road_is_simple() -> None:
    assert len(arcline_path(LANES["straight"])) == len(arcline_path(LANES["gentle curve"])) == 1
    assert len(arcline_path(LANES["corner"])) < 20
    assert arcline_path(LANES["straight"])[0]["segment_length"][1] > 100


def test_the_devkit_finds_the_curvature_of_a_curve() -> None:
    from nuscenes.map_expansion.arcline_path_utils import get_curvature_at_distance_along_lane

    assert get_curvature_at_distance_along_lane(40, arcline_path(LANES["gentle curve"])) == pytest.approx(
        1 / 300, rel=1e-2
    )
    assert get_curvature_at_distance_along_lane(40, arcline_path(LANES["straight"])) == 0
