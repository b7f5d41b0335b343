"""The numbers of a report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from eval_nuscenes.evaluation import PlanLog, RunKey, Variant, plan_samples, planner_variants
from eval_nuscenes.summary import (
    Conditions,
    EvaluationSummary,
    SceneBootstrap,
    latency_split,
    score_sample,
    summarise,
)
from vla_autoprune.bundle import Bundle
from vla_autoprune.frame import CAMERAS, Command, EgoState, Frame

KEY = RunKey(
    bundle_id="b",
    data_hash="d",
    variants=(),
    command_source="route",
    code="e",
    machine="box",
    versions={},
)
CONDITIONS = Conditions(
    key=KEY,
    command="vla-autoprune evaluate bundle",
    data_root="data",
    version="v1.0-synth",
    split="val",
    samples=27,
    scenes=3,
    ego_sources={"can_bus": 27},
    warm_up=1,
)


@pytest.fixture(scope="module")
def summary(
    make_drive: Callable, pretend_planner: type, tmp_path_factory: pytest.TempPathFactory
) -> EvaluationSummary:
    drive = make_drive()
    variants = planner_variants(pretend_planner, (0.6, 0.25))
    records = list(plan_samples(drive, variants, PlanLog(tmp_path_factory.mktemp("run"), KEY), warm_up=0))
    scored = [score_sample(sample, record) for sample, record in zip(drive.samples, records, strict=True)]
    return summarise(variants, records, scored, CONDITIONS)


def test_every_protocol_counts_its_own_samples(summary: EvaluationSummary) -> None:
    full = summary.variant("full")
    assert full is not None
    assert full.planning["uniad"].counted == 27
    assert full.planning["vad"].counted == 3 * (9 - 6)
    assert full.planning["stp3"].counted == 3 * (9 - 6 - 2)


def test_differences_to_the_unpruned_variant_are_paired(summary: EvaluationSummary) -> None:
    full, pruned = summary.variants[0].planning["vad"], summary.variants[3].planning["vad"]
    assert full.l2_above_full_m is None
    assert pruned.l2_above_full_m is not None
    assert pruned.l2_above_full_m.mean == pytest.approx(pruned.l2_m[3].mean - full.l2_m[3].mean)
    assert pruned.l2_m[3].mean == pytest.approx(np.mean([value.mean for value in pruned.l2_m[:3]]))


def test_costs_come_from_the_plans(summary: EvaluationSummary) -> None:
    full, pruned = summary.variants[0].cost, summary.variants[3].cost
    assert full is not None and pruned is not None
    assert full.visual_tokens_into_layers == 216
    assert pruned.visual_tokens_into_layers == pytest.approx(54, abs=1)
    assert pruned.total_ms.p50 < full.total_ms.p50 <= full.total_ms.p90
    assert sum(full.split_ms.values()) == pytest.approx(full.total_ms.p50, rel=0.05)
    assert summary.variants[-1].cost is None
    assert sum(summary.variants[3].buckets.values()) == 27


def test_a_summary_survives_its_file(summary: EvaluationSummary) -> None:
    assert EvaluationSummary.model_validate_json(summary.model_dump_json()) == summary


def test_intervals_cover_the_mean_of_correlated_scenes() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(60):
        offsets = generator.normal(size=40)
        scenes = np.repeat([f"scene-{number}" for number in range(40)], 10)
        values = np.repeat(offsets, 10) + 0.1 * generator.normal(size=400)
        interval = SceneBootstrap(list(scenes), resamples=400, seed=trial).mean(
            values, np.ones(400, dtype=bool)
        )
        covered += interval.low <= 0 <= interval.high
    assert covered >= 52  # resampling single samples would cover about a third


def test_intervals_weigh_scenes_by_what_counts_and_need_two() -> None:
    bootstrap = SceneBootstrap(["a", "a", "b"])
    counted = bootstrap.mean([1.0, 3.0, 100.0], [True, True, False])
    assert (counted.mean, counted.low) == (2.0, None)
    both = bootstrap.mean([1.0, 3.0, 5.0], [True, True, True])
    assert both.mean == 3.0
    assert (both.low, both.high) == (2.0, 5.0)
    assert bootstrap.mean([1.0, 1.0, 1.0], [False] * 3).mean == 0.0


def test_latency_is_split_under_four_headings(stored_bundle: Bundle) -> None:
    from engines.onnxruntime import OnnxRuntimeBackend
    from vla_autoprune.runtime.planner import Planner

    images = {name: np.zeros((90, 160, 3), dtype=np.uint8) for name in CAMERAS}
    planner = Planner(stored_bundle, OnnxRuntimeBackend(stored_bundle, threads=1), budget=0.4)
    timings = planner.plan(Frame(images, EgoState(5.0), Command.STRAIGHT)).timings_ms
    split = latency_split(timings)
    assert [split[step] for step in ("vision", "prefill", "decode")] == [
        timings[step] for step in ("vision", "prefill", "decode")
    ]
    # Every step is under one heading only: those of the rest are what is left.
    assert timings["preprocess"] + timings["prompt"] <= split["rest"]
    assert sum(split.values()) == pytest.approx(timings["total"])
    steps = [timings[name] for name in timings if name.startswith("decode_")]
    assert sum(steps) <= split["decode"]


def test_failed_plans_are_counted_and_do_not_help(
    make_drive: Callable, pretend_planner: type, tmp_path: Path
) -> None:
    drive = make_drive()
    variants = [
        Variant("full", "full", pretend_planner()),
        Variant("failing", "autoprune", pretend_planner(0.25, fails_on="s1k2"), 0.25),
    ]
    records = list(plan_samples(drive, variants, PlanLog(tmp_path, KEY), warm_up=0))
    scored = [score_sample(sample, record) for sample, record in zip(drive.samples, records, strict=True)]
    failing = summarise(variants, records, scored, CONDITIONS).variants[1]
    assert failing.failed_plans == 1
    step = scored[9 + 2].scores["uniad"]["failing"].distance_m
    assert step[5] == pytest.approx(18.0, abs=0.5)
