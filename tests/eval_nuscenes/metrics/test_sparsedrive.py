"""What the golden cases of SparseDrive leave open."""

from __future__ import annotations

import numpy as np
import pytest

from eval_nuscenes.metrics import PROTOCOLS, OpenLoopTruth, TrackedBox

AWAY = np.full((6, 2), -45.0, dtype=np.float32)


@pytest.mark.parametrize(("step_m", "turns"), [(0.08, False), (0.12, True)])
def test_the_box_turns_where_first_and_last_waypoint_are_half_a_metre_apart(
    step_m: float, turns: bool
) -> None:
    to_the_left = np.stack([-step_m * np.arange(1, 7), np.zeros(6)], axis=1).astype(np.float32)
    cone = TrackedBox(0.0, 2.0, 0.3, 0.3, 0.0, "movable_object.trafficcone", "ahead")
    score = PROTOCOLS["sparsedrive"].scorer(OpenLoopTruth(AWAY, (True,) * 7, ((cone,),) * 7))(to_the_left)
    assert score.hits == (not turns,) * 6  # a box that looks to the left passes behind the cone
