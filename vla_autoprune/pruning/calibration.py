"""Fit the mapping from complexity to slope on data, its sign included, and say whether it is worth having."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla_autoprune.frame import FloatArray, IntArray

FOLDS = 5
LEAST_CLUSTERS = 2 * FOLDS
"""Independent scenes a fit needs: two in every fold."""

QUANTILES = np.linspace(0.0, 1.0, 11)
"""Where edges may lie: deciles, so that a few hundred samples are enough to place them."""

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class SlopeMapping:
    """Which slope a frame takes.

    Attributes:
        edges: [K - 1] bits, not falling; interval j is [edges[j - 1], edges[j]).
        slopes: [K] slope of each interval, from the lowest complexity to the highest; all different.
        fixed_slope: the best single slope, for frames whose complexity is not asked; one of `slopes`.
    """

    edges: tuple[float, ...]
    slopes: tuple[float, ...]
    fixed_slope: float

    def slope_of(self, complexities: FloatArray) -> NDArray[np.int64]:
        """[n] index into `slopes` of each complexity."""
        return np.searchsorted(np.asarray(self.edges), complexities, side="right")

    def without_empty_intervals(self) -> SlopeMapping:
        """The same mapping without slopes that no complexity takes; the fixed slope stays in any case."""
        bounds = (-math.inf, *self.edges, math.inf)
        taken = [
            place
            for place, slope in enumerate(self.slopes)
            if bounds[place] < bounds[place + 1] or slope == self.fixed_slope
        ]
        return SlopeMapping(
            edges=tuple(bounds[place] for place in taken[1:]),
            slopes=tuple(self.slopes[place] for place in taken),
            fixed_slope=self.fixed_slope,
        )


@dataclass(frozen=True)
class Difference:
    """A paired difference of mean losses: adaptive minus the other, so negative means adaptive is better.

    Attributes:
        mean: of the held-out samples, in units of the loss.
        low: lower end of the 95 % bootstrap interval.
        high: upper end.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class MappingFit:
    """A fitted mapping with what it is worth.

    All losses but `in_sample_loss` are held out: each fold is judged by the mapping fitted on the others.

    Attributes:
        mapping: fitted on all samples.
        more_information: "steeper", "flatter", or "same" when a single slope won.
        samples: number of samples n.
        clusters: number of independent clusters (scenes); equal to n when none were given.
        in_sample_loss: mean loss of `mapping` on the samples it was fitted on; optimistic.
        adaptive_loss: mean held-out loss of the fitted mapping.
        fixed_loss: of the best fixed slope, chosen on the same folds.
        shuffled_loss: of the mapping applied to the complexities of other frames (expectation over
            permutations).
        versus_fixed: adaptive minus fixed.
        versus_shuffled: adaptive minus shuffled.
        slope_losses: [K] mean loss of each slope of `mapping`, in the order of `mapping.slopes`.
        slope_shares: [K] share of the samples in each interval.
        mean_work: mean work fraction of the adaptive mapping, of the fixed slope and of the shuffled mapping.
        helps: whether adaptive beats both fixed and shuffled with 95 % confidence.
        verdict: the same in a sentence.
    """

    mapping: SlopeMapping
    more_information: str
    samples: int
    clusters: int
    in_sample_loss: float
    adaptive_loss: float
    fixed_loss: float
    shuffled_loss: float
    versus_fixed: Difference
    versus_shuffled: Difference
    slope_losses: tuple[float, ...]
    slope_shares: tuple[float, ...]
    mean_work: tuple[float, float, float]
    helps: bool
    verdict: str


