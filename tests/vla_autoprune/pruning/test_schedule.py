"""Invariants of curves, counts and recovery that hold for every size, slope and budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_autoprune.pruning.merging import merge_counts
from vla_autoprune.pruning.schedule import (
    calibrated_curve,
    default_pruning_points,
    reachable_budget,
    reference_schedule,
    retention_curve,
    solve_stage_counts,
    split_recovered,
    stage_lengths,
    stages_from_layers,
)

slopes = st.floats(0.0, 3.0)


@given(layers=st.integers(2, 64), slope=slopes, midpoint=st.floats(1.0, 40.0))
def test_retention_curve_falls_and_stays_positive(layers: int, slope: float, midpoint: float) -> None:
    curve = retention_curve(layers, slope, midpoint)
    assert curve.shape == (layers - 1,)
    assert (curve > 0).all() and (curve <= 0.75).all()
    assert (np.diff(curve) <= 0).all()
    if slope == 0:
        np.testing.assert_allclose(curve, 0.375)


def test_calibrated_curve_has_the_same_shape_at_every_depth() -> None:
    """Twice the layers sample the same curve twice as finely; the published one stays flat."""
    np.testing.assert_allclose(
        calibrated_curve(24, 0.3, 14.9)[1::2], calibrated_curve(12, 0.3, 14.9), rtol=1e-12
    )
    published = retention_curve(12, 0.3, 14.9)
    assert published[-1] / published[0] > 0.75
    calibrated = calibrated_curve(12, 0.3, 14.9)
    assert calibrated[-1] / calibrated[0] < 0.05


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, int, tuple[int, ...], float, float, int]:
    layers = draw(st.integers(2, 40))
    visual = draw(st.integers(2, 5000))
    points = tuple(sorted(draw(st.sets(st.integers(0, layers - 2), min_size=1))))
    least = draw(st.integers(1, visual))
    low = reachable_budget(visual, layers, points, least)
    budget = low + draw(st.floats(0.0, 0.999)) * (1 - low)
    return visual, layers, points, min(budget, 0.9999), draw(slopes), least


@settings(max_examples=200)
@given(problems())
def test_stage_counts_never_grow_and_meet_the_budget(
    problem: tuple[int, int, tuple[int, ...], float, float, int],
) -> None:
    visual, layers, points, budget, slope, least = problem
    low = reachable_budget(visual, layers, points, least)
    if budget < low:
        return
    counts = solve_stage_counts(visual, points, budget, calibrated_curve(layers, slope, 14.9), least)
    lengths = stage_lengths(layers, points)
    assert counts[0] == visual
    assert all(later <= earlier for earlier, later in itertools.pairwise(counts))
    assert min(counts) >= least
    miss = abs(float(np.dot(counts, lengths)) - budget * visual * layers)
    # Totals step by a stage's layers; the rounding of the budget itself adds half a token.
    assert miss <= max(lengths[1:]) / 2 + 0.5 + 1e-6


@settings(max_examples=100)
@given(problems())
def test_a_steeper_slope_never_leaves_more_tokens_to_the_last_stage(
    problem: tuple[int, int, tuple[int, ...], float, float, int],
) -> None:
    visual, layers, points, budget, slope, least = problem
    if budget < reachable_budget(visual, layers, points, least):
        return
    flat = solve_stage_counts(visual, points, budget, calibrated_curve(layers, 0.0, 14.9), least)
    steep = solve_stage_counts(visual, points, budget, calibrated_curve(layers, slope, 14.9), least)
    assert steep[-1] <= flat[-1] + 1


@pytest.mark.parametrize(
    ("layers", "visual", "budgets"), [(24, 1500, (0.5, 0.25, 0.11)), (8, 216, (0.6, 0.4, 0.25))]
)
@pytest.mark.parametrize("slope", [0.0, 0.2, 0.4])
def test_budgets_of_the_benchmark_and_of_the_shipped_model(
    layers: int, visual: int, budgets: tuple[float, ...], slope: float
) -> None:
    points = default_pruning_points(layers)
    lengths = stage_lengths(layers, points)
    for budget in budgets:
        counts = solve_stage_counts(visual, points, budget, calibrated_curve(layers, slope, 14.9))
        assert np.dot(counts, lengths) / layers == pytest.approx(budget * visual, abs=0.2)


def test_budget_out_of_reach_names_the_range() -> None:
    with pytest.raises(ValueError, match=r"budget 0\.1 is out of reach.*layer 2 of 8.*0\.3779\.\.1"):
        solve_stage_counts(216, (2, 4), 0.1, calibrated_curve(8, 0.0, 14.9))
    with pytest.raises(ValueError, match="budget 1 is out of reach"):
        solve_stage_counts(216, (2, 4), 1.0, calibrated_curve(8, 0.0, 14.9))


@given(st.integers(2, 200))
def test_default_points_start_after_layer_0_and_cover_the_decoder(layers: int) -> None:
    points = default_pruning_points(layers)
    lengths = stage_lengths(layers, points)
    assert points[0] == 0 and sum(lengths) == layers
    assert max(lengths[1:]) - min(lengths[1:]) <= 1


def test_default_points_of_known_depths() -> None:
    assert default_pruning_points(8) == (0, 2, 4)
    assert stage_lengths(24, default_pruning_points(24)) == (1, 4, 5, 4, 5, 5)


@pytest.mark.parametrize("points", [(), (3, 2), (0, 0), (-1,), (7,)])
def test_points_that_do_not_fit_are_refused_with_an_example(points: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"rise strictly within 0\.\.6 for 8 layers, for example \[0, 2, 4\]"
    ):
        stage_lengths(8, points)


@given(into=st.integers(1, 3000), data=st.data())
def test_recovered_counts_add_up(into: int, data: st.DataObject) -> None:
    out = data.draw(st.integers(1, into))
    least = data.draw(st.integers(1, out))
    kept, merged = split_recovered(into, out, least)
    sources, groups = merge_counts(into - kept)
    assert kept + merged == out and kept >= least and merged >= 0
    assert merged <= groups and sources <= into - kept
    assert 2 * kept >= out


@settings(max_examples=100)
@given(
    visual=st.integers(1, 3000),
    layers=st.integers(2, 40),
    budget=st.integers(1, 1500),
    slope=slopes,
    x0=st.floats(1.0, 30.0),
)
def test_the_published_schedule_never_grows_and_never_runs_dry(
    visual: int, layers: int, budget: int, slope: float, x0: float
) -> None:
    schedule = reference_schedule(visual, layers, budget, slope, x0)
    assert schedule.into_layer[0] == visual and len(schedule.kept) == layers
    assert all(
        later <= earlier for earlier, later in zip(schedule.into_layer, schedule.into_layer[1:], strict=False)
    )
    assert min(schedule.after_layer) >= 1


def test_coarse_counts_are_means_of_the_fine_ones() -> None:
    assert stages_from_layers((100, 80, 60, 41, 40, 10), (0, 2)) == (100, 70, 30)


@pytest.mark.parametrize(
    ("visual", "layers", "budget", "into"),
    [(576, 32, 64, 82), (576, 32, 192, 209), (2880, 32, 160, 250), (4320, 36, 300, 420)],
)
def test_the_published_budget_hides_what_enters_the_layers(
    visual: int, layers: int, budget: int, into: int
) -> None:
    """docs/pruning.md prints these."""
    schedule = reference_schedule(visual, layers, budget, slope=0.2)
    assert np.mean(schedule.after_layer) == pytest.approx(budget, abs=0.1)
    assert round(float(np.mean(schedule.into_layer))) == into
