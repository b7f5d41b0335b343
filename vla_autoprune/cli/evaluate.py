"""`vla-autoprune evaluate`: what pruning costs and saves, over a split of nuScenes-format data."""

from __future__ import annotations

import hashlib
import importlib
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

from vla_autoprune.cli import app
from vla_autoprune.cli.evaluation_table import print_evaluation
from vla_autoprune.cli.options import (
    BACKEND,
    PLAN_FRAME,
    THREADS,
    BackendName,
    CommandSource,
    PlanFrameName,
    PolicyName,
    comma_list,
    finite,
    gathered,
    refuse,
    require_directory,
    told_when_interrupted,
)
from vla_autoprune.errors import InputError, PlanError
from vla_autoprune.progress import progress_bar

if TYPE_CHECKING:
    from eval_nuscenes.bundle_run import OpenRun
    from eval_nuscenes.evaluation import PlanLog, PrunedKind, RunKey, SampleRecord, Variant
    from eval_nuscenes.nuscenes_reader import NuScenesSplit
    from eval_nuscenes.predictions import Predictions

Item = TypeVar("Item")

PROTOCOLS = "standard,uniad,stp3,vad"
POLICIES = "autoprune,random"
REPLICAS = 2
HOPELESS = 10
"""Samples without a plan, from the first on, after which the user is told."""


class EgoStateName(str, Enum):
    """The sources of `eval_nuscenes.nuscenes_reader.EgoStateSource`."""

    AUTO = "auto"
    CAN_BUS = "can_bus"
    POSES = "poses"


