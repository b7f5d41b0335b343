"""`recorder`: writes what the nodes hear and say to an MCAP rosbag2 directory, without rosbag2 installed."""

from __future__ import annotations

import shutil
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

from ros_nodes import topics
from ros_nodes.parameters import NodeParameters, Parameter
from ros_nodes.programs import run_program
from vla_autoprune.errors import InputError
from vla_autoprune.frame import CAMERAS

TOPICS = (
    *(topics.camera_topic(camera, raw) for camera in CAMERAS for raw in (False, True)),
    topics.ODOMETRY,
    topics.ACCELERATION,
    topics.COMMAND,
    topics.PLANNER_PATH,
    topics.PLANNER_STATUS,
    topics.PLANNER_TEXT,
    topics.GUARD_PATH,
    topics.GUARD_STATUS,
    topics.TRUTH_PATH,
    "/clock",
)

PARAMETERS = (
    Parameter("out", "", "Directory to write; it must not exist yet."),
    Parameter("keep_free_mb", 256.0, "The recording ends, whole, when the disk has less left.", 0.0, 1e6),
    Parameter("topics", ",".join(TOPICS), "Names with commas; relative ones follow namespace and remaps."),
)

LOOK_S = 0.2
DEPTH = 50


class Recorder(Node):
    """Subscribes to each topic as soon as it has a publisher, with a quality of service that hears it."""

    def __init__(self, **options: Any) -> None:
        super().__init__("recorder", **options)
        settings = NodeParameters(self, PARAMETERS).read()
        out = Path(settings["out"])
        if not settings["out"] or out.exists():
            raise InputError(f"parameter out is {settings['out']!r}; give a directory that is not there yet")
        self._keep_free_mb = settings["keep_free_mb"]
        free_mb = _free_mb(out)
        if free_mb < self._keep_free_mb:
            raise InputError(
                f"the disk of {out} has {free_mb:.0f} MB left; keep_free_mb is {self._keep_free_mb:g}: "
                "make room, or record elsewhere"
            )
        self.done = False
        self._wanted = [name.strip() for name in settings["topics"].split(",") if name.strip()]
        self.counts: dict[str, int] = {}
        """Messages so far, by topic."""
        self._out = out
        self._bag, self._types = _open_bag(out)
        self._timer = self.create_timer(LOOK_S, self._look, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self._look()

    def finish(self) -> None:
        """Close the recording; until then it is not whole."""
        self._bag.close()
        total = sum(self.counts.values())
        self.get_logger().info(f"{total} messages of {len(self.counts)} topics in {self._out}")

    def _look(self) -> None:
        free_mb = _free_mb(self._out)
        if free_mb < self._keep_free_mb:
            self.get_logger().error(
                f"the disk of {self._out} has {free_mb:.0f} MB left, keep_free_mb is {self._keep_free_mb:g}: "
                "the recording ends here"
            )
            self.done = True
        for name in list(self._wanted):
            publishers = self.get_publishers_info_by_topic(self.resolve_topic_name(name))
            if publishers:
                self._wanted.remove(name)
                self._record(name, publishers)

    def _record(self, name: str, publishers: list[Any]) -> None:
        offered = [publisher.qos_profile for publisher in publishers]
        reliable = all(qos.reliability == ReliabilityPolicy.RELIABLE for qos in offered)
        latched = all(qos.durability == DurabilityPolicy.TRANSIENT_LOCAL for qos in offered)
        qos = QoSProfile(
            depth=DEPTH,
            reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
            durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
        )
        kind = publishers[0].topic_type
        full_name = self.resolve_topic_name(name)
        connection = self._bag.add_connection(full_name, kind, typestore=self._types)
        self.counts[full_name] = 0
        package, _, message = kind.split("/")
        message_class = getattr(import_module(f"{package}.msg"), message)
        take = partial(self._on_message, connection)
        self.create_subscription(message_class, name, take, qos, raw=True)

    def _on_message(self, connection: Any, content: bytes) -> None:
        self._bag.write(connection, time.time_ns(), content)
        self.counts[connection.topic] += 1


def _free_mb(out: Path) -> float:
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free / 1e6


def _open_bag(out: Path) -> tuple[Any, Any]:
    try:
        from rosbags.rosbag2 import StoragePlugin, Writer
        from rosbags.typesys import Stores, get_typestore
    except ModuleNotFoundError as error:
        raise InputError(
            f"{error.name} is not installed; recording needs: pip install 'vla_autoprune[record]'"
        ) from error
    bag = Writer(out, version=9, storage_plugin=StoragePlugin.MCAP)
    bag.open()
    return bag, get_typestore(Stores.LATEST)


def main() -> int:
    """Record until interrupted."""
    return run_program(Recorder)


if __name__ == "__main__":
    sys.exit(main())
