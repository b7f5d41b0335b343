"""The one place that opens a backend by name; one that is absent is an error that says how to get it."""

from __future__ import annotations

from typing import Literal, get_args

from vla_autoprune.bundle import Bundle
from vla_autoprune.errors import BackendError
from vla_autoprune.runtime.backend import Backend

Name = Literal["onnxruntime", "onnxruntime-cuda", "onnxruntime-tensorrt", "tensorrt", "torch", "torch-cuda"]

_PROVIDERS: dict[Name, Literal["cpu", "cuda", "tensorrt"]] = {
    "onnxruntime": "cpu",
    "onnxruntime-cuda": "cuda",
    "onnxruntime-tensorrt": "tensorrt",
}

_PACKAGES = {
    "onnxruntime": "pip install onnxruntime",
    "torch": "pip install 'vla_autoprune[export]'",
    "onnx": "pip install 'vla_autoprune[export]'",
}
"""TensorRT's own module says how to get TensorRT."""


def open_backend(name: Name, bundle: Bundle, *, threads: int | None = None) -> Backend:
    """Open a backend for a bundle.

    Args:
        name: which; after the hyphen stands the device or execution provider. Without one it is the CPU, for
            TensorRT the GPU.
        bundle: a checked bundle.
        threads: CPU threads; None takes all cores. Without effect on a GPU.

    Returns:
        The backend, ready to bind.

    Raises:
        BackendError: the name is unknown, its package or device is absent, or it cannot run this bundle.
    """
    try:
        if name in _PROVIDERS:
            from engines.onnxruntime import OnnxRuntimeBackend

            return OnnxRuntimeBackend(bundle, threads=threads, provider=_PROVIDERS[name])
        if name in ("torch", "torch-cuda"):
            from engines.torch_graphs import TorchBackend

            return TorchBackend(bundle, threads=threads, device="cuda" if name == "torch-cuda" else "cpu")
        if name == "tensorrt":
            from engines.tensorrt.backend import TensorRtBackend

            return TensorRtBackend(bundle)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _PACKAGES:
            raise
        raise BackendError(
            f"backend {name}: {package} is not installed; {_PACKAGES[package]}, or use another --backend"
        ) from error
    raise BackendError(f"backend is {name!r}; allowed: {', '.join(get_args(Name))}")
