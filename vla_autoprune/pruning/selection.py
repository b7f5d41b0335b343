"""Which visual tokens survive: scores from attention, and the choice of the best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vla_autoprune.frame import FloatArray, IntArray

TEXT_SHARE = 0.3
"""Weight of the text's attention beside the vision tower's in the published cap after layer 0."""


def text_scores(
    attention: FloatArray, row_weight: FloatArray | None = None, reduction: Literal["mean", "max"] = "mean"
) -> FloatArray:
    """Score of each visual token: how much the text looks at it.

    Args:
        attention: [H, T, V] probabilities of the text rows on the visual columns.
        row_weight: [T] weights, 0 for padding; None weighs all rows equally. "max" only asks whether it is 0.
        reduction: over heads and rows; "mean" is the published form.

    Returns:
        [V] scores.

    Raises:
        ValueError: no row has a weight above 0, or the reduction is unknown.

    Source: arXiv 2509.23931 (mean over heads and text rows).
    """
    weight = np.ones(attention.shape[1]) if row_weight is None else np.asarray(row_weight, dtype=np.float64)
    if weight.shape != (attention.shape[1],) or not (weight > 0).any():
        raise ValueError(
            f"row weights {weight.tolist()} must be {attention.shape[1]} values, one of them above 0"
        )
    if reduction == "max":
        return attention[:, weight > 0].max(axis=(0, 1))
    if reduction != "mean":
        raise ValueError(f"reduction is {reduction!r}; allowed: mean, max")
    if row_weight is None:
        return attention.mean(axis=(0, 1))
    return np.einsum("t,htv->v", weight / weight.sum(), attention.astype(np.float64)) / attention.shape[0]


def reference_cap_scores(text: FloatArray, encoder: FloatArray, complexity_per_row: float) -> FloatArray:
    """The published score after layer 0: text attention scaled by the information, plus [CLS] attention.

    Args:
        text: [V] text scores of layer 0.
        encoder: [V] head-mean [CLS] attention of the vision tower.
        complexity_per_row: information of layer 0, heads summed, divided by the text rows (S0).

    Returns:
        [V] scores.
    """
    return text.dtype.type(TEXT_SHARE * complexity_per_row) * text + encoder


def fused_scores(text: FloatArray, encoder: FloatArray, encoder_weight: float) -> FloatArray:
    """The calibrated score at the first pruning point: both scores as shares of their sum.

    Args:
        text: [V] text scores, >= 0 and not all 0.
        encoder: [V] [CLS] attention of the vision tower, >= 0 and not all 0.
        encoder_weight: weight of the encoder's share.

    Returns:
        [V] scores.
    """
    return text / text.sum() + encoder_weight * encoder / encoder.sum()


def reference_kept_count(reference_count: int, fraction: float, current: int) -> int:
    """Tokens the published code keeps at a layer: in single precision, of the count after the cap less one.

    Args:
        reference_count: visual tokens after layer 0.
        fraction: the layer's keep fraction; may exceed 1.
        current: visual tokens that entered the layer.

    Returns:
        Tokens to keep, at most `current`.
    """
    return min(int(np.ceil(np.float32(reference_count - 1) * np.float32(fraction))), current)


def select_top(
    scores: FloatArray,
    count: int,
    camera_of_slot: IntArray | None = None,
    floors: Mapping[int, int] | None = None,
) -> NDArray[np.int64]:
    """The best slots, in slot order.

    Args:
        scores: [v] score of every slot.
        count: slots to keep, 0..v.
        camera_of_slot: [v] camera index of every slot; needed with `floors`.
        floors: camera index to the slots of it that are kept first, whatever the others score.

    Returns:
        [count] slots, ascending. Ties go to the lower slot.

    Raises:
        ValueError: count is out of range, scores are not finite, or the floors exceed the count.
    """
    if not 0 <= count <= len(scores):
        raise ValueError(f"cannot keep {count} of {len(scores)} visual tokens; allowed: 0..{len(scores)}")
    if not np.isfinite(scores).all():
        raise ValueError(f"score of visual slot {int(np.flatnonzero(~np.isfinite(scores))[0])} is not finite")
    order = np.argsort(-scores, kind="stable")
    if floors:
        if camera_of_slot is None:
            raise ValueError("camera floors need camera_of_slot, the camera index of every slot")
        reserved = [
            order[camera_of_slot[order] == camera][:floor] for camera, floor in sorted(floors.items())
        ]
        first = np.concatenate(reserved)
        if len(first) > count:
            raise ValueError(f"camera floors ask for {len(first)} visual tokens, the count is {count}")
        order = np.concatenate([first, order[~np.isin(order, first)]])
    return np.sort(order[:count])
