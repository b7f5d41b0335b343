"""The synthetic world as a nuScenes data set that the devkit opens: tables, images, lidar, maps, CAN bus.

Same options, same bytes: tokens are hashes of what they name, times count from a fixed date, and a scene
depends on its own seed alone, so the number of worker processes does not matter.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal, TypeVar, get_args

import cv2
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich.console import Console
from rich.progress import Progress

from eval_nuscenes.can_bus import can_bus_messages
from eval_nuscenes.crew import Crew, Step
from eval_nuscenes.lidar import sweep, visible_fraction
from eval_nuscenes.map_expansion import LOCATIONS, MapLayers, map_layers
from eval_nuscenes.nuscenes_tables import (
    LIDAR_MOUNT,
    SCENE_TABLES,
    Keyframe,
    SensorMount,
    common_tables,
    data_path,
    mask_path,
    scene_tables,
    surroundings,
    token_maker,
)
from eval_nuscenes.world.scene import Points, RoadMap, Scene
from vla_autoprune.errors import InputError
from vla_autoprune.fingerprint import source_hash
from vla_autoprune.frame import CAMERAS
from vla_autoprune.progress import progress_bar

VERSION = "v1.0-synth"
RECORD_FILE = "synth.json"
STATES_PER_KEYFRAME = 5
"""Keyframes come at 2 Hz, states at 10 Hz."""
FIRST_SCENE_NUMBER = 2001
"""Above the numbers of nuScenes, some of which the devkit refuses or warns about."""
MOST_SCENES = 1000
Split = Literal["train", "calibration", "val"]
Name = TypeVar("Name", bound=str)

Simulate = Callable[[str, int, float, str], Scene]
"""name, seed, duration in seconds, kind -> the drive; worker processes import it by its name."""

_START_UTIME = 1_600_000_000_000_000
_UTIME_PER_SCENE = 3_600_000_000
_MAP_MARGIN_M = 30


class DatasetOptions(BaseModel):
    """What decides every byte of a synthetic data set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scenes: int = Field(default=10, ge=1, le=MOST_SCENES)
    seed: int = Field(default=0, ge=0)
    duration_s: float = Field(default=20.0, ge=4.0, le=60.0)
    width: int = Field(default=800, ge=64, le=3840)
    height: int = Field(default=450, ge=36, le=2160)
    kinds: tuple[str, ...] = ()
    """Kinds of scene, as often as training meets them; none means all that the world knows."""
    val_fraction: float = Field(default=0.5, ge=0.0, le=1.0)
    calibration_fraction: float = Field(default=0.3, ge=0.0, le=1.0)
    jpeg_quality: int = Field(default=85, ge=30, le=100)

    @model_validator(mode="after")
    def _splits_fit(self) -> DatasetOptions:
        if self.val_fraction + self.calibration_fraction > 1.0 + 1e-9:
            raise ValueError(
                f"--val-fraction {self.val_fraction:g} + --calibration-fraction "
                f"{self.calibration_fraction:g} > 1; their sum may be at most 1, the rest is for training"
            )
        return self


class SceneEntry(BaseModel):
    """One scene of a data set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: str
    seed: int
    location: str
    split: Split


class DatasetRecord(BaseModel):
    """synth.json: what a finished data set was made from, and a hash over all its other files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    options: DatasetOptions
    generator_sha256: str
    """Of the source code that wrote it: other code would write other bytes."""
    scenes: tuple[SceneEntry, ...]
    keyframes: int
    files: int
    bytes: int
    content_sha256: str


@dataclass(frozen=True)
class Dataset:
    """A finished data set.

    Attributes:
        root: what the devkit calls dataroot; the version is `v1.0-synth`.
        record: its synth.json.
        reused: it was there already, whole and made from the same options; nothing was written.
    """

    root: Path
    record: DatasetRecord
    reused: bool


def dataset_options(**values: Any) -> DatasetOptions:
    """Checked options.

    Raises:
        InputError: a value is out of range or a kind is unknown; the message names it and what is allowed.
    """
    from eval_nuscenes.world.storyline import KINDS

    try:
        options = DatasetOptions(**values)
    except ValidationError as error:
        raise InputError(_option_fault(error.errors()[0])) from error
    if unknown := [kind for kind in options.kinds if kind not in KINDS]:
        raise InputError(f"--kinds: there is no {', '.join(unknown)}; choose from {', '.join(KINDS)}")
    chosen = tuple(kind for kind in KINDS if not options.kinds or kind in options.kinds)
    return options.model_copy(update={"kinds": chosen})


