"""`vla-autoprune estimate`: what pruning will buy, before anything is exported."""

from __future__ import annotations

import dataclasses
import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from vla_autoprune.cli import app
from vla_autoprune.cli.options import comma_list, finite
from vla_autoprune.cli.tables import figure_table, print_whole
from vla_autoprune.errors import InputError
from vla_autoprune.files import write_whole

if TYPE_CHECKING:
    from vla_autoprune.profiling.estimate import BucketEstimate, Precision, Range
    from vla_autoprune.recipe import PruningRecipe


class DeviceName(str, Enum):
    """Published devices, this machine's CPU, and whatever a profile was measured on."""

    ORIN = "orin"
    THOR = "thor"
    RTX4090 = "rtx4090"
    CPU = "cpu"
    MEASURED = "measured"


class PrecisionName(str, Enum):
    """Of the weights; int4 is multiplied in fp16."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    FP8 = "fp8"
    INT8 = "int8"
    FP4 = "fp4"
    INT4 = "int4"


@app.command()
def estimate(
    model: str = typer.Option(
        ..., "--model", help="llava-1.5-7b, qwen2.5-vl-3b, …, or a JSON file of sizes."
    ),
    device: DeviceName = typer.Option(..., "--device", help="Published ceilings, this CPU, or --profile's."),
    recipe: Path | None = typer.Option(
        None, "--recipe", help="Recipe or bundle whose budgets and pruning points are taken."
    ),
    budgets: str = typer.Option("0.6,0.4,0.25", "--budgets", help="Without --recipe: shares with commas."),
    profile: Path | None = typer.Option(
        None, "--profile", metavar="FILE", help="Profile measured on the device: calibrates, tells the error."
    ),
    precision: PrecisionName | None = typer.Option(None, "--precision", help="fp16; on a CPU fp32."),
    cameras: int = typer.Option(6, "--cameras", min=1, help="Images of a frame."),
    text_tokens: int = typer.Option(120, "--text-tokens", min=2, help="Prompt tokens beside them."),
    answer_tokens: int = typer.Option(12, "--answer-tokens", min=1, help="Tokens of an answer."),
    threads: int | None = typer.Option(None, "--threads", min=1, help="With cpu: threads of the ceilings."),
    json_file: Path | None = typer.Option(None, "--json", metavar="FILE", help="Write every stage."),
) -> None:
    """Count work, traffic and KV cache of a full-size model, and give a range of latencies.

    Ranges are of vision, prefill and decoding; preprocessing and ROS come on
    top. For published devices they span efficiencies others have reached
    (vla_autoprune/profiling/devices.json names them). With a profile of the
    device itself they are calibrated on it, and the error on buckets that took
    no part is stated.

    Example: vla-autoprune estimate --model qwen2.5-vl-3b --device orin --answer-tokens 10
    """
    from vla_autoprune.profiling.estimate import estimate as run_estimate
    from vla_autoprune.profiling.estimate import model_named, recipe_for

    sizes = model_named(model)
    like = _recipe(recipe) if recipe is not None else None
    shares = comma_list("--budgets", budgets, finite, "0.6,0.4,0.25")
    full = recipe_for(sizes, model, like, cameras, text_tokens, answer_tokens, shares)
    seconds, chosen, lines = _range(device, precision.value if precision else None, profile, threads)
    found = run_estimate(full, sizes, cameras, chosen, seconds)
    console = Console(soft_wrap=True)
    layout = full.layout
    console.print(
        f"{model} ({chosen}): {cameras} cameras, {layout.visual_tokens} visual and {layout.text_tokens} text "
        f"tokens, answers of {answer_tokens}; tokens dropped after layers "
        f"{', '.join(map(str, full.pruning_points))}\nsizes: {sizes.source}",
        highlight=False,
    )
    for line in lines:
        console.print(line, highlight=False)
    print_whole(_bucket_table(found), console)
    print_whole(_stage_table(found[-1]), console)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(json_file, (json.dumps(_document(found, lines), indent=1) + "\n").encode())
        console.print(f"wrote {json_file}", markup=False, highlight=False)


def _recipe(path: Path) -> PruningRecipe:
    from vla_autoprune.bundle import RECIPE
    from vla_autoprune.recipe import read_recipe

    return read_recipe(path / RECIPE if path.is_dir() else path)


def _range(
    device: DeviceName, asked: Precision | None, profile: Path | None, threads: int | None
) -> tuple[Range, Precision, list[str]]:
    """The device's range for work, in which precision, and where it is from, in sentences."""
    from vla_autoprune.profiling.ceilings import measure_host
    from vla_autoprune.profiling.document import read_profile
    from vla_autoprune.profiling.estimate import (
        calibrate,
        devices,
        host_device,
        measured_range,
        published_range,
    )

    if device is DeviceName.MEASURED and profile is None:
        raise InputError("--device measured needs the --profile that was measured on it")
    if device not in (DeviceName.CPU, DeviceName.MEASURED) and profile is not None:
        raise InputError(
            f"--device {device.value} has published ceilings; with a --profile measured there, "
            "take --device measured"
        )
    if profile is not None:
        measured = read_profile(profile)
        own = measured.conditions.precision
        if asked not in (None, own):
            raise InputError(
                f"--precision {asked}: {profile} was measured in {own}, and says nothing of others"
            )
        calibration = calibrate(measured)
        ceiling = measured.ceiling
        return (
            measured_range(calibration, ceiling),
            own,
            [
                f"ceilings: {ceiling.source}",
                f"calibrated on {calibration.source}; error on prefill and decoding of budgets left out up "
                f"to {calibration.error:.0%}",
                "stages larger than those profiled begin at the ceilings; much smaller ones may take longer",
                "vision: taken to be as efficient as the prefill; the error does not cover it",
            ],
        )
    on_cpu = device is DeviceName.CPU
    known = host_device(measure_host(threads)) if on_cpu else devices()[device.value]
    precision: Precision = asked or ("fp32" if on_cpu else "fp16")
    return (
        published_range(known, precision),
        precision,
        [
            f"device: {known.name}; ceilings: {known.source}",
            f"efficiency: {known.efficiency_source}",
            "not calibrated: no measurement of this device was given, so the error is not known",
        ],
    )


