"""From a transformers model and a recipe to a bundle of ONNX graphs with one weights file."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from vla_autoprune import __version__, bundle, contract
from vla_autoprune.errors import BundleError, InputError
from vla_autoprune.export.pinning import require_static
from vla_autoprune.export.selection import Selection
from vla_autoprune.export.stages import Head, Stage, staged_attention
from vla_autoprune.export.vision import Vision
from vla_autoprune.fingerprint import source_hash
from vla_autoprune.models.adapter import StageModel
from vla_autoprune.recipe import PruningRecipe, write_recipe

if TYPE_CHECKING:
    import onnx
    import onnx_ir

    from vla_autoprune.models.checkpoint import Vla

OPSETS = (18, 23)
"""18 for old TensorRT parsers: everything decomposed. 23 keeps Attention and RMSNormalization whole."""

_INLINE_BYTES = 4096
"""Smaller constants stay inside their graph."""

_PAGE_BYTES = 4096
"""External tensors start on pages, so that runtimes can map them."""

_FORBIDDEN = ("NonZero", "ScatterND", "ScatterElements", "If", "Loop", "Scan")
"""Operators of data-dependent shape or control flow: a static engine cannot hold them."""

_EXAMPLE = {"n": 23, "t": 3, "v": 14, "s": 5, "x": 9, "k": 4, "r": 7, "g": 2}
"""Sizes at tracing; all different, so that no two symbols are taken for one."""

_TABLE_ROWS = 4096
"""Rows of a table that are converted at a time."""

Check = Callable[[Path], None]


def export_bundle(
    model: StageModel,
    recipe: PruningRecipe,
    out: Path,
    texts: Mapping[str, str],
    *,
    opset: int = 23,
    precision: contract.Precision = "fp32",
    check: Check | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> bundle.Bundle:
    """Export every graph of a recipe and put the bundle together. It appears under its name when it is whole.

    Graph by graph: a model whose weights stay in files is never in memory as a whole.

    Args:
        model: vision tower and decoder.
        recipe: made for these weights.
        out: directory to make; an older bundle there is replaced.
        texts: name in the bundle to content: tokenizer, actions, preprocessing; see `text_files`.
        opset: 18 or 23.
        precision: what weights are stored and layers computed in.
        check: called with the finished folder before it gets its name, may record samples there; what it
            raises, a failed parity above all, ends the export without a bundle.
        progress: called with what is done next, and how far along that is.

    Returns:
        The bundle, loaded and checked.

    Raises:
        InputError: the opset is not offered, or not with this precision; `out` is or holds the working
            directory, or holds something that is not a bundle; a weight is too large for the precision.
        RecipeError: the recipe is for another model, or cannot be exported.
        OSError: the disk is full, or the place cannot be written; it names file or directory.
    """
    if opset not in OPSETS:
        raise InputError(f"opset is {opset}; allowed: {', '.join(map(str, OPSETS))}")
    if precision == "bf16" and opset == OPSETS[0]:
        raise InputError(
            f"precision bf16 needs opset {OPSETS[1]}: opset {opset} has no bfloat16 Conv for the vision "
            "tower; export with --precision fp16 for older parsers"
        )
    place = place_of(out)
    recipe.require_model(model.shape(recipe.model.id).weights_sha256, "the model to export")
    say = progress or (lambda what, done, total: None)
    graphs = contract.graphs(recipe, model.embedding.shape[0], precision)

    _clear_leftovers(place)
    partial = _beside(place, "new")
    partial.mkdir(parents=True)
    try:
        with WeightsFile(partial / bundle.WEIGHTS) as weights:
            for index, graph in enumerate(graphs):
                say(graph.name, index, len(graphs) + 2)
                proto = trace(model, recipe, graph, opset, precision, weights)
                require_static(proto, graph)
                (partial / f"{graph.name}.onnx").write_bytes(proto.SerializeToString(deterministic=True))
        say("tables", len(graphs), len(graphs) + 2)
        _write_table(partial / bundle.EMBEDDING, model.embedding)
        cos, sin = model.rotary(recipe.layout, recipe.layout.length + recipe.decode_length)
        _write_table(partial / bundle.ROTARY, torch.stack([cos, sin], dim=1))
        write_recipe(recipe, partial / bundle.RECIPE)
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        options = bundle.ExportOptions(opset=opset, precision=precision, versions=tool_versions())
        bundle.write_manifest(partial, recipe, graphs, options)
        if check is not None:
            say("parity", len(graphs) + 1, len(graphs) + 2)
            check(partial)
            bundle.write_manifest(partial, recipe, graphs, options)
        _replace_directory(partial, place)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # of a full disk
            error.filename = str(place)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say("done", len(graphs) + 2, len(graphs) + 2)
    return bundle.load_bundle(out)


def text_files(vla: Vla) -> dict[str, str]:
    """What a bundle needs of a driving VLA beside its graphs: name in the bundle to content."""
    return {
        **vla.prompt.files(),
        bundle.ACTIONS: vla.codec.model_dump_json(indent=1) + "\n",
        bundle.PREPROCESS: vla.preprocessing.model_dump_json(indent=1) + "\n",
    }


def trace(
    model: StageModel,
    recipe: PruningRecipe,
    graph: contract.Graph,
    opset: int,
    precision: contract.Precision = "fp32",
    weights: WeightsFile | None = None,
) -> onnx.ModelProto:
    """Export one graph, with the contract's tensor names and symbols.

    Args:
        model: vision tower and decoder.
        recipe: the recipe.
        graph: which graph, of that precision.
        opset: ONNX operator set.
        precision: what weights are stored and layers computed in.
        weights: takes the graph's weights; without, they stay inside.

    Returns:
        The model.

    Raises:
        BundleError: the exporter changed the graph's tensors, or used operators no static engine can hold.
        InputError: a weight is too large for the type.
    """
    module = _module(model, recipe, graph)
    arguments, dimensions = _arguments(graph)
    dtype = getattr(torch, contract.COMPUTED_IN[precision])
    with (
        _quiet_exporter(),
        model.loaded(module, dtype),
        model.decoder_attention(staged_attention),
        torch.no_grad(),
    ):
        program = torch.onnx.export(
            module.eval(),
            (),
            kwargs=arguments,
            dynamic_shapes=dimensions,
            input_names=_flat_names(graph, arguments),
            output_names=[tensor.name for tensor in graph.outputs],
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        if weights is not None:
            weights.take(program.model)
        proto = program.model_proto
    # The exporter's objects refer to each other in circles; the next graph needs their memory.
    del program, module
    gc.collect()
    _strip(proto)
    _write_out_squeezed_axes(proto)
    _keep_softmax_in_float32(proto)
    _apply_contract(proto, graph)
    return proto


class WeightsFile:
    """The one external-data file of a bundle: equal tensors of all graphs are stored once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offsets: dict[str, int] = {}

    def __enter__(self) -> WeightsFile:
        self.file = self.path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def take(self, model: onnx_ir.Model) -> None:
        """Move a graph's weights into this file, one at a time: no copy of them all is made."""
        import onnx_ir

        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < _INLINE_BYTES:
                continue
            raw = tensor.tobytes()
            digest = hashlib.sha256(raw).hexdigest()
            if digest not in self.offsets:
                self.file.write(b"\0" * (-self.file.tell() % _PAGE_BYTES))
                self.offsets[digest] = self.file.tell()
                self.file.write(raw)
            value.const_value = onnx_ir.ExternalTensor(
                self.path.name,
                self.offsets[digest],
                len(raw),
                tensor.dtype,
                shape=onnx_ir.Shape(tensor.shape.numpy()),
                name=name,
                base_dir=self.path.parent,
            )


