"""`vla-autoprune train`: the small driving VLA from the synthetic world."""

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from vla_autoprune.cli import app
from vla_autoprune.cli.options import (
    comma_list,
    gathered,
    refuse,
    require_directory,
    told_when_interrupted,
)
from vla_autoprune.errors import InputError

if TYPE_CHECKING:
    import torch

    from vla_autoprune.models.driving_vla import DrivingVla

TRAINING_SEED = 1_000_000_000
HELD_OUT_SEED = 900_000_000
"""Seeds that neither data sets nor each other reach: no drive that is judged was trained on."""
SEEDS_PER_TRAINING = 10_000_000
MOST_SCENES = 1_000_000


class Device(str, Enum):
    """What trains."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Directory of checkpoints, figures and the trained model.")],
    scenes: Annotated[
        int,
        typer.Option(
            min=64,
            max=MOST_SCENES,
            help="Training scenes, six images and four queries each; rounded up to whole shards of 64.",
        ),
    ] = 12_000,
    held_out: Annotated[
        int,
        typer.Option(
            min=8,
            max=MOST_SCENES,
            help="Scenes to judge the model by, which it never trains on; they are made in shards of 64.",
        ),
    ] = 512,
    cache: Annotated[
        Path | None, typer.Option(help="Where scenes are kept between trainings; default: OUT/scenes.")
    ] = None,
    device: Annotated[Device, typer.Option(help="auto takes a GPU where there is one.")] = Device.AUTO,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    workers: Annotated[int, typer.Option(min=1, help="Processes that make scenes.")] = 2,
    seed: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="Seed of scenes, weights and training.")
    ] = 0,
    effort: Annotated[
        float,
        typer.Option(
            min=0.0001, max=1000, help="Multiplies how many scenes every stage sees; 1 is the full recipe."
        ),
    ] = 1.0,
    stages: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,N",
            help="Scenes seen by tower,front,surround stage instead, for example 20000,100000,200000; "
            "0 leaves a stage out.",
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, max=4096, help="Scenes per step, at most all that there are.")
    ] = 16,
    learning_rate: Annotated[
        float, typer.Option(min=1e-8, max=1, help="Peak learning rate of the decoder.")
    ] = 1.3e-3,
    width: Annotated[
        int | None,
        typer.Option(
            min=16,
            max=4096,
            help="Hidden size of tower and decoder, a multiple of 8; 128 unless given or started from.",
        ),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=2, max=128, help="Decoder layers; 8 unless given or started from.")
    ] = None,
    start_from: Annotated[
        Path | None, typer.Option(help="A trained model's directory to start from instead of random weights.")
    ] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Begin no further step after this time, counted from the first step, evaluations included; "
            "making scenes before and judging a finished model after come on top. The same command goes on.",
        ),
    ] = None,
    evaluations: Annotated[int, typer.Option(min=0, help="Evaluations during each driving stage.")] = 5,
    rank_tests: Annotated[
        bool, typer.Option(help="Compare attention with random ranking at the end.")
    ] = True,
    compile_layers: Annotated[bool, typer.Option("--compile", help="torch.compile the layers.")] = False,
) -> None:
    """Train the small driving VLA; stop and go on at any time.

    Makes scenes of the synthetic world with worker processes (kept in the
    cache), trains in three stages (vision tower, front camera, six cameras with
    pruning inside the decoder) and judges the result on held-out scenes against
    constant velocity and against itself with grey images. OUT/model is what the
    other commands take, OUT/training.json and OUT/curves.png say how it went.

    A first try, a few minutes: [bold]vla-autoprune train --out out/try --scenes 1000 --effort 0.03[/]

    The full recipe on two cores: [bold]vla-autoprune train --out out/train[/]
    """
    import torch

    import eval_nuscenes.world
    from eval_nuscenes.world.snapshots import training_scene
    from vla_autoprune.fingerprint import source_hash
    from vla_autoprune.models.held_out import HeldOut
    from vla_autoprune.models.scene_store import load_scenes, make_scenes
    from vla_autoprune.models.training import STAGES, Trainer, TrainingOptions

    console = Console(soft_wrap=True)
    kept = cache or out / "scenes"
    options = TrainingOptions(seed=seed, batch=min(batch, scenes), learning_rate=learning_rate)
    seen = [round(effort * options.steps(stage) * options.batch) for stage in STAGES]
    faults: list[str] = []
    with gathered(faults):
        require_directory("--out", out)
    with gathered(faults):
        require_directory("--cache", kept)
    with gathered(faults):
        where = _device(device)
    with gathered(faults):
        seen = _stage_scenes(stages) if stages is not None else seen
    with gathered(faults):
        vla = _model_to_train(start_from, width, layers, seed)
    refuse(faults)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")
    options = dataclasses.replace(
        options, tower_scenes=seen[0], front_scenes=seen[1], surround_scenes=seen[2]
    )

    world = source_hash([Path(eval_nuscenes.world.__file__).parent])
    first = TRAINING_SEED + seed * SEEDS_PER_TRAINING
    with told_when_interrupted(lambda: f"scenes made are kept in {kept}; the same command goes on"):
        training_shards = make_scenes(
            training_scene, first, scenes, kept / f"train_{seed}", world, workers, "to train on"
        )
        judged_shards = make_scenes(
            training_scene, HELD_OUT_SEED, held_out, kept / "held_out", world, workers, "to judge"
        )

    store = load_scenes(training_shards, vla, where)
    judge = HeldOut(
        load_scenes(judged_shards, vla, where), held_out, batch=256 if where.type == "cuda" else 32
    )
    trainer = Trainer(
        vla, store, judge, out, options, compile_layers, say=lambda line: console.print(line, highlight=False)
    )
    console.print(
        f"{sum(p.numel() for p in vla.model.parameters()) / 1e6:.2f} M parameters, {len(store)} scenes "
        f"and {held_out} to judge by, {options.batch} a step, on {where}"
    )
    if trainer.resume():
        console.print(escape(f"going on from {trainer.checkpoint}"))
    with told_when_interrupted(lambda: f"the same command goes on from {trainer.checkpoint}"):
        finished = trainer.run(max_minutes=max_minutes, evaluations=evaluations)
        if finished:
            trainer.finish(rank_tests)
    if finished:
        console.print(escape(f"model in {out / 'model'}, figures in {out / 'training.json'}"))
    else:
        console.print(escape(f"time is up; the same command goes on from {trainer.checkpoint}"))


def _device(device: Device) -> torch.device:
    import torch

    if device is Device.AUTO:
        device = Device.CUDA if torch.cuda.is_available() else Device.CPU
    if device is Device.CUDA and not torch.cuda.is_available():
        raise InputError("--device is cuda, but this torch sees no GPU; use --device cpu")
    return torch.device(device.value)


def _stage_scenes(text: str) -> list[int]:
    counts = comma_list("--stages", text, int, "20000,100000,200000")
    if len(counts) != 3 or min(counts) < 0 or not any(counts):
        raise InputError(
            f"--stages is {text!r}; expected three counts of scenes, not all 0, "
            "for example 20000,100000,200000"
        )
    return counts


def _model_to_train(start_from: Path | None, width: int | None, layers: int | None, seed: int) -> DrivingVla:
    """The model as it is before the first step: of the size asked for, or a trained one of that size."""
    from vla_autoprune.models.driving_vla import ModelSize, build_model, load_model

    if start_from is not None:
        vla = load_model(start_from)
        has = {"--width": vla.decoder_config.hidden_size, "--layers": vla.decoder_config.num_hidden_layers}
        for option, asked in (("--width", width), ("--layers", layers)):
            if asked not in (None, has[option]):
                raise InputError(
                    f"{option} {asked}: the model of --start-from {start_from} has {has[option]}; "
                    f"leave {option} out, or start from random weights"
                )
        return vla
    default = ModelSize()
    wide = default.width if width is None else width
    if wide % (2 * default.heads):
        raise InputError(
            f"--width {wide}: expected a multiple of {2 * default.heads}, for {default.heads} heads of even "
            f"width, such as {wide - wide % (2 * default.heads)}"
        )
    size = ModelSize(width=wide, layers=layers or default.layers, feed_forward=16 * round(wide * 2.75 / 16))
    return build_model(size, seed)