def _option_fault(fault: Mapping[str, Any]) -> str:
    """A fault of `DatasetOptions` as the command line has it: option, value, what is allowed."""
    if not fault["loc"]:  # of several options together; the validator names them
        return str(fault["ctx"]["error"])
    field = str(fault["loc"][0])
    if field not in DatasetOptions.model_fields:
        return f"there is no option {field} of a data set"
    limits = DatasetOptions.model_fields[field].metadata
    low = next((limit.ge for limit in limits if hasattr(limit, "ge")), None)
    high = next((limit.le for limit in limits if hasattr(limit, "le")), None)
    option = {"width": "--image-size, width", "height": "--image-size, height"}.get(
        field, f"--{field.replace('_', '-')}"
    )
    if low is None or fault["type"] not in ("greater_than_equal", "less_than_equal"):
        return f"{option} {fault['input']!r}: {fault['msg']}"
    return f"{option} {fault['input']}: expected {low} {'or more' if high is None else f'to {high}'}"


def write_dataset(
    root: Path,
    options: DatasetOptions,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    simulate: Simulate | None = None,
    console: Console | None = None,
) -> Dataset:
    """Write a data set, or find that it is there already.

    Everything goes to `<root>.synth-partial` first, which is renamed when whole and removed on any failure.

    Args:
        root: where the data set shall be; must not exist, be empty, or hold a synthetic data set.
        options: what to write.
        workers: processes that simulate and draw; None takes one per CPU, 1 stays in this process.
        overwrite: replace a synthetic data set made from other options or other code, or changed since.
        simulate: makes the drives; None takes the synthetic world.
        console: where the progress bar goes; None is standard error.

    Returns:
        The finished data set.

    Raises:
        InputError: root holds something else, another process is writing it, or the disk refuses.
    """
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: expected 1 or more")
    if simulate is None:
        from eval_nuscenes.world.traffic import simulate_scene

        simulate = simulate_scene
    root = root.resolve()
    with progress_bar(console) as progress:
        found = _existing(root, options, simulate, overwrite, progress)
        if found is not None:
            return Dataset(root, found, reused=True)
        try:
            with _partial_folder(root) as folder:
                record = _write(folder, options, workers or os.cpu_count() or 1, simulate, progress)
                _write_json(folder / RECORD_FILE, record.model_dump(mode="json"), indent=1)
                if root.exists():
                    shutil.rmtree(root)
                folder.replace(root)
        except OSError as error:
            raise InputError(f"cannot write the data set at {root}: {error}") from error
    return Dataset(root, record, reused=False)


def read_record(root: Path) -> DatasetRecord | None:
    """The synth.json of a data set, or None where there is none.

    Raises:
        InputError: the file cannot be read as one.
    """
    path = root / RECORD_FILE
    if not path.is_file():
        return None
    try:
        return DatasetRecord.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise InputError(f"{path} is not the record of a synthetic data set: {problem}") from error


