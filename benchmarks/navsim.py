"""How long does scoring one NAVSIM scene take? A busy made-up scene, or metric caches of your own.

Three drives are simulated and judged per scene: the plan, PDM-Closed and (EPDMS) the human's.

    python benchmarks/navsim.py --rounds 40
    python benchmarks/navsim.py --scenes $NAVSIM_EXP_ROOT/metric_cache --limit 200
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from eval_nuscenes.evaluation import machine
from eval_nuscenes.navsim.scene import (
    AreaType,
    Devkit,
    EgoMotion,
    Floats,
    MapArea,
    PlannedPath,
    Scene,
    Tracks,
)
from eval_nuscenes.navsim.scene_files import find_scenes, read_scene, write_scene
from eval_nuscenes.navsim.scoring import score_plan

TARGET_MS = 50.0
SPEED_MPS = 9.0
ORIGIN = np.array([664_440.0, 3_997_640.0])
"""UTM coordinates, as nuPlan has them."""


def busy_scene(devkit: Devkit, tracks: int, lanes: int) -> Scene:
    """A straight road of many lanes, cut into pieces of 20 m, cars and people on all of them.

    Args:
        devkit: whose rules.
        tracks: road users and objects within 60 m.
        lanes: beside each other; ten pieces each, with a roadblock per piece.
    """
    generator = np.random.default_rng(0)
    areas = []
    for piece in range(10):
        x = ORIGIN[0] + 20.0 * piece - 60.0
        low, high = ORIGIN[1] - 3.5 * lanes / 2, ORIGIN[1] + 3.5 * lanes / 2
        areas.append(_area(f"block {piece}", "roadblock", x, x + 20, low, high))
        for lane in range(lanes):
            y = low + 3.5 * lane
            areas.append(_area(f"lane {piece} {lane}", "lane", x, x + 20, y, y + 3.5))
    steps = 51 if devkit == "v1" else 41
    places = ORIGIN + generator.uniform([-50, -25], [60, 25], size=(tracks, 2))
    headings, speeds = generator.uniform(-0.2, 0.2, tracks), generator.uniform(0, 12, tracks)
    times = np.arange(steps) * 0.1
    boxes = np.empty((tracks, steps, 5))
    boxes[..., 0] = places[:, :1] + np.outer(speeds * np.cos(headings), times)
    boxes[..., 1] = places[:, 1:] + np.outer(speeds * np.sin(headings), times)
    boxes[..., 2], boxes[..., 3], boxes[..., 4] = headings[:, None], 4.6, 1.9
    now_us = 1_628_198_000_123_456
    past = tuple(_motion(now_us - 500_000 * back, -SPEED_MPS * 0.5 * back) for back in (3, 2, 1, 0))
    distance = SPEED_MPS * np.arange(51) * 0.1
    reference = np.column_stack(
        [now_us + 100_000 * np.arange(51), ORIGIN[0] + distance, np.full(51, ORIGIN[1]), np.zeros(51)]
    )
    straight = np.arange(ORIGIN[0] - 60, ORIGIN[0] + 140, 0.5)
    return Scene(
        token=f"busy_{devkit}",
        log="made up",
        devkit=devkit,
        ego=_motion(now_us, 0.0),
        centreline=np.column_stack([straight, np.full(len(straight), ORIGIN[1])]),
        route_lane_ids=frozenset(area.id for area in areas),
        areas=tuple(areas),
        reference=reference,
        tracks=Tracks(
            tuple(f"track {number}" for number in range(tracks)),
            tuple(generator.choice(["vehicle", "pedestrian", "traffic_cone"], tracks)),
            boxes,
            speeds,
        ),
        past=past if devkit == "v2" else (),
        human=weaving() if devkit == "v2" else None,
    )


def weaving() -> PlannedPath:
    """Eight poses of a car that changes lanes a little."""
    x = SPEED_MPS * 0.5 * np.arange(1, 9)
    return PlannedPath(np.column_stack([x, 0.4 * np.sin(x / 8), 0.05 * np.cos(x / 8)]))


def _motion(time_us: int, x: float) -> EgoMotion:
    return EgoMotion(
        time_us, np.array([ORIGIN[0] + x, ORIGIN[1], 0.0]), np.array([SPEED_MPS, 0.0]), np.zeros(2)
    )


def _area(id: str, type: AreaType, left: float, right: float, low: float, high: float) -> MapArea:
    ring: Floats = np.array([[left, low], [right, low], [right, high], [left, high], [left, low]])
    return MapArea(id, type, ((ring,),))


def milliseconds(work: Callable[[], object], rounds: int) -> Floats:
    """[rounds] CPU time of this process: other programs on the machine do not count."""
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        taken.append(1e3 * (time.process_time() - start))
    return np.array(taken)


def main() -> None:
    """Print a table, and whether a scene stays below the target; exit 1 where it does not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=Path, help="metric caches or scene files instead of made-up scenes")
    parser.add_argument("--limit", type=int, default=100, help="of those")
    parser.add_argument("--tracks", type=int, default=120)
    parser.add_argument("--lanes", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    table = Table(
        "scenes", "tracks", "areas", Column("read ms", justify="right"), "score ms p50", "p90", box=None
    )
    plan, slowest = weaving(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        if options.scenes:
            groups = {str(options.scenes): list(find_scenes(options.scenes).values())[: options.limit]}
        else:
            made = [busy_scene(devkit, options.tracks, options.lanes) for devkit in ("v1", "v2")]
            groups = {f"busy, {scene.devkit}": [write_scene(Path(folder), scene)] for scene in made}
        for name, paths in groups.items():
            rounds = max(3, options.rounds // len(paths))
            reading, scoring, scenes = [], [], []
            for path in track(paths, name, console=Console(stderr=True)):
                scenes.append(read_scene(path))
                score_plan(scenes[-1], plan)
                reading.append(milliseconds(partial(read_scene, path), rounds))
                scoring.append(milliseconds(partial(score_plan, scenes[-1], plan), rounds))
            score = np.concatenate(scoring)
            slowest = max(slowest, float(np.median(score)))
            table.add_row(
                name,
                f"{np.mean([len(scene.tracks.tokens) for scene in scenes]):.0f}",
                f"{np.mean([len(scene.areas) for scene in scenes]):.0f}",
                f"{np.median(np.concatenate(reading)):.1f}",
                f"{np.median(score):.1f}",
                f"{np.percentile(score, 90):.1f}",
            )
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(f"{machine()}, Python {platform.python_version()}; CPU time", highlight=False)
    console.print(f"a scene takes {slowest:.1f} ms, the target is {TARGET_MS:g} ms")
    sys.exit(slowest >= TARGET_MS)


if __name__ == "__main__":
    main()
