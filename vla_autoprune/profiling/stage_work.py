"""What each stage of a plan has to compute and to move, counted from the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vla_autoprune import contract
from vla_autoprune.profiling.document import Phase, Work
from vla_autoprune.pruning.work import decode_flops, layer_parameters, prefill_flops
from vla_autoprune.recipe import Bucket, PruningRecipe, rows_into_layers

_PHASES: Mapping[str, Phase] = {
    "preprocess": "input",
    "prompt": "input",
    "vision": "vision",
    "choose": "answer",
    "detokenise": "answer",
}

SUMS = ("total", "prefill", "decode")
"""Of `Plan.timings_ms`: these span others."""

ON_HOST = (
    "preprocess", "prompt", "check", "decode_embed", "decode_store", "decode_check", "choose", "detokenise",
)  # fmt: skip
"""Stages that are the host's whatever the backend."""


def phase_of(stage: str) -> Phase:
    """The part of a plan that a stage belongs to."""
    return _PHASES.get(stage, "decode" if stage.startswith("decode_") else "prefill")


def rows_into_stages(recipe: PruningRecipe, bucket: Bucket) -> dict[str, tuple[int, int]]:
    """Rows, and visual tokens among them, that enter each stage of a prefill and each selection."""
    rows: dict[str, tuple[int, int]] = {}
    text = recipe.layout.text_tokens
    for index, layers in enumerate(recipe.stages):
        visual = bucket.visual_tokens_into_layers[layers.start]
        rows[contract.stage_name(index)] = (text + visual, visual)
        if index < len(recipe.pruning_points):
            rows[f"select_{index:02d}"] = (text + visual, visual)
    return rows


def stage_work(
    recipe: PruningRecipe,
    bucket: Bucket,
    vocabulary: int,
    decoded: int,
    bytes_per_weight: float = 4,
    bytes_per_kv: float = 4,
    bytes_per_hidden: float = 4,
) -> dict[str, Work]:
    """Operations and least traffic of one plan, by stage.

    Traffic is what no implementation can avoid: weights once per run, rows in and out once, keys and values
    written once and, in decoding, read once per token. Norms, scores, rotary tables and the vision tower,
    which a recipe does not describe, are left out.

    Args:
        recipe: sizes of the decoder and its stages.
        bucket: one of its buckets.
        vocabulary: logits of the head.
        decoded: tokens decoded after the first, which the prefill gives.
        bytes_per_weight: 4 for float32, 2 for float16, 0.5 for 4 bits.
        bytes_per_kv: of a number of the keys and values.
        bytes_per_hidden: of a number of the hidden states between stages.

    Returns:
        Work by stage name, as `Plan.timings_ms` has them.
    """
    model = recipe.model
    layer_bytes = layer_parameters(model) * bytes_per_weight
    row_bytes = model.hidden * bytes_per_hidden
    kv_bytes = 2 * model.kv_heads * model.head_dim * bytes_per_kv
    into = rows_into_layers(recipe, bucket)
    work: dict[str, Work] = {}
    for index, layers in enumerate(recipe.stages):
        rows, count = into[layers.start], len(layers)
        moved = count * (layer_bytes + rows * kv_bytes) + 2 * rows * row_bytes
        flops = prefill_flops(model, [into[layer] for layer in layers])
        work[contract.stage_name(index)] = Work(flops=flops, bytes=round(moved))
        if index < len(recipe.pruning_points):
            after = into[recipe.stages[index + 1].start]
            work[f"select_{index:02d}"] = Work(flops=0, bytes=round((rows + after) * row_bytes))
        work[f"decode_{contract.stage_name(index)}"] = _decode_work(
            [_keys(into[layer], decoded) for layer in layers], recipe, layer_bytes, kv_bytes, row_bytes
        )
    head = Work(
        flops=2 * model.hidden * vocabulary, bytes=round(model.hidden * vocabulary * bytes_per_weight)
    )
    work[contract.HEAD] = head
    work[f"decode_{contract.HEAD}"] = Work(flops=decoded * head.flops, bytes=decoded * head.bytes)
    return work


def _keys(rows: int, decoded: int) -> list[int]:
    """Keys each decoded token sees, its own included."""
    return [rows + step + 1 for step in range(decoded)]


def _decode_work(
    keys: Sequence[Sequence[int]],
    recipe: PruningRecipe,
    layer_bytes: float,
    kv_bytes: float,
    row_bytes: float,
) -> Work:
    """Of one stage; `keys` is [layers][decoded]."""
    steps = list(zip(*keys, strict=True))
    flops = sum(decode_flops(recipe.model, step) for step in steps)
    moved = sum(len(step) * layer_bytes + sum(step) * kv_bytes + 2 * row_bytes for step in steps)
    return Work(flops=flops, bytes=round(moved))
