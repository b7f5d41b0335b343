"""A scene to play back: plans, truth and road users over time, for Rerun (.rrd) and Foxglove (.mcap).

Everything stands in the map frame, so that plans stay where they were made. Both files hold the same things:
camera images as stored, ego pose, road users, drivable area, true path, plan, and what the plan cost.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from eval_nuscenes.evaluation import PlanRecord
from eval_nuscenes.nuscenes_reader import Sample
from eval_nuscenes.pictures import EGO_LENGTH_M, EGO_REAR_M, EGO_WIDTH_M, NEUTRAL, PLAN, TRUTH
from vla_autoprune.files import write_whole
from vla_autoprune.frame import FloatArray

ROAD_USER_HEIGHT_M = 1.6
"""The metrics need no heights, so the reader drops them; boxes are drawn this high."""
_EGO_HEIGHT_M = 1.5
_COSTS = (
    "complexity_bits",
    "latency_ms",
    "prefill_ms",
    "speed_mps",
    "visual_tokens_into_layers",
    "error_at_3_s_m",
)
_COST_SCHEMA = {"type": "object", "properties": {name: {"type": "number"} for name in _COSTS}}


@dataclass(frozen=True)
class RecordedSample:
    """One keyframe of a recording.

    Attributes:
        plan: of the variant that is shown.
        road: [N, 2] outlines of drivable area in the ego frame.
    """

    sample: Sample
    plan: PlanRecord
    road: Sequence[FloatArray]

    @property
    def nanoseconds(self) -> int:
        """Time of the keyframe."""
        return round(self.sample.stamp_s * 1e9)

    def in_map(self, points_in_ego: FloatArray) -> FloatArray:
        """[n, 3] points on the ground in the map frame, from [n, 2 or more] in the ego frame."""
        points = np.column_stack([points_in_ego[:, :2], np.zeros(len(points_in_ego))])
        return points @ self.sample.ego_pose[:3, :3].T + self.sample.ego_pose[:3, 3]

    @property
    def planned_path(self) -> FloatArray:
        """[7, 3] from the rear axle on."""
        return self.in_map(np.vstack([np.zeros(3), np.array(self.plan.waypoints_in_ego)]))

    @property
    def true_path(self) -> FloatArray:
        """[n, 3] from the rear axle on, as far as the scene goes."""
        future = self.sample.future_in_ego[self.sample.future_exists]
        return self.in_map(np.vstack([np.zeros(3), future]))

    @property
    def outlines(self) -> list[FloatArray]:
        """Drivable area, closed."""
        return [self.in_map(np.vstack([outline, outline[:1]])) for outline in self.road]

    @property
    def scalars(self) -> dict[str, float]:
        """What the plan cost and how good it was, by name and unit; what is not known is left out."""
        tokens, error = self.plan.visual_tokens_into_layers, None
        if self.sample.future_exists.all():
            planned = np.array(self.plan.waypoints_in_ego)[-1, :2]
            error = np.hypot(*(planned - self.sample.future_in_ego[-1, :2]))
        values = (
            self.plan.complexity,
            self.plan.timings_ms.get("total"),
            self.plan.timings_ms.get("prefill"),
            self.sample.ego.speed_mps,
            np.mean(tokens) if tokens else None,
            error,
        )
        known = zip(_COSTS, values, strict=True)
        return {name: float(value) for name, value in known if value is not None}


def write_rerun(path: Path, views: Iterable[RecordedSample], variant: str) -> None:
    """Write a Rerun recording; the file appears only when it is whole.

    Args:
        path: .rrd file, replaced if there.
        views: keyframes in order of time.
        variant: whose plans these are, for its text document.

    Raises:
        ModuleNotFoundError: rerun-sdk is not installed (extra viz).
    """
    import rerun as rr

    def write(file: BinaryIO) -> None:
        recording = rr.RecordingStream("vla_autoprune", make_default=False, make_thread_default=False)
        recording.save(file.name)
        recording.log("map", rr.ViewCoordinates.RIGHT_HAND_Z_UP, static=True)
        recording.log("map/ego/box", _ego_box(rr), static=True)
        recording.log("variant", rr.TextDocument(variant), static=True)
        for view in views:
            recording.set_time("keyframe", timestamp=view.sample.stamp_s)
            _log_to_rerun(recording, rr, view)
        recording.flush()
        recording.disconnect()

    write_whole(path, write)


def _ego_box(rr: Any) -> Any:
    centre = EGO_LENGTH_M / 2 - EGO_REAR_M
    return rr.Boxes3D(
        centers=[[centre, 0.0, _EGO_HEIGHT_M / 2]],
        half_sizes=[[EGO_LENGTH_M / 2, EGO_WIDTH_M / 2, _EGO_HEIGHT_M / 2]],
        colors=[_rgb(PLAN)],
        labels=["ego"],
    )


def _log_to_rerun(recording: Any, rr: Any, view: RecordedSample) -> None:
    sample = view.sample
    recording.log(
        "map/ego", rr.Transform3D(translation=sample.ego_pose[:3, 3], mat3x3=sample.ego_pose[:3, :3])
    )
    boxes = list(_road_users(view))
    recording.log(
        "map/road_users",
        rr.Boxes3D(
            centers=[centre for _, centre, _, _ in boxes],
            half_sizes=[np.array(size) / 2 for _, _, size, _ in boxes],
            quaternions=[[0.0, 0.0, np.sin(yaw / 2), np.cos(yaw / 2)] for _, _, _, yaw in boxes],
            labels=[category for category, _, _, _ in boxes],
            show_labels=False,
            colors=[_rgb(NEUTRAL)],
        ),
    )
    recording.log("map/drivable_area", rr.LineStrips3D(view.outlines, colors=[_rgb(NEUTRAL)], radii=[0.05]))
    for name, points, colour in (
        ("truth", view.true_path, TRUTH),
        ("plan", view.planned_path, PLAN),
    ):
        recording.log(f"map/{name}", rr.LineStrips3D([points], colors=[_rgb(colour)], radii=[0.12]))
    for camera, calibrated in sample.cameras.items():
        if calibrated.path.is_file():
            content = calibrated.path.read_bytes()
            recording.log(f"cameras/{camera}", rr.EncodedImage(contents=content, media_type="image/jpeg"))
    for name, value in view.scalars.items():
        recording.log(f"plan/{name}", rr.Scalars(value))


def write_mcap(path: Path, views: Iterable[RecordedSample], variant: str) -> None:
    """Write an MCAP file with Foxglove's schemas; the file appears only when it is whole.

    Topics: /scene (SceneUpdate), /plan and /truth (PosesInFrame), /tf (FrameTransforms),
    /<camera>/image (CompressedImage) and /<camera>/calibration, /plan/cost (JSON).

    Args:
        path: .mcap file, replaced if there.
        views: keyframes in order of time.
        variant: whose plans these are, in the file's metadata.

    Raises:
        ModuleNotFoundError: foxglove-sdk is not installed (extra viz).
    """
    import foxglove

    def write(file: BinaryIO) -> None:
        context = foxglove.Context()
        with foxglove.open_mcap(file, context=context) as writer:
            channels = _Channels(foxglove, context)
            for view in views:
                _log_to_mcap(foxglove, channels, view)
            writer.write_metadata("vla_autoprune", {"variant": variant})

    write_whole(path, write)


class _Channels:
    """The file's topics, each made when it is first written to."""

    def __init__(self, foxglove: Any, context: Any) -> None:
        self._foxglove, self._context = foxglove, context
        self._open: dict[str, Any] = {}

    def log(self, topic: str, message: Any, nanoseconds: int) -> None:
        if topic not in self._open:
            if isinstance(message, dict):
                definition = json.dumps(_COST_SCHEMA).encode()
                schema = self._foxglove.Schema(
                    name="vla_autoprune.PlanCost", encoding="jsonschema", data=definition
                )
                channel = self._foxglove.Channel(
                    topic, schema=schema, message_encoding="json", context=self._context
                )
            else:
                kind = getattr(self._foxglove.channels, f"{type(message).__name__}Channel")
                channel = kind(topic, context=self._context)
            self._open[topic] = channel
        self._open[topic].log(message, log_time=nanoseconds)