def _write_table(path: Path, table: Tensor) -> None:
    """Write an array file of float32, some rows at a time."""
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": tuple(table.shape)}
        np.lib.format.write_array_header_1_0(file, header)
        for rows in table.split(_TABLE_ROWS):
            file.write(np.ascontiguousarray(rows.float().numpy()).data)


def _module(model: StageModel, recipe: PruningRecipe, graph: contract.Graph) -> nn.Module:
    if graph.name == contract.VISION:
        return Vision(model, recipe)
    if graph.name == contract.HEAD:
        return Head(model)
    if graph.name in (contract.SELECT, contract.SELECT_MERGE):
        return Selection(graph.name == contract.SELECT_MERGE, recipe.positions == "compact")
    names = [contract.stage_name(index) for index in range(len(recipe.stages))]
    return Stage(model, recipe, recipe.stages[names.index(graph.name)])


def _arguments(graph: contract.Graph) -> tuple[dict[str, Any], dict[str, Any]]:
    """Example values and symbols of a module's arguments; the KV buffers go together into `past`."""
    symbol = {name: torch.export.Dim(name) for name in _EXAMPLE}
    arguments: dict[str, Any] = {}
    dimensions: dict[str, Any] = {}
    for tensor in graph.inputs:
        value = torch.zeros(tensor.pinned(_EXAMPLE), dtype=getattr(torch, tensor.dtype))
        dims = {axis: symbol[size] for axis, size in enumerate(tensor.shape) if isinstance(size, str)}
        if tensor.name.startswith("past_") and tensor.name != "past_length":
            arguments.setdefault("past", []).append(value)
            dimensions.setdefault("past", []).append(dims)
        else:
            arguments[tensor.name] = value
            dimensions[tensor.name] = dims
    return arguments, dimensions


