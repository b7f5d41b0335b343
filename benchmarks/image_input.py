"""What images cost on their way to the vision tower: each filter that a bundle may ask for, in turns.

    python benchmarks/image_input.py
"""

from __future__ import annotations

import platform
import time
from importlib import metadata
from typing import get_args

import cv2
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from vla_autoprune.models.preprocess import Preprocessing, Resample

CAMERA = "CAM_FRONT"


def main(
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
        for size in ((336, 336), (448, 252))
    }
    spent: dict[tuple[str, tuple[int, int]], list[float]] = {case: [] for case in cases}
    for _ in range(turns):
        for case, preprocessing in cases.items():
            begin_s = time.perf_counter()
            preprocessing.apply({CAMERA: image})
            spent[case].append(1e3 * (time.perf_counter() - begin_s))
    table = Table("", "336 x 336, middle cropped, ms", "448 x 252, ms")
    for resample in get_args(Resample):
        medians = (float(np.median(spent[resample, size])) for size in ((336, 336), (448, 252)))
        table.add_row(resample, *(f"{ms:.1f}" for ms in medians))
    console = Console()
    console.print(table)
    console.print(
        f"medians of {turns}, one thread, one image of {width} x {height}; "
        f"Python {platform.python_version()}, OpenCV {cv2.__version__}, Pillow {metadata.version('pillow')}"
    )


if __name__ == "__main__":
    typer.run(main)
