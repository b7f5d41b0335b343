"""`vla-autoprune export`: a model and a recipe become a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape

from vla_autoprune.cli import app
from vla_autoprune.cli.options import (
    DECODER,
    MODEL,
    PROMPT,
    PrecisionName,
    TargetName,
    require_directory,
    told_when_interrupted,
)
from vla_autoprune.errors import BundleError, InputError, RecipeError
from vla_autoprune.progress import progress_bar

if TYPE_CHECKING:
    from engines.lint import LintReport
    from engines.parity import ParityReport
    from engines.stage_parity import StageParityReport
    from vla_autoprune.bundle import Bundle
    from vla_autoprune.contract import Precision
    from vla_autoprune.models.adapter import StageModel
    from vla_autoprune.models.checkpoint import Opened
    from vla_autoprune.recipe import PruningRecipe


class Opset(str, Enum):
    """The ONNX operator sets that bundles come in."""

    DECOMPOSED = "18"
    CURRENT = "23"


class WeightsPlace(str, Enum):
    """Where a checkpoint's weights are during the export."""

    STREAM = "stream"
    MEMORY = "memory"


@app.command()
def export(
    out: Path = typer.Argument(..., metavar="BUNDLE", help="Directory to make."),
    recipe: Path | None = typer.Option(
        None,
        "--recipe",
        metavar="FILE",
        help="Recipe from calibrate; default: the model's recipe.json, else the published mapping.",
    ),
    model: str | None = MODEL,
    prompt: Path | None = PROMPT,
    decoder: str | None = DECODER,
    target: TargetName | None = typer.Option(
        None,
        "--target",
        help="Where TensorRT engines are to be built; chooses the opset, and its linter must find nothing.",
    ),
    opset: Opset | None = typer.Option(
        None,
        "--opset",
        help="ONNX operator set: 23 keeps attention whole, 18 is for Jetsons and older runtimes. "
        "Default: the target's, else 23.",
    ),
    precision: PrecisionName = typer.Option(
        PrecisionName.FP32,
        "--precision",
        help="Of weights, layers and KV caches; scores stay float32. bf16 runs on torch and TensorRT only.",
    ),
    weights: WeightsPlace | None = typer.Option(
        None,
        "--weights",
        help="stream reads a checkpoint stage by stage and checks each alone; memory loads it and checks "
        "whole answers. Default: stream for checkpoints from 2 GiB on.",
    ),
    overwrite: bool = typer.Option(
        False, "--overwrite", help="Export even if the bundle there has the same model, recipe and options."
    ),
) -> None:
    """Export vision tower, decoder stages and head to ONNX, check them against the model, write a bundle.

    Every bucket is compared with an eager pruned model and the unpruned one with
    transformers' generate; if a difference is too large, there is no bundle. Of a
    checkpoint too large for that, each graph is compared alone, and the output
    says so. A bundle of the same model, recipe and options is reused.

    The shipped model:  vla-autoprune export out/bundle

    For a Jetson:  vla-autoprune export out/bundle --target jetpack6

    Your own:  vla-autoprune export out/bundle --model out/train/model --recipe out/recipe.json

    A checkpoint: vla-autoprune export out/b --model org/name --prompt prompt.json --decoder waypoints

    For a GPU:  vla-autoprune export out/b --precision fp16
    """
    from engines.lint import TARGETS
    from engines.parity import export_checked
    from vla_autoprune.export.export import place_of, text_files
    from vla_autoprune.models.checkpoint import open_model

    require_directory("BUNDLE", out)
    place_of(out)
    if opset is not None:
        operators = int(opset.value)
    else:
        operators = 23 if target is None else TARGETS[target.value].opset
    console = Console(soft_wrap=True)
    stream = None if weights is None else weights is WeightsPlace.STREAM
    opened = open_model(model, prompt, decoder, stream=stream)
    if stream and not opened.streams:
        raise InputError(f"--weights stream is for checkpoints; {opened.name} is loaded as a whole")
    vla, adapter = opened.vla, opened.adapter()
    with console.status("reading the weights"):
        chosen = _recipe(recipe, opened, adapter)
    if not overwrite and _is_current(out, chosen, operators, precision.value, text_files(vla)):
        console.print(
            f"{out} is already the bundle of this model, recipe, opset and precision; --overwrite exports it "
            "again",
            markup=False,
        )
        return
    left = f"{out} is as it was; the same command starts from the beginning"
    with told_when_interrupted(lambda: left), progress_bar() as progress:
        task = progress.add_task("export", total=None)
        bundle, report, lint = export_checked(
            adapter,
            vla,
            chosen,
            out,
            opset=operators,
            precision=precision.value,
            target=None if target is None else target.value,
            progress=lambda what, done, total: progress.update(
                task, description=f"export, {what}", completed=done, total=total
            ),
        )
    _print_result(console, bundle, report, lint)


