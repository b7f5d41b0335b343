"""torch as a backend where TensorRT is absent: a bundle's graphs on torch's kernels, as CUDA graphs on a GPU.

The modules are rebuilt from the bundle alone: its ONNX graphs say what is computed, its weights file with
what. Nothing of the original model is needed, and what runs is what TensorRT parses. Shapes are pinned when a
graph is bound: whatever follows from shapes is computed then, and the rest becomes a list of torch calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.torch_operators import DTYPES, OPERATORS, PARAMETERS
from vla_autoprune.bundle import WEIGHTS, Bundle
from vla_autoprune.contract import ElementType
from vla_autoprune.errors import BackendError
from vla_autoprune.export.pinning import read_graph
from vla_autoprune.runtime.backend import Clock, Program, Run, StepByStep, Steps

if TYPE_CHECKING:
    import onnx

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class _Call:
    """One torch call: where its inputs and outputs lie among the values, and which nothing needs after it."""

    function: Callable[..., Any]
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]
    last_use: tuple[int, ...]


def require_device(device: Device) -> None:
    """Refuse a device that torch does not see.

    Raises:
        BackendError: with the way to it.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendError(
            f"backend torch-cuda: torch {torch.__version__} sees no CUDA device; install a CUDA build of "
            "torch and see whether nvidia-smi lists a GPU, or use --backend torch, which runs on the CPU"
        )


