"""Scenes and plans as plain files: gzipped JSON for a scene, JSON for the plans of a whole test.

docs/navsim.md describes both formats. `find_scenes` and `read_scene` also take the devkit's metric caches.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from eval_nuscenes.navsim.aggregation import Stages
from eval_nuscenes.navsim.devkit_files import (
    CACHE_NAME,
    find_metric_caches,
    read_metric_cache,
    read_submission,
)
from eval_nuscenes.navsim.scene import (
    HORIZON,
    STEP_S,
    AreaType,
    Devkit,
    EgoMotion,
    MapArea,
    PlannedPath,
    Rings,
    Scene,
    Tracks,
)
from eval_nuscenes.navsim.scoring import check_path
from vla_autoprune.errors import InputError
from vla_autoprune.files import first_fault, write_whole

SCENE_SUFFIX = ".scene.json.gz"
SUBMISSION_SUFFIXES = (".pkl", ".pickle")
TRACK_STEPS: dict[Devkit, int] = {"v1": 50, "v2": 41}
"""At least as many steps of tracks each version looks at."""
LISTED = 20
"""Tokens named in a message, at most."""

Pose = tuple[float, float, float]
Point = tuple[float, float]
Ring = Annotated[list[Point], Field(min_length=4)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Motion(_Strict):
    time_us: int
    pose: Pose
    velocity_mps: Point
    acceleration_mps2: Point
    steering_rad: float = 0.0
    steering_rate_rps: float = 0.0
    yaw_rate_rps: float = 0.0
    yaw_acceleration_rps2: float = 0.0


class _Area(_Strict):
    id: str
    type: AreaType
    polygons: list[list[Ring]]


class _Track(_Strict):
    token: str
    type: str
    first_speed_mps: float
    boxes: list[tuple[float, float, float, float, float] | None]


class _Plan(_Strict):
    interval_s: Annotated[float, Field(gt=0)]
    poses: Annotated[list[Pose], Field(min_length=1)]


class _SceneFile(_Strict):
    format: Literal["navsim scene"] = "navsim scene"
    version: Literal[1] = 1
    token: str
    log: str
    devkit: Devkit
    ego: _Motion
    centreline: Annotated[list[Point], Field(min_length=2)]
    route_lane_ids: list[str]
    areas: list[_Area]
    reference: Annotated[list[tuple[int, float, float, float]], Field(min_length=2)]
    tracks: list[_Track]
    past: list[_Motion] = []
    red_lights: list[list[str]] = []
    red_light_polygons: dict[str, list[list[Ring]]] = {}
    human: _Plan | None = None
    synthetic: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> _SceneFile:
        least = TRACK_STEPS[self.devkit]
        short = [track.token for track in self.tracks if len(track.boxes) < least]
        if short:
            raise ValueError(
                f"tracks need at least {least} boxes of 0.1 s each; too short: {', '.join(short)}"
            )
        if len({len(track.boxes) for track in self.tracks}) > 1:
            raise ValueError("all tracks must have boxes at the same steps; write null where one is absent")
        if any(all(box is None for box in track.boxes) for track in self.tracks):
            raise ValueError("a track has no box at all; leave it out")
        stamps = [row[0] for row in self.reference]
        if sorted(set(stamps)) != stamps:
            raise ValueError("the stamps of the reference must rise")
        unknown = {id for ids in self.red_lights for id in ids} - set(self.red_light_polygons)
        if unknown:
            raise ValueError(f"red lights without a polygon: {', '.join(sorted(unknown))}")
        if self.devkit == "v2" and len(self.past) == 1:
            raise ValueError("past needs at least two moments, or none")
        return self


class _PlansFile(_Strict):
    frame: Literal["ego"]
    interval_s: Annotated[float, Field(gt=0)]
    plans: dict[str, list[list[float | None]]]


def find_scenes(root: Path) -> dict[str, Path]:
    """Scene files or metric caches below a folder, by token; the names are trusted until a file is read.

    Raises:
        InputError: there is neither, or both, or a token comes twice.
    """
    if not root.is_dir():
        raise InputError(
            f"{root} is not a directory; give one with metric caches or with what convert made of them"
        )
    files = sorted(root.rglob(f"*{SCENE_SUFFIX}"))
    caches = next(root.rglob(CACHE_NAME), None)
    if files and caches:
        raise InputError(f"{root} holds metric caches and scene files; give a folder with one of them")
    if not files:
        return find_metric_caches(root)
    found: dict[str, Path] = {}
    for path in files:
        token = path.name.removesuffix(SCENE_SUFFIX)
        if token in found:
            raise InputError(f"token {token} has two scene files: {found[token]} and {path}; remove one")
        found[token] = path
    return found


def read_scene(path: Path) -> Scene:
    """A scene from a scene file or a metric cache.

    Raises:
        InputError: the file is unreadable or not valid; the message names it and the field.
    """
    if not path.name.endswith(SCENE_SUFFIX):
        return read_metric_cache(path)
    try:
        record = _SceneFile.model_validate_json(gzip.decompress(path.read_bytes()))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is truncated or no gzip file ({error}); convert it anew") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise InputError(f"{path}: {first_fault(error)}; convert it anew") from error
    if path.name != record.token + SCENE_SUFFIX:
        raise InputError(f"{path} holds scene {record.token}; name it {record.token}{SCENE_SUFFIX}")
    return Scene(
        token=record.token,
        log=record.log,
        devkit=record.devkit,
        ego=_motion(record.ego),
        centreline=np.array(record.centreline),
        route_lane_ids=frozenset(record.route_lane_ids),
        areas=tuple(MapArea(area.id, area.type, _polygons(area.polygons)) for area in record.areas),
        reference=np.array(record.reference, dtype=np.float64),
        tracks=_tracks(record.tracks, TRACK_STEPS[record.devkit]),
        past=tuple(_motion(motion) for motion in record.past),
        red_lights=tuple(tuple(ids) for ids in record.red_lights),
        red_light_polygons={id: _polygons(rings) for id, rings in record.red_light_polygons.items()},
        human=None
        if record.human is None
        else PlannedPath(np.array(record.human.poses), record.human.interval_s),
        synthetic=record.synthetic,
    )


def write_scene(folder: Path, scene: Scene) -> Path:
    """Write `<folder>/<token>.scene.json.gz`; equal scenes give equal bytes.

    Raises:
        InputError: the scene holds what the format does not allow, such as a number that is not finite.
        OSError: it cannot be written.
    """
    document = {
        "token": scene.token,
        "log": scene.log,
        "devkit": scene.devkit,
        "ego": _motion_record(scene.ego),
        "centreline": scene.centreline.tolist(),
        "route_lane_ids": sorted(scene.route_lane_ids),
        "areas": [
            {"id": area.id, "type": area.type, "polygons": _rings(area.polygons)} for area in scene.areas
        ],
        "reference": [[int(row[0]), *map(float, row[1:])] for row in scene.reference],
        "tracks": [
            {
                "token": token,
                "type": type,
                "first_speed_mps": float(speed),
                "boxes": [None if np.isnan(box).all() else box.tolist() for box in boxes],
            }
            for token, type, speed, boxes in zip(
                scene.tracks.tokens,
                scene.tracks.types,
                scene.tracks.first_speed_mps,
                scene.tracks.boxes,
                strict=True,
            )
        ],
        "past": [_motion_record(motion) for motion in scene.past],
        "red_lights": [list(ids) for ids in scene.red_lights],
        "red_light_polygons": {id: _rings(polygons) for id, polygons in scene.red_light_polygons.items()},
        "human": None
        if scene.human is None
        else {"interval_s": scene.human.interval_s, "poses": scene.human.poses_in_ego.tolist()},
        "synthetic": scene.synthetic,
    }
    try:
        record = _SceneFile.model_validate(document)
    except ValidationError as error:
        raise InputError(f"scene {scene.token}: {first_fault(error)}") from error
    path = folder / f"{scene.token}{SCENE_SUFFIX}"
    write_whole(path, gzip.compress(record.model_dump_json().encode(), mtime=0))
    return path


def read_plans(path: Path, any_horizon: bool = False) -> dict[str, PlannedPath]:
    """Plans by token, from our JSON or a submission pickle of the devkit.

    Args:
        path: the file.
        any_horizon: take plans of other lengths than 4 s; NAVSIM holds the last pose of a shorter one.

    Raises:
        InputError: the file is unreadable, or plans are repeated, not finite or of another horizon; the
            message lists the tokens.
    """
    submission = path.suffix in SUBMISSION_SUFFIXES
    plans = read_submission(path) if submission else _read_plans_json(path)
    if not plans:
        raise InputError(f"{path} holds no plan")
    wrong = []
    for token, plan in plans.items():
        try:
            check_path(plan, token)
        except InputError as error:
            wrong.append(str(error))
            continue
        if not (any_horizon or covers_horizon(plan)):
            count = len(plan.poses_in_ego)
            horizon = f"{count * plan.interval_s:g} s ({count} poses {plan.interval_s:g} s apart)"
            wrong.append(f"plan of {token} covers {horizon}")
    if wrong:
        raise InputError(
            f"{path}: {len(wrong)} of {len(plans)} plans are refused (NAVSIM plans 4 s in the ego frame): "
            f"{listed(wrong, '; ')}"
        )
    return plans


def covers_horizon(plan: PlannedPath) -> bool:
    """Whether a plan is as long as NAVSIM drives it."""
    return abs(len(plan.poses_in_ego) * plan.interval_s - HORIZON * STEP_S) <= STEP_S / 2


def check_coverage(scenes: Mapping[str, Any], plans: Mapping[str, Any]) -> None:
    """Refuse scenes without a plan and plans without a scene.

    Raises:
        InputError: there are some; the message lists them.
    """
    missing = [token for token in scenes if token not in plans]
    unknown = [token for token in plans if token not in scenes]
    faults = []
    if missing:
        faults.append(f"{len(missing)} of {len(scenes)} scenes have no plan: {listed(missing)}")
    if unknown:
        faults.append(f"{len(unknown)} of {len(plans)} plans belong to no scene: {listed(unknown)}")
    if faults:
        raise InputError(f"{'; '.join(faults)}; --allow-missing scores the rest and says how much that is")


def read_stages(path: Path) -> list[Stages]:
    """The groups of a two-stage test: `reactive_all_mapping` of a split, as the devkit's YAML or as JSON.

    The value is a list of [token, token before, [[second-stage token, token before], …]].

    Raises:
        InputError: the file is unreadable or has no such list.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is neither YAML nor JSON ({error})") from error
    mapping: Any = content.get("reactive_all_mapping") if isinstance(content, dict) else content
    try:
        return [
            Stages(str(now), str(before), tuple((str(first), str(second)) for first, second in pairs))
            for now, before, pairs in mapping
        ]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{path} has no list reactive_all_mapping of [token, token before, [[token, token before], …]]; "
            "navhard_two_stage.yaml of the devkit has one"
        ) from error


