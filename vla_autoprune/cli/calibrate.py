"""`vla-autoprune calibrate`: fit the mapping from complexity to slope on data, and write a recipe."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from vla_autoprune.cli import app
from vla_autoprune.cli.options import (
    BACKEND,
    DECODER,
    MODEL,
    PROMPT,
    THREADS,
    BackendName,
    CommandSource,
    PrecisionName,
    camera_floors,
    comma_list,
    finite,
    gathered,
    refuse,
    require_file,
    told_when_interrupted,
)
from vla_autoprune.errors import InputError, RecipeError
from vla_autoprune.files import write_whole
from vla_autoprune.progress import progress_bar

if TYPE_CHECKING:
    from eval_nuscenes.nuscenes_reader import NuScenesSplit
    from vla_autoprune.models.adapter import StageModel
    from vla_autoprune.models.checkpoint import Vla
    from vla_autoprune.models.preprocess import Preprocessing
    from vla_autoprune.pruning.calibration import MappingFit, SlopeMapping
    from vla_autoprune.recipe import ModelShape, PromptLayout, PruningRecipe
    from vla_autoprune.runtime.slope_losses import KnownDrive, SlopeLosses


class Reduction(str, Enum):
    """How scores over heads and text rows become one."""

    MEAN = "mean"
    MAX = "max"


class Encoder(str, Enum):
    """The vision tower's own ranking of patches."""

    CLS = "cls"
    RECEIVED = "received"


