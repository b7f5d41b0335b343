"""Decoder stages as torch modules: transformers' own layers, driven over a fixed KV buffer.

Attention stays fused. What ranking needs, the rows of a few text tokens on the visual columns, is computed
beside it from the last layer's queries and keys, so the full attention matrix never exists.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from vla_autoprune.models.adapter import StageModel
from vla_autoprune.pruning.information import TINY_PROBABILITY
from vla_autoprune.recipe import PruningRecipe


class _FixedCache:
    """Stands in for a transformers cache: layers only call `update`.

    Keys seen by a layer are the whole buffer, filled or not, then the layer's own rows; the mask hides what
    is empty.
    """

    def __init__(self, first_layer: int, past: list[Tensor]) -> None:
        self.first_layer = first_layer
        self.past = past
        self.new: list[Tensor] = []

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """Keys and values to attend to: [1, kv heads, s + n, head_dim] each."""
        self.new += [key, value]
        at = 2 * (layer - self.first_layer)
        return torch.cat([self.past[at], key], dim=2), torch.cat([self.past[at + 1], value], dim=2)


class _TextAttention:
    """Collects [H, t, v] attention of the text rows on the visual columns when a layer passes by."""

    def __init__(self, text_rows: Tensor, visual_columns: Tensor) -> None:
        self.text_rows = text_rows
        self.visual_columns = visual_columns
        self.probabilities: Tensor | None = None

    def observe(self, query: Tensor, key: Tensor, visible: Tensor, scaling: float) -> None:
        heads, kv_heads, width = query.shape[1], key.shape[1], query.shape[3]
        rows = self.text_rows.shape[0]
        text_query = (
            query[0].index_select(1, self.text_rows).reshape(kv_heads, heads // kv_heads * rows, width)
        )
        # Ranking and information are float32 whatever the layers compute in.
        logits = torch.matmul(text_query.float(), key[0].float().transpose(1, 2)) * scaling
        logits = logits.reshape(heads, rows, -1)
        hidden_from = visible.index_select(0, self.text_rows).logical_not()
        probabilities = logits.masked_fill(hidden_from[None], -math.inf).softmax(dim=-1)
        self.probabilities = probabilities.index_select(2, self.visual_columns)


def staged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    collector: _TextAttention | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attend as transformers' layers ask: fused, grouped-query, with a mask of what each row may see.

    Args:
        module: the attention module; not used.
        query: [1, H, n, hd].
        key: [1, Hkv, s + n, hd].
        value: [1, Hkv, s + n, hd].
        attention_mask: [n, s + n] bool, True where a row may look.
        scaling: factor on the logits.
        collector: takes the text rows' probabilities of the layer it is given to.

    Returns:
        [1, n, H, hd] and None, as fused attention has no weights.
    """
    if collector is not None:
        collector.observe(query, key, attention_mask, scaling)
    # The exporter refuses grouped queries where every head has keys of its own.
    grouped = query.shape[1] != key.shape[1]
    attended = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask[None, None], scale=scaling, enable_gqa=grouped
    )
    return attended.transpose(1, 2), None


