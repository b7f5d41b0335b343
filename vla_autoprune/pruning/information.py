"""Complexity of a frame: the information that visual tokens and text rows share through attention."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vla_autoprune.frame import FloatArray

REFERENCE_EPSILON = 1e-6
"""The published absolute constant, used twice: under the quotient and as the quotient's floor."""

TINY_PROBABILITY = 1e-30
"""Probabilities are raised to this inside logarithms only; smaller ones contribute nothing in float32."""

Form = Literal["reference", "calibrated"]


def reference_information(attention: FloatArray) -> FloatArray:
    """Information of each head as published, its absolute epsilon included.

    The quotient's denominator is about mass / (V T) + 1e-6. From some 100 000 text-visual pairs on, the
    epsilon outweighs the quantity, and the result falls with the length of the prompt, below zero
    (docs/pruning.md).

    Args:
        attention: [H, T, V] probabilities of the text rows on the visual columns; the arithmetic keeps their
            type.

    Returns:
        [H] bits.

    Raises:
        ValueError: attention is not [H, T, V] with T and V of at least 1.

    Source: arXiv 2509.23931 and its published code.
    """
    _check_attention(attention)
    rows = attention.dtype.type(attention.shape[1])
    epsilon = attention.dtype.type(REFERENCE_EPSILON)
    joint = attention / rows
    marginal = joint.sum(axis=1, keepdims=True)
    quotient = np.maximum(joint / (marginal / rows + epsilon), epsilon)
    return (joint * np.log2(quotient)).sum(axis=(1, 2))


def calibrated_information(attention: FloatArray, row_weight: FloatArray | None = None) -> FloatArray:
    """Information of each head without an absolute epsilon: the divergence of the rows from their mean.

    I = mean over rows t of sum over v of A[t, v] log2(A[t, v] / mean_t A[t, v]). The logarithms are clamped,
    not the denominator, so the value depends on neither T nor V; it is never negative (log-sum inequality),
    and zero for one row or equal rows. Rows are *not* divided by their sum: a row that hardly looks at the
    images counts little, so the result is at most the visual attention mass times log2(T).

    Args:
        attention: [H, T, V] probabilities of the text rows on the visual columns.
        row_weight: [T] weights, 0 for padding; None weighs all rows equally.

    Returns:
        [H] bits, float64.

    Raises:
        ValueError: attention is not [H, T, V], or the weights are negative, all zero or of another length.

    Source: corrected form of arXiv 2509.23931.
    """
    _check_attention(attention)
    exact = attention.astype(np.float64)
    weight = _row_shares(row_weight, exact.shape[1])
    marginal = np.einsum("t,htv->hv", weight, exact)[:, None, :]
    log_ratio = np.log2(np.maximum(exact, TINY_PROBABILITY)) - np.log2(np.maximum(marginal, TINY_PROBABILITY))
    return np.einsum("t,htv->h", weight, exact * log_ratio)


def information(
    attention: FloatArray, form: Form = "calibrated", row_weight: FloatArray | None = None
) -> float:
    """Complexity of a frame: one number from all heads.

    Args:
        attention: [H, T, V] probabilities of the text rows on the visual columns.
        form: "reference" sums the heads of the published measure; "calibrated" averages those of the
            corrected one, so models with different head counts share a scale.
        row_weight: [T] weights, 0 for padding. The published code knows no padding: in the reference form
            rows of weight 0 are left out and the others count fully.

    Returns:
        Bits.

    Raises:
        ValueError: shapes or weights do not fit.
    """
    if form == "calibrated":
        return float(calibrated_information(attention, row_weight).mean())
    _check_attention(attention)
    valid = _row_shares(row_weight, attention.shape[1]) > 0
    return float(reference_information(attention[:, valid]).sum())


def _check_attention(attention: FloatArray) -> None:
    if attention.ndim != 3 or 0 in attention.shape:
        raise ValueError(
            f"attention has shape {attention.shape}; expected [heads, text rows, visual tokens], none of "
            "them 0"
        )


def _row_shares(row_weight: FloatArray | None, rows: int) -> NDArray[np.float64]:
    if row_weight is None:
        return np.full(rows, 1.0 / rows)
    weight = np.asarray(row_weight, dtype=np.float64)
    if weight.shape != (rows,) or weight.min() < 0 or not weight.sum() > 0:
        raise ValueError(f"row weights {weight.tolist()} must be {rows} values >= 0, not all of them 0")
    return weight / weight.sum()
