"""The stage contract: a bundle's graphs, their tensors, and the value of every symbol for every bucket.

Dimensions are symbolic in the ONNX files. A *variant* of a graph is one assignment of integers to its
symbols, hence one set of static shapes: stage 0's `prefill` serves every bucket, `b25_s2/prefill` and
`b25_s2/decode` belong to one.

Symbols are those of `recipe.symbols`; after a selection there are `u` visual rows and `m` rows of all kinds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vla_autoprune.errors import BackendError, BundleError, RecipeError
from vla_autoprune.recipe import Bucket, PruningRecipe, symbols

Symbols = Mapping[str, int]
ElementType = Literal["float32", "int64", "float16", "bfloat16"]
Precision = Literal["fp32", "fp16", "bf16"]
"""What weights are stored and layers computed in."""

ITEM_BYTES: Mapping[ElementType, int] = {"float32": 4, "int64": 8, "float16": 2, "bfloat16": 2}
COMPUTED_IN: Mapping[Precision, ElementType] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""The element type of a precision. Keys and values have it as well; all other tensors between graphs stay
float32, and so do scores, information and the tables on the host."""

VISION = "vision"
SELECT = "select"
SELECT_MERGE = "select_merge"
HEAD = "head"
ONLY = "only"
"""The variant of graphs whose shapes never change."""


@dataclass(frozen=True)
class Tensor:
    """One input or output of a graph; strings in `shape` are symbols."""

    name: str
    shape: tuple[int | str, ...]
    dtype: ElementType = "float32"

    def pinned(self, symbols: Symbols) -> tuple[int, ...]:
        """The static shape under one variant's symbols."""
        return tuple(symbols[size] if isinstance(size, str) else size for size in self.shape)


