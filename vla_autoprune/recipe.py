"""The pruning recipe: the validated JSON that says everything static about a deployment.

`recipe_building` solves budgets and puts the counts into a recipe.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vla_autoprune.errors import RecipeError
from vla_autoprune.files import first_fault, write_whole
from vla_autoprune.pruning import work
from vla_autoprune.pruning.calibration import SlopeMapping
from vla_autoprune.pruning.merging import merge_counts
from vla_autoprune.pruning.schedule import stage_lengths

CONTRACT_VERSION = 1
"""Raised whenever a field changes its meaning; readers refuse other versions."""

FULL = "full"
"""Name of the bucket that prunes nothing."""

BUDGET_TOLERANCE_TOKENS = 1.0
"""A calibrated bucket meets its budget within this many visual tokens per layer."""

Phase = Literal["prefill", "decode"]

Count = Annotated[int, Field(ge=0)]
Form = Literal["reference", "calibrated"]
TextSpan = tuple[Literal["text"], Annotated[int, Field(ge=1)]]
VisualSpan = tuple[Literal["visual"], str, Annotated[int, Field(ge=1)]]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PromptLayout(_Record):
    """The fixed sequence of text and visual spans a model sees.

    Text is padded to the layout's length on the right, so causality hides the padding.

    Attributes:
        segments: spans in prompt order: `("text", tokens)` or `("visual", camera, tokens)`.
        image_size: (width, height) in pixels of every camera's input; None where the tower takes any size.
    """

    segments: tuple[TextSpan | VisualSpan, ...]
    image_size: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _check(self) -> PromptLayout:
        cameras = [span[1] for span in self.segments if span[0] == "visual"]
        if not cameras:
            raise RecipeError("prompt layout has no visual span; add at least one ('visual', camera, tokens)")
        if len(set(cameras)) != len(cameras):
            raise RecipeError(
                f"prompt layout names a camera twice: {', '.join(cameras)}; one visual span per camera"
            )
        if self.segments[-1][0] != "text":
            raise RecipeError(
                f"prompt layout ends with the visual span of {cameras[-1]}; "
                "text rows after the last image rank the tokens, so end with ('text', tokens)"
            )
        return self

    @property
    def length(self) -> int:
        """Prompt tokens N, padding included."""
        return sum(span[-1] for span in self.segments)

    @property
    def cameras(self) -> tuple[str, ...]:
        """Cameras in prompt order."""
        return tuple(span[1] for span in self.segments if span[0] == "visual")

    @property
    def visual_tokens(self) -> int:
        """Visual tokens V."""
        return sum(span[2] for span in self.segments if span[0] == "visual")

    @property
    def text_tokens(self) -> int:
        """Tokens that are not visual, padding included."""
        return self.length - self.visual_tokens

    @property
    def visual_positions(self) -> NDArray[np.int64]:
        """[V] prompt rows that hold visual tokens, ascending."""
        return np.flatnonzero(self._is_visual())

    @property
    def text_positions(self) -> NDArray[np.int64]:
        """[N - V] prompt rows that hold text, ascending."""
        return np.flatnonzero(~self._is_visual())

    @property
    def suffix_rows(self) -> NDArray[np.int64]:
        """Prompt rows after the last visual token: the text rows that see every visual token."""
        return np.arange(self.visual_positions[-1] + 1, self.length)

    @property
    def camera_of_visual(self) -> NDArray[np.int64]:
        """[V] index into `cameras` of every visual token."""
        counts = [span[2] for span in self.segments if span[0] == "visual"]
        return np.repeat(np.arange(len(counts)), counts)

    def require_floors(self, camera_floors: Mapping[str, int]) -> None:
        """Refuse floors of visual tokens per camera that the prompt cannot hold.

        Raises:
            RecipeError: a camera is not in the prompt, or has fewer tokens than its floor.
        """
        tokens = {span[1]: span[2] for span in self.segments if span[0] == "visual"}
        for camera, floor in camera_floors.items():
            if camera not in tokens:
                raise RecipeError(f"camera_floors names {camera}; the prompt has {', '.join(tokens)}")
            if not 0 <= floor <= tokens[camera]:
                raise RecipeError(
                    f"camera_floors.{camera} is {floor}; allowed: 0..{tokens[camera]}, the tokens it has"
                )

    def _is_visual(self) -> NDArray[np.bool_]:
        return np.repeat(
            [span[0] == "visual" for span in self.segments], [span[-1] for span in self.segments]
        )


class Bucket(_Record):
    """One schedule, hence one set of static shapes.

    Attributes:
        name: "b25_s2" is the third slope of the 25 % budget; "full" prunes nothing.
        budget: mean visual tokens over V: into the layers (calibrated) or after them (reference).
        slope: k of the retention curve, per 32nd of the decoder's depth (calibrated) or per layer
            (reference).
        complexity: [low, high) bits of the frames that take this bucket; None is unbounded.
        default: the bucket of its budget for frames whose complexity is not asked (policy "fixed").
        kept: [points] visual tokens kept at each pruning point.
        merged: [points] recovered tokens added there; kept + merged enter the next stage.
        visual_tokens_into_layers: [L] visual tokens that enter each decoder layer.
        work_fraction: prefill FLOPs over the unpruned prefill's.
        kv_tokens_per_layer: [L] KV cache capacity: the rows that enter the layer plus the decode length.
    """

    name: str
    budget: float = Field(gt=0, le=1)
    slope: float = Field(ge=0)
    complexity: tuple[float | None, float | None] = (None, None)
    default: bool = False
    kept: tuple[Count, ...]
    merged: tuple[Count, ...]
    visual_tokens_into_layers: tuple[Count, ...]
    work_fraction: float = Field(gt=0)
    kv_tokens_per_layer: tuple[Count, ...]

    @property
    def after_points(self) -> tuple[int, ...]:
        """[points] visual tokens that leave each pruning point: kept and merged."""
        return tuple(kept + merged for kept, merged in zip(self.kept, self.merged, strict=True))


class DecoderSizes(_Record):
    """Sizes of a decoder, as a model's config.json states them.

    Attributes:
        ffn: width of the gated feed-forward.
        head_dim: width of one head; hidden / heads where it is not given.
    """

    layers: int = Field(ge=2)
    hidden: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    ffn: int = Field(ge=1)
    head_dim: int = Field(ge=1)

    @model_validator(mode="before")
    @classmethod
    def _default_head_dim(cls, values: Any) -> Any:
        if isinstance(values, dict) and "head_dim" not in values and values.get("heads"):
            return {**values, "head_dim": values.get("hidden", 0) // values["heads"]}
        return values


class ModelShape(DecoderSizes):
    """What the recipe must know about the decoder it was made for.

    Attributes:
        id: name of the model, for people.
        weights_sha256: hash of its weights; a bundle of other weights refuses the recipe.
        position_axes: 1, or 3 where visual tokens have positions in time, height and width.
        deepstack_layers: decoder layers, from the first on, after which visual features are added.
    """

    id: str
    weights_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    position_axes: Literal[1, 3] = 1
    deepstack_layers: Count = 0

    @model_validator(mode="after")
    def _check(self) -> ModelShape:
        if self.heads % self.kv_heads:
            raise RecipeError(
                f"model {self.id}: {self.heads} heads cannot share {self.kv_heads} KV heads evenly"
            )
        if self.deepstack_layers > self.layers:
            raise RecipeError(
                f"model {self.id}: deepstack_layers is {self.deepstack_layers}; allowed: 0..{self.layers}"
            )
        return self


class Scorer(_Record):
    """How a stage's last layer ranks visual tokens.

    Attributes:
        reduction: over heads and text rows of the text-to-visual attention.
        encoder_weight: share of the vision tower's own score added at the first point; 0 leaves it out.
        encoder: the tower's score: attention of its [CLS] row (towers that have one), or the attention every
            patch receives from all patches, mean over heads.
        encoder_layer: the tower layer it is read from; None is the layer the features come from, or the last
            one that sees the whole image.
    """

    reduction: Literal["mean", "max"] = "mean"
    encoder_weight: float = Field(default=0.0, ge=0)
    encoder: Literal["cls", "received"] = "cls"
    encoder_layer: Count | None = None


class Hyperparameters(_Record):
    """The published constants, made for 32 layers; the calibrated form scales `x0` and slopes with depth."""

    x0: float = Field(default=14.9, gt=0)
    k0: float = Field(default=0.4, ge=0)
    gamma: float = Field(default=0.2, ge=0)


@dataclass(frozen=True)
class Cost:
    """What the tokens kept at the pruning points make of a prefill and its caches; fields as of `Bucket`."""

    visual_tokens_into_layers: tuple[int, ...]
    work_fraction: float
    kv_tokens_per_layer: tuple[int, ...]


def cost_of(
    model: ModelShape,
    layout: PromptLayout,
    pruning_points: Sequence[int],
    kept: Sequence[int],
    merged: Sequence[int],
    decode_length: int,
) -> Cost:
    """Count what follows from the tokens kept and merged at every pruning point.

    Args:
        model: the decoder.
        layout: the prompt.
        pruning_points: layers after which tokens are dropped.
        kept: [points] visual tokens kept there.
        merged: [points] recovered tokens added there.
        decode_length: tokens generated after the prompt.

    Returns:
        Tokens into the layers, work and KV capacity.
    """
    into_stage = [layout.visual_tokens, *(keep + merge for keep, merge in zip(kept, merged, strict=True))]
    into = np.repeat(into_stage, stage_lengths(model.layers, pruning_points)).tolist()
    rows = [layout.text_tokens + visual for visual in into]
    full = [layout.length] * model.layers
    return Cost(
        visual_tokens_into_layers=tuple(into),
        work_fraction=work.prefill_flops(model, rows) / work.prefill_flops(model, full),
        kv_tokens_per_layer=tuple(count + decode_length for count in rows),
    )


class PruningRecipe(_Record):
    """Everything static about a deployment, nothing secret.

    Attributes:
        pruning_points: tokens are dropped *after* these decoder layers, ascending.
        recovery: merge part of the dropped tokens instead of losing them.
        positions: survivors keep their prompt positions, or are renumbered 0, 1, 2, … (the published form).
        camera_floors: visual tokens per camera that every pruning point keeps at least.
        budgets: the budgets on offer, descending.
        buckets: "full" first, then every slope of every budget.
        decode_length: tokens generated after the prompt.
    """

    contract_version: int
    model: ModelShape
    layout: PromptLayout
    form: Form = "calibrated"
    hyperparameters: Hyperparameters = Hyperparameters()
    pruning_points: tuple[Count, ...]
    scorer: Scorer = Scorer()
    recovery: bool = False
    positions: Literal["original", "compact"] = "original"
    camera_floors: Mapping[str, Count] = {}
    budgets: tuple[float, ...]
    buckets: tuple[Bucket, ...]
    decode_length: int = Field(ge=1)

    @model_validator(mode="before")
    @classmethod
    def _check_version(cls, values: Any) -> Any:
        """Before all else: fields of another version would only be called unexpected."""
        version = values.get("contract_version", CONTRACT_VERSION) if isinstance(values, dict) else None
        if version not in (None, CONTRACT_VERSION):
            raise RecipeError(
                f"recipe has contract version {version}, this library reads {CONTRACT_VERSION}; build it anew"
            )
        return values

    @model_validator(mode="after")
    def _check(self) -> PruningRecipe:
        try:
            stage_lengths(self.model.layers, self.pruning_points)
        except ValueError as error:
            raise RecipeError(f"recipe: {error}") from error
        self.layout.require_floors(self.camera_floors)
        if self.positions == "compact" and self.model.position_axes > 1:
            raise RecipeError(
                "recipe positions is 'compact'; this model's visual tokens have positions in time, height "
                "and width, which renumbering would destroy: allowed is 'original'"
            )
        if any(
            later >= earlier
            for earlier, later in zip((1.0, *self.budgets), (*self.budgets, 0.0), strict=True)
        ):
            raise RecipeError(
                f"recipe budgets {list(self.budgets)} must fall strictly within 0..1, both excluded"
            )
        names = [bucket.name for bucket in self.buckets]
        if not names or names[0] != FULL or len(set(names)) != len(names):
            raise RecipeError(
                f"recipe buckets are named {names}; the first must be {FULL!r}, each name used once"
            )
        for bucket in self.buckets:
            _check_bucket(self, bucket)
        for budget in self.budgets:
            _check_intervals(self, budget)
        return self

    @property
    def stages(self) -> tuple[range, ...]:
        """[points + 1] decoder layers of each stage."""
        edges = (0, *(point + 1 for point in self.pruning_points), self.model.layers)
        return tuple(range(start, end) for start, end in itertools.pairwise(edges))

    @property
    def sha256(self) -> str:
        """Hash of everything the recipe says, independent of how its file is laid out."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def bucket(self, name: str) -> Bucket:
        """The bucket of that name.

        Raises:
            RecipeError: there is none; the message lists the names.
        """
        for bucket in self.buckets:
            if bucket.name == name:
                return bucket
        raise RecipeError(
            f"recipe has no bucket {name!r}; it has {', '.join(known.name for known in self.buckets)}"
        )

    def buckets_of(self, budget: float) -> tuple[Bucket, ...]:
        """The buckets of one budget, by rising slope.

        Raises:
            RecipeError: the recipe has no such budget; the message lists them.
        """
        found = tuple(
            b for b in self.buckets if b.name != FULL and math.isclose(b.budget, budget, rel_tol=1e-6)
        )
        if not found:
            offered = ", ".join(f"{known:g}" for known in self.budgets)
            raise RecipeError(
                f"recipe has no budget {budget:g}; it offers {offered} (or no budget: nothing is pruned). "
                "Other budgets need a recipe made with them: vla-autoprune calibrate --budgets"
            )
        return tuple(sorted(found, key=lambda bucket: bucket.slope))

    def mapping_of(self, budget: float) -> SlopeMapping:
        """The mapping from complexity to slope that the buckets of one budget stand for.

        Raises:
            RecipeError: the recipe has no such budget; the message lists them.
        """
        buckets = sorted(self.buckets_of(budget), key=lambda bucket: _ends(bucket.complexity))
        return SlopeMapping(
            edges=tuple(high for bucket in buckets if (high := bucket.complexity[1]) is not None),
            slopes=tuple(bucket.slope for bucket in buckets),
            fixed_slope=next(bucket.slope for bucket in buckets if bucket.default),
        )

    def require_model(self, weights_sha256: str, where: str) -> None:
        """Refuse weights the recipe was not made for.

        Args:
            weights_sha256: hash of the weights at hand.
            where: names them in the message.

        Raises:
            RecipeError: the hashes differ.
        """
        if weights_sha256 != self.model.weights_sha256:
            raise RecipeError(
                f"recipe is for model {self.model.id} with weights {self.model.weights_sha256[:12]}…, "
                f"{where} has {weights_sha256[:12]}…; make a recipe for it with vla-autoprune calibrate"
            )

    def require_layout(self, layout: PromptLayout) -> None:
        """Refuse a prompt or rig the recipe was not made for.

        Args:
            layout: of the prompt and rig at hand.

        Raises:
            RecipeError: naming the first difference.
        """
        own = self.layout
        told = {
            "cameras": (", ".join(own.cameras), ", ".join(layout.cameras)),
            "image_size": (own.image_size, layout.image_size),
            "segments": (list(own.segments), list(layout.segments)),
        }
        for name, (wanted, given) in told.items():
            if wanted != given:
                raise RecipeError(
                    f"recipe's layout has {name} {wanted}, prompt and rig at hand have {given}; make a "
                    "recipe for them with vla-autoprune calibrate"
                )


