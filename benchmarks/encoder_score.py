"""Does the vision tower's own score help to choose tokens? The shipped model with every score it can give.

The text's attention after the first layer ranks alone, or with the tower's score added: the [CLS] row's
attention, or the attention that patches receive, of each tower layer. Budget, schedule and frames are the
same; the loss is the mean distance to the expert's waypoints.

    vla-autoprune synth --out out/synth --scenes 40
    python benchmarks/encoder_score.py --data out/synth
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

RESAMPLES = 2000


def main(
    data: Path = typer.Option(..., help="Data set in nuScenes format, as synth makes it."),
    version: str = typer.Option("v1.0-synth", help="Name of the folder with the tables."),
    split: str = typer.Option("calibration", help="Split to plan on."),
    frames: int = typer.Option(100, help="Frames, spread over the split."),
    budget: float = typer.Option(0.25, help="Mean share of visual tokens in the decoder."),
    weight: float = typer.Option(1.0, help="Of the tower's score."),
    layers: str = typer.Option("all", help="Tower layers to read scores from, like 1,3."),
    threads: int = typer.Option(1, help="CPU threads."),
) -> None:
    """Export the shipped model once per score, plan the same frames, print distances to the expert."""
    import torch

    from engines.onnxruntime import OnnxRuntimeBackend
    from eval_nuscenes.nuscenes_reader import NuScenesSplit
    from vla_autoprune.export.export import export_bundle, text_files
    from vla_autoprune.models.adapter import LlavaAdapter
    from vla_autoprune.models.checkpoint import open_model
    from vla_autoprune.recipe import Scorer
    from vla_autoprune.recipe_building import build_recipe
    from vla_autoprune.runtime.planner import Planner
    from vla_autoprune.runtime.slope_losses import KnownDrive, measure_slopes

    torch.set_num_threads(threads)
    opened = open_model(None, None, None)
    model, layout = LlavaAdapter(opened.vla.model), opened.vla.prompt.layout
    shape = model.shape(opened.name)
    samples = NuScenesSplit(data, version, split, "route", frames)

    def drives() -> Iterator[KnownDrive]:
        for sample in samples:
            frame = sample.frame(layout.cameras, opened.vla.preprocessing.reduction)
            yield KnownDrive(frame, sample.scene, sample.future_in_ego, sample.future_exists)

    scorers = {"text alone": Scorer()}
    chosen = range(model.tower_layers) if layers == "all" else [int(layer) for layer in layers.split(",")]
    for layer in chosen:
        for encoder in ("cls", "received"):
            scorers[f"text + {encoder}, tower layer {layer}"] = Scorer(
                encoder_weight=weight, encoder=encoder, encoder_layer=layer
            )
    console = Console(soft_wrap=True)
    table = Table("score at the first pruning point", "distance, m", "minus text alone, m (95 %)")
    alone: np.ndarray | None = None
    for name, scorer in scorers.items():
        recipe = build_recipe(
            shape,
            layout,
            decode_length=opened.vla.codec.length,
            budgets=(budget,),
            slopes=(0.2,),
            scorer=scorer,
        )
        with tempfile.TemporaryDirectory() as folder:
            bundle = export_bundle(model, recipe, Path(folder) / "bundle", text_files(opened.vla))
            backend = OnnxRuntimeBackend(bundle, threads=threads)
            measured = measure_slopes(Planner(bundle, backend), drives())
            backend.close()
        losses = measured.losses[budget][:, 0]
        if alone is None:
            alone = losses
            console.print(
                f"{len(losses)} frames of {len(set(measured.scenes))} scenes, {measured.left_out}; "
                f"without pruning {measured.unpruned.mean():.3f} m"
            )
            table.add_row(name, f"{losses.mean():.3f}", "")
            continue
        low, high = _interval(losses - alone, measured.scenes)
        difference = f"{(losses - alone).mean():+.3f} ({low:+.3f} to {high:+.3f})"
        table.add_row(name, f"{losses.mean():.3f}", difference)
        console.print(f"{name}: {losses.mean():.3f} m")
    console.print(table)


def _interval(differences: np.ndarray, scenes: tuple[str, ...]) -> tuple[float, float]:
    """Percentile bootstrap over whole scenes of a mean."""
    _, scene = np.unique(scenes, return_inverse=True)
    sums, sizes = np.bincount(scene, weights=differences), np.bincount(scene)
    drawn = np.random.default_rng(0).integers(0, len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


if __name__ == "__main__":
    typer.run(main)