def _recipe(file: Path | None, opened: Opened, adapter: StageModel) -> PruningRecipe:
    from vla_autoprune.recipe import read_recipe
    from vla_autoprune.recipe_building import build_recipe

    if file is None and (opened.folder / "recipe.json").is_file():
        file = opened.folder / "recipe.json"
    shape, vla = adapter.shape(opened.name), opened.vla
    if file is None:
        try:
            return build_recipe(shape, vla.prompt.layout, decode_length=vla.codec.length)
        except RecipeError as error:
            raise InputError(
                f"the default budgets do not fit this model: {error}; choose others with vla-autoprune "
                "calibrate --budgets, and give its recipe with --recipe"
            ) from error
    recipe = read_recipe(file)
    recipe.require_model(shape.weights_sha256, str(opened.folder))
    recipe.require_layout(vla.prompt.layout)
    return recipe


def _is_current(
    out: Path, recipe: PruningRecipe, opset: int, precision: Precision, texts: Mapping[str, str]
) -> bool:
    from vla_autoprune.bundle import load_bundle
    from vla_autoprune.export.export import tool_versions

    try:
        manifest = load_bundle(out).manifest
    except BundleError:
        return False
    return (
        manifest.recipe_sha256 == recipe.sha256
        and manifest.options.opset == opset
        and manifest.options.precision == precision
        and manifest.options.versions == tool_versions()
        and all(
            (out / name).is_file() and (out / name).read_text(encoding="utf-8") == text
            for name, text in texts.items()
        )
    )


def _print_result(
    console: Console, bundle: Bundle, report: ParityReport | StageParityReport, lint: LintReport
) -> None:
    from engines.parity import TOLERANCES
    from engines.stage_parity import StageParityReport

    size = sum(entry.bytes for entry in bundle.manifest.files) / 2**20
    options = bundle.manifest.options
    allowed = f"allowed in {options.precision} are {TOLERANCES[options.precision]:g}"
    console.print(
        f"[bold]{escape(str(bundle.path))}[/]: {len(bundle.graphs)} graphs, "
        f"{len(bundle.recipe.buckets)} buckets, {size:.1f} MiB, "
        f"opset {options.opset}, {options.precision}, id {bundle.manifest.bundle_id[:12]}"
    )
    if options.precision == PrecisionName.BF16:
        console.print(
            "onnxruntime, the default backend, does not run bf16: plan with --backend torch, torch-cuda or "
            "tensorrt, or export with --precision fp16"
        )
    if isinstance(report, StageParityReport):
        worst = max(report.errors, key=lambda graph: report.errors[graph])
        console.print(
            f"parity, graph by graph: {len(report.errors)} graphs of bucket {report.bucket} within "
            f"{report.errors[worst]:.1e} of the eager layers' largest value ({worst}; {allowed}), prefill "
            "and one decoded token; not compared, as the weights were never all in memory: whole answers, "
            "the other buckets, transformers' generate. No samples were recorded for vla-autoprune verify"
        )
    else:
        console.print(
            f"parity: {report.comparisons} comparisons, {report.ties} ties; "
            f"logits within {report.logit_error:.1e} of the eager pruned model, "
            f"within {report.generate_error:.1e} of transformers' generate; "
            f"hidden states within {max(report.stage_error):.1e}; {allowed}"
        )
    verdicts = [f"{name} {len(lint.of(name)) or 'no'} findings" for name in lint.targets]
    console.print(f"TensorRT linter, {lint.variants} sets of shapes: {', '.join(verdicts)}")
    refused = [name for name in lint.targets if lint.of(name)]
    if refused:
        half = " --precision fp16" if options.precision == PrecisionName.BF16 else ""
        console.print(f"for {' or '.join(refused)} export with --target {refused[0]}{half}")
