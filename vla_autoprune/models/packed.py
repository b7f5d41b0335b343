"""How training runs the decoder: many queries on one visual prefix, tokens dropped between layers.

The modules are transformers' own, called layer by layer. The sequence is the prompt up to the last image (the
prefix, which all queries of a scene share), then one group per query with its suffix and action tokens. A
group sees the prefix and itself. Rows keep the rotary positions they have in the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vla_autoprune.frame import CAMERAS
from vla_autoprune.models.prompt import SUFFIX_LENGTH, PromptBuilder
from vla_autoprune.recipe import PromptLayout

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


@dataclass(frozen=True)
class Pruning:
    """What is dropped inside the decoder.

    Attributes:
        points: tokens are dropped after these layers, ascending.
        kept: visual tokens that stay after each point.
        ranking: "attention" keeps what the suffix rows attend to, "random" keeps any.
        reduction: over heads and suffix rows of the attention: "mean" or "max".
        noise: scale of Gumbel noise on the logarithm of the attention; 0 keeps the best.
    """

    points: tuple[int, ...]
    kept: tuple[int, ...]
    ranking: str = "attention"
    reduction: str = "mean"
    noise: float = 0.0


@dataclass(frozen=True)
class Prefix:
    """The part of a prompt that queries share, for all cameras or some.

    Attributes:
        token_ids: [P] prompt tokens up to the last visual one.
        positions: [P] their rows in the full prompt.
        visual: [V] which of these rows are visual, ascending.
        cameras: indices of the cameras, in order.
        suffix_position: row of the first suffix word in the full prompt.
    """

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    visual: NDArray[np.int64]
    cameras: tuple[int, ...]
    suffix_position: int


def make_prefix(prompt: PromptBuilder, cameras: Sequence[int] = tuple(range(len(CAMERAS)))) -> Prefix:
    """The shared prefix with the images of some cameras only; the others' labels go as well."""
    layout: PromptLayout = prompt.layout
    token_ids = prompt.prefix
    positions = [0]
    row = 1
    index = 0
    for span in layout.segments:
        if span[0] != "visual":
            continue
        if index in cameras:
            positions += range(row, row + 1 + span[2])
        row += 1 + span[2]
        index += 1
    rows = np.array(positions)
    return Prefix(
        token_ids=token_ids[rows],
        positions=rows,
        visual=np.flatnonzero(np.isin(rows, layout.visual_positions)),
        cameras=tuple(sorted(cameras)),
        suffix_position=len(token_ids),
    )


