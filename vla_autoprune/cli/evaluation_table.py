"""What `vla-autoprune evaluate` prints: coverage, a table, and what may be said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

if TYPE_CHECKING:
    from eval_nuscenes.bootstrap import Interval
    from eval_nuscenes.summary import CameraTokens, Cost, EvaluationSummary, Planning, VariantSummary

TABLE_WIDTH = 106
"""Columns when the output is no terminal, or more where the table has need of them."""
WIDEST = 1000
_COSTS = ("tokens", "work", "prefill ms\np50/p90", "total ms\np50/p90", "KV\nMiB")


def print_evaluation(result: EvaluationSummary) -> None:
    """Print a finished evaluation; its first line says what it covers."""
    from eval_nuscenes.headlines import headlines

    conditions = result.conditions
    console, table = Console(), _planning_table(result)
    if not console.is_terminal:
        needed = Measurement.get(Console(width=WIDEST), Console(width=WIDEST).options, table).maximum
        console = Console(width=max(console.width, TABLE_WIDTH, needed))
    console.print(f"{conditions.split}: {conditions.coverage}", style="bold", highlight=False)
    console.print(table)
    console.print(
        f"{_reporting(result.protocols)} n: samples that the protocol divides by; – where there is none. "
        "late: the mean if each plan is carried out only after its latency.",
        style="dim",
        highlight=False,
    )
    if any(variant.cost is not None for variant in result.variants):
        console.print(_cost_table(result))
        console.print(
            "tokens: mean visual tokens into the layers. work: prefill FLOPs over unpruned.", style="dim"
        )
    if any(_is_pruned(variant) for variant in result.variants):
        console.print(_camera_table(result))
        floor = ", and after ≥ the recipe's floor" if result.has_camera_floors else ""
        console.print(
            "Visual tokens of each camera that enter the last stage: mean, then least to most of a frame"
            f"{floor}.",
            style="dim",
        )
    for protocol in result.protocols:
        edges = [
            f"{variant.name} {_horizons(found, None, 100)}"
            for variant in result.variants
            if (found := variant.planning[protocol].intersection) is not None
        ]
        if edges:
            said = f"{protocol}, road edges % at 1/2/3 s and mean: {'; '.join(edges)}"
            console.print(said, highlight=False)
    for variant in result.variants:
        if variant.failed_plans:
            console.print(
                f"{variant.name}: {variant.failed_plans} of {conditions.samples} plans failed and are scored "
                f"standing still, the first because {variant.first_failure}",
                style="red",
                markup=False,
                highlight=False,
            )
    for sentence in headlines(result):
        console.print(f"- {sentence}", highlight=False)


def _reporting(protocols: Sequence[str]) -> str:
    """What the figures at 1, 2 and 3 s are, which differs between protocols."""
    from eval_nuscenes.metrics import protocol_named

    alike: dict[str, list[str]] = {}
    for name in protocols:
        alike.setdefault(protocol_named(name).reports, []).append(name)
    return "; ".join(f"{', '.join(names)}: {reports}" for reports, names in alike.items()) + "."


def _planning_table(result: EvaluationSummary) -> Table:
    # On a narrow terminal cells fold, so that no figure is cut off.
    table = Table(header_style="bold", pad_edge=False)
    table.add_column("variant", overflow="fold")
    table.add_column("protocol", overflow="fold")
    for name in ("n", "L2 m\n1/2/3 s  mean → late", "collision %\n1/2/3 s  mean → late"):
        table.add_column(name, justify="right", overflow="fold")
    for variant in result.variants:
        for protocol, each in variant.planning.items():
            table.add_row(
                variant.name if protocol == result.protocols[0] else "",
                protocol,
                _counts(each),
                _horizons(each.l2_m, each.late.l2_m if each.late else None),
                _horizons(each.collision, each.late.collision if each.late else None, 100),
                end_section=protocol == result.protocols[-1],
            )
    return table


def _cost_table(result: EvaluationSummary) -> Table:
    table = Table(header_style="bold", pad_edge=False)
    table.add_column("variant", overflow="fold")
    for name in _COSTS:
        table.add_column(name, justify="right", no_wrap=True)
    for variant in result.variants:
        if variant.cost is not None:
            table.add_row(variant.name, *_cost_cells(variant.cost))
    return table


def _is_pruned(variant: VariantSummary) -> bool:
    return variant.budget is not None and bool(variant.cameras)


def _camera_table(result: EvaluationSummary) -> Table:
    """Visual tokens in the last stage, by camera."""
    rows = [variant for variant in result.variants if _is_pruned(variant)]
    cameras = list(dict.fromkeys(camera for row in rows for camera in row.cameras))
    table = Table(header_style="bold", pad_edge=False)
    table.add_column("variant", overflow="fold")
    for camera in cameras:
        table.add_column(camera.removeprefix("CAM_").replace("_", "\n"), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.name, *(_camera_cell(row.cameras.get(camera)) for camera in cameras))
    return table


def _camera_cell(left: CameraTokens | None) -> str:
    if left is None:
        return ""
    floor = f" ≥{left.floor}" if left.floor else ""
    return f"{left.mean:.1f} {left.least}-{left.most}{floor}"


def _cost_cells(cost: Cost) -> Sequence[str]:
    return (
        f"{cost.visual_tokens_into_layers:.0f}",
        f"{cost.work_fraction:.2f}",
        f"{cost.prefill_ms.p50:.1f}/{cost.prefill_ms.p90:.1f}",
        f"{cost.total_ms.p50:.1f}/{cost.total_ms.p90:.1f}",
        f"{cost.kv_mib:.2f}",
    )


def _counts(planning: Planning) -> str:
    return "/".join(str(count) for count in dict.fromkeys(planning.counted))


def _horizons(values: Sequence[Interval], late: Sequence[Interval] | None, factor: float = 1.0) -> str:
    single = "/".join(_number(value, factor) for value in values[:-1])
    arrow = "" if late is None else f" → {_number(late[-1], factor)}"
    return f"{single}  {_number(values[-1], factor)}{arrow}"


def _number(value: Interval, factor: float = 1.0) -> str:
    return "–" if value.mean is None else f"{value.mean * factor:.2f}"