def _existing(
    root: Path, options: DatasetOptions, simulate: Simulate, overwrite: bool, progress: Progress
) -> DatasetRecord | None:
    """The record of an identical data set at root; None when the place is free or may be overwritten."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return None
    way_out = "choose another --out, or pass --overwrite to replace it"
    try:
        record = read_record(root) if root.is_dir() else None
    except InputError as error:
        if overwrite and (root / VERSION).is_dir():
            return None
        raise InputError(f"{error}; {way_out}") from error
    if record is None:
        raise InputError(
            f"{root} exists and is not a synthetic data set (it has no {RECORD_FILE}); "
            "choose an empty or new folder as --out; it will not be overwritten"
        )
    here, wanted = record.options.model_dump(), options.model_dump()
    changed = [
        f"{key} {here[key]!r} instead of {wanted[key]!r}" for key in wanted if here[key] != wanted[key]
    ]
    if not changed and record.generator_sha256 != _generator_sha256(simulate):
        changed = ["content from other code"]
    if not changed and _content(root, progress) != (record.files, record.bytes, record.content_sha256):
        changed = ["files that were changed, added or lost since"]
    if not changed:
        return record
    if not overwrite:
        raise InputError(f"{root} holds a synthetic data set with {'; '.join(changed)}: {way_out}")
    return None


@contextlib.contextmanager
def _partial_folder(root: Path) -> Iterator[Path]:
    """An empty folder beside root, ours alone, and gone at the end unless it was renamed."""
    folder = root.parent / f"{root.name}.synth-partial"
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another process is writing {folder}; wait for it or choose another --out"
            ) from error
        try:
            for leftover in folder.iterdir():  # of a run that was killed
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


@dataclass(frozen=True)
class _Job:
    """One scene to write, and all that its bytes depend on."""

    entry: SceneEntry
    start_utime: int
    options: DatasetOptions
    simulate: Simulate
    folder: Path
    shift_m: tuple[float, float] = (0.0, 0.0)
    """From the scene's own coordinates to its location's map."""


@dataclass(frozen=True)
class _SceneRecords:
    """What a scene adds to the shared files: JSON lines by table, and map layers."""

    tables: dict[str, list[str]]
    layers: MapLayers
    keyframes: int


def _write(
    folder: Path, options: DatasetOptions, workers: int, simulate: Simulate, progress: Progress
) -> DatasetRecord:
    entries = _scene_entries(options)
    jobs = [
        _Job(entry, _START_UTIME + index * _UTIME_PER_SCENE, options, simulate, folder)
        for index, entry in enumerate(entries)
    ]
    new_token = token_maker(VERSION, options.seed)
    locations = [location for location in LOCATIONS if any(entry.location == location for entry in entries)]
    maps = {location: MapLayers() for location in locations}
    tables = common_tables(_mounts(options), locations, new_token)
    keyframes = 0
    (folder / VERSION).mkdir()
    with contextlib.ExitStack() as stack:
        crew = stack.enter_context(Crew(min(workers, len(jobs)), progress))
        extents = list(crew.map("laying out roads", _extent, jobs, steps_per_job=1))
        shifts, canvases = _layout([entry.location for entry in entries], extents)
        jobs = [replace(job, shift_m=shift) for job, shift in zip(jobs, shifts, strict=True)]
        files = {
            name: stack.enter_context(_JsonList(folder / VERSION / f"{name}.json")) for name in SCENE_TABLES
        }
        steps = len(_keyframe_states(options.duration_s))
        drawn = crew.map("drawing keyframes", _write_scene, jobs, steps)
        for entry, records in zip(entries, drawn, strict=True):
            for name, lines in records.tables.items():
                files[name].extend(lines)
            maps[entry.location].extend(records.layers)
            keyframes += records.keyframes
    for name, rows in tables.items():
        with _JsonList(folder / VERSION / f"{name}.json") as file:
            file.extend(map(_compact, rows))
    for location in locations:
        _write_map(folder, location, maps[location], *canvases[location])
    by_split = {split: [entry.name for entry in entries if entry.split == split] for split in get_args(Split)}
    _write_json(folder / "splits.json", by_split, indent=1)
    count, size, digest = _content(folder, progress)
    return DatasetRecord(
        options=options,
        generator_sha256=_generator_sha256(simulate),
        scenes=tuple(entries),
        keyframes=keyframes,
        files=count,
        bytes=size,
        content_sha256=digest,
    )


def _scene_entries(options: DatasetOptions) -> list[SceneEntry]:
    from eval_nuscenes.world.storyline import KIND_SHARES, KINDS

    shares = {kind: share for kind, share in zip(KINDS, KIND_SHARES, strict=True) if kind in options.kinds}
    kinds = _dealt(options.scenes, shares)
    by_kind = sorted(range(options.scenes), key=lambda index: kinds[index])
    train_fraction = max(0.0, 1.0 - options.val_fraction - options.calibration_fraction)
    dealt_splits: list[Split] = _dealt(
        options.scenes,
        {"val": options.val_fraction, "calibration": options.calibration_fraction, "train": train_fraction},
    )
    # Dealt along the kinds, so that each split gets its share of each kind as nearly as can be.
    splits = dict(zip(by_kind, dealt_splits, strict=True))
    entries = []
    for index, kind in enumerate(kinds):
        # 48 bits: far from the small seeds that training counts through, so its scenes are never met here.
        digest = hashlib.sha256(f"{VERSION}/{options.seed}/{index}".encode()).digest()
        entries.append(
            SceneEntry(
                name=f"scene-{FIRST_SCENE_NUMBER + index:04d}",
                kind=kind,
                seed=int.from_bytes(digest[:6], "big"),
                location=LOCATIONS[index % len(LOCATIONS)],
                split=splits[index],
            )
        )
    return entries


def _dealt(count: int, shares: Mapping[Name, float]) -> list[Name]:
    """`count` names, each as often as its share has it, spread evenly, the largest shares first."""
    whole, given = sum(shares.values()), dict.fromkeys(shares, 0)
    names = []
    for done in range(1, count + 1):
        owed = {name: share / whole * done - given[name] for name, share in shares.items()}
        names.append(max(owed, key=lambda name: owed[name]))
        given[names[-1]] += 1
    return names


def _mounts(options: DatasetOptions) -> dict[str, SensorMount]:
    from eval_nuscenes.world.render import RIG

    mounts = {}
    for channel in CAMERAS:
        camera = RIG.cameras[channel]
        intrinsic = tuple(map(tuple, camera.intrinsic_at(options.width, options.height).tolist()))
        mounts[channel] = SensorMount(camera.translation, camera.rotation, intrinsic)
    return {**mounts, "LIDAR_TOP": LIDAR_MOUNT}


def _keyframe_states(duration_s: float) -> range:
    return range(0, round(duration_s * 10) + 1, STATES_PER_KEYFRAME)


def _extent(job: _Job, step: Step) -> tuple[Points, Points]:
    """South-west and north-east corner of a scene's roads and traffic, in its own coordinates."""
    scene = job.simulate(job.entry.name, job.entry.seed, job.options.duration_s, job.entry.kind)
    roads = scene.map
    shapes = [lane.centreline for lane in roads.lanes]
    shapes += [*roads.road_segments, *roads.intersections, *roads.crossings, *roads.walkways]
    shapes += [np.array([(state.ego.x, state.ego.y) for state in scene.states])]
    shapes += [
        np.array([(actor.x, actor.y) for actor in state.actors]) for state in scene.states if state.actors
    ]
    points = np.concatenate(shapes)
    step()
    return points.min(axis=0), points.max(axis=0)


