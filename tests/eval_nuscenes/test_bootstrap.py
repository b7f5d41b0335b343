"""Intervals over scenes, and what may be called a difference."""

from __future__ import annotations

import numpy as np
import pytest

from eval_nuscenes.bootstrap import Interval, SceneBootstrap


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


def test_intervals_weigh_scenes_by_what_counts_and_need_five() -> None:
    bootstrap = SceneBootstrap(["a", "a", "b", "c", "d", "e"])
    values = [1.0, 3.0, 2.0, 2.0, 2.0, 100.0]
    four = bootstrap.mean(values, [True] * 5 + [False])
    assert (four.mean, four.low, four.high) == (2.0, None, None)
    five = bootstrap.mean([1.0, 3.0, 2.0, 2.0, 2.0, 8.0], [True] * 6)
    assert five.mean == 3.0
    assert five.low == 2.0 and 3.0 < five.high < 8.0
    assert bootstrap.mean(values, [False] * 6).mean is None


def test_columns_are_averaged_with_their_own_counts() -> None:
    bootstrap = SceneBootstrap(["a", "a", "b", "c", "d", "e"])
    values = [[1.0, 10.0], [3.0, 99.0], *[[2.0, 10.0]] * 3, [8.0, 60.0]]
    counted = [[True, True], [True, False], *[[True, True]] * 4]
    found = bootstrap.mean(values, counted)
    assert found.mean == pytest.approx((3.0 + 20.0) / 2)
    assert found.low == pytest.approx((2.0 + 10.0) / 2) and found.mean < found.high < (8.0 + 60.0) / 2
    assert bootstrap.mean(values, [[True, False]] * 6).mean is None
    assert bootstrap.scenes([True, True, False, False, False, False]) == 1


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        (Interval(mean=0.1, low=-0.1, high=0.3), "no difference shown"),
        (Interval(mean=0.1, low=0.0, high=0.3), "no difference shown"),
        (Interval(mean=0.1, low=0.05, high=0.3), "higher"),
        (Interval(mean=-0.1, low=-0.2, high=-0.05), "lower"),
        (Interval(mean=-0.1), "no interval"),
        (Interval(), "no interval"),
    ],
)
def test_a_difference_whose_interval_contains_zero_is_none(interval: Interval, verdict: str) -> None:
    assert interval.verdict == verdict


def test_rank_correlation_sees_order_and_scenes() -> None:
    generator = np.random.default_rng(0)
    scenes = [f"scene-{number // 6}" for number in range(60)]
    values = generator.normal(size=60)
    noisy = np.exp(values) + 0.2 * generator.normal(size=60)
    related = SceneBootstrap(scenes).rank_correlation(values, noisy)
    unrelated = SceneBootstrap(scenes).rank_correlation(values, generator.normal(size=60))
    assert related.mean > 0.7 and related.low > 0.5
    assert unrelated.low < 0 < unrelated.high
    assert SceneBootstrap(scenes).rank_correlation(values, np.ones(60)).mean is None