@dataclass(frozen=True)
class Graph:
    """One ONNX file: its tensors and every variant it is run in."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    variants: Mapping[str, Symbols]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Inputs, then outputs."""
        return self.inputs + self.outputs

    def shapes(self, variant: str) -> dict[str, tuple[int, ...]]:
        """Static shape of every tensor in one variant.

        Raises:
            BundleError: the graph has no such variant; the message lists those it has.
        """
        if variant not in self.variants:
            raise BundleError(f"{self.name} has no variant {variant!r}; it has {', '.join(self.variants)}")
        return {tensor.name: tensor.pinned(self.variants[variant]) for tensor in self.tensors}

    def check_buffers(self, variant: str, buffers: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """Refuse buffers to bind that are not this variant's tensors.

        Args:
            variant: one of the graph's.
            buffers: element type and shape by tensor name.

        Raises:
            BundleError: the graph has no such variant.
            BackendError: a buffer is missing, or of another type or shape than the recipe pins.
        """
        shapes = self.shapes(variant)
        for tensor in self.tensors:
            wanted = (tensor.dtype, shapes[tensor.name])
            given = buffers.get(tensor.name)
            if given != wanted:
                what = "nothing" if given is None else f"{given[0]}{list(given[1])}"
                raise BackendError(
                    f"{self.name} ({variant}): {tensor.name} got {what}, the recipe pins "
                    f"{wanted[0]}{list(wanted[1])}"
                )


def stage_name(stage: int) -> str:
    """Name of a stage's graph."""
    return f"stage_{stage:02d}"


def prefill_variant(stage: int, bucket: str) -> str:
    """Stage 0 runs before the bucket is known, so its prefill belongs to all of them."""
    return "prefill" if stage == 0 else f"{bucket}/prefill"


def decode_variant(bucket: str) -> str:
    """The variant that adds one token in a bucket."""
    return f"{bucket}/decode"


def point_variant(point: int, bucket: str) -> str:
    """The variant of a selection graph at one pruning point of a bucket."""
    return f"{bucket}/point_{point:02d}"


def selection_graph(recipe: PruningRecipe, bucket: Bucket, point: int) -> str | None:
    """Which graph selects at a pruning point: None where the bucket drops nothing there."""
    if bucket.after_points[point] == bucket.visual_tokens_into_layers[recipe.pruning_points[point]]:
        return None
    return SELECT_MERGE if bucket.merged[point] else SELECT


def graphs(recipe: PruningRecipe, vocabulary: int, precision: Precision = "fp32") -> tuple[Graph, ...]:
    """Every graph of a bundle with this recipe, in the order they run.

    Args:
        recipe: what is pruned where.
        vocabulary: logits of the head.
        precision: of the export; keys and values have its type.

    Returns:
        Vision, stages, selections, head.

    Raises:
        RecipeError: the recipe cannot be exported; the message says why.
    """
    if recipe.form != "calibrated":
        raise RecipeError(
            f"recipe has form {recipe.form!r}; only 'calibrated' recipes are exported, "
            "the reference form exists to check the arithmetic against the published one"
        )
    if recipe.layout.image_size is None:
        raise RecipeError(
            "recipe's layout has no image_size; the exported vision graph needs (width, height)"
        )
    points = range(len(recipe.pruning_points))
    wanted = {selection_graph(recipe, bucket, point) for bucket in recipe.buckets for point in points}
    kv = COMPUTED_IN[precision]
    return (
        _vision(recipe),
        *(_stage(recipe, index, layers, kv) for index, layers in enumerate(recipe.stages)),
        *(_selection(recipe, name) for name in (SELECT, SELECT_MERGE) if name in wanted),
        _head(recipe, vocabulary),
    )


def _vision(recipe: PruningRecipe) -> Graph:
    assert recipe.layout.image_size is not None
    width, height = recipe.layout.image_size
    model, visual = recipe.model, recipe.layout.visual_tokens
    outputs = [Tensor("features", (1, visual, model.hidden))]
    if recipe.scorer.encoder_weight > 0:
        outputs.append(Tensor("encoder_score", (visual,)))
    if model.deepstack_layers:
        outputs.append(Tensor("deepstack", (model.deepstack_layers, visual, model.hidden)))
    return Graph(
        name=VISION,
        inputs=(Tensor("pixel_values", (len(recipe.layout.cameras), 3, height, width)),),
        outputs=tuple(outputs),
        variants={ONLY: {}},
    )


def _rows(recipe: PruningRecipe) -> tuple[Tensor, ...]:
    return (
        Tensor("hidden", (1, "n", recipe.model.hidden)),
        Tensor("cos", (1, "n", recipe.model.head_dim)),
        Tensor("sin", (1, "n", recipe.model.head_dim)),
    )


def _stage(recipe: PruningRecipe, stage: int, layers: range, kv: ElementType) -> Graph:
    model = recipe.model
    ranks = layers.stop < model.layers
    inputs = [*_rows(recipe)]
    if ranks:
        inputs += [
            Tensor("text_rows", ("t",), "int64"),
            Tensor("text_weight", ("t",)),
            Tensor("visual_rows", ("v",), "int64"),
        ]
    if stage == 0 and recipe.scorer.encoder_weight > 0:
        inputs.append(Tensor("encoder_score", ("v",)))
    if layers.start < model.deepstack_layers:
        inputs.append(Tensor("deepstack", (model.deepstack_layers, "n", model.hidden)))
    inputs.append(Tensor("past_length", (1,), "int64"))
    outputs = [Tensor("hidden_out", (1, "n", model.hidden))]
    if ranks:
        outputs.append(Tensor("score", ("v",)))
    if stage == 0:
        outputs.append(Tensor("complexity", (1,)))
    for layer in layers:
        for kind in "kv":
            inputs.append(Tensor(f"past_{kind}_{layer:02d}", (1, model.kv_heads, "s", model.head_dim), kv))
            outputs.append(Tensor(f"new_{kind}_{layer:02d}", (1, model.kv_heads, "n", model.head_dim), kv))

    name = stage_name(stage)
    prefill = {prefill_variant(stage, b.name): symbols(recipe, b, "prefill")[name] for b in recipe.buckets}
    decode = {decode_variant(b.name): symbols(recipe, b, "decode")[name] for b in recipe.buckets}
    return Graph(name, tuple(inputs), tuple(outputs), {**prefill, **decode})


def _selection(recipe: PruningRecipe, name: str) -> Graph:
    model, layout = recipe.model, recipe.layout
    merges = name == SELECT_MERGE
    inputs = [
        *_rows(recipe),
        Tensor("score", ("v",)),
        Tensor("text_rows", ("t",), "int64"),
        Tensor("other_rows", ("x",), "int64"),
        Tensor("visual_rows", ("v",), "int64"),
    ]
    outputs = [
        Tensor("hidden_out", (1, "m", model.hidden)),
        Tensor("cos_out", (1, "m", model.head_dim)),
        Tensor("sin_out", (1, "m", model.head_dim)),
        Tensor("text_rows_out", ("t",), "int64"),
        Tensor("other_rows_out", ("x",), "int64"),
        Tensor("visual_rows_out", ("u",), "int64"),
        Tensor("kept", ("u",), "int64"),
    ]
    if recipe.camera_floors:
        inputs += [Tensor("camera", ("v",), "int64"), Tensor("floors", (len(layout.cameras),), "int64")]
        outputs.append(Tensor("camera_out", ("u",), "int64"))
    if model.deepstack_layers > recipe.pruning_points[0] + 1:
        # Later stages have features to add: they follow their rows.
        inputs.append(Tensor("deepstack", (model.deepstack_layers, "n", model.hidden)))
        outputs.append(Tensor("deepstack_out", (model.deepstack_layers, "m", model.hidden)))
    inputs.append(Tensor("keep", ("k",)))
    if merges:
        inputs += [Tensor("candidates", ("r",)), Tensor("groups", ("g",))]

    variants: dict[str, Symbols] = {}
    for bucket in recipe.buckets:
        values = symbols(recipe, bucket, "prefill")
        for point in range(len(recipe.pruning_points)):
            if selection_graph(recipe, bucket, point) == name:
                out = bucket.after_points[point]
                variants[point_variant(point, bucket.name)] = {
                    **{
                        key: value
                        for key, value in values[f"select_{point:02d}"].items()
                        if merges or key not in "rg"
                    },
                    "u": out,
                    "m": layout.text_tokens + out,
                }
    return Graph(name, tuple(inputs), tuple(outputs), variants)


def _head(recipe: PruningRecipe, vocabulary: int) -> Graph:
    return Graph(
        name=HEAD,
        inputs=(Tensor("hidden", (1, 1, recipe.model.hidden)),),
        outputs=(Tensor("logits", (1, vocabulary)),),
        variants={ONLY: {}},
    )
