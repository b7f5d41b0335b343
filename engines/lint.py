"""Will TensorRT's parser take a bundle's graphs? Asked of its published tables, before a target is at hand.

Every graph is looked at as it is and with the shapes of every variant, that is, of every optimisation
profile. A clean report does not promise that the builder finds a kernel for every layer, nor that the engine
is fast: only the target can tell.

Source: `parser_operators.json` names where each entry comes from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

from vla_autoprune import contract
from vla_autoprune.bundle import WEIGHTS, Bundle
from vla_autoprune.errors import BundleError
from vla_autoprune.export.pinning import open_dimensions, pin, read_graph

if TYPE_CHECKING:
    import onnx

TargetName = Literal["jetpack6", "jetpack7", "rtx"]
Rule = Literal["opset", "operator", "control flow", "type", "constant", "static shape", "TopK", "weights"]


@dataclass(frozen=True)
class Target:
    """A platform that engines are built on.

    Attributes:
        name: as `--target` has it.
        tensorrt: oldest version to expect there.
        opset: what bundles for it are exported at.
        title: for people.
    """

    name: TargetName
    tensorrt: str
    opset: int
    title: str


TARGETS: Mapping[TargetName, Target] = {
    "jetpack6": Target("jetpack6", "10.3", 18, "Jetson Orin, JetPack 6"),
    "jetpack7": Target("jetpack7", "10.13", 18, "Jetson Thor, JetPack 7"),
    "rtx": Target("rtx", "11.2", 23, "RTX, TensorRT 11"),
}
"""Opset 23 keeps Attention and RMSNormalization whole; parsers know them from 10.14 and 10.15 on."""

_CONTROL_FLOW = ("If", "Loop", "Scan")
_DATA_DEPENDENT = ("Compress", "NonMaxSuppression", "NonZero", "Unique")
_CONSTANT_AXES = ("Reduce", "Squeeze", "Unsqueeze")
_SAME_TYPES = ("Pow", "RMSNormalization")
"""ONNX lets their inputs differ in type; a strongly typed network does not."""

_TYPE_NAMES = {
    1: "FP32",
    3: "INT8",
    6: "INT32",
    7: "INT64",
    9: "BOOL",
    10: "FP16",
    16: "BF16",
    17: "FP8",
    22: "INT4",
}
"""Numbers of `onnx.TensorProto.DataType` that values inside a network may have."""


@dataclass(frozen=True)
class Finding:
    """One thing a target would refuse.

    Attributes:
        target: which.
        graph: where.
        variant: the first it shows in; empty if it is in all.
        rule: what is broken.
        message: the node and the reason.
    """

    target: TargetName
    graph: str
    variant: str
    rule: Rule
    message: str


@dataclass(frozen=True)
class LintReport:
    """What was looked at and found.

    Attributes:
        targets: for which targets.
        graphs: how many.
        variants: in how many sets of static shapes, all graphs together.
        findings: what the targets would refuse.
    """

    targets: tuple[TargetName, ...]
    graphs: int
    variants: int
    findings: tuple[Finding, ...]

    def of(self, target: TargetName) -> tuple[Finding, ...]:
        """What one target would refuse."""
        return tuple(finding for finding in self.findings if finding.target == target)

    def to_json(self) -> str:
        """The report as text."""
        return json.dumps(asdict(self), indent=1) + "\n"


def lint_bundle(
    bundle: Bundle, targets: Sequence[TargetName], progress: Callable[[int, int], None] | None = None
) -> LintReport:
    """Check all graphs of a bundle in all variants.

    Args:
        bundle: a checked bundle.
        targets: where engines may be built.
        progress: called with variants done and to do.

    Returns:
        The report; without findings for a target, its parser takes every graph.

    Raises:
        BundleError: a file is no ONNX graph.
    """
    total = sum(len(graph.variants) for graph in bundle.graphs.values())
    size = (bundle.path / WEIGHTS).stat().st_size
    findings: list[Finding] = []
    done = 0
    for graph in bundle.graphs.values():
        findings += lint_graph(read_graph(bundle, graph.name), graph, targets, weights_bytes=size)
        done += len(graph.variants)
        if progress is not None:
            progress(done, total)
    return LintReport(tuple(targets), len(bundle.graphs), total, tuple(findings))


def lint_graph(
    proto: onnx.ModelProto,
    graph: contract.Graph,
    targets: Sequence[TargetName],
    *,
    weights_bytes: int | None = None,
) -> tuple[Finding, ...]:
    """Check one graph in all its variants. A finding that is the same in several is told once.

    Args:
        proto: the graph; external weights are not read.
        graph: its tensors and variants.
        targets: where an engine may be built.
        weights_bytes: size of the weights file, if external weights are to lie in it.

    Returns:
        What the targets would refuse.
    """
    found: dict[tuple[TargetName, Rule, str], Finding] = {}

    def note(target: TargetName, variant: str, faults: Iterable[tuple[Rule, str]]) -> None:
        for rule, message in faults:
            found.setdefault((target, rule, message), Finding(target, graph.name, variant, rule, message))

    for target in targets:
        note(target, "", _of_graph(proto, TARGETS[target]))
        note(target, "", _of_types(proto, TARGETS[target]))
        note(target, "", _of_weights(proto, weights_bytes))
    for variant in graph.variants:
        try:
            faults = list(_of_variant(pin(proto, graph, variant)))
        except (BundleError, RuntimeError) as error:
            faults = [("static shape", f"shape inference fails: {str(error).splitlines()[0]}")]
        for target in targets:
            note(target, variant, faults)
    return tuple(found.values())


def _of_graph(proto: onnx.ModelProto, target: Target) -> Iterator[tuple[Rule, str]]:
    """What shows without shapes: operators, their form, control flow."""
    from onnx import AttributeProto

    highest = _opset(target)
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx") and not 9 <= entry.version <= highest:
            yield (
                "opset",
                f"opset {entry.version}, the parser of TensorRT {target.tensorrt} knows 9 to {highest}; "
                f"export with --target {target.name}",
            )
    if proto.functions:
        yield "operator", f"model-local function {proto.functions[0].name}; export without functions"
    constants = {tensor.name for tensor in proto.graph.initializer}
    constants |= {name for node in proto.graph.node if node.op_type == "Constant" for name in node.output}
    for node in proto.graph.node:
        what = _called(node)
        holds_graph = any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute)
        if node.op_type in _CONTROL_FLOW or holds_graph:
            yield "control flow", f"{what}: a static engine has none"
        elif node.domain not in ("", "ai.onnx"):
            yield "operator", f"{what}: operators of domain {node.domain} need a plugin"
        elif node.op_type in _DATA_DEPENDENT:
            yield "static shape", f"{what}: its output's size depends on values"
        elif _types_of(node.op_type, target) is None:
            first = next(iter(_tables()["operators"].get(node.op_type, {})), None)
            known = f"known from {first} on" if first else "in none of its tables"
            yield (
                "operator",
                f"{what}: not in the table of TensorRT {target.tensorrt}, {known}; export with "
                f"--target {target.name}",
            )
        if node.op_type.startswith(_CONSTANT_AXES) and len(node.input) > 1 and node.input[1] not in constants:
            yield "constant", f"{what}: axes are computed, the parser wants an initializer"
        since = _tables()["squeeze_without_axes"]
        if node.op_type == "Squeeze" and len(node.input) == 1 and _number(target.tensorrt) < _number(since):
            yield "constant", f"{what}: axes are left out, parsers before TensorRT {since} want them"
        if node.op_type == "TopK" and any(a.name == "sorted" and a.i == 0 for a in node.attribute):
            yield "TopK", f"{what}: sorted is 0, the parser wants 1"
        yield from _of_fused(node)


def _of_fused(node: onnx.NodeProto) -> Iterator[tuple[Rule, str]]:
    """Parts of whole attention and normalisation that parsers do not take."""
    if node.op_type == "LayerNormalization" and any(node.output[1:]):
        yield "operator", f"{_called(node)}: has more outputs than Y"
    if node.op_type != "Attention":
        return
    if any(node.input[4:]) or any(node.output[1:]):
        yield "operator", f"{_called(node)}: past, present and the product of queries and keys are not taken"
    for attribute in node.attribute:
        if attribute.name in ("softcap", "qk_matmul_output_mode") and (attribute.f or attribute.i):
            yield "operator", f"{_called(node)}: attribute {attribute.name} is not taken"


def _of_weights(proto: onnx.ModelProto, size: int | None) -> Iterator[tuple[Rule, str]]:
    """External weights lie in the bundle's one file, and end before it does."""
    for tensor in proto.graph.initializer:
        entry = {item.key: item.value for item in tensor.external_data}
        if not entry:
            continue
        if entry.get("location") != WEIGHTS:
            yield "weights", f"{tensor.name} lies in {entry.get('location')}, not in {WEIGHTS}"
        elif size is not None and int(entry.get("offset", 0)) + int(entry.get("length", 0)) > size:
            yield "weights", f"{tensor.name} ends behind the end of {WEIGHTS} ({size} bytes)"


