"""`vla-autoprune profile`: where every millisecond and joule of a plan goes."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vla_autoprune.cli import app
from vla_autoprune.cli.options import (
    BACKEND,
    THREADS,
    BackendName,
    comma_list,
    gathered,
    refuse,
    require_file,
    told_when_interrupted,
)
from vla_autoprune.cli.tables import figure_table, print_whole
from vla_autoprune.files import write_whole
from vla_autoprune.progress import progress_bar

if TYPE_CHECKING:
    from vla_autoprune.frame import Frame
    from vla_autoprune.models.preprocess import Preprocessing
    from vla_autoprune.profiling.budgets import Check
    from vla_autoprune.profiling.compare import Comparison
    from vla_autoprune.profiling.document import Distribution, Profile, RosLatencies
    from vla_autoprune.profiling.trace import Tracer
    from vla_autoprune.runtime.planner import Planner

TRACED_PLANS = 3
"""Per bucket, after the measurement: marks cost a little time."""


_MEASURING = ("frames", "warm_up", "buckets", "images", "backend", "threads", "trace")
"""Parameters that need a BUNDLE."""

_REPORTING = ("json_file", "html", "ros", "budgets")
"""Parameters that a profile which is there can take as well."""


@app.command()
def profile(
    context: typer.Context,
    source: Path | None = typer.Argument(
        None, metavar="[BUNDLE]", help="Bundle to measure, or the JSON file of an earlier profile to look at."
    ),
    frames: int = typer.Option(100, "--frames", min=1, help="Plans per bucket; p99 needs 100."),
    warm_up: int = typer.Option(5, "--warm-up", min=0, help="Plans per bucket before, not counted."),
    buckets: str | None = typer.Option(None, "--buckets", help="Names with commas; all of the recipe's."),
    images: list[Path] | None = typer.Option(
        None, "--images", metavar="DIR", help="Recorded frames, a folder each, as for predict; repeatable."
    ),
    backend: BackendName = BACKEND,
    threads: int | None = THREADS,
    json_file: Path | None = typer.Option(None, "--json", metavar="FILE", help="Write the profile."),
    html: Path | None = typer.Option(None, "--html", metavar="FILE", help="Write a report with plots."),
    trace: Path | None = typer.Option(
        None, "--trace", metavar="FILE", help="Write a timeline for chrome://tracing or ui.perfetto.dev."
    ),
    ros: Path | None = typer.Option(
        None, "--ros", metavar="DIR", help="Recording of the ROS nodes: adds their path latencies."
    ),
    budgets: Path | None = typer.Option(
        None, "--assert", metavar="YAML", help="Limits to keep; exits with 1 if one is exceeded."
    ),
    compare: tuple[Path, Path] | None = typer.Option(
        None, "--compare", metavar="A B", help="Two profiles: ratios of B over A; measures nothing."
    ),
    fail_on_regression: bool = typer.Option(
        False, "--fail-on-regression", help="With --compare: exit with 1 if something became slower."
    ),
) -> None:
    """Measure a bundle on this machine, stage by stage and bucket by bucket.

    Every round plans one frame in each bucket in turn, so that what disturbs
    the machine meets them all. Frames are yours or coloured noise. Prints
    percentiles of every stage, work against what the machine can do, memory
    and power; says what it cannot measure.

    Before and after a change:  vla-autoprune profile out/bundle --json a.json
                                vla-autoprune profile --compare a.json b.json
    """
    faults: list[str] = []
    if (source is None) == (compare is None):
        faults.append("give either a BUNDLE (or a profile's JSON file) or --compare A B")
    if fail_on_regression and compare is None:
        faults.append("--fail-on-regression belongs to --compare")
    if compare is not None and (given := _given(context, (*_MEASURING, *_REPORTING))):
        faults.append(f"--compare takes two profiles that are there, without {given}")
    for option, path in (("--json", json_file), ("--html", html), ("--trace", trace)):
        if path is not None:
            with gathered(faults):
                require_file(option, path)
    if source is not None and source.is_file() and (given := _given(context, _MEASURING)):
        faults.append(f"{source} has been measured; {given} needs a BUNDLE")
    refuse(faults)
    console = Console(soft_wrap=True)
    if compare is not None:
        comparison = _compared(*compare)
        _print_comparison(comparison, console)
        raise typer.Exit(1 if fail_on_regression and comparison.regressions else 0)
    assert source is not None
    result = _read(source) if source.is_file() else None
    limits = None
    if budgets is not None:
        from vla_autoprune.profiling.budgets import read_budgets

        limits = read_budgets(budgets)
    latencies = _ros_latencies(ros) if ros is not None else None
    if result is None:
        wanted = tuple(comma_list("--buckets", buckets, str, "full,b40_s1")) if buckets else ()
        result = _measure(source, frames, warm_up, wanted, images or [], backend, threads, trace)
    if latencies is not None:
        result = result.model_copy(update={"ros": latencies})
    print_profile(result, console)
    _write(result, json_file, html, console)
    if limits is not None:
        from vla_autoprune.profiling.budgets import check_budgets

        checks = check_budgets(result, limits)
        _print_checks(checks, console)
        if not all(check.passed for check in checks):
            raise typer.Exit(1)


def _given(context: typer.Context, names: Sequence[str]) -> str:
    """Those of the parameters that the command line has, as options."""
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in names}
    return ", ".join(
        options[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"
    )


def _measure(
    path: Path,
    frames: int,
    warm_up: int,
    buckets: tuple[str, ...],
    images: Sequence[Path],
    backend: BackendName,
    threads: int | None,
    trace: Path | None,
) -> Profile:
    from engines.backends import open_backend
    from vla_autoprune.bundle import load_bundle
    from vla_autoprune.profiling.ceilings import better, measure_ceiling
    from vla_autoprune.profiling.measure import Run, synthetic_frames
    from vla_autoprune.profiling.measure import profile as run_profile
    from vla_autoprune.profiling.roofline import ceiling_doubts
    from vla_autoprune.profiling.sensors import find_sensors
    from vla_autoprune.runtime.planner import Planner

    bundle = load_bundle(path)
    for name in buckets:
        bundle.recipe.bucket(name)
    opened = open_backend(backend.value, bundle, threads=threads)
    sensors, absent = find_sensors()
    try:
        planner = Planner(bundle, opened)
        recorded = [_frame(folder, planner.preprocessing) for folder in images]
        run = Run(
            frames=frames,
            warm_up=warm_up,
            buckets=buckets,
            command=shlex.join(["vla-autoprune", *sys.argv[1:]]),
            input=", ".join(map(str, images)) or "coloured noise, seed 0",
            rehearse=not recorded,
        )
        left = "nothing has been written; the same command starts from the beginning"
        with told_when_interrupted(lambda: left), progress_bar() as bar:
            task = bar.add_task("machine's ceilings", total=None)
            ceiling = measure_ceiling(opened, threads)
            result = run_profile(
                planner,
                recorded or synthetic_frames(planner),
                run,
                ceiling,
                sensors,
                absent,
                memory_mib=getattr(opened, "memory_mib", None),
                progress=lambda what, done, total: bar.update(
                    task, description=what, completed=done, total=total
                ),
            )
            if opened.clock == "host":
                ceiling = better(ceiling, measure_ceiling(opened, threads))
        result = result.model_copy(update={"ceiling": ceiling})
        result = result.model_copy(update={"notes": (*result.notes, *ceiling_doubts(result))})
        if trace is not None:
            _trace(planner, recorded, result, trace)
        return result
    finally:
        for sensor in sensors:
            sensor.close()
        opened.close()


def _trace(planner: Planner, recorded: Sequence[Frame], result: Profile, path: Path) -> None:
    """Every bucket once more, on a pipeline that marks its steps; rehearsed where no frame is recorded."""
    from vla_autoprune.profiling.measure import synthetic_frames
    from vla_autoprune.profiling.trace import Tracer, trace_events, write_trace
    from vla_autoprune.runtime.pipeline import Pipeline
    from vla_autoprune.runtime.planner import Planner

    tracer: Tracer = Tracer()
    marked = Planner(
        planner.bundle, planner.backend, pipeline=Pipeline(planner.bundle, planner.backend, tracer)
    )
    once = marked.plan_in_bucket if recorded else marked.rehearse
    frame = (recorded or synthetic_frames(planner, 1))[0]
    plans = []
    for bucket in result.buckets:
        for _ in range(TRACED_PLANS):
            tracer.take()
            plan = once(frame, bucket.name)
            plans.append((plan, tracer.take()))
    write_trace(trace_events(plans, planner.backend.clock == "device"), path)


def _frame(folder: Path, preprocessing: Preprocessing) -> Frame:
    from vla_autoprune.cli.predict import read_images
    from vla_autoprune.frame import Command, EgoState, Frame

    images = read_images(folder, preprocessing.cameras, preprocessing.reduction)
    return Frame(images, EgoState(speed_mps=6.0), Command.STRAIGHT, token=folder.name)


def _read(path: Path) -> Profile:
    from vla_autoprune.profiling.document import read_profile

    return read_profile(path)


def _compared(base: Path, other: Path) -> Comparison:
    from vla_autoprune.profiling.compare import compare

    return compare(_read(base), _read(other))


def _ros_latencies(recording: Path) -> RosLatencies:
    from ros_nodes import topics
    from ros_nodes.replay import read_messages
    from vla_autoprune.profiling.ros_latencies import ros_latencies

    return ros_latencies(read_messages(recording), recording, (topics.PLANNER_STATUS, topics.GUARD_STATUS))


def _write(result: Profile, json_file: Path | None, html: Path | None, console: Console) -> None:
    if json_file is not None:
        from vla_autoprune.profiling.document import write_profile

        write_profile(result, json_file)
        console.print(f"wrote {json_file}", highlight=False)
    if html is not None:
        from vla_autoprune.profiling.report import profile_page

        html.parent.mkdir(parents=True, exist_ok=True)
        write_whole(html, profile_page(result).encode())
        console.print(f"wrote {html}", highlight=False)


def print_profile(result: Profile, console: Console) -> None:
    """Buckets, the stages of the unpruned and of the leanest, and everything that qualifies them."""
    from vla_autoprune.profiling.roofline import amdahl

    print_whole(_phase_table(result), console)
    print_whole(_total_table(result), console)
    leanest = min(result.buckets, key=lambda bucket: bucket.work_fraction)
    for name in dict.fromkeys((result.buckets[0].name, leanest.name)):
        print_whole(_stage_table(result, name), console)
    ceiling, memory = result.ceiling, result.memory
    console.print(
        f"ceilings: {_rate(ceiling.flops_per_s, 'GFLOP/s')}, {_rate(ceiling.bytes_per_s, 'GB/s')} "
        f"({ceiling.source})",
        highlight=False,
    )
    limit = amdahl(result)
    if limit is not None:
        console.print(str(limit), highlight=False)
    device = f"{memory.device_mib:.0f} MiB " if memory.device_mib is not None else ""
    host = f"{memory.peak_host_mib:.0f} MiB" if memory.peak_host_mib is not None else "not measured"
    console.print(f"peak host memory {host}; device memory {device}({memory.device_source})", highlight=False)
    for bucket in result.buckets:
        for energy in bucket.energy:
            above = f", {energy.above_idle_j:.3f} J above idle" if energy.above_idle_j is not None else ""
            console.print(
                f"{bucket.name}: {energy.per_plan_j:.3f} J per plan{above}, {energy.mean_w:.1f} W "
                f"({energy.sensor})",
                highlight=False,
            )
    if result.ros is not None:
        print_whole(_ros_table(result.ros), console)
    for state in result.sensors:
        said = [f"{name} {value} → {state.after.get(name, '–')}" for name, value in state.before.items()]
        style = "yellow" if state.throttled else None
        line = f"{state.sensor}: {'; '.join([*said, state.throttling])}"
        console.print(line, style=style, highlight=False, markup=False)
    for name, why in result.absent_sensors.items():
        console.print(f"absent: {name} ({why})", style="yellow", highlight=False, markup=False)
    for note in result.notes:
        console.print(f"note: {note}", style="yellow", highlight=False, markup=False)


def _phase_table(result: Profile) -> Table:
    """What each bucket carries, and the medians of the parts of a plan."""
    from vla_autoprune.profiling.document import PHASES

    conditions = result.conditions
    table = figure_table(
        f"{conditions.model} on {conditions.device}: medians in ms", ("tokens", "work", "KV MiB", *PHASES)
    )
    for bucket in result.buckets:
        table.add_row(
            bucket.name,
            f"{bucket.visual_tokens_into_layers:.0f}",
            f"{bucket.work_fraction:.0%}",
            f"{bucket.kv_mib:.2f}",
            *(_ms(bucket.phase_ms(phase)) for phase in PHASES),
        )
    return table


def _total_table(result: Profile) -> Table:
    table = figure_table("whole plans, ms", ("p50", "p90", "p99", "max", "jitter", "p50 of a decoded token"))
    for bucket in result.buckets:
        token = bucket.decode_per_token
        table.add_row(bucket.name, *_figures(bucket.total), _ms(None if token is None else token.p50))
    return table


def _stage_table(result: Profile, name: str) -> Table:
    from vla_autoprune.profiling.roofline import reached

    bucket = result.bucket(name)
    assert bucket is not None
    clocks = " and ".join(sorted({stage.clock for stage in bucket.stages}))
    columns = ("rows", "p50", "p90", "p99", "max", "jitter", "GFLOP/s", "ceiling")
    table = figure_table(f"bucket {name}: ms per plan by the {clocks} clock", columns)
    for stage in bucket.stages:
        found = reached(stage, result.ceiling)
        share = ""
        if found and found.share is not None:
            share = f"{found.share:.0%} {'math' if found.bound == 'compute' else 'mem'}"
        table.add_row(
            f"{stage.name} × {stage.runs_per_plan}" if stage.runs_per_plan > 1 else stage.name,
            "" if stage.rows is None else str(stage.rows),
            *_figures(stage.time),
            f"{found.flops_per_s / 1e9:.1f}" if found and found.flops_per_s else "",
            share,
        )
    return table


def _figures(time: Distribution) -> list[str]:
    values: list[Any] = [time.p50, time.p90, time.p99, time.max, time.jitter]
    return [_ms(value) for value in values]


def _ms(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _rate(value: float | None, unit: str) -> str:
    return f"{value / 1e9:.1f} {unit}" if value is not None else f"{unit} not measured"


def _ros_table(ros: RosLatencies) -> Table:
    title = f"{ros.plans} plans, {ros.refused} refused in {ros.recording}: ms"
    table = figure_table(title, ("p50", "p90", "p99", "max", "jitter"), "latency")
    for name, time in ros.latencies_ms.items():
        table.add_row(name, *_figures(time))
    return table


def _print_comparison(comparison: Comparison, console: Console) -> None:
    console.print(f"A: {comparison.base}\nB: {comparison.other}", highlight=False)
    for difference in comparison.differences:
        console.print(f"differs: {difference}", style="yellow", highlight=False, markup=False)
    table = figure_table("", ("A p50 ms", "B p50 ms", "B / A", "95 % interval", "verdict"))
    marks = {"slower": "[bold red]slower[/]", "faster": "[green]faster[/]", "no difference shown": "–"}
    for change in comparison.changes:
        ratio = change.ratio
        interval = "" if ratio.low is None else f"{ratio.low:.3f} … {ratio.high:.3f}"
        table.add_row(
            f"{change.bucket} {change.what}",
            f"{change.base_ms:.3f}",
            f"{change.other_ms:.3f}",
            f"{ratio.ratio:.3f}",
            interval,
            marks.get(change.verdict, change.verdict),
        )
    print_whole(table, console)
    slower = [f"{change.bucket} {change.what}" for change in comparison.regressions]
    console.print(f"regressions: {', '.join(slower) or 'none shown'}", highlight=False)


def _print_checks(checks: Sequence[Check], console: Console) -> None:
    for check in checks:
        mark = "[green]ok[/]   " if check.passed else "[bold red]fails[/]"
        seen = check.reason if check.seen is None else f"{check.seen:.3f} {check.unit}"
        limit = f", limit {check.limit:g} {check.unit}" if check.unit else ""
        console.print(f"{mark} {escape(f'{check.what}: {seen}{limit}')}", highlight=False)
