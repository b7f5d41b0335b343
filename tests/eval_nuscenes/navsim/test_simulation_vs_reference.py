"""Plans driven by our tracker and bicycle model against NAVSIM's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from eval_nuscenes.navsim import simulation
from eval_nuscenes.navsim.scene import PlannedPath


def test_every_plan_is_driven_as_navsim_drives_it(golden: Any, differences: Callable[..., str]) -> None:
    wrong = ""
    for case in golden.cases:
        record, steps = golden.scene_record(case["scene"]), case["steps"]
        ego = golden.scene(case["scene"], "v1").ego
        plan = simulation.plan_poses(golden.path(case), ego)
        references = [np.array(record[devkit]["reference"]) for devkit in ("v1", "v2")]
        poses = np.stack(
            [plan, *(simulation.stamped_poses(rows[:, 0], rows[:, 1:], ego) for rows in references)]
        )
        speeds, curvatures = simulation.profiles(poses)
        states = simulation.simulate(ego, poses)
        name = case["name"]
        wrong += differences(f"{name} poses", plan, steps["interpolated"], 1e-6, angle=2)
        wrong += differences(f"{name} speeds", speeds[0], steps["velocity_profile"], 1e-7)
        wrong += differences(f"{name} curvatures", curvatures[0], steps["curvature_profile"], 1e-7)
        for row, key in enumerate(("simulated", "simulated_reference_v1", "simulated_reference_v2")):
            wrong += differences(f"{name} {key}", states[row], steps[key], 1e-6, angle=2)
    assert not wrong, wrong


def test_plans_driven_together_are_driven_as_alone(golden: Any) -> None:
    ego = golden.scene("empty10", "v2").ego
    poses = np.stack(
        [simulation.plan_poses(golden.path(golden.case(name)), ego) for name in ("cv", "weave", "hard_brake")]
    )
    together = simulation.simulate(ego, poses)
    for number in range(3):
        np.testing.assert_allclose(
            together[number], simulation.simulate(ego, poses[number : number + 1])[0], atol=1e-9
        )


@pytest.mark.parametrize("seconds", [0.5, 3.0])
def test_a_short_plan_holds_its_last_pose(golden: Any, seconds: float) -> None:
    ego = golden.scene("empty10", "v2").ego
    count = round(seconds / 0.5)
    poses = simulation.plan_poses(
        PlannedPath(np.column_stack([np.arange(1, count + 1), np.zeros((count, 2))])), ego
    )
    held = poses[round(seconds / 0.1) :]
    np.testing.assert_allclose(held, np.broadcast_to(held[0], held.shape), atol=1e-9)