@app.command()
def calibrate(
    data: Path = typer.Option(
        ..., "--data", metavar="ROOT", help="Data set in nuScenes format (its dataroot)."
    ),
    version: str = typer.Option("v1.0-synth", "--version", help="Name of the folder with the tables."),
    split: str = typer.Option("calibration", "--split", help="Split to fit on; never the one you report."),
    out: Path = typer.Option(Path("out/recipe.json"), "--out", metavar="FILE", help="Recipe to write."),
    model: str | None = MODEL,
    prompt: Path | None = PROMPT,
    decoder: str | None = DECODER,
    budgets: str = typer.Option(
        "0.6,0.4,0.25", "--budgets", metavar="B,B,…", help="Mean shares of visual tokens in the decoder."
    ),
    slopes: str | None = typer.Option(
        None, "--slopes", metavar="K,K,…", help="Slopes of each budget, from 0 on; default: 0,0.2,0.4."
    ),
    points: str | None = typer.Option(
        None,
        "--points",
        metavar="L,L,…",
        help="Drop tokens after these decoder layers; default: spread over the depth.",
    ),
    reduction: Reduction = typer.Option(
        Reduction.MEAN, "--reduction", help="Score over heads and text rows."
    ),
    encoder_weight: float = typer.Option(
        0.0,
        "--encoder-weight",
        min=0,
        max=1000,
        help="Weight of the vision tower's own score at the first point.",
    ),
    encoder: Encoder = typer.Option(
        Encoder.CLS,
        "--encoder",
        help="That score: attention of the \\[CLS] row, or attention that patches receive, which every tower "
        "has.",
    ),
    encoder_layer: int | None = typer.Option(
        None, "--encoder-layer", min=0, help="Tower layer it is read from; default: the features' layer."
    ),
    floors: str | None = typer.Option(
        None,
        "--camera-floors",
        metavar="CAMERA=N,…",
        help="Visual tokens of these cameras that survive to the last stage, at least.",
    ),
    recovery: bool = typer.Option(False, "--recovery", help="Merge part of the dropped tokens."),
    keep_mapping: bool = typer.Option(
        False, "--keep-mapping", help="Write the fitted mapping even where it does not help."
    ),
    command_source: CommandSource = typer.Option(
        CommandSource.ROUTE, "--command-source", help="future is a label leak, for data without routes."
    ),
    limit: int | None = typer.Option(200, "--limit", min=1, help="Frames to use, spread over the split."),
    precision: PrecisionName = typer.Option(
        PrecisionName.FP32,
        "--precision",
        help="Of the bundle that is measured; as you will export it. bf16 runs on torch and torch-cuda.",
    ),
    backend: BackendName = BACKEND,
    threads: int | None = THREADS,
) -> None:
    """Choose from data which frames keep their tokens longer, and write the pruning recipe.

    Every frame is planned in every bucket; per budget, the mapping from
    complexity to slope with the smallest distance to the expert is fitted, its
    sign included, and judged on held-out scenes against one fixed slope and
    shuffled complexities. A budget where it does not beat both gets the fixed
    slope. The measurements go beside the recipe.

    Example, after vla-autoprune synth --scenes 40: vla-autoprune calibrate --data out/synth

    A checkpoint of billions of weights, on a GPU: vla-autoprune calibrate --data ROOT --model org/name
    --prompt prompt.json --decoder waypoints --precision bf16 --backend torch-cuda
    """
    from engines.backends import require_backend
    from eval_nuscenes.nuscenes_reader import NuScenesSplit
    from vla_autoprune.models.checkpoint import open_model
    from vla_autoprune.pruning.calibration import LEAST_CLUSTERS
    from vla_autoprune.recipe import Scorer, write_recipe
    from vla_autoprune.recipe_building import build_recipe

    faults: list[str] = []
    with gathered(faults):
        require_file("--out", out)
    with gathered(faults):
        shares = comma_list("--budgets", budgets, _share, "0.6,0.4,0.25", "numbers between 0 and 1")
    with gathered(faults):
        steps = _slopes(slopes)
    with gathered(faults):
        after = None if points is None else comma_list("--points", points, int, "1,3,5", "layers")
    with gathered(faults):
        kept_first = {} if floors is None else camera_floors(floors)
    with gathered(faults):
        require_backend(backend.value, precision.value)
    with gathered(faults):
        opened = open_model(model, prompt, decoder, stream=None)
    refuse(faults)
    console = Console(soft_wrap=True)
    vla, adapter = opened.vla, opened.adapter()
    layout = vla.prompt.layout
    with console.status("reading the weights"):
        shape = adapter.shape(opened.name)
    options: dict[str, Any] = {
        "budgets": shares,
        "pruning_points": after,
        "scorer": Scorer(
            reduction=reduction.value,
            encoder_weight=encoder_weight,
            encoder=encoder.value,
            encoder_layer=encoder_layer,
        ),
        "camera_floors": kept_first,
        "recovery": recovery,
        "decode_length": vla.codec.length,
    }
    _check_recipe_options(shape, layout, steps, options)
    adapter.tower(layout, options["scorer"])  # refuses a score that this tower does not give
    provisional = build_recipe(shape, layout, slopes=steps, **options)

    samples = NuScenesSplit(data, version, split, command_source.value, limit)
    if len(samples.scene_names) < LEAST_CLUSTERS:
        raise InputError(
            f"split {split} of {data} has {len(samples.scene_names)} scenes, a mapping needs at least "
            f"{LEAST_CLUSTERS}; vla-autoprune synth --scenes 40 makes enough"
        )
    samples.check_images(layout.cameras)
    with told_when_interrupted(lambda: f"{out} is as it was; the same command starts from the beginning"):
        measured = _measure(vla, adapter, provisional, samples, precision, backend, threads)
    there = len(set(measured.scenes))
    if there < LEAST_CLUSTERS:
        raise InputError(
            f"split {split} of {data}: {len(measured.tokens)} frames of {there} scenes have a plan in every "
            f"bucket, a mapping needs {LEAST_CLUSTERS} scenes; {measured.left_out}"
        )
    try:
        fits = {budget: _fit(measured, provisional, budget) for budget in provisional.budgets}
    except ValueError as error:
        raise InputError(f"split {split} of {data}: {error}; synth --scenes makes more") from error
    mappings = {budget: chosen_mapping(fit, keep_mapping) for budget, fit in fits.items()}
    recipe = build_recipe(shape, layout, mappings=mappings, **options)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_recipe(recipe, out)
    record = out.with_suffix(".calibration.json")
    planned_on = {"backend": backend.value, "precision": precision.value}
    _write_record(record, measured, planned_on, fits, mappings, samples.data_hash)
    _print(console, measured, fits, mappings)
    console.print(
        f"wrote {out} and the measurements, {record}; look at it with: vla-autoprune recipe show {out}",
        markup=False,
    )


