"""The 13 tables of a nuScenes data set, written from simulated drives.

Tokens are hashes of what they name. All sensors of a keyframe fire at the sample's timestamp.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval_nuscenes.lidar import LIDAR_ROTATION, LIDAR_TRANSLATION, Surroundings
from eval_nuscenes.world.scene import Actor, ActorState, EgoPose, Scene, WorldState
from vla_autoprune.frame import CAMERAS

Record = dict[str, Any]
NewToken = Callable[..., str]

CHANNELS = (*CAMERAS, "LIDAR_TOP")
SCENE_TABLES = ("scene", "sample", "sample_data", "ego_pose", "instance", "sample_annotation")
"""The tables that grow with every scene."""
ANNOTATED_WITHIN_M = 100.0

_MOVES_ABOVE_MPS = 0.2
_VISIBILITY_LEVELS = {"1": "v0-40", "2": "v40-60", "3": "v60-80", "4": "v80-100"}
_VISIBILITY_EDGES = (0.4, 0.6, 0.8)
_CATEGORIES = (
    "animal", "human.pedestrian.adult", "human.pedestrian.child", "human.pedestrian.construction_worker",
    "human.pedestrian.personal_mobility", "human.pedestrian.police_officer", "human.pedestrian.stroller",
    "human.pedestrian.wheelchair", "movable_object.barrier", "movable_object.debris",
    "movable_object.pushable_pullable", "movable_object.trafficcone", "static_object.bicycle_rack",
    "vehicle.bicycle", "vehicle.bus.bendy", "vehicle.bus.rigid", "vehicle.car", "vehicle.construction",
    "vehicle.emergency.ambulance", "vehicle.emergency.police", "vehicle.motorcycle", "vehicle.trailer",
    "vehicle.truck",
)  # fmt: skip
_ATTRIBUTES = (
    "vehicle.moving", "vehicle.stopped", "vehicle.parked", "cycle.with_rider", "cycle.without_rider",
    "pedestrian.sitting_lying_down", "pedestrian.standing", "pedestrian.moving",
)  # fmt: skip
# The devkit's BitMap knows the masks by these names only.
_MASK_NAMES = {
    "singapore-onenorth": "53992ee3023e5494b90c316c183be829",
    "singapore-hollandvillage": "37819e65e09e5547b8a3ceaefba56bb2",
    "singapore-queenstown": "93406b464a165eaba6d9de76ca09f5da",
    "boston-seaport": "36092f0b03a857c6a3403e25b4b7aab3",
}


@dataclass(frozen=True)
class SensorMount:
    """Where a sensor sits in the ego frame, and a camera's intrinsics at the size of the written images."""

    translation: tuple[float, float, float]
    rotation: tuple[float, float, float, float]
    """Quaternion w, x, y, z from the sensor's frame to the ego frame."""
    intrinsic: tuple[tuple[float, ...], ...] = ()
    """3x3, or empty for the lidar."""


LIDAR_MOUNT = SensorMount(LIDAR_TRANSLATION, LIDAR_ROTATION)


@dataclass(frozen=True)
class Keyframe:
    """What the sensors measured of one state; per-actor numbers are in the order of `WorldState.actors`."""

    state_index: int
    utime: int
    lidar_points: NDArray[np.int64]
    visible: NDArray[np.float64]


def token_maker(*context: object) -> NewToken:
    """A function that hashes names, within a context, to the 32 hex digits of a token."""

    def new_token(*names: object) -> str:
        text = "/".join(map(str, (*context, *names)))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    return new_token


def mask_path(location: str) -> str:
    """Path of a location's map mask in the data set."""
    return f"maps/{_MASK_NAMES[location]}.png"


def data_path(location: str, channel: str, utime: int) -> str:
    """Path of a sensor's keyframe file in the data set."""
    suffix = "pcd.bin" if channel == "LIDAR_TOP" else "jpg"
    return f"samples/{channel}/{_log_name(location)}__{channel}__{utime}.{suffix}"