def _flat_names(graph: contract.Graph, arguments: dict[str, Any]) -> list[str]:
    past = [tensor.name for tensor in graph.inputs if tensor.name[:7] in ("past_k_", "past_v_")]
    return [flat for name in arguments for flat in (past if name == "past" else [name])]


def _strip(proto: onnx.ModelProto) -> None:
    """Drop what the exporter notes about its own run (source paths): equal exports are equal bytes."""
    proto.doc_string = ""
    proto.producer_name, proto.producer_version = "vla_autoprune", ""
    del proto.metadata_props[:]
    graph = proto.graph
    for item in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]
    del graph.value_info[:]
    for function in proto.functions:
        function.doc_string = ""
        del function.metadata_props[:]
        for node in function.node:
            node.doc_string = ""
            del node.metadata_props[:]


def _write_out_squeezed_axes(proto: onnx.ModelProto) -> None:
    """Give every size that is read off a shape its axis: TensorRT's parsers before 11.5 do not guess it."""
    from onnx import helper, numpy_helper

    sizes = set()
    for node in proto.graph.node:
        window = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        if node.op_type == "Shape" and window.get("end", 0) - window.get("start", 0) == 1:
            sizes.add(node.output[0])
    guessed = [
        node
        for node in proto.graph.node
        if node.op_type == "Squeeze" and len(node.input) == 1 and node.input[0] in sizes
    ]
    if guessed:
        axes = numpy_helper.from_array(np.zeros(1, dtype=np.int64), "axes_of_a_size")
        proto.graph.initializer.append(axes)
        for node in guessed:
            node.input.append(axes.name)


def _keep_softmax_in_float32(proto: onnx.ModelProto) -> None:
    """Attention of half precision weighs in float32: operators that would not are told, or given casts."""
    from onnx import TensorProto, helper, shape_inference

    half = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    inferred = shape_inference.infer_shapes(proto).graph
    types = {info.name: info.type.tensor_type.elem_type for info in (*inferred.value_info, *inferred.input)}
    nodes = []
    for node in proto.graph.node:
        kind = types.get(node.input[0]) if node.op_type in ("Softmax", "Attention") else None
        if kind not in half:
            nodes.append(node)
        elif node.op_type == "Attention":
            node.attribute.append(helper.make_attribute("softmax_precision", TensorProto.FLOAT))
            nodes.append(node)
        else:
            given, made = node.input[0], node.output[0]
            node.input[0], node.output[0] = f"{made}_of_float32", f"{made}_in_float32"
            nodes += [
                helper.make_node("Cast", [given], [node.input[0]], to=TensorProto.FLOAT),
                node,
                helper.make_node("Cast", [node.output[0]], [made], to=kind),
            ]
    made_anew = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(made_anew)