def bucket_for(recipe: PruningRecipe, budget: float | None, complexity: float | None = None) -> Bucket:
    """The bucket a frame takes.

    Args:
        recipe: the recipe.
        budget: one of the recipe's budgets; None prunes nothing.
        complexity: information of stage 0 in bits; None takes the budget's default bucket.

    Returns:
        The bucket.

    Raises:
        RecipeError: the recipe has no such budget.
        ValueError: the complexity is not finite.
    """
    if budget is None:
        return recipe.bucket(FULL)
    buckets = recipe.buckets_of(budget)
    if complexity is None:
        return next(bucket for bucket in buckets if bucket.default)
    if not math.isfinite(complexity):
        raise ValueError(f"complexity is {complexity}; stage 0 must give a finite number of bits")
    return next(bucket for bucket in buckets if _within(complexity, bucket.complexity))


def symbols(recipe: PruningRecipe, bucket: Bucket, phase: Phase) -> dict[str, dict[str, int]]:
    """A value for every symbolic dimension of every graph.

    Stages (`stage_00` …): `n` rows, `t` text rows that score, `v` visual rows, `s` KV slots handed in.
    Prefill gives them one dummy slot; decoding has one row, dummy index sets of one, and the whole cache.
    Selections (`select_00` …, prefill only): `n`, `v` as of the stage before, `x` rows that are not visual,
    `t` those of them that score, `k` kept; with recovery also `r` slots that are merged and `g` groups.

    Args:
        recipe: the recipe.
        bucket: one of its buckets.
        phase: "prefill" or "decode".

    Returns:
        Graph name to symbol to value.
    """
    text = recipe.layout.text_tokens
    scoring = len(recipe.layout.suffix_rows)
    result: dict[str, dict[str, int]] = {}
    for index, layers in enumerate(recipe.stages):
        visual = bucket.visual_tokens_into_layers[layers.start]
        if phase == "decode":
            slots = bucket.kv_tokens_per_layer[layers.start]
            result[f"stage_{index:02d}"] = {"n": 1, "t": 1, "v": 1, "s": slots}
            continue
        result[f"stage_{index:02d}"] = {"n": text + visual, "t": scoring, "v": visual, "s": 1}
        if index < len(recipe.pruning_points):
            select = {"n": text + visual, "v": visual, "x": text, "t": scoring, "k": bucket.kept[index]}
            if recipe.recovery:
                select |= {"r": merge_counts(visual - bucket.kept[index])[0], "g": bucket.merged[index]}
            result[f"select_{index:02d}"] = select
    return result


