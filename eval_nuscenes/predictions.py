"""Plans that someone else made: our predictions file, and the result files that driving models write.

Nothing is guessed and nothing dropped in silence: what is missing, repeated, not finite or of another horizon
is listed, and a frame that the file does not name has to be given.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eval_nuscenes.evaluation import ConstantVelocity, PlanRecord, SampleRecord, Variant, plan_record
from eval_nuscenes.metrics import STEPS
from eval_nuscenes.navsim.unpickling import array_of, read_pickle
from eval_nuscenes.nuscenes_reader import NuScenesSplit, Sample
from vla_autoprune.errors import InputError
from vla_autoprune.files import first_fault
from vla_autoprune.frame import WAYPOINT_TIMES_S, FloatArray, Frame

PlanFrame = Literal["ego", "lidar"]
"""ego: x forward, y left, of the rear axle. lidar: x right, y forward, of the LiDAR. Both at t0, metres."""

FORMAT = "vla_autoprune.predictions/1"
LISTED = 10
"""Faults that a refusal shows."""
TOKEN_KEYS = ("token", "sample_token", "id")
ANSWER_KEYS = ("waypoints", "trajectory", "planning_traj", "answer", "predict", "prediction")
STILL_M = 0.3
"""A shorter step says nothing about the heading."""
FAR_M = 5.0
"""Samples that end this far away tell whether a file is read as it was meant."""
ELSEWHERE_M = 2.0
"""Two ways to read a plan that end nearer to each other are not told apart."""
LEAST_CHECKED = 5
"""Fewer samples tell nothing."""
SAMPLES_CHECKED = 200
"""Samples, spread over the split, that are looked at for this."""
LARGEST_HEADING_RAD = 2 * np.pi
"""A heading beyond this is in degrees: no car turns full circle in 3 s."""
FARTHEST_M = 1e4
"""A waypoint beyond this is no place a car gets to in 3 s."""
MOST_VALUES = 10_000_000
"""A pickle that holds more, by naming the same list again and again, is no predictions file."""
CONSTANT_VELOCITY = "constant velocity"
"""The row beside the files'."""

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_PAIR = re.compile(rf"[(\[]\s*({_NUMBER})\s*,\s*({_NUMBER})\s*[)\]]")
_OTHER_GROUP = re.compile(rf"[(\[]\s*{_NUMBER}(?:\s*,\s*{_NUMBER})*\s*[)\]]")
"""Numbers in brackets, however many."""
_PICKLES = (".pkl", ".pickle", ".pt", ".pth")


class Prediction(BaseModel):
    """One plan of a predictions file.

    Attributes:
        waypoints: [6, 2] x, y or (frame ego only) [6, 3] x, y, heading in radians; checked with those of the
            other kinds of files, so that all faults are listed.
        latency_ms: from the frame to the plan, where it was measured.
    """

    model_config = ConfigDict(extra="forbid")

    token: str
    waypoints: list[Any]
    latency_ms: Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)] | None = None


