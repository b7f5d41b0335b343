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


def transition(
    step: Callable[[Self, LifecycleState], None],
) -> Callable[[Self, LifecycleState], TransitionCallbackReturn]:
    """Make a lifecycle callback of a method that raises what is wrong: it is logged, the transition fails.

    rclpy itself swallows what a callback raises.
    """

    @functools.wraps(step)
    def callback(node: Any, state: LifecycleState) -> TransitionCallbackReturn:
        from rclpy.lifecycle import TransitionCallbackReturn

        name = step.__name__.removeprefix("on_")
        try:
            step(node, state)
        except VlaError as error:
            node.get_logger().error(f"{name} refused: {error}")
            return TransitionCallbackReturn.FAILURE
        except Exception:
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

    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: stop.append(received))
    end_with_launch()
    rclpy.init(args=sys.argv if args is None else list(args), signal_handler_options=SignalHandlerOptions.NO)
    node = make()
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    code = 0
    try:
        while not stop:
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
