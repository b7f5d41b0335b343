"""Planning a split: resumable, interleaved, honest about failures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from eval_nuscenes.evaluation import (
    PlanLog,
    PlannerSource,
    RunKey,
    Variant,
    counterparts,
    plan_samples,
    planner_variants,
    pruned_example,
)
from vla_autoprune.errors import InputError
from vla_autoprune.frame import CAMERAS, Frame, Plan


def test_variants_are_the_unpruned_the_pairs_and_the_references(pretend_planner: type) -> None:
    variants = planner_variants([PlannerSource("bundle", pretend_planner)], (0.6, 0.25))
    assert [variant.name for variant in variants] == [
        "full",
        "autoprune 60%",
        "random 60%",
        "autoprune 25%",
        "random 25%",
        "images blanked",
        "constant velocity",
    ]
    assert variants[1].agent.policy == "autoprune" and variants[2].agent.policy == "random"
    assert variants[0].agent.budget is None and variants[3].agent.budget == 0.25


def test_policies_are_chosen_and_count_once(pretend_planner: type) -> None:
    variants = planner_variants(
        [PlannerSource("bundle", pretend_planner)], (0.6,), ("uniform", "fixed", "uniform")
    )
    assert [variant.name for variant in variants[1:-2]] == ["uniform 60%", "fixed 60%"]
    assert [variant.agent.policy for variant in variants[1:-2]] == ["uniform", "fixed"]


def test_further_bundles_stand_beside_the_first_and_carry_their_name(pretend_planner: type) -> None:
    sources = [
        PlannerSource("bundle", pretend_planner),
        PlannerSource("front12", pretend_planner, own_full=False),
        PlannerSource("other", pretend_planner),
    ]
    variants = planner_variants(sources, (0.6, 0.25), ("autoprune",))
    assert [(variant.name, variant.bundle) for variant in variants] == [
        ("full", "bundle"),
        ("full other", "other"),
        ("autoprune 60%", "bundle"),
        ("autoprune 60% front12", "front12"),
        ("autoprune 60% other", "other"),
        ("autoprune 25%", "bundle"),
        ("autoprune 25% front12", "front12"),
        ("autoprune 25% other", "other"),
        ("images blanked", "bundle"),
        ("constant velocity", ""),
    ]
    example = pruned_example(variants)
    assert example is not None and example.name == "autoprune 25%"
    beside = [variant.name for variant in counterparts(variants, example)]
    assert beside == ["autoprune 25% front12", "autoprune 25% other"]


def test_variants_take_turns_on_each_frame_after_a_warm_up(
    run_key: RunKey, make_drive: Callable, pretend_planner: type, tmp_path: Path
) -> None:
    drive = make_drive(scenes=1, keyframes=3)
    calls: list[str] = []
    variants = [
        Variant("full", "full", pretend_planner(calls=calls)),
        Variant("autoprune 25%", "autoprune", pretend_planner(0.25, calls=calls), 0.25),
    ]
    records = list(plan_samples(drive, variants, PlanLog(tmp_path, run_key), warm_up=2))
    assert [call.split()[-1] for call in calls[:4]] == ["s0k0"] * 4
    assert calls[4:8] == [
        "autoprune None s0k0",
        "autoprune 0.25 s0k0",
        "autoprune 0.25 s0k1",
        "autoprune None s0k1",
    ]
    assert [list(record.plans) for record in records] == [["full", "autoprune 25%"]] * 3


def test_plans_are_made_of_images_decoded_as_asked(
    run_key: RunKey, make_drive: Callable, pretend_planner: type, tmp_path: Path
) -> None:
    drive, seen = make_drive(scenes=1, keyframes=2), []

    class Seeing(pretend_planner):
        def plan(self, frame: Frame) -> Plan:
            seen.extend(image.shape for image in frame.images.values())
            return super().plan(frame)

    variants = [Variant("full", "full", Seeing())]
    for name, reduction, shape in (("half", lambda *_: 2, (45, 80, 3)), ("whole", None, (90, 160, 3))):
        seen.clear()
        list(plan_samples(drive, variants, PlanLog(tmp_path / name, run_key), reduction=reduction))
        assert len(seen) >= 2 * len(CAMERAS) and set(seen) == {shape}


def test_an_interrupted_run_goes_on_where_it_stopped(
    run_key: RunKey, make_drive: Callable, pretend_planner: type, tmp_path: Path
) -> None:
    drive = make_drive(scenes=1, keyframes=6)
    variants = [Variant("full", "full", pretend_planner())]
    run = plan_samples(drive, variants, PlanLog(tmp_path, run_key))
    first = [next(run), next(run)]
    run.close()
    log = PlanLog(tmp_path, run_key)
    with log.path.open("a") as file:
        file.write('{"token": "s0k2", "sce')
    again = PlanLog(tmp_path, run_key)
    assert list(again.records) == ["s0k0", "s0k1"]
    assert list(again.records.values()) == first
    rest = list(plan_samples(drive, variants, again))
    assert [record.token for record in rest] == ["s0k2", "s0k3", "s0k4", "s0k5"]
    assert list(plan_samples(drive, variants, PlanLog(tmp_path, run_key))) == []
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("change", [{"planned_by": "bundle c"}, {"code": "f" * 64}])
def test_another_question_or_other_code_has_another_log(
    run_key: RunKey, tmp_path: Path, change: dict[str, str]
) -> None:
    other = run_key.model_copy(update=change)
    assert PlanLog(tmp_path, run_key).path != PlanLog(tmp_path, other).path


def test_a_damaged_log_is_refused(
    run_key: RunKey, make_drive: Callable, pretend_planner: type, tmp_path: Path
) -> None:
    log = PlanLog(tmp_path, run_key)
    variants = [Variant("full", "full", pretend_planner())]
    list(plan_samples(make_drive(scenes=1, keyframes=3), variants, log))
    lines = log.path.read_text().splitlines()
    log.path.write_text("\n".join([lines[0], lines[1][:-9], lines[2]]) + "\n")
    with pytest.raises(InputError, match=r"plans-\w+\.jsonl line 2 is no sample record; delete it"):
        PlanLog(tmp_path, run_key)
    log.path.write_text("{}\n")
    with pytest.raises(InputError, match="does not start with the key of this run"):
        PlanLog(tmp_path, run_key)


def test_a_failed_plan_is_recorded_and_stands_still(
    run_key: RunKey, make_drive: Callable, pretend_planner: type, tmp_path: Path
) -> None:
    variants = [Variant("full", "full", pretend_planner(fails_on="s0k1"))]
    records = list(plan_samples(make_drive(scenes=1, keyframes=3), variants, PlanLog(tmp_path, run_key)))
    failed = records[1].plans["full"]
    assert failed.error == "action token 3 is no action"
    assert not np.any(failed.waypoints_in_ego)
    assert records[0].plans["full"].error is None


def test_an_unreadable_image_stops_the_run_but_keeps_what_is_done(
    run_key: RunKey, make_drive: Callable, pretend_planner: type, tmp_path: Path
) -> None:
    drive = make_drive(scenes=1, keyframes=4)
    broken = tmp_path / "CAM_BACK.jpg"
    broken.write_bytes(b"\xff\xd8 not a whole image")
    view = drive[2].cameras["CAM_BACK"]
    drive[2].cameras["CAM_BACK"] = type(view)(
        broken, view.width, view.height, view.intrinsics, view.ego_from_camera
    )
    log = PlanLog(tmp_path, run_key)
    with pytest.raises(InputError, match=r"CAM_BACK\.jpg \(20 bytes\) cannot be decoded"):
        list(plan_samples(drive, [Variant("full", "full", pretend_planner())], log))
    assert list(PlanLog(tmp_path, run_key).records) == ["s0k0", "s0k1"]


def test_references_need_no_pixels(
    run_key: RunKey, make_drive: Callable, pretend_planner: type, tmp_path: Path
) -> None:
    drive = make_drive(scenes=1, keyframes=2)
    variants = planner_variants([PlannerSource("bundle", pretend_planner)], (0.25,))
    (record, _) = plan_samples(drive, variants, PlanLog(tmp_path, run_key))
    straight = np.array(record.plans["constant velocity"].waypoints_in_ego)
    np.testing.assert_allclose(straight[:, 0], 4.0 * np.arange(0.5, 3.1, 0.5))
    assert record.plans["images blanked"].waypoints_in_ego != record.plans["full"].waypoints_in_ego
