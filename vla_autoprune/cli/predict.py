"""`vla-autoprune predict`: one plan from six image files."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vla_autoprune.cli import app
from vla_autoprune.cli.options import (
    BACKEND,
    THREADS,
    BackendName,
    PolicyName,
    finite,
    require_directory,
)
from vla_autoprune.errors import InputError
from vla_autoprune.files import write_whole
from vla_autoprune.frame import Command, EgoState, Frame, Plan
from vla_autoprune.images import Reduction
from vla_autoprune.models.tokenizer import ACCELERATION_MPS2, SPEED_MPS, YAW_RATE_RPS

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@app.command()
def predict(
    bundle: Path = typer.Argument(..., metavar="BUNDLE", help="Directory written by export."),
    images: Path = typer.Option(
        ..., "--images", metavar="DIR", help="One image file per camera, CAM_FRONT and so on in their names."
    ),
    speed: float = typer.Option(
        ..., "--speed", parser=finite, metavar="M/S", help=f"Of the ego vehicle, {SPEED_MPS.range} m/s."
    ),
    acceleration: float = typer.Option(
        0.0,
        "--acceleration",
        parser=finite,
        metavar="M/S²",
        help=f"{ACCELERATION_MPS2.range} m/s², negative when braking.",
    ),
    yaw_rate: float = typer.Option(
        0.0,
        "--yaw-rate",
        parser=finite,
        metavar="RAD/S",
        help=f"{YAW_RATE_RPS.range} rad/s, positive to the left.",
    ),
    command: Command = typer.Option(Command.STRAIGHT, "--command", help="Where the route goes next."),
    budget: float | None = typer.Option(
        None,
        "--budget",
        help="Mean share of visual tokens in the decoder; one of the recipe's. Default: all.",
    ),
    policy: PolicyName = typer.Option(
        PolicyName.AUTOPRUNE, "--policy", help="How tokens are chosen: by AutoPrune, or as in a comparison."
    ),
    out: Path = typer.Option(Path("out/predict"), "--out", metavar="DIR", help="For the two result files."),
    backend: BackendName = BACKEND,
    threads: int | None = THREADS,
) -> None:
    """Plan one frame of image files; write waypoints.json and picture.png.

    Our models know words for speeds, accelerations and yaw rates in the ranges
    below. A value beyond is clipped to the nearest word; a note says so, and
    waypoints.json has what was asked and what was used. A checkpoint with a
    prompt template is told the numbers as they are.

    Example: vla-autoprune predict out/bundle --images keyframe --speed 6 --command left --budget 0.4
    """
    from engines.backends import open_backend
    from vla_autoprune.bundle import load_bundle
    from vla_autoprune.recipe import FULL
    from vla_autoprune.runtime.planner import Planner

    require_directory("--out", out)
    if budget is None and policy is not PolicyName.AUTOPRUNE:
        raise InputError(f"--policy {policy.value} chooses tokens to keep, but without --budget all are kept")
    loaded = load_bundle(bundle)
    planner = Planner(loaded, open_backend(backend.value, loaded, threads=threads), budget, policy.value)
    cameras = loaded.recipe.layout.cameras
    frame = Frame(
        images=read_images(images, cameras, planner.preprocessing.reduction),
        ego=EgoState(speed, acceleration, yaw_rate),
        command=command,
        token=images.resolve().name,
    )
    planner.plan(frame)  # the first run also pays for memory; its timings would mislead
    plan = planner.plan(frame)

    from eval_nuscenes.pictures import plan_picture

    out.mkdir(parents=True, exist_ok=True)
    shown = dataclasses.replace(frame, images=read_images(images, cameras))
    picture = plan_picture(shown, plan, loaded.recipe.layout)
    document = _document(plan, frame, planner.prompt.heard(frame.ego), loaded.manifest.bundle_id)
    write_whole(
        out / "waypoints.json",
        (json.dumps(document, indent=1) + "\n").encode(),
    )
    write_whole(out / "picture.png", picture)
    _print(plan, loaded.kv_mib(loaded.recipe.bucket(FULL)), out)


def read_images(folder: Path, cameras: Sequence[str], reduction: Reduction | None = None) -> dict[str, Any]:
    """The image file of every camera in a folder.

    A file belongs to a camera when its name is the camera's, or holds it between double underscores as
    nuScenes names its files.

    Args:
        folder: where they are.
        cameras: names.
        reduction: the planner's; None decodes every pixel, for people.

    Returns:
        [height, width, 3] RGB images by camera.

    Raises:
        InputError: the folder is missing, or a camera has no file, several, or one that is no image.
    """
    from eval_nuscenes.nuscenes_reader import read_image

    if not folder.is_dir():
        raise InputError(f"--images: {folder} is not a directory; give one with an image file per camera")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    found = {}
    for camera in cameras:
        pattern = re.compile(rf"(^|__){re.escape(camera)}(__|\.)", re.IGNORECASE)
        matches = [path for path in files if pattern.search(path.name)]
        if len(matches) != 1:
            what = f"{len(matches)} images: {', '.join(p.name for p in matches)}" if matches else "no image"
            raise InputError(
                f"--images: {folder} has {what} of {camera}; the model needs exactly one of each of "
                f"{', '.join(cameras)}, named like {camera}.jpg"
            )
        found[camera] = read_image(matches[0], reduction)
    return found


def _document(plan: Plan, frame: Frame, heard: EgoState, bundle_id: str) -> dict[str, Any]:
    return {
        "waypoints": [
            {
                "time_s": time,
                "x_m": round(float(x), 4),
                "y_m": round(float(y), 4),
                "heading_rad": round(float(h), 5),
            }
            for time, (x, y, h) in zip(plan.times_s, plan.waypoints_in_ego, strict=True)
        ],
        "frame": "ego: x forward, y left, rear axle, at the time of the images",
        "ego_asked": dataclasses.asdict(frame.ego),
        "ego_used": dataclasses.asdict(heard),
        "command": frame.command.value,
        "answer": plan.text,
        "bucket": plan.bucket,
        "complexity_bits": plan.complexity,
        "visual_tokens_into_layers": list(plan.visual_tokens_into_layers),
        "visual_tokens_left": dict(plan.visual_tokens_left),
        "work_fraction": plan.work_fraction,
        "kv_mib": plan.kv_mib,
        "timings_ms": {step: round(value, 3) for step, value in plan.timings_ms.items()},
        "flags": list(plan.flags),
        "bundle_id": bundle_id,
    }


def _print(plan: Plan, unpruned_kv_mib: float, out: Path) -> None:
    console = Console(soft_wrap=True)
    table = Table("time", "x forward", "y left", "heading", title=f"bucket {plan.bucket}")
    for time, (x, y, heading) in zip(plan.times_s, plan.waypoints_in_ego, strict=True):
        table.add_row(f"{time:.1f} s", f"{x:.2f} m", f"{y:+.2f} m", f"{heading:+.3f} rad")
    console.print(table)
    visual = plan.visual_tokens_into_layers
    split = " · ".join(
        f"{step} {plan.timings_ms[step]:.1f}" for step in ("preprocess", "vision", "prefill", "decode")
    )
    console.print(
        f"visual tokens into the layers {sum(visual) / len(visual):.1f} of {visual[0]}, "
        f"work {plan.work_fraction:.0%}, KV {plan.kv_mib:.2f} of {unpruned_kv_mib:.2f} MiB, "
        f"{plan.timings_ms['total']:.1f} ms ({split})"
    )
    for flag in plan.flags:
        console.print(f"note: {flag}", style="yellow")
    console.print(escape(f"wrote {out / 'waypoints.json'} and {out / 'picture.png'}"))
