"""Reads what an installation of NAVSIM's devkit leaves behind: metric caches and submission pickles.

Metric caches of devkit 1.1 and 2.2 hold all that scoring needs: neither devkit nor nuPlan's maps have to be
there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval_nuscenes.navsim.scene import (
    HORIZON,
    PACIFICA,
    AreaType,
    EgoMotion,
    Floats,
    MapArea,
    PlannedPath,
    Rings,
    Scene,
    Tracks,
)
from eval_nuscenes.navsim.unpickling import Record, array_of, read_pickle
from vla_autoprune.errors import InputError

CACHE_NAME = "metric_cache.pkl"

_AREA_TYPES: dict[int, AreaType] = {
    0: "lane",
    1: "intersection",
    5: "drivable_area",
    11: "lane_connector",
    15: "carpark_area",
    17: "roadblock",
}
"""nuPlan's numbers of its map layers."""
_TRACK_TYPES = (
    "vehicle", "pedestrian", "bicycle", "traffic_cone", "barrier", "czone_sign", "generic_object", "ego",
)  # fmt: skip
"""In the order of nuPlan's numbers."""
_FIELDS = ("trajectory", "ego_state", "observation", "centerline", "route_lane_ids", "drivable_area_map")
_FIELDS_V2 = ("log_name", "scene_type", "human_trajectory", "past_human_trajectory")
_RED_LIGHT = "red_light_"
_STEPS_V1 = 51
_RECTANGLE_TOLERANCE_M = 1e-3


def find_metric_caches(root: Path) -> dict[str, Path]:
    """Metric caches below a folder, by token: `<root>/<log>/<type>/<token>/metric_cache.pkl`.

    The lists in `<root>/metadata` hold absolute paths of another machine and are not read.

    Raises:
        InputError: there is none, or a token comes twice.
    """
    if not root.is_dir():
        raise InputError(f"{root} is not a directory; give the metric_cache_path of the devkit")
    found: dict[str, Path] = {}
    for path in sorted(root.rglob(CACHE_NAME)):
        token = path.parent.name
        if token in found:
            raise InputError(f"token {token} has two metric caches: {found[token]} and {path}; remove one")
        found[token] = path
    if not found:
        raise InputError(
            f"{root} holds no {CACHE_NAME}; run the devkit's run_metric_caching.py "
            "and give its metric_cache_path"
        )
    return found


def read_metric_cache(path: Path) -> Scene:
    """A scene from a metric cache of devkit 1.1 or 2.2.

    Raises:
        InputError: the file is unreadable, names something outside the allow-list, or is of another version.
    """
    cache = read_pickle(path, compressed=True)
    if not isinstance(cache, Record) or cache.kind != "MetricCache":
        what = cache.kind if isinstance(cache, Record) else type(cache).__name__
        raise InputError(f"{path} holds a {what} instead of a MetricCache")
    v2_fields = [name for name in _FIELDS_V2 if name in cache.fields]
    lacking = [name for name in _FIELDS if name not in cache.fields]
    lacking += [name for name in _FIELDS_V2 if v2_fields and name not in cache.fields]
    if lacking:
        raise InputError(
            f"{path} lacks {', '.join(lacking)}: it is of neither devkit 1.1 nor 2.2; "
            "cache anew with one of them"
        )
    try:
        return _scene_v2(cache, path) if v2_fields else _scene_v1(cache, path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path} is no metric cache of devkit 1.1 or 2.2 ({type(error).__name__}: {error}); cache anew"
        ) from error


