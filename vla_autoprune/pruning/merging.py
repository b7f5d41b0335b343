"""Token recovery: a part of the dropped tokens is merged into few groups instead of being lost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla_autoprune.frame import FloatArray, IntArray

RECOVERED_FRACTION = 0.3
"""Share of the dropped tokens that takes part in merging: the best-scored ones."""

SOURCES_PER_GROUP = 10

NOISE_SCALE = 1e-6
"""The published code breaks ties of density by uniform noise of this size."""


@dataclass(frozen=True)
class Grouping:
    """Groups of merged tokens.

    Attributes:
        merged: [G, d] one vector per group, in the order of `centres`.
        centres: [G] index of the token each group formed around, best centre first.
        group_of_token: [n] group of every token.
    """

    merged: FloatArray
    centres: NDArray[np.int64]
    group_of_token: NDArray[np.int64]


def merge_counts(dropped: int) -> tuple[int, int]:
    """How many of the dropped tokens are merged, and into how many groups.

    Args:
        dropped: visual tokens dropped at one pruning point.

    Returns:
        (sources, groups); both 0 when nothing is dropped.
    """
    if dropped <= 0:
        return 0, 0
    sources = int(RECOVERED_FRACTION * dropped) + 1
    return sources, min(sources // SOURCES_PER_GROUP + 1, sources)


def group_tokens(
    tokens: FloatArray, groups: int, noise: FloatArray | None = None, size_epsilon: float = 1e-6
) -> Grouping:
    """Group tokens around density peaks and average each group.

    A token is a good centre when it is dense (close to its `groups` nearest tokens, itself included) and far
    from any denser one. Two mutual nearest neighbours are exactly equally dense, so ties are systematic;
    without noise the lower index counts as denser, which makes the result deterministic.

    Args:
        tokens: [n, d] vectors.
        groups: number of groups G, 1..n.
        noise: [n] uniform numbers in [0, 1) that break ties the published way; None breaks them by index.
        size_epsilon: added to a group's size before dividing by it; the published code has 1e-6, 0 is the
            true mean.

    Returns:
        The groups.

    Raises:
        ValueError: groups is not in 1..n.

    Source: density-peak clustering as SparseVLM and AutoPrune (arXiv 2509.23931) use it.
    """
    count, width = tokens.shape
    if not 1 <= groups <= count:
        raise ValueError(f"cannot form {groups} groups of {count} tokens; allowed: 1..{count}")
    distance = np.linalg.norm(tokens[:, None, :] - tokens[None, :, :], axis=2) / np.sqrt(
        width, dtype=tokens.dtype
    )
    nearest = np.sort(distance, axis=1)[:, :groups]
    density = np.exp(-(nearest**2).mean(axis=1))
    if noise is None:
        index = np.arange(count)
        denser = (density[None, :] > density[:, None]) | (
            (density[None, :] == density[:, None]) & (index[None, :] < index[:, None])
        )
    else:
        density = density + np.asarray(noise, dtype=density.dtype) * density.dtype.type(NOISE_SCALE)
        denser = density[None, :] > density[:, None]
    to_denser = np.where(denser, distance, distance.max()).min(axis=1)
    centres = np.argsort(-(to_denser * density), kind="stable")[:groups]
    group_of_token = distance[centres].argmin(axis=0)
    group_of_token[centres] = np.arange(groups)
    sums = np.zeros((groups, width), dtype=tokens.dtype)
    np.add.at(sums, group_of_token, tokens)
    sizes = np.bincount(group_of_token, minlength=groups).astype(tokens.dtype)
    merged = sums / (sizes + tokens.dtype.type(size_epsilon))[:, None]
    return Grouping(merged=merged, centres=centres, group_of_token=group_of_token)


def merge_sources(scores: FloatArray, kept: IntArray, sources: int) -> NDArray[np.int64]:
    """The dropped slots that take part in merging.

    Args:
        scores: [v] score of every slot.
        kept: slots that survive.
        sources: how many dropped slots to merge.

    Returns:
        [sources] slots, best score first, ties to the lower slot.
    """
    dropped = np.setdiff1d(np.arange(len(scores)), kept)
    return dropped[np.argsort(-scores[dropped], kind="stable")][:sources]
