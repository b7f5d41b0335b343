"""A whole test: many scenes scored over processes, its results as a document and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval_nuscenes.navsim.aggregation import OneStageResult, TwoStageResult
from eval_nuscenes.navsim.scene import Floats, PlannedPath, Scene, box_corners
from eval_nuscenes.navsim.scene_files import SCENE_SUFFIX, find_scenes, read_scene, write_scene
from eval_nuscenes.navsim.scoring import FrameScore, Metric, score_plan
from vla_autoprune.errors import InputError
from vla_autoprune.page import INK

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Result = OneStageResult | TwoStageResult

SHORT_NAMES = {
    "no_at_fault_collisions": "NC",
    "drivable_area_compliance": "DAC",
    "driving_direction_compliance": "DDC",
    "traffic_light_compliance": "TLC",
    "ego_progress": "EP",
    "time_to_collision_within_bound": "TTC",
    "lane_keeping": "LK",
    "comfort": "C",
    "history_comfort": "HC",
    "two_frame_extended_comfort": "EC",
}
"""As the field abbreviates them."""

_REACH_M = 45.0


@dataclass(frozen=True)
class ScoreJob:
    """One plan for one scene in a file."""

    path: Path
    plan: PlannedPath
    human_filter: bool = True


@dataclass(frozen=True)
class ConvertJob:
    """One metric cache to be written as a scene file."""

    path: Path
    folder: Path


@dataclass(frozen=True)
class Unreadable:
    """A scene that could not be read, and why; the others go on, so that one run tells all that is wrong."""

    why: str


def score_job(job: ScoreJob, step: Callable[[], None]) -> FrameScore | Unreadable:
    """Read a scene and score the plan; for `eval_nuscenes.crew.Crew`."""
    step()
    try:
        scene = read_scene(job.path)
    except InputError as error:
        return Unreadable(str(error))
    return score_plan(scene, job.plan, job.human_filter)


def convert_job(job: ConvertJob, step: Callable[[], None]) -> str | Unreadable:
    """Read a metric cache, write a scene file, return the devkit's version; for `eval_nuscenes.crew.Crew`."""
    step()
    try:
        scene = read_scene(job.path)
        write_scene(job.folder, scene)
    except InputError as error:
        return Unreadable(str(error))
    return scene.devkit


def means(result: Result, metric: Metric) -> dict[str, dict[str, float]]:
    """Rows of the summary: stage -> column -> mean; columns of the metric that no frame has are left out."""
    if isinstance(result, OneStageResult):
        rows = {"all frames": {**result.sub_scores, "score": result.score}}
    else:
        rows = {
            "stage one": dict(result.stage_one),
            "stage two": dict(result.stage_two),
            "combined": {"score": result.score},
        }
    order = (*metric.columns, "score")
    return {stage: {name: row[name] for name in order if name in row} for stage, row in rows.items()}


