"""Building a recipe: every budget is solved for every slope, into tokens kept at every pruning point."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np

from vla_autoprune.errors import RecipeError
from vla_autoprune.pruning.calibration import SlopeMapping
from vla_autoprune.pruning.schedule import (
    ReferenceSchedule,
    calibrated_curve,
    default_pruning_points,
    reachable_budget,
    reference_schedule,
    solve_stage_counts,
    split_recovered,
    stage_lengths,
    stages_from_layers,
)
from vla_autoprune.recipe import (
    CONTRACT_VERSION,
    FULL,
    Bucket,
    Form,
    Hyperparameters,
    ModelShape,
    PromptLayout,
    PruningRecipe,
    Scorer,
    cost_of,
)

DEFAULT_SLOPES = (0.0, 0.2, 0.4)
"""The published slopes lie in 0..k0 = 0.4."""

REFERENCE_HEADS = 32
"""The head count the published k0 and gamma were chosen for; the reference sums over heads."""


def build_recipe(
    model: ModelShape,
    layout: PromptLayout,
    *,
    decode_length: int,
    budgets: Sequence[float] = (0.6, 0.4, 0.25),
    slopes: Sequence[float] = DEFAULT_SLOPES,
    mappings: Mapping[float, SlopeMapping] | None = None,
    form: Form = "calibrated",
    pruning_points: Sequence[int] | None = None,
    hyperparameters: Hyperparameters | None = None,
    scorer: Scorer | None = None,
    recovery: bool | None = None,
    positions: Literal["original", "compact"] | None = None,
    camera_floors: Mapping[str, int] | None = None,
) -> PruningRecipe:
    """Solve every budget for every slope and put the result into a recipe.

    Args:
        model: the decoder.
        layout: the prompt.
        decode_length: tokens generated after the prompt.
        budgets: mean visual tokens over V; into the layers (calibrated) or after them (reference).
        slopes: k of the buckets of each budget; one is a fixed schedule.
        mappings: fitted mapping per budget, whose slopes replace `slopes`; a budget without one takes the
            published mapping from complexity to slope, which was not made for this model.
        form: arithmetic of counts, information and scores.
        pruning_points: layers after which tokens are dropped; None takes `default_pruning_points`, and every
            layer but the last in the reference form.
        hyperparameters: None takes the published ones.
        scorer: None takes the mean, with the encoder's attention at the first point in the reference form
            only.
        recovery: merge part of the dropped tokens; None does so in the reference form only.
        positions: None keeps the prompt positions, and renumbers in the reference form.
        camera_floors: visual tokens per camera that every point keeps at least.

    Returns:
        The recipe.

    Raises:
        RecipeError: a budget is out of reach, points or floors do not fit, or two budgets get one name; the
            message gives the value and the allowed range.
    """
    reference = form == "reference"
    constants = hyperparameters or Hyperparameters()
    floors = dict(camera_floors or {})
    layout.require_floors(floors)
    if pruning_points is None:
        points = tuple(range(model.layers - 1)) if reference else default_pruning_points(model.layers)
    else:
        points = tuple(pruning_points)
    merge = reference if recovery is None else recovery
    if reference and (not merge or floors or points[:1] != (0,)):
        raise RecipeError(
            f"the reference form has recovery {merge}, camera floors {floors}, first pruning point "
            f"{list(points[:1])}; the published arithmetic merges, knows no floors and caps after layer 0: "
            "change these or take 'calibrated'"
        )
    fitted = {_key(budget): mapping for budget, mapping in (mappings or {}).items()}
    unknown = sorted(set(fitted) - {_key(budget) for budget in budgets})
    if unknown:
        raise RecipeError(f"mappings are given for budgets {unknown}, the recipe has {list(budgets)}")
    try:
        stage_lengths(model.layers, points)
    except ValueError as error:
        raise RecipeError(str(error)) from error

    def bucket(kept: tuple[int, ...], merged: tuple[int, ...], **told: Any) -> Bucket:
        cost = cost_of(model, layout, points, kept, merged, decode_length)
        return Bucket(kept=kept, merged=merged, **told, **asdict(cost))

    whole = (layout.visual_tokens,) * len(points)
    buckets = [bucket(whole, (0,) * len(points), name=FULL, budget=1.0, slope=0.0)]
    for budget in sorted(budgets, reverse=True):
        mapping = fitted.get(_key(budget)) or _published_mapping(slopes, constants, form)
        for index, slope in enumerate(sorted(mapping.slopes)):
            place = mapping.slopes.index(slope)
            kept, merged = _counts(model, layout, points, budget, slope, form, constants, merge, floors)
            low = mapping.edges[place - 1] if place else None
            high = mapping.edges[place] if place < len(mapping.edges) else None
            buckets.append(
                bucket(
                    kept,
                    merged,
                    name=f"b{_percent(budget)}_s{index}",
                    budget=budget,
                    slope=slope,
                    complexity=(low, high),
                    default=slope == mapping.fixed_slope,
                )
            )
    return PruningRecipe(
        contract_version=CONTRACT_VERSION,
        model=model,
        layout=layout,
        form=form,
        hyperparameters=constants,
        pruning_points=points,
        scorer=scorer or Scorer(encoder_weight=1.0 if reference else 0.0),
        recovery=merge,
        positions=positions or ("compact" if reference else "original"),
        camera_floors=floors,
        budgets=tuple(sorted(budgets, reverse=True)),
        buckets=tuple(buckets),
        decode_length=decode_length,
    )


def with_camera_floors(recipe: PruningRecipe, camera_floors: Mapping[str, int]) -> PruningRecipe:
    """The same recipe with other camera floors: every count is solved anew, the fitted slopes stay.

    Args:
        recipe: the recipe.
        camera_floors: visual tokens per camera that every pruning point keeps at least, in place of those the
            recipe has; a floor of 0 is none.

    Returns:
        A recipe that keeps the budgets. Counts change only where a stage would hold fewer tokens than the
        floors ask for.

    Raises:
        RecipeError: a camera is not in the prompt, a floor exceeds its tokens, a budget cannot hold the
            floors, or the recipe has the reference form, which knows none.
    """
    recipe.layout.require_floors(camera_floors)
    return build_recipe(
        recipe.model,
        recipe.layout,
        decode_length=recipe.decode_length,
        budgets=recipe.budgets,
        mappings={budget: recipe.mapping_of(budget) for budget in recipe.budgets},
        form=recipe.form,
        pruning_points=recipe.pruning_points,
        hyperparameters=recipe.hyperparameters,
        scorer=recipe.scorer,
        recovery=recipe.recovery,
        positions=recipe.positions,
        camera_floors={camera: floor for camera, floor in camera_floors.items() if floor},
    )


def coarsening_error(recipe: PruningRecipe, bucket: Bucket) -> float:
    """How far the stages are from pruning after every layer.

    Args:
        recipe: the recipe.
        bucket: one of its buckets.

    Returns:
        Mean over the layers of |visual tokens into the layer - those of the per-layer schedule of the same
        budget and slope|, over V.
    """
    if bucket.name == FULL:
        return 0.0
    total, layers = recipe.layout.visual_tokens, recipe.model.layers
    if recipe.form == "reference":
        fine: Sequence[int] = _reference(
            recipe.model, recipe.layout, bucket.budget, bucket.slope, recipe.hyperparameters
        ).into_layer
    else:
        curve = calibrated_curve(layers, bucket.slope, recipe.hyperparameters.x0)
        least = max(1, sum(recipe.camera_floors.values()))
        fine = solve_stage_counts(total, range(layers - 1), bucket.budget, curve, least)
    return float(np.abs(np.subtract(bucket.visual_tokens_into_layers, fine)).mean() / total)


def minimum_budget(
    model: ModelShape,
    layout: PromptLayout,
    pruning_points: Sequence[int] | None = None,
    camera_floors: Mapping[str, int] | None = None,
) -> float:
    """The smallest calibrated budget within reach.

    Args:
        model: the decoder.
        layout: the prompt.
        pruning_points: None takes `default_pruning_points`.
        camera_floors: visual tokens per camera that every point keeps at least.

    Returns:
        Mean visual tokens into the layers over V.
    """
    points = default_pruning_points(model.layers) if pruning_points is None else pruning_points
    least = max(1, sum((camera_floors or {}).values()))
    return reachable_budget(layout.visual_tokens, model.layers, points, least)


def _key(budget: float) -> float:
    return round(budget, 9)


def _percent(budget: float) -> str:
    return f"{round(100 * budget, 1):g}".replace(".", "p")


def _published_mapping(slopes: Sequence[float], constants: Hyperparameters, form: Form) -> SlopeMapping:
    """The published k = max(k0 - gamma * bits, 0), quantised: more information, flatter curve."""
    falling = sorted(slopes, reverse=True)
    if not falling or len(set(falling)) != len(falling) or falling[-1] < 0:
        raise RecipeError(f"slopes {list(slopes)} must be different values >= 0, at least one")
    if len(falling) > 1 and constants.gamma == 0:
        raise RecipeError("gamma 0 gives every frame the slope k0; give a single slope, or a gamma above 0")
    # The published constants are for a sum over 32 heads, the calibrated measure is their mean.
    bits_per_unit = 1.0 if form == "reference" else 1.0 / REFERENCE_HEADS
    edges = tuple(
        round(bits_per_unit * (constants.k0 - (steeper + flatter) / 2) / constants.gamma, 9)
        for steeper, flatter in itertools.pairwise(falling)
    )
    return SlopeMapping(edges=edges, slopes=tuple(falling), fixed_slope=falling[len(falling) // 2])


def _reference(
    model: ModelShape, layout: PromptLayout, budget: float, slope: float, constants: Hyperparameters
) -> ReferenceSchedule:
    tokens = max(1, round(budget * layout.visual_tokens))
    return reference_schedule(layout.visual_tokens, model.layers, tokens, slope, constants.x0)


def _counts(
    model: ModelShape,
    layout: PromptLayout,
    points: tuple[int, ...],
    budget: float,
    slope: float,
    form: Form,
    constants: Hyperparameters,
    merge: bool,
    floors: Mapping[str, int],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Kept and merged visual tokens at every pruning point."""
    if not 0 < budget < 1:
        raise RecipeError(
            f"budget {budget:g} is out of range; allowed: 0..1, both excluded (1 is the bucket {FULL!r})"
        )
    least = max(1, sum(floors.values()))
    _require_room(model, layout, points, budget, floors)
    try:
        if form == "reference":
            schedule = _reference(model, layout, budget, slope, constants)
            if points == tuple(range(model.layers - 1)):
                return schedule.kept[:-1], schedule.merged[:-1]
            into = stages_from_layers(schedule.into_layer, points)
        else:
            curve = calibrated_curve(model.layers, slope, constants.x0)
            into = solve_stage_counts(layout.visual_tokens, points, budget, curve, least)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if not merge:
        return into[1:], (0,) * len(points)
    pairs = [split_recovered(before, after, least) for before, after in itertools.pairwise(into)]
    return tuple(kept for kept, _ in pairs), tuple(merged for _, merged in pairs)


def _require_room(
    model: ModelShape,
    layout: PromptLayout,
    points: Sequence[int],
    budget: float,
    floors: Mapping[str, int],
) -> None:
    """Refuse floors that add up to more tokens than the stages of a budget can keep."""
    total, visual = sum(floors.values()), layout.visual_tokens
    if not total or (low := reachable_budget(visual, model.layers, points, total)) <= budget:
        return
    before = points[0] + 1
    most = math.floor(visual * (budget * model.layers - before) / (model.layers - before) + 1e-9)
    told = " and ".join(f"{camera} {floor}" for camera, floor in floors.items())
    if most >= 1:  # else the budget is out of reach with no floors at all
        raise RecipeError(
            f"budget {budget:g} cannot hold the camera floors {told}: they add up to {total}, its last stage "
            f"can keep at most {most} of {visual} visual tokens; allowed: floors that add up to 0..{most}, "
            f"or budgets from {math.ceil(1e4 * low) / 1e4:g} on"
        )
