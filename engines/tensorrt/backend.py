"""TensorRT as a backend: one engine per graph, one execution context per variant, programs as CUDA graphs."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from engines.tensorrt.cuda import Cuda, CudaProgram, DeviceBuffer
from engines.tensorrt.engine_files import (
    find_engines,
    has_profiles,
    how_to_build,
    read_engine,
    read_record,
    require_fit,
    require_tensorrt,
)
from engines.tensorrt.log import SEE, make_log, said
from vla_autoprune.bundle import Bundle
from vla_autoprune.contract import ElementType, Graph
from vla_autoprune.errors import BackendError
from vla_autoprune.runtime.backend import Clock, Run, Steps

if TYPE_CHECKING:
    import tensorrt as trt


class TensorRtBackend:
    """Runs a bundle's engines on one stream of one GPU.

    All contexts work in the same scratch memory, as nothing runs beside anything else. A context is bound to
    one variant for good: its profile, shapes and addresses never change, which is what capture asks for.

    Args:
        bundle: a checked bundle, for which `vla-autoprune build` has made engines on this machine.
        device: CUDA's index of the GPU.
        folder: where the engines lie; None takes the bundle's folder for this GPU, else that for any.
        cuda_graphs: False queues programs call by call, to find out what a capture stumbles over.

    Raises:
        BackendError: TensorRT, CUDA or the engines are absent, or an engine does not fit bundle, TensorRT or
            GPU; the message says what differs and how to build.
    """

    name = "tensorrt"
    clock: Clock = "device"

    def __init__(
        self, bundle: Bundle, *, device: int = 0, folder: Path | None = None, cuda_graphs: bool = True
    ) -> None:
        version = require_tensorrt()
        import tensorrt as trt

        self.graphs = bundle.graphs
        self._cuda = Cuda(device)
        self._cuda_graphs = cuda_graphs
        self.device = f"{self._cuda.gpu}, TensorRT {version}"
        self._problems: deque[str] = deque(maxlen=3)
        self._mirrors: dict[DeviceBuffer, NDArray[Any]] = {}
        self._programs: list[CudaProgram] = []
        self._contexts: list[trt.IExecutionContext] = []
        self._again = how_to_build(bundle)
        place = folder or find_engines(bundle, self._cuda.gpu)
        try:
            self._runtime: trt.Runtime = trt.Runtime(make_log(self._problems))
        except TypeError as error:
            raise BackendError(
                f"TensorRT {version} gives no runtime: {said(self._problems)}; {SEE}"
            ) from error
        self._engines: dict[str, trt.ICudaEngine] = {
            name: self._load(bundle, graph, place, version) for name, graph in self.graphs.items()
        }
        self._scratch_bytes = max(engine.device_memory_size_v2 for engine in self._engines.values())
        self._scratch = self._cuda.allocate(-(-self._scratch_bytes // 4), "float32")

    def allocate(self, elements: int, dtype: ElementType) -> DeviceBuffer:
        """A zeroed vector on the device."""
        return self._cuda.allocate(elements, dtype)

    def host(self, shape: tuple[int, ...], dtype: ElementType) -> NDArray[Any]:
        """A zeroed array in pinned memory."""
        return self._cuda.pinned(shape, dtype)

    def view(self, buffer: DeviceBuffer, shape: tuple[int, ...], start: int = 0) -> DeviceBuffer:
        """The vector's elements from `start` on in a shape."""
        return buffer.viewed(shape, start)

    def write(self, buffer: DeviceBuffer, values: NDArray[Any], start: int = 0) -> None:
        """Copy values in, from row `start` on."""
        self._cuda.upload(buffer, values, start)

    def clear(self, buffer: DeviceBuffer) -> None:
        """Queue zeros."""
        self._cuda.clear(buffer)

    def fetch(self, buffer: DeviceBuffer) -> None:
        """Queue a copy into pinned memory, which is made when a buffer is first fetched."""
        if buffer not in self._mirrors:
            self._mirrors[buffer] = self._cuda.pinned(buffer.shape, buffer.dtype)
        self._cuda.download(buffer, self._mirrors[buffer])

    def read(self, buffer: DeviceBuffer) -> NDArray[Any]:
        """The values last fetched, once everything queued is done."""
        self._cuda.wait()
        return self._mirrors[buffer]

    def move_rows(
        self, source: DeviceBuffer, first: int, target: DeviceBuffer, start: int, count: int
    ) -> None:
        """Queue a copy of rows from buffer to buffer."""
        self._cuda.move_rows(source, first, target, start, count)

    def bind(self, graph: str, variant: str, tensors: Mapping[str, DeviceBuffer]) -> Run:
        """A context for a variant, with the variant's profile and the tensors' addresses.

        Raises:
            BackendError: a tensor is missing or has not the shape the recipe pins, the profile is missing, or
                TensorRT refuses a shape or address.
        """
        import tensorrt as trt

        contract = self.graphs[graph]
        contract.check_buffers(
            variant, {name: (buffer.dtype, buffer.shape) for name, buffer in tensors.items()}
        )
        where = f"{graph} ({variant})"
        self._problems.clear()
        profile = list(contract.variants).index(variant)
        engine: trt.ICudaEngine = self._engines[graph]
        context: trt.IExecutionContext = engine.create_execution_context(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if context is None:
            free, total = self._cuda.memory_mib()
            raise BackendError(
                f"{where}: no execution context; {free} of {total} MiB of device memory are free: "
                f"{said(self._problems)}; free device memory, or export a bundle with fewer buckets"
            )
        stream = self._cuda.stream_handle
        self._require(context.set_optimization_profile_async(profile, stream), f"{where}: profile {profile}")
        self._cuda.wait()
        context.set_device_memory(self._scratch.address, self._scratch.bytes)
        for tensor in contract.inputs:
            shape = tensors[tensor.name].shape
            done = context.set_input_shape(tensor.name, shape)
            self._require(done, f"{where}: {tensor.name} {list(shape)}")
        for tensor in contract.tensors:
            address = tensors[tensor.name].address
            self._require(context.set_tensor_address(tensor.name, address), f"{where}: {tensor.name}")
        try:
            unknown = context.infer_shapes()
        except RuntimeError as error:  # the bindings' own, where shapes contradict each other
            raise BackendError(f"{where}: {error}: {said(self._problems)}; {self._again}") from error
        if unknown:
            raise BackendError(
                f"{where}: TensorRT cannot tell the shape of {', '.join(unknown)}; {self._again}"
            )
        for tensor in contract.outputs:
            found, wanted = tuple(context.get_tensor_shape(tensor.name)), tensors[tensor.name].shape
            if found != wanted:
                raise BackendError(
                    f"{where}: TensorRT infers {list(found)} for {tensor.name}, the recipe pins "
                    f"{list(wanted)}; {self._again}"
                )
        contexts, index = self._contexts, len(self._contexts)
        contexts.append(context)

        def run() -> None:
            # Not held here: a pipeline that outlives `close` would keep contexts and engines on the device.
            queued: trt.IExecutionContext = contexts[index]
            if not queued.execute_async_v3(stream):
                raise BackendError(f"{where} cannot be queued: {said(self._problems)}; {self._again}")

        return run

    def program(self, steps: Steps) -> CudaProgram:
        """The steps as one CUDA graph; they run once now, then are captured."""
        program = CudaProgram(self._cuda, steps, self._cuda_graphs)
        self._programs.append(program)
        return program

    def wait(self) -> None:
        """Return when the stream is done."""
        self._cuda.wait()

    def close(self) -> None:
        """Drop programs, contexts and engines, then the memory they worked in.

        Never fails, so that it hides no error. Arrays that `host` and `read` gave must not be used any more.
        """
        with contextlib.suppress(BackendError):
            self._cuda.wait()
        for program in self._programs:
            program.close()
        self._programs.clear()
        self._contexts.clear()
        self._engines.clear()
        self._mirrors.clear()
        self._cuda.close()

    @property
    def buffer_bytes(self) -> int:
        """Device memory of buffers and scratch, weights not counted."""
        return self._cuda.held_bytes

    def memory_mib(self) -> tuple[int, int]:
        """Free and total device memory now."""
        return self._cuda.memory_mib()

    def _require(self, done: bool, what: str) -> None:
        if not done:
            raise BackendError(f"{what}: TensorRT refuses it: {said(self._problems)}; {self._again}")

    def _load(self, bundle: Bundle, graph: Graph, folder: Path, version: str) -> trt.ICudaEngine:
        again = self._again
        path = folder / f"{graph.name}.engine"
        record = read_record(folder, graph.name, again)
        require_fit(record, path, bundle, self._cuda.gpu, version)
        plan = read_engine(path, record, again)
        self._problems.clear()
        if record.options.version_compatible:
            # Such an engine carries the part of TensorRT that runs it.
            self._runtime.engine_host_code_allowed = True
        engine: trt.ICudaEngine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            free, total = self._cuda.memory_mib()
            raise BackendError(
                f"{path} ({record.bytes / 2**20:.1f} MiB, {free} of {total} MiB of device memory are free) "
                f"cannot be loaded: {said(self._problems)}; free device memory, or {again}"
            )
        _require_contract(engine, graph, path, again)
        return engine


def _require_contract(engine: trt.ICudaEngine, graph: Graph, path: Path, again: str) -> None:
    """Refuse an engine whose tensors or profiles are not those of the bundle."""
    import tensorrt as trt

    modes = {trt.TensorIOMode.INPUT: "input", trt.TensorIOMode.OUTPUT: "output"}
    types = {
        trt.DataType.FLOAT: "float32",
        trt.DataType.INT64: "int64",
        trt.DataType.HALF: "float16",
        trt.DataType.BF16: "bfloat16",
    }
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = {
        name: (modes.get(engine.get_tensor_mode(name)), types.get(engine.get_tensor_dtype(name)))
        for name in names
    }
    wanted = {
        tensor.name: (mode, tensor.dtype)
        for mode, tensors in (("input", graph.inputs), ("output", graph.outputs))
        for tensor in tensors
    }
    if found != wanted:
        name = next(name for name in {**found, **wanted} if found.get(name) != wanted.get(name))
        raise BackendError(
            f"{path}: tensor {name} is {found.get(name)}, the bundle has {wanted.get(name)}; {again}"
        )
    if not has_profiles(graph):
        return
    if engine.num_optimization_profiles != len(graph.variants):
        raise BackendError(
            f"{path} has {engine.num_optimization_profiles} profiles, the recipe needs "
            f"{len(graph.variants)}: {', '.join(graph.variants)}; {again}"
        )
    for profile, variant in enumerate(graph.variants):
        shapes = graph.shapes(variant)
        for tensor in graph.inputs:
            limits = [tuple(dims) for dims in engine.get_tensor_profile_shape(tensor.name, profile)]
            if limits != [shapes[tensor.name]] * 3:
                raise BackendError(
                    f"{path}: profile {profile} ({variant}) takes {tensor.name} of {limits}, the recipe pins "
                    f"{list(shapes[tensor.name])}; {again}"
                )
