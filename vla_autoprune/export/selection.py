"""Token selection as a torch module without weights: the graph between two stages.

How many tokens survive is the *length* of the input `keep`, so a profile pins it like any other dimension.
Ties go to the lower slot, as ONNX's TopK defines it and `pruning.selection.select_top` does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

GUARANTEED = 3.0e38
"""Score of the tokens that a camera's floor keeps."""

LEAST = -3.0e38
"""What a score that is not finite counts as: given NaN, a device's TopK may return indices out of range."""


class Selection(nn.Module):
    """Keep the best visual tokens; optionally merge some of the others into the slots of their centres."""

    def __init__(self, merges: bool, compact_positions: bool) -> None:
        super().__init__()
        self.merges = merges
        self.compact_positions = compact_positions

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        score: Tensor,
        text_rows: Tensor,
        other_rows: Tensor,
        visual_rows: Tensor,
        keep: Tensor,
        candidates: Tensor | None = None,
        groups: Tensor | None = None,
        camera: Tensor | None = None,
        floors: Tensor | None = None,
        deepstack: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Select.

        Args:
            hidden: [1, n, d] output of the stage.
            cos: [1, n, hd] rotary table of its rows.
            sin: [1, n, hd].
            score: [v] of the visual rows.
            text_rows: [t] rows that rank; part of `other_rows`.
            other_rows: [p] rows that are not visual, ascending.
            visual_rows: [v] ascending.
            keep: [k] only its length counts.
            candidates: [c] only its length counts: the best of the dropped tokens, which are merged.
            groups: [g] only its length counts.
            camera: [v] camera index of every visual row.
            floors: [cameras] visual tokens each camera keeps at least.
            deepstack: [R, n, d] what later layers add to the rows; a merged token takes its centre's.

        Returns:
            hidden, cos, sin of the surviving rows [1, m, ..] in their old order; text_rows [t], other_rows
            [p] and visual_rows [u] renumbered to it; kept [u], the surviving slots; camera [u] and deepstack
            [R, m, d] if they were given.
        """
        ranking = _finite(score)
        if camera is not None and floors is not None:
            ranking = _with_floors(ranking, camera, floors)
        if self.merges:
            assert candidates is not None and groups is not None
            order = _best(ranking, keep.shape[0] + candidates.shape[0])
            slots, sources = order[: keep.shape[0]], order[keep.shape[0] :]
            source_rows = visual_rows.index_select(0, sources)
            merged, centres = merge(hidden[0].index_select(0, source_rows), groups)
            slots = torch.cat([slots, sources.index_select(0, centres)])
        else:
            slots = _best(ranking, keep.shape[0])
        ascending = _ascending(slots)
        kept = slots.index_select(0, ascending)
        kept_rows = visual_rows.index_select(0, kept)

        rows = torch.cat([other_rows, kept_rows])
        in_order = _ascending(rows)
        rows = rows.index_select(0, in_order)
        survivors = hidden.index_select(1, rows)
        if self.merges:
            # Slots are (kept, centres); reading them in row order finds each merged vector its centre's
            # place.
            vectors = torch.cat(
                [hidden[0].index_select(0, visual_rows.index_select(0, slots[: keep.shape[0]])), merged]
            )
            others = hidden[0].index_select(0, other_rows)
            survivors = torch.cat([others, vectors.index_select(0, ascending)]).index_select(0, in_order)[
                None
            ]
        if self.compact_positions:
            cos_out, sin_out = cos[:, : rows.shape[0]], sin[:, : rows.shape[0]]
        else:
            cos_out, sin_out = cos.index_select(1, rows), sin.index_select(1, rows)

        def renumbered(old: Tensor) -> Tensor:
            return _count_below(old, other_rows) + _count_below(old, kept_rows)

        outputs = [survivors, cos_out, sin_out, renumbered(text_rows), renumbered(other_rows)]
        outputs += [_count_below(kept_rows, other_rows) + torch.arange(kept.shape[0]), kept]
        if camera is not None:
            outputs.append(camera.index_select(0, kept))
        if deepstack is not None:
            outputs.append(deepstack.index_select(1, rows))
        return tuple(outputs)


def merge(tokens: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Group tokens around density peaks, as `pruning.merging.group_tokens` does, and average each group.

    Args:
        tokens: [c, d] best-scored first; of equally dense tokens the first counts as denser.
        groups: [g] only its length counts.

    Returns:
        [g, d] mean vectors and [g] index of the token each group formed around.
    """
    count, width = tokens.shape
    index = torch.arange(count)
    itself = index[:, None] == index[None]
    # Distances survive a shift; without the part all tokens share, the products below lose fewer digits.
    shifted = tokens - tokens.mean(dim=0, keepdim=True)
    norm = shifted.square().sum(dim=1)
    squared = norm[:, None] + norm[None] - 2 * shifted @ shifted.T
    # Both halves of a product of matrices can round differently; ties between mutual neighbours must stay
    # ties.
    squared = torch.maximum(squared, squared.T).clamp_min(0.0).masked_fill(itself, 0.0) / width
    distance = squared.sqrt()

    nearest = torch.topk(squared, groups.shape[0], dim=1, largest=False).values
    density = (-nearest.mean(dim=1)).exp()
    tied_before = (density[None] == density[:, None]) & (index[None] < index[:, None])
    denser = (density[None] > density[:, None]) | tied_before
    to_denser = torch.where(denser, distance, distance.max()).amin(dim=1)
    centres = torch.topk(_finite(to_denser * density), groups.shape[0]).indices

    to_centre = distance.index_select(0, centres)
    group = torch.arange(groups.shape[0])
    is_centre = centres[:, None] == index[None]
    # A centre stays in its own group, even where another centre is at the same place.
    to_centre = torch.where(is_centre, -1.0, to_centre)
    member = (to_centre.argmin(dim=0)[None] == group[:, None]).to(tokens.dtype)
    return member @ tokens / member.sum(dim=1, keepdim=True), centres


def _finite(score: Tensor) -> Tensor:
    """Finite scores as they are. The runtime refuses the frame when it meets the others."""
    return torch.where((score >= LEAST) & (score <= GUARANTEED), score, LEAST)


def _best(score: Tensor, count: int) -> Tensor:
    return torch.topk(score, count).indices


def _ascending(values: Tensor) -> Tensor:
    """Indices that sort distinct small integers; in float32, where every runtime has TopK."""
    return torch.topk(values.to(torch.float32), values.shape[0], largest=False).indices


def _count_below(values: Tensor, others: Tensor) -> Tensor:
    return (others[None] < values[:, None]).to(torch.int64).sum(dim=1)


def _with_floors(score: Tensor, camera: Tensor, floors: Tensor) -> Tensor:
    """Scores in which the best tokens of each camera, as many as its floor, come before all others."""
    slot = torch.arange(score.shape[0])
    better = (score[None] > score[:, None]) | ((score[None] == score[:, None]) & (slot[None] < slot[:, None]))
    rank = (better & (camera[None] == camera[:, None])).to(torch.int64).sum(dim=1)
    return torch.where(rank < floors.index_select(0, camera), GUARANTEED, score)