class Stage(nn.Module):
    """The decoder layers between two pruning points.

    One module serves prefill (an empty buffer of one slot) and decode (one row, the bucket's buffer). Layers
    compute in the type of the KV buffers; what ranks, and what comes in and goes out beside keys and values,
    is float32.
    """

    def __init__(self, model: StageModel, recipe: PruningRecipe, layers: range) -> None:
        super().__init__()
        self.layers = nn.ModuleList(model.layers[index] for index in layers)
        self.first_layer = layers.start
        self.deepstack_layers = recipe.model.deepstack_layers
        self.ranks = layers.stop < recipe.model.layers
        self.measures = layers.start == 0
        self.encoder_weight = recipe.scorer.encoder_weight if layers.start == 0 else 0.0
        self.reduction = recipe.scorer.reduction

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        past_length: Tensor,
        past: list[Tensor],
        text_rows: Tensor | None = None,
        text_weight: Tensor | None = None,
        visual_rows: Tensor | None = None,
        encoder_score: Tensor | None = None,
        deepstack: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Run the layers.

        Args:
            hidden: [1, n, d].
            cos: [1, n, hd] rotary table of these rows.
            sin: [1, n, hd].
            past_length: [1] filled slots of the buffers.
            past: key and value buffer of each layer in turn, [1, Hkv, s, hd].
            text_rows: [t] rows that rank.
            text_weight: [t] 0 for padding.
            visual_rows: [v] rows that are ranked.
            encoder_score: [v] the vision tower's score; only where the scorer asks for it.
            deepstack: [R, n, d] added to the rows after the first R decoder layers, 0 in text rows; only for
                stages that have some of these layers.

        Returns:
            hidden [1, n, d]; score [v] if a pruning point follows; complexity [1] of stage 0; then the rows'
            own key and value per layer, [1, Hkv, n, hd].
        """
        slots, rows = past[0].shape[2], hidden.shape[1]
        filled = torch.arange(slots)[None] < past_length[:, None]
        causal = torch.arange(rows)[None] <= torch.arange(rows)[:, None]
        visible = torch.cat([filled.expand(rows, slots), causal], dim=1)
        cache = _FixedCache(self.first_layer, past)
        collector = None
        if self.ranks:
            assert text_rows is not None and visual_rows is not None
            collector = _TextAttention(text_rows, visual_rows + slots)
        dtype = past[0].dtype
        hidden, cos, sin = hidden.to(dtype), cos.to(dtype), sin.to(dtype)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            hidden = layer(
                hidden,
                attention_mask=visible,
                past_key_values=cache,
                position_embeddings=(cos, sin),
                collector=collector if index == last else None,
            )
            if self.first_layer + index < self.deepstack_layers:
                assert deepstack is not None
                hidden = hidden + deepstack[self.first_layer + index][None].to(dtype)
        outputs = [hidden.float()]
        if collector is not None:
            assert collector.probabilities is not None and text_weight is not None
            score = text_score(collector.probabilities, text_weight, self.reduction)
            if encoder_score is not None:
                score = score / score.sum() + self.encoder_weight * encoder_score / encoder_score.sum()
            outputs.append(score)
            if self.measures:
                outputs.append(information(collector.probabilities, text_weight))
        return (*outputs, *cache.new)


class Head(nn.Module):
    """The final norm and the language head, on one row, computed in the type of their weights."""

    def __init__(self, model: StageModel) -> None:
        super().__init__()
        self.norm = model.final_norm
        self.head = model.head

    def forward(self, hidden: Tensor) -> Tensor:
        """[1, 1, d] to logits [1, vocabulary]."""
        dtype = next(self.head.parameters()).dtype
        return self.head(self.norm(hidden.to(dtype)))[:, 0].float()


def text_score(attention: Tensor, weight: Tensor, reduction: Literal["mean", "max"]) -> Tensor:
    """Score of each visual token, as `pruning.selection.text_scores` has it.

    Args:
        attention: [H, t, v] probabilities.
        weight: [t] 0 for padding.
        reduction: over heads and rows.

    Returns:
        [v] scores.
    """
    if reduction == "max":
        return (attention * (weight > 0)[None, :, None]).amax(dim=(0, 1))
    share = weight / weight.sum()
    return (attention * share[None, :, None]).sum(dim=1).mean(dim=0)


def information(attention: Tensor, weight: Tensor) -> Tensor:
    """Complexity, as `pruning.information.calibrated_information` has it: clamped logarithms, nothing added.

    Args:
        attention: [H, t, v] probabilities.
        weight: [t] 0 for padding.

    Returns:
        [1] bits, mean over heads.
    """
    joint = attention * (weight / weight.sum())[None, :, None]
    marginal = joint.sum(dim=1, keepdim=True)
    log_ratio = attention.clamp_min(TINY_PROBABILITY).log2() - marginal.clamp_min(TINY_PROBABILITY).log2()
    return (joint * log_ratio).sum(dim=(1, 2)).mean(dim=0, keepdim=True)
