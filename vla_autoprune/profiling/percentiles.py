"""Percentiles that say when there are too few samples for them, and ratios with confidence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from vla_autoprune.frame import IntArray
from vla_autoprune.profiling.document import Distribution, Ratio

LEAST_SAMPLES = {"p90": 10, "p99": 100}
"""A percentile q needs about 1 / (1 - q) samples to be more than the largest of them."""

RESAMPLES = 2000
CONFIDENCE = 0.95


def distribution(samples: ArrayLike) -> Distribution:
    """Summary of samples of one quantity.

    Args:
        samples: [n] finite values in any unit, in the order they were measured; at least one.

    Returns:
        Mean, median, p90 and p99 (None where `LEAST_SAMPLES` are not there), largest, and jitter, the
        standard deviation.

    Raises:
        ValueError: there is no sample, or one is not finite.
    """
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"expected at least one finite sample in a row, got {values.shape} {values[:5]}")
    enough = {name: len(values) >= least for name, least in LEAST_SAMPLES.items()}
    return Distribution(
        count=len(values),
        mean=float(values.mean()),
        p50=float(np.median(values)),
        p90=float(np.quantile(values, 0.90)) if enough["p90"] else None,
        p99=float(np.quantile(values, 0.99)) if enough["p99"] else None,
        max=float(values.max()),
        jitter=float(values.std()),
    )


def missing_percentiles(count: int) -> str:
    """What cannot be said with so few samples, as a sentence; empty where all can."""
    missing = [f"{name} needs {least}" for name, least in LEAST_SAMPLES.items() if count < least]
    return f"{count} frames per bucket are too few: {', '.join(missing)}" if missing else ""


def median_ratio(base: Sequence[float], other: Sequence[float], paired: bool = False, seed: int = 0) -> Ratio:
    """Median of `other` over the median of `base`, with a 95 % interval.

    What disturbs a machine lasts longer than a frame, so that neighbours are alike: whole runs of
    neighbours, as long as the root of their number, are drawn together (moving-block bootstrap).

    Args:
        base: [n] samples in the order they were measured.
        other: [m] likewise.
        paired: whether they were measured in turns, n = m: then both are drawn at the same moments, and what
            slowed the machine down cancels.
        seed: of the resampling.

    Returns:
        The ratio; without an interval where either has fewer than ten samples.

    Raises:
        ValueError: a row is empty or its median is not above 0.
    """
    one, two = np.asarray(base, dtype=np.float64), np.asarray(other, dtype=np.float64)
    medians = [float(np.median(values)) if len(values) else 0.0 for values in (one, two)]
    if not min(medians) > 0:
        raise ValueError(f"a ratio needs medians above 0, got {medians}")
    ratio = medians[1] / medians[0]
    if min(len(one), len(two)) < LEAST_SAMPLES["p90"]:
        return Ratio(ratio=ratio)
    generator = np.random.default_rng(seed)
    rows = _resampled_rows(len(two), generator)
    drawn = np.median(two[rows], axis=1)
    drawn /= np.median(one[rows if paired else _resampled_rows(len(one), generator)], axis=1)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Ratio(ratio=ratio, low=float(low), high=float(high))


def _resampled_rows(count: int, generator: np.random.Generator) -> IntArray:
    """[resamples, count] indices, blocks of neighbours at a time."""
    length = max(1, round(math.sqrt(count)))
    blocks = -(-count // length)
    starts = generator.integers(0, count - length + 1, size=(RESAMPLES, blocks))
    return (starts[:, :, None] + np.arange(length)).reshape(RESAMPLES, -1)[:, :count]