def visual_features(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Run the vision tower and the projector on images [M, 3, S, S].

    Returns:
        Tower output [M, 1 + patches, width], [CLS] first, and projected patches [M, patches, d].
    """
    states = model.model.vision_tower(pixel_values).last_hidden_state
    return states, model.model.multi_modal_projector(states[:, 1:])


def packed_logits(
    model: LlavaForConditionalGeneration,
    prefix: Prefix,
    features: Tensor,
    suffix_ids: Tensor,
    action_ids: Tensor,
    pruning: Pruning | None = None,
    collect: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Logits of every action token of every query, given the ones before it.

    Args:
        model: the VLA.
        prefix: which cameras.
        features: [B, V, d] projected patches of these cameras.
        suffix_ids: [B, Q, SUFFIX_LENGTH] words of the queries.
        action_ids: [B, Q, A - 1] action tokens fed back, the last one left out.
        pruning: drop visual tokens between layers; all queries of a scene lose the same.
        collect: layers whose attention to visual tokens is returned; none of them after a pruning point.
        generator: for noise and random rankings.

    Returns:
        [B, Q, A, vocabulary] logits, and per collected layer [B, V] attention of the suffix rows to the
        visual tokens, mean over heads, rows and queries.
    """
    batch, queries, fed = action_ids.shape
    group = SUFFIX_LENGTH + fed
    embed = model.get_input_embeddings()
    device = features.device
    hidden_prefix = embed(torch.as_tensor(prefix.token_ids, device=device)).expand(batch, -1, -1)
    visual = torch.as_tensor(prefix.visual, device=device)
    hidden_prefix = hidden_prefix.to(features.dtype).index_copy(1, visual, features)
    groups = embed(torch.cat([suffix_ids, action_ids], dim=2)).flatten(1, 2).to(features.dtype)
    hidden = torch.cat([hidden_prefix, groups], dim=1)

    own = torch.arange(prefix.suffix_position, prefix.suffix_position + group, device=device)
    positions = torch.cat([torch.as_tensor(prefix.positions, device=device), own.repeat(queries)])
    first = len(prefix.token_ids)
    group_of = torch.full((hidden.shape[1],), -1, device=device)
    group_of[first:] = torch.arange(queries, device=device).repeat_interleave(group)
    rows = torch.arange(queries * group, device=device).reshape(queries, group)
    suffix_rows = first + rows[:, :SUFFIX_LENGTH].flatten()

    hidden, seen = _run_layers(
        model, hidden, positions, group_of, visual, suffix_rows, pruning, collect, generator, cache=None
    )
    tail = hidden[:, hidden.shape[1] - queries * group :].unflatten(1, (queries, group))
    return model.lm_head(model.model.language_model.norm(tail[:, :, SUFFIX_LENGTH - 1 :])), seen


@torch.no_grad()
def greedy_actions(
    model: LlavaForConditionalGeneration,
    prefix: Prefix,
    features: Tensor,
    suffix_ids: Tensor,
    length: int,
    pruning: Pruning | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Decode the most likely action tokens, one query per scene, with a KV cache of what each layer kept.

    Args:
        model: the VLA.
        prefix: which cameras.
        features: [B, V, d] projected patches.
        suffix_ids: [B, SUFFIX_LENGTH].
        length: tokens to decode.
        pruning: drop visual tokens between layers, chosen for every query on its own.
        generator: for random rankings.

    Returns:
        [B, length] token ids.
    """
    from transformers import DynamicCache

    embed = model.get_input_embeddings()
    decoder = model.model.language_model
    device = features.device
    batch = features.shape[0]
    visual = torch.as_tensor(prefix.visual, device=device)
    hidden = embed(torch.as_tensor(prefix.token_ids, device=device)).expand(batch, -1, -1)
    hidden = hidden.to(features.dtype).index_copy(1, visual, features)
    hidden = torch.cat([hidden, embed(suffix_ids).to(features.dtype)], dim=1)
    first = len(prefix.token_ids)
    suffix_positions = prefix.suffix_position + torch.arange(SUFFIX_LENGTH, device=device)
    positions = torch.cat([torch.as_tensor(prefix.positions, device=device), suffix_positions])
    suffix_rows = torch.arange(first, hidden.shape[1], device=device)
    cache = DynamicCache()
    hidden, _ = _run_layers(
        model, hidden, positions, None, visual, suffix_rows, pruning, (), generator, cache=cache
    )
    tokens = [model.lm_head(decoder.norm(hidden[:, -1:])).argmax(-1)]
    for step in range(length - 1):
        position = torch.full((1, 1), prefix.suffix_position + SUFFIX_LENGTH + step, device=device)
        hidden = embed(tokens[-1]).to(features.dtype)
        rotary = decoder.rotary_emb(hidden, position_ids=position)
        for layer in decoder.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, past_key_values=cache)
        tokens.append(model.lm_head(decoder.norm(hidden)).argmax(-1))
    return torch.cat(tokens, dim=1)


def _run_layers(
    model: LlavaForConditionalGeneration,
    hidden: Tensor,
    positions: Tensor,
    group_of: Tensor | None,
    visual: Tensor,
    suffix_rows: Tensor,
    pruning: Pruning | None,
    collect: Sequence[int],
    generator: torch.Generator | None,
    cache: Any,
) -> tuple[Tensor, list[Tensor]]:
    """Run all decoder layers on [B, n, d].

    `group_of` [n] says which query a row belongs to, -1 for the prefix; None is a plain causal sequence.
    """
    decoder = model.model.language_model
    rotary = decoder.rotary_emb(hidden, position_ids=positions[None])
    mask = _group_mask(group_of)
    visual = visual.expand(hidden.shape[0], -1)
    seen: list[Tensor] = []
    for index, layer in enumerate(decoder.layers):
        kept = None
        if pruning is not None and index in pruning.points:
            kept = pruning.kept[pruning.points.index(index)]
        ranked = pruning is not None and kept is not None and pruning.ranking == "attention"
        attention = None
        if index in collect or ranked:
            attention = _suffix_attention(layer, hidden, rotary, mask, visual, suffix_rows)
            if index in collect:
                seen.append(attention.mean(dim=(1, 2)))
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=cache)
        if pruning is None or kept is None:
            continue
        score = _scores(pruning, attention, visual, generator)
        hidden, rotary, visual = _drop(hidden, rotary, visual, score, kept)
        removed = len(positions) - hidden.shape[1]
        positions, suffix_rows = positions[removed:], suffix_rows - removed
        # The prefix comes first in group_of, so what is left of it is its end.
        group_of = None if group_of is None else group_of[removed:]
        mask = _group_mask(group_of)
    return hidden, seen


def _scores(
    pruning: Pruning, attention: Tensor | None, visual: Tensor, generator: torch.Generator | None
) -> Tensor:
    """[B, V] what to keep first."""
    if attention is None:
        return _gumbel(visual, generator)
    attention = attention.detach()
    score = attention.amax(dim=(1, 2)) if pruning.reduction == "max" else attention.mean(dim=(1, 2))
    if not pruning.noise:
        return score
    return score.clamp_min(1e-9).log() + pruning.noise * _gumbel(visual, generator)


def _drop(
    hidden: Tensor, rotary: tuple[Tensor, Tensor], visual: Tensor, score: Tensor, kept: int
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Keep the `kept` best visual rows of every scene and all text rows, in order."""
    batch, length, width = hidden.shape
    best = score.argsort(dim=1, descending=True, stable=True)[:, :kept]
    stays = torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
    stays.scatter_(1, visual, False)
    is_text = stays.clone()
    stays.scatter_(1, visual.gather(1, best), True)
    left = length - visual.shape[1] + kept
    # A stable sort of "stays" lists the remaining rows in order without asking the device for their number.
    rows = stays.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :left]
    visual = is_text.gather(1, rows).to(torch.uint8).argsort(dim=1, stable=True)[:, :kept]
    hidden = hidden.gather(1, rows[..., None].expand(-1, -1, width))
    cos, sin = (
        table.expand(batch, -1, -1).gather(1, rows[..., None].expand(-1, -1, table.shape[2]))
        for table in rotary
    )
    return hidden, (cos, sin), visual


def _group_mask(group_of: Tensor | None) -> Tensor | None:
    """[1, 1, n, n] True where a row may look: backwards, at the prefix and at its own group."""
    if group_of is None:
        return None
    row = torch.arange(len(group_of), device=group_of.device)
    backwards = row[:, None] >= row[None, :]
    allowed = (group_of[None, :] < 0) | (group_of[None, :] == group_of[:, None])
    return (backwards & allowed)[None, None]


def _suffix_attention(
    layer: Any,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    mask: Tensor | None,
    visual: Tensor,
    suffix_rows: Tensor,
) -> Tensor:
    """[B, heads, suffix rows, V] attention of the suffix rows in a layer, visual columns only."""
    from transformers.models.llama.modeling_llama import rotate_half

    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    query = attention.q_proj(normed[:, suffix_rows]).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
    key = attention.k_proj(normed).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
    cos, sin = (table[:, None] for table in rotary)
    query = query * cos[:, :, suffix_rows] + rotate_half(query) * sin[:, :, suffix_rows]
    key = (key * cos + rotate_half(key) * sin).repeat_interleave(attention.num_key_value_groups, dim=1)
    logits = (query @ key.transpose(2, 3)).float() * attention.scaling
    if mask is None:
        column = torch.arange(hidden.shape[1], device=hidden.device)
        allowed = suffix_rows[:, None] >= column[None, :]
    else:
        allowed = mask[0, 0, suffix_rows]
    weights = logits.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
    columns = visual[:, None, None].expand(-1, weights.shape[1], weights.shape[2], -1)
    return weights.gather(3, columns)


def _gumbel(like: Tensor, generator: torch.Generator | None) -> Tensor:
    uniform = torch.rand(like.shape, device=like.device, generator=generator)
    return -(-uniform.clamp(1e-9, 1 - 1e-7).log()).log()