def _apply_contract(proto: onnx.ModelProto, graph: contract.Graph) -> None:
    """Write the contract's symbols on the graph's tensors, after checking that they are the same tensors."""
    used = {node.op_type for node in proto.graph.node} | {n.op_type for f in proto.functions for n in f.node}
    found = sorted(used.intersection(_FORBIDDEN))
    if found:
        raise BundleError(
            f"{graph.name}: the exporter used {', '.join(found)}, which no static engine can hold"
        )
    for side, tensors, infos in (
        ("inputs", graph.inputs, proto.graph.input),
        ("outputs", graph.outputs, proto.graph.output),
    ):
        by_name = {info.name: info for info in infos}
        if set(by_name) != {tensor.name for tensor in tensors}:
            raise BundleError(
                f"{graph.name}: exported {side} are {sorted(by_name)}, the contract has "
                f"{sorted(tensor.name for tensor in tensors)}"
            )
        for tensor in tensors:
            dims = by_name[tensor.name].type.tensor_type.shape.dim
            for axis, (dim, size) in enumerate(zip(dims, tensor.shape, strict=True)):
                if isinstance(size, int) != bool(dim.dim_value) or (dim.dim_value and dim.dim_value != size):
                    raise BundleError(
                        f"{graph.name}: axis {axis} of {tensor.name} is {dim.dim_param or dim.dim_value}, "
                        f"the contract has {size}"
                    )
                if isinstance(size, str):
                    dim.dim_param = size


def place_of(out: Path) -> Path:
    """Where a bundle goes, as an absolute path without links.

    Raises:
        InputError: it is or holds the working directory, or something there that is no bundle would be lost.
    """
    place = out.resolve()
    if Path.cwd().is_relative_to(place):
        raise InputError(
            f"{out} is or holds the working directory; name a directory of its own for the bundle"
        )
    if place.exists() and not _may_be_replaced(place):
        raise InputError(f"{out} exists and is not a bundle; name another directory or remove it")
    return place


def _may_be_replaced(place: Path) -> bool:
    """Whether a path is an empty directory or a bundle, damaged or of any version."""
    if not place.is_dir():
        return False
    manifest = place / bundle.MANIFEST
    return b'"bundle_version"' in manifest.read_bytes() if manifest.is_file() else not any(place.iterdir())


def _beside(place: Path, kind: str) -> Path:
    """A hidden name of this process in the same folder: "new" is being made, "old" is being replaced."""
    return place.with_name(f".{place.name}.{kind}-{os.getpid()}")


def _clear_leftovers(place: Path) -> None:
    """Remove what killed exports to the same place left; a bundle they had set aside gets its name back."""
    pattern = re.compile(re.escape(f".{place.name}.") + r"(new|old)-(\d{1,9})")
    for path in sorted(place.parent.iterdir()) if place.parent.is_dir() else ():
        found = pattern.fullmatch(path.name)
        if found is None or _runs_elsewhere(int(found[2])):
            continue
        if found[1] == "old" and not place.exists():
            path.replace(place)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _runs_elsewhere(process: int) -> bool:
    if process == os.getpid():  # containers give every run the same id
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, and belongs to another user
        pass
    return True


def _replace_directory(partial: Path, place: Path) -> None:
    if not place.exists():
        partial.replace(place)
        return
    old = _beside(place, "old")
    place.replace(old)
    try:
        partial.replace(place)
    except BaseException:
        old.replace(place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def tool_versions() -> dict[str, str]:
    """Versions that decide on an export's bytes, the hash of the exporting sources among them."""
    import onnx
    import onnxscript
    import transformers

    here = Path(__file__).parent
    return {
        "vla_autoprune": __version__,
        "sources": source_hash(
            [
                here,
                here.parent / "contract.py",
                *(here.parent / "models" / f"{name}.py" for name in ("adapter", "stored_weights", "qwen_vl")),
            ]
        ),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnx": onnx.__version__,
        "onnxscript": onnxscript.__version__,
    }


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter warns about every packaged operator set it cannot find; none of them is used here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