def _share(text: str) -> float:
    value = finite(text)
    if not 0 < value < 1:
        raise ValueError(text)
    return value


def _slopes(text: str | None) -> list[float]:
    from vla_autoprune.recipe_building import DEFAULT_SLOPES

    if text is None:
        return list(DEFAULT_SLOPES)
    values = sorted(comma_list("--slopes", text, finite, "0,0.2,0.4", "numbers from 0 on"))
    if values[0] < 0 or len(set(values)) < len(values):
        raise InputError(f"--slopes is {text!r}; expected different numbers from 0 on, like 0,0.2,0.4")
    return values


def _check_recipe_options(
    shape: ModelShape, layout: PromptLayout, slopes: list[float], options: dict[str, Any]
) -> None:
    """Refuse points and cameras that this model has not, and budgets that are out of reach, all at once.

    Raises:
        InputError: naming the options.
    """
    from vla_autoprune.pruning.schedule import stage_lengths
    from vla_autoprune.recipe_building import build_recipe

    if options["pruning_points"] is not None:
        try:
            stage_lengths(shape.layers, options["pruning_points"])
        except ValueError as error:
            raise InputError(f"--points: {error}") from error
    try:
        build_recipe(shape, layout, slopes=slopes, **{**options, "budgets": []})
    except RecipeError as error:
        raise InputError(f"--camera-floors: {error}") from error
    faults: list[str] = []
    for budget in options["budgets"]:
        with gathered(faults):
            build_recipe(shape, layout, slopes=slopes, **{**options, "budgets": [budget]})
    if not faults:
        with gathered(faults):
            build_recipe(shape, layout, slopes=slopes, **options)
    refuse([f"--budgets: {fault}" for fault in faults])


def _measure(
    vla: Vla,
    adapter: StageModel,
    recipe: PruningRecipe,
    samples: NuScenesSplit,
    precision: PrecisionName,
    backend: BackendName,
    threads: int | None,
) -> SlopeLosses:
    """Plan every sample in every bucket, with a bundle that lives as long as this takes."""
    from engines.backends import open_backend
    from vla_autoprune.export.export import export_bundle, text_files
    from vla_autoprune.runtime.planner import Planner
    from vla_autoprune.runtime.slope_losses import measure_slopes

    with tempfile.TemporaryDirectory() as folder, progress_bar() as progress:
        _require_room(Path(folder), vla, precision)
        exporting = progress.add_task("exporting", total=None)
        bundle = export_bundle(
            adapter,
            recipe,
            Path(folder) / "bundle",
            text_files(vla),
            precision=precision.value,
            progress=lambda _, done, total: progress.update(exporting, completed=done, total=total),
        )
        opened = open_backend(backend.value, bundle, threads=threads)
        planning = progress.add_task(f"planning in {len(recipe.buckets)} buckets", total=len(samples))
        try:
            measured = measure_slopes(
                Planner(bundle, opened),
                _drives(samples, vla.preprocessing),
                lambda done: progress.update(planning, completed=done),
            )
        finally:
            opened.close()
        progress.update(planning, completed=len(samples))
    return measured


def _require_room(folder: Path, vla: Vla, precision: PrecisionName) -> None:
    """Refuse a place for the bundle that is too small, before hours of export.

    Raises:
        InputError: with what it takes, and how to name another place.
    """
    from vla_autoprune.contract import COMPUTED_IN, ITEM_BYTES

    words = vla.model.get_input_embeddings().weight.numel()  # a table of float32 beside the weights
    weights = sum(weight.numel() for weight in vla.model.parameters())
    needed = words * ITEM_BYTES["float32"] + weights * ITEM_BYTES[COMPUTED_IN[precision.value]]
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"the bundle to measure takes {needed / 2**30:.1f} GiB for a while, {folder.parent} has "
            f"{free / 2**30:.1f}; name a larger place in the environment variable TMPDIR"
        )


def _fit(measured: SlopeLosses, recipe: PruningRecipe, budget: float) -> MappingFit:
    from vla_autoprune.pruning.calibration import fit_mapping

    buckets = recipe.buckets_of(budget)
    return fit_mapping(
        measured.complexities,
        measured.losses[budget],
        [bucket.slope for bucket in buckets],
        [bucket.work_fraction for bucket in buckets],
        measured.scenes,
    )


