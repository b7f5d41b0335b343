"""Pruning policies against each other at equal measured latency.

Policies spend different time at the same budget, so budgets are the wrong thing to compare at. A policy's
budgets, with the unpruned variant as the largest, draw a curve of the metric over latency; at the latency of
every budget of one policy, the other's curve is read off between its two nearest measured points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from eval_nuscenes.bootstrap import Interval, SceneBootstrap
from eval_nuscenes.evaluation import PRUNED, Record, VariantKind

EDGE = 0.02
"""A latency this much (relative) beyond the other's curve is compared with the end of the curve."""


class LatencyComparison(Record):
    """Two policies at one latency.

    Attributes:
        latency_ms: median time of a whole plan of `variant`.
        against: the policy whose curve was read off there.
        between: the variants that were weighed to reach this latency.
        l2_m: mean L2 of the variant minus the other's, paired over scenes.
        collision: likewise, as a fraction.
    """

    protocol: str
    variant: str
    against: VariantKind
    latency_ms: float
    between: tuple[str, ...]
    l2_m: Interval
    collision: Interval


class MeasuredVariant(Record):
    """A variant as a point of its policy's curve."""

    name: str
    kind: VariantKind
    latency_ms: float


def compare_at_equal_latency(
    protocol: str,
    variants: Sequence[MeasuredVariant],
    l2_m: Mapping[str, NDArray[np.float64]],
    collision: Mapping[str, NDArray[np.float64]],
    counted: NDArray[np.bool_],
    bootstrap: SceneBootstrap,
) -> list[LatencyComparison]:
    """Compare the first policy with every other one, at each of the first one's latencies.

    Args:
        protocol: whose figures these are.
        variants: the unpruned variant and the pruned ones, with the median time of a plan.
        l2_m: per variant, [samples, 3] at 1, 2, 3 s.
        collision: per variant, [samples, 3] as fractions.
        counted: [samples, 3] whether the protocol counts them.
        bootstrap: of the samples' scenes.

    Returns:
        One comparison per latency that the other policy's curve reaches; nothing is extrapolated.
    """
    kinds = [kind for kind in PRUNED if any(variant.kind == kind for variant in variants)]
    unpruned = [variant for variant in variants if variant.kind == "full"]
    found = []
    for other in kinds[1:]:
        curve = sorted(
            [*unpruned, *(variant for variant in variants if variant.kind == other)],
            key=lambda point: point.latency_ms,
        )
        for variant in variants:
            if variant.kind != kinds[0]:
                continue
            weights = _weights(curve, variant.latency_ms)
            if weights is None:
                continue
            above = {
                field: bootstrap.mean(
                    values[variant.name] - sum(weight * values[name] for name, weight in weights.items()),
                    counted,
                )
                for field, values in (("l2_m", l2_m), ("collision", collision))
            }
            found.append(
                LatencyComparison(
                    protocol=protocol,
                    variant=variant.name,
                    against=other,
                    latency_ms=variant.latency_ms,
                    between=tuple(weights),
                    **above,
                )
            )
    return found


def _weights(curve: Sequence[MeasuredVariant], latency_ms: float) -> dict[str, float] | None:
    """How much of each point of a curve makes its value at a latency; None beyond its ends."""
    times = np.array([point.latency_ms for point in curve])
    if not times[0] * (1 - EDGE) <= latency_ms <= times[-1] * (1 + EDGE):
        return None
    place = float(np.interp(latency_ms, times, np.arange(len(times))))
    left = min(int(place), len(curve) - 1)
    share = place - left
    weights = {curve[left].name: 1 - share}
    if share > 0:
        weights[curve[left + 1].name] = share
    return weights
