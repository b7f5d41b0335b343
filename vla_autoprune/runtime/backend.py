"""What the runtime asks of a backend. It is handed one and never imports one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from vla_autoprune.contract import ElementType

Buffer = Any
"""Memory of a backend; only the backend looks inside. On the host it is a numpy array."""

Run = Callable[[], None]
"""Queues a graph on the buffers it was bound to."""

Steps = Sequence[tuple[str, Callable[[], None]]]
"""Work in order, each part under the name its time is reported by."""

Clock = Literal["host", "device"]
"""Whose clock times the steps of a program: the host's, which is done with each when the next begins, or the
device's, which works through what the host has queued."""


class Program(Protocol):
    """Work that frames repeat: on a device one CUDA graph, on the host the calls one after the other."""

    def __call__(self) -> None:
        """Queue all of it once more."""
        ...

    def times_ms(self) -> Mapping[str, float]:
        """Milliseconds per step of the last call; waits until it is done."""
        ...


class Backend(Protocol):
    """Runs the graphs of one bundle on buffers of its own.

    A backend never chooses a bucket and never reads an answer. Everything is allocated, bound and captured
    before the first frame; after that, frames only write, run, move and read. Work happens in the order it
    was asked for, but on a device later than that: only `read` and `wait` wait.

    Attributes:
        name: "onnxruntime", "tensorrt", …
        device: what it runs on, for reports.
        clock: whose clock its programs are timed by.
    """

    name: str
    device: str
    clock: Clock

    def allocate(self, elements: int, dtype: ElementType) -> Buffer:
        """Memory for that many elements, zeroed."""
        ...

    def host(self, shape: tuple[int, ...], dtype: ElementType) -> NDArray[Any]:
        """Zeroed host memory that programs may `write` from; what it holds when they run is what they copy.

        Frames may change it once what was queued before has been waited for.
        """
        ...

    def view(self, buffer: Buffer, shape: tuple[int, ...], start: int = 0) -> Buffer:
        """The elements of a buffer from `start` on, seen in a shape; no copy."""
        ...

    def write(self, buffer: Buffer, values: NDArray[Any], start: int = 0) -> None:
        """Copy host values into a buffer, from row `start` of its second-last axis (a vector's only axis)."""
        ...

    def clear(self, buffer: Buffer) -> None:
        """Fill a buffer with zeros."""
        ...

    def fetch(self, buffer: Buffer) -> None:
        """Queue a copy of a buffer to the host, for `read`."""
        ...

    def read(self, buffer: Buffer) -> NDArray[Any]:
        """The values last fetched of a buffer, after a wait; valid until it is fetched again."""
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

    def program(self, steps: Steps) -> Program:
        """Make work repeatable. Capturing it may run it once, on what the buffers hold now.

        Args:
            steps: made of runs, moves, fetches, and writes from `host` memory, nothing else.
        """
        ...

    def wait(self) -> None:
        """Return when everything queued is done."""
        ...

    def close(self) -> None:
        """Give back sessions and memory."""
        ...


class StepByStep:
    """The program of a backend that is done with each call when the call returns."""

    def __init__(self, steps: Steps) -> None:
        self.steps = tuple(steps)
        self._ms = {name: 0.0 for name, _ in steps}

    def __call__(self) -> None:
        """Do the steps and time them."""
        self._ms.update(dict.fromkeys(self._ms, 0.0))
        for name, work in self.steps:
            begin = time.perf_counter()
            work()
            self._ms[name] += 1e3 * (time.perf_counter() - begin)

    def times_ms(self) -> Mapping[str, float]:
        """Milliseconds per step of the last call."""
        return self._ms