def read_submission(path: Path) -> dict[str, PlannedPath]:
    """Plans from a submission pickle of the devkit, both stages together.

    Raises:
        InputError: the file is unreadable or no submission, or a token comes twice.
    """
    submission = read_pickle(path, compressed=False)
    if not isinstance(submission, dict):
        raise InputError(
            f"{path} holds no submission; the devkit's run_create_submission_pickle.py writes one"
        )
    names = [name for name in map(str, submission) if name.endswith("predictions")]
    if not names:
        raise InputError(
            f"{path} has none of predictions (v1), first_stage_predictions, second_stage_predictions (v2); "
            f"it has {', '.join(map(str, submission)) or 'nothing'}"
        )
    plans: dict[str, PlannedPath] = {}
    repeated = []
    for name in names:
        seeds = submission[name]
        if not isinstance(seeds, list) or not all(isinstance(seed, dict) for seed in seeds):
            raise InputError(f"{path}: {name} is no list of objects from token to Trajectory")
        for seed in seeds:
            for token, trajectory in seed.items():
                if token in plans:
                    repeated.append(token)
                plans[token] = _planned_path(trajectory, f"{path}: plan of {token}")
    if repeated:
        raise InputError(
            f"{path} has {len(repeated)} tokens more than once (several seeds?): {', '.join(repeated[:20])}; "
            "leave one plan per token"
        )
    return plans


def _planned_path(trajectory: Any, what: str) -> PlannedPath:
    if not isinstance(trajectory, Record) or trajectory.kind != "Trajectory":
        kind = trajectory.kind if isinstance(trajectory, Record) else type(trajectory).__name__
        raise InputError(f"{what} is a {kind}, no Trajectory")
    poses = array_of(trajectory.field("poses"))
    if not isinstance(poses, np.ndarray):
        raise InputError(f"{what}: its poses are {type(poses).__name__}, no array of numbers")
    # A default that was never set on the instance is not in the pickle.
    sampling = trajectory.fields.get("trajectory_sampling", trajectory.fields.get("_trajectory_sampling"))
    interval = float(sampling.field("interval_length")) if isinstance(sampling, Record) else 0.5
    return PlannedPath(poses.astype(np.float64), interval)


def _scene_v1(cache: Record, path: Path) -> Scene:
    observation = cache.field("observation")
    steps = observation.field("_occupancy_maps")
    _check_steps(steps, _STEPS_V1, "1.1")
    first_seen = observation.field("_unique_objects")
    boxes = [
        {
            token: _box_of_rectangle(polygons[0][0], token)
            for token, polygons in zip(step.args[0], array_of(step.args[1]), strict=True)
        }
        for step in steps
    ]
    return Scene(
        token=path.parent.name,
        log=path.parent.parent.parent.name,
        devkit="v1",
        tracks=_tracks(boxes, first_seen),
        **_common(cache),
    )


def _scene_v2(cache: Record, path: Path) -> Scene:
    observation = cache.field("observation")
    steps = [
        step.field("tracked_objects", "tracked_objects") for step in observation.field("_detections_tracks")
    ]
    _check_steps(steps, HORIZON + 1, "2.2")
    boxes = [
        {item.field("_metadata", "track_token"): _box(item.field("_box")) for item in step} for step in steps
    ]
    red_lights: list[tuple[str, ...]] = []
    red_polygons: dict[str, tuple[Rings, ...]] = {}
    for tokens, polygons in observation.field("_occupancy_maps_tl") or []:
        ids = tuple(token.removeprefix(_RED_LIGHT) for token in tokens)
        red_lights.append(ids)
        red_polygons |= zip(ids, array_of(polygons), strict=True)
    human = cache.field("human_trajectory")
    (past,) = cache.field("past_human_trajectory").args
    return Scene(
        token=path.parent.name,
        log=str(cache.field("log_name")),
        devkit="v2",
        tracks=_tracks(boxes, observation.field("_unique_objects")),
        past=tuple(_motion(state) for state in past),
        red_lights=tuple(red_lights),
        red_light_polygons=red_polygons,
        human=None if human is None else _planned_path(human, "human_trajectory"),
        synthetic=cache.field("scene_type").args == (1,),
        **_common(cache),
    )