def document(result: Result, metric: Metric, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into results.json."""
    return {
        "metric": metric.name,
        "definition": metric.summary,
        "conditions": dict(conditions),
        "means": means(result, metric),
        "frames": [
            {
                "token": frame.token,
                "log": frame.log,
                "score": frame.score,
                **({"weight": result.weights[frame.token]} if isinstance(result, TwoStageResult) else {}),
                "sub_scores": dict(frame.sub_scores),
                "before_human_filter": dict(frame.unfiltered),
                "progress_m": frame.drive.progress_m,
                "reference_progress_m": frame.reference.progress_m,
                "collision_step": frame.drive.collision_step,
                "ttc_step": frame.drive.ttc_step,
            }
            for frame in result.frames
        ],
    }


def worst_frames(frames: Sequence[FrameScore], count: int) -> list[FrameScore]:
    """The lowest scores first; equal ones by token."""
    return sorted(frames, key=lambda frame: (frame.score, frame.token))[:count]


def picture(
    result: Result,
    metric: Metric,
    title: str,
    worst: Sequence[tuple[Scene, PlannedPath, FrameScore]],
) -> bytes:
    """Means of the sub-scores, the spread of the score, and the worst scenes from above, as a PNG.

    Args:
        result: of the test.
        metric: its metric.
        title: of the picture.
        worst: scenes with the plan and its score, worst first.
    """
    import matplotlib

    from eval_nuscenes import pictures

    matplotlib.use("Agg")
    with matplotlib.rc_context(pictures.STYLE):
        return pictures.png(_figure(result, metric, title, worst))


def _figure(
    result: Result, metric: Metric, title: str, worst: Sequence[tuple[Scene, PlannedPath, FrameScore]]
) -> Figure:
    from matplotlib.figure import Figure

    columns = max(4, len(worst))
    figure = Figure(figsize=(2.9 * columns, 7.4 if worst else 3.6), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    rows: Any = figure.add_gridspec(2 if worst else 1, columns, height_ratios=(1, 1.5) if worst else None)
    half = columns // 2
    _draw_means(figure.add_subplot(rows[0, :half]), result, metric)
    _draw_spread(figure.add_subplot(rows[0, half:]), [frame.score for frame in result.frames], metric)
    for column, (scene, plan, frame) in enumerate(worst):
        axes = figure.add_subplot(rows[1, column])
        _draw_scene(axes, scene, plan, frame)
        if column == 0:
            axes.legend(fontsize=7, loc="lower left", frameon=True, framealpha=0.8)
    return figure


def _draw_means(axes: Axes, result: Result, metric: Metric) -> None:
    from eval_nuscenes import pictures

    rows = means(result, metric)
    names = [name for name in (*metric.columns, "score") if any(name in row for row in rows.values())]
    height = 0.8 / len(rows)
    colours = (pictures.PLAN, pictures.RANDOM, INK)
    for number, (stage, row) in enumerate(rows.items()):
        places = [index + (number - (len(rows) - 1) / 2) * height for index in range(len(names))]
        values = [100 * row.get(name, np.nan) for name in names]
        bars = axes.barh(places, values, height=0.9 * height, color=colours[number], label=stage)
        axes.bar_label(bars, [f"{v:.1f}" if np.isfinite(v) else "" for v in values], fontsize=7, padding=2)
    axes.set_yticks(
        range(len(names)), [metric.name if name == "score" else SHORT_NAMES[name] for name in names]
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 112)
    axes.set_xlabel("mean over frames, %")
    if len(rows) > 1:
        axes.legend(fontsize=7, loc="lower left")


def _draw_spread(axes: Axes, scores: Sequence[float], metric: Metric) -> None:
    from eval_nuscenes import pictures

    axes.hist(100 * np.asarray(scores), bins=np.linspace(0, 100, 41).tolist(), color=pictures.PLAN)
    axes.set_xlabel(f"{metric.name} of a frame, %")
    axes.set_ylabel("frames")
    axes.yaxis.get_major_locator().set_params(integer=True)


def _draw_scene(axes: Axes, scene: Scene, plan: PlannedPath, frame: FrameScore) -> None:
    from eval_nuscenes import pictures

    pose = scene.ego.pose
    boxes = scene.tracks.boxes[:, 0]
    near = boxes[np.isfinite(boxes[:, 0]) & (np.hypot(*(boxes[:, :2] - pose[:2]).T) < _REACH_M)]
    road = [
        _in_ego(rings[0], pose)
        for area in scene.areas
        if area.type not in ("lane", "lane_connector")
        for rings in area.polygons
    ]
    route = _in_ego(_near(scene.centreline, pose), pose)
    axes.plot(-route[:, 1], route[:, 0], label="route", color=pictures.NEUTRAL, linewidth=0.8)
    paths: dict[str, tuple[Floats, dict[str, Any]]] = {
        frame.metric.reference: (
            _in_ego(frame.reference.states[:, :2], pose),
            {"color": pictures.TRUTH, "linewidth": 3.5, "alpha": 0.7},
        ),
        "plan": (plan.poses_in_ego, {"color": pictures.RANDOM, "linewidth": 1.0, "linestyle": "--"}),
        "driven": (_in_ego(frame.drive.states[:, :2], pose), {"color": pictures.PLAN, "linewidth": 1.8}),
    }
    ego = box_corners(scene.vehicle.boxes(np.zeros(3)))
    pictures.draw_bird_eye(axes, paths, list(_in_ego(box_corners(near), pose)), road, ego=ego)
    reach = max(15.0, float(np.abs(plan.poses_in_ego[:, :2]).max()) + 6)
    axes.set_xlim(-0.6 * reach, 0.6 * reach)
    axes.set_ylim(-0.25 * reach, reach)
    broken = [
        SHORT_NAMES[name] for name, value in frame.sub_scores.items() if value < 1 and name != "ego_progress"
    ]
    axes.set_title(f"{scene.token}\n{100 * frame.score:.1f} %  {' '.join(broken)}", loc="left", fontsize=7.5)


def _in_ego(points: Floats, pose: Floats) -> Floats:
    """[..., 2] global points in the frame of a pose."""
    away = points[..., :2] - pose[:2]
    cos, sin = np.cos(pose[2]), np.sin(pose[2])
    return np.stack(
        [cos * away[..., 0] + sin * away[..., 1], cos * away[..., 1] - sin * away[..., 0]], axis=-1
    )


def _near(points: Floats, pose: Floats) -> Floats:
    """The part of a polyline around a pose."""
    return points[np.hypot(*(points - pose[:2]).T) < _REACH_M]


def convert_jobs(source: Path, folder: Path) -> list[ConvertJob]:
    """Metric caches below a folder that have no scene file in another one yet."""
    return [
        ConvertJob(path, folder)
        for token, path in find_scenes(source).items()
        if not (folder / f"{token}{SCENE_SUFFIX}").is_file()
    ]