class PredictionsFile(BaseModel):
    """The documented format of `vla-autoprune evaluate`."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["vla_autoprune.predictions/1"]
    frame: PlanFrame
    times_s: list[float] = list(WAYPOINT_TIMES_S)
    predictions: list[Prediction]


@dataclass(frozen=True)
class Predictions:
    """Checked plans of one file.

    Attributes:
        read_as: which kind of file it was taken for, in words.
        sha256: of the file.
        waypoints: token -> [6, 2 or 3] in `frame`.
        latency_ms: token -> measured latency; empty where the file has none.
    """

    path: Path
    read_as: str
    frame: PlanFrame
    sha256: str
    waypoints: Mapping[str, FloatArray]
    latency_ms: Mapping[str, float]

    @property
    def name(self) -> str:
        """For tables."""
        return self.path.stem


@dataclass
class _Found:
    """What a file holds before it is checked."""

    read_as: str
    frame: PlanFrame | None
    plans: list[tuple[str, Any]]
    latency_ms: dict[str, float] = field(default_factory=dict)


def read_predictions(path: Path, frame: PlanFrame | None = None) -> Predictions:
    """Read a result file of any kind that docs/predictions.md describes.

    Args:
        path: JSON, JSON lines, or a pickle of plain values and numpy arrays.
        frame: of its waypoints; needed where the kind of file does not fix it.

    Returns:
        All its plans.

    Raises:
        InputError: it is of no known kind, its frame is unknown or contradicts `frame`, or any of its plans
            is repeated, not finite, of another horizon, or cannot be read: all are counted, ten are listed.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"predictions {path} cannot be read: {error.strerror}") from error
    repeated: list[str] = []
    document = _pickled(path) if path.suffix in _PICKLES else _parsed(path, content, repeated)
    found = _of_document(path, document)
    if found.frame is None and frame is None:
        raise InputError(
            f"{path} ({found.read_as}) does not say which frame its waypoints are in; give --frame ego "
            "(x forward, y left) or --frame lidar (x right, y forward)"
        )
    if found.frame is not None and frame not in (None, found.frame):
        raise InputError(f"{path} ({found.read_as}) has its waypoints in frame {found.frame}, not {frame}")
    chosen: PlanFrame = found.frame or frame or "ego"
    faults = [f"{_token(key)} is there twice" for key in repeated]
    waypoints: dict[str, FloatArray] = {}
    for token, plan in found.plans:
        if token in waypoints:
            faults.append(f"{token} is there twice")
            continue
        waypoints[token], fault = _checked(plan, chosen)
        if fault:
            faults.append(f"{token} {fault}")
    if found.latency_ms and len(found.latency_ms) < len(waypoints):
        absent = [token for token in waypoints if token not in found.latency_ms]
        faults += [f"{token} has no latency_ms, others have" for token in absent]
    refuse(path, faults, "correct them")
    return Predictions(
        path, found.read_as, chosen, hashlib.sha256(content).hexdigest(), waypoints, found.latency_ms
    )


def refuse(path: Path, faults: Sequence[str], way_out: str) -> None:
    """Raise an InputError that counts the faults of a file and lists the first ten, if there are any."""
    if faults:
        more = f" … and {len(faults) - LISTED} more" if len(faults) > LISTED else ""
        count = f"{len(faults)} fault{'s' * (len(faults) > 1)}"
        raise InputError(f"{path}: {count}: {'; '.join(faults[:LISTED])}{more}; {way_out}")


def covered(
    predictions: Sequence[Predictions], tokens: Sequence[str], allow_missing: bool = False
) -> list[str]:
    """Samples that every file has a plan for, in the order of `tokens`.

    Raises:
        InputError: no sample has one, or some lack one and `allow_missing` is off; they are listed.
    """
    for each in predictions:
        missing = [token for token in tokens if token not in each.waypoints]
        if len(missing) == len(tokens):
            raise InputError(
                f"{each.path} has a plan for none of the {len(tokens)} samples; its tokens are like "
                f"{next(iter(each.waypoints), '(none)')}, the data set's like {tokens[0]}: check --version "
                "and --split"
            )
        if not allow_missing:
            faults = [f"{token} is missing" for token in missing]
            refuse(each.path, faults, "complete the file, or score the others with --allow-missing")
    return [token for token in tokens if all(token in each.waypoints for each in predictions)]


def check_names(predictions: Sequence[Predictions], taken: Sequence[str] = (CONSTANT_VELOCITY,)) -> None:
    """Refuse files that would share a row.

    Args:
        predictions: told apart by the names of their files.
        taken: names of the other rows.

    Raises:
        InputError: two files have the same name, or one that of another row.
    """
    names = [each.name for each in predictions]
    if len({*names, *taken}) < len(names) + len(taken):
        raise InputError(
            f"predictions files are told apart by name, beside rows called {' and '.join(taken)}; these are "
            f"called {', '.join(names)}: rename one"
        )


def prediction_variants(predictions: Sequence[Predictions]) -> tuple[Variant, ...]:
    """The rows of an evaluation of result files: one per file, then constant velocity.

    Raises:
        InputError: see `check_names`.
    """
    check_names(predictions)
    constant = ConstantVelocity()
    return (
        *(Variant(each.name, "predictions", constant) for each in predictions),
        Variant(CONSTANT_VELOCITY, "constant_velocity", constant),
    )


