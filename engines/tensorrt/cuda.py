"""The little of the CUDA runtime that a backend needs, with errors that say what went wrong or ran out."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_autoprune.contract import ITEM_BYTES, ElementType
from vla_autoprune.errors import BackendError
from vla_autoprune.runtime.backend import Steps

_MIB = 2**20

_GET_CUDA = (
    "install cuda-python of the CUDA version the driver has (JetPack 6: pip install 'cuda-python>=12.6,<13'; "
    "CUDA 13: pip install 'cuda-python>=13')"
)

_WAYS_OUT = {
    "cudaErrorMemoryAllocation": "free device memory, or export a bundle with fewer or smaller buckets",
    "cudaErrorInsufficientDriver": "the driver is missing or older than cuda-python; install a newer driver, "
    "or a cuda-python of the driver's CUDA version",
    "cudaErrorNoDevice": "no GPU is visible; look at nvidia-smi (on a Jetson tegrastats) and "
    "CUDA_VISIBLE_DEVICES",
}
_CAPTURE = "cudaErrorStreamCapture"
"""Errors that begin so are of a capture, and leave the device as it was."""
_NOT_CAPTURED = (
    "a graph does what CUDA graphs cannot hold; open the backend with cuda_graphs=False and report it"
)
_LOST = "the device context may be lost: restart the process"


def require_cuda() -> None:
    """Refuse to go on without cuda-python.

    Raises:
        BackendError: it is absent or cannot be loaded; the message says how to get it.
    """
    try:
        from cuda.bindings import runtime  # noqa: F401
    except ImportError as error:
        raise BackendError(f"cuda-python cannot be imported ({error}); {_GET_CUDA}") from error


@dataclass(frozen=True)
class Gpu:
    """The device engines are tied to."""

    name: str
    compute_capability: str
    multiprocessors: int
    """All Jetson Orins have one name and one compute capability; this tells them apart."""

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.compute_capability})"


@dataclass(frozen=True)
class DeviceBuffer:
    """Device memory seen in a shape; rows lie without gaps."""

    address: int
    shape: tuple[int, ...]
    dtype: ElementType

    @property
    def item_bytes(self) -> int:
        """Of one element."""
        return ITEM_BYTES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Of one row: the last axis, or one element of a vector."""
        return self.item_bytes * (self.shape[-1] if len(self.shape) > 1 else 1)

    @property
    def rows(self) -> int:
        """Length of the axis that rows are counted on."""
        return self.shape[max(len(self.shape) - 2, 0)]

    @property
    def blocks(self) -> int:
        """How many such axes lie one after the other."""
        return math.prod(self.shape[:-2])

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.item_bytes * math.prod(self.shape)

    def viewed(self, shape: tuple[int, ...], start: int = 0) -> DeviceBuffer:
        """Elements from `start` on in another shape."""
        return replace(self, address=self.address + start * self.item_bytes, shape=shape)