def _layout(
    locations: Sequence[str], extents: Sequence[tuple[Points, Points]]
) -> tuple[list[tuple[float, float]], dict[str, tuple[int, int]]]:
    """Place scenes side by side in rows, by location: every scene's shift, every canvas' width and height."""
    sizes = [
        (int(width) + 1 + 2 * _MAP_MARGIN_M, int(height) + 1 + 2 * _MAP_MARGIN_M)
        for width, height in (north_east - south_west for south_west, north_east in extents)
    ]
    shifts = [(0.0, 0.0)] * len(extents)
    canvases = {}
    for location in sorted(set(locations)):
        members = [index for index, other in enumerate(locations) if other == location]
        widest = max(sizes[index][0] for index in members)
        row_width = max(widest, int(sum(sizes[index][0] * sizes[index][1] for index in members) ** 0.5))
        x = y = row_height = width = 0
        for index in members:
            if x + sizes[index][0] > row_width:
                x, y, row_height = 0, y + row_height, 0
            corner = np.floor(extents[index][0])
            shifts[index] = (x + _MAP_MARGIN_M - float(corner[0]), y + _MAP_MARGIN_M - float(corner[1]))
            x += sizes[index][0]
            width, row_height = max(width, x), max(row_height, sizes[index][1])
        canvases[location] = (width, y + row_height)
    return shifts, canvases


def _write_scene(job: _Job, step: Step) -> _SceneRecords:
    options, new_token = job.options, token_maker(VERSION, job.options.seed)
    # Drawn in its own coordinates, as training draws it; only what is written down is moved.
    scene = replace(
        job.simulate(job.entry.name, job.entry.seed, options.duration_s, job.entry.kind),
        location=job.entry.location,
    )
    indices = [index for index in _keyframe_states(options.duration_s) if index < len(scene.states)]
    keyframes = [_write_keyframe(job, scene, index, step) for index in indices]
    moved = _moved(scene, *job.shift_m)
    for name, content in can_bus_messages(moved, job.start_utime, tuple(indices)).items():
        _write_json(job.folder / "can_bus" / f"{scene.name}_{name}.json", content)
    rows = scene_tables(moved, keyframes, options.width, options.height, new_token)
    layers = map_layers(moved.map, lambda *names: new_token("map", scene.name, *names))
    lines = {name: [_compact(row) for row in records] for name, records in rows.items()}
    return _SceneRecords(lines, layers, len(keyframes))


