"""The pruning recipe: the validated JSON that says everything static about a deployment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from vla_autoprune.errors import RecipeError

CONTRACT_VERSION = 1
"""Raised whenever a field changes its meaning; readers refuse other versions."""

FULL = "full"
"""Name of the bucket that prunes nothing."""

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
            raise RecipeError(f"prompt layout names a camera twice: {', '.join(cameras)}; one visual span per camera")
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

    def _is_visual(self) -> NDArray[np.bool_]:
        return np.repeat([span[0] == "visual" for span in self.segments], [span[-1] for span in self.segments])


class Bucket(_Record):
    """One schedule, hence one set of static shapes.

    Attributes:
        name: "b25_s2" is the third slope of the 25 % budget; "full" prunes nothing.
        budget: mean visual tokens over V: into the layers (calibrated) or after them (reference).
        slope: k of the retention curve, per 32nd of the decoder's depth (calibrated) or per layer (reference).
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


class ModelShape(_Record):
    """What the recipe must know about the decoder it was made for.

    Attributes:
        id: name of the model, for people.
        weights_sha256: hash of its weights; a bundle of other weights refuses the recipe.
        ffn: width of the gated feed-forward.
    """

    id: str
    weights_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    layers: int = Field(ge=2)
    hidden: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    ffn: int = Field(ge=1)
    head_dim: int = Field(ge=1)


class Scorer(_Record):
    """How a stage's last layer ranks visual tokens.

    Attributes:
        reduction: over heads and text rows of the text-to-visual attention.
        encoder_weight: share of the vision tower's [CLS] attention added at the first point; 0 leaves it out.
    """

    reduction: Literal["mean", "max"] = "mean"
    encoder_weight: float = Field(default=0.0, ge=0)


class Hyperparameters(_Record):
    """The published constants. `x0` and `k0` are for 32 layers; the calibrated form scales them with depth."""

    x0: float = Field(default=14.9, gt=0)
    k0: float = Field(default=0.4, ge=0)
    gamma: float = Field(default=0.2, ge=0)


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

    contract_version: int = CONTRACT_VERSION
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
