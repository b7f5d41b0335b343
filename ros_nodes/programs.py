"""Main loop of the nodes that have no lifecycle: until they are done, or interrupted."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

from vla_autoprune.errors import VlaError

SPIN_S = 0.1
"""How long a signal may go unnoticed while nothing happens."""


class Program(Protocol):
    """A node that knows when it is done."""

    done: bool

    def finish(self) -> None:
        """Called once at the end, whatever ended it."""


def run_program(make: Callable[[], Program], args: Sequence[str] | None = None) -> int:
    """Spin a node until it is done, or SIGINT or SIGTERM comes.

    Args:
        make: makes the node, after rclpy is up.
        args: command line; None takes the process's.

    Returns:
        The exit code: 0, or 2 after an error made on purpose, which is logged in one line.
    """
    import rclpy
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.logging import get_logger
    from rclpy.signals import SignalHandlerOptions

    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: received.append(number))
    rclpy.init(args=sys.argv if args is None else list(args), signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = make()
        executor = SingleThreadedExecutor()
        executor.add_node(node)  # type: ignore[arg-type]
        try:
            while not (received or node.done):
                executor.spin_once(timeout_sec=SPIN_S)
        finally:
            node.finish()
            executor.shutdown()
            node.destroy_node()  # type: ignore[attr-defined]
    except VlaError as error:
        get_logger("vla_autoprune").fatal(str(error))
        return 2
    finally:
        rclpy.shutdown()
    return 0
