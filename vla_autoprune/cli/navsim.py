"""`vla-autoprune navsim`: PDMS and EPDMS of plans, from a NAVSIM user's own metric caches."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from vla_autoprune import __version__
from vla_autoprune.cli import app
from vla_autoprune.cli.options import require_directory
from vla_autoprune.errors import InputError
from vla_autoprune.files import write_whole

if TYPE_CHECKING:
    from eval_nuscenes.navsim.runs import Result
    from eval_nuscenes.navsim.scoring import FrameScore, Metric

Job = TypeVar("Job")
Done = TypeVar("Done")

TABLE_WIDTH = 110
"""Columns when the output is no terminal."""

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

    require_directory("--out", out)
    found = scene_files.find_scenes(scenes)
    planned = scene_files.read_plans(plans, any_horizon)
    if not allow_missing:
        scene_files.check_coverage(found, planned)
    groups = None if stages is None else scene_files.read_stages(stages)
    tokens = [token for token in found if token in planned]
    if not tokens:
        raise InputError(f"no plan of {plans} belongs to a scene of {scenes}; are they of the same split?")
    jobs = [runs.ScoreJob(found[token], planned[token], human_filter) for token in tokens]
    scores = _share("score", runs.score_job, jobs, workers)
    metric = scores[0].metric
    if groups is not None and metric.name != "EPDMS":
        raise InputError("--stages needs scenes of devkit 2.2 (EPDMS); these are of 1.1 (PDMS)")
    result: Result = (
        aggregation.one_stage(scores) if groups is None else aggregation.two_stage(scores, groups)
    )
    coverage = f"{len(tokens)} of {len(found)} scenes scored"
    if len(planned) > len(tokens):
        coverage += f", {len(planned) - len(tokens)} plans without a scene left out"
    conditions = {
        "command": shlex.join(["vla-autoprune", *sys.argv[1:]]),
        "version": __version__,
        "scenes": str(scenes),
        "plans": str(plans),
        "scored": len(tokens),
        "of_scenes": len(found),
        "human_filter": human_filter and metric.name == "EPDMS",
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
    _print(result, metric, title, [frame for _, _, frame in lowest])
    if groups is not None:
        Console(stderr=True, soft_wrap=True).print(
            "the official navhard test drives reactive (IDM) traffic, which needs nuPlan's maps; here "
            "traffic is replayed from the log: do not compare with that leaderboard",
            style="yellow",
        )
    Console(soft_wrap=True).print(f"wrote {out / 'results.json'} and {out / 'scores.png'}", highlight=False)


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

    require_directory("--out", out)
    jobs = runs.convert_jobs(caches, out)
    out.mkdir(parents=True, exist_ok=True)
    devkits = _share("convert", runs.convert_job, jobs, workers)
    kinds = ", ".join(f"{devkits.count(devkit)} of {devkit}" for devkit in sorted(set(devkits)))
    Console(soft_wrap=True).print(
        f"wrote {len(devkits)} scenes ({kinds}) to {out}" if devkits else f"all scenes are in {out} already",
        highlight=False,
    )


def _share(
    title: str, work: Callable[[Job, Callable[[], None]], Done], jobs: Sequence[Job], workers: int
) -> list[Done]:
    from eval_nuscenes.crew import Crew

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress, Crew(workers, progress) as crew:
        return list(crew.map(title, work, jobs, steps_per_job=1))


def _print(result: Result, metric: Metric, title: str, lowest: Sequence[FrameScore]) -> None:
    from eval_nuscenes.navsim.runs import SHORT_NAMES, means

    rows = means(result, metric)
    names = [name for name in (*metric.columns, "score") if any(name in row for row in rows.values())]
    table = Table(title=title, title_justify="left", header_style="bold", pad_edge=False)
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
    console.print(table)
    console.print(metric.summary, style="dim", highlight=False)


def _cells(names: Sequence[str], row: dict[str, Any]) -> list[str]:
    return [f"{100 * row[name]:.1f}" if name in row else "-" for name in names]