def _log_to_mcap(foxglove: Any, channels: _Channels, view: RecordedSample) -> None:
    messages, sample, now = foxglove.messages, view.sample, view.nanoseconds
    stamp = messages.Timestamp(sec=now // 10**9, nsec=now % 10**9)

    def vector(values: Sequence[float] | FloatArray) -> Any:
        x, y, z = (float(value) for value in values)
        return messages.Vector3(x=x, y=y, z=z)

    def turned(yaw: float) -> Any:
        return messages.Quaternion(x=0.0, y=0.0, z=float(np.sin(yaw / 2)), w=float(np.cos(yaw / 2)))

    def pose(centre: FloatArray, yaw: float) -> Any:
        return messages.Pose(position=vector(centre), orientation=turned(yaw))

    def points(rows: FloatArray) -> list[Any]:
        return [messages.Point3(x=float(x), y=float(y), z=float(z)) for x, y, z in rows]

    def colour(name: str, opacity: float) -> Any:
        red, green, blue = (value / 255 for value in _rgb(name))
        return messages.Color(r=red, g=green, b=blue, a=opacity)

    def line(rows: FloatArray, name: str, thickness: float) -> Any:
        return messages.LinePrimitive(
            type=messages.LinePrimitiveLineType.LineStrip,
            points=points(rows),
            thickness=thickness,
            color=colour(name, 1.0),
        )

    def entity(name: str, **parts: Any) -> Any:
        return messages.SceneEntity(timestamp=stamp, frame_id="map", id=name, frame_locked=False, **parts)

    def cube(centre: FloatArray, size: Sequence[float], yaw: float, name: str) -> Any:
        return messages.CubePrimitive(pose=pose(centre, yaw), size=vector(size), color=colour(name, 0.6))

    heading = float(np.arctan2(sample.ego_pose[1, 0], sample.ego_pose[0, 0]))
    ahead = view.in_map(np.array([[EGO_LENGTH_M / 2 - EGO_REAR_M, 0.0]]))[0] + [0, 0, _EGO_HEIGHT_M / 2]
    ego_size = (EGO_LENGTH_M, EGO_WIDTH_M, _EGO_HEIGHT_M)
    users = [cube(centre, size, yaw, NEUTRAL) for _, centre, size, yaw in _road_users(view)]
    entities = [
        entity("drivable_area", lines=[line(outline, NEUTRAL, 0.08) for outline in view.outlines]),
        entity("road_users", cubes=users),
        entity("ego", cubes=[cube(ahead, ego_size, heading, PLAN)]),
        entity("truth", lines=[line(view.true_path, TRUTH, 0.25)]),
        entity("plan", lines=[line(view.planned_path, PLAN, 0.25)]),
    ]
    channels.log("/scene", messages.SceneUpdate(deletions=[], entities=entities), now)
    transform = messages.FrameTransform(
        timestamp=stamp,
        parent_frame_id="map",
        child_frame_id="base_link",
        translation=vector(sample.ego_pose[:3, 3]),
        rotation=turned(heading),
    )
    channels.log("/tf", messages.FrameTransforms(transforms=[transform]), now)
    for topic, path in (("/plan", view.planned_path), ("/truth", view.true_path)):
        poses = [pose(point, yaw) for point, yaw in zip(path, _directions(path), strict=True)]
        channels.log(topic, messages.PosesInFrame(timestamp=stamp, frame_id="map", poses=poses), now)
    for camera, calibrated in sample.cameras.items():
        if not calibrated.path.is_file():
            continue
        image = messages.CompressedImage(
            timestamp=stamp, frame_id=camera, data=calibrated.path.read_bytes(), format="jpeg"
        )
        channels.log(f"/{camera}/image", image, now)
        intrinsics = calibrated.intrinsics.astype(float)
        calibration = messages.CameraCalibration(
            timestamp=stamp,
            frame_id=camera,
            width=calibrated.width,
            height=calibrated.height,
            K=intrinsics.ravel().tolist(),
            R=np.eye(3).ravel().tolist(),
            P=np.column_stack([intrinsics, np.zeros(3)]).ravel().tolist(),
        )
        channels.log(f"/{camera}/calibration", calibration, now)
    channels.log("/plan/cost", view.scalars, now)


def _directions(path: FloatArray) -> FloatArray:
    """[n] the yaw towards the next point of a path, the last one kept."""
    steps = np.diff(path[:, :2], axis=0)
    yaws = np.arctan2(steps[:, 1], steps[:, 0])
    return np.append(yaws, yaws[-1:]) if len(yaws) else np.zeros(len(path))


def _road_users(view: RecordedSample) -> Iterable[tuple[str, FloatArray, tuple[float, float, float], float]]:
    """Category, centre in the map frame, (length, width, height), yaw in the map frame."""
    map_from_lidar = view.sample.ego_pose @ view.sample.ego_from_lidar
    turned = float(np.arctan2(map_from_lidar[1, 0], map_from_lidar[0, 0]))
    for box in view.sample.truth.boxes[0]:
        centre = map_from_lidar @ np.array([box.x, box.y, 0.0, 1.0])
        centre[2] = view.sample.ego_pose[2, 3] + ROAD_USER_HEIGHT_M / 2
        yield box.category, centre[:3], (box.length, box.width, ROAD_USER_HEIGHT_M), box.yaw + turned


def _rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return red, green, blue
