"""A bundle's graphs read, and the proof that they are static: with a variant's values for its symbols, no
shape stays open."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vla_autoprune import contract
from vla_autoprune.bundle import Bundle
from vla_autoprune.errors import BundleError

if TYPE_CHECKING:
    import onnx


def read_graph(bundle: Bundle, name: str) -> onnx.ModelProto:
    """A graph of a bundle; its external weights are not read.

    Raises:
        BundleError: the file is no ONNX graph.
    """
    import onnx
    from google.protobuf.message import DecodeError

    path = bundle.graph_file(name)
    try:
        return onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise BundleError(
            f"{path} is not an ONNX graph ({error}); export the bundle anew with vla-autoprune export"
        ) from error


def pin(proto: onnx.ModelProto, graph: contract.Graph, variant: str) -> onnx.ModelProto:
    """A copy of a graph in one variant: inputs have their static shapes, what follows from them is folded.

    Args:
        proto: the graph; weights may be external, they are not read.
        graph: its tensors.
        variant: whose values the symbols get.

    Returns:
        The copy, with an inferred shape for every value.

    Raises:
        BundleError: inference contradicts the contract's output shapes; the message names graph and variant.
    """
    import onnx
    from onnxscript import optimizer

    symbols = graph.variants[variant]
    pinned = onnx.ModelProto()
    pinned.CopyFrom(proto)
    _weights_as_inputs(pinned)
    for info in (*pinned.graph.input, *pinned.graph.output):
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = symbols[dim.dim_param]
    try:
        # Shapes computed from shapes are folded first, as every runtime does; ONNX's own inference does not.
        optimizer.fold_constants(
            pinned, onnx_shape_inference=True, input_size_limit=1 << 30, output_size_limit=1 << 20
        )
        return onnx.shape_inference.infer_shapes(pinned, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise BundleError(f"{graph.name} ({variant}): shapes contradict the contract: {error}") from error


def _weights_as_inputs(proto: onnx.ModelProto) -> None:
    """Only the shapes of external weights matter, and folding must not look for their values."""
    from onnx import TensorProto, helper

    inline = []
    for tensor in proto.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            info = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            proto.graph.input.append(info)
        else:
            inline.append(tensor)
    kept = [TensorProto.FromString(tensor.SerializeToString()) for tensor in inline]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)


def open_dimensions(pinned: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the values of a pinned graph whose shape is not fully known; none, if the graph is static."""
    known = {
        info.name
        for info in (*pinned.graph.value_info, *pinned.graph.output, *pinned.graph.input)
        if info.type.tensor_type.HasField("shape")
        and all(dim.HasField("dim_value") for dim in info.type.tensor_type.shape.dim)
    }
    return tuple(name for node in pinned.graph.node for name in node.output if name and name not in known)


def require_static(proto: onnx.ModelProto, graph: contract.Graph) -> None:
    """Refuse a graph with a value of open shape; which are open is structural, so two variants stand for all.

    Raises:
        BundleError: a value's shape stays open; the message names it.
    """
    names = list(graph.variants)
    for variant in dict.fromkeys((names[0], names[-1])):
        still_open = open_dimensions(pin(proto, graph, variant))
        if still_open:
            raise BundleError(
                f"{graph.name} ({variant}): the shape of {', '.join(still_open[:5])} depends on more than "
                "the recipe's symbols; no static engine can hold it"
            )