def rows_into_layers(recipe: PruningRecipe, bucket: Bucket) -> tuple[int, ...]:
    """[L] rows, text and visual, that enter each decoder layer in the prefill."""
    return tuple(recipe.layout.text_tokens + visual for visual in bucket.visual_tokens_into_layers)


def published_work_fraction(recipe: PruningRecipe, bucket: Bucket) -> float:
    """Work of a bucket over the unpruned one's by the paper's own counter."""
    full = work.published_macs(recipe.model, rows_into_layers(recipe, recipe.bucket(FULL)))
    return work.published_macs(recipe.model, rows_into_layers(recipe, bucket)) / full


def write_recipe(recipe: PruningRecipe, path: Path) -> None:
    """Write a recipe as JSON that a person can read: one line per list of numbers.

    Args:
        recipe: the recipe.
        path: the file; it appears when it is whole.
    """
    text = json.dumps(recipe.model_dump(mode="json"), indent=2)
    # Strings hold no raw line breaks, so this only touches the lists json.dumps has spread over lines.
    text = re.sub(
        r"\[\n\s+([^\[\]{}]*?)\n\s+\]", lambda found: "[" + re.sub(r"\n\s+", " ", found[1]) + "]", text
    )
    write_whole(path, f"{text}\n".encode())


def read_recipe(path: Path) -> PruningRecipe:
    """Read and validate a recipe.

    Args:
        path: the JSON file.

    Returns:
        The recipe.

    Raises:
        RecipeError: the file is missing, not JSON, or does not hold together; the message names file and
            field.
    """
    try:
        return PruningRecipe.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RecipeError(
            f"{path}: cannot be read ({error.strerror}); give a recipe written by vla-autoprune calibrate"
        ) from error
    except ValidationError as error:
        raise RecipeError(
            f"{path}: {first_fault(error)}; recipes come from vla-autoprune calibrate"
        ) from error
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def _within(complexity: float, interval: tuple[float | None, float | None]) -> bool:
    low, high = interval
    return (low is None or complexity >= low) and (high is None or complexity < high)


