"""The fit finds a mapping where there is one, with its sign, and says so where there is none."""

from __future__ import annotations

import numpy as np
import pytest

from vla_autoprune.pruning.calibration import SlopeMapping, fit_mapping

SLOPES = (0.0, 0.2, 0.4)
WORK = (0.300, 0.301, 0.302)


def test_slopes_that_no_frame_takes_are_left_out() -> None:
    mapping = SlopeMapping(edges=(0.4, 0.4), slopes=(0.4, 0.2, 0.0), fixed_slope=0.0)
    assert mapping.without_empty_intervals() == SlopeMapping((0.4,), (0.4, 0.0), 0.0)
    always = SlopeMapping(edges=(0.4, 0.4), slopes=(0.4, 0.2, 0.0), fixed_slope=0.2)
    assert always.without_empty_intervals() == always


def dataset(samples: int, sign: float, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Frames whose best slope rises with complexity (sign 1), falls with it (-1), or does not care (0)."""
    generator = np.random.default_rng(seed)
    complexity = generator.gamma(4.0, 0.25, samples)
    rank = complexity.argsort().argsort() / samples - 0.5
    best = 0.2 + 0.4 * sign * rank
    losses = 1.0 + 20 * (np.array(SLOPES)[None] - best[:, None]) ** 2
    return complexity, losses + noise * generator.standard_normal((samples, 3)) + generator.random(
        (samples, 1)
    )


@pytest.mark.parametrize(("sign", "direction"), [(1.0, "steeper"), (-1.0, "flatter")])
def test_the_sign_comes_from_the_data(sign: float, direction: str) -> None:
    complexity, losses = dataset(400, sign, 0.1)
    fit = fit_mapping(complexity, losses, SLOPES, WORK)
    assert fit.more_information == direction
    assert fit.mapping.slopes == (SLOPES if sign > 0 else SLOPES[::-1])
    assert fit.mapping.fixed_slope == 0.2
    assert fit.helps and fit.versus_fixed.high < 0 and fit.versus_shuffled.high < 0
    assert fit.adaptive_loss - fit.fixed_loss == pytest.approx(fit.versus_fixed.mean)
    assert sum(fit.slope_shares) == pytest.approx(1.0)
    assert "complexity helps" in fit.verdict and direction in fit.verdict
    assert max(fit.mean_work) - min(fit.mean_work) < 0.002


@pytest.mark.parametrize("seed", range(5))
def test_no_relation_is_reported_as_none(seed: int) -> None:
    complexity, losses = dataset(200, 0.0, 0.5, seed)
    fit = fit_mapping(complexity, losses, SLOPES, WORK, seed=seed)
    assert not fit.helps
    assert "complexity helps" not in fit.verdict
    assert fit.in_sample_loss <= fit.adaptive_loss + 0.2


def test_losses_are_compared_pairwise_over_scenes() -> None:
    """Frames of one scene repeat each other: the interval must not shrink by counting them as independent."""
    complexity, losses = dataset(60, 1.0, 0.6)
    repeated = np.repeat(np.arange(60), 20)
    scenes = [f"scene-{index:04d}" for index in repeated]
    clustered = fit_mapping(complexity[repeated], losses[repeated], SLOPES, WORK, clusters=scenes)
    naive = fit_mapping(complexity[repeated], losses[repeated], SLOPES, WORK)
    width = clustered.versus_fixed.high - clustered.versus_fixed.low
    assert clustered.clusters == 60 and clustered.samples == 1200
    assert width > 2 * (naive.versus_fixed.high - naive.versus_fixed.low)


def test_a_single_slope_is_a_fixed_schedule() -> None:
    complexity, losses = dataset(50, 1.0, 0.1)
    fit = fit_mapping(complexity, losses[:, :1], (0.2,), (0.3,))
    assert fit.mapping == SlopeMapping(edges=(), slopes=(0.2,), fixed_slope=0.2)
    assert fit.more_information == "same" and not fit.helps


def test_one_slope_that_is_always_best_wins_everywhere() -> None:
    complexity, losses = dataset(100, 0.0, 0.0)
    losses[:, 2] = losses[:, 0] - 1.0
    fit = fit_mapping(complexity, losses, SLOPES, WORK)
    assert fit.mapping.fixed_slope == 0.4
    assert fit.slope_shares[fit.mapping.slopes.index(0.4)] == 1.0
    assert fit.more_information == "same" and "no mapping" in fit.verdict


def test_same_data_and_seed_give_the_same_fit() -> None:
    complexity, losses = dataset(100, 1.0, 0.3)
    assert fit_mapping(complexity, losses, SLOPES, WORK) == fit_mapping(complexity, losses, SLOPES, WORK)


def test_bad_data_is_named() -> None:
    complexity, losses = dataset(100, 1.0, 0.3)
    with pytest.raises(ValueError, match=r"losses have shape \(100, 2\).*\[100 samples, 3 slopes\]"):
        fit_mapping(complexity, losses[:, :2], SLOPES, WORK)
    with pytest.raises(ValueError, match="finite"):
        fit_mapping(np.full(100, np.nan), losses, SLOPES, WORK)
    with pytest.raises(ValueError, match="must rise"):
        fit_mapping(complexity, losses, SLOPES[::-1], WORK)
    with pytest.raises(ValueError, match="9 independent scenes are too few"):
        fit_mapping(complexity[:9], losses[:9], SLOPES, WORK)
