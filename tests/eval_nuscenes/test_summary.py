"""The numbers of a report."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from eval_nuscenes.evaluation import PlannerSource, Variant, planner_variants
from eval_nuscenes.summary import EvaluationSummary, latency_split
from vla_autoprune.bundle import Bundle
from vla_autoprune.frame import CAMERAS, Command, EgoState, Frame


@pytest.fixture(scope="module")
def summary(make_drive: Callable, pretend_planner: type, evaluated: Callable) -> EvaluationSummary:
    return evaluated(
        make_drive(keyframes=11), planner_variants([PlannerSource("bundle", pretend_planner)], (0.6, 0.25))
    ).summary


def test_every_protocol_counts_its_own_samples(summary: EvaluationSummary) -> None:
    full = summary.variant("full")
    assert full is not None
    assert full.planning["uniad"].counted == (33, 33, 33)
    assert full.planning["vad"].counted == (3 * (11 - 6),) * 3
    assert full.planning["stp3"].counted == (3 * (11 - 6 - 2),) * 3
    assert full.planning["standard"].counted == (3 * 7, 3 * 5, 3 * 3)


def test_differences_to_the_unpruned_variant_are_paired(summary: EvaluationSummary) -> None:
    full, pruned = summary.variants[0].planning["vad"], summary.variants[3].planning["vad"]
    assert full.l2_above_reference_m is None
    assert pruned.l2_above_reference_m is not None
    assert pruned.l2_above_reference_m.mean == pytest.approx(pruned.l2_m[3].mean - full.l2_m[3].mean)
    assert pruned.l2_m[3].mean == pytest.approx(np.mean([value.mean for value in pruned.l2_m[:3]]))


def test_costs_come_from_the_plans(summary: EvaluationSummary) -> None:
    full, pruned = summary.variants[0].cost, summary.variants[3].cost
    assert full is not None and pruned is not None
    assert full.visual_tokens_into_layers == 216
    assert pruned.visual_tokens_into_layers == pytest.approx(54, abs=1)
    assert pruned.total_ms.p50 < full.total_ms.p50 <= full.total_ms.p90
    assert sum(full.split_ms.values()) == pytest.approx(full.total_ms.p50, rel=0.05)
    assert summary.variants[-1].cost is None
    assert sum(summary.variants[3].buckets.values()) == 33


def test_a_summary_survives_its_file(summary: EvaluationSummary) -> None:
    assert EvaluationSummary.model_validate_json(summary.model_dump_json()) == summary


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
    make_drive: Callable, pretend_planner: type, evaluated: Callable
) -> None:
    variants = [
        Variant("full", "full", pretend_planner()),
        Variant("failing", "autoprune", pretend_planner(0.25, fails_on="s1k2"), 0.25),
    ]
    found = evaluated(make_drive(), variants)
    assert found.summary.variants[1].failed_plans == 1
    step = found.scored[9 + 2].scores["uniad"]["failing"].distance_m
    assert step[5] == pytest.approx(18.0, abs=0.5)


def test_a_protocol_that_counts_nothing_says_nothing(
    make_drive: Callable, pretend_planner: type, evaluated: Callable
) -> None:
    drive = make_drive(scenes=2, keyframes=4)
    summary = evaluated(drive, [Variant("full", "full", pretend_planner())]).summary
    full = summary.variants[0]
    assert full.planning["vad"].counted == (0, 0, 0)
    assert [value.mean for value in full.planning["vad"].l2_m] == [None] * 4
    assert full.planning["vad"].few
    assert '"mean":null' in summary.model_dump_json()
    assert full.planning["uniad"].l2_m[0].mean is not None


def test_late_plans_are_scored_beside_those_on_time(
    make_drive: Callable, pretend_planner: type, evaluated: Callable
) -> None:
    variants = [Variant("full", "full", pretend_planner())]
    at_once = evaluated(make_drive(), variants, latency_ms=0.0).summary.variants[0].planning["uniad"]
    assert at_once.late is not None
    assert at_once.late.l2_m == at_once.l2_m and at_once.late.collision == at_once.collision
    own = evaluated(make_drive(), variants).summary.variants[0].planning["uniad"].late
    assert own is not None and 40 < own.latency_ms < 42
    late = evaluated(make_drive(), variants, latency_ms=900.0).summary.variants[0].planning["uniad"].late
    assert late is not None and late.latency_ms == 900
    assert late.l2_above_on_time_m.mean == pytest.approx(late.l2_m[-1].mean - at_once.l2_m[-1].mean)


def test_samples_are_sorted_by_what_happened(summary: EvaluationSummary) -> None:
    kinds = {(each.aspect, each.value): each for each in summary.variants[0].scenarios}
    assert set(kinds) == {
        ("manoeuvre", "straight"),
        ("time of day", "day"),
        ("time of day", "night"),
        ("weather", "dry"),
        ("weather", "rain"),
    }
    assert kinds["time of day", "night"].scenes == 1
    whole = summary.variants[0].planning["standard"]
    assert kinds["manoeuvre", "straight"].counted == 3 * (11 - 6 - 2)
    nights, days = kinds["time of day", "night"].counted, kinds["time of day", "day"].counted
    assert nights + days == whole.counted[-1]


def test_error_is_put_against_complexity(summary: EvaluationSummary) -> None:
    full, pruned = summary.variants[0], summary.variants[3]
    assert full.error_by_complexity is None
    found = pruned.error_by_complexity
    assert found is not None
    assert sum(each.counted for each in found.bins) == pruned.planning["standard"].counted[-1]
    assert found.rank_correlation.mean is not None and -1 <= found.rank_correlation.mean <= 1