def _write_keyframe(job: _Job, scene: Scene, index: int, step: Step) -> Keyframe:
    from eval_nuscenes.world.render import RIG, render_cameras

    options, state = job.options, scene.states[index]
    utime = job.start_utime + round(state.time_s * 1e6)
    images = render_cameras(scene, index, RIG, options.width, options.height)
    quality = [cv2.IMWRITE_JPEG_QUALITY, options.jpeg_quality]
    for channel, image in images.items():
        path = job.folder / data_path(scene.location, channel, utime)
        path.parent.mkdir(parents=True, exist_ok=True)
        _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), quality)
        path.write_bytes(jpeg.tobytes())
    around = surroundings(scene, state)
    swept = sweep(around, spin=index)
    path = job.folder / data_path(scene.location, "LIDAR_TOP", utime)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(swept.points.astype("<f4").tobytes())
    step()
    return Keyframe(index, utime, swept.points_on_box, visible_fraction(around))


def _moved(scene: Scene, east_m: float, north_m: float) -> Scene:
    """The same drive elsewhere."""
    shift = np.array([east_m, north_m])

    def all_moved(shapes: Sequence[Points]) -> tuple[Points, ...]:
        return tuple(shape + shift for shape in shapes)

    roads = scene.map
    lights = tuple(
        replace(
            light,
            position=(light.position[0] + east_m, light.position[1] + north_m, light.position[2]),
            stop_line=light.stop_line + shift,
        )
        for light in roads.lights
    )
    moved_roads = RoadMap(
        lanes=tuple(replace(lane, centreline=lane.centreline + shift) for lane in roads.lanes),
        road_segments=all_moved(roads.road_segments),
        intersections=all_moved(roads.intersections),
        crossings=all_moved(roads.crossings),
        walkways=all_moved(roads.walkways),
        lane_dividers=all_moved(roads.lane_dividers),
        road_dividers=all_moved(roads.road_dividers),
        lights=lights,
        buildings=tuple((outline + shift, height) for outline, height in roads.buildings),
        yield_lines=all_moved(roads.yield_lines),
    )
    states = tuple(
        replace(
            state,
            ego=replace(state.ego, x=state.ego.x + east_m, y=state.ego.y + north_m),
            actors=tuple(replace(actor, x=actor.x + east_m, y=actor.y + north_m) for actor in state.actors),
        )
        for state in scene.states
    )
    return replace(scene, map=moved_roads, states=states)


def _write_map(folder: Path, location: str, layers: MapLayers, width_m: int, height_m: int) -> None:
    expansion = layers.expansion(float(width_m), float(height_m))
    _write_json(folder / "maps" / "expansion" / f"{location}.json", expansion)
    layers.write_mask(folder / mask_path(location), width_m, height_m)


class _JsonList(contextlib.AbstractContextManager["_JsonList"]):
    """A JSON file that holds a list, one record a line, written as the records come."""

    def __init__(self, path: Path) -> None:
        self._file: IO[str] = path.open("w", encoding="utf-8", newline="\n")
        self._separator = "[\n"

    def extend(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._file.write(self._separator + line)
            self._separator = ",\n"

    def __exit__(self, *_: object) -> None:
        self._file.write("[]\n" if self._separator == "[\n" else "\n]\n")
        self._file.close()


def _compact(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


def _write_json(path: Path, content: Any, indent: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = _compact(content) if indent is None else json.dumps(content, indent=indent, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _content(root: Path, progress: Progress) -> tuple[int, int, str]:
    """Number of files, their bytes, and a hash over all but the record."""
    paths = sorted(path for path in root.rglob("*") if path.is_file() and path.name != RECORD_FILE)
    task = progress.add_task("checking files", total=len(paths))
    digest, size = hashlib.sha256(), 0
    for path in paths:
        content = path.read_bytes()
        size += len(content)
        name = path.relative_to(root).as_posix()
        digest.update(f"{hashlib.sha256(content).hexdigest()}  {name}\n".encode())
        progress.advance(task)
    return len(paths), size, digest.hexdigest()


def _generator_sha256(simulate: Simulate) -> str:
    here = Path(__file__).parent
    modules = ("can_bus", "lidar", "map_expansion", "nuscenes_tables", "nuscenes_writer")
    sources = [*(here / f"{name}.py" for name in modules), here / "world"]
    return source_hash(sources, also=f"{simulate.__module__}.{simulate.__qualname__}")
