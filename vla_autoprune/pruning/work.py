"""What a schedule costs: floating-point operations of the prefill, the paper's own counter, KV cache size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class DecoderShape(Protocol):
    """The sizes of a decoder that its cost depends on."""

    @property
    def hidden(self) -> int:
        """Width d of the hidden states."""

    @property
    def heads(self) -> int:
        """Query heads."""

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""

    @property
    def head_dim(self) -> int:
        """Width of one head."""

    @property
    def ffn(self) -> int:
        """Width of the gated feed-forward."""


def layer_parameters(decoder: DecoderShape) -> int:
    """Weights of the matrix products of one decoder layer."""
    query_width, kv_width = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    return 2 * decoder.hidden * (query_width + kv_width) + 3 * decoder.hidden * decoder.ffn


def prefill_flops(decoder: DecoderShape, rows_into_layers: Sequence[int]) -> int:
    """Floating-point operations of the decoder layers for one prompt, a multiply and an add counted as two.

    Attention is causal (row i sees i + 1 keys) and keys and values are counted once per KV head. Norms,
    rotary embedding, scoring, vision tower and head are left out.

    Args:
        decoder: sizes of the decoder.
        rows_into_layers: [L] rows, text and visual, that enter each layer.

    Returns:
        FLOPs.
    """
    per_row = 2 * layer_parameters(decoder)
    query_width = decoder.heads * decoder.head_dim
    return sum(rows * per_row + 2 * query_width * rows * (rows + 1) for rows in rows_into_layers)


def decode_flops(decoder: DecoderShape, keys_of_layers: Sequence[int]) -> int:
    """Floating-point operations of the decoder layers for one more token, counted as in `prefill_flops`.

    Args:
        decoder: sizes of the decoder.
        keys_of_layers: [L] keys the token sees in each layer, its own included.

    Returns:
        FLOPs.
    """
    query_width = decoder.heads * decoder.head_dim
    return sum(2 * layer_parameters(decoder) + 4 * query_width * keys for keys in keys_of_layers)


def published_macs(decoder: DecoderShape, rows_into_layers: Sequence[int]) -> int:
    """The paper's own counter: multiply-accumulates with full attention and as many KV heads as query heads.

    Args:
        decoder: sizes of the decoder.
        rows_into_layers: [L] rows, text and visual, that enter each layer.

    Returns:
        Multiply-accumulates: the sum over layers of 4 n d^2 + 2 n^2 d + 3 n d m.

    Source: arXiv 2509.23931 and its published code.
    """
    hidden, ffn = decoder.hidden, decoder.ffn
    return sum(4 * n * hidden**2 + 2 * n**2 * hidden + 3 * n * hidden * ffn for n in rows_into_layers)


def kv_mib(decoder: DecoderShape, tokens_per_layer: Sequence[int], bytes_per_number: int = 4) -> float:
    """Size of the KV caches.

    Args:
        decoder: sizes of the decoder.
        tokens_per_layer: [L] tokens each layer's cache holds.
        bytes_per_number: 4 for float32.

    Returns:
        MiB of keys and values.
    """
    return sum(tokens_per_layer) * 2 * decoder.kv_heads * decoder.head_dim * bytes_per_number / 2**20