def _bucket_table(found: tuple[BucketEstimate, ...]) -> Table:
    columns = ("tokens", "TFLOP", "GB", "KV MiB", "vision", "prefill", "decode", "sum", "speed-up")
    table = figure_table("milliseconds, from … to", columns, "bucket")
    full = found[0].ms()
    for row in found:
        flops, moved = (sum(getattr(stage.work, name) for stage in row.stages) for name in ("flops", "bytes"))
        into = row.bucket.visual_tokens_into_layers
        low, high = row.ms()
        table.add_row(
            row.bucket.name,
            f"{sum(into) / len(into):.0f}",
            _few(flops / 1e12),
            _few(moved / 1e9),
            _few(row.kv_mib),
            *(_span(row.ms(phase)) for phase in ("vision", "prefill", "decode")),
            _span((low, high)),
            _span((min(full[0] / low, full[1] / high), max(full[0] / low, full[1] / high)), 2),
        )
    return table


def _stage_table(row: BucketEstimate) -> Table:
    table = figure_table(f"stages of {row.bucket.name}", ("GFLOP", "MB", "KV MiB", "ms"), "stage")
    for stage in row.stages:
        table.add_row(
            stage.name,
            _few(stage.work.flops / 1e9),
            _few(stage.work.bytes / 1e6),
            _few(stage.kv_mib) if stage.kv_mib else "",
            _span(stage.ms, 2),
        )
    return table


def _few(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _span(values: tuple[float, float], digits: int = 0) -> str:
    low, high = values
    if high >= 1e5:
        return f"{low / 1e3:.0f} … {high / 1e3:.0f} s"
    places = digits or (1 if high < 10 else 0)
    return f"{low:.{places}f} … {high:.{places}f}"


def _document(found: tuple[BucketEstimate, ...], lines: list[str]) -> dict[str, object]:
    return {
        "sources": lines,
        "buckets": [
            {
                "bucket": row.bucket.model_dump(mode="json"),
                "kv_mib": row.kv_mib,
                "ms": row.ms(),
                "stages": [
                    {**dataclasses.asdict(stage), "work": stage.work.model_dump()} for stage in row.stages
                ],
            }
            for row in found
        ],
    }
