"""Rankings to compare against: scores on the host that replace a stage's own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def random_scores(visual_tokens: int, frame_token: str, seed: int = 0) -> NDArray[np.float32]:
    """Scores that rank visual tokens at random, the same for the same frame everywhere.

    Args:
        visual_tokens: V.
        frame_token: identifies the frame.
        seed: another seed gives another draw.

    Returns:
        [V] float32, a permutation of 1..V. Subsets are nested over pruning points, as with attention.
    """
    digest = hashlib.sha256(f"{seed}:{frame_token}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    return (generator.permutation(visual_tokens) + 1).astype(np.float32)


def uniform_scores(grids: Sequence[tuple[int, int]]) -> NDArray[np.float32]:
    """Scores whose best k tokens lie evenly over the cameras, and over each camera's image, for every k.

    Patches are ranked by a low-discrepancy order of their row and column (bit reversal), cameras take turns.

    Args:
        grids: (rows, columns) of patches per camera, in prompt order.

    Returns:
        [V] float32 scores in raster order per camera; higher is kept first.
    """
    ranks: list[NDArray[np.float64]] = []
    for camera, (rows, columns) in enumerate(grids):
        side = 1 << (max(rows, columns, 2) - 1).bit_length()
        row, column = np.divmod(np.arange(rows * columns), columns)
        # Quadtree order: each further bit of (row, column) halves the spacing of the patches ranked so far.
        key = np.zeros(rows * columns, dtype=np.int64)
        bit = 1
        while bit < side:
            down, right = (row & bit) // bit, (column & bit) // bit
            key = 4 * key + 2 * (down ^ right) + down
            bit <<= 1
        place = np.empty(rows * columns)
        place[np.argsort(key, kind="stable")] = np.arange(rows * columns)
        # Shares of the camera's own tokens, so that cameras of unequal size thin out alike.
        ranks.append((place + (camera + 1) / (len(grids) + 1)) / (rows * columns))
    return (1.0 - np.concatenate(ranks)).astype(np.float32)