@app.command()
def evaluate(
    sources: list[Path] = typer.Argument(
        metavar="BUNDLE…|PREDICTIONS…",
        help="A directory that vla-autoprune export wrote, and others to compare with it; or files with "
        "plans that were made elsewhere.",
    ),
    data: Path = typer.Option(
        ..., "--data", metavar="ROOT", help="Data set in nuScenes format (its dataroot)."
    ),
    version: str = typer.Option("v1.0-synth", "--version", help="Folder of its tables, such as v1.0-mini."),
    split: str = typer.Option("val", "--split", help="A split of the data set, or all."),
    protocols: str = typer.Option(
        PROTOCOLS,
        "--protocols",
        metavar="P,P,…",
        help="Ways to score; the headlines go by the first. An unknown one lists them.",
    ),
    budgets: str | None = typer.Option(
        None, "--budgets", metavar="B,B,…", help="Budgets to run; all of the recipe's unless given."
    ),
    policies: str = typer.Option(
        POLICIES,
        "--policies",
        metavar="P,P,…",
        help="Ways to choose tokens at each budget: autoprune, random, uniform, fixed.",
    ),
    scenes: str | None = typer.Option(
        None, "--scenes", metavar="S,S,…", help="Only these scenes of the split, such as scene-0103."
    ),
    limit: int | None = typer.Option(
        None, "--limit", min=1, help="This many samples, spread over the scenes."
    ),
    frame: PlanFrameName | None = PLAN_FRAME,
    allow_missing: bool = typer.Option(
        False, "--allow-missing", help="Score predictions that lack samples, and say how many."
    ),
    latency_ms: float | None = typer.Option(
        None, "--latency-ms", min=0, help="Delay for the late figures; each plan's own time unless given."
    ),
    record: str | None = typer.Option(
        None, "--record", metavar="SCENE", help="Also write a scene for Rerun (.rrd) and Foxglove (.mcap)."
    ),
    ray: str | None = typer.Option(
        None, "--ray", metavar="ADDRESS", help="Plan on a Ray cluster; local starts one on this machine."
    ),
    replicas: int | None = typer.Option(
        None, "--replicas", min=1, help=f"Planners at work on the Ray cluster; {REPLICAS} unless given."
    ),
    out: Path = typer.Option(Path("out/evaluation"), "--out", metavar="DIR", help="Where the results go."),
    command_source: CommandSource = typer.Option(
        CommandSource.ROUTE, "--command-source", help="future is a label leak, for data without routes."
    ),
    ego_state: EgoStateName = typer.Option(
        EgoStateName.AUTO,
        "--ego-state",
        help="Speed, acceleration, yaw rate: can_bus, differences of past poses, or auto, the best there is.",
    ),
    backend: BackendName = BACKEND,
    threads: int | None = THREADS,
    warm_up: int = typer.Option(3, "--warm-up", min=0, help="Plans per variant before the first counts."),
) -> None:
    """Score plans: bundles', unpruned and pruned in several ways, or those in predictions files.

    Open-loop L2 and collisions by protocols of your choice, taken at once
    and after each plan's latency; visual tokens, work, latency and KV cache,
    measured side by side on each frame; pruning policies at equal latency;
    visual tokens of each camera that survive. Bundles are compared with the
    first one on the same frames, budget by budget.
    Prints a table, writes results.json and report.html to DIR. Interrupt it
    whenever you like: the same command goes on where it stopped.

    The synthetic world: vla-autoprune evaluate out/bundle --data out/synth

    What camera floors do, after vla-autoprune recipe floors: vla-autoprune evaluate out/bundle out/front12
    --data out/synth --budgets 0.25 --policies autoprune

    Two budgets, quickly: vla-autoprune evaluate out/bundle --data out/synth --budgets 0.4,0.25 --limit 40

    Real data: vla-autoprune evaluate out/bundle --data /data/nuscenes --version v1.0-mini --split mini_val
    --command-source future

    Plans of another model: vla-autoprune evaluate plan_conv.json --frame lidar --data /data/nuscenes
    --version v1.0-trainval --protocols uniad,stp3
    """
    from eval_nuscenes import report, summary
    from eval_nuscenes.bundle_run import BundleRun, SplitChoice
    from eval_nuscenes.evaluation import counterparts, pruned_example
    from eval_nuscenes.metrics import protocol_named
    from eval_nuscenes.predictions import read_predictions

    faults: list[str] = []
    of_files = _are_files(sources, faults)
    with gathered(faults):
        require_directory("--out", out)
    names: list[str] = []
    with gathered(faults):
        names = list(dict.fromkeys(comma_list("--protocols", protocols, str, PROTOCOLS)))
    for name in names:
        with gathered(faults):
            protocol_named(name)
    kinds: list[PrunedKind] = []
    with gathered(faults):
        kinds = _policies(policies)
    chosen: list[float] | None = None
    with gathered(faults):
        chosen = None if budgets is None else comma_list("--budgets", budgets, finite, "0.6,0.4,0.25")
    only: list[str] | None = None
    with gathered(faults):
        only = None if scenes is None else comma_list("--scenes", scenes, str, "scene-0103,scene-0916")
    with gathered(faults):
        _check_combination(
            of_files,
            for_bundles={
                "--ray": ray is not None,
                "--budgets": budgets is not None,
                "--policies": policies != POLICIES,
                "--command-source": command_source is CommandSource.FUTURE,
            },
            for_files={"--frame": frame is not None, "--allow-missing": allow_missing},
        )
    if latency_ms is not None:
        with gathered(faults):
            _check_latency(latency_ms)
    if replicas is not None and ray is None:
        faults.append(f"--replicas {replicas} is for a Ray cluster; name one with --ray, or use --ray local")
    if record is not None and only is not None and record not in only:
        faults.append(f"--record {record} is not among --scenes {scenes}")
    for module in [*(("rerun", "foxglove") if record else ()), *(("ray",) if ray else ())]:
        importlib.import_module(module)
    asked = SplitChoice(
        root=data,
        version=version,
        split=split,
        # What a predictions file was made from is not known; the future is there in any data set.
        command_source="future" if of_files else command_source.value,
        limit=limit,
        scenes=only,
        ego_state=ego_state.value,
        road_edges=any(protocol_named(name).needs_map for name in names if not faults),
    )
    read: list[Predictions] = []
    run: OpenRun | None = None
    if of_files:
        for path in sources:
            with gathered(faults):
                read.append(read_predictions(path, None if frame is None else frame.value))
    elif of_files is False:
        with gathered(faults):
            run = BundleRun(
                bundles=tuple(sources),
                samples=asked,
                budgets=None if chosen is None else tuple(chosen),
                policies=tuple(kinds),
                backend=backend.value,
                threads=threads,
                warm_up=warm_up,
            ).open()
    if faults and not (data / version).is_dir():
        # Alone, this is told when the data set is opened, with what there is.
        faults.append(f"--data {data} holds no {version}")
    refuse(faults)

    console = Console(soft_wrap=True)
    if command_source is CommandSource.FUTURE:
        console.print(
            "label leak: commands come from the true future; figures are optimistic", style="yellow"
        )
    samples = asked.open() if run is None else run.split
    if record is not None and record not in samples.scene_names:
        raise InputError(
            f"--record {record}: no such scene in split {split}; it has {', '.join(samples.scene_names)}"
        )
    if run is None:
        planned = _score_files(read, samples, allow_missing, console)
    else:
        planned = _plan_bundle(run, out, ray, replicas or REPLICAS, warm_up, console)
    scored, ego_sources = [], Counter[str]()
    place = {token: index for index, token in enumerate(samples.tokens)}
    for each in _progress(planned.records, "score", len(planned.records)):
        sample = samples[place[each.token]]
        scored.append(
            summary.score_sample(sample, each, names, latency_ms, samples.description(sample.scene))
        )
        ego_sources[sample.ego_source] += 1
    conditions = summary.Conditions(
        key=planned.key,
        source=planned.source,
        command=shlex.join(["vla-autoprune", *sys.argv[1:]]),
        data_root=str(data),
        version=version,
        split=split,
        samples=len(planned.records),
        samples_asked=len(samples),
        samples_in_split=samples.samples_in_split,
        scenes=len({each.scene for each in planned.records}),
        ego_sources=dict(ego_sources),
        latency_ms=latency_ms,
        warm_up=None if run is None else warm_up,
    )
    recipes = {} if run is None else run.recipes
    result = summary.summarise(planned.variants, planned.records, scored, conditions, recipes)
    out.mkdir(parents=True, exist_ok=True)
    summary.write_summary(out / "results.json", result)
    example = pruned_example(planned.variants) or planned.variants[0]
    compared = [example, *counterparts(planned.variants, example)]
    shown = samples, planned.records, scored
    cameras, reduction = (("CAM_FRONT",), None) if run is None else (run.cameras, run.reduction)
    with progress_bar() as progress:
        task = progress.add_task("report", total=None)
        report.write_report(
            out / "report.html",
            result,
            recipes,
            report.scene_views(*shown, example.name),
            () if run is None else report.token_views(samples, planned.records, compared, cameras, reduction),
            report.worst_views(*shown, example, cameras, reduction),
        )
        progress.update(task, total=1, completed=1)
    written = [out / "results.json", out / "report.html"]
    if record is not None:
        written += _record(record, samples, planned, example, out)
    if run is not None:
        run.close()
    print_evaluation(result)
    wrote = f"wrote {', '.join(str(path) for path in written)}"
    Console(soft_wrap=True).print(wrote, markup=False, highlight=False)


