"""Open-loop metrics against numbers that the original code gave."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval_nuscenes.metrics import PROTOCOLS, OpenLoopTruth, Score, TrackedBox, protocol_named
from vla_autoprune.errors import InputError

CATEGORIES = {
    "car": "vehicle.car",
    "truck": "vehicle.truck",
    "construction_vehicle": "vehicle.construction",
    "bus": "vehicle.bus.rigid",
    "trailer": "vehicle.trailer",
    "motorcycle": "vehicle.motorcycle",
    "bicycle": "vehicle.bicycle",
    "pedestrian": "human.pedestrian.adult",
    "barrier": "movable_object.barrier",
    "traffic_cone": "movable_object.trafficcone",
}
L2_TOLERANCE_M = 1e-4
Case = dict[str, Any]


@pytest.fixture(scope="module")
def cases(golden_dir: Path) -> list[Case]:
    plain = golden_dir / "nuscenes" / "openloop_cases.json"
    content = plain.read_bytes() if plain.is_file() else gzip.decompress(Path(f"{plain}.gz").read_bytes())
    return json.loads(content)["cases"]


def truth_of(case: Case) -> OpenLoopTruth:
    truth = np.array(case["gt"], dtype=np.float32)
    return OpenLoopTruth(
        waypoints=truth,
        exists=tuple(case["frame_exists"]),
        boxes=tuple(
            tuple(TrackedBox(*box[:5], category=CATEGORIES[box[5]], track=str(box[6])) for box in boxes)
            for boxes in case["agents"]
        ),
        rear_axle_waypoints=truth,
        road_edges=tuple(np.array(line) for line in case["boundaries"]),
    )


def reported(score: Score) -> dict[str, Any]:
    """The score under every name the original programs use."""
    values: dict[str, Any] = {
        "L2": score.distance_m,
        "box_col": score.hits,
        "fut_valid_flag": score.counted,
        "gt_curb_hit": score.edge_truth_hits,
        "pred_curb_hit_raw": score.edge_raw_hits,
    }
    for index, seconds in enumerate((1, 2, 3)):
        for name in ("L2_avg_{}s", "plan_L2_{}s", "L2_{}s"):
            values[name.format(seconds)] = score.l2_m[index]
        for name in ("box_col_avg_{}s", "plan_obj_box_col_{}s", "box_col_any_{}s"):
            values[name.format(seconds)] = score.collision[index]
        if score.intersection is not None:
            values[f"curb_any_{seconds}s"] = score.intersection[index]
    if score.counted:
        values |= {"gt_box_hit": score.truth_hits, "pred_box_hit_raw": score.raw_hits}
    return values


@pytest.mark.parametrize("protocol", [name for name in PROTOCOLS if name != "standard"])
def test_every_case_matches_the_original_code(cases: list[Case], protocol: str) -> None:
    wrong, compared = [], 0
    for case in cases:
        expected = case["expected"][protocol]
        score = PROTOCOLS[protocol].scorer(truth_of(case))(case["pred"])
        if expected is None:
            assert not score.counted, case["id"]
            continue
        values = reported(score)
        for field in expected.keys() & values.keys():
            if f"{protocol}.{field}" in case["sensitive"]:
                continue
            compared += 1
            tolerance = L2_TOLERANCE_M if "L2" in field else 1e-6
            if not np.allclose(values[field], expected[field], atol=tolerance, rtol=0):
                wrong.append(f"{case['id']} {field}: {values[field]} instead of {expected[field]}")
    assert not wrong, "\n".join(wrong)
    assert compared >= len(cases)


def test_the_golden_cases_collide_at_all(cases: list[Case]) -> None:
    hits = [any(PROTOCOLS["uniad"].scorer(truth_of(case))(case["pred"]).hits) for case in cases]
    assert 10 < sum(hits) < len(hits)


def test_scoring_twice_gives_the_same_and_leaves_the_plan_alone(cases: list[Case]) -> None:
    case = next(case for case in cases if case["id"].startswith("c20"))
    plan = np.array(case["pred"], dtype=np.float32)
    before = plan.copy()
    for protocol in PROTOCOLS.values():
        score = protocol.scorer(truth_of(case))
        assert score(plan) == score(plan)
    np.testing.assert_array_equal(plan, before)


def test_published_filters_of_the_data_side_apply() -> None:
    straight = np.stack([np.zeros(6), np.arange(1, 7) * 2.0], axis=1).astype(np.float32)
    swerve = straight + np.float32([6.0, 0.0])
    parked = TrackedBox(6.0, 8.5, 4.5, 1.9, np.pi / 2, "vehicle.car", "a")
    hidden = TrackedBox(6.0, 8.5, 4.5, 1.9, np.pi / 2, "vehicle.car", "a", lidar_points=0, seen=False)

    def collides(box: TrackedBox, protocol: str, past: int = 2) -> bool:
        truth = OpenLoopTruth(
            straight,
            (True,) * 7,
            ((box,),) * 7,
            past_keyframes=past,
            rear_axle_waypoints=straight,
            road_edges=(),
        )
        return any(PROTOCOLS[protocol].scorer(truth)(swerve).hits)

    assert all(collides(parked, protocol) for protocol in PROTOCOLS)
    assert collides(hidden, "uniad")
    assert not collides(hidden, "vad")
    assert not collides(hidden, "sparsedrive")
    assert not collides(hidden, "bevplanner")
    assert not collides(hidden, "stp3")
    assert not collides(parked, "stp3", past=1)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (np.zeros((5, 2)), r"\[6, 2\] waypoints at 0.5 … 3.0 s, not \[5, 2\]"),
        (np.full((6, 2), np.nan), r"waypoint 0 of the plan is \[nan, nan\]"),
    ],
)
def test_a_bad_plan_is_refused(plan: np.ndarray, message: str) -> None:
    truth = OpenLoopTruth(np.zeros((6, 2), np.float32), (True,) * 7, ((),) * 7)
    with pytest.raises(InputError, match=message):
        PROTOCOLS["uniad"].scorer(truth)(plan)


def test_an_unknown_protocol_is_refused_with_the_list() -> None:
    assert protocol_named("vad") is PROTOCOLS["vad"]
    with pytest.raises(InputError, match="no open-loop protocol 'unaid'; use one of uniad, stp3, vad, bevpl"):
        protocol_named("unaid")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("annotated", "the data set has no annotations.*score on a version that has them"),
        ("road_edges", "bevplanner needs road edges, and the truth was read without a map; open the data"),
        ("rear_axle_waypoints", "bevplanner follows the rear axle, and the truth holds no rear_axle"),
    ],
)
def test_a_truth_without_what_a_protocol_needs_is_refused(
    cases: list[Case], missing: str, message: str
) -> None:
    truth = replace(truth_of(cases[0]), **{missing: None})
    with pytest.raises(InputError, match=message):
        PROTOCOLS["bevplanner"].scorer(truth)


def test_only_bevplanner_needs_a_map(cases: list[Case]) -> None:
    truth = replace(truth_of(cases[0]), road_edges=None, rear_axle_waypoints=None)
    others = [protocol for protocol in PROTOCOLS.values() if not protocol.needs_map]
    assert len(others) == len(PROTOCOLS) - 1
    assert all(protocol.scorer(truth)(cases[0]["pred"]).intersection is None for protocol in others)


def test_the_standard_protocol_lets_the_true_car_through_everywhere(cases: list[Case]) -> None:
    for case in cases:
        score = PROTOCOLS["standard"].scorer(truth_of(case))(case["gt"])
        assert not any(score.raw_hits), case["id"]
        assert score.l2_m == (0.0, 0.0, 0.0)