def chosen_mapping(fit: MappingFit, keep: bool = False) -> SlopeMapping:
    """The mapping that goes into the recipe: the fitted one if it helps or is to be kept, else one slope."""
    from vla_autoprune.pruning.calibration import SlopeMapping

    if fit.helps or keep:
        return fit.mapping.without_empty_intervals()
    slope = fit.mapping.fixed_slope
    return SlopeMapping(edges=(), slopes=(slope,), fixed_slope=slope)


def _drives(samples: NuScenesSplit, preprocessing: Preprocessing) -> Iterator[KnownDrive]:
    from vla_autoprune.runtime.slope_losses import KnownDrive

    for sample in samples:
        frame = sample.frame(preprocessing.cameras, preprocessing.reduction)
        yield KnownDrive(frame, sample.scene, sample.future_in_ego, sample.future_exists)


def _write_record(
    path: Path,
    measured: SlopeLosses,
    planned_on: dict[str, str],
    fits: dict[float, MappingFit],
    mappings: dict[float, SlopeMapping],
    data_hash: str,
) -> None:
    document = {
        "data_sha256": data_hash,
        "loss": "mean distance to the expert's waypoints, metres",
        "planned_on": planned_on,
        "frames_without_future": measured.without_future,
        "frames_without_plan": measured.without_plan,
        "no_plan_in": dict(measured.no_plan_in),
        "fits": {f"{budget:g}": dataclasses.asdict(fit) for budget, fit in fits.items()},
        "in_recipe": {f"{budget:g}": dataclasses.asdict(mapping) for budget, mapping in mappings.items()},
        "frames": [
            {
                "token": token,
                "scene": scene,
                "complexity_bits": round(bits, 6),
                "unpruned": round(whole, 4),
                "losses": {
                    f"{budget:g}": losses[index].round(4).tolist()
                    for budget, losses in measured.losses.items()
                },
            }
            for index, (token, scene, bits, whole) in enumerate(
                zip(
                    measured.tokens,
                    measured.scenes,
                    measured.complexities.tolist(),
                    measured.unpruned.tolist(),
                    strict=True,
                )
            )
        ],
    }
    write_whole(path, (json.dumps(document, indent=1) + "\n").encode())


def _print(
    console: Console,
    measured: SlopeLosses,
    fits: dict[float, MappingFit],
    mappings: dict[float, SlopeMapping],
) -> None:
    bits = measured.complexities
    console.print(
        f"{len(bits)} frames of {len(set(measured.scenes))} scenes ({measured.left_out}); "
        f"complexity {bits.mean():.3f} ± {bits.std():.3f} bits; "
        f"distance to the expert without pruning {measured.unpruned.mean():.3f} m"
    )
    table = Table("budget", "slopes by rising complexity", "edges, bits", title_justify="left")
    table.title = "held-out distance to the expert, m (mean work)"
    for column in ("adaptive", "fixed", "shuffled"):
        table.add_column(column, justify="right")
    for budget, fit in fits.items():
        losses = (fit.adaptive_loss, fit.fixed_loss, fit.shuffled_loss)
        table.add_row(
            f"{budget:.0%}",
            ", ".join(f"{slope:g}" for slope in fit.mapping.slopes),
            ", ".join(f"{edge:.3f}" for edge in fit.mapping.edges),
            *(f"{loss:.3f} ({work:.2%})" for loss, work in zip(losses, fit.mean_work, strict=True)),
        )
    console.print(table)
    for budget, fit in fits.items():
        console.print(f"{budget:.0%}, at equal mean work: {fit.verdict}", highlight=False)
        console.print(f"  {_told(fit, mappings[budget])}", highlight=False)


def _told(fit: MappingFit, mapping: SlopeMapping) -> str:
    """Which mapping the recipe takes, and why."""
    if len(mapping.slopes) == 1:
        hint = "" if mapping == fit.mapping else "; --keep-mapping keeps the fit"
        return f"the recipe takes slope {mapping.fixed_slope:g} for every frame{hint}"
    return "the recipe takes the fitted mapping" + ("" if fit.helps else " all the same (--keep-mapping)")
