"""ONNX operators as torch functions: those that exported graphs use, from operator set 18 on.

Inputs are positional, attributes are keywords with ONNX's names and defaults. Inputs that `PARAMETERS` lists
are plain integers, because a shape that depended on data could not be static.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Operator = Callable[..., Any]

DTYPES: Mapping[int, torch.dtype] = {
    1: torch.float32,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
"""From the numbers of `onnx.TensorProto.DataType`."""

PARAMETERS: Mapping[str, tuple[int, ...]] = {
    "Expand": (1,),
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
    **{f"Reduce{kind}": (1,) for kind in ("Max", "Mean", "Min", "Sum")},
}
"""Inputs, by position, that decide about shapes."""


def _arg_min(data: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Of equal values the first, which `torch.argmin` does not promise."""
    _require("ArgMin", select_last_index=(select_last_index, 0))
    size = data.shape[axis]
    index = torch.arange(size, device=data.device).reshape([-1] + [1] * (data.ndim - 1 - axis % data.ndim))
    smallest = data == data.amin(dim=axis, keepdim=True)
    return torch.where(smallest, index, size - 1).amin(dim=axis, keepdim=bool(keepdims))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    qk_matmul_output_mode: int = 0,
    softmax_precision: int = 1,  # torch's kernels weigh half precision in float32 anyway
) -> Tensor:
    _require("Attention", softcap=(softcap, 0.0), qk_matmul_output_mode=(qk_matmul_output_mode, 0))
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=bool(is_causal),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _clip(data: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return data.clamp(low, high)


def _conv(
    data: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_shape: Sequence[int] = (),
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    group: int = 1,
    auto_pad: bytes = b"NOTSET",
) -> Tensor:
    _require("Conv", auto_pad=(auto_pad, b"NOTSET"))
    axes = weight.ndim - 2
    ones, pads = [1] * axes, list(pads or [0] * (2 * axes))
    _require("Conv", pads=(pads[axes:], pads[:axes]))
    convolve = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[axes]
    # On a GPU torch rounds the factors of convolutions to TF32 unless it is told not to.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return convolve(data, weight, bias, strides or ones, pads[:axes], dilations or ones, group)


def _div(left: Tensor, right: Tensor) -> Tensor:
    return torch.div(left, right, rounding_mode=None if left.is_floating_point() else "trunc")


def _expand(data: Tensor, shape: list[int]) -> Tensor:
    return data.expand(torch.broadcast_shapes(data.shape, shape))


def _gather(data: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    axis %= data.ndim
    flat = indices.reshape(-1)
    found = data.index_select(axis, torch.where(flat < 0, flat + data.shape[axis], flat))
    return found.reshape(data.shape[:axis] + indices.shape + data.shape[axis + 1 :])


def _gelu(data: Tensor, *, approximate: bytes = b"none") -> Tensor:
    return functional.gelu(data, approximate=approximate.decode())


def _layer_normalization(
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Tensor:
    _require("LayerNormalization", stash_type=(stash_type, 1))
    return functional.layer_norm(data, data.shape[axis:], scale, bias, epsilon)


def _mat_mul(left: Tensor, right: Tensor) -> Tensor:
    """On a CPU float16 goes through float32: torch adds products up in it anyway, a hundred times slower."""
    if left.dtype == torch.float16 and left.device.type == "cpu":
        return torch.matmul(left.float(), right.float()).half()
    return torch.matmul(left, right)


def _range(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _reduce(reduce: Callable[..., Tensor]) -> Operator:
    def operator(
        data: Tensor, axes: list[int] | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> Tensor:
        if not axes and noop_with_empty_axes:
            return data
        return reduce(data, dim=axes or list(range(data.ndim)), keepdim=bool(keepdims))

    return operator


def _reshape(data: Tensor, shape: list[int], *, allowzero: int = 0) -> Tensor:
    return data.reshape(
        [data.shape[axis] if size == 0 and not allowzero else size for axis, size in enumerate(shape)]
    )


def _rms_normalization(
    data: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    _require("RMSNormalization", stash_type=(stash_type, 1))
    return functional.rms_norm(data, data.shape[axis:], scale, epsilon)


def _shape(data: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(list(data.shape)[start:end], dtype=torch.int64)


def _slice(
    data: Tensor,
    starts: list[int],
    ends: list[int],
    axes: list[int] | None = None,
    steps: list[int] | None = None,
) -> Tensor:
    window = [slice(None)] * data.ndim
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        step = steps[index] if steps else 1
        if step < 1:
            raise NotImplementedError(f"Slice with step {step}")
        axis = axes[index] if axes else index
        window[axis] = slice(*slice(start, end, step).indices(data.shape[axis]))
    return data[tuple(window)]


def _squeeze(data: Tensor, axes: list[int] | None = None) -> Tensor:
    return data.squeeze() if axes is None else data.squeeze(axes)


def _top_k(
    data: Tensor, count: list[int], *, axis: int = -1, largest: int = 1, sorted: int = 1
) -> tuple[Tensor, Tensor]:
    """Of equal values the one of lower index comes first, which `torch.topk` does not promise."""
    values, indices = data.sort(dim=axis, descending=bool(largest), stable=True)
    return values.narrow(axis, 0, count[0]), indices.narrow(axis, 0, count[0])


def _unsqueeze(data: Tensor, axes: list[int]) -> Tensor:
    rank = data.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        data = data.unsqueeze(axis)
    return data


def _require(operator: str, **given: tuple[Any, Any]) -> None:
    for name, (value, allowed) in given.items():
        if value != allowed:
            raise NotImplementedError(f"{operator} with {name} {value}, only {allowed} is known")


def _gemm(
    left: Tensor,
    right: Tensor,
    added: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    product = alpha * _mat_mul(left.T if transA else left, right.T if transB else right)
    return product if added is None else product + beta * added


def _split(
    data: Tensor, sizes: Sequence[int] | None = None, *, axis: int = 0, num_outputs: int = 1
) -> Tensor | tuple[Tensor, ...]:
    """A tuple of parts; of one part, the part."""
    parts = torch.split(data, list(sizes) if sizes else -(-data.shape[axis] // num_outputs), dim=axis)
    return parts if len(parts) > 1 else parts[0]


OPERATORS: Mapping[str, Operator] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "ArgMin": _arg_min,
    "Attention": _attention,
    "Cast": lambda data, *, to, saturate=1: data.to(DTYPES[to]),
    "Clip": _clip,
    "Concat": lambda *parts, axis: torch.cat(parts, dim=axis),
    "Conv": _conv,
    "Cos": torch.cos,
    "Div": _div,
    "Einsum": lambda *parts, equation: torch.einsum(equation.decode(), *parts),
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Expand": _expand,
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Identity": lambda data: data,
    "IsNaN": torch.isnan,
    "LayerNormalization": _layer_normalization,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "MatMul": _mat_mul,
    "Max": lambda first, *others: _fold(torch.maximum, first, others),
    "Min": lambda first, *others: _fold(torch.minimum, first, others),
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "Pow": lambda base, exponent: torch.pow(base, exponent).to(base.dtype),
    "RMSNormalization": _rms_normalization,
    "Range": _range,
    "Reciprocal": torch.reciprocal,
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceSum": _reduce(torch.sum),
    "Reshape": _reshape,
    "Shape": _shape,
    "Sigmoid": torch.sigmoid,
    "Sin": torch.sin,
    "Slice": _slice,
    "Softmax": lambda data, *, axis=-1: data.softmax(dim=axis),
    "Split": _split,
    "Sqrt": torch.sqrt,
    "Squeeze": _squeeze,
    "Sub": torch.sub,
    "Tanh": torch.tanh,
    "TopK": _top_k,
    "Transpose": lambda data, *, perm: data.permute(perm),
    "Unsqueeze": _unsqueeze,
    "Where": torch.where,
}
"""By ONNX name, in the default domain."""


def _fold(operator: Operator, first: Tensor, others: Sequence[Tensor]) -> Tensor:
    for other in others:
        first = operator(first, other)
    return first
