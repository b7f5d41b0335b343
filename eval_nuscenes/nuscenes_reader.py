"""Samples of any data set in nuScenes format: frames to plan on, and what really happened afterwards.

The ego frame is x forward, y left at the rear axle; the LiDAR frame is x right, y forward. "At t0" means at
the time of the LIDAR_TOP keyframe.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eval_nuscenes.driving_command import RouteCommands, command_of_offset
from eval_nuscenes.metrics import STEPS, OpenLoopProtocol, OpenLoopTruth, Score, TrackedBox, Waypoints
from eval_nuscenes.road_map import Pose, RoadMap, map_path, points_in_ego, require_map
from vla_autoprune.errors import InputError
from vla_autoprune.files import read_json
from vla_autoprune.frame import CAMERAS, Command, EgoState, FloatArray, Frame, Image
from vla_autoprune.images import Reduction, decode_image

CommandSource = Literal["route", "future"]
EgoStateSource = Literal["auto", "can_bus", "poses"]
EgoSource = Literal["can_bus", "poses", "unknown"]

TABLES = (
    "attribute",
    "calibrated_sensor",
    "category",
    "ego_pose",
    "instance",
    "log",
    "map",
    "sample",
    "sample_annotation",
    "sample_data",
    "scene",
    "sensor",
    "visibility",
)
NUSCENES_VERSIONS = ("v1.0-mini", "v1.0-trainval", "v1.0-test")
BAD_CAN_BUS = frozenset(
    f"scene-{number:04d}" for number in (*range(161, 169), *range(170, 177), *range(309, 315), 419)
)
"""Scenes of nuScenes that ST-P3 leaves out: the devkit's list of those without CAN bus, and 0419."""
STALE_S = 0.5
"""Older CAN messages are not taken for the present."""
HISTORY = 4
"""Keyframes of history in a sample."""


Record = dict[str, Any]
Transform = NDArray[np.float64]


@dataclass(frozen=True)
class CameraView:
    """One camera's image file at t0 with its calibration.

    Attributes:
        intrinsics: [3, 3] for the image as stored.
        ego_from_camera: [4, 4].
    """

    path: Path
    width: int
    height: int
    intrinsics: FloatArray
    ego_from_camera: Transform


@dataclass(frozen=True)
class Sample:
    """One keyframe: what a planner may know, and the truth to score it against.

    Attributes:
        ego_source: where speed, acceleration and yaw rate come from: CAN bus messages, differences of past
            ego poses, or nowhere (first keyframe of a scene without CAN bus, taken as standing still).
        history_in_ego: [H, 3] x, y, heading of up to 4 past keyframes, oldest first.
        future_in_ego: [6, 3] the true rear-axle waypoints; rows beyond the scene's end are 0.
        future_exists: [6].
        ego_from_lidar: [4, 4].
        ego_pose: [4, 4] from the ego frame at t0 to the map.
    """

    token: str
    scene: str
    location: str
    stamp_s: float
    cameras: Mapping[str, CameraView]
    ego: EgoState
    ego_source: EgoSource
    command: Command
    history_in_ego: FloatArray
    future_in_ego: FloatArray
    future_exists: NDArray[np.bool_]
    truth: OpenLoopTruth
    ego_from_lidar: Transform
    ego_pose: Transform

    @property
    def pose_in_map(self) -> Pose:
        """x, y, heading of the rear axle in the map."""
        return _planar(self.ego_pose)

    def frame(self, cameras: Sequence[str] = CAMERAS, reduction: Reduction | None = None) -> Frame:
        """Decode the images.

        Args:
            cameras: which.
            reduction: the planner's, `Preprocessing.reduction`; None decodes every pixel, for people.

        Raises:
            InputError: a camera is missing, or its file is absent or no image; the message names the file.
        """
        images = {}
        for camera in cameras:
            if camera not in self.cameras:
                raise InputError(
                    f"sample {self.token} of {self.scene} has no {camera}; "
                    f"it has {', '.join(self.cameras) or 'no camera at all'}"
                )
            images[camera] = read_image(self.cameras[camera].path, reduction)
        return Frame(
            images=images, ego=self.ego, command=self.command, token=self.token, stamp_s=self.stamp_s
        )

    def scorer(self, protocol: OpenLoopProtocol) -> Callable[[ArrayLike], Score]:
        """Prepare this sample once to score several plans under a protocol.

        Returns:
            A function from [6, 3] waypoints in the ego frame at t0 (x, y, heading of the rear axle at
            0.5 … 3.0 s) to their score. It raises InputError for another shape or values not finite.

        Raises:
            InputError: the protocol needs a map, and the split was opened without road_edges.
        """
        score = protocol.scorer(self.truth)
        follow = self.lidar_waypoints if protocol.follows == "lidar" else _rear_axle_waypoints

        def score_plan(waypoints_in_ego: ArrayLike) -> Score:
            waypoints = np.asarray(waypoints_in_ego, dtype=np.float64)
            if waypoints.shape != (STEPS, 3):
                raise InputError(
                    f"a plan to score is [{STEPS}, 3] x, y, heading at 0.5 … 3.0 s, "
                    f"not {list(waypoints.shape)}"
                )
            return score(follow(waypoints))

        return score_plan

    def lidar_waypoints(self, waypoints_in_ego: FloatArray) -> Waypoints:
        """Where the LiDAR is when the rear axle follows a plan.

        Args:
            waypoints_in_ego: [T, 3] x, y, heading of the rear axle in the ego frame at t0.

        Returns:
            [T, 2] float32 in the LiDAR frame at t0, as the open-loop metrics want it.
        """
        x, y, heading = np.asarray(waypoints_in_ego, dtype=np.float64).T
        mount = self.ego_from_lidar[:2, 3]
        lidar_x = x + np.cos(heading) * mount[0] - np.sin(heading) * mount[1] - mount[0]
        lidar_y = y + np.sin(heading) * mount[0] + np.cos(heading) * mount[1] - mount[1]
        yaw = np.arctan2(self.ego_from_lidar[1, 0], self.ego_from_lidar[0, 0])
        right = np.cos(yaw) * lidar_x + np.sin(yaw) * lidar_y
        forward = -np.sin(yaw) * lidar_x + np.cos(yaw) * lidar_y
        return np.stack([right, forward], axis=1).astype(np.float32)