def _ends(interval: tuple[float | None, float | None]) -> tuple[float, float]:
    low, high = interval
    return (-math.inf if low is None else low, math.inf if high is None else high)


def _check_bucket(recipe: PruningRecipe, bucket: Bucket) -> None:
    where = f"recipe bucket {bucket.name}"
    again = "; build the recipe anew with vla-autoprune calibrate instead of editing counts"
    points, layers, visual = len(recipe.pruning_points), recipe.model.layers, recipe.layout.visual_tokens
    for field, values, wanted in (
        ("kept", bucket.kept, points),
        ("merged", bucket.merged, points),
        ("visual_tokens_into_layers", bucket.visual_tokens_into_layers, layers),
        ("kv_tokens_per_layer", bucket.kv_tokens_per_layer, layers),
    ):
        if len(values) != wanted:
            raise RecipeError(f"{where}: {field} has {len(values)} entries, expected {wanted}{again}")
    floor = sum(recipe.camera_floors.values())
    before = visual
    for point, kept, merged in zip(recipe.pruning_points, bucket.kept, bucket.merged, strict=True):
        if not floor <= kept <= before:
            raise RecipeError(
                f"{where}: {kept} visual tokens kept after layer {point}; allowed: {floor}..{before} "
                f"(counts never grow, and camera floors add up to {floor}){again}"
            )
        most = min(merge_counts(before - kept)[1], before - kept) if recipe.recovery else 0
        if merged > most:
            raise RecipeError(
                f"{where}: {merged} tokens merged after layer {point}; allowed: 0..{most} "
                f"(recovery is {'on' if recipe.recovery else 'off'}){again}"
            )
        before = kept + merged
        if not before:
            raise RecipeError(
                f"{where}: no visual token is left after layer {point}; allowed: at least 1{again}"
            )
    cost = cost_of(
        recipe.model,
        recipe.layout,
        recipe.pruning_points,
        bucket.kept,
        bucket.merged,
        recipe.decode_length,
    )
    into = cost.visual_tokens_into_layers
    if bucket.visual_tokens_into_layers != into:
        raise RecipeError(
            f"{where}: visual_tokens_into_layers must be {list(into)} by kept and merged{again}"
        )
    if bucket.kv_tokens_per_layer != cost.kv_tokens_per_layer:
        raise RecipeError(f"{where}: kv_tokens_per_layer must be {list(cost.kv_tokens_per_layer)}{again}")
    if not math.isclose(bucket.work_fraction, cost.work_fraction, rel_tol=1e-6):
        raise RecipeError(
            f"{where}: work_fraction is {bucket.work_fraction}, its counts give {cost.work_fraction}{again}"
        )
    # The published schedule counts after the layers and misses its budget by design: only calibrated
    # buckets are held to it.
    miss = abs(sum(into) / layers - bucket.budget * visual)
    if recipe.form == "calibrated" and miss > BUDGET_TOLERANCE_TOKENS:
        raise RecipeError(
            f"{where}: {sum(into) / layers:.1f} visual tokens enter the layers on average, "
            f"budget {bucket.budget:g} is {bucket.budget * visual:.1f}; "
            f"allowed miss: {BUDGET_TOLERANCE_TOKENS:g}{again}"
        )
    if bucket.name != FULL and not any(
        math.isclose(bucket.budget, known, rel_tol=1e-6) for known in recipe.budgets
    ):
        raise RecipeError(
            f"{where}: budget {bucket.budget:g} is not among the recipe's budgets {list(recipe.budgets)}"
        )
    if bucket.name == FULL and (
        bucket.kept != (visual,) * points or bucket.budget != 1 or any(bucket.merged)
    ):
        raise RecipeError(
            f"{where}: it must keep all {visual} visual tokens at budget 1, has {list(bucket.kept)}{again}"
        )


def _check_intervals(recipe: PruningRecipe, budget: float) -> None:
    buckets = recipe.buckets_of(budget)
    defaults = [bucket.name for bucket in buckets if bucket.default]
    if len(defaults) != 1:
        raise RecipeError(f"recipe budget {budget:g} has default buckets {defaults}; exactly one is needed")
    intervals = sorted((bucket.complexity for bucket in buckets), key=_ends)
    lows = [interval[0] for interval in intervals]
    highs = [interval[1] for interval in intervals]
    if lows[0] is not None or highs[-1] is not None or lows[1:] != highs[:-1] or None in lows[1:]:
        raise RecipeError(
            f"recipe budget {budget:g} has complexity intervals "
            f"{[list(interval) for interval in intervals]}; together they must cover every value once, "
            "the first open below and the last open above"
        )
