"""`vla-autoprune navsim`: PDMS and EPDMS of plans, from a NAVSIM user's own metric caches."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from vla_autoprune import __version__
from vla_autoprune.cli import app
from vla_autoprune.cli.options import PLAN_FRAME, PlanFrameName, require_directory
from vla_autoprune.errors import InputError
from vla_autoprune.files import write_whole
from vla_autoprune.progress import progress_bar

if TYPE_CHECKING:
    from eval_nuscenes.navsim.runs import Result
    from eval_nuscenes.navsim.scoring import FrameScore, Metric

Job = TypeVar("Job")
Done = TypeVar("Done")

TABLE_WIDTH = 110
"""Columns when the output is no terminal."""
LOGGED_DRIVE = "logged drive"

navsim = typer.Typer(
    help="NAVSIM's PDMS (v1) and EPDMS (v2), without the devkit.", no_args_is_help=True, add_completion=False
)
app.add_typer(navsim, name="navsim")

_WORKERS = typer.Option(1, "--workers", min=1, help="Processes that share the work.")


@navsim.command()
def score(
    scenes: Path = typer.Argument(
        metavar="SCENES", help="Folder of metric caches (devkit 1.1 or 2.2), or of what convert made of them."
    ),
    plans: Path = typer.Argument(
        metavar="PLANS", help="JSON of plans, or a submission pickle of the devkit (.pkl)."
    ),
    stages: Path | None = typer.Option(
        None, "--stages", metavar="FILE", help="Two-stage scoring: the split's YAML, or its mapping as JSON."
    ),
    human_filter: bool = typer.Option(
        True, "--human-filter/--no-human-filter", help="EPDMS: forgive what the human did as well."
    ),
    allow_missing: bool = typer.Option(
        False, "--allow-missing", help="Score what has both a scene and a plan, and say how much that is."
    ),
    any_horizon: bool = typer.Option(
        False, "--any-horizon", help="Take plans of other lengths than 4 s; the last pose is held."
    ),
    worst: int = typer.Option(6, "--worst", min=0, max=12, help="Scenes to draw, lowest scores first."),
    workers: int = _WORKERS,
    out: Path = typer.Option(
        Path("out/navsim"), "--out", metavar="DIR", help="For results.json and scores.png."
    ),
) -> None:
    """Drive plans with NAVSIM's tracker and bicycle model and score them: PDMS on v1 scenes, EPDMS on v2.

    Prints a table, writes results.json and scores.png to DIR. Sub-scores equal
    the official ones; no devkit, no nuPlan maps and no pickle code is run.

    A submission on navtest: vla-autoprune navsim score $NAVSIM_EXP_ROOT/metric_cache submission.pkl

    Our own JSON, four processes: vla-autoprune navsim score scenes plans.json --workers 4

    Two stages: vla-autoprune navsim score metric_cache submission.pkl --stages navhard_two_stage.yaml
    """
    from eval_nuscenes.navsim import aggregation, runs, scene_files
    from eval_nuscenes.navsim.scoring import EC

    require_directory("--out", out)
    found = scene_files.find_scenes(scenes)
    planned = scene_files.read_plans(plans, any_horizon)
    if not allow_missing:
        scene_files.check_coverage(found, planned)
    groups = None if stages is None else scene_files.read_stages(stages)
    tokens = [token for token in found if token in planned]
    if not tokens:
        raise InputError(f"no plan of {plans} belongs to a scene of {scenes}; are they of the same split?")
    if groups is not None:
        aggregation.check_stages(groups, tokens)
    jobs = [runs.ScoreJob(found[token], planned[token], human_filter) for token in tokens]
    done = _share("score", runs.score_job, jobs, workers)
    scores = [each for each in done if not isinstance(each, runs.Unreadable)]
    unreadable = [each.why for each in done if isinstance(each, runs.Unreadable)]
    if unreadable and not (allow_missing and scores):
        raise InputError(
            f"{len(unreadable)} of {len(jobs)} scenes cannot be read: {scene_files.listed(unreadable, '; ')}"
        )
    if groups is not None:
        aggregation.check_stages(groups, {frame.token for frame in scores})
    metric = scores[0].metric
    if groups is not None and metric.devkit != "v2":
        raise InputError("--stages needs scenes of devkit 2.2 (EPDMS); these are of 1.1 (PDMS)")
    result: Result = (
        aggregation.one_stage(scores) if groups is None else aggregation.two_stage(scores, groups)
    )
    coverage = f"{len(scores)} of {len(found)} scenes scored"
    if unreadable:
        coverage += f", {len(unreadable)} unreadable"
    if len(planned) > len(tokens):
        coverage += f", {len(planned) - len(tokens)} plans without a scene left out"
    if other := sum(not scene_files.covers_horizon(planned[frame.token]) for frame in scores):
        coverage += f", {other} with plans of another length than 4 s"
    if groups is not None:
        coverage += "; two stages, replayed traffic: not navhard's figure"
    elif metric.devkit == "v2":
        paired = sum(EC in frame.sub_scores for frame in result.frames)
        coverage += f", {paired} with extended comfort"
    conditions = {
        "command": shlex.join(["vla-autoprune", *sys.argv[1:]]),
        "version": __version__,
        "scenes": str(scenes),
        "plans": str(plans),
        "scored": len(scores),
        "of_scenes": len(found),
        "unreadable": unreadable,
        "human_filter": human_filter and metric.devkit == "v2",
        "stages": None if stages is None else str(stages),
        "any_horizon": any_horizon,
        "traffic": "replayed from the log",
    }
    out.mkdir(parents=True, exist_ok=True)
    lowest = [
        (scene_files.read_scene(found[frame.token]), planned[frame.token], frame)
        for frame in runs.worst_frames(result.frames, worst)
    ]
    title = f"{metric.name}: {coverage}"
    document = runs.document(result, metric, conditions)
    write_whole(out / "results.json", (json.dumps(document, indent=1) + "\n").encode())
    write_whole(out / "scores.png", runs.picture(result, metric, title, lowest))
    _print(runs.means(result, metric), metric, title, [frame for _, _, frame in lowest])
    if groups is not None:
        Console(stderr=True, soft_wrap=True).print(
            "the official navhard test drives reactive (IDM) traffic, which needs nuPlan's maps; here "
            "traffic is replayed from the log: do not compare with that leaderboard",
            style="yellow",
        )
    wrote = f"wrote {out / 'results.json'} and {out / 'scores.png'}"
    Console(soft_wrap=True).print(wrote, markup=False, highlight=False)


@navsim.command()
def convert(
    caches: Path = typer.Argument(metavar="CACHES", help="Folder of metric caches (devkit 1.1 or 2.2)."),
    out: Path = typer.Option(..., "--out", metavar="DIR", help="For one .scene.json.gz per token."),
    workers: int = _WORKERS,
) -> None:
    """Turn metric caches into plain, documented files that any language can read.

    Scenes that are in DIR already are left alone: interrupt it and run it again.

    Example: vla-autoprune navsim convert $NAVSIM_EXP_ROOT/metric_cache --out scenes --workers 4
    """
    from eval_nuscenes.navsim import runs
    from eval_nuscenes.navsim.scene_files import listed

    require_directory("--out", out)
    jobs = runs.convert_jobs(caches, out)
    out.mkdir(parents=True, exist_ok=True)
    done = _share("convert", runs.convert_job, jobs, workers)
    devkits = [each for each in done if not isinstance(each, runs.Unreadable)]
    unreadable = [each.why for each in done if isinstance(each, runs.Unreadable)]
    kinds = ", ".join(f"{devkits.count(devkit)} of {devkit}" for devkit in sorted(set(devkits)))
    Console(soft_wrap=True).print(
        f"wrote {len(devkits)} scenes ({kinds}) to {out}" if jobs else f"all scenes are in {out} already",
        markup=False,
        highlight=False,
    )
    if unreadable:
        raise InputError(
            f"{len(unreadable)} of {len(jobs)} caches cannot be converted: {listed(unreadable, '; ')}"
        )


@navsim.command()
def nuscenes(
    predictions: list[Path] = typer.Argument(
        None, metavar="[PREDICTIONS…]", help="Files that vla-autoprune evaluate takes; none: the baselines."
    ),
    data: Path = typer.Option(
        ..., "--data", metavar="ROOT", help="Data set in nuScenes format with its map expansion."
    ),
    version: str = typer.Option("v1.0-synth", "--version", help="Folder of its tables, such as v1.0-mini."),
    split: str = typer.Option("val", "--split", help="A split of the data set, or all."),
    limit: int | None = typer.Option(
        None, "--limit", min=1, help="This many samples, spread over the scenes."
    ),
    frame: PlanFrameName | None = PLAN_FRAME,
    allow_missing: bool = typer.Option(
        False, "--allow-missing", help="Score predictions that lack samples, and say how many."
    ),
    worst: int = typer.Option(6, "--worst", min=0, max=12, help="Scenes to draw, lowest scores first."),
    out: Path = typer.Option(
        Path("out/navsim_nuscenes"), "--out", metavar="DIR", help="For results.json and scores.png."
    ),
) -> None:
    """A PDM score on nuScenes-format data: ours, not comparable to any NAVSIM figure.

    NAVSIM's rules over 3 s, the nuScenes car, progress against the logged
    drive; roads and lanes from the map expansion. Constant velocity and the
    logged drive itself are scored beside the predictions.

    The synthetic world: vla-autoprune navsim nuscenes --data out/synth

    Predictions: vla-autoprune navsim nuscenes plans.json --data /data/nuscenes --version v1.0-trainval
    """
    from eval_nuscenes.navsim import aggregation, runs
    from eval_nuscenes.navsim.nuscenes_scenes import (
        INTERVAL_S,
        PDMS_NUSCENES,
        OffLaneError,
        scene_of_sample,
        score_on_nuscenes,
    )
    from eval_nuscenes.navsim.scene import PlannedPath
    from eval_nuscenes.nuscenes_reader import NuScenesSplit
    from eval_nuscenes.predictions import (
        CONSTANT_VELOCITY,
        check_names,
        check_readings,
        covered,
        read_predictions,
        sample_record,
    )

    require_directory("--out", out)
    # The command is no part of the score: taking it from the future leaks nothing.
    samples = NuScenesSplit(data, version, split, command_source="future", limit=limit)
    files = [read_predictions(path, None if frame is None else frame.value) for path in predictions or ()]
    check_names(files, (CONSTANT_VELOCITY, LOGGED_DRIVE))
    tokens = set(covered(files, samples.tokens, allow_missing))
    check_readings(files, samples, [place for place, token in enumerate(samples.tokens) if token in tokens])
    scores: dict[str, list[FrameScore]] = {}
    drawn, cut_off, off_lane = {}, 0, 0
    for sample in _progress(samples, "score", len(samples)):
        if sample.token not in tokens:
            continue
        if not sample.future_exists.all():
            cut_off += 1
            continue
        try:
            scene = scene_of_sample(sample, samples.road_map(sample.location))
        except OffLaneError:
            off_lane += 1
            continue
        made = sample_record(sample, files).plans
        plans = {name: np.array(plan.waypoints_in_ego) for name, plan in made.items()}
        plans[LOGGED_DRIVE] = sample.future_in_ego
        for name, waypoints in plans.items():
            scores.setdefault(name, []).append(score_on_nuscenes(scene, waypoints))
        drawn[sample.token] = scene, next(iter(plans.values()))
    if not scores:
        raise InputError(
            f"no sample of split {split} can be scored: {cut_off} without a whole future, "
            f"{off_lane} off the lanes of the map"
        )
    title = (
        f"{PDMS_NUSCENES.name}: {len(drawn)} of {len(samples)} samples scored; {len(samples) - len(tokens)} "
        f"without a plan, {cut_off} without a whole future, {off_lane} off the lanes of the map"
    )
    results = {name: aggregation.one_stage(frames) for name, frames in scores.items()}
    conditions = {
        "command": shlex.join(["vla-autoprune", *sys.argv[1:]]),
        "version": __version__,
        "data": f"{data}, {version}, split {split}",
        "scored": len(drawn),
        "of_samples": len(samples),
    }
    documents = {name: runs.document(each, PDMS_NUSCENES, conditions) for name, each in results.items()}
    first = next(iter(results))
    lowest = [
        (drawn[frame.token][0], PlannedPath(drawn[frame.token][1], INTERVAL_S), frame)
        for frame in runs.worst_frames(results[first].frames, worst)
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "results.json", (json.dumps(documents, indent=1) + "\n").encode())
    picture = runs.picture(results[first], PDMS_NUSCENES, f"{first}, {title}", lowest)
    write_whole(out / "scores.png", picture)
    rows = {name: runs.means(each, PDMS_NUSCENES)["all frames"] for name, each in results.items()}
    _print(rows, PDMS_NUSCENES, title, [frame for _, _, frame in lowest])
    wrote = f"wrote {out / 'results.json'} and {out / 'scores.png'}"
    Console(soft_wrap=True).print(wrote, markup=False, highlight=False)


def _share(
    title: str, work: Callable[[Job, Callable[[], None]], Done], jobs: Sequence[Job], workers: int
) -> list[Done]:
    from eval_nuscenes.crew import Crew

    with progress_bar() as progress, Crew(workers, progress) as crew:
        return list(crew.map(title, work, jobs, steps_per_job=1))


def _progress(items: Iterable[Job], title: str, total: int) -> Iterator[Job]:
    with progress_bar() as progress:
        yield from progress.track(items, description=title, total=total)


def _print(
    rows: Mapping[str, Mapping[str, float]], metric: Metric, title: str, lowest: Sequence[FrameScore]
) -> None:
    from eval_nuscenes.navsim.runs import SHORT_NAMES

    names = [name for name in (*metric.columns, "score") if any(name in row for row in rows.values())]
    table = Table(header_style="bold", pad_edge=False)
    table.add_column("%", no_wrap=True)
    for name in names:
        table.add_column(metric.name if name == "score" else SHORT_NAMES[name], justify="right", no_wrap=True)
    for stage, row in rows.items():
        table.add_row(stage, *_cells(names, row), style="bold")
    for frame in lowest:
        table.add_row(frame.token, *_cells(names, {**frame.sub_scores, "score": frame.score}), style="dim")
    console = Console()
    if console.width < TABLE_WIDTH and not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    console.print(title, style="bold", highlight=False, soft_wrap=True)
    console.print(table)
    console.print(metric.summary, style="dim", highlight=False)


def _cells(names: Sequence[str], row: Mapping[str, float]) -> list[str]:
    return [f"{100 * row[name]:.1f}" if name in row else "-" for name in names]