class TorchBackend:
    """Runs a bundle in torch, in the precision of its graphs.

    On the CPU calls are made one by one; on a GPU every bucket's steps are captured once, as CUDA graphs over
    buffers that never move. Weights are on the device once, whatever the number of graphs and buckets.

    Args:
        bundle: a checked bundle.
        device: "cpu" or "cuda".
        threads: CPU threads of the whole process; None leaves torch's choice.

    Raises:
        BackendError: there is no such device, its memory is too small, or a graph has an operator that is
            not known here.
    """

    name = "torch"

    def __init__(self, bundle: Bundle, *, device: Device = "cpu", threads: int | None = None) -> None:
        require_device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        self._device = torch.device(device)
        name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        self.device = f"{name}, torch {torch.__version__}"
        self.graphs = bundle.graphs
        self._is_cuda = device == "cuda"
        self.clock: Clock = "device" if self._is_cuda else "host"
        self._pool = torch.cuda.graph_pool_handle() if self._is_cuda else None
        self._host: list[Tensor] = []
        self._fetched: dict[tuple[int, torch.Size], Tensor] = {}
        self._file = np.memmap(bundle.path / WEIGHTS, dtype=np.uint8, mode="c")
        self._weights: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        self._protos: dict[str, onnx.GraphProto] = {}
        for graph in bundle.graphs:
            path = bundle.graph_file(graph)
            proto = read_graph(bundle, graph).graph
            for node in proto.node:
                if node.op_type not in OPERATORS or node.domain not in ("", "ai.onnx"):
                    raise BackendError(
                        f"{path}: operator {node.domain or 'ai.onnx'}.{node.op_type} is not one of those the "
                        "torch backend knows; use --backend onnxruntime"
                    )
            self._protos[graph] = proto

    def allocate(self, elements: int, dtype: ElementType) -> Tensor:
        """A zeroed vector on the device."""
        kind = getattr(torch, dtype)
        return self._on_device(lambda: torch.zeros(elements, dtype=kind, device=self._device))

    def host(self, shape: tuple[int, ...], dtype: ElementType) -> NDArray[Any]:
        """A zeroed array, in pinned memory where there is a GPU."""
        memory = torch.zeros(shape, dtype=getattr(torch, dtype), pin_memory=self._is_cuda)
        self._host.append(memory)
        return memory.numpy()

    def view(self, buffer: Tensor, shape: tuple[int, ...], start: int = 0) -> Tensor:
        """The vector's elements from `start` on in a shape."""
        return buffer.view(-1)[start : start + math.prod(shape)].view(shape)

    def write(self, buffer: Tensor, values: NDArray[Any], start: int = 0) -> None:
        """Copy values in, from row `start` on."""
        axis = max(buffer.ndim - 2, 0)
        target = buffer.narrow(axis, start, values.shape[max(values.ndim - 2, 0)])
        if self._is_cuda:
            source = torch.from_numpy(values if values.flags.writeable else values.copy())
            target.copy_(source, non_blocking=True)
        else:
            target.numpy()[...] = values

    def clear(self, buffer: Tensor) -> None:
        """Fill with zeros."""
        buffer.zero_()

    def fetch(self, buffer: Tensor) -> None:
        """From a GPU, queue a copy into pinned memory that belongs to this buffer."""
        if self._is_cuda:
            key = (buffer.data_ptr(), buffer.shape)
            if key not in self._fetched:
                self._fetched[key] = torch.empty_like(buffer, device="cpu", pin_memory=True)
            self._fetched[key].copy_(buffer, non_blocking=True)

    def read(self, buffer: Tensor) -> NDArray[Any]:
        """On the CPU the buffer itself, else what was last fetched of it."""
        if not self._is_cuda:
            return buffer.numpy()
        self.wait()
        return self._fetched[buffer.data_ptr(), buffer.shape].numpy()

    def move_rows(self, source: Tensor, first: int, target: Tensor, start: int, count: int) -> None:
        """Copy rows from buffer to buffer."""
        target[..., start : start + count, :].copy_(source[..., first : first + count, :])

    def bind(self, graph: str, variant: str, tensors: Mapping[str, Tensor]) -> Run:
        """Fix the memory of a graph's tensors, and with their shapes everything that follows from shapes.

        Raises:
            BackendError: a tensor is missing, its memory has not the shape the recipe pins for this variant,
                or the graph does what no static module can.
        """
        contract = self.graphs[graph]
        contract.check_buffers(
            variant, {name: (str(held.dtype)[6:], tuple(held.shape)) for name, held in tensors.items()}
        )
        try:
            run = self._on_device(lambda: _Module(self._protos[graph], tensors, self._weight, self._device))
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise BackendError(
                f"{graph} ({variant}) cannot run in torch {torch.__version__}: {error}; "
                "use --backend onnxruntime"
            ) from error
        return run

    def program(self, steps: Steps) -> Program:
        """On the CPU the steps one after the other, on a GPU a CUDA graph for each."""
        if not self._is_cuda:
            return StepByStep(steps)
        try:
            return self._on_device(lambda: _Captured(steps, self._pool))
        except RuntimeError as error:
            names = ", ".join(name for name, _ in steps)
            raise BackendError(
                f"{self.device} cannot capture {names} as CUDA graphs: {_first_line(error)}; report it, and "
                "use --backend torch or onnxruntime"
            ) from error

    def wait(self) -> None:
        """Return when the GPU is done."""
        if self._is_cuda:
            try:
                torch.cuda.current_stream().synchronize()
            except RuntimeError as error:
                raise BackendError(
                    f"{self.device} failed: {_first_line(error)}; the device context may be lost: restart "
                    "the process"
                ) from error

    def close(self) -> None:
        """Give back weights and memory."""
        for held in (self._weights, self._fetched, self._protos, self._host):
            held.clear()
        if self._is_cuda:
            torch.cuda.empty_cache()

    def _weight(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of the weights file, on the device; graphs that share it in the file share it here."""
        key = (offset, shape)
        if key not in self._weights:
            size = math.prod(shape) * dtype.itemsize
            stored = torch.from_numpy(self._file[offset : offset + size]).view(dtype).reshape(shape)
            self._weights[key] = stored.to(self._device)
        return self._weights[key]

    def _on_device(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except torch.cuda.OutOfMemoryError as error:
            free, total = (value / 2**20 for value in torch.cuda.mem_get_info())
            raise BackendError(
                f"{self.device} has {free:.0f} of {total:.0f} MiB free, which is too little: {error}; stop "
                "what else runs on it, or export a recipe with fewer or smaller buckets"
            ) from error


class _Captured:
    """Steps as CUDA graphs. They share scratch memory: they run in turn and leave results in buffers."""

    def __init__(self, steps: Steps, pool: Any) -> None:
        self._names = [name for name, _ in steps]
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
        self._graphs = [torch.cuda.CUDAGraph() for _ in steps]
        for graph, (_, work) in zip(self._graphs, steps, strict=True):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                work()  # libraries choose kernels and workspaces before anything is recorded
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(graph, pool=pool):
                work()

    def __call__(self) -> None:
        """Queue the graphs, with an event before each and after the last."""
        self._events[0].record()
        for graph, event in zip(self._graphs, self._events[1:], strict=True):
            graph.replay()
            event.record()

    def times_ms(self) -> Mapping[str, float]:
        """Milliseconds per step of the last call."""
        self._events[-1].synchronize()
        times = dict.fromkeys(self._names, 0.0)
        for name, begin, end in zip(self._names, self._events, self._events[1:], strict=False):
            times[name] += begin.elapsed_time(end)
        return times


class _Module:
    """A graph with its shapes pinned: a list of torch calls from bound buffers to bound buffers."""

    def __init__(
        self,
        proto: onnx.GraphProto,
        buffers: Mapping[str, Tensor],
        weight: Callable[[int, tuple[int, ...], torch.dtype], Tensor],
        device: torch.device,
    ) -> None:
        self._device = device
        self._slots: dict[str, int] = {}
        self._values: list[Tensor | None] = []
        self._calls: list[_Call] = []
        known: dict[str, Tensor] = {}
        """Values that no input changes, on the host."""
        shapes: dict[str, Tensor] = {}
        """The others: tensors without memory that only know type and shape."""
        for info in proto.input:
            self._place(info.name, buffers[info.name])
            shapes[info.name] = buffers[info.name].to("meta")
        for tensor in proto.initializer:
            if tensor.external_data:
                at = {entry.key: entry.value for entry in tensor.external_data}
                if at["location"] != WEIGHTS:
                    raise ValueError(f"{tensor.name} lies in {at['location']}, not in {WEIGHTS}")
                held = weight(int(at.get("offset", 0)), tuple(tensor.dims), DTYPES[tensor.data_type])
                self._place(tensor.name, held)
                shapes[tensor.name] = held.to("meta")
            else:
                known[tensor.name] = _inline(tensor)
        for node in proto.node:
            self._add(node, known, shapes)
        self._outputs = [(buffers[info.name], self._slot(info.name, known)) for info in proto.output]
        self._free_early()

    @torch.inference_mode()
    def __call__(self) -> None:
        """Run on what the input buffers hold."""
        values = self._values
        for call in self._calls:
            results = call.function(*[None if index is None else values[index] for index in call.inputs])
            if len(call.outputs) == 1:
                values[call.outputs[0]] = results
            else:
                for index, result in zip(call.outputs, results, strict=True):
                    values[index] = result
            for index in call.last_use:
                values[index] = None
        for buffer, index in self._outputs:
            result = values[index]
            assert result is not None
            buffer.copy_(result)
        for _, index in self._outputs:
            if index in self._made:
                values[index] = None

    def _add(self, node: onnx.NodeProto, known: dict[str, Tensor], shapes: dict[str, Tensor]) -> None:
        """Do what a node asks, if all it depends on is known, or note the call."""
        function = _bound(node, known)
        parameters = PARAMETERS.get(node.op_type, ())
        names = [name for position, name in enumerate(node.input) if position not in parameters]
        outputs = list(node.output)
        if node.op_type == "Shape":
            known[outputs[0]] = function(shapes.get(names[0], known.get(names[0])))
            return
        if all(name in known or not name for name in names):
            made = function(*[known.get(name) for name in names])
            known.update(zip(outputs, made if isinstance(made, tuple) else (made,), strict=True))
            return
        meta = [shapes[name] if name in shapes else _meta(known.get(name)) for name in names]
        made = function(*meta)
        made = made if isinstance(made, tuple) else (made,)
        shapes.update(zip(outputs, made, strict=True))
        inputs = tuple(self._slot(name, known) if name else None for name in names)
        self._calls.append(_Call(function, inputs, tuple(self._place(name) for name in outputs), ()))

    def _place(self, name: str, value: Tensor | None = None) -> int:
        self._slots[name] = len(self._values)
        self._values.append(value)
        return self._slots[name]

    def _slot(self, name: str, known: Mapping[str, Tensor]) -> int:
        if name not in self._slots:
            self._place(name, known[name].to(self._device))
        return self._slots[name]

    def _free_early(self) -> None:
        """Let go of every value after the call that reads it last: only those live at once take memory."""
        self._made = {index for call in self._calls for index in call.outputs}
        needed = {index for _, index in self._outputs}
        calls: list[_Call] = []
        for call in reversed(self._calls):
            touched: Iterable[int] = {*call.outputs, *(index for index in call.inputs if index is not None)}
            last = tuple(index for index in touched if index in self._made and index not in needed)
            needed.update(last)
            calls.append(_Call(call.function, call.inputs, call.outputs, last))
        self._calls = calls[::-1]


def _bound(node: onnx.NodeProto, known: Mapping[str, Tensor]) -> Callable[..., Any]:
    """A node's function of its tensors, with attributes and parameters filled in.

    Raises:
        ValueError: a parameter, hence a shape, depends on data.
    """
    from onnx import helper

    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    function = OPERATORS[node.op_type]
    parameters: list[list[int] | None] = []
    for position in PARAMETERS.get(node.op_type, ()):
        name = node.input[position] if position < len(node.input) else ""
        if name and name not in known:
            raise ValueError(f"{node.op_type} {node.name!r} takes a shape from {name}, which depends on data")
        parameters.append(known[name].reshape(-1).tolist() if name else None)
    if not parameters:
        return partial(function, **attributes)
    return lambda data: function(data, *parameters, **attributes)


def _inline(tensor: onnx.TensorProto) -> Tensor:
    from onnx import numpy_helper

    values = np.array(numpy_helper.to_array(tensor))
    if DTYPES[tensor.data_type] == torch.bfloat16:  # numpy has no such type, only its bits
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _meta(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.to("meta")
