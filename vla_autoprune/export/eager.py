"""The pruned model without stages: transformers' layers and attention matrices, numpy's arithmetic.

It shares no code with the exported stages but the layers themselves, so that agreement between the two means
something.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vla_autoprune.frame import FloatArray, IntArray
from vla_autoprune.models.adapter import StageModel
from vla_autoprune.pruning.information import information
from vla_autoprune.pruning.merging import group_tokens, merge_counts, merge_sources
from vla_autoprune.pruning.selection import fused_scores, select_top, text_scores
from vla_autoprune.recipe import Bucket, PruningRecipe


@dataclass(frozen=True)
class EagerRun:
    """What a prompt gave.

    Attributes:
        logits: [decode steps, vocabulary], the first of the prompt's last token.
        tokens: [decode steps] greedy answer.
        complexity: bits after stage 0.
        kept_visual: per stage, indices (0..V-1) of the visual tokens that entered it.
        scores: per pruning point, the score of every slot.
        hidden: per stage, [rows, d] hidden states after its last layer.
    """

    logits: FloatArray
    tokens: NDArray[np.int64]
    complexity: float
    kept_visual: tuple[IntArray, ...]
    scores: tuple[FloatArray, ...]
    hidden: tuple[FloatArray, ...]


@dataclass
class _Sequence:
    """The rows that are left: hidden states, prompt positions, and which visual token each one is (or -1)."""

    hidden: Tensor
    positions: NDArray[np.int64]
    visual: NDArray[np.int64]

    @property
    def visual_rows(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.visual >= 0)


class _Layers:
    """Drives the decoder layer by layer with a cache of its own length each."""

    def __init__(self, model: StageModel, recipe: PruningRecipe) -> None:
        from transformers import DynamicCache

        self.model = model
        self.cache = DynamicCache()
        self.cos, self.sin = model.rotary(recipe.layout, recipe.layout.length + recipe.decode_length)

    def run(self, layer: int, hidden: Tensor, positions: NDArray[np.int64]) -> tuple[Tensor, FloatArray]:
        """Hidden states after a layer, and its attention [H, rows, keys]."""
        module: Any = self.model.layers[layer]
        past, rows = self.cache.get_seq_length(layer), hidden.shape[1]
        column, row = torch.arange(past + rows)[None], torch.arange(rows)[:, None]
        mask = torch.zeros(rows, past + rows).masked_fill(column > past + row, torch.finfo(torch.float32).min)
        seen: list[Tensor] = []
        hook = module.self_attn.register_forward_hook(lambda _module, _inputs, output: seen.append(output[1]))
        try:
            with self.model.loaded(module, torch.float32):
                hidden = module(
                    hidden,
                    attention_mask=mask[None, None],
                    past_key_values=self.cache,
                    position_embeddings=(self.cos[None, positions], self.sin[None, positions]),
                )
        finally:
            hook.remove()
        return hidden, seen[0][0].numpy()

    def cut(self, layer: int, length: int) -> None:
        """Forget what a layer cached of the rows from `length` on."""
        stored: Any = self.cache.layers[layer]
        stored.keys, stored.values = stored.keys[:, :, :length], stored.values[:, :, :length]


@torch.no_grad()
def encode_eager(
    model: StageModel, recipe: PruningRecipe, pixel_values: FloatArray
) -> tuple[FloatArray, FloatArray | None, FloatArray | None]:
    """What the tower gives `run_eager`.

    Args:
        model: the model.
        recipe: its layout and scorer.
        pixel_values: [c, 3, h, w] normalised images.

    Returns:
        [V, d] features, [V] the tower's score or None, [R, V, d] DeepStack features or None.
    """
    tower = model.tower(recipe.layout, recipe.scorer)
    with model.loaded(tower, torch.float32):
        features, score, deepstack = tower(torch.from_numpy(pixel_values))
    return (
        features.flatten(0, 1).numpy(),
        None if score is None else score.flatten().numpy(),
        None if deepstack is None else deepstack.numpy(),
    )


@torch.no_grad()
def run_eager(
    model: StageModel,
    recipe: PruningRecipe,
    bucket: Bucket,
    token_ids: IntArray,
    length: int,
    features: FloatArray,
    encoder_score: FloatArray | None,
    ranking: FloatArray | None = None,
    deepstack: FloatArray | None = None,
    progress: Callable[[int], None] | None = None,
) -> EagerRun:
    """Prefill and greedy decoding of one prompt with a bucket's pruning.

    Args:
        model: the model.
        recipe: of the calibrated form.
        bucket: one of its buckets.
        token_ids: [N] prompt.
        length: tokens before the padding.
        features: [V, d] projected visual features.
        encoder_score: [V] the vision tower's score; None where the scorer does not ask for it.
        ranking: [V] replaces the scores.
        deepstack: [R, V, d] features added after the first R layers.
        progress: called with the layers of the prefill that are done, before each.

    Returns:
        The run.
    """
    from transformers.models.llama.modeling_llama import eager_attention_forward

    with model.decoder_attention(eager_attention_forward):
        layout = recipe.layout
        layers = _Layers(model, recipe)
        hidden = model.embedding[torch.from_numpy(token_ids)][None].to(torch.float32, copy=True)
        hidden[0, torch.from_numpy(layout.visual_positions)] = torch.from_numpy(features)
        visual = np.full(layout.length, -1, dtype=np.int64)
        visual[layout.visual_positions] = np.arange(layout.visual_tokens)
        sequence = _Sequence(hidden, np.arange(layout.length), visual)
        prompt = _prefill(
            recipe, bucket, layers, sequence, length, encoder_score, ranking, deepstack, progress
        )
        return _decode(model, recipe, layers, prompt, length)


@dataclass
class _Prompt:
    last: Tensor
    complexity: float
    kept: list[IntArray]
    scores: list[FloatArray]
    hidden: list[FloatArray]


def _prefill(
    recipe: PruningRecipe,
    bucket: Bucket,
    layers: _Layers,
    sequence: _Sequence,
    length: int,
    encoder_score: FloatArray | None,
    ranking: FloatArray | None,
    deepstack: FloatArray | None,
    progress: Callable[[int], None] | None,
) -> _Prompt:
    layout = recipe.layout
    padding = layout.length - length
    seen = _Prompt(sequence.hidden, 0.0, [np.arange(layout.visual_tokens)], [], [])
    for layer in range(recipe.model.layers):
        if progress is not None:
            progress(layer)
        sequence.hidden, attention = layers.run(layer, sequence.hidden, sequence.positions)
        rows = sequence.hidden.shape[1]
        layers.cut(layer, rows - padding)
        if deepstack is not None and layer < len(deepstack):
            visual = sequence.visual_rows
            sequence.hidden[0, visual] += torch.from_numpy(deepstack[layer][sequence.visual[visual]])
        if layer in (*recipe.pruning_points, recipe.model.layers - 1):
            seen.hidden.append(sequence.hidden[0].numpy())
        if layer not in recipe.pruning_points:
            continue
        point = recipe.pruning_points.index(layer)
        suffix = np.arange(rows - len(layout.suffix_rows), rows - padding)
        text_to_visual = attention[:, suffix][:, :, sequence.visual_rows]
        score = text_scores(text_to_visual, reduction=recipe.scorer.reduction)
        if point == 0:
            seen.complexity = information(text_to_visual)
            if encoder_score is not None:
                score = fused_scores(score, encoder_score, recipe.scorer.encoder_weight)
        if ranking is not None:
            score = ranking[sequence.visual[sequence.visual_rows]]
        sequence = _prune(sequence, score, recipe, bucket.kept[point], bucket.merged[point])
        seen.scores.append(score)
        seen.kept.append(sequence.visual[sequence.visual_rows])
    seen.last = sequence.hidden[:, sequence.hidden.shape[1] - padding - 1][:, None]
    return seen


def _prune(sequence: _Sequence, score: FloatArray, recipe: PruningRecipe, keep: int, merge: int) -> _Sequence:
    rows = sequence.visual_rows
    cameras = recipe.layout.camera_of_visual[sequence.visual[rows]]
    floors = {recipe.layout.cameras.index(camera): floor for camera, floor in recipe.camera_floors.items()}
    slots = select_top(score, keep, cameras, floors)
    hidden = sequence.hidden.clone()
    if merge:
        sources = merge_sources(score, slots, merge_counts(len(rows) - keep)[0])
        grouping = group_tokens(hidden[0, rows[sources]].numpy(), merge, size_epsilon=0.0)
        centres = sources[grouping.centres]
        hidden[0, torch.from_numpy(rows[centres])] = torch.from_numpy(grouping.merged)
        slots = np.concatenate([slots, centres])
    survivors = np.sort(np.concatenate([np.flatnonzero(sequence.visual < 0), rows[slots]]))
    positions = sequence.positions[survivors]
    if recipe.positions == "compact":
        positions = np.arange(len(survivors))
    return _Sequence(hidden[:, torch.from_numpy(survivors)], positions, sequence.visual[survivors])


def _decode(
    model: StageModel, recipe: PruningRecipe, layers: _Layers, prompt: _Prompt, length: int
) -> EagerRun:
    logits = [_logits(model, prompt.last)]
    tokens = [int(logits[0].argmax())]
    for step in range(recipe.decode_length - 1):
        hidden = model.embedding[tokens[-1]][None, None].float()
        for layer in range(recipe.model.layers):
            cached = layers.cache.get_seq_length(layer)
            position = cached if recipe.positions == "compact" else length + step
            hidden, _ = layers.run(layer, hidden, np.array([position]))
        logits.append(_logits(model, hidden))
        tokens.append(int(logits[-1].argmax()))
    return EagerRun(
        logits=np.stack(logits),
        tokens=np.array(tokens),
        complexity=prompt.complexity,
        kept_visual=tuple(prompt.kept),
        scores=tuple(prompt.scores),
        hidden=tuple(prompt.hidden),
    )


def _logits(model: StageModel, hidden: Tensor) -> FloatArray:
    """[vocabulary] of one row [1, 1, d]."""
    with model.loaded(model.final_norm, torch.float32), model.loaded(model.head, torch.float32):
        return model.head(model.final_norm(hidden))[0, 0].numpy()
