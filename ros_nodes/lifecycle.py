"""What lifecycle nodes share: transitions that say why they failed, and a main loop that ends in order."""

from __future__ import annotations

import functools
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ros_nodes.programs import end_with_launch
from vla_autoprune.errors import VlaError

if TYPE_CHECKING:
    from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn

    Self = TypeVar("Self", bound=LifecycleNode)

SPIN_S = 0.1
"""How long a signal may go unnoticed while no message arrives."""


class _GivenUp(BaseException):
    """A signal came during a transition that may take minutes."""


class _Signals:
    """SIGINT and SIGTERM of this process: noted, and raised where they may break off what is being done."""

    def __init__(self) -> None:
        self.received: list[str] = []
        self.break_off = False

    def allow_break_off(self) -> None:
        self.break_off = True
        if self.received:
            raise _GivenUp

    def take(self, number: int, _: object) -> None:
        self.received.append(signal.Signals(number).name)
        if self.break_off:
            self.break_off = False  # launch and terminal both send one; the second must not disturb the end
            raise _GivenUp


_signals = _Signals()


def transition(
    step: Callable[[Self, LifecycleState], None],
) -> Callable[[Self, LifecycleState], TransitionCallbackReturn]:
    """Make a lifecycle callback of a method that raises what is wrong: it is logged, the transition fails.

    rclpy itself swallows what a callback raises. Configuring is broken off by a signal; the other transitions
    are short, and some must not be.
    """

    @functools.wraps(step)
    def callback(node: Any, state: LifecycleState) -> TransitionCallbackReturn:
        from rclpy.lifecycle import TransitionCallbackReturn

        name = step.__name__.removeprefix("on_")
        try:
            try:
                if name == "configure":
                    _signals.allow_break_off()
                step(node, state)
            finally:
                _signals.break_off = False
        except (Exception, _GivenUp) as error:
            if name == "configure" and _signals.received:  # an import makes an error of its own of it
                node.get_logger().warning(f"{name} given up: {_signals.received[0]}")
            elif isinstance(error, VlaError):
                node.get_logger().error(f"{name} refused: {error}")
            else:
                node.get_logger().error(f"{name} failed: {traceback.format_exc()}")
            return TransitionCallbackReturn.FAILURE
        return TransitionCallbackReturn.SUCCESS

    return callback


def run(make: Callable[[], LifecycleNode], args: Sequence[str] | None = None) -> int:
    """Spin a lifecycle node until SIGINT or SIGTERM, then deactivate it, clean it up and end.

    rclpy's own handlers end the context first, after which a node could no longer publish a stop.

    Args:
        make: makes the node, after rclpy is up.
        args: command line; None takes the process's.

    Returns:
        The exit code: 0 after a signal, 1 if a callback raised.
    """
    import rclpy
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.signals import SignalHandlerOptions

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _signals.take)
    end_with_launch()
    rclpy.init(args=sys.argv if args is None else list(args), signal_handler_options=SignalHandlerOptions.NO)
    node = make()
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    code = 0
    try:
        while not _signals.received:
            executor.spin_once(timeout_sec=SPIN_S)
    except Exception:
        node.get_logger().fatal(f"ends after {traceback.format_exc()}")
        code = 1
    finally:
        _finalise(node)
        executor.shutdown()
        node.destroy_node()
        rclpy.shutdown()
    return code


def _finalise(node: LifecycleNode) -> None:
    from lifecycle_msgs.msg import State

    def state() -> int:
        return node._state_machine.current_state[0]

    if state() == State.PRIMARY_STATE_ACTIVE:
        node.trigger_deactivate()
    if state() == State.PRIMARY_STATE_INACTIVE:
        node.trigger_cleanup()
    if state() != State.PRIMARY_STATE_FINALIZED:
        node.trigger_shutdown()
