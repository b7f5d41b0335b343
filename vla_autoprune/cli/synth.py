"""`vla-autoprune synth`: write the synthetic driving world as a nuScenes data set."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vla_autoprune.cli import app
from vla_autoprune.cli.options import comma_list, require_directory, told_when_interrupted
from vla_autoprune.errors import InputError


@app.command()
def synth(
    out: Path = typer.Option(
        Path("out/synth"),
        "--out",
        metavar="DIR",
        help="Folder of the data set, new or empty (the dataroot).",
    ),
    scenes: int = typer.Option(
        10, "--scenes", min=1, max=1000, help="Drives to write; each takes about 20 MB."
    ),
    seed: int = typer.Option(0, "--seed", min=0, help="Another seed gives other roads, traffic and drives."),
    duration_s: float = typer.Option(
        20.0, "--duration-s", min=4, max=60, help="Length of a drive in seconds."
    ),
    image_size: str = typer.Option(
        "800x450",
        "--image-size",
        metavar="WxH",
        help="Size of the camera images in pixels, 64x36 to 3840x2160.",
    ),
    kinds: str = typer.Option(
        "all",
        "--kinds",
        metavar="A,B,…",
        help="Kinds of drive, such as lead,light; an unknown one lists them.",
    ),
    val_fraction: float = typer.Option(
        0.5, "--val-fraction", min=0, max=1, help="Share of the drives for evaluation."
    ),
    calibration_fraction: float = typer.Option(
        0.3,
        "--calibration-fraction",
        min=0,
        max=1,
        help="Share for calibration; what is left of both is the train split.",
    ),
    jpeg_quality: int = typer.Option(85, "--jpeg-quality", min=30, max=100, help="Of the camera images."),
    workers: int | None = typer.Option(None, "--workers", min=1, help="Processes; one per CPU unless given."),
    overwrite: bool = typer.Option(
        False,
        "--overwrite",
        help="Replace a synthetic data set that differs; any other folder stays refused.",
    ),
) -> None:
    """Write a synthetic driving world in nuScenes format.

    Procedural roads, traffic, lights and pedestrians, driven through by an
    expert and seen by the six cameras of the nuScenes rig: tables, images,
    lidar, map expansion, map masks and CAN bus, so that the nuscenes-devkit
    opens it as version v1.0-synth. The same options give the same bytes. A
    finished data set is reused; Ctrl-C leaves nothing half-written.

    Ten drives in out/synth: vla-autoprune synth

    A larger set elsewhere: vla-autoprune synth --out big --scenes 100 --seed 7

    Full-size images: vla-autoprune synth --out full --image-size 1600x900

    Some kinds only: vla-autoprune synth --out lit --kinds light,pedestrian
    """
    from eval_nuscenes.nuscenes_writer import VERSION, dataset_options, write_dataset

    require_directory("--out", out)
    width, height = _width_height(image_size)
    options = dataset_options(
        scenes=scenes,
        seed=seed,
        duration_s=duration_s,
        width=width,
        height=height,
        kinds=() if kinds == "all" else tuple(comma_list("--kinds", kinds, str, "lead,light")),
        val_fraction=val_fraction,
        calibration_fraction=calibration_fraction,
        jpeg_quality=jpeg_quality,
    )
    with told_when_interrupted(lambda: f"{out} is as it was; the same command starts from the beginning"):
        dataset = write_dataset(out, options, workers=workers, overwrite=overwrite)

    record, console = dataset.record, Console(soft_wrap=True)
    title = f"{out} ({VERSION}){', as it was' if dataset.reused else ''}"
    table = Table(title=escape(title), title_justify="left")
    for column in ("split", "drives", "kinds"):
        table.add_column(column)
    for split in ("train", "calibration", "val"):
        members = [entry for entry in record.scenes if entry.split == split]
        counts = {kind: sum(entry.kind == kind for entry in members) for kind in options.kinds}
        shown = ", ".join(f"{kind} {count}" for kind, count in counts.items() if count)
        table.add_row(split, str(len(members)), shown)
    console.print(table)
    console.print(
        f"{record.keyframes} keyframes of six cameras, {record.files} files, {record.bytes / 1e6:.0f} MB, "
        f"content {record.content_sha256[:12]}"
    )
    console.print(
        f'open it: NuScenes(version="{VERSION}", dataroot="{out}")',
        style="dim",
        markup=False,
        highlight=False,
    )


def _width_height(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise InputError(f"--image-size {text}: expected WIDTHxHEIGHT in pixels, such as 800x450")
    return int(width), int(height)