class Cuda:
    """One device, one stream, and the memory taken from it. Nothing is allocated once frames run.

    Args:
        device: CUDA's index of the device.

    Raises:
        BackendError: cuda-python, the driver or the device is absent.
    """

    def __init__(self, device: int = 0) -> None:
        require_cuda()
        from cuda.bindings import runtime as cudart

        self.device, self.capturing = device, False
        self._held: dict[int, int] = {}
        self._pinned: list[tuple[int, int]] = []
        try:
            (count,) = self.done(cudart.cudaGetDeviceCount(), "looking for a GPU")
        except RuntimeError as error:  # cuda-python 12.6 where libcuda is missing
            raise BackendError(f"CUDA cannot be used: {error}; install the GPU's driver") from error
        if not 0 <= device < count:
            raise BackendError(f"device is {device}; this machine has {count} CUDA devices, from 0 on")
        self.select()
        asking = f"asking device {device} its name"
        properties: cudart.cudaDeviceProp = self.done(cudart.cudaGetDeviceProperties(device), asking)[0]
        self.gpu = Gpu(
            name=properties.name.decode(errors="replace").rstrip("\0"),
            compute_capability=f"{properties.major}.{properties.minor}",
            multiprocessors=properties.multiProcessorCount,
        )
        (self.stream,) = self.done(
            cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking), "making a stream"
        )
        self.stream_handle = int(self.stream)
        """The stream as the number TensorRT takes."""

    def done(self, result: tuple[Any, ...], doing: str) -> tuple[Any, ...]:
        """What a CUDA call gave, without its status.

        Raises:
            BackendError: the status is an error; the message has its name, what was being done and a way out.
        """
        from cuda.bindings import runtime as cudart

        status, *values = result
        if status == cudart.cudaError_t.cudaSuccess:
            return tuple(values)
        way_out = _NOT_CAPTURED if status.name.startswith(_CAPTURE) else _WAYS_OUT.get(status.name, _LOST)
        raise BackendError(f"CUDA failed when {doing}: {status.name}; {way_out}")

    def select(self) -> None:
        """Make the device the calling thread's; CUDA gives every new thread device 0."""
        from cuda.bindings import runtime as cudart

        self.done(cudart.cudaSetDevice(self.device), f"selecting device {self.device}")

    def memory_mib(self) -> tuple[int, int]:
        """Free and total device memory now."""
        from cuda.bindings import runtime as cudart

        free, total = self.done(cudart.cudaMemGetInfo(), "asking for free memory")
        return free // _MIB, total // _MIB

    @property
    def held_bytes(self) -> int:
        """Device memory allocated here."""
        return sum(self._held.values())

    def allocate(self, elements: int, dtype: ElementType) -> DeviceBuffer:
        """A zeroed vector on the device, aligned to 256 bytes as all of CUDA's allocations.

        Raises:
            BackendError: the device has not that much; the message has the figures.
        """
        from cuda.bindings import runtime as cudart

        size = max(elements, 1) * ITEM_BYTES[dtype]
        free, total = self.memory_mib()
        (address,) = self.done(
            cudart.cudaMalloc(size),
            f"allocating {size / _MIB:.1f} MiB ({free} of {total} MiB were free, this backend holds "
            f"{self.held_bytes / _MIB:.1f} MiB in buffers)",
        )
        self._held[int(address)] = size
        buffer = DeviceBuffer(int(address), (elements,), dtype)
        self.clear(buffer)
        return buffer

    def pinned(self, shape: tuple[int, ...], dtype: ElementType) -> NDArray[Any]:
        """Zeroed host memory that the device copies from and to by itself; valid until `close`."""
        from cuda.bindings import runtime as cudart

        size = max(math.prod(shape), 1) * np.dtype(dtype).itemsize
        (address,) = self.done(
            cudart.cudaHostAlloc(size, cudart.cudaHostAllocDefault),
            f"pinning {size / _MIB:.1f} MiB of host memory",
        )
        self._pinned.append((int(address), size))
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(address)))
        memory[:] = 0
        return memory.view(dtype)[: math.prod(shape)].reshape(shape)

    def clear(self, buffer: DeviceBuffer) -> None:
        """Queue zeros."""
        from cuda.bindings import runtime as cudart

        self.done(
            cudart.cudaMemsetAsync(buffer.address, 0, buffer.bytes, self.stream), "clearing device memory"
        )

    def upload(self, buffer: DeviceBuffer, values: NDArray[Any], start: int = 0) -> None:
        """Copy host values into rows from `start` on; only pinned ones are copied later than this returns.

        Raises:
            BackendError: the values do not fit, or a program is captured and they are not pinned.
        """
        from cuda.bindings import runtime as cudart

        values = np.ascontiguousarray(values, dtype=buffer.dtype)
        given = DeviceBuffer(values.ctypes.data, values.shape, buffer.dtype)
        pinned = any(at <= given.address < at + size for at, size in self._pinned)
        if self.capturing and not pinned:
            raise BackendError("a program may only write from memory that the backend's host() gave")
        self._copy(given, 0, buffer, start, given.rows, cudart.cudaMemcpyKind.cudaMemcpyHostToDevice)
        if not pinned:
            self.wait()

    def download(self, buffer: DeviceBuffer, values: NDArray[Any]) -> None:
        """Queue a copy of a whole buffer into pinned memory."""
        from cuda.bindings import runtime as cudart

        target = DeviceBuffer(values.ctypes.data, values.shape, buffer.dtype)
        self._copy(buffer, 0, target, 0, buffer.rows, cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost)

    def move_rows(
        self, source: DeviceBuffer, first: int, target: DeviceBuffer, start: int, count: int
    ) -> None:
        """Queue a copy of rows from buffer to buffer."""
        from cuda.bindings import runtime as cudart

        self._copy(source, first, target, start, count, cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice)

    def wait(self) -> None:
        """Return when the stream is done.

        Raises:
            BackendError: something queued has failed.
        """
        from cuda.bindings import runtime as cudart

        self.done(cudart.cudaStreamSynchronize(self.stream), "waiting for the device")

    def close(self) -> None:
        """Give back stream and memory.

        Never fails: where the context is lost, all of it goes with the process, and the cause has been said.
        """
        from cuda.bindings import runtime as cudart

        cudart.cudaStreamSynchronize(self.stream)
        for address in self._held:
            cudart.cudaFree(address)
        for address, _ in self._pinned:
            cudart.cudaFreeHost(address)
        self._held.clear()
        self._pinned.clear()
        cudart.cudaStreamDestroy(self.stream)

    def _copy(
        self, source: DeviceBuffer, first: int, target: DeviceBuffer, start: int, count: int, kind: Any
    ) -> None:
        """Rows of every block: one copy whose pitch is a block's size."""
        from cuda.bindings import runtime as cudart

        fits = source.row_bytes == target.row_bytes and source.blocks == target.blocks
        if not fits or first + count > source.rows or start + count > target.rows or min(first, start) < 0:
            raise BackendError(
                f"{count} rows from row {first} of {list(source.shape)} do not fit into row {start} of "
                f"{list(target.shape)}"
            )
        row = source.row_bytes
        self.done(
            cudart.cudaMemcpy2DAsync(
                target.address + start * row,
                target.rows * row,
                source.address + first * row,
                source.rows * row,
                count * row,
                source.blocks,
                kind,
                self.stream,
            ),
            f"copying {count} rows of {list(source.shape)}",
        )