def listed(items: Iterable[str], separator: str = ", ") -> str:
    """The first few items, and how many more there are."""
    items = list(items)
    more = f"{separator}and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return separator.join(items[:LISTED]) + more


def _read_plans_json(path: Path) -> dict[str, PlannedPath]:
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            repeated.extend(sorted({name for name in names if names.count(name) > 1}))
        return content

    try:
        document = json.loads(path.read_text(), object_pairs_hook=unique)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); it is truncated or edited") from error
    if repeated:
        raise InputError(f"{path} has {len(repeated)} tokens more than once: {listed(repeated)}")
    try:
        record = _PlansFile.model_validate(_nan_as_none(document))
    except ValidationError as error:
        raise InputError(
            f"{path}: {first_fault(error)}; expected "
            '{"frame": "ego", "interval_s": 0.5, "plans": {"<token>": [[x, y, heading], …]}}'
        ) from error
    return {token: _path(poses, record.interval_s) for token, poses in record.plans.items()}


def _nan_as_none(document: Any) -> Any:
    """NaN in a pose becomes null, so that all faulty plans can be listed, not only the first."""
    if isinstance(document, list):
        return [_nan_as_none(item) for item in document]
    if isinstance(document, dict):
        return {name: _nan_as_none(value) for name, value in document.items()}
    return None if isinstance(document, float) and not np.isfinite(document) else document