@dataclass(frozen=True)
class _Planned:
    """Plans for some samples, wherever they come from."""

    records: Sequence[SampleRecord]
    variants: Sequence[Variant]
    key: RunKey
    source: str


def _are_files(sources: Sequence[Path], faults: list[str]) -> bool | None:
    """Whether predictions files were given, or bundles; None with a fault."""
    absent = [str(path) for path in sources if not path.exists()]
    if absent:
        faults.append(f"{', '.join(absent)} does not exist; give a bundle's directory or predictions files")
        return None
    folders = [path for path in sources if path.is_dir()]
    if folders and len(folders) < len(sources):
        faults.append(f"{folders[0]} is a directory: give bundles or predictions files, not both at once")
        return None
    if len({path.resolve() for path in folders}) < len(folders):
        faults.append(f"{', '.join(map(str, folders))}: give each bundle once")
        return None
    return not folders


def _policies(text: str) -> list[PrunedKind]:
    named = comma_list("--policies", text, str, "autoprune,random,uniform,fixed")
    allowed = [policy.value for policy in PolicyName]
    unknown = [name for name in named if name not in allowed]
    if unknown:
        raise InputError(f"--policies: {', '.join(unknown)} is no policy; choose from {', '.join(allowed)}")
    return [PolicyName(name).value for name in dict.fromkeys(named)]


def _check_latency(latency_ms: float) -> None:
    if not latency_ms < 3000:
        raise InputError(f"--latency-ms is {latency_ms}; expected less than 3000, the length of a plan")


def _check_combination(
    of_files: bool | None, for_bundles: Mapping[str, bool], for_files: Mapping[str, bool]
) -> None:
    """Refuse options, here with whether they were given, that the other kind of source has no use for."""
    if of_files is None:
        return
    given = [option for option, there in (for_bundles if of_files else for_files).items() if there]
    if given:
        what = "a bundle, not predictions files" if of_files else "predictions files, not a bundle"
        raise InputError(f"{', '.join(given)} is for {what}")


