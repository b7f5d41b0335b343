"""Means with confidence intervals over scenes, and what may be called a difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eval_nuscenes.evaluation import Record

RESAMPLES = 2000
RANK_RESAMPLES = 300
"""Rank correlations are slow to resample."""
CONFIDENCE = 0.95

LEAST_SCENES = 5
"""Fewer agree in sign by chance too often for an interval to mean anything: three, one time in four."""

Verdict = Literal["lower", "higher", "no difference shown", "no interval"]


class Interval(Record):
    """A mean with its confidence interval over scenes.

    Attributes:
        mean: None where nothing counts.
        low: None where fewer than `LEAST_SCENES` scenes count.
        high: likewise.
    """

    mean: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def verdict(self) -> Verdict:
        """What may be said of a difference: one whose interval contains zero is not called one."""
        if self.mean is None or self.low is None or self.high is None:
            return "no interval"
        if self.low <= 0 <= self.high:
            return "no difference shown"
        return "lower" if self.mean < 0 else "higher"


class SceneBootstrap:
    """Confidence intervals by resampling whole scenes: samples of one scene are not independent.

    Every statistic uses the same resamples, so differences between variants are paired.
    """

    def __init__(self, scenes: Sequence[str], resamples: int = RESAMPLES, seed: int = 0) -> None:
        names, self._scene_of_sample = np.unique(np.asarray(scenes), return_inverse=True)
        self._count = len(names)
        even = np.full(self._count, 1 / self._count)
        self._draws = np.random.default_rng(seed).multinomial(self._count, even, size=resamples)

    def scenes(self, counted: ArrayLike) -> int:
        """How many scenes have a counted sample; `counted` is [samples] bool."""
        return len(np.unique(self._scene_of_sample[np.asarray(counted, dtype=bool)]))

    def mean(self, values: ArrayLike, counted: ArrayLike) -> Interval:
        """Mean of what counts.

        Args:
            values: [samples], or [samples, columns] for the mean of the columns' means.
            counted: bool of the same shape.

        Returns:
            The mean, None where a column counts nowhere, and its 95 % percentile interval over scenes.
        """
        taken = np.asarray(counted, dtype=np.float64).reshape(len(self._scene_of_sample), -1)
        weighted = np.asarray(values, dtype=np.float64).reshape(taken.shape) * taken
        sums, counts = self._per_scene(weighted), self._per_scene(taken)
        if not counts.sum(axis=0).all():
            return Interval()
        mean = float((sums.sum(axis=0) / counts.sum(axis=0)).mean())
        if (np.count_nonzero(counts, axis=0) < LEAST_SCENES).any():
            return Interval(mean=mean)
        drawn = self._draws @ counts
        usable = drawn.all(axis=1)
        return _with_bounds(mean, ((self._draws @ sums)[usable] / drawn[usable]).mean(axis=1))

    def _per_scene(self, columns: NDArray[np.float64]) -> NDArray[np.float64]:
        """[scenes, columns] sums over the samples of each scene."""
        of_scene = self._scene_of_sample
        sums = [np.bincount(of_scene, column, minlength=self._count) for column in columns.T]
        return np.stack(sums, axis=1)

    def rank_correlation(self, first: ArrayLike, second: ArrayLike) -> Interval:
        """Spearman's rank correlation of two values per sample, with its interval over scenes.

        Args:
            first: [samples].
            second: [samples].

        Returns:
            The correlation, None with fewer than three samples or where one value never changes.
        """
        one, other = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
        found = _spearman(one, other)
        if found is None or self._count < LEAST_SCENES:
            return Interval(mean=found)
        members = [np.flatnonzero(self._scene_of_sample == scene) for scene in range(self._count)]
        resampled = []
        for draw in self._draws[:RANK_RESAMPLES]:
            chosen = np.concatenate([np.tile(members[scene], times) for scene, times in enumerate(draw)])
            correlation = _spearman(one[chosen], other[chosen])
            if correlation is not None:
                resampled.append(correlation)
        return _with_bounds(found, np.array(resampled)) if resampled else Interval(mean=found)


def _with_bounds(mean: float, resampled: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(mean=mean, low=float(low), high=float(high))


def _spearman(first: NDArray[np.float64], second: NDArray[np.float64]) -> float | None:
    from scipy.stats import rankdata

    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(rankdata(first), rankdata(second))[0, 1])