def _of_types(proto: onnx.ModelProto, target: Target) -> Iterator[tuple[Rule, str]]:
    """Every value has one type that the network can hold, and every operator takes the types it is given."""
    import onnx

    try:
        inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        yield "type", f"types contradict each other: {str(error).splitlines()[0]}"
        return
    graph = inferred.graph
    types = {info.name: info.type.tensor_type.elem_type for info in (*graph.input, *graph.value_info)}
    types |= {info.name: info.type.tensor_type.elem_type for info in graph.output}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for name, number in types.items():
        if number not in _TYPE_NAMES:
            kind = onnx.TensorProto.DataType.Name(number)
            yield "type", f"{name} is {kind}, which a strongly typed network cannot hold"
    for node in graph.node:
        given = [types.get(name) for name in node.input if name]
        subject = given[1 if node.op_type == "Where" else 0] if given else None
        if node.op_type == "ConstantOfShape":
            subject = types.get(node.output[0])
        allowed = _types_of(node.op_type, target)
        if allowed is not None and subject in _TYPE_NAMES and _TYPE_NAMES[subject] not in allowed:
            yield (
                "type",
                f"{_called(node)}: takes {_TYPE_NAMES[subject]}, the table of TensorRT {target.tensorrt} has "
                f"{', '.join(sorted(allowed))}",
            )
        if node.op_type in _SAME_TYPES and len(set(given)) > 1:
            yield "type", f"{_called(node)}: its inputs differ in type, a strongly typed network has no casts"


