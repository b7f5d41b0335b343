"""ONNX Runtime as a backend: one session per graph serves every bucket, weights stay in the mapped file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from vla_autoprune.bundle import Bundle
from vla_autoprune.contract import ElementType
from vla_autoprune.errors import BackendError
from vla_autoprune.runtime.backend import Run, StepByStep, Steps

_TYPE_NAMES = {"tensor(float)": "float32", "tensor(int64)": "int64"}


class OnnxRuntimeBackend:
    """Runs a bundle on the CPU.

    Args:
        bundle: a checked bundle.
        threads: threads within an operator; None takes all physical cores.
        low_memory: keep weights only in the mapped file instead of also packing them for the matrix products.
            Halves the memory of the weights; prefill takes up to 5 % longer, decoding a third.

    Raises:
        BackendError: ONNX Runtime refuses a graph, or a graph's tensors are not those of the contract.
    """

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, *, threads: int | None = None, low_memory: bool = False) -> None:
        self.device = f"CPU, onnxruntime {onnxruntime.__version__}, {threads or 'all'} threads"
        self.graphs = bundle.graphs
        self.sessions: dict[str, onnxruntime.InferenceSession] = {}
        for name in bundle.graphs:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            if threads is not None:
                options.intra_op_num_threads = threads
            # Graphs run one after the other: a session that spins after its turn takes the next one's cores.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            if low_memory:
                options.add_session_config_entry("session.disable_prepacking", "1")
            path = bundle.graph_file(name)
            try:
                self.sessions[name] = onnxruntime.InferenceSession(
                    path, sess_options=options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:
                raise BackendError(
                    f"onnxruntime {onnxruntime.__version__} cannot load {path}: {error}; the bundle has "
                    f"opset {bundle.manifest.options.opset}, export with --opset 18 for older runtimes"
                ) from error
            self._check(name)

    def allocate(self, elements: int, dtype: ElementType) -> NDArray[Any]:
        """A zeroed vector."""
        return np.zeros(elements, dtype=dtype)

    def host(self, shape: tuple[int, ...], dtype: ElementType) -> NDArray[Any]:
        """A zeroed array."""
        return np.zeros(shape, dtype=dtype)

    def view(self, buffer: NDArray[Any], shape: tuple[int, ...], start: int = 0) -> NDArray[Any]:
        """The vector's elements from `start` on in a shape."""
        return buffer.reshape(-1)[start : start + math.prod(shape)].reshape(shape)

    def write(self, buffer: NDArray[Any], values: NDArray[Any], start: int = 0) -> None:
        """Copy values in, from row `start` on."""
        if buffer.ndim == 1:
            buffer[start : start + len(values)] = values
        else:
            buffer[..., start : start + values.shape[-2], :] = values

    def clear(self, buffer: NDArray[Any]) -> None:
        """Fill with zeros."""
        buffer[...] = 0

    def fetch(self, buffer: NDArray[Any]) -> None:
        """Nothing to do: buffers are on the host."""

    def read(self, buffer: NDArray[Any]) -> NDArray[Any]:
        """The buffer itself."""
        return buffer

    def move_rows(
        self, source: NDArray[Any], first: int, target: NDArray[Any], start: int, count: int
    ) -> None:
        """Copy rows from buffer to buffer."""
        target[..., start : start + count, :] = source[..., first : first + count, :]

    def bind(self, graph: str, variant: str, tensors: Mapping[str, NDArray[Any]]) -> Run:
        """Fix the memory of a graph's tensors.

        Raises:
            BackendError: a tensor is missing, or its memory has not the shape the recipe pins for this
                variant.
        """
        contract = self.graphs[graph]
        binding = self.sessions[graph].io_binding()
        shapes = contract.shapes(variant)
        for tensor in contract.tensors:
            buffer = tensors.get(tensor.name)
            if buffer is None or buffer.shape != shapes[tensor.name] or buffer.dtype != tensor.dtype:
                given = "nothing" if buffer is None else f"{buffer.dtype}{list(buffer.shape)}"
                raise BackendError(
                    f"{graph} ({variant}): {tensor.name} got {given}, the recipe pins "
                    f"{tensor.dtype}{list(shapes[tensor.name])}"
                )
            bind = binding.bind_input if tensor in contract.inputs else binding.bind_output
            bind(tensor.name, "cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data)
        session, held = self.sessions[graph], dict(tensors)

        def run() -> None:
            # `held` keeps the bound memory alive.
            try:
                session.run_with_iobinding(binding)
            except Exception as error:
                raise BackendError(f"{graph} ({variant}) on {len(held)} tensors failed: {error}") from error

        return run

    def program(self, steps: Steps) -> StepByStep:
        """The steps, one after the other."""
        return StepByStep(steps)

    def wait(self) -> None:
        """Nothing to do: runs return when they are done."""

    def close(self) -> None:
        """Drop the sessions."""
        self.sessions.clear()

    def _check(self, name: str) -> None:
        """Refuse a graph whose own tensors are not those the manifest states."""
        session, graph = self.sessions[name], self.graphs[name]
        for declared, tensors in (
            (session.get_inputs(), graph.inputs),
            (session.get_outputs(), graph.outputs),
        ):
            found = {
                item.name: (_TYPE_NAMES.get(item.type, item.type), list(item.shape)) for item in declared
            }
            wanted = {tensor.name: (tensor.dtype, list(tensor.shape)) for tensor in tensors}
            if found != wanted:
                name_of = next(key for key in {**found, **wanted} if found.get(key) != wanted.get(key))
                raise BackendError(
                    f"{name}.onnx: tensor {name_of} is {found.get(name_of)}, the manifest says "
                    f"{wanted.get(name_of)}; export the bundle anew with vla-autoprune export"
                )
