"""`vla-autoprune train`: the small driving VLA from the synthetic world."""

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vla_autoprune.cli import app
from vla_autoprune.cli.options import comma_list, require_directory
from vla_autoprune.errors import InputError

if TYPE_CHECKING:
    import torch

TRAINING_SEED = 1_000_000_000
HELD_OUT_SEED = 900_000_000
"""Seeds that neither data sets nor each other reach: no drive that is judged was trained on."""
SEEDS_PER_TRAINING = 10_000_000


class Device(str, Enum):
    """What trains."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Directory of checkpoints, figures and the trained model.")],
    scenes: Annotated[
        int, typer.Option(min=64, help="Training scenes to make, six images and four queries each.")
    ] = 12_000,
    held_out: Annotated[int, typer.Option(min=8, help="Scenes kept aside to judge the model.")] = 512,
    cache: Annotated[
        Path | None, typer.Option(help="Where scenes are kept between trainings; default: OUT/scenes.")
    ] = None,
    device: Annotated[Device, typer.Option(help="auto takes a GPU where there is one.")] = Device.AUTO,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    workers: Annotated[int, typer.Option(min=1, help="Processes that make scenes.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of scenes, weights and training.")] = 0,
    effort: Annotated[
        float,
        typer.Option(min=0.0001, help="Multiplies how many scenes every stage sees; 1 is the full recipe."),
    ] = 1.0,
    stages: Annotated[
        str | None,
        typer.Option(
            help="Scenes seen by tower,front,surround stage instead, for example 20000,100000,200000."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Scenes per step.")] = 16,
    learning_rate: Annotated[float, typer.Option(min=0, help="Peak learning rate of the decoder.")] = 1.3e-3,
    width: Annotated[int, typer.Option(min=16, help="Hidden size of tower and decoder; 4 heads.")] = 128,
    layers: Annotated[int, typer.Option(min=2, help="Decoder layers.")] = 8,
    start_from: Annotated[
        Path | None, typer.Option(help="A trained model's directory to start from instead of random weights.")
    ] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Stop cleanly after this time of training; the same command goes on later."),
    ] = None,
    evaluations: Annotated[int, typer.Option(min=0, help="Evaluations during each driving stage.")] = 5,
    rank_tests: Annotated[
        bool, typer.Option(help="Compare attention with random ranking at the end.")
    ] = True,
    compile_layers: Annotated[bool, typer.Option("--compile", help="torch.compile the layers.")] = False,
) -> None:
    """Train the small driving VLA; stop and go on at any time.

    Makes scenes of the synthetic world with worker processes (kept in the cache), trains in three stages
    (vision tower, front camera, six cameras with pruning inside the decoder) and judges the result on
    held-out scenes against constant velocity and against itself with grey images. OUT/model is what the
    other commands take, OUT/training.json and OUT/curves.png say how it went.

    A first try, a few minutes: [bold]vla-autoprune train --out out/try --scenes 1000 --effort 0.03[/]

    The full recipe on two cores: [bold]vla-autoprune train --out out/train[/]
    """
    import torch

    import eval_nuscenes.world
    from eval_nuscenes.world.snapshots import training_scene
    from vla_autoprune.fingerprint import source_hash
    from vla_autoprune.models.driving_vla import ModelSize, build_model, load_model
    from vla_autoprune.models.held_out import HeldOut
    from vla_autoprune.models.scene_store import load_scenes, make_scenes
    from vla_autoprune.models.training import STAGES, Trainer, TrainingOptions

    console = Console(soft_wrap=True)
    require_directory("--out", out)
    where = _device(device)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")
    options = TrainingOptions(seed=seed, batch=min(batch, scenes), learning_rate=learning_rate)
    seen = (
        _stage_scenes(stages)
        if stages
        else [round(effort * options.steps(s) * options.batch) for s in STAGES]
    )
    options = dataclasses.replace(
        options, tower_scenes=seen[0], front_scenes=seen[1], surround_scenes=seen[2]
    )

    kept = cache or out / "scenes"
    world = source_hash([Path(eval_nuscenes.world.__file__).parent])
    first = TRAINING_SEED + seed * SEEDS_PER_TRAINING
    training_shards = make_scenes(
        training_scene, first, scenes, kept / f"train_{seed}", world, workers, "to train on"
    )
    judged_shards = make_scenes(
        training_scene, HELD_OUT_SEED, held_out, kept / "held_out", world, workers, "to judge"
    )

    size = ModelSize(width=width, layers=layers, feed_forward=16 * round(width * 2.75 / 16))
    vla = load_model(start_from) if start_from else build_model(size, seed)
    store = load_scenes(training_shards, vla, where)
    judge = HeldOut(
        load_scenes(judged_shards, vla, where), held_out, batch=256 if where.type == "cuda" else 32
    )
    trainer = Trainer(
        vla, store, judge, out, options, compile_layers, say=lambda line: console.print(line, highlight=False)
    )
    console.print(
        f"{sum(p.numel() for p in vla.model.parameters()) / 1e6:.2f} M parameters, {len(store)} scenes, "
        f"{options.batch} a step, on {where}"
    )
    if trainer.resume():
        console.print(f"going on from {trainer.checkpoint}")
    if trainer.run(max_minutes=max_minutes, evaluations=evaluations):
        trainer.finish(rank_tests)
        console.print(
            f"model in {out / 'model'}, figures in {out / 'training.json'}, curves in {out / 'curves.png'}"
        )
    else:
        console.print(f"time is up; the same command goes on from {trainer.checkpoint}")


def _device(device: Device) -> torch.device:
    import torch

    if device is Device.AUTO:
        device = Device.CUDA if torch.cuda.is_available() else Device.CPU
    if device is Device.CUDA and not torch.cuda.is_available():
        raise InputError("--device is cuda, but this torch sees no GPU; use --device cpu")
    return torch.device(device.value)


def _stage_scenes(text: str) -> list[int]:
    counts = comma_list("--stages", text, int, "20000,100000,200000")
    if len(counts) != 3 or min(counts) < 0:
        raise InputError(
            f"--stages is {text!r}; give three counts of scenes, for example 20000,100000,200000"
        )
    return counts
