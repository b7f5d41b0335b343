"""Main loop of the nodes that have no lifecycle: until they are done, or interrupted."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from vla_autoprune.errors import VlaError

SPIN_S = 0.1
"""How long a signal may go unnoticed while nothing happens."""
LAUNCH_PID = "VLA_AUTOPRUNE_LAUNCH_PID"
"""Environment variable: the launch that a node belongs to."""
PR_SET_PDEATHSIG = 1
"""Of prctl(2)."""


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
    _on_signals(lambda _number, _frame: sys.exit(0))  # a data set takes long to open, with nothing to finish
    end_with_launch()
    rclpy.init(args=sys.argv if args is None else list(args), signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = make()
        _on_signals(lambda number, _: received.append(number))
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
        _on_signals(signal.SIG_IGN)  # it ends already
        rclpy.shutdown()
    return 0


def end_with_launch() -> None:
    """Let the kernel send SIGTERM when the process that started this one for a launch is gone.

    `ros2 launch` ends its nodes on SIGINT, but leaves them running when SIGTERM or SIGKILL ends it. Without
    the launch, or on another system than Linux, nothing changes.
    """
    launch = os.environ.get(LAUNCH_PID)
    if launch is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        os.kill(int(launch), 0)
    except ProcessLookupError:  # it was gone before the kernel knew
        os.kill(os.getpid(), signal.SIGTERM)


def _on_signals(handler: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