def _path(poses: list[list[float | None]], interval_s: float) -> PlannedPath:
    if len({len(pose) for pose in poses}) != 1:
        return PlannedPath(np.empty((len(poses), 0)), interval_s)  # of no shape; refused with its token
    return PlannedPath(np.array(poses, dtype=np.float64), interval_s)


def _motion(record: _Motion) -> EgoMotion:
    return EgoMotion(
        record.time_us,
        np.array(record.pose),
        np.array(record.velocity_mps),
        np.array(record.acceleration_mps2),
        record.steering_rad,
        record.steering_rate_rps,
        record.yaw_rate_rps,
        record.yaw_acceleration_rps2,
    )


def _motion_record(motion: EgoMotion) -> dict[str, Any]:
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in vars(motion).items()
    }


def _polygons(polygons: list[list[list[Point]]]) -> tuple[Rings, ...]:
    return tuple(tuple(np.array(ring) for ring in rings) for rings in polygons)


def _rings(polygons: tuple[Rings, ...]) -> list[list[list[list[float]]]]:
    return [[ring.tolist() for ring in rings] for rings in polygons]


def _tracks(records: list[_Track], steps: int) -> Tracks:
    absent = (np.nan,) * 5
    boxes = np.array([[box or absent for box in record.boxes] for record in records], dtype=np.float64)
    return Tracks(
        tuple(record.token for record in records),
        tuple(record.type for record in records),
        boxes if records else np.empty((0, steps, 5)),
        np.array([record.first_speed_mps for record in records]),
    )
