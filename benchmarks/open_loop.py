"""How long do the open-loop protocols take on as many samples as the nuScenes validation split counts?

Samples are made up: a car that drives, turns or stands, a plan that strays from it, and around it about as
many road users, of the same kinds, as nuScenes annotates. One core; reading a data set is not part of it.

    python benchmarks/open_loop.py
    python benchmarks/open_loop.py --samples 500 --protocols uniad,bevplanner
"""

from __future__ import annotations

import argparse
import platform
import sys
import time

import cv2
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from eval_nuscenes.evaluation import machine
from eval_nuscenes.metrics import PROTOCOLS, OpenLoopTruth, TrackedBox, Waypoints, protocol_named

SAMPLES = 5119
TARGET_S = 60.0
ROAD_USERS = 47
"""Around the car in the three seconds, which makes 34 in a keyframe, the mean of nuScenes."""
KINDS = {  # category: share of the boxes, length and width in metres, how many of them move
    "vehicle.car": (0.43, 4.6, 1.95, 0.3),
    "human.pedestrian.adult": (0.19, 0.7, 0.7, 0.7),
    "movable_object.barrier": (0.14, 0.5, 2.5, 0.0),
    "movable_object.trafficcone": (0.09, 0.4, 0.4, 0.0),
    "vehicle.truck": (0.08, 6.9, 2.5, 0.3),
    "vehicle.trailer": (0.02, 12.0, 2.9, 0.2),
    "vehicle.bus.rigid": (0.02, 11.0, 2.9, 0.5),
    "vehicle.construction": (0.01, 6.4, 2.8, 0.1),
    "vehicle.motorcycle": (0.01, 2.1, 0.8, 0.5),
    "vehicle.bicycle": (0.01, 1.7, 0.6, 0.5),
}
TIMES_S = np.arange(7) / 2


def sample(generator: np.random.Generator) -> tuple[OpenLoopTruth, Waypoints]:
    """A truth with all six keyframes, and a plan."""
    speed = generator.choice([0.0, 1.0]) * generator.uniform(0, 15) + generator.uniform(0, 1)
    turn = generator.choice([0.0, 1.0]) * generator.normal(0, 0.15)
    truth = drive(speed, turn)
    plan = drive(speed * generator.uniform(0.8, 1.2), turn + generator.normal(0, 0.05))

    count = generator.poisson(ROAD_USERS)
    shares = np.array([share for share, *_ in KINDS.values()])
    kinds = generator.choice(list(KINDS), size=count, p=shares / shares.sum())
    distances, angles = generator.uniform(4, 60, count), generator.uniform(-np.pi, np.pi, count)
    yaws = generator.choice([np.pi / 2, -np.pi / 2, 0.0], count) + generator.normal(0, 0.1, count)
    steps: list[list[TrackedBox]] = [[] for _ in TIMES_S]
    for number, kind in enumerate(kinds):
        _, length, width, moving = KINDS[kind]
        pace = (generator.random() < moving) * generator.uniform(0.5, 2.0 if "human" in kind else 10.0)
        x = distances[number] * np.cos(angles[number]) + pace * np.cos(yaws[number]) * TIMES_S
        y = distances[number] * np.sin(angles[number]) + pace * np.sin(yaws[number]) * TIMES_S
        yaw, points = float(yaws[number]), int(generator.integers(0, 50))
        track_of_box = list(zip(x.tolist(), y.tolist(), strict=True))
        for step in range(generator.integers(0, 3), len(TIMES_S) - generator.integers(0, 3)):
            box = TrackedBox(*track_of_box[step], length, width, yaw, str(kind), str(number), points)
            steps[step].append(box)

    along = np.linspace(-50, 50, 20)
    edges = tuple(
        np.stack([np.full(20, side) + 0.002 * along**2, along], axis=1) for side in (-9.0, -5.5, 2.5, 6.0)
    )
    boxes = tuple(map(tuple, steps))
    return OpenLoopTruth(truth, (True,) * 7, boxes, rear_axle_waypoints=truth, road_edges=edges), plan


def drive(speed_mps: float, yaw_rate: float) -> Waypoints:
    """[6, 2] waypoints of a car at constant speed and turn."""
    headings = np.pi / 2 + yaw_rate * TIMES_S[1:]
    moves = speed_mps / 2 * np.stack([np.cos(headings), np.sin(headings)], axis=1)
    return moves.cumsum(axis=0).astype(np.float32)


def main() -> int:
    """Time every protocol and print a table; 1 if all together miss the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--protocols", default=",".join(PROTOCOLS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    protocols = [protocol_named(name) for name in options.protocols.split(",")]
    cv2.setNumThreads(1)

    generator = np.random.default_rng(options.seed)
    samples = [sample(generator) for _ in track(range(options.samples), "make up samples")]
    table = Table(Column("protocol", no_wrap=True), "CPU s", "wall s", "ms per sample", "colliding samples")
    total_cpu = total_wall = 0.0
    for protocol in protocols:
        started, started_cpu, collided = time.perf_counter(), time.process_time(), 0
        for truth, plan in samples:
            collided += any(protocol.scorer(truth)(plan).hits)
        cpu, wall = time.process_time() - started_cpu, time.perf_counter() - started
        total_cpu, total_wall = total_cpu + cpu, total_wall + wall
        per_sample_ms = f"{1e3 * cpu / len(samples):.2f}"
        table.add_row(protocol.name, f"{cpu:.1f}", f"{wall:.1f}", per_sample_ms, str(collided))
    table.add_row("all", f"{total_cpu:.1f}", f"{total_wall:.1f}", f"{1e3 * total_cpu / len(samples):.2f}", "")
    console = Console()
    console.print(table)
    boxes = np.mean([len(step) for truth, _ in samples for step in truth.boxes])
    met = total_cpu * SAMPLES / len(samples) <= TARGET_S
    console.print(
        f"{len(samples)} samples, seed {options.seed}, {boxes:.1f} boxes a keyframe; target {TARGET_S:.0f} s "
        f"of one core for {SAMPLES} samples {'met' if met else 'MISSED'}; {machine()}, "
        f"Python {platform.python_version()}, numpy {np.__version__}, OpenCV {cv2.__version__}",
        highlight=False,
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
