"""What images cost on their way to the vision tower, and what decoding them in part does to plans.

python benchmarks/image_input.py filters
python benchmarks/image_input.py reduction --bundle out/demo/bundle --data out/synth --frames 120
python benchmarks/image_input.py reduction --bundle out/demo/bundle --data out/synth --enlarge 2
"""

from __future__ import annotations

import platform
import time
from importlib import metadata
from pathlib import Path
from typing import get_args

import cv2
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from vla_autoprune.models.preprocess import Preprocessing, Resample

CAMERA = "CAM_FRONT"
SIZES = ((336, 336), (448, 252))
ENLARGED_QUALITY = 95

app = typer.Typer(help=__doc__, rich_markup_mode=None)


@app.command()
def filters(
    width: int = typer.Option(1600, help="Of the camera's image, pixels."),
    height: int = typer.Option(900, help="Of the camera's image, pixels."),
    turns: int = typer.Option(25, help="Of all filters."),
) -> None:
    """Print milliseconds per image and filter, at LLaVA-1.5's size and at one for Qwen's towers."""
    cv2.setNumThreads(1)
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 255, (height // 24, width // 24, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.uint8)
    cases = {
        (resample, size): Preprocessing(
            cameras=(CAMERA,),
            width=size[0],
            height=size[1],
            fit="crop" if size[0] == size[1] else "squeeze",
            resample=resample,
        )
        for resample in get_args(Resample)
        for size in SIZES
    }
    spent: dict[tuple[str, tuple[int, int]], list[float]] = {case: [] for case in cases}
    for _ in range(turns):
        for case, preprocessing in cases.items():
            begin_s = time.perf_counter()
            preprocessing.apply({CAMERA: image})
            spent[case].append(1e3 * (time.perf_counter() - begin_s))
    table = Table("", "336 x 336, middle cropped, ms", "448 x 252, ms")
    for resample in get_args(Resample):
        medians = (float(np.median(spent[resample, size])) for size in SIZES)
        table.add_row(resample, *(f"{ms:.1f}" for ms in medians))
    Console().print(table, f"medians of {turns}, one thread, one image of {width} x {height}; {_versions()}")


@app.command()
def reduction(
    bundle: Path = typer.Option(..., help="Of a model that averages areas, as the shipped one."),
    data: Path = typer.Option(..., help="Data set in nuScenes format, with JPEGs."),
    version: str = typer.Option("v1.0-synth", help="Name of the folder with the tables."),
    split: str = typer.Option("val", help="Split to plan on."),
    frames: int = typer.Option(120, help="Frames, spread over the split."),
    enlarge: int = typer.Option(
        1, help=f"Encode images anew at a multiple of their size, quality {ENLARGED_QUALITY}."
    ),
    budget: float = typer.Option(0.4, help="Of the pruned plans, beside unpruned ones."),
) -> None:
    """Plan the same frames from images decoded whole and in part, in turns; print times and differences."""
    from engines.onnxruntime import OnnxRuntimeBackend
    from eval_nuscenes.bootstrap import SceneBootstrap
    from eval_nuscenes.nuscenes_reader import NuScenesSplit
    from vla_autoprune.bundle import load_bundle
    from vla_autoprune.frame import Frame
    from vla_autoprune.images import decode_image
    from vla_autoprune.progress import progress_bar
    from vla_autoprune.runtime.planner import Planner

    cv2.setNumThreads(1)
    opened = load_bundle(bundle)
    unpruned = Planner(opened, OnnxRuntimeBackend(opened, threads=1))
    planners = {"unpruned": unpruned, f"{budget:.0%}": unpruned.variant(budget)}
    steps = unpruned.preprocessing
    ways = {"whole": None, "in part": steps.reduction}
    spent: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    moved, levels, scenes = [], [], []
    l2_m: dict[str, list[list[float]]] = {name: [] for name in planners}
    apart_m: dict[str, list[float]] = {name: [] for name in planners}
    with progress_bar() as bar:
        for sample in bar.track(NuScenesSplit(data, version, split, "route", frames), description="frames"):
            files = {camera: sample.cameras[camera].path.read_bytes() for camera in steps.cameras}
            if enlarge > 1:
                files = {camera: _enlarged(content, enlarge) for camera, content in files.items()}
            pixels, plans = [], []
            for way, reduce in ways.items():
                begin_s = time.perf_counter()
                images = {camera: decode_image(files[camera], camera, reduce) for camera in files}
                decoded_s = time.perf_counter()
                pixels.append(steps.apply(images))
                spent[way].append((decoded_s - begin_s, time.perf_counter() - decoded_s))
                frame = Frame(images, sample.ego, sample.command, token=sample.token)
                plans.append([planner.plan(frame).waypoints_in_ego[:, :2] for planner in planners.values()])
            moved.append(np.abs(pixels[1] - pixels[0]))
            levels.append(moved[-1] * 255 * np.reshape(steps.std, (1, 3, 1, 1)))
            for name, whole, part in zip(planners, *plans, strict=True):
                apart_m[name].append(float(np.linalg.norm(part - whole, axis=1).max()))
            if sample.future_exists.all():
                scenes.append(sample.scene)
                for name, *both in zip(planners, *plans, strict=True):
                    off = [np.linalg.norm(each - sample.future_in_ego[:, :2], axis=1).mean() for each in both]
                    l2_m[name].append([float(value) for value in off])
    console, table = Console(), Table("", "decoding, ms", "resizing and normalising, ms")
    for way, seconds in spent.items():
        table.add_row(way, *(f"{1e3 * ms:.1f}" for ms in np.median(seconds, axis=0)))
    console.print(table)
    for what, values in (("pixel values", np.stack(moved)), ("grey levels of 255", np.stack(levels))):
        spread = f"{values.mean():.4f}, 99th percentile {np.percentile(values, 99):.3f}, {values.max():.2f}"
        console.print(f"{what} differ by {spread} at most")
    bootstrap = SceneBootstrap(scenes)
    for name, pairs in l2_m.items():
        whole, part = np.array(pairs).T
        by = bootstrap.mean(part - whole, np.ones(len(pairs), dtype=bool))
        same = np.mean(np.array(apart_m[name]) == 0)
        console.print(
            f"{name}: {same:.0%} of {len(apart_m[name])} plans the same, furthest waypoint "
            f"{np.mean(apart_m[name]):.3f} m apart on average; L2 over 3 s {whole.mean():.4f} m whole, "
            f"{part.mean():.4f} m in part on {len(pairs)} frames, "
            f"difference {by.mean} ({by.low} to {by.high})"
        )
    console.print(_versions())


def _enlarged(content: bytes, factor: int) -> bytes:
    image = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), cv2.IMREAD_COLOR)
    large = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".jpg", large, [cv2.IMWRITE_JPEG_QUALITY, ENLARGED_QUALITY])[1].tobytes()


def _versions() -> str:
    pillow = metadata.version("pillow")
    return f"Python {platform.python_version()}, OpenCV {cv2.__version__}, Pillow {pillow}"


if __name__ == "__main__":
    app()