def common_tables(
    mounts: Mapping[str, SensorMount], locations: Sequence[str], new_token: NewToken
) -> dict[str, list[Record]]:
    """The tables that all scenes share: category, attribute, visibility, sensor, calibrated_sensor, log, map.

    Args:
        mounts: calibration by channel, for every one of CHANNELS.
        locations: the locations that scenes of this data set lie in.
        new_token: token maker of the data set.
    """
    return {
        "category": [
            {"token": new_token("category", name), "name": name, "description": ""} for name in _CATEGORIES
        ],
        "attribute": [
            {"token": new_token("attribute", name), "name": name, "description": ""} for name in _ATTRIBUTES
        ],
        "visibility": [
            {
                "token": token,
                "level": level,
                "description": f"visibility of whole object is between {level[1:]} %",
            }
            for token, level in _VISIBILITY_LEVELS.items()
        ],
        "sensor": [
            {
                "token": new_token("sensor", channel),
                "channel": channel,
                "modality": "lidar" if channel == "LIDAR_TOP" else "camera",
            }
            for channel in CHANNELS
        ],
        "calibrated_sensor": [
            {
                "token": new_token("calibrated_sensor", channel),
                "sensor_token": new_token("sensor", channel),
                "translation": list(mounts[channel].translation),
                "rotation": list(mounts[channel].rotation),
                "camera_intrinsic": [list(row) for row in mounts[channel].intrinsic],
            }
            for channel in CHANNELS
        ],
        "log": [
            {
                "token": new_token("log", location),
                "logfile": _log_name(location),
                "vehicle": "synth",
                "date_captured": "2020-09-13",
                "location": location,
            }
            for location in locations
        ],
        "map": [
            {
                "token": new_token("map", location),
                "log_tokens": [new_token("log", location)],
                "category": "semantic_prior",
                "filename": mask_path(location),
            }
            for location in locations
        ],
    }


def scene_tables(
    scene: Scene, keyframes: Sequence[Keyframe], width: int, height: int, new_token: NewToken
) -> dict[str, list[Record]]:
    """One scene's records of SCENE_TABLES.

    Actors are annotated from the first to the last keyframe in which they are within 100 m of the ego
    vehicle. There is no radar: num_radar_pts is 0.

    Args:
        scene: the drive, in the coordinates of its location's map.
        keyframes: its samples, in order, at least one.
        width: of the images, pixels.
        height: of the images, pixels.
        new_token: token maker of the data set.
    """
    samples = [new_token("sample", scene.name, index) for index in range(len(keyframes))]
    tables: dict[str, list[Record]] = {name: [] for name in SCENE_TABLES}
    tables["scene"].append(
        {
            "token": new_token("scene", scene.name),
            "log_token": new_token("log", scene.location),
            "nbr_samples": len(keyframes),
            "first_sample_token": samples[0],
            "last_sample_token": samples[-1],
            "name": scene.name,
            "description": f"Synthetic, {scene.kind}, daylight {scene.daylight:.2f}",
        }
    )
    for index, keyframe in enumerate(keyframes):
        tables["sample"].append(
            {
                "token": samples[index],
                "timestamp": keyframe.utime,
                **_neighbours(samples, index),
                "scene_token": new_token("scene", scene.name),
            }
        )
    for channel in CHANNELS:
        tokens = [new_token("sample_data", scene.name, channel, index) for index in range(len(keyframes))]
        for index, keyframe in enumerate(keyframes):
            ego = scene.states[keyframe.state_index].ego
            image = channel != "LIDAR_TOP"
            tables["sample_data"].append(
                {
                    "token": tokens[index],
                    "sample_token": samples[index],
                    "ego_pose_token": tokens[index],
                    "calibrated_sensor_token": new_token("calibrated_sensor", channel),
                    "timestamp": keyframe.utime,
                    "fileformat": "jpg" if image else "pcd",
                    "is_key_frame": True,
                    "height": height if image else 0,
                    "width": width if image else 0,
                    "filename": data_path(scene.location, channel, keyframe.utime),
                    **_neighbours(tokens, index),
                }
            )
            tables["ego_pose"].append(
                {
                    "token": tokens[index],
                    "timestamp": keyframe.utime,
                    "rotation": _heading_quaternion(ego.heading),
                    "translation": [_metres(ego.x), _metres(ego.y), 0.0],
                }
            )
    for track in _tracks(scene, keyframes):
        _add_track(tables, scene, track, keyframes, samples, new_token)
    return tables


def surroundings(scene: Scene, state: WorldState) -> Surroundings:
    """Actors' boxes and buildings' walls around the ego vehicle, in its frame."""
    ego = state.ego
    boxes = np.zeros((len(state.actors), 7))
    for row, actor_state in zip(boxes, state.actors, strict=True):
        actor = scene.actors[actor_state.actor]
        row[:2] = actor_state.x, actor_state.y
        row[2:6] = actor.height_m / 2, actor.length_m, actor.width_m, actor.height_m
        row[6] = actor_state.heading - ego.heading
    boxes[:, :2] = _in_ego_frame(boxes[:, :2], ego)
    walls = np.zeros((sum(len(outline) for outline, _ in scene.map.buildings), 5))
    if len(walls):
        outlines = [_in_ego_frame(outline, ego) for outline, _ in scene.map.buildings]
        walls[:, :2] = np.concatenate(outlines)
        walls[:, 2:4] = np.concatenate([np.roll(outline, -1, axis=0) for outline in outlines])
        heights = [height for _, height in scene.map.buildings]
        walls[:, 4] = np.repeat(heights, [len(outline) for outline in outlines])
    return Surroundings(boxes, walls)


