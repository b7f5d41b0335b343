"""`vla-autoprune record` and `replay`: drives on disk, and whether they are still planned the same."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from vla_autoprune.cli import app
from vla_autoprune.cli.options import THREADS, require_directory, require_file
from vla_autoprune.errors import InputError
from vla_autoprune.files import write_whole
from vla_autoprune.progress import progress_bar

if TYPE_CHECKING:
    from ros_nodes.replay import Replayed


class AccelerationSource(str, Enum):
    """The planner's parameter acceleration_source."""

    ODOMETRY = "odometry"
    TOPIC = "topic"


@app.command()
def record(
    out: Path = typer.Argument(..., metavar="DIR", help="Recording to write; must not exist yet."),
    namespace: str = typer.Option("/", "--namespace", help="Of the nodes to record."),
) -> None:
    """Record what planner and guard hear and say, until Ctrl-C.

    Writes an MCAP rosbag2 directory that `ros2 bag play` and Foxglove open
    too; rosbag2 itself is not needed, rclpy is.

    Example: vla-autoprune record drives/monday
    """
    require_directory("DIR", out.parent)
    try:
        from ros_nodes.programs import run_program
        from ros_nodes.recording import Recorder
    except ModuleNotFoundError as error:
        raise InputError(
            f"{error.name} is not there; source a ROS 2, or pip install 'vla_autoprune[ros-test]'"
        ) from error

    quoted = json.dumps(str(out), ensure_ascii=False)  # else YAML takes 20260131 for a number
    arguments = ["--ros-args", "-p", f"out:={quoted}", "-r", f"__ns:={namespace}"]
    sys.exit(run_program(Recorder, arguments))


@app.command()
def replay(
    recording: Path = typer.Argument(..., metavar="RECORDING", help="Directory of recorder or rosbag2."),
    bundle: Path = typer.Option(..., "--bundle", metavar="BUNDLE", help="Directory written by export."),
    tolerance_m: float = typer.Option(
        0.01, "--tolerance-m", min=0.0, help="Furthest a waypoint may lie from the recorded one."
    ),
    max_slowdown: float | None = typer.Option(
        None, "--max-slowdown", min=0.0, help="Largest ratio of median planning times; unless given, any."
    ),
    acceleration_source: AccelerationSource = typer.Option(
        AccelerationSource.ODOMETRY, "--acceleration-source", help="As the recorded planner had it."
    ),
    out: Path | None = typer.Option(None, "--out", metavar="FILE", help="JSON with every plan."),
    threads: int | None = THREADS,
) -> None:
    """Plan a recorded drive again and compare: the regression test of a deployment. Needs no ROS.

    Every recorded plan is made anew from its recorded images, odometry and
    command, in its recorded bucket. Exit code 1 if a plan differs by more
    than the tolerance, cannot be made, or planning became slower than allowed.

    Example: vla-autoprune replay drives/monday --bundle out/bundle --tolerance-m 0.05 --max-slowdown 1.2
    """
    from engines.onnxruntime import OnnxRuntimeBackend
    from ros_nodes.replay import replay as plans_of
    from vla_autoprune.bundle import load_bundle
    from vla_autoprune.runtime.planner import Planner

    if out is not None:
        require_file("--out", out)
    opened = load_bundle(bundle)
    planner = Planner(opened, OnnxRuntimeBackend(opened, threads=threads))
    console = Console(soft_wrap=True)
    again = plans_of(
        recording,
        opened.recipe.layout.cameras,
        planner.plan_in_bucket,
        planner.preprocessing.reduction,
        acceleration_source.value,
    )
    with progress_bar() as bar:
        plans = list(bar.track(again, description="plans again"))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, (json.dumps([asdict(plan) for plan in plans], indent=1) + "\n").encode())
    faults = _judge(console, plans, tolerance_m, max_slowdown)
    for fault in faults:
        console.print(fault, style="red", markup=False, highlight=False)
    raise typer.Exit(1 if faults else 0)


def _judge(
    console: Console, plans: list[Replayed], tolerance_m: float, max_slowdown: float | None
) -> list[str]:
    """Print the table; what is beyond the tolerances."""
    again = [plan for plan in plans if plan.difference_m is not None]
    differences = np.array([plan.difference_m for plan in again], dtype=np.float64)
    beyond = differences > tolerance_m
    recorded, replayed = (
        np.array([getattr(plan, name) for plan in again[1:]], dtype=np.float64)
        for name in ("recorded_ms", "replayed_ms")  # the first replayed plan also pays for memory
    )
    table = Table(title=f"{len(plans)} recorded plans, {len(again)} planned again", title_justify="left")
    for column in ("", "median", "p95", "largest"):
        table.add_column(column)
    for name, values, form in (
        ("waypoint difference, m", differences, ".4f"),
        ("planning time recorded, ms", recorded, ".1f"),
        ("planning time now, ms", replayed, ".1f"),
    ):
        spread = np.percentile(values, [50, 95, 100]) if len(values) else [np.nan] * 3
        table.add_row(name, *(format(value, form) for value in spread))
    console.print(table)
    faults = []
    problems = [plan for plan in plans if plan.problem]
    if problems:
        first = problems[0]
        faults.append(
            f"{len(problems)} plans were not made again, the first ({first.stamp_ns}): {first.problem}"
        )
    if beyond.any():
        first = again[int(np.argmax(beyond))]
        faults.append(
            f"{int(beyond.sum())} plans differ by more than {tolerance_m:g} m, the first ({first.stamp_ns}) "
            f"by {first.difference_m:.4f} m"
        )
    if max_slowdown is not None and len(replayed):
        slowdown = float(np.median(replayed) / np.median(recorded))
        if slowdown > max_slowdown:
            faults.append(f"the median plan takes {slowdown:.2f} times as long; allowed {max_slowdown:g}")
    return faults
