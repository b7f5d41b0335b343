"""Corners of operators where torch and ONNX part by default, against ONNX's own reference."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from onnx import helper
from onnx.reference import ReferenceEvaluator

from engines.torch_operators import OPERATORS, PARAMETERS

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4) - 11
TIES = np.array([3.0, 1.0, 3.0, 2.0, 1.0, 3.0], dtype=np.float32)
MAXIMUM = np.iinfo(np.int64).max

CASES = {
    "TopK gives the lower index at ties": ("TopK", [TIES, [4]], {}),
    "TopK of the smallest": ("TopK", [TIES, [5]], {"largest": 0}),
    "ArgMin gives the first at ties": ("ArgMin", [np.stack([TIES, TIES[::-1]])], {"axis": 1, "keepdims": 0}),
    "Gather counts from the end": ("Gather", [X, np.array([[-1, 0], [1, -3]])], {"axis": 1}),
    "Gather one row": ("Gather", [X, np.array(2)], {"axis": -1}),
    "Slice beyond the end": ("Slice", [X, [1], [MAXIMUM], [2], [2]], {}),
    "Slice from far before the start": ("Slice", [X, [-MAXIMUM, 1], [2, -1], [1, 2]], {}),
    "Reshape keeps with 0": ("Reshape", [X, [0, -1]], {}),
    "Expand in both directions": ("Expand", [X[:, :1], [2, 1]], {}),
    "Squeeze guesses": ("Squeeze", [X[:1, :, :1]], {}),
    "Unsqueeze at both ends": ("Unsqueeze", [X, [-1, 0]], {}),
    "Shape in part": ("Shape", [X], {"start": -2, "end": -1}),
    "ReduceSum over all": ("ReduceSum", [X], {"keepdims": 0}),
    "ReduceMax of some axes": ("ReduceMax", [X, [-1, 0]], {"keepdims": 1}),
    "ReduceMean over none": ("ReduceMean", [X, []], {"noop_with_empty_axes": 1}),
    "Div of integers truncates": ("Div", [np.array([-7, 7]), np.array([2, 2])], {}),
    "Pow keeps the type of its base": ("Pow", [np.abs(X) + 1, np.array(2, dtype=np.int64)], {}),
    "Clip with one end": ("Clip", [X, np.array(-2, dtype=np.float32)], {}),
    "Cast to whole numbers": ("Cast", [X / 3], {"to": onnx.TensorProto.INT64}),
    "Max of three": ("Max", [X, -X, X * 0 + 2], {}),
    "Gemm with everything": (
        "Gemm",
        [X[0], X[1, :, :3] / 4, X[0, 1, :3]],
        {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0},
    ),
    "Gemm with nothing": ("Gemm", [X[0], X[1].T.copy()], {}),
    "Split in unequal parts": ("Split", [X, [1, 2]], {"axis": 1}),
    "Split in parts of a size": ("Split", [X], {"axis": 1, "num_outputs": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_operators_do_what_onnx_defines(case):
    operator, inputs, attributes = CASES[case]
    names = [f"in_{index}" for index in range(len(inputs))]
    arrays = [np.array(value, dtype=np.int64) if isinstance(value, list) else value for value in inputs]
    outputs = ["first", "second"] if operator in ("TopK", "Split") else ["out"]
    graph = helper.make_graph(
        [helper.make_node(operator, names, outputs, **attributes)],
        "one",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in zip(names, arrays, strict=True)
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    wanted = ReferenceEvaluator(model).run(None, dict(zip(names, arrays, strict=True)))
    parameters = PARAMETERS.get(operator, ())
    found = OPERATORS[operator](
        *[
            array.reshape(-1).tolist() if index in parameters else torch.from_numpy(np.array(array))
            for index, array in enumerate(arrays)
        ],
        **attributes,
    )
    for result, expected in zip(found if isinstance(found, tuple) else (found,), wanted, strict=True):
        assert result.numpy().dtype == expected.dtype and result.shape == expected.shape
        assert np.allclose(result.numpy(), expected)
