"""`vla-autoprune evaluate`: what pruning costs and saves, over a split of nuScenes-format data."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

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

from vla_autoprune.cli import app
from vla_autoprune.cli.options import (
    BACKEND,
    THREADS,
    BackendName,
    CommandSource,
    PolicyName,
    comma_list,
    finite,
    require_directory,
)

if TYPE_CHECKING:
    from eval_nuscenes.summary import EvaluationSummary, Interval, VariantSummary

Item = TypeVar("Item")

TABLE_WIDTH = 130
"""Columns when the output is no terminal."""


@app.command()
def evaluate(
    bundle: Path = typer.Argument(metavar="BUNDLE", help="Directory that vla-autoprune export wrote."),
    data: Path = typer.Option(
        ..., "--data", metavar="ROOT", help="Data set in nuScenes format (its dataroot)."
    ),
    version: str = typer.Option("v1.0-synth", "--version", help="Folder of its tables, such as v1.0-mini."),
    split: str = typer.Option("val", "--split", help="A split of the data set, or all."),
    budgets: str | None = typer.Option(
        None, "--budgets", metavar="B,B,…", help="Budgets to run; all of the recipe's unless given."
    ),
    policies: str = typer.Option(
        "autoprune,random",
        "--policies",
        metavar="P,P,…",
        help="Ways to choose tokens at each budget: autoprune, random, uniform, fixed.",
    ),
    limit: int | None = typer.Option(
        None, "--limit", min=1, help="This many samples, spread over the split."
    ),
    out: Path = typer.Option(Path("out/evaluation"), "--out", metavar="DIR", help="Where the results go."),
    command_source: CommandSource = typer.Option(
        CommandSource.ROUTE, "--command-source", help="future is a label leak, for data without routes."
    ),
    backend: BackendName = BACKEND,
    threads: int | None = THREADS,
    warm_up: int = typer.Option(3, "--warm-up", min=0, help="Plans per variant before the first counts."),
) -> None:
    """Score a bundle's plans: unpruned, then AutoPrune and random tokens (or others) at each budget.

    Open-loop L2 and collisions by the protocols of UniAD, ST-P3 and VAD,
    beside constant velocity and the same model with grey images; visual
    tokens, work, latency and KV cache, measured side by side on each frame.
    Prints a table, writes results.json and report.html to DIR. Interrupt it
    whenever you like: the same command goes on where it stopped.

    The synthetic world: vla-autoprune evaluate out/bundle --data out/synth

    Two budgets, quickly: vla-autoprune evaluate out/bundle --data out/synth --budgets 0.4,0.25 --limit 40

    Real data: vla-autoprune evaluate out/bundle --data /data/nuscenes --version v1.0-mini --split mini_val
    --command-source future
    """
    from engines.backends import open_backend
    from eval_nuscenes import evaluation, report, summary
    from eval_nuscenes.nuscenes_reader import NuScenesSplit
    from vla_autoprune.bundle import load_bundle
    from vla_autoprune.recipe import published_work_fraction
    from vla_autoprune.runtime.planner import Planner

    require_directory("--out", out)
    named = comma_list("--policies", policies, PolicyName, "autoprune,random,uniform,fixed")
    kinds: list[evaluation.PrunedKind] = [policy.value for policy in named]
    chosen = None if budgets is None else comma_list("--budgets", budgets, finite, "0.6,0.4,0.25")
    console = Console(soft_wrap=True)
    opened = load_bundle(bundle)
    recipe = opened.recipe
    wanted = tuple(sorted(set(chosen or recipe.budgets), reverse=True))
    for budget in wanted:
        recipe.buckets_of(budget)
    samples = NuScenesSplit(data, version, split, command_source.value, limit)
    samples.check_images(recipe.layout.cameras)
    if command_source is CommandSource.FUTURE:
        console.print(
            "label leak: commands come from the true future; figures are optimistic", style="yellow"
        )

    engine = open_backend(backend.value, opened, threads=threads)
    planner = Planner(opened, engine)
    variants = evaluation.planner_variants(planner.variant, wanted, kinds)
    key = evaluation.RunKey(
        bundle_id=opened.manifest.bundle_id,
        data_hash=samples.data_hash,
        variants=tuple(variant.name for variant in variants),
        command_source=command_source.value,
        code=evaluation.code_hash(),
        machine=f"{evaluation.machine()}; {engine.device}",
        versions=evaluation.versions(),
    )
    log = evaluation.PlanLog(out, key)
    left = [token for token in samples.tokens if token not in log.records]
    if len(left) < len(samples):
        console.print(f"{len(samples) - len(left)} of {len(samples)} samples are done already")
    run = evaluation.plan_samples(samples, variants, log, recipe.layout.cameras, warm_up)
    try:
        for _ in _progress(run, f"plan, {len(variants)} variants", len(left)):
            pass
    except KeyboardInterrupt:
        done = len(set(samples.tokens) & set(log.records))
        console.print(f"{done} of {len(samples)} samples are kept; the same command goes on", style="yellow")
        raise

    records, scored, ego_sources = [], [], Counter[str]()
    for sample in _progress(samples, "score", len(samples)):
        records.append(log.records[sample.token])
        scored.append(summary.score_sample(sample, records[-1]))
        ego_sources[sample.ego_source] += 1
    conditions = summary.Conditions(
        key=key,
        command=shlex.join(["vla-autoprune", *sys.argv[1:]]),
        data_root=str(data),
        version=version,
        split=split,
        samples=len(records),
        scenes=len({record.scene for record in records}),
        ego_sources=dict(ego_sources),
        warm_up=warm_up,
    )
    result = summary.summarise(
        variants,
        records,
        scored,
        conditions,
        lambda bucket: published_work_fraction(recipe, recipe.bucket(bucket)),
    )
    summary.write_summary(out / "results.json", result)
    pruned = report.pruned_example(variants)
    assert pruned is not None  # there is at least one budget and one policy
    report.write_report(
        out / "report.html",
        result,
        recipe,
        report.scene_views(samples, records, scored, pruned.name),
        report.token_views(samples, records, pruned, recipe.layout.cameras),
    )
    engine.close()
    _print(result)
    Console(soft_wrap=True).print(f"wrote {out / 'results.json'} and {out / 'report.html'}", highlight=False)


def _progress(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield from progress.track(items, description=what, total=total)


def _print(result: EvaluationSummary) -> None:
    from eval_nuscenes.report import headlines

    protocols = list(result.variants[0].planning)
    conditions = result.conditions
    table = Table(
        title=f"{conditions.split}: {conditions.samples} samples of {conditions.scenes} scenes",
        title_justify="left",
        header_style="bold",
        pad_edge=False,
        show_lines=True,
    )
    table.add_column("variant", no_wrap=True)
    for name in ("tokens", "work", "prefill ms\np50/p90", "total ms\np50/p90", "KV\nMiB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("protocol", no_wrap=True)
    table.add_column("L2 m\n1/2/3 s  mean", justify="right", no_wrap=True)
    table.add_column("collision %\n1/2/3 s  mean", justify="right", no_wrap=True)
    for variant in result.variants:
        plannings = [variant.planning[protocol] for protocol in protocols]
        table.add_row(
            variant.name,
            *_cost_cells(variant),
            "\n".join(protocols),
            "\n".join(_horizons(planning.l2_m) for planning in plannings),
            "\n".join(_horizons(planning.collision, 100) for planning in plannings),
        )
    console = Console()
    if console.width < TABLE_WIDTH and not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    console.print(table)
    console.print(
        "tokens: mean visual tokens into the layers. work: prefill FLOPs over unpruned. "
        "uniad reports the step at 1/2/3 s over all samples, "
        "stp3 and vad the mean of the steps up to there over samples with a whole future.",
        style="dim",
    )
    for variant in result.variants:
        if variant.failed_plans:
            console.print(
                f"{variant.name}: {variant.failed_plans} of {conditions.samples} plans failed and are scored "
                f"standing still, the first because {variant.first_failure}",
                style="red",
                highlight=False,
            )
    for sentence in headlines(result):
        console.print(f"- {sentence}", highlight=False)


def _cost_cells(variant: VariantSummary) -> Sequence[str]:
    cost = variant.cost
    if cost is None:
        return ("-",) * 5
    return (
        f"{cost.visual_tokens_into_layers:.0f}",
        f"{cost.work_fraction:.2f}",
        f"{cost.prefill_ms.p50:.1f}/{cost.prefill_ms.p90:.1f}",
        f"{cost.total_ms.p50:.1f}/{cost.total_ms.p90:.1f}",
        f"{cost.kv_mib:.2f}",
    )


def _horizons(values: Sequence[Interval], factor: float = 1.0) -> str:
    single = "/".join(f"{value.mean * factor:.2f}" for value in values[:3])
    return f"{single}  {values[3].mean * factor:.2f}"
