"""PDMS and EPDMS with every sub-score against NAVSIM's own numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from eval_nuscenes.navsim.scene import PACIFICA, PlannedPath, Tracks, box_corners
from eval_nuscenes.navsim.scoring import (
    EC,
    EP,
    EPDMS,
    NC,
    PDMS,
    TTC,
    Drive,
    FrameScore,
    Metric,
    classify_contact,
    is_ahead,
    is_behind,
    judge,
    progress_score,
    score_plan,
)
from eval_nuscenes.navsim.simulation import STATE, VX
from vla_autoprune.errors import InputError

OFFICIAL = {"no_at_fault_collision": NC, "time_to_collision": TTC}
PROGRESS_TOLERANCE = 1e-6


def faults(what: str, sub_scores: Any, expected: dict[str, Any]) -> list[str]:
    wrong = []
    for name, value in expected.items():
        column = OFFICIAL.get(name, name)
        if column not in sub_scores:
            continue
        tolerance = PROGRESS_TOLERANCE if column == EP else 0.0
        if abs(sub_scores[column] - value) > tolerance:
            wrong.append(f"{what}: {column} is {sub_scores[column]} instead of {value}")
    return wrong


def drive_faults(what: str, drive: Drive, expected: dict[str, Any]) -> list[str]:
    wrong = []
    if abs(drive.progress_m - expected["progress_raw"]) > PROGRESS_TOLERANCE:
        wrong.append(f"{what}: progress {drive.progress_m} instead of {expected['progress_raw']}")
    found = {
        "collision_time_idx": drive.collision_step,
        "ttc_time_idx": drive.ttc_step,
        "multiple_lanes": np.flatnonzero(drive.multiple_lanes).tolist(),
        "non_drivable": np.flatnonzero(drive.non_drivable).tolist(),
        "oncoming": np.flatnonzero(drive.off_route).tolist(),
    }
    return wrong + [
        f"{what}: {name} is {value} instead of {expected[name]}"
        for name, value in found.items()
        if value != expected[name]
    ]


def scored(golden: Any, case: dict[str, Any], devkit: Any) -> FrameScore:
    return score_plan(golden.scene(case["scene"], devkit), golden.path(case))


def test_every_case_under_pdms(golden: Any) -> None:
    wrong = []
    for case in golden.cases:
        result, expected = scored(golden, case, "v1"), case["v1"]
        name = case["name"]
        wrong += faults(name, result.sub_scores, expected["expected"])
        if abs(result.score - expected["expected"]["pdms"]) > PROGRESS_TOLERANCE:
            wrong.append(f"{name}: PDMS {result.score} instead of {expected['expected']['pdms']}")
        wrong += drive_faults(f"{name} plan", result.drive, expected["agent"])
        wrong += drive_faults(f"{name} reference", result.reference, expected["reference"])
    assert not wrong, "\n".join(wrong)


def test_every_case_under_epdms(golden: Any) -> None:
    wrong = []
    for case in golden.cases:
        result, expected = scored(golden, case, "v2"), case["v2"]
        name = case["name"]
        wrong += faults(f"{name} unfiltered", result.unfiltered, expected["expected_unfiltered"])
        wrong += faults(f"{name} filtered", result.sub_scores, expected["expected_filtered"])
        assert EC not in result.sub_scores
        epdms = expected["epdms_filtered_without_extended_comfort"]
        if abs(result.score - epdms) > PROGRESS_TOLERANCE:
            wrong.append(f"{name}: EPDMS {result.score} instead of {epdms}")
        inside = result.metric.score(result.unfiltered)
        if abs(inside - expected["expected_unfiltered"]["score_inside_scorer"]) > PROGRESS_TOLERANCE:
            wrong.append(f"{name}: unfiltered score {inside}")
        wrong += drive_faults(f"{name} plan", result.drive, expected["agent"])
        wrong += drive_faults(f"{name} reference", result.reference, expected["reference"])
    assert not wrong, "\n".join(wrong)


def test_the_golden_cases_break_every_rule(golden: Any) -> None:
    for devkit in ("v1", "v2"):
        expected = "expected" if devkit == "v1" else "expected_unfiltered"
        names = [name for name in golden.case("cv")[devkit][expected] if name in OFFICIAL or "_" in name]
        for name in names:
            values = {str(case[devkit][expected][name]) for case in golden.cases}
            assert len(values) > 1, f"{name} of {devkit} is always {values}"


def test_without_the_human_filter_nothing_is_forgiven(golden: Any) -> None:
    case = golden.case("filter_ddc")
    plan = golden.path(case)
    scene = golden.scene(case["scene"], "v2")
    forgiven, strict = score_plan(scene, plan), score_plan(scene, plan, human_filter=False)
    assert forgiven.score > 0.9
    assert strict.score == 0
    assert strict.sub_scores == forgiven.unfiltered == strict.unfiltered


def test_progress_is_a_share_only_where_someone_gets_further_than_five_metres(golden: Any) -> None:
    case = golden.case("cv")
    drive = score_plan(golden.scene(case["scene"], "v2"), golden.path(case)).drive

    def progress(metric: Metric, own_m: float, other_m: float, rule: float = 1.0) -> float:
        kept = dict.fromkeys((*PDMS.multipliers, *EPDMS.multipliers), 1.0)
        agent = replace(drive, progress_m=own_m, sub_scores=kept | {NC: rule})
        return progress_score(metric, agent, replace(drive, progress_m=other_m, sub_scores=kept))

    for metric in (PDMS, EPDMS):
        assert progress(metric, 0.0, 5.0) == 1.0
        assert progress(metric, 0.0, 5.001) == 0.0
        assert progress(metric, 4.0, 8.0) == 0.5
        assert progress(metric, 8.0, 4.0) == 1.0
    assert (progress(PDMS, 4.0, 4.9, rule=0.0), progress(EPDMS, 4.0, 4.9, rule=0.0)) == (0.0, 1.0)
    assert (progress(PDMS, 4.0, 8.0, rule=0.5), progress(EPDMS, 4.0, 8.0, rule=0.5)) == (0.25, 0.5)


def test_a_car_that_stands_comes_near_no_one(golden: Any) -> None:
    scene = golden.scene(golden.case("cv")["scene"], "v1")
    x, y, heading = scene.ego.pose
    ahead = 4.049 + 2.0 - 0.1  # a box of 4 m that the front bumper reaches into
    box = [x + ahead * np.cos(heading), y + ahead * np.sin(heading), heading, 4.0, 2.0]
    tracks = Tracks(("ahead",), ("vehicle",), np.full((1, 51, 5), box), np.array([5.0]))
    states = np.zeros((2, 41, len(STATE)))
    states[..., :3] = scene.ego.pose
    states[..., VX] = [[0.004], [0.006]]
    standing, creeping = judge(replace(scene, tracks=tracks), states)
    assert (standing.sub_scores[TTC], creeping.sub_scores[TTC]) == (1.0, 0.0)
    assert standing.sub_scores[NC] == creeping.sub_scores[NC] == 1.0  # whoever stands is not at fault


@pytest.mark.parametrize("devkit", ["v1", "v2"])
def test_contacts(golden: Any, devkit: str) -> None:
    shapely = pytest.importorskip("shapely")
    kinds = set()
    for number, unit in enumerate(golden.files[f"units_{devkit}.json"]["contact"]):
        pose, box = np.array(unit["ego"]), np.array(unit["box"])
        kind = classify_contact(pose, unit["ego_speed"], box, unit["type"], unit["speed"])
        assert unit["kind"] in (f"{kind}_collision", f"active_{kind}_collision"), number
        outlines = [shapely.polygons(box_corners(one)) for one in (PACIFICA.boxes(pose), box)]
        assert bool(shapely.intersects(*outlines)) == bool(unit["touching"]), number
        kinds.add(kind)
    assert len(kinds) == 5


@pytest.mark.parametrize("devkit", ["v1", "v2"])
def test_bearings(golden: Any, devkit: str) -> None:
    units = golden.files[f"units_{devkit}.json"]["bearing"]
    stable = [unit for unit in units if not unit["unstable"]]
    assert len(stable) > len(units) / 2
    for unit in stable:
        pose, point = np.array(unit["ego"]), np.array(unit["other"][:2])
        assert is_ahead(pose, point) == unit["ahead"], unit
        assert is_behind(pose, point) == unit["behind"], unit


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (PlannedPath(np.zeros((8, 2))), r"plan of cones is \[8, 2\]; expected \[n, 3\]"),
        (PlannedPath(np.zeros((0, 3))), r"plan of cones is \[0, 3\]"),
        (PlannedPath(np.array([[1, 0, 0], [2, np.nan, 0]])), r"pose 1 is \[2.0, nan, 0.0\]"),
        (PlannedPath(np.ones((8, 3)), interval_s=0.0), r"interval is 0.0 s; it must be above 0"),
    ],
)
def test_what_is_no_plan_is_refused(golden: Any, plan: PlannedPath, message: str) -> None:
    with pytest.raises(InputError, match=message):
        score_plan(golden.scene("cones", "v2"), plan)