def _plan_bundle(
    run: OpenRun, out: Path, ray: str | None, replicas: int, warm_up: int, console: Console
) -> _Planned:
    from eval_nuscenes import evaluation
    from eval_nuscenes.ray_runs import RayRun

    samples = run.split
    key = evaluation.RunKey(
        planned_by=f"bundle {', '.join(bundle.manifest.bundle_id for bundle in run.bundles.values())}",
        data_hash=samples.data_hash,
        variants=tuple(variant.name for variant in run.variants),
        command_source=samples.command_source,
        code=evaluation.code_hash(),
        machine=f"{evaluation.machine()}; {run.device}",
        versions=evaluation.versions(),
    )
    if ray is None:
        log = evaluation.PlanLog(out, key)
        _finish(
            evaluation.plan_samples(samples, run.variants, log, run.cameras, run.reduction, warm_up),
            samples,
            log,
            console,
        )
    else:
        with RayRun(ray, replicas, run.run.open, warm_up) as cluster:
            key = key.model_copy(update={"machine": cluster.machine})
            log = evaluation.PlanLog(out, key)
            _finish(cluster.plan(samples, log), samples, log, console)
    records = [log.records[token] for token in samples.tokens]
    _require_a_plan(records, run.variants[0].name, log.path)
    return _Planned(records, run.variants, key, f"bundle {', '.join(map(str, run.run.bundles))}")


def _require_a_plan(records: Sequence[SampleRecord], variant: str, path: Path) -> None:
    """Refuse to score a model whose every answer failed: standing still would pass for its plans.

    Raises:
        PlanError: with the first of the failures.
    """
    failures = [error for each in records if (error := each.plans[variant].error) is not None]
    if len(failures) == len(records):
        raise PlanError(
            f"{variant} has no plan on any of {len(records)} samples, so there is nothing to score; the "
            f"first because {failures[0]}. {path} has the others; does export's --decoder fit the model?"
        )


def _finish(planning: Iterable[SampleRecord], samples: NuScenesSplit, log: PlanLog, console: Console) -> None:
    """Plan what is left. A model that answers with no plan is told soon, not after hours."""
    unpruned, failed = log.key.variants[0], 0
    left = [token for token in samples.tokens if token not in log.records]
    if len(left) < len(samples):
        console.print(f"{len(samples) - len(left)} of {len(samples)} samples are done already")

    def kept() -> str:
        done = len(set(samples.tokens) & set(log.records))
        return f"{done} of {len(samples)} samples are kept; the same command goes on"

    with told_when_interrupted(kept):
        what = f"plan, {len(log.key.variants)} variants"
        for done, record in enumerate(_progress(planning, what, len(left)), start=1):
            error = record.plans[unpruned].error
            failed += error is not None
            if failed == done == HOPELESS:
                console.print(
                    f"{unpruned} has no plan on the first {done} samples: {error}", style="red", markup=False
                )


def _score_files(
    read: Sequence[Predictions], samples: NuScenesSplit, allow_missing: bool, console: Console
) -> _Planned:
    from eval_nuscenes import evaluation, predictions

    there = set(predictions.covered(read, samples.tokens, allow_missing))
    for each in read:
        console.print(escape(f"{each.path}: {len(each.waypoints)} plans, {each.read_as}, frame {each.frame}"))
    places = [index for index, token in enumerate(samples.tokens) if token in there]
    predictions.check_readings(read, samples, places)
    records = [
        predictions.sample_record(samples[index], read)
        for index in _progress(places, "take over plans", len(places))
    ]
    variants = predictions.prediction_variants(read)
    digest = hashlib.sha256("".join(each.sha256 for each in read).encode()).hexdigest()
    key = evaluation.RunKey(
        planned_by=f"predictions {digest}",
        data_hash=samples.data_hash,
        variants=tuple(variant.name for variant in variants),
        command_source="not known",
        code=evaluation.code_hash(),
        machine=evaluation.machine(),
        versions=evaluation.versions(),
    )
    files = ", ".join(f"{each.path.name} ({each.read_as}, frame {each.frame})" for each in read)
    return _Planned(records, variants, key, f"predictions {files}")


def _record(scene: str, samples: NuScenesSplit, planned: _Planned, variant: Variant, out: Path) -> list[Path]:
    from eval_nuscenes.recording import RecordedSample, write_mcap, write_rerun

    place = {token: index for index, token in enumerate(samples.tokens)}
    chosen = [samples[place[each.token]] for each in planned.records if each.scene == scene]
    plans = {each.token: each.plans[variant.name] for each in planned.records}
    views = [
        RecordedSample(sample, plans[sample.token], samples.drivable_area(sample))
        for sample in sorted(chosen, key=lambda sample: sample.stamp_s)
    ]
    if not views:
        raise InputError(f"--record {scene}: --limit or --allow-missing left none of its samples")
    paths = [out / f"{scene}.rrd", out / f"{scene}.mcap"]
    for path, write in zip(paths, (write_rerun, write_mcap), strict=True):
        write(path, _progress(views, f"record {path.name}", len(views)), variant.name)
    return paths


def _progress(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    if not total:
        yield from items
        return
    with progress_bar() as progress:
        yield from progress.track(items, description=what, total=total)