def sample_record(sample: Sample, predictions: Sequence[Predictions]) -> SampleRecord:
    """The plans for one sample, as an evaluation keeps them: rear-axle waypoints in the ego frame.

    Headings that a file does not have are taken along its path.
    """
    plans = {}
    for each in predictions:
        latency = each.latency_ms.get(sample.token)
        plans[each.name] = PlanRecord(
            waypoints_in_ego=tuple(
                tuple(float(value) for value in row)
                for row in _in_ego(each.waypoints[sample.token], each.frame, sample)
            ),
            timings_ms={} if latency is None else {"total": latency},
        )
    constant = Variant(CONSTANT_VELOCITY, "constant_velocity", ConstantVelocity())
    plans[constant.name] = plan_record(constant, Frame({}, sample.ego, sample.command, sample.token))
    return SampleRecord(token=sample.token, scene=sample.scene, plans=plans)


def check_reading(predictions: Predictions, samples: Iterable[Sample]) -> None:
    """Refuse plans that fit the truth far better when they are read in another way.

    Args:
        predictions: of one file.
        samples: with a plan; those that end less than 5 m away do not tell.

    Raises:
        InputError: in the other frame, with left and right exchanged, as steps that have to be added up or
            as centimetres, the median error is less than a quarter, over at least five samples that end 2 m
            or more elsewhere that way.
    """
    other: PlanFrame = "lidar" if predictions.frame == "ego" else "ego"
    errors: dict[str, list[tuple[float, float]]] = {}
    for sample in samples:
        truth = sample.truth.waypoints
        if not sample.truth.complete or float(np.hypot(*truth[-1])) < FAR_M:
            continue
        plan = predictions.waypoints[sample.token][:, :2]
        here = sample.lidar_waypoints(_in_ego(plan, predictions.frame, sample))
        ways = {
            f"in frame {other}": sample.lidar_waypoints(_in_ego(plan, other, sample)),
            "with left and right exchanged": here * np.array([-1, 1], dtype=np.float32),
            "as steps to add up": sample.lidar_waypoints(
                _in_ego(plan.cumsum(axis=0), predictions.frame, sample)
            ),
            "as centimetres": sample.lidar_waypoints(_in_ego(plan / 100, predictions.frame, sample)),
        }
        for way, there in ways.items():
            if np.hypot(*(there - here)[-1]) >= ELSEWHERE_M:
                told = (there != here).any(axis=0)  # only left and right where these are exchanged
                off = np.linalg.norm((np.stack([here, there]) - truth)[..., told], axis=-1).mean(axis=-1)
                errors.setdefault(way, []).append((float(off[0]), float(off[1])))
    way_out = {
        f"in frame {other}": f"the frame is wrong: use --frame {other}, or correct the file",
        "with left and right exchanged": "the ego frame has y to the left, the LiDAR frame x to the right",
        "as steps to add up": "waypoints are positions relative to the keyframe",
        "as centimetres": "waypoints are metres",
    }
    for way, found in errors.items():
        as_given, that_way = np.median(found, axis=0)
        if len(found) >= LEAST_CHECKED and that_way < as_given / 4:
            raise InputError(
                f"{predictions.path}: read in frame {predictions.frame} its plans are {as_given:.1f} m off "
                f"(median of {len(found)} samples), read {way} they would be {that_way:.1f} m off; "
                f"{way_out[way]}"
            )


