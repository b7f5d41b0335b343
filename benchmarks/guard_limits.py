"""Which plans the guard's default limits refuse: those of the data's own driver, and those of an evaluation.

python benchmarks/guard_limits.py out/demo/world --plans out/demo/evaluation/plans-<hash>.jsonl
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from eval_nuscenes.nuscenes_reader import NuScenesSplit, Sample
from ros_nodes.guard import Guard
from ros_nodes.limits import GuardSettings
from ros_nodes.motion import FloatArray, Motion, Pose, Trajectory
from vla_autoprune.frame import WAYPOINT_TIMES_S

DRIVER = "driver of the data"
LATENCY_NS = 100_000_000
NOMINAL_S = np.array(WAYPOINT_TIMES_S)


def main(
    data: Path = typer.Argument(..., help="Data set in nuScenes format."),
    version: str = typer.Option("v1.0-synth"),
    split: str = typer.Option("val"),
    command_source: str = typer.Option("route"),
    plans: Path | None = typer.Option(None, help="Log of vla-autoprune evaluate on the same split."),
) -> None:
    """Give a guard every frame's plan, 100 ms after the frame, with the vehicle's true motion."""
    samples = list(NuScenesSplit(data, version, split, command_source))  # type: ignore[arg-type]
    drivers: dict[str, list[FloatArray]] = {
        DRIVER: [sample.future_in_ego[sample.future_exists] for sample in samples]
    }
    if plans is not None:
        records = [json.loads(line) for line in plans.read_text().splitlines()]
        by_token = {record["token"]: record["plans"] for record in records if "token" in record}
        for name in next(iter(by_token.values())):
            drivers[name] = [
                np.array(by_token[sample.token][name]["waypoints_in_ego"])
                if sample.token in by_token and not by_token[sample.token][name].get("error")
                else np.zeros((0, 3))
                for sample in samples
            ]
    table = Table(title=f"{data}, split {split}", title_justify="left")
    for column in ("plans of", "frames", "refused", "by"):
        table.add_column(column)
    for name, waypoints in drivers.items():
        frames, refused = refusals(samples, waypoints, at_keyframes=name == DRIVER)
        reasons = ", ".join(f"{check} {count}" for check, count in sorted(refused.items()))
        table.add_row(name, str(frames), f"{sum(refused.values()) / max(frames, 1):.1%}", reasons)
    Console().print(table)


def refusals(
    samples: Sequence[Sample], waypoints: Sequence[FloatArray], at_keyframes: bool
) -> tuple[int, dict[str, int]]:
    """Frames whose plan is long enough to be judged, and how often each check refused one.

    Args:
        samples: all of a split, in order.
        waypoints: [up to 6, 3] per sample.
        at_keyframes: waypoints are due when the following keyframes really were, which on recorded data is
            not quite every half second.
    """
    settings = GuardSettings()
    guards: dict[str, Guard] = {}
    frames = 0
    for index, (sample, poses) in enumerate(zip(samples, waypoints, strict=True)):
        later = samples[index + 1 : index + 1 + len(poses)] if at_keyframes else ()
        sample_times = [ahead.stamp_s - sample.stamp_s for ahead in later]
        guard = guards.setdefault(sample.scene, Guard(settings))
        stamp_ns = round(sample.stamp_s * 1e6) * 1000
        pose = sample.ego_pose
        place = Pose(float(pose[0, 3]), float(pose[1, 3]), math.atan2(pose[1, 0], pose[0, 0]))
        motion = Motion(place, sample.ego.speed_mps, sample.ego.yaw_rate_rps)
        guard.take_odometry(stamp_ns, motion, stamp_ns)
        times = np.array(sample_times[: len(poses)]) if sample_times else NOMINAL_S[: len(poses)]
        if not len(times) or times[-1] < settings.min_horizon_s:
            continue
        frames += 1
        due_ns = stamp_ns + np.rint(times * 1e9).astype(np.int64)
        plan = Trajectory(stamp_ns, settings.base_frame, due_ns, poses.astype(np.float64))
        guard.take_plan(plan, stamp_ns + LATENCY_NS, stamp_ns / 1e9)
        guard.output(stamp_ns + LATENCY_NS, stamp_ns / 1e9)
    total: dict[str, int] = {}
    for guard in guards.values():
        for check, count in guard.refused.items():
            total[check] = total.get(check, 0) + count
    return frames, total


if __name__ == "__main__":
    typer.run(main)