def _of_variant(pinned: onnx.ModelProto) -> Iterator[tuple[Rule, str]]:
    """What shows with static shapes: open dimensions, counts, ranks."""
    still_open = open_dimensions(pinned)
    if still_open:
        yield "static shape", f"the shape of {', '.join(still_open[:3])} is open once the profile is applied"
    graph = pinned.graph
    shapes = {
        info.name: tuple(dim.dim_value for dim in info.type.tensor_type.shape.dim)
        for info in (*graph.input, *graph.value_info, *graph.output)
    }
    limit = _tables()["top_k_below"]
    for node in graph.node:
        if node.op_type == "Attention":
            ranks = [len(shapes.get(name, ())) for name in node.input[:4] if name]
            if set(ranks) != {4}:
                yield "operator", f"{_called(node)}: inputs have {ranks} dimensions, the parser wants 4 each"
        if node.op_type == "TopK":
            axis = next((a.i for a in node.attribute if a.name == "axis"), -1)
            shape = shapes.get(node.output[0], ())
            if shape and shape[axis] >= limit:
                yield "TopK", f"{_called(node)}: K is {shape[axis]}, the parser wants less than {limit}"


def _types_of(operator: str, target: Target) -> frozenset[str] | None:
    """Element types an operator takes there; None if the parser does not know it."""
    entries = _tables()["operators"].get(operator, {})
    known = [version for version in entries if _number(version) <= _number(target.tensorrt)]
    return frozenset(entries[max(known, key=_number)].split()) if known else None


def _opset(target: Target) -> int:
    opsets: Mapping[str, int] = _tables()["opsets"]
    return opsets[max((v for v in opsets if _number(v) <= _number(target.tensorrt)), key=_number)]


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _called(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {(node.name or node.output[0])!r}"


@lru_cache(maxsize=1)
def _tables() -> dict[str, Any]:
    text = resources.files("engines").joinpath("parser_operators.json").read_text(encoding="utf-8")
    return json.loads(text)
