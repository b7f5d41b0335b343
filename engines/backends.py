"""The one place that opens a backend by name; one that is absent is an error that says how to get it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal, get_args

from vla_autoprune.bundle import Bundle
from vla_autoprune.contract import Precision
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
    with _absent_packages(name):
        if name in _PROVIDERS:
            from engines.onnxruntime import OnnxRuntimeBackend

            return OnnxRuntimeBackend(bundle, threads=threads, provider=_PROVIDERS[name])
        if name in ("torch", "torch-cuda"):
            from engines.torch_graphs import TorchBackend

            return TorchBackend(bundle, threads=threads, device="cuda" if name == "torch-cuda" else "cpu")
        if name == "tensorrt":
            from engines.tensorrt.backend import TensorRtBackend

            return TensorRtBackend(bundle)
    raise BackendError(f"backend is {name!r}; allowed: {', '.join(get_args(Name))}")


def require_backend(name: Name, precision: Precision) -> None:
    """Refuse a backend that cannot run a bundle as export leaves it, before there is one.

    Args:
        name: as of `open_backend`.
        precision: of the bundle to come.

    Raises:
        BackendError: its package or device is absent, or it runs no such bundle.
    """
    with _absent_packages(name):
        if name in _PROVIDERS:
            from engines.onnxruntime import NO_BF16, require_provider

            if precision == "bf16":
                raise BackendError(f"backend {name}: precision is bf16, {NO_BF16}")
            require_provider(_PROVIDERS[name])
        elif name in ("torch", "torch-cuda"):
            from engines.torch_graphs import require_device

            require_device("cuda" if name == "torch-cuda" else "cpu")
        else:
            raise BackendError(
                f"backend {name} runs engines that are built for a bundle, and there is none yet; use "
                "torch-cuda on a GPU"
            )


@contextlib.contextmanager
def _absent_packages(name: Name) -> Iterator[None]:
    """Say how to get what is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _PACKAGES:
            raise
        raise BackendError(
            f"backend {name}: {package} is not installed; {_PACKAGES[package]}, or use another --backend"
        ) from error
