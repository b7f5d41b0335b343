"""ONNX Runtime as a backend: one session per graph serves every bucket, weights stay in the mapped file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from vla_autoprune.bundle import ENGINES, Bundle
from vla_autoprune.contract import ElementType
from vla_autoprune.errors import BackendError
from vla_autoprune.runtime.backend import Clock, Run, StepByStep, Steps

Provider = Literal["cpu", "cuda", "tensorrt"]

_PROVIDER_NAMES: Mapping[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}

_TYPE_NAMES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(float16)": "float16"}


NO_BF16 = (
    "which onnxruntime does not run: its CPU has no bfloat16 MatMul and numpy no bfloat16 buffers; use "
    "--backend torch, torch-cuda or tensorrt, or export with --precision fp16 or fp32"
)


class OnnxRuntimeBackend:
    """Runs a bundle on the CPU, or through an execution provider of ONNX Runtime on a GPU.

    Buffers are on the host whatever the provider: with a GPU every graph copies its inputs there and its
    outputs back, which serves to compare numbers, not to plan fast.

    Args:
        bundle: a checked bundle.
        threads: threads within an operator; None takes all physical cores.
        low_memory: use weights where the file is mapped instead of a copy packed for the matrix products.
            The resident peak stays as it is, but these pages are shared between processes and given back
            under pressure; prefill takes up to 5 % longer, decoding a third.
        provider: "cpu", "cuda", or "tensorrt", which builds an engine when a shape is first seen and keeps it
            in the bundle's engines folder.

    Raises:
        BackendError: the bundle is of precision bf16, this ONNX Runtime has no such provider or cannot start
            it, refuses a graph, or a graph's tensors are not those of the contract.
    """

    name = "onnxruntime"
    clock: Clock = "host"

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        low_memory: bool = False,
        provider: Provider = "cpu",
    ) -> None:
        where = f"{threads or 'all'} threads" if provider == "cpu" else f"{provider} provider"
        kind = "CPU" if provider == "cpu" else "GPU"
        self.device = f"{kind}, onnxruntime {onnxruntime.__version__}, {where}"
        self.graphs = bundle.graphs
        if bundle.manifest.options.precision == "bf16":
            raise BackendError(f"{bundle.path} is of precision bf16, {NO_BF16}")
        providers = _providers(provider, bundle)
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
                    path, sess_options=options, providers=providers
                )
            except Exception as error:
                raise BackendError(
                    f"onnxruntime {onnxruntime.__version__} cannot load {path}: {error}; export the bundle "
                    f"anew, with --opset 18 if this release is too old for {bundle.manifest.options.opset}"
                ) from error
            started = self.sessions[name].get_providers()
            if _PROVIDER_NAMES[provider] not in started:
                raise BackendError(
                    f"backend onnxruntime-{provider}: onnxruntime {onnxruntime.__version__} could not start "
                    f"it and took {', '.join(started)}; install the CUDA, cuDNN and TensorRT versions that "
                    "this release of onnxruntime names, or use --backend onnxruntime"
                )
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
        contract.check_buffers(
            variant, {name: (str(held.dtype), held.shape) for name, held in tensors.items()}
        )
        for tensor in contract.tensors:
            buffer = tensors[tensor.name]
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


def require_provider(provider: Provider) -> None:
    """Refuse an execution provider that this ONNX Runtime has not.

    Raises:
        BackendError: with those it has, and how to get the other.
    """
    available = onnxruntime.get_available_providers()
    if _PROVIDER_NAMES[provider] not in available:
        raise BackendError(
            f"backend onnxruntime-{provider}: onnxruntime {onnxruntime.__version__} has no "
            f"{_PROVIDER_NAMES[provider]}, only {', '.join(available)}; on a machine with an NVIDIA GPU: "
            "pip uninstall onnxruntime, pip install onnxruntime-gpu (on a Jetson the wheel of its JetPack), "
            "or use --backend onnxruntime"
        )


def _providers(provider: Provider, bundle: Bundle) -> list[tuple[str, dict[str, str]]]:
    """What a session is asked for: the provider, then those that take the operators it leaves."""
    require_provider(provider)
    cache = str(bundle.path / ENGINES / "onnxruntime-tensorrt")
    if provider == "tensorrt":
        (bundle.path / ENGINES).mkdir(exist_ok=True)  # onnxruntime makes only the last folder of a path
    options: dict[Provider, dict[str, str]] = {
        "tensorrt": {"trt_engine_cache_enable": "1", "trt_engine_cache_path": cache},
        "cuda": {"use_tf32": "0"},  # TF32 would round what is compared with the CPU
        "cpu": {},
    }
    order: list[Provider] = ["tensorrt", "cuda", "cpu"]
    return [(_PROVIDER_NAMES[name], options[name]) for name in order[order.index(provider) :]]
