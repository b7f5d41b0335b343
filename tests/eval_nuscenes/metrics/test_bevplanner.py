"""What the golden cases of BEV-Planner leave open."""

from __future__ import annotations

import numpy as np
import pytest

from eval_nuscenes.metrics import PROTOCOLS, OpenLoopTruth, TrackedBox

AWAY = np.full((6, 2), -30.0, dtype=np.float32)


@pytest.mark.parametrize(("step_m", "turns"), [(0.9, False), (1.1, True)])
def test_the_box_turns_from_steps_of_a_metre(step_m: float, turns: bool) -> None:
    to_the_left = np.stack([-step_m * np.arange(1, 7), np.zeros(6)], axis=1).astype(np.float32)
    last = float(to_the_left[-1, 0])
    person_wide = TrackedBox(last - 2.5, -0.985793, 0.5, 0.5, 0.0, "vehicle.bicycle", "beside")
    truth = OpenLoopTruth(
        AWAY, (True,) * 7, ((),) * 6 + ((person_wide,),), rear_axle_waypoints=AWAY, road_edges=()
    )
    score = PROTOCOLS["bevplanner"].scorer(truth)(to_the_left)
    assert score.hits == (False,) * 5 + (turns,)
    assert score.collision == (0.0, 0.0, float(turns))


@pytest.mark.parametrize(
    ("lidar_points", "radar_points", "counts"), [(1, 0, True), (0, 1, True), (0, 0, False)]
)
def test_a_vehicle_counts_with_a_point_of_either_sensor(
    lidar_points: int, radar_points: int, counts: bool
) -> None:
    stop = np.zeros((6, 2), dtype=np.float32)
    ahead = TrackedBox(0.0, 3.0, 4.0, 2.0, np.pi / 2, "vehicle.car", "ahead", lidar_points, radar_points)
    truth = OpenLoopTruth(AWAY, (True,) * 7, ((ahead,),) * 7, rear_axle_waypoints=AWAY, road_edges=())
    assert any(PROTOCOLS["bevplanner"].scorer(truth)(stop).hits) == counts


def test_an_edge_before_and_a_vehicle_later_are_told_apart() -> None:
    forward = np.stack([np.zeros(6), 4.0 * np.arange(1, 7)], axis=1).astype(np.float32)
    edge = np.stack([np.linspace(-3, 3, 20), np.full(20, 8.0)], axis=1)
    parked = TrackedBox(0.0, 26.0, 4.0, 2.0, np.pi / 2, "vehicle.car", "parked")
    truth = OpenLoopTruth(AWAY, (True,) * 7, ((parked,),) * 7, rear_axle_waypoints=AWAY, road_edges=(edge,))
    score = PROTOCOLS["bevplanner"].scorer(truth)(forward)
    assert score.intersection == (1.0, 1.0, 1.0)
    assert score.collision == (0.0, 0.0, 1.0)
    assert sum(score.edge_raw_hits) == 1