class NuScenesSplit:
    """The samples of one split, in order of scene and time; each is put together when asked for.

    Attributes:
        scene_names: the split's scenes.
    """

    def __init__(
        self,
        root: Path,
        version: str,
        split: str,
        command_source: CommandSource = "route",
        limit: int | None = None,
        scenes: Sequence[str] | None = None,
        ego_state: EgoStateSource = "auto",
        road_edges: bool = False,
    ) -> None:
        """Open a data set.

        Args:
            root: folder that holds the version's folder, `samples/` and, where present, `can_bus/`.
            version: name of the folder with the tables, such as v1.0-mini or v1.0-synth.
            split: a split of `splits.json` beside the version's folder, else one of the devkit's, or "all".
            command_source: "route" takes the command from `can_bus/scene-NNNN_command.json` or, where there
                is none, from the route ahead in `scene-NNNN_route.json`; "future" derives it from the true
                future: a label leak.
            limit: take this many samples, spread evenly over the scenes.
            scenes: take these scenes of the split only; all unless given.
            ego_state: where speed, acceleration and yaw rate come from: "can_bus", differences of past
                "poses", or "auto", the CAN bus where it has a recent message. `Sample.ego_source` says what
                it was.
            road_edges: put the edges of the road into the truth, for protocols that need a map.

        Raises:
            InputError: root, version, split or a scene's name is wrong, or a route, map or CAN bus is asked
                for that is not there.
        """
        if limit is not None and limit < 1:
            raise InputError(f"limit is {limit}; at least 1 sample is needed")
        self.root = Path(root)
        self.version = version
        self.split = split
        self.command_source: CommandSource = command_source
        self.ego_state: EgoStateSource = ego_state
        self._nuscenes = _open_devkit(self.root, version)
        records = {scene["name"]: scene for scene in self._nuscenes.scene}
        self._descriptions = {name: str(scene.get("description", "")) for name, scene in records.items()}
        self.scene_names = _scenes_of(self.root, split, tuple(records))
        unknown = sorted(set(scenes or ()) - set(self.scene_names))
        if unknown:
            raise InputError(
                f"split {split} has no scene {', '.join(unknown)}; it has {', '.join(self.scene_names)}"
            )
        self._can_bus: dict[str, list[Record]] = {}
        self._maps: dict[str, RoadMap] = {}
        self._road_edges = road_edges
        chosen = [name for name in self.scene_names if scenes is None or name in scenes]
        if road_edges:
            for location in sorted({self._location(records[name]) for name in chosen}):
                require_map(self.root, location)
        if ego_state == "can_bus":
            absent = [str(path) for name in chosen if not (path := self._can_bus_path(name)).is_file()]
            if absent:
                raise InputError(
                    f"{len(absent)} of {len(chosen)} scenes have no CAN bus, the first lacks {absent[0]}; "
                    "get the CAN bus expansion from https://www.nuscenes.org/nuscenes#download, or take the "
                    "ego state from poses"
                )
        self._commands: dict[str, RouteCommands] = {}
        if command_source == "route":
            self._commands = {name: RouteCommands(self.root, name) for name in chosen}
            for name, commands in self._commands.items():
                keyframes = self._keyframes(records[name]["first_sample_token"])
                commands.check([_planar(self._lidar(keyframe)[0]) for keyframe in keyframes])
        self._all = [
            keyframe
            for name in self.scene_names
            for keyframe in self._keyframes(records[name]["first_sample_token"])
        ]
        self._samples = self._all
        if scenes is not None:
            self._samples = [keyframe for keyframe in self._all if self._scene(keyframe)["name"] in scenes]
        if limit is not None and limit < len(self._samples):
            spread = np.linspace(0, len(self._samples) - 1, limit).round().astype(int)
            self._samples = [self._samples[index] for index in spread]

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Sample]:
        return (self._sample(record) for record in self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._sample(self._samples[index])

    @property
    def samples_in_split(self) -> int:
        """How many there are before `limit` and `scenes`."""
        return len(self._all)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The samples' tokens, in order."""
        return tuple(record["token"] for record in self._samples)

    def description(self, scene: str) -> str:
        """What the data set says about a scene, such as "Night, rain, parked cars"; may be empty."""
        return self._descriptions[scene]

    def check_images(self, cameras: Sequence[str] = CAMERAS) -> None:
        """Look for every image file before a long run starts.

        Raises:
            InputError: a camera or file is missing; the message counts them and names the first.
        """
        missing = []
        for record in self._samples:
            for camera in cameras:
                if camera not in record["data"]:
                    missing.append(f"{camera} of sample {record['token']} in {self._scene(record)['name']}")
                    continue
                path = self.root / self._nuscenes.get("sample_data", record["data"][camera])["filename"]
                if not path.is_file():
                    missing.append(str(path))
        if missing:
            raise InputError(
                f"{len(missing)} of {len(self._samples) * len(cameras)} images of split {self.split} are "
                f"missing, the first is {missing[0]}; complete the data set or choose another split"
            )

    @cached_property
    def data_hash(self) -> str:
        """SHA-256 of what decides on frames and truth but for road edges, whatever `limit` and `scenes`.

        Tables, CAN bus files of the split's scenes, names and sizes of its images.
        """
        options = f"{self.version} {self.scene_names} {self.command_source} {self.ego_state}"
        digest = hashlib.sha256(options.encode())
        tables = [self.root / self.version / f"{table}.json" for table in TABLES]
        can_bus = [
            self.root / "can_bus" / f"{name}_{kind}.json"
            for name in self.scene_names
            for kind in ("pose", "command", "route")
        ]
        for path in tables + [path for path in can_bus if path.is_file()]:
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        for record in self._all:
            for camera, token in sorted(record["data"].items()):
                path = self.root / self._nuscenes.get("sample_data", token)["filename"]
                size = path.stat().st_size if camera in CAMERAS and path.is_file() else 0
                digest.update(f"{path.name} {size}".encode())
        return digest.hexdigest()

    def drivable_area(self, sample: Sample, reach_m: float = 60.0) -> tuple[FloatArray, ...]:
        """Road polygons around a sample, for pictures.

        Returns:
            [N, 2] outlines in the ego frame at t0; none when there is no map expansion for the place.
        """
        if not map_path(self.root, sample.location).is_file():
            return ()
        shapes = self.road_map(sample.location).shapes("drivable_area", sample.pose_in_map, reach_m)
        return tuple(
            points_in_ego(np.array(shape.polygon.exterior.coords), sample.pose_in_map) for shape in shapes
        )

    def road_map(self, location: str) -> RoadMap:
        """The map of a location, read once.

        Raises:
            InputError: there is none; the message names the file and how to get it.
        """
        if location not in self._maps:
            self._maps[location] = RoadMap(self.root, location)
        return self._maps[location]

    def _scene(self, record: Record) -> Record:
        return self._nuscenes.get("scene", record["scene_token"])

    def _location(self, scene: Record) -> str:
        return str(self._nuscenes.get("log", scene["log_token"])["location"])

    def _keyframes(self, token: str, limit: int | None = None, towards: str = "next") -> list[Record]:
        """The keyframe and those after (or before) it in its scene, at most `limit`."""
        records: list[Record] = []
        while token and (limit is None or len(records) < limit):
            records.append(self._nuscenes.get("sample", token))
            token = records[-1][towards]
        return records

    def _lidar(self, record: Record) -> tuple[Transform, Transform, float]:
        """Ego pose and LiDAR mount of a keyframe, and its time in seconds."""
        if "LIDAR_TOP" not in record["data"]:
            raise InputError(
                f"sample {record['token']} of {self._scene(record)['name']} has no LIDAR_TOP keyframe; "
                "poses and truth are defined at its time"
            )
        data = self._nuscenes.get("sample_data", record["data"]["LIDAR_TOP"])
        pose = self._nuscenes.get("ego_pose", data["ego_pose_token"])
        mount = self._nuscenes.get("calibrated_sensor", data["calibrated_sensor_token"])
        return _transform(pose), _transform(mount), data["timestamp"] / 1e6

    def _sample(self, record: Record) -> Sample:
        scene = self._scene(record)
        ego_pose, ego_from_lidar, stamp = self._lidar(record)
        future = self._keyframes(record["next"], STEPS)
        past = self._keyframes(record["prev"], HISTORY, towards="prev")[::-1]
        exists = np.arange(STEPS) < len(future)
        future_in_ego = np.zeros((STEPS, 3))
        future_in_ego[: len(future)] = self._poses_in(ego_pose, future)
        history_in_ego = self._poses_in(ego_pose, past)
        past_stamps = [self._lidar(keyframe)[2] - stamp for keyframe in past]
        lidar_from_map = np.linalg.inv(ego_pose @ ego_from_lidar)
        truth = self._truth(record, past, future, future_in_ego, lidar_from_map, ego_from_lidar)
        location = self._location(scene)
        if self._road_edges:
            edges = self.road_map(location).road_edges(_planar(ego_pose))
            # From the rear axle (x forward, y left) to the LiDAR (x right, y forward).
            to_lidar = np.array([0.0, -truth.lidar_to_rear_axle_m])
            truth = replace(
                truth,
                road_edges=tuple(np.stack([-y, x], axis=1) + to_lidar for x, y in (edge.T for edge in edges)),
            )
        ego, ego_source = self._ego_state(scene["name"], stamp, history_in_ego, past_stamps)
        return Sample(
            token=record["token"],
            scene=scene["name"],
            location=location,
            stamp_s=stamp,
            cameras=self._cameras(record),
            ego=ego,
            ego_source=ego_source,
            command=self._command(scene["name"], stamp, _planar(ego_pose), ego, truth),
            history_in_ego=history_in_ego,
            future_in_ego=future_in_ego,
            future_exists=exists,
            truth=truth,
            ego_from_lidar=ego_from_lidar,
            ego_pose=ego_pose,
        )

    def _poses_in(self, ego_pose: Transform, keyframes: list[Record]) -> FloatArray:
        """[n, 3] x, y, heading of the rear axle at the keyframes, in the ego frame at t0."""
        ego_from_map = np.linalg.inv(ego_pose)
        poses = [ego_from_map @ self._lidar(keyframe)[0] for keyframe in keyframes]
        return np.array(
            [(pose[0, 3], pose[1, 3], np.arctan2(pose[1, 0], pose[0, 0])) for pose in poses]
        ).reshape(-1, 3)

    def _truth(
        self,
        record: Record,
        past: list[Record],
        future: list[Record],
        future_in_ego: FloatArray,
        lidar_from_map: Transform,
        mount: Transform,
    ) -> OpenLoopTruth:
        waypoints = np.zeros((STEPS, 2), dtype=np.float32)
        for step, keyframe in enumerate(future):
            pose, later_mount, _ = self._lidar(keyframe)
            waypoints[step] = (lidar_from_map @ pose @ later_mount)[:2, 3]
        annotations = [
            [self._nuscenes.get("sample_annotation", token) for token in keyframe["anns"]]
            for keyframe in [*past[-2:], record, *future]
        ]
        known_at_t0 = len(past[-2:]) + 1
        seen = {
            annotation["instance_token"]
            for keyframe in annotations[:known_at_t0]
            for annotation in keyframe
            if annotation["visibility_token"] != "1"
        }
        boxes = [_boxes(keyframe, lidar_from_map, seen) for keyframe in annotations[known_at_t0 - 1 :]]
        return OpenLoopTruth(
            waypoints=waypoints,
            exists=tuple(step <= len(future) for step in range(STEPS + 1)),
            boxes=tuple(boxes + [()] * (STEPS + 1 - len(boxes))),
            rear_axle_waypoints=_rear_axle_waypoints(future_in_ego),
            annotated=bool(self._nuscenes.sample_annotation),
            past_keyframes=len(past),
            lidar_to_rear_axle_m=float(mount[0, 3]),
            can_bus_blacklisted=(
                self.version in NUSCENES_VERSIONS and self._scene(record)["name"] in BAD_CAN_BUS
            ),
        )

    def _cameras(self, record: Record) -> dict[str, CameraView]:
        views = {}
        for camera, token in record["data"].items():
            if not camera.startswith("CAM_"):
                continue
            data = self._nuscenes.get("sample_data", token)
            calibration = self._nuscenes.get("calibrated_sensor", data["calibrated_sensor_token"])
            views[camera] = CameraView(
                path=self.root / data["filename"],
                width=data["width"],
                height=data["height"],
                intrinsics=np.array(calibration["camera_intrinsic"]),
                ego_from_camera=_transform(calibration),
            )
        return views

    def _ego_state(
        self, scene: str, stamp: float, history: FloatArray, past_stamps: list[float]
    ) -> tuple[EgoState, EgoSource]:
        if self.ego_state != "poses":
            latest = _latest(self._poses_on_can_bus(scene), stamp)
            if latest is not None and stamp - latest["utime"] / 1e6 <= STALE_S:
                return EgoState(latest["vel"][0], latest["accel"][0], latest["rotation_rate"][2]), "can_bus"
            if self.ego_state == "can_bus":
                raise InputError(
                    f"{self._can_bus_path(scene)} has no message in the {STALE_S} s before {stamp:.1f} s; "
                    "take the ego state from poses, or from the CAN bus where there is one (auto)"
                )
        if not past_stamps:
            return EgoState(0.0), "unknown"
        poses = np.vstack([history, np.zeros(3)])
        times = np.array([*past_stamps, 0.0])
        duration = np.diff(times)
        moved = np.hypot(*np.diff(poses[:, :2], axis=0).T)
        forward = np.sign(np.einsum("ni,ni->n", np.diff(poses[:, :2], axis=0), _directions(poses[:-1, 2])))
        speeds = forward * moved / duration
        acceleration = 0.0
        if len(speeds) > 1:
            acceleration = float((speeds[-1] - speeds[-2]) / ((duration[-1] + duration[-2]) / 2))
        yaw_rate = float(_wrapped(poses[-1, 2] - poses[-2, 2]) / duration[-1])
        return EgoState(float(speeds[-1]), acceleration, yaw_rate), "poses"

    def _command(self, scene: str, stamp: float, pose: Pose, ego: EgoState, truth: OpenLoopTruth) -> Command:
        if self.command_source == "route":
            return self._commands[scene].at(stamp, pose, ego.speed_mps)
        steps = sum(truth.exists) - 1
        return command_of_offset(-float(truth.waypoints[steps - 1, 0]) if steps else 0.0)

    def _poses_on_can_bus(self, scene: str) -> list[Record]:
        """Messages in order of time; none when there is no such file."""
        if scene not in self._can_bus:
            path = self._can_bus_path(scene)
            messages = read_json(path) if path.is_file() else []
            for number, message in enumerate(messages):
                if not _is_pose_message(message):
                    raise InputError(
                        f"{path}: entry {number} is no pose message; expected utime (microseconds) and vel, "
                        "accel, rotation_rate of three numbers each"
                    )
            self._can_bus[scene] = sorted(messages, key=lambda message: message["utime"])
        return self._can_bus[scene]

    def _can_bus_path(self, scene: str) -> Path:
        return self.root / "can_bus" / f"{scene}_pose.json"


def read_image(path: Path, reduction: Reduction | None = None) -> Image:
    """Decode an image file to [height, width, 3] RGB.

    Args:
        path: the file.
        reduction: as `decode_image` takes it.

    Raises:
        InputError: the file is absent or cannot be decoded to its end.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"image {path} cannot be read: {error.strerror}") from error
    return decode_image(content, f"image {path}", reduction)


def _open_devkit(root: Path, version: str) -> Any:
    if not root.is_dir():
        raise InputError(
            f"data root {root} does not exist; give the folder that holds {version}/ and samples/"
        )
    tables = root / version
    if not tables.is_dir():
        found = sorted(path.parent.name for path in root.glob("*/scene.json"))
        raise InputError(
            f"data root {root} has no version {version}; it holds {', '.join(found) or 'no nuScenes tables'}"
        )
    absent = [table for table in TABLES if not (tables / f"{table}.json").is_file()]
    if absent:
        raise InputError(
            f"{tables} lacks {', '.join(f'{table}.json' for table in absent)}; nuScenes has 13 tables"
        )
    from nuscenes import NuScenes

    try:
        return NuScenes(version=version, dataroot=str(root), verbose=False)
    except (AssertionError, KeyError, ValueError) as error:
        for table in TABLES:
            read_json(tables / f"{table}.json")  # names the one that is truncated, which the devkit does not
        raise InputError(f"{tables} is no valid nuScenes data: {type(error).__name__}: {error}") from error


def _scenes_of(root: Path, split: str, available: tuple[str, ...]) -> tuple[str, ...]:
    if split == "all":
        return available
    own = root / "splits.json"
    if own.is_file():
        splits: Mapping[str, Sequence[str]] = read_json(own)
    else:
        from nuscenes.utils.splits import create_splits_scenes

        splits = create_splits_scenes()
    present = {name: [scene for scene in scenes if scene in available] for name, scenes in splits.items()}
    if not present.get(split):
        usable = [name for name, scenes in present.items() if scenes]
        raise InputError(
            f"split {split} has no scene in this data set; these have: {', '.join([*usable, 'all'])}"
        )
    return tuple(present[split])


def _is_pose_message(message: Any) -> bool:
    try:
        values = [*message["vel"], *message["accel"], *message["rotation_rate"], message["utime"]]
        return len(values) == 10 and bool(np.isfinite(values).all())
    except (KeyError, TypeError):
        return False


def _latest(messages: list[Record], stamp: float) -> Record | None:
    position = bisect_right(messages, stamp * 1e6, key=lambda message: message["utime"])
    return messages[position - 1] if position else None


def _boxes(annotations: list[Record], lidar_from_map: Transform, seen: set[str]) -> tuple[TrackedBox, ...]:
    if not annotations:
        return ()
    centres = _apply(lidar_from_map, np.array([annotation["translation"] for annotation in annotations]))
    along = _rotations(np.array([annotation["rotation"] for annotation in annotations]))[:, :, 0]
    direction = along @ lidar_from_map[:3, :3].T
    yaws = np.arctan2(direction[:, 1], direction[:, 0])
    return tuple(
        TrackedBox(
            x=float(centre[0]),
            y=float(centre[1]),
            length=annotation["size"][1],
            width=annotation["size"][0],
            yaw=float(yaw),
            category=annotation["category_name"],
            track=annotation["instance_token"],
            lidar_points=annotation["num_lidar_pts"],
            radar_points=annotation["num_radar_pts"],
            seen=annotation["instance_token"] in seen,
        )
        for annotation, centre, yaw in zip(annotations, centres, yaws, strict=True)
    )


def _planar(pose: Transform) -> Pose:
    return float(pose[0, 3]), float(pose[1, 3]), float(np.arctan2(pose[1, 0], pose[0, 0]))


def _rear_axle_waypoints(waypoints_in_ego: FloatArray) -> Waypoints:
    """[T, 2] x right, y forward of the rear axle at t0."""
    return np.stack([-waypoints_in_ego[:, 1], waypoints_in_ego[:, 0]], axis=1).astype(np.float32)


def _rotations(quaternions: FloatArray) -> Transform:
    """[n, 3, 3] from [n, 4] w, x, y, z."""
    w, x, y, z = (quaternions / np.linalg.norm(quaternions, axis=-1, keepdims=True)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), -1, 0)


def _transform(record: Record) -> Transform:
    """[4, 4] of a record with translation and rotation."""
    transform = np.eye(4)
    transform[:3, :3] = _rotations(np.array([record["rotation"]]))[0]
    transform[:3, 3] = record["translation"]
    return transform


def _apply(transform: Transform, points: FloatArray) -> FloatArray:
    return points @ transform[:3, :3].T + transform[:3, 3]


def _directions(headings: FloatArray) -> FloatArray:
    return np.stack([np.cos(headings), np.sin(headings)], axis=-1)


def _wrapped(angle: float) -> float:
    return float((angle + np.pi) % (2 * np.pi) - np.pi)
