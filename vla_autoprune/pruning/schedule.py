"""From slope and budget to integers: the retention curve, the published schedule, and counts per stage."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla_autoprune.frame import FloatArray
from vla_autoprune.pruning.merging import merge_counts
from vla_autoprune.pruning.selection import reference_kept_count

AMPLITUDE = 0.75
"""Height of the published curve; it cancels once the budget is solved."""

CAP_FACTOR = 2.5
"""After layer 0 the published code keeps at most this many times the budget."""

REFERENCE_LAYERS = 32
"""The depth the published x0 and k0 were chosen for."""


def slope_from_information(bits: float, k0: float, gamma: float) -> float:
    """The published mapping: high information prunes early (flat), low information late (steep).

    Args:
        bits: information of layer 1, heads summed.
        k0: slope at zero information.
        gamma: slope per bit.

    Returns:
        k = max(k0 - gamma * bits, 0).

    Source: arXiv 2509.23931.
    """
    return max(k0 - gamma * bits, 0.0)


def retention_curve(layers: int, slope: float, midpoint: float) -> NDArray[np.float64]:
    """Fraction of visual tokens kept after each decoder layer, before the budget is applied.

    A logistic that falls with depth. Slope 0 is flat and prunes early; a steep curve keeps tokens until the
    midpoint.

    Args:
        layers: decoder layers L, at least 2.
        slope: k >= 0 per layer, from the frame's complexity.
        midpoint: x0 in layers.

    Returns:
        [L - 1] fractions for layers 1..L-1, strictly falling unless slope is 0.

    Raises:
        ValueError: layers < 2 or slope < 0; the message names the value.

    Source: arXiv 2509.23931, the logistic retention curve.
    """
    if layers < 2:
        raise ValueError(f"layers is {layers}; a retention curve needs at least 2 decoder layers")
    if not slope >= 0:
        raise ValueError(f"slope is {slope}; allowed: >= 0")
    exponent = slope * (np.arange(1, layers) - midpoint)
    return AMPLITUDE * np.exp(-np.logaddexp(0.0, exponent))


def calibrated_curve(layers: int, slope: float, x0: float) -> NDArray[np.float64]:
    """The retention curve over depth in 32nds of the decoder, so x0 and slope mean the same in every model.

    The published code uses x0 = 14.9 layers at any depth: at 12 layers the whole curve is its flat left part.
    It also shifts the midpoint by +k layers, less than half a layer at its settings; that is left out.

    Args:
        layers: decoder layers L, at least 2.
        slope: k >= 0 per 32nd of the depth.
        x0: midpoint in 32nds of the depth.

    Returns:
        [L - 1] fractions of visual tokens *into* layers 1..L-1, before the budget is applied.

    Raises:
        ValueError: layers < 2 or slope < 0.
    """
    depth = layers / REFERENCE_LAYERS
    return retention_curve(layers, slope / depth, x0 * depth)


@dataclass(frozen=True)
class ReferenceSchedule:
    """What the published code plans and does for one slope.

    Attributes:
        slope: k.
        midpoint: x0 + k, in layers.
        cap: visual tokens kept after layer 0.
        base_curve: [L - 1] curve for layers 1..L-1.
        scale: factor s the budget search put on it; 1 when the quick check took the curve as it is.
        on_budget_without_scaling: whether the quick check did.
        keep_fractions: [L - 1] s times the curve; may exceed 1.
        planned_after_layer: [L] visual tokens the budget search counted on.
        into_layer: [L] visual tokens that enter each layer.
        kept: [L] tokens kept after each layer.
        merged: [L] merged tokens added after each layer.
    """

    slope: float
    midpoint: float
    cap: int
    base_curve: NDArray[np.float64]
    scale: float
    on_budget_without_scaling: bool
    keep_fractions: NDArray[np.float64]
    planned_after_layer: tuple[int, ...]
    into_layer: tuple[int, ...]
    kept: tuple[int, ...]
    merged: tuple[int, ...]

    @property
    def after_layer(self) -> tuple[int, ...]:
        """[L] visual tokens that leave each layer."""
        return tuple(kept + merged for kept, merged in zip(self.kept, self.merged, strict=True))


def reference_schedule(
    visual_tokens: int, layers: int, budget_tokens: int, slope: float, x0: float = 14.9
) -> ReferenceSchedule:
    """The published schedule, to the letter.

    Args:
        visual_tokens: V that enter the decoder.
        layers: decoder layers L, at least 2.
        budget_tokens: B, visual tokens per layer on average, counted *after* each layer.
        slope: k >= 0.
        x0: midpoint in layers before the published shift by +k.

    Returns:
        The schedule. Its total may miss L * B, as the published one does: budgets near V and below 2 are out
        of its reach, and the quick check accepts overshoots of some 10 %.

    Raises:
        ValueError: visual_tokens or budget_tokens < 1, or what `retention_curve` refuses.

    Source: arXiv 2509.23931 and its published code.
    """
    if visual_tokens < 1 or budget_tokens < 1:
        raise ValueError(
            f"visual_tokens is {visual_tokens} and budget_tokens {budget_tokens}; both must be at least 1"
        )
    cap = min(int(CAP_FACTOR * budget_tokens), visual_tokens)
    curve = retention_curve(layers, slope, x0 + slope)
    target = layers * budget_tokens
    on_budget = abs(_quick_total(cap, curve) - target) < 1
    scale = 1.0 if on_budget else _search_scale(cap, curve, target, visual_tokens)
    fractions = scale * curve

    kept, merged, into = [cap], [0], [visual_tokens]
    current = cap
    for fraction in fractions:
        into.append(current)
        keep = reference_kept_count(cap, float(fraction), current)
        groups = merge_counts(current - keep)[1]
        kept.append(keep)
        merged.append(groups)
        current = keep + groups
    return ReferenceSchedule(
        slope=slope,
        midpoint=x0 + slope,
        cap=cap,
        base_curve=curve,
        scale=scale,
        on_budget_without_scaling=on_budget,
        keep_fractions=fractions,
        planned_after_layer=_planned_counts(cap, fractions, target, visual_tokens),
        into_layer=tuple(into),
        kept=tuple(kept),
        merged=tuple(merged),
    )


def _quick_total(cap: int, curve: FloatArray) -> int:
    """The published first guess, in single precision: neither layer 0 nor merged tokens are counted."""
    counts = (np.float32(cap) * curve.astype(np.float32)).astype(np.int64)
    return int(counts.sum() + counts[-1])


def _planned_counts(cap: int, fractions: FloatArray, target: int, visual_tokens: int) -> tuple[int, ...]:
    """The published plan, in double precision; its second cap receives the *total* budget and hardly acts."""
    most = min(int(CAP_FACTOR * target), visual_tokens)
    counts = [cap]
    for fraction in fractions:
        keep = min(math.ceil((cap - 1) * min(1.0, float(fraction))), most)
        counts.append(keep + merge_counts(counts[-1] - keep)[1])
    return tuple(counts)


def _search_scale(cap: int, curve: FloatArray, target: int, visual_tokens: int) -> float:
    low, high = 0.0, 20.0
    best_scale, best_error = 1.0, math.inf
    for _ in range(200):
        scale = (low + high) / 2
        total = sum(_planned_counts(cap, scale * curve, target, visual_tokens))
        error = abs(total - target)
        if error < best_error:
            best_scale, best_error = scale, error
        if error < 0.01:
            break
        if total < target:
            low = scale
        else:
            high = scale
    return best_scale


def default_pruning_points(layers: int) -> tuple[int, ...]:
    """Pruning points: one after layer 0, so that small budgets are in reach, the others evenly spread.

    Args:
        layers: decoder layers L, at least 2.

    Returns:
        Layers after which tokens are dropped, ascending; 3 + L / 8 stages as far as there are layers.

    Raises:
        ValueError: layers < 2.
    """
    if layers < 2:
        raise ValueError(f"layers is {layers}; pruning inside the decoder needs at least 2 layers")
    starts = np.linspace(1, layers, min(3 + layers // 8, layers))[:-1].astype(int)
    return tuple(int(start) - 1 for start in starts)


def stage_lengths(layers: int, points: Sequence[int]) -> tuple[int, ...]:
    """Decoder layers of each stage.

    Args:
        layers: decoder layers L.
        points: layers after which tokens are dropped.

    Returns:
        [points + 1] layer counts, sum L.

    Raises:
        ValueError: the points do not rise strictly within 0..L-2.
    """
    edges = [-1, *points, layers - 1]
    if not points or any(later <= earlier for earlier, later in itertools.pairwise(edges)):
        raise ValueError(
            f"pruning points {list(points)} must rise strictly within 0..{layers - 2} for {layers} layers, "
            f"for example {list(default_pruning_points(layers))}"
        )
    return tuple(later - earlier for earlier, later in itertools.pairwise(edges))


def reachable_budget(visual_tokens: int, layers: int, points: Sequence[int], least: int) -> float:
    """The smallest mean of visual tokens into the layers that the pruning points allow.

    Args:
        visual_tokens: V.
        layers: decoder layers L.
        points: layers after which tokens are dropped.
        least: visual tokens that every stage keeps.

    Returns:
        Fraction of V; the largest is 1.
    """
    first = stage_lengths(layers, points)[0]
    return (first * visual_tokens + (layers - first) * least) / (layers * visual_tokens)


def solve_stage_counts(
    visual_tokens: int, points: Sequence[int], budget: float, curve: FloatArray, least: int = 1
) -> tuple[int, ...]:
    """Visual tokens into each stage, so that their mean over the layers meets a budget.

    The curve is scaled, clipped to 1 layer by layer and averaged over each stage; of the integers next to
    that (rounded up or down) the ones are chosen whose total is closest to the budget, then those closest to
    the curve.

    Args:
        visual_tokens: V.
        points: layers after which tokens are dropped.
        budget: mean over the layers of the visual tokens that enter, over V.
        curve: [L - 1] relative retention into layers 1..L-1, not rising, above 0.
        least: visual tokens that every stage keeps at least.

    Returns:
        [points + 1] counts, never rising, the first of them V.

    Raises:
        ValueError: the budget is out of reach; the message gives the range.
    """
    layers = len(curve) + 1
    lengths = np.array(stage_lengths(layers, points))
    if not 1 <= least <= visual_tokens:
        raise ValueError(f"least is {least}; every stage can keep 1..{visual_tokens} visual tokens")
    low = reachable_budget(visual_tokens, layers, points, least)
    if not low <= budget < 1:
        raise ValueError(
            f"budget {budget:g} is out of reach: with {visual_tokens} visual tokens, the first pruning point "
            "after "
            f"layer {points[0]} of {layers} and at least {least} tokens kept, it must be in {low:.4f}..1 (1 "
            "excluded)"
        )
    starts = np.cumsum(lengths)[:-1]
    later = lengths[1:]
    target = round(budget * visual_tokens * layers) - int(lengths[0]) * visual_tokens

    def ideal(scale: float) -> NDArray[np.float64]:
        into_layer = np.concatenate([[1.0], np.minimum(1.0, scale * curve)])
        return np.maximum(np.add.reduceat(into_layer, starts) / later * visual_tokens, least)

    below, above = 0.0, 1.0 / float(curve.min())
    for _ in range(200):
        scale = (below + above) / 2
        if float(ideal(scale) @ later) < target:
            below = scale
        else:
            above = scale
    # A hair up, so that a count that is whole but for rounding errors is not rounded down.
    return (visual_tokens, *_round_to_total(ideal(above) + 1e-9, later, target, visual_tokens))


def _round_to_total(ideal: FloatArray, lengths: FloatArray, target: int, most: int) -> tuple[int, ...]:
    """Round each count up or down, never rising, so that the total comes closest to the target.

    Dynamic programme over (total gained by rounding up, whether the last count was rounded up); at most L
    states.
    """
    floors = np.floor(ideal).astype(int)
    wanted = target - int(floors @ lengths)
    states: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 1): (0.0, ())}
    previous_floor = most
    for exact, floor, length in zip(ideal.tolist(), floors.tolist(), lengths.tolist(), strict=True):
        extended: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (gained, previous_up), (error, ups) in states.items():
            for up in (0, 1):
                if floor + up > (previous_floor + previous_up if ups else most):
                    continue
                key = (gained + up * length, up)
                found = (error + length * (floor + up - exact) ** 2, (*ups, up))
                if key not in extended or found < extended[key]:
                    extended[key] = found
        states = extended
        previous_floor = floor
    best = min(states.items(), key=lambda item: (abs(item[0][0] - wanted), item[1]))
    return tuple(floor + up for floor, up in zip(floors.tolist(), best[1][1], strict=True))


def stages_from_layers(into_layer: Sequence[int], points: Sequence[int]) -> tuple[int, ...]:
    """Coarsen per-layer counts to stages: the rounded mean over each stage's layers.

    Args:
        into_layer: [L] visual tokens that enter each layer, never rising.
        points: layers after which tokens are dropped.

    Returns:
        [points + 1] counts, the first of them `into_layer[0]`.
    """
    lengths = stage_lengths(len(into_layer), points)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    means = np.add.reduceat(np.asarray(into_layer, dtype=np.float64), starts) / lengths
    counts = np.floor(means + 0.5).astype(int)
    return (int(into_layer[0]), *counts[1:].tolist())


def split_recovered(into: int, out: int, least_kept: int = 1) -> tuple[int, int]:
    """Divide what leaves a pruning point into kept and merged tokens.

    Args:
        into: visual tokens that reach the point.
        out: visual tokens that leave it, 1..into.
        least_kept: tokens that must be kept themselves, at most `out`.

    Returns:
        (kept, merged) with kept + merged = out: as many groups as `merge_counts` gives, fewer where they
        would be more than half of `out`.
    """
    if out == into:
        return out, 0
    fitting = [kept for kept in range(1, out) if kept + merge_counts(into - kept)[1] <= out]
    kept = max([*fitting, (out + 1) // 2, least_kept])
    return kept, out - kept