def fit_mapping(
    complexities: FloatArray,
    losses: FloatArray,
    slopes: Sequence[float],
    work: Sequence[float],
    clusters: IntArray | Sequence[str] | None = None,
    seed: int = 0,
) -> MappingFit:
    """Choose edges and sign of the mapping from complexity to slope for one budget.

    Both monotone orders of the slopes are tried with all edges on deciles of the complexity, and the lowest
    mean loss wins. Slopes of one budget cost the same to a token, so mappings are compared at equal mean
    work; what is left of a difference is reported.

    Args:
        complexities: [n] bits of the calibration frames.
        losses: [n, K] loss of each frame with each slope.
        slopes: [K] slopes, rising.
        work: [K] work fraction of each slope's bucket.
        clusters: [n] scene of each frame; folds and bootstrap draw whole scenes. None treats frames as
            independent.
        seed: of folds and bootstrap.

    Returns:
        The fit.

    Raises:
        ValueError: shapes differ, values are not finite, slopes do not rise, or there are fewer than
            `LEAST_CLUSTERS` clusters.
    """
    complexities, losses, cluster_of, count = _checked(complexities, losses, slopes, work, clusters)
    generator = np.random.default_rng(seed)
    fold_of = generator.permutation(np.arange(count) % FOLDS)[cluster_of]
    adaptive, fixed, shuffled = (np.empty(len(losses)) for _ in range(3))
    works = np.empty((3, len(losses)))
    cost = np.asarray(work, dtype=np.float64)
    for fold in range(FOLDS):
        held_out = fold_of == fold
        mapping, order = _best_mapping(complexities[~held_out], losses[~held_out], slopes)
        chosen = order[mapping.slope_of(complexities[held_out])]
        best = list(slopes).index(mapping.fixed_slope)
        shares = np.bincount(chosen, minlength=len(slopes)) / held_out.sum()
        of_fold = losses[held_out]
        adaptive[held_out] = of_fold[np.arange(len(chosen)), chosen]
        fixed[held_out] = of_fold[:, best]
        shuffled[held_out] = of_fold @ shares
        works[:, held_out] = (
            cost[chosen],
            np.full(len(chosen), cost[best]),
            np.full(len(chosen), shares @ cost),
        )

    mapping, order = _best_mapping(complexities, losses, slopes)
    interval = mapping.slope_of(complexities)
    shares = np.bincount(interval, minlength=len(slopes)) / len(interval)
    versus_fixed = _paired(adaptive - fixed, cluster_of, count, generator)
    versus_shuffled = _paired(adaptive - shuffled, cluster_of, count, generator)
    helps = versus_fixed.high < 0 and versus_shuffled.high < 0
    used = [slope for slope, share in zip(mapping.slopes, shares, strict=True) if share > 0]
    direction = "same" if len(used) == 1 else ("steeper" if used[-1] > used[0] else "flatter")
    mean_work = tuple(float(value) for value in works.mean(axis=1))
    return MappingFit(
        mapping=mapping,
        more_information=direction,
        samples=len(losses),
        clusters=count,
        in_sample_loss=float(losses[np.arange(len(losses)), order[interval]].mean()),
        adaptive_loss=float(adaptive.mean()),
        fixed_loss=float(fixed.mean()),
        shuffled_loss=float(shuffled.mean()),
        versus_fixed=versus_fixed,
        versus_shuffled=versus_shuffled,
        slope_losses=tuple(float(value) for value in losses.mean(axis=0)[order]),
        slope_shares=tuple(float(value) for value in shares),
        mean_work=(mean_work[0], mean_work[1], mean_work[2]),
        helps=helps,
        verdict=_verdict(direction, versus_fixed, versus_shuffled, mapping.fixed_slope, len(losses)),
    )


def _checked(
    complexities: FloatArray,
    losses: FloatArray,
    slopes: Sequence[float],
    work: Sequence[float],
    clusters: IntArray | Sequence[str] | None,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], int]:
    complexities = np.asarray(complexities, dtype=np.float64)
    losses = np.asarray(losses, dtype=np.float64)
    if losses.shape != (len(complexities), len(slopes)) or len(work) != len(slopes):
        raise ValueError(
            f"losses have shape {losses.shape} and work {len(work)} entries; "
            f"expected [{len(complexities)} samples, {len(slopes)} slopes] and {len(slopes)}"
        )
    if not (np.isfinite(complexities).all() and np.isfinite(losses).all()):
        raise ValueError("complexities and losses must be finite; leave out frames that failed")
    if any(later <= earlier for earlier, later in itertools.pairwise(slopes)):
        raise ValueError(f"slopes {list(slopes)} must rise")
    named = np.arange(len(complexities)) if clusters is None else np.asarray(clusters)
    if len(named) != len(complexities):
        raise ValueError(f"{len(named)} clusters for {len(complexities)} samples; give one per sample")
    names, cluster_of = np.unique(named, return_inverse=True)
    if len(names) < LEAST_CLUSTERS:
        raise ValueError(
            f"{len(names)} independent scenes are too few to fit a mapping; give at least {LEAST_CLUSTERS}"
        )
    return complexities, losses, cluster_of, len(names)


