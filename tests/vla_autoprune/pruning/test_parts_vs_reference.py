"""Each part of the reference form against numbers the published code produced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from vla_autoprune.pruning.information import calibrated_information, information, reference_information
from vla_autoprune.pruning.merging import group_tokens
from vla_autoprune.pruning.schedule import reference_schedule, slope_from_information
from vla_autoprune.pruning.selection import (
    reference_cap_scores,
    reference_kept_count,
    select_top,
    text_scores,
)

Case = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]


@pytest.mark.parametrize(("dtype", "tolerance"), [("f32", 1e-5), ("f64", 1e-12), ("f16", 0.01)])
def test_information_per_head(
    information_case: Case, information_arrays: Arrays, dtype: str, tolerance: float
) -> None:
    attention = information_arrays[information_case["array"]].astype(dtype.replace("f", "float"))
    np.testing.assert_allclose(
        reference_information(attention),
        information_case[f"mi_per_head_{dtype}"],
        rtol=tolerance,
        atol=tolerance,
    )


def test_information_over_heads_and_slope(information_case: Case, information_arrays: Arrays) -> None:
    attention = information_arrays[information_case["array"]]
    bits = information(attention, "reference")
    assert bits == pytest.approx(information_case["mi_sum_heads_f32"], rel=1e-5, abs=1e-5)
    assert bits / attention.shape[1] == pytest.approx(
        information_case["mi_sum_heads_div_text_f32"], rel=1e-5, abs=1e-5
    )
    assert slope_from_information(bits, 0.4, 0.2) == pytest.approx(information_case["k_default"], abs=1e-5)


def test_calibrated_information_is_the_exact_quantity(
    information_case: Case, information_arrays: Arrays
) -> None:
    attention = information_arrays[information_case["array"]]
    np.testing.assert_allclose(
        calibrated_information(attention),
        information_case["mi_per_head_exact_no_eps_f64"],
        rtol=1e-9,
        atol=1e-9,
    )


def test_schedule(schedule_case: Case) -> None:
    case = schedule_case
    slope = slope_from_information(case["mutual_information"], case["k0"], case["gamma"])
    schedule = reference_schedule(
        case["visual_tokens"], case["layers"], case["budget_tokens"], slope, case["x0"]
    )
    assert schedule.slope == pytest.approx(case["slope"], rel=1e-12)
    assert schedule.midpoint == pytest.approx(case["midpoint"], rel=1e-12)
    assert schedule.cap == case["cap_tokens"]
    np.testing.assert_allclose(schedule.base_curve, case["base_curve"], rtol=1e-9)
    assert schedule.scale == pytest.approx(case["scale"], rel=1e-9)
    assert schedule.on_budget_without_scaling == case["on_budget_without_scaling"]
    np.testing.assert_allclose(schedule.keep_fractions, case["keep_fractions"], rtol=1e-9)
    assert list(schedule.planned_after_layer) == case["planned_after_layer"]
    assert sum(schedule.planned_after_layer) == case["planned_total"]
    assert list(schedule.into_layer) == case["visual_into_layer"]
    assert list(schedule.after_layer) == case["visual_after_layer"]
    assert list(schedule.kept) == case["kept_after_layer"]
    assert list(schedule.merged) == case["merged_after_layer"]
    assert (schedule.after_layer == schedule.planned_after_layer) == case["plan_equals_run"]
    assert np.mean(schedule.after_layer) == pytest.approx(case["reported_average"], rel=1e-6)
    assert np.mean(schedule.into_layer) == pytest.approx(case["computed_average"], rel=1e-6)


def test_text_rank(text_rank_case: Case, parts_arrays: Arrays) -> None:
    case = text_rank_case
    scores = text_scores(parts_arrays[case["array"]])
    current = len(scores)
    base = case["reference_count"] if case["fraction_of"] == "reference_count" else current
    kept = select_top(scores, reference_kept_count(base, case["keep_fraction"], current))
    np.testing.assert_allclose(scores, case["scores"], rtol=1e-5, atol=1e-7)
    assert kept.tolist() == case["kept"]


def test_first_layer_cap(first_layer_case: Case, parts_arrays: Arrays) -> None:
    case = first_layer_case
    attention, encoder = parts_arrays[case["array"]], parts_arrays[case["encoder_attention"]]
    per_row = information(attention, "reference") / attention.shape[1]
    fused = reference_cap_scores(text_scores(attention), encoder, per_row)
    cap = min(int(2.5 * case["budget_tokens"]), attention.shape[2])
    assert per_row == pytest.approx(case["mutual_information_scaled"], rel=1e-5)
    np.testing.assert_allclose(fused, case["fused"], rtol=1e-5, atol=1e-7)
    assert select_top(fused, cap).tolist() == case["kept"]


def test_grouping(grouping_case: Case, parts_arrays: Arrays) -> None:
    case = grouping_case
    tokens, noise = parts_arrays[case["tokens_array"]], parts_arrays[case["noise_array"]].ravel()
    grouping = group_tokens(tokens, case["groups"], noise)
    assert grouping.centres.tolist() == case["centres"]
    assert grouping.group_of_token.tolist() == case["group_of_token"]
    np.testing.assert_allclose(grouping.merged, parts_arrays[case["merged_array"]], rtol=1e-5, atol=1e-5)


def test_grouping_with_ties_broken_by_index_merges_the_same_vectors(
    grouping_case: Case, parts_arrays: Arrays
) -> None:
    grouping = group_tokens(parts_arrays[grouping_case["tokens_array"]], grouping_case["groups"])
    assert grouping.group_of_token.tolist() == grouping_case["group_of_token"]
    wanted = parts_arrays[grouping_case["merged_array"]]
    np.testing.assert_allclose(grouping.merged, wanted, rtol=1e-5, atol=1e-5)
