"""A recorded drive planned again, plan by plan; knows no ROS and needs none.

Messages are read in the order they came. When a plan's status comes up, all that the planner knew has passed
by, and what came while it planned: images, odometry and acceleration go by their stamps, the command is the
one that the status names. What a busy recorder took after the status is waited for, until the status of the
next plan. The frame is put together anew and planned in the recorded bucket.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ros_nodes import topics
from ros_nodes.camera_images import ImageData, image_of
from ros_nodes.ego_motion import AccelerationSource, EgoMotion
from ros_nodes.messages import image_data, odometry_sample, stamp_ns_of, trajectory_of
from ros_nodes.motion import Trajectory
from vla_autoprune.errors import InputError, VlaError
from vla_autoprune.frame import Command, Frame, Image, Plan
from vla_autoprune.images import Reduction

PlanInBucket = Callable[[Frame, str], Plan]

IMAGES_KEPT = 40
"""Per camera: four seconds at 10 Hz."""
MOST_POSES = 1000
ROUNDING_MS = 0.01
"""Of times in a status."""


@dataclass(frozen=True)
class Replayed:
    """A recorded plan beside its repetition.

    Attributes:
        difference_m: largest distance between waypoints due at the same time; None if it was not repeated.
        recorded_ms: planning time the planner stated.
        replayed_ms: planning time now.
        problem: why it was not repeated.
    """

    stamp_ns: int
    bucket: str
    recorded_ms: float
    difference_m: float | None = None
    replayed_ms: float | None = None
    problem: str = ""


@dataclass
class _Known:
    """What the planner had heard up to a message."""

    ego: EgoMotion
    images: dict[str, deque[tuple[int, ImageData]]]
    command: Command | None = None
    paths: dict[int, Trajectory] = field(default_factory=dict)


def replay(
    recording: Path,
    cameras: tuple[str, ...],
    plan: PlanInBucket,
    reduction: Reduction | None = None,
    acceleration_source: AccelerationSource = "odometry",
    sync_tolerance_ms: float = 50.0,
    odometry_max_age_ms: float = 200.0,
) -> Iterator[Replayed]:
    """Plan again what was planned while a recording was made.

    Args:
        recording: rosbag2 directory, MCAP or SQLite, of `recorder` or of rosbag2.
        cameras: those the bundle wants.
        plan: plans a frame in a named bucket.
        reduction: the planner's, to decode images as it did.
        acceleration_source: the planner's parameter when it was recorded.
        sync_tolerance_ms: the planner's parameter when it was recorded.
        odometry_max_age_ms: the planner's parameter when it was recorded.

    Yields:
        Each recorded plan, in order.

    Raises:
        InputError: there is no recording, or it holds no plans with their status.
    """
    known = _Known(
        EgoMotion(odometry_max_age_ms, acceleration_source),
        {camera: deque(maxlen=IMAGES_KEPT) for camera in cameras},
    )
    suffixes = {topics.camera_topic(camera, raw): camera for camera in cameras for raw in (False, True)}
    tolerance_ns = round(sync_tolerance_ms * 1e6)
    decode = partial(image_of, reduction=reduction)
    waiting: deque[tuple[int, dict[str, str]]] = deque()
    found = False

    def repeated(all_but: int) -> Iterator[Replayed]:
        nonlocal found
        while len(waiting) > all_but or (waiting and _is_whole(known, *waiting[0], tolerance_ns)):
            stamp_ns, values = waiting.popleft()
            recorded = known.paths.pop(stamp_ns, None)
            if recorded is not None:
                found = True
                yield _repeat(known, recorded, values, decode, plan, tolerance_ns)

    for topic, message in read_messages(recording):
        camera = next((suffixes[suffix] for suffix in suffixes if topic.endswith("/" + suffix)), None)
        if camera is not None:
            known.images[camera].append((stamp_ns_of(message.header.stamp), image_data(message)))
        elif topic.endswith("/" + topics.PLANNER_STATUS):
            values = {item.key: item.value for status in message.status for item in status.values}
            if values.get("bucket"):
                waiting.append((stamp_ns_of(message.header.stamp), values))
        else:
            _learn(known, topic, message)
        yield from repeated(all_but=1)
    yield from repeated(all_but=0)
    if not found:
        raise InputError(
            f"{recording} holds no plan with its status; record {topics.PLANNER_PATH} and "
            f"{topics.PLANNER_STATUS}"
        )


def _learn(known: _Known, topic: str, message: Any) -> None:
    if topic.endswith("/" + topics.ODOMETRY):
        known.ego.add(odometry_sample(message))
    elif topic.endswith("/" + topics.ACCELERATION):
        known.ego.add_acceleration(stamp_ns_of(message.header.stamp), message.accel.accel.linear.x)
    elif topic.endswith("/" + topics.COMMAND) and message.data in [command.value for command in Command]:
        known.command = Command(message.data)
    elif topic.endswith("/" + topics.PLANNER_PATH):
        path = trajectory_of(message, MOST_POSES)
        known.paths[path.stamp_ns] = path


def _is_whole(known: _Known, stamp_ns: int, values: dict[str, str], tolerance_ns: int) -> bool:
    """Whether a plan and all that led to it have been read."""
    skew_ms = values.get("skew_ms")
    furthest_ns = tolerance_ns if skew_ms is None else round((float(skew_ms) + ROUNDING_MS) * 1e6)
    return (
        stamp_ns in known.paths
        and known.ego.reached(stamp_ns)
        and all(
            any(abs(image_ns - stamp_ns) <= furthest_ns for image_ns, _ in kept)
            for kept in known.images.values()
        )
    )


def _repeat(
    known: _Known,
    recorded: Trajectory,
    values: dict[str, str],
    decode: Callable[[str, ImageData], Image],
    plan: PlanInBucket,
    tolerance_ns: int,
) -> Replayed:
    result = Replayed(recorded.stamp_ns, values["bucket"], float(values.get("total_ms", "nan")))
    try:
        if values.get("filled"):
            raise InputError(f"its {values['filled']} had no image of its own")
        command = Command(values["command"]) if values.get("command") else known.command
        if command is None:
            raise InputError("no command was recorded before it")
        images = {}
        behind_ns = _behind_ns(values.get("behind_ms", ""))
        for camera, kept in known.images.items():
            used_ns = recorded.stamp_ns - behind_ns.get(camera, 0)
            near = min(kept, key=lambda entry: abs(entry[0] - used_ns), default=None)
            if near is None or abs(near[0] - recorded.stamp_ns) > tolerance_ns:
                raise InputError(f"no image of {camera} was recorded for it")
            images[camera] = decode(camera, near[1])
        ego = known.ego.at(recorded.stamp_ns)
        again = plan(Frame(images, ego, command, stamp_s=recorded.stamp_ns / 1e9), result.bucket)
    except VlaError as error:
        return Replayed(result.stamp_ns, result.bucket, result.recorded_ms, problem=str(error))
    apart = np.full(1, np.inf)
    if len(again.waypoints_in_ego) == len(recorded.poses):
        apart = np.hypot(*(again.waypoints_in_ego[:, :2] - recorded.poses[:, :2]).T)
    return Replayed(
        result.stamp_ns, result.bucket, result.recorded_ms, float(apart.max()), again.timings_ms["total"]
    )


def _behind_ns(text: str) -> dict[str, int]:
    """By camera, how much older than the frame the image was that the planner took of it."""
    pairs = (item.split() for item in text.split(";") if item.strip())
    return {camera: round(float(ms) * 1e6) for camera, ms in pairs}


def read_messages(recording: Path) -> Iterator[tuple[str, Any]]:
    """Read a recording.

    Args:
        recording: rosbag2 directory, MCAP or SQLite.

    Yields:
        Topic and content of each message, in the order they came.

    Raises:
        InputError: it is none, or cannot be read.
    """
    from rosbags.highlevel import AnyReader, AnyReaderError
    from rosbags.typesys import Stores, get_typestore

    if not (recording / "metadata.yaml").is_file():
        raise InputError(
            f"{recording} holds no metadata.yaml; give a directory that recorder or rosbag2 finished"
        )
    try:
        with AnyReader([recording], default_typestore=get_typestore(Stores.LATEST)) as reader:
            for connection, _, content in reader.messages():
                yield connection.topic, reader.deserialize(content, connection.msgtype)
    except AnyReaderError as error:
        raise InputError(f"{recording} cannot be read: {error}; record it anew") from error