def _best_mapping(
    complexities: FloatArray, losses: FloatArray, slopes: Sequence[float]
) -> tuple[SlopeMapping, NDArray[np.int64]]:
    """The mapping of lowest mean loss, and the column of `losses` each of its intervals takes."""
    order_by_complexity = np.argsort(complexities, kind="stable")
    candidates = np.quantile(complexities, QUANTILES)
    # An interval takes the samples below its upper edge; the last candidate lies above all of them.
    candidates[-1] = np.nextafter(candidates[-1], np.inf)
    below = np.searchsorted(complexities[order_by_complexity], candidates, side="left")
    cumulative = np.vstack([np.zeros(len(slopes)), losses[order_by_complexity].cumsum(axis=0)])
    fixed = int(losses.mean(axis=0).argmin())
    orders = [np.arange(len(slopes)), np.arange(len(slopes))[::-1]]
    best: tuple[float, tuple[int, ...], int] | None = None
    for sign, order in enumerate(orders):
        for edges in itertools.combinations_with_replacement(range(len(QUANTILES)), len(slopes) - 1):
            bounds = [0, *below[list(edges)], len(losses)]
            total = sum(
                cumulative[end, column] - cumulative[start, column]
                for start, end, column in zip(bounds, bounds[1:], order, strict=False)
            )
            found = (float(total), edges, sign)
            best = found if best is None or found[0] < best[0] else best
    assert best is not None
    order = orders[best[2]]
    mapping = SlopeMapping(
        edges=tuple(float(candidates[edge]) for edge in best[1]),
        slopes=tuple(float(slopes[column]) for column in order),
        fixed_slope=float(slopes[fixed]),
    )
    return mapping, order


def _paired(
    differences: FloatArray, cluster_of: IntArray, count: int, generator: np.random.Generator
) -> Difference:
    """Mean paired difference with a percentile bootstrap over clusters."""
    sums = np.bincount(cluster_of, weights=differences, minlength=count)
    sizes = np.bincount(cluster_of, minlength=count)
    drawn = generator.integers(0, count, size=(RESAMPLES, count))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(means, [tail, 100 - tail])
    return Difference(mean=float(differences.mean()), low=float(low), high=float(high))


def _verdict(
    direction: str, versus_fixed: Difference, versus_shuffled: Difference, fixed_slope: float, samples: int
) -> str:
    def told(name: str, difference: Difference) -> str:
        # Rounded before it is printed: equal losses differ by what sums lose, and are not told as 4e-17.
        given = (difference.mean, difference.low, difference.high)
        mean, low, high = (round(value, 9) + 0.0 for value in given)
        return f"{mean:+.4g} against {name} (95 % {low:+.4g} to {high:+.4g})"

    figures = (
        f"{told('the best fixed slope', versus_fixed)}, {told('shuffled complexities', versus_shuffled)}"
    )
    if direction == "same":
        return f"no mapping beats slope {fixed_slope:g} for every frame on {samples} samples; loss {figures}"
    if versus_fixed.high < 0 and versus_shuffled.high < 0:
        return f"complexity helps: more information takes the {direction} curve; held-out loss {figures}"
    if versus_fixed.low > 0:
        return (
            f"complexity hurts on held-out frames: use slope {fixed_slope:g} for every frame; loss {figures}"
        )
    if versus_fixed.high < 0:
        reading = f"better than slope {fixed_slope:g} for every frame, but shuffled complexities do as well"
    else:
        reading = f"slope {fixed_slope:g} for every frame is as good"
    return (
        f"no reliable gain from complexity on {samples} samples (the fit prefers {direction} for more "
        f"information): {reading}; held-out loss {figures}"
    )