@dataclass(frozen=True)
class _Track:
    """An actor's annotations without a gap: its place among the actors of each keyframe from `first` on."""

    actor: int
    first: int
    places: tuple[int, ...]


def _tracks(scene: Scene, keyframes: Sequence[Keyframe]) -> list[_Track]:
    """Stretches of keyframes in which an actor exists, each cut to where it is near the ego vehicle."""
    runs: dict[int, list[tuple[int, list[tuple[int, bool]]]]] = {}
    for index, keyframe in enumerate(keyframes):
        state = scene.states[keyframe.state_index]
        for place, actor_state in enumerate(state.actors):
            distance = np.hypot(actor_state.x - state.ego.x, actor_state.y - state.ego.y)
            of_actor = runs.setdefault(actor_state.actor, [])
            if not of_actor or of_actor[-1][0] + len(of_actor[-1][1]) != index:
                of_actor.append((index, []))
            of_actor[-1][1].append((place, bool(distance <= ANNOTATED_WITHIN_M)))
    tracks = []
    for actor in sorted(runs):
        for start, places in runs[actor]:
            near = [index for index, (_, is_near) in enumerate(places) if is_near]
            if near:
                kept = tuple(place for place, _ in places[near[0] : near[-1] + 1])
                tracks.append(_Track(actor, start + near[0], kept))
    return tracks


def _add_track(
    tables: dict[str, list[Record]],
    scene: Scene,
    track: _Track,
    keyframes: Sequence[Keyframe],
    samples: Sequence[str],
    new_token: NewToken,
) -> None:
    actor = scene.actors[track.actor]
    indices = range(track.first, track.first + len(track.places))
    instance = new_token("instance", scene.name, actor.name, track.first)
    tokens = [new_token("sample_annotation", scene.name, actor.name, index) for index in indices]
    states = [
        scene.states[keyframes[index].state_index].actors[place]
        for index, place in zip(indices, track.places, strict=True)
    ]
    always_still = all(state.speed_mps <= _MOVES_ABOVE_MPS for state in states)
    tables["instance"].append(
        {
            "token": instance,
            "category_token": new_token("category", actor.category),
            "nbr_annotations": len(tokens),
            "first_annotation_token": tokens[0],
            "last_annotation_token": tokens[-1],
        }
    )
    for order, (index, place, state) in enumerate(zip(indices, track.places, states, strict=True)):
        attribute = _attribute(actor, state, always_still)
        level = 1 + int(np.searchsorted(_VISIBILITY_EDGES, keyframes[index].visible[place], side="right"))
        tables["sample_annotation"].append(
            {
                "token": tokens[order],
                "sample_token": samples[index],
                "instance_token": instance,
                "visibility_token": str(level),
                "attribute_tokens": [new_token("attribute", attribute)] if attribute else [],
                "translation": [_metres(state.x), _metres(state.y), _metres(actor.height_m / 2)],
                "size": [_metres(actor.width_m), _metres(actor.length_m), _metres(actor.height_m)],
                "rotation": _heading_quaternion(state.heading),
                **_neighbours(tokens, order),
                "num_lidar_pts": int(keyframes[index].lidar_points[place]),
                "num_radar_pts": 0,
            }
        )


def _attribute(actor: Actor, state: ActorState, always_still: bool) -> str:
    moving = state.speed_mps > _MOVES_ABOVE_MPS
    if actor.category in ("vehicle.bicycle", "vehicle.motorcycle"):
        return "cycle.without_rider" if always_still else "cycle.with_rider"
    if actor.category.startswith("vehicle."):
        return "vehicle.moving" if moving else "vehicle.parked" if always_still else "vehicle.stopped"
    if actor.category.startswith("human."):
        return "pedestrian.moving" if moving else "pedestrian.standing"
    return ""


def _log_name(location: str) -> str:
    return f"synth-{location}"


def _neighbours(tokens: Sequence[str], index: int) -> Record:
    return {
        "prev": tokens[index - 1] if index else "",
        "next": tokens[index + 1] if index + 1 < len(tokens) else "",
    }


def _heading_quaternion(heading: float) -> list[float]:
    return [float(np.cos(heading / 2)), 0.0, 0.0, float(np.sin(heading / 2))]


def _metres(value: float) -> float:
    return round(float(value), 6)


def _in_ego_frame(points: NDArray[np.float64], ego: EgoPose) -> NDArray[np.float64]:
    cos, sin = np.cos(ego.heading), np.sin(ego.heading)
    return (points - (ego.x, ego.y)) @ np.array([[cos, -sin], [sin, cos]])
