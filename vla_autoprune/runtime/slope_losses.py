"""What every slope of every budget costs on known drives: the data a complexity mapping is fitted on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla_autoprune.errors import PlanError
from vla_autoprune.frame import FloatArray, Frame
from vla_autoprune.runtime.planner import Planner


@dataclass(frozen=True)
class KnownDrive:
    """A frame with what the expert did after it.

    Attributes:
        frame: what a planner sees.
        scene: frames of one scene are not independent.
        future_in_ego: [T, 2 or 3] the expert's waypoints.
        future_exists: [T] whether the drive lasted that long.
    """

    frame: Frame
    scene: str
    future_in_ego: FloatArray
    future_exists: NDArray[np.bool_]


@dataclass(frozen=True)
class SlopeLosses:
    """Measurements on n frames.

    Attributes:
        tokens: [n] frame tokens.
        scenes: [n] scene of each.
        complexities: [n] bits of stage 0.
        losses: per budget, [n, slopes] mean distance to the expert's waypoints in metres, slopes rising.
        unpruned: [n] the same without pruning.
        failed: frames left out because some bucket's answer was no plan, or without a future.
    """

    tokens: tuple[str, ...]
    scenes: tuple[str, ...]
    complexities: NDArray[np.float64]
    losses: dict[float, NDArray[np.float64]]
    unpruned: NDArray[np.float64]
    failed: int


def measure_slopes(
    planner: Planner, drives: Iterable[KnownDrive], progress: Callable[[int], None] | None = None
) -> SlopeLosses:
    """Plan every frame in every bucket.

    Args:
        planner: of a bundle whose recipe has the budgets and slopes to compare.
        drives: frames with their future.
        progress: called with the frames done.

    Returns:
        The measurements.
    """
    recipe = planner.recipe
    tokens, scenes, complexities, rows = [], [], [], []
    failed = 0
    for done, drive in enumerate(drives):
        if progress is not None:
            progress(done)
        if not drive.future_exists.any():
            failed += 1
            continue
        try:
            plans = [planner.plan_in_bucket(drive.frame, bucket.name) for bucket in recipe.buckets]
        except PlanError:
            failed += 1
            continue
        tokens.append(drive.frame.token)
        scenes.append(drive.scene)
        complexities.append(plans[0].complexity)
        rows.append([_loss(plan.waypoints_in_ego, drive) for plan in plans])
    measured = np.array(rows, dtype=np.float64).reshape(len(rows), len(recipe.buckets))
    column = {bucket.name: index for index, bucket in enumerate(recipe.buckets)}
    return SlopeLosses(
        tokens=tuple(tokens),
        scenes=tuple(scenes),
        complexities=np.array(complexities, dtype=np.float64),
        losses={
            budget: measured[:, [column[bucket.name] for bucket in recipe.buckets_of(budget)]]
            for budget in recipe.budgets
        },
        unpruned=measured[:, 0],
        failed=failed,
    )


def _loss(waypoints: FloatArray, drive: KnownDrive) -> float:
    distance = np.linalg.norm(waypoints[:, :2] - drive.future_in_ego[:, :2], axis=1)
    return float(distance[drive.future_exists].mean())
