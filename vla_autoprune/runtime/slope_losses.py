"""What every slope of every budget costs on known drives: the data a complexity mapping is fitted on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla_autoprune.errors import PlanError
from vla_autoprune.frame import FloatArray, Frame
from vla_autoprune.runtime.planner import Planner

HOPELESS = 10
"""Frames without a plan in any bucket, from the first on, after which no more are tried."""


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
        without_future: frames left out because the drive ends with them.
        without_plan: frames left out because some bucket's answer was no plan.
        no_plan_in: how many of those each bucket had no plan for.
        first_failure: what was wrong with the first such answer.
    """

    tokens: tuple[str, ...]
    scenes: tuple[str, ...]
    complexities: NDArray[np.float64]
    losses: dict[float, NDArray[np.float64]]
    unpruned: NDArray[np.float64]
    without_future: int
    without_plan: int
    no_plan_in: Mapping[str, int]
    first_failure: str | None

    @property
    def left_out(self) -> str:
        """How many frames were left out, and why."""
        said = f"{self.without_future + self.without_plan} left out"
        if self.without_plan:
            where = ", ".join(f"{bucket} {count}" for bucket, count in self.no_plan_in.items())
            said += f", {self.without_plan} of them without a plan ({where}); the first: {self.first_failure}"
        return said


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

    Raises:
        PlanError: the first `HOPELESS` frames have no plan in any bucket.
    """
    recipe = planner.recipe
    tokens: list[str] = []
    scenes, complexities, rows = [], [], []
    without_future = without_plan = 0
    no_plan_in: Counter[str] = Counter()
    first_failure: str | None = None
    for done, drive in enumerate(drives):
        if progress is not None:
            progress(done)
        if not drive.future_exists.any():
            without_future += 1
            continue
        plans = []
        for bucket in recipe.buckets:
            try:
                plans.append(planner.plan_in_bucket(drive.frame, bucket.name))
            except PlanError as error:
                no_plan_in[bucket.name] += 1
                first_failure = first_failure or str(error)
        if len(plans) < len(recipe.buckets):
            without_plan += 1
            if not tokens and no_plan_in.total() == HOPELESS * len(recipe.buckets):
                raise PlanError(
                    f"none of the first {HOPELESS} frames has a plan in any of {len(recipe.buckets)} "
                    f"buckets, the first because {first_failure}"
                )
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
        without_future=without_future,
        without_plan=without_plan,
        no_plan_in=dict(no_plan_in),
        first_failure=first_failure,
    )


def _loss(waypoints: FloatArray, drive: KnownDrive) -> float:
    distance = np.linalg.norm(waypoints[:, :2] - drive.future_in_ego[:, :2], axis=1)
    return float(distance[drive.future_exists].mean())
