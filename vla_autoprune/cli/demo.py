"""`vla-autoprune demo`: the main job end to end, by the commands a user would type."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import typer
from rich.console import Console

from vla_autoprune.bundle import RECIPE
from vla_autoprune.cli import app
from vla_autoprune.errors import InputError, VlaError
from vla_autoprune.frame import CAMERAS
from vla_autoprune.recipe import PruningRecipe, read_recipe


@app.command()
def demo(
    out: Path = typer.Option(Path("out/demo"), "--out", metavar="DIR", help="Where everything goes."),
    scenes: int = typer.Option(10, "--scenes", min=4, help="Drives of the synthetic world."),
    limit: int = typer.Option(120, "--limit", min=1, help="Samples to evaluate, spread over the val split."),
) -> None:
    """Run the main job: make a world, export the shipped model, plan a frame, score it, name the report.

    Every step is an ordinary command, printed before it runs. What an earlier run
    made is reused. The frame is planned at the middle one of the recipe's budgets,
    the larger of two.

    vla-autoprune demo --out out/demo
    """
    started = time.monotonic()
    world, bundle, frame = out / "world", out / "bundle", out / "frame"
    report = out / "evaluation" / "report.html"
    written = (f"--out={world}", f"--scenes={scenes}", "--overwrite")
    _run("a small driving world, in nuScenes format", "synth", *written)
    _run("the shipped model as a bundle of static stages", "export", bundle)
    ego = _lay_out_frame(world, frame)
    budget = middle_budget(read_recipe(bundle / RECIPE))
    seen = (f"--images={frame}", *ego, f"--budget={budget:g}", f"--out={out / 'predict'}")
    _run(f"one frame, {budget:.0%} of the visual tokens", "predict", bundle, *seen)
    driven = (f"--data={world}", f"--limit={limit}", f"--out={report.parent}")
    _run("pruned against unpruned", "evaluate", bundle, *driven)
    console = Console(soft_wrap=True)
    console.print(f"\nall of it took {time.monotonic() - started:.0f} s")
    console.print(f"picture of one plan: {out / 'predict' / 'picture.png'}", markup=False, highlight=False)
    console.print(f"report: {report}", style="bold", markup=False, highlight=False)


def _run(what: str, *command: object) -> None:
    words = [str(word) for word in command]
    console = Console(soft_wrap=True)
    console.print(f"\n[bold cyan]# {what}[/]")
    console.print(f"$ vla-autoprune {shlex.join(words)}", style="bold", markup=False, highlight=False)
    # Ctrl-C in a terminal reaches the step as well: it tidies up and says what is left, in its own time.
    step = subprocess.Popen([sys.executable, "-m", "vla_autoprune.cli", *words])
    try:
        code = step.wait()
    except KeyboardInterrupt:
        step.wait()
        raise
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise VlaError(f"the demo stopped: vla-autoprune {words[0]} failed with exit code {code}")


def middle_budget(recipe: PruningRecipe) -> float:
    """The one of a recipe's budgets that has as many above as below, the larger of two."""
    falling = recipe.budgets
    return falling[(len(falling) - 1) // 2]


def _lay_out_frame(world: Path, folder: Path) -> list[str]:
    """Put the val split's middle keyframe into a folder; return its ego state as options of `predict`."""
    from eval_nuscenes.nuscenes_reader import NuScenesSplit

    samples = NuScenesSplit(world, "v1.0-synth", "val")
    sample = samples[len(samples) // 2]
    folder.mkdir(parents=True, exist_ok=True)
    for camera in CAMERAS:
        source = sample.cameras[camera].path
        if not source.is_file():
            raise InputError(f"{source} is missing from the data set; delete {world} and run the demo again")
        link = folder / f"{camera}{source.suffix}"
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(source, folder))
    ego = sample.ego
    return [
        f"--speed={ego.speed_mps:.2f}",
        f"--acceleration={ego.acceleration_mps2:.2f}",
        f"--yaw-rate={ego.yaw_rate_rps:.3f}",
        f"--command={sample.command.value}",
    ]