class CudaProgram:
    """Steps as one CUDA graph, or queued one by one; either way each is timed on the device.

    The steps run once before they are captured: TensorRT does some of its work in a first run.

    Args:
        cuda: the device.
        steps: what to capture.
        captured: False queues the steps anew every time.

    Raises:
        BackendError: a step failed, or cannot be captured.
    """

    def __init__(self, cuda: Cuda, steps: Steps, captured: bool) -> None:
        from cuda.bindings import runtime as cudart

        self.cuda, self.steps = cuda, tuple(steps)
        names = [name for name, _ in self.steps]
        self._ms = dict.fromkeys(names, 0.0)
        what = f"capturing {', '.join(names)}"
        self._events = [
            cuda.done(cudart.cudaEventCreate(), "making an event")[0] for _ in range(len(names) + 1)
        ]
        self._executable: Any = None
        self._queue(cudart.cudaEventRecordDefault)
        cuda.wait()
        if not captured:
            return
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        cuda.done(cudart.cudaStreamBeginCapture(cuda.stream, mode), what)
        cuda.capturing = True
        try:
            # External records become nodes of the graph, so that they can be read after every launch.
            self._queue(cudart.cudaEventRecordExternal)
        finally:
            cuda.capturing = False
            ended = cudart.cudaStreamEndCapture(cuda.stream)
        (graph,) = cuda.done(ended, what)
        (self._executable,) = cuda.done(cudart.cudaGraphInstantiate(graph, 0), what)
        cuda.done(cudart.cudaGraphDestroy(graph), what)

    def __call__(self) -> None:
        """Queue the steps."""
        from cuda.bindings import runtime as cudart

        if self._executable is None:
            self._queue(cudart.cudaEventRecordDefault)
        else:
            self.cuda.done(
                cudart.cudaGraphLaunch(self._executable, self.cuda.stream), f"launching {self.steps[0][0]} …"
            )

    def times_ms(self) -> Mapping[str, float]:
        """Milliseconds of every step of the last call, by the device's clock; waits until it is done."""
        from cuda.bindings import runtime as cudart

        self.cuda.done(cudart.cudaEventSynchronize(self._events[-1]), "waiting for a program")
        for (name, _), (begin, end) in zip(self.steps, itertools.pairwise(self._events), strict=True):
            (ms,) = self.cuda.done(cudart.cudaEventElapsedTime(begin, end), f"timing {name}")
            self._ms[name] = ms
        return self._ms

    def close(self) -> None:
        """Give back graph and events; nothing of them may be under way. Never fails, as `Cuda.close`."""
        from cuda.bindings import runtime as cudart

        if self._executable is not None:
            cudart.cudaGraphExecDestroy(self._executable)
        for event in self._events:
            cudart.cudaEventDestroy(event)
        self._executable = None
        self._events.clear()

    def _queue(self, flags: int) -> None:
        self._record(0, flags)
        for index, (_, work) in enumerate(self.steps):
            work()
            self._record(index + 1, flags)

    def _record(self, index: int, flags: int) -> None:
        from cuda.bindings import runtime as cudart

        self.cuda.done(
            cudart.cudaEventRecordWithFlags(self._events[index], self.cuda.stream, flags), "timing a program"
        )