def _common(cache: Record) -> dict[str, Any]:
    (reference,) = cache.field("trajectory").args
    motions = [_motion(state) for state in reference]
    (centreline,) = cache.field("centerline").args
    ids, types, polygons, *_ = cache.field("drivable_area_map").args
    return {
        "ego": _motion(cache.field("ego_state")),
        "reference": np.array([[motion.time_us, *motion.pose] for motion in motions], dtype=np.float64),
        "centreline": np.array([[pose.field("x"), pose.field("y")] for pose in centreline], dtype=np.float64),
        "route_lane_ids": frozenset(map(str, cache.field("route_lane_ids"))),
        "areas": tuple(
            MapArea(str(id), _area_type(layer), shape)
            for id, layer, shape in zip(ids, types, array_of(polygons), strict=True)
        ),
    }


def _area_type(layer: Any) -> AreaType:
    (number,) = layer.args
    if number not in _AREA_TYPES:
        raise InputError(f"a map area is of nuPlan's layer {number}; known are {sorted(_AREA_TYPES)}")
    return _AREA_TYPES[number]


def _motion(state: Record) -> EgoMotion:
    centre = state.field("_car_footprint", "_center")
    x, y, heading = (float(centre.field(name)) for name in ("x", "y", "heading"))
    ahead = PACIFICA.rear_axle_to_centre_m
    dynamic = state.field("_dynamic_car_state")
    return EgoMotion(
        time_us=int(state.field("_time_point", "time_us")),
        pose=np.array(
            [
                x - ahead * np.cos(heading),
                y - ahead * np.sin(heading),
                heading,
            ]
        ),
        velocity_mps=_vector(dynamic.field("_rear_axle_velocity_2d")),
        acceleration_mps2=_vector(dynamic.field("_rear_axle_acceleration_2d")),
        steering_rad=float(state.field("_tire_steering_angle")),
        steering_rate_rps=float(dynamic.field("_tire_steering_rate")),
        yaw_rate_rps=float(dynamic.field("_angular_velocity")),
        yaw_acceleration_rps2=float(dynamic.field("_angular_acceleration")),
    )


def _vector(vector: Record) -> Floats:
    return np.array([vector.field("_x"), vector.field("_y")], dtype=np.float64)


def _box(box: Record) -> Floats:
    centre = box.field("_center")
    return np.array(
        [
            *(centre.field(name) for name in ("x", "y", "heading")),
            box.field("_length"),
            box.field("_width"),
        ],
        dtype=np.float64,
    )


def _box_of_rectangle(ring: Floats, token: str) -> Floats:
    """[5] from corners front left, rear left, rear right, front right, as nuPlan draws boxes."""
    if ring.shape != (5, 2):
        raise InputError(f"track {token} is drawn with {len(ring)} points; a box has 5")
    front_left, rear_left, rear_right, front_right = ring[:4]
    along, across = front_left - rear_left, front_left - front_right
    if np.abs(front_left - rear_left + rear_right - front_right).max() > _RECTANGLE_TOLERANCE_M:
        raise InputError(f"track {token} is drawn as {ring[:4].tolist()}, which is no rectangle")
    return np.array(
        [*ring[:4].mean(axis=0), np.arctan2(along[1], along[0]), np.hypot(*along), np.hypot(*across)]
    )


def _tracks(steps: Sequence[Mapping[str, Floats]], first_seen: Mapping[str, Record]) -> Tracks:
    tokens = tuple(dict.fromkeys(token for step in steps for token in step))
    boxes = np.full((len(tokens), len(steps), 5), np.nan)
    for number, token in enumerate(tokens):
        for index, step in enumerate(steps):
            if token in step:
                boxes[number, index] = step[token]
    types, speeds = [], []
    for token in tokens:
        track = first_seen[token]
        (type_number,) = track.field("_tracked_object_type").args
        types.append(_TRACK_TYPES[type_number])
        speeds.append(
            float(np.hypot(*_vector(track.field("_velocity")))) if "_velocity" in track.fields else 0.0
        )
    return Tracks(tokens, tuple(types), boxes, np.array(speeds))


def _check_steps(steps: Sequence[Any], expected: int, version: str) -> None:
    if len(steps) != expected:
        raise InputError(f"it has tracks at {len(steps)} steps of 0.1 s; devkit {version} writes {expected}")