def check_readings(predictions: Sequence[Predictions], split: NuScenesSplit, places: Sequence[int]) -> None:
    """Refuse files that are read in a wrong way, by some of the samples that all have a plan for.

    Args:
        predictions: the files.
        split: where the samples are.
        places: of these samples in the split.

    Raises:
        InputError: see `check_reading`.
    """
    looked_at = places[:: max(1, len(places) // SAMPLES_CHECKED)]
    for each in predictions:
        check_reading(each, (split[index] for index in looked_at))


def headings_along(path: FloatArray) -> FloatArray:
    """Directions of a path that starts at the origin straight ahead.

    Args:
        path: [T, 2] x, y in the ego frame.

    Returns:
        [T] radians, from the point before to the point after each; a stretch of less than 0.3 m keeps the
        direction of the stretch before.
    """
    points = np.vstack([np.zeros(2), path])
    headings: list[float] = []
    for index in range(1, len(points)):
        stretch = points[min(index + 1, len(points) - 1)] - points[index - 1]
        known = headings[-1] if headings else 0.0
        headings.append(float(np.arctan2(stretch[1], stretch[0])) if np.hypot(*stretch) > STILL_M else known)
    return np.unwrap(headings)


def _in_ego(waypoints: FloatArray, frame: PlanFrame, sample: Sample) -> FloatArray:
    """[6, 3] rear-axle x, y, heading from [6, 2 or 3] waypoints."""
    if frame == "ego":
        if waypoints.shape[1] == 3:
            return waypoints
        return np.column_stack([waypoints, headings_along(waypoints)])
    mount = sample.ego_from_lidar[:2, 3]
    yaw = np.arctan2(sample.ego_from_lidar[1, 0], sample.ego_from_lidar[0, 0])
    rotation = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
    lidar = waypoints[:, :2] @ rotation.T
    headings = headings_along(lidar)
    swing = np.stack(
        [
            np.cos(headings) * mount[0] - np.sin(headings) * mount[1],
            np.sin(headings) * mount[0] + np.cos(headings) * mount[1],
        ],
        axis=1,
    )
    return np.column_stack([lidar + mount - swing, headings])


def _checked(plan: Any, frame: PlanFrame) -> tuple[FloatArray, str]:
    """A plan as numbers, and what is wrong with it, if anything."""
    nothing = np.zeros((STEPS, 2))
    if isinstance(plan, str):
        pairs = _PAIR.findall(plan)
        if not pairs:
            other = _OTHER_GROUP.search(plan)
            came = plan[:40] if other is None else other[0][:40]
            return nothing, f"has no waypoints in its text but {came!r}, needed: {STEPS} of (x, y)"
        plan = [[float(x), float(y)] for x, y in pairs]
    if odd := _no_number(plan):
        return nothing, f"is no list of waypoints, it holds {odd}"
    try:
        waypoints = np.array(plan, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return nothing, f"is no list of waypoints but {str(plan)[:40]!r}"
    while waypoints.ndim > 2 and waypoints.shape[0] == 1:
        waypoints = waypoints[0]
    columns = (2, 3) if frame == "ego" else (2,)
    if waypoints.ndim != 2 or waypoints.shape[1] not in columns:
        allowed = " or ".join(f"[{STEPS}, {number}]" for number in columns)
        return nothing, f"has shape {list(waypoints.shape)}, allowed in frame {frame}: {allowed}"
    if len(waypoints) != STEPS:
        return nothing, f"has {len(waypoints)} waypoints, needed: {STEPS}, at 0.5 … 3.0 s"
    if not np.isfinite(waypoints).all():
        return nothing, f"is not finite at step {int(np.flatnonzero(~np.isfinite(waypoints).all(axis=1))[0])}"
    farthest = np.abs(waypoints[:, :2]).max(axis=1)
    if farthest.max() > FARTHEST_M:
        step = int(farthest.argmax())
        return nothing, f"is {farthest[step]:g} m away at step {step}, allowed: {FARTHEST_M:g} m"
    turned = np.abs(waypoints[:, 2:]).max(initial=0.0)
    if turned > LARGEST_HEADING_RAD:
        return nothing, f"has a heading of {turned:g}, allowed: {LARGEST_HEADING_RAD:.2f} radians"
    return waypoints, ""


def _no_number(plan: Any) -> str:
    """What a list of lists holds that is no number, though numpy would take it for one (true, "1"); or ""."""
    left = [plan]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left.extend(reversed(value))
        elif not isinstance(value, np.ndarray) and type(value) not in (int, float):
            return repr(value)[:40]
    return ""


def _parsed(path: Path, content: bytes, repeated: list[str]) -> Any:
    """What JSON or JSON lines hold; keys that an object has twice are added to `repeated`."""

    def pairs(entries: list[tuple[str, Any]]) -> dict[str, Any]:
        kept = dict(entries)
        if len(kept) < len(entries):
            counts = Counter(key for key, _ in entries)
            repeated.extend(key for key, times in counts.items() if times > 1)
        return kept

    try:
        text = content.decode()
        try:
            return json.loads(text, object_pairs_hook=pairs)
        except json.JSONDecodeError:
            repeated.clear()
            lines = [line for line in text.splitlines() if line.strip()]
            return [json.loads(line, object_pairs_hook=pairs) for line in lines]
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(
            f"{path} is neither JSON nor JSON lines ({error}); it is truncated or edited"
        ) from error


def _pickled(path: Path) -> Any:
    """What a pickle holds, with lists for arrays; nothing in it is run."""
    try:
        content = read_pickle(path, compressed=False)
        try:
            return _plain(content, count(1))
        except RecursionError as error:
            raise InputError(f"{path} holds a list within itself") from error
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    except InputError as error:
        raise InputError(
            f"{error}; of pickles, only plain values and numpy arrays are read: write the plans as JSON, "
            "docs/predictions.md shows how for UniAD and VAD"
        ) from error


def _plain(value: Any, number: Iterator[int]) -> Any:
    """A value with lists for arrays and tuples; `number` counts the values."""
    if next(number) > MOST_VALUES:
        raise InputError(f"it holds more than {MOST_VALUES} values")
    if isinstance(value, dict):
        return {key: _plain(entry, number) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, number) for entry in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    array = array_of(value)
    if isinstance(array, (np.ndarray, np.generic)):
        return array.tolist()
    raise InputError(f"it holds a {type(value).__name__}")


def _of_document(path: Path, document: Any) -> _Found:
    """Tell the kinds of files apart by what they look like."""
    if isinstance(document, dict) and "format" in document:
        return _own(path, document)
    for read in (_vad, _answers, _token_map):
        found = read(document)
        if found is not None:
            return found
    raise InputError(
        f"{path} is no predictions file; expected format {FORMAT!r}, an object from sample token to "
        f"waypoints, VAD's plan_results, or a list or lines of objects with one of {', '.join(TOKEN_KEYS)} "
        f"and one of {', '.join(ANSWER_KEYS)}"
    )


def _own(path: Path, document: dict[str, Any]) -> _Found:
    try:
        file = PredictionsFile.model_validate(document)
    except ValidationError as error:
        raise InputError(f"{path}: {first_fault(error)}") from error
    if len(file.times_s) != STEPS or not np.allclose(file.times_s, WAYPOINT_TIMES_S):
        raise InputError(
            f"{path}: times_s is {file.times_s}; the protocols score {list(WAYPOINT_TIMES_S)}: resample the "
            "plans"
        )
    plans = [(entry.token, entry.waypoints) for entry in file.predictions]
    latencies = {entry.token: entry.latency_ms for entry in file.predictions if entry.latency_ms is not None}
    return _Found(FORMAT, file.frame, list(plans), latencies)


def _vad(document: Any) -> _Found | None:
    """VAD's plan_results: per token, steps between waypoints for each of three commands, and the command."""
    if not isinstance(document, dict) or not isinstance(document.get("plan_results"), dict):
        return None
    plans = []
    for token, entry in document["plan_results"].items():
        plan: Any = entry
        if isinstance(entry, (list, tuple)) and len(entry) == 2:
            steps, command = np.array(entry[0], dtype=object), np.ravel(np.array(entry[1], dtype=object))
            chosen = steps.ndim == 3 and len(steps) == len(command) and list(command).count(1) == 1
            if chosen and not _no_number(entry[0]):
                with contextlib.suppress(TypeError, ValueError, OverflowError):
                    plan = np.cumsum(steps.astype(np.float64)[list(command).index(1)], axis=0)
        plans.append((_token(token), plan))
    return _Found("VAD's plan_results", "lidar", plans)


def _answers(document: Any) -> _Found | None:
    """Lists or lines with a token and waypoints, as numbers or in the words of a language model."""
    if not isinstance(document, list) or not document:
        return None
    plans = []
    for entry in document:
        if not isinstance(entry, dict):
            return None
        token = next((entry[key] for key in TOKEN_KEYS if key in entry), None)
        answer = next((entry[key] for key in ANSWER_KEYS if key in entry), None)
        if token is None or answer is None:
            return None
        while isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], (str, list)):
            answer = answer[0]
        plans.append((_token(token), answer))
    return _Found("token and answer", None, plans)


def _token_map(document: Any) -> _Found | None:
    if not isinstance(document, dict) or not document:
        return None
    if not all(isinstance(plan, (list, str)) for plan in document.values()):
        return None
    return _Found("token to waypoints", None, [(_token(token), plan) for token, plan in document.items()])


def _token(name: object) -> str:
    return str(name).removesuffix("_trajectory")
