"""What the runtime asks of a backend. It is handed one and never imports one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from vla_autoprune.contract import ElementType

Buffer = Any
"""Memory of a backend; only the backend looks inside. On the host it is a numpy array."""

Run = Callable[[], None]
"""Runs a graph on the buffers it was bound to; returns when the outputs are there."""


class Backend(Protocol):
    """Runs the graphs of one bundle on buffers of its own.

    A backend never chooses a bucket and never reads an answer. Everything is allocated and bound before the
    first frame; after that, frames only write, run, move and read.

    Attributes:
        name: "onnxruntime", "tensorrt", …
        device: what it runs on, for reports.
    """

    name: str
    device: str

    def allocate(self, elements: int, dtype: ElementType) -> Buffer:
        """Memory for that many elements, zeroed."""
        ...

    def view(self, buffer: Buffer, shape: tuple[int, ...]) -> Buffer:
        """The first elements of a buffer, seen in a shape; no copy."""
        ...

    def write(self, buffer: Buffer, values: NDArray[Any], start: int = 0) -> None:
        """Copy host values into a buffer, from row `start` of its second-last axis (a vector's only axis)."""
        ...

    def read(self, buffer: Buffer) -> NDArray[Any]:
        """A buffer's values on the host, valid until the buffer is next written."""
        ...

    def move_rows(self, source: Buffer, first: int, target: Buffer, start: int, count: int) -> None:
        """Copy `count` rows (second-last axis) of a buffer, from `first` on, into another from `start` on."""
        ...

    def bind(self, graph: str, variant: str, tensors: Mapping[str, Buffer]) -> Run:
        """Fix the buffers of every tensor of a graph.

        Raises:
            BackendError: a tensor is missing, or its buffer has not the shape the recipe pins for this
                variant.
        """
        ...

    def close(self) -> None:
        """Give back sessions and memory."""
        ...
