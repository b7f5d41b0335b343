"""`open_loop_monitor`: scores published plans against the truth while they come, and sums up at the end."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from nav_msgs.msg import Path as PathMessage
from rclpy.clock import Clock, ClockType
from rclpy.node import Node

from ros_nodes import topics
from ros_nodes.messages import trajectory_of
from ros_nodes.open_loop import OnlineScores
from ros_nodes.parameters import NodeParameters, Parameter
from ros_nodes.programs import run_program
from vla_autoprune.errors import InputError
from vla_autoprune.files import write_whole

PARAMETERS = (
    Parameter("path_topic", topics.PLANNER_PATH, "What to score: planner/path or trajectory/path."),
    Parameter("out", "", "JSON file for the summary; empty writes none."),
    Parameter("deadline_ms", 500.0, "Plans that take longer from truth to plan are late.", 1.0, 60_000.0),
    Parameter("scored_point_x_m", 0.0, "Scored point ahead of the rear axle.", -10.0, 10.0),
    Parameter("scored_point_y_m", 0.0, "Scored point left of the rear axle.", -10.0, 10.0),
)

MOST_POSES = 1000
LOOK_S = 0.2
AFTERGLOW_S = 1.0
"""Plans may still come so long after the truth's publisher has gone."""


class OpenLoopMonitor(Node):
    """Ends by itself when the publisher of the truth has gone; prints a summary, writes it if asked to."""

    def __init__(self, **options: Any) -> None:
        super().__init__("open_loop_monitor", **options)
        self._settings = NodeParameters(self, PARAMETERS).read()
        folder = Path(self._settings["out"]).parent
        if not folder.is_dir():
            raise InputError(f"parameter out is {self._settings['out']!r}: there is no directory {folder}")
        self.done = False
        self._scores = OnlineScores((self._settings["scored_point_x_m"], self._settings["scored_point_y_m"]))
        self._last_seen_s: float | None = None
        # Plans first: whoever waits for a listener of the truth then has one of the plans, too.
        self._plans = self.create_subscription(
            PathMessage, self._settings["path_topic"], self._on_plan, topics.record_qos()
        )
        self._truths = self.create_subscription(
            PathMessage, topics.TRUTH_PATH, self._on_truth, topics.record_qos()
        )
        self._timer = self.create_timer(LOOK_S, self._look, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def finish(self) -> None:
        """Print the summary; write it."""
        summary = self._scores.summary(self._settings["deadline_ms"])
        print("\n".join(summary.lines()), flush=True)
        if self._settings["out"]:
            write_whole(Path(self._settings["out"]), summary.as_json())

    def _on_truth(self, message: PathMessage) -> None:
        self._scores.add_truth(trajectory_of(message, MOST_POSES), time.monotonic())

    def _on_plan(self, message: PathMessage) -> None:
        now_ns = self.get_clock().now().nanoseconds
        self._scores.add_plan(trajectory_of(message, MOST_POSES), now_ns, time.monotonic())

    def _look(self) -> None:
        if self.count_publishers(self._truths.topic_name):
            self._last_seen_s = time.monotonic()
        elif self._last_seen_s is not None:
            self.done = time.monotonic() - self._last_seen_s > AFTERGLOW_S


def main() -> int:
    """Score until the truth ends, or until interrupted."""
    return run_program(OpenLoopMonitor)


if __name__ == "__main__":
    sys.exit(main())
