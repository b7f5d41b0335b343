"""How a protocol turns steps into figures, and a plan into a score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eval_nuscenes.metrics.truth import STEPS, Mask, OpenLoopTruth, Waypoints
from vla_autoprune.errors import InputError

HORIZONS_S = (1, 2, 3)
EGO_LENGTH_M, EGO_WIDTH_M = 4.084, 1.85
EGO_CENTRE_AHEAD_M = 0.5
"""The ego box's centre lies this far ahead of the LiDAR, in every protocol."""

StepTest = Callable[[Waypoints], Mask]
"""From [6, 2] waypoints to the [6] steps that touch something."""

Reporting = Literal["at", "mean", "any"]

_HORIZON_ENDS = tuple(2 * seconds for seconds in HORIZONS_S)


@dataclass(frozen=True)
class Score:
    """One plan against the truth under one protocol.

    Attributes:
        counted: the sample takes part in the protocol's means at all.
        steps_counted: [6] steps that take part.
        l2_m: [3] what the protocol reports at 1, 2, 3 s; 0 where not counted.
        collision: [3] share of colliding steps it reports at 1, 2, 3 s, as a fraction.
        distance_m: [6] distance per step, 0 where the keyframe is missing.
        hits: [6] steps that count as a collision.
        raw_hits: [6] steps where the planned ego box touches anything.
        truth_hits: [6] steps where the true ego box does, which the protocol therefore leaves out.
        intersection: [3] as `collision` for road edges; None where the protocol has no such figure.
        edge_raw_hits: [6] steps where the planned ego box touches a road edge; empty without that figure.
        edge_truth_hits: [6] steps where the true ego box does.
    """

    counted: bool
    steps_counted: tuple[bool, ...]
    l2_m: tuple[float, ...]
    collision: tuple[float, ...]
    distance_m: tuple[float, ...]
    hits: tuple[bool, ...]
    raw_hits: tuple[bool, ...]
    truth_hits: tuple[bool, ...]
    intersection: tuple[float, ...] | None = None
    edge_raw_hits: tuple[bool, ...] = ()
    edge_truth_hits: tuple[bool, ...] = ()

    @property
    def counted_at(self) -> tuple[bool, ...]:
        """[3] whether the figures at 1, 2, 3 s take part in the protocol's means."""
        return tuple(self.steps_counted[end - 1] for end in _HORIZON_ENDS)


@dataclass(frozen=True)
class OpenLoopProtocol:
    """A way to score plans.

    Attributes:
        reporting: what is reported of L2 at 1, 2, 3 s: "at" the value of that step, "mean" the mean of the
            steps up to there.
        collision_reporting: likewise of collisions; "any" is 1 if any step up to there collides.
        summary: one sentence for a reader of the report.
        counter: which samples its means divide by, in one sentence.
        quirks: what its code does that one would not expect.
        steps_counted: which of a sample's six steps take part.
        collision_test: given the truth, the function that says which steps of a trajectory collide.
        intersection_test: likewise for road edges; None where the protocol has no such figure.
        follows: the point on the car that its trajectories are of.
    """

    name: str
    reporting: Literal["at", "mean"]
    collision_reporting: Reporting
    summary: str
    counter: str
    quirks: tuple[str, ...]
    steps_counted: Callable[[OpenLoopTruth], Mask]
    collision_test: Callable[[OpenLoopTruth], StepTest]
    intersection_test: Callable[[OpenLoopTruth], StepTest] | None = None
    follows: Literal["lidar", "rear_axle"] = "lidar"

    @property
    def reports(self) -> str:
        """What its figures at N s are, in a few words."""
        words = {"at": "the step at N s", "mean": "mean up to N s", "any": "any up to N s"}
        if self.reporting == self.collision_reporting:
            return words[self.reporting]
        return f"{words[self.reporting]}, collision {words[self.collision_reporting]}"

    @property
    def needs_map(self) -> bool:
        """Its truth must hold road edges (`NuScenesSplit(..., road_edges=True)`)."""
        return self.intersection_test is not None

    def scorer(self, truth: OpenLoopTruth) -> Callable[[ArrayLike], Score]:
        """Prepare a sample once to score several plans on it.

        Args:
            truth: the sample's future.

        Returns:
            A function from [6, 2] waypoints to their score: positions of what the protocol `follows`, x
            right and y forward of where that is at t0 (`Sample.scorer` takes plans in the ego frame). It
            leaves its argument as it is, unlike several originals, and raises InputError for another shape
            or values not finite.

        Raises:
            InputError: the truth lacks annotations, or road edges or rear-axle waypoints that the protocol
                needs.
        """
        if not truth.annotated:
            raise InputError(
                "the data set has no annotations, so no collision can be seen; score on a version that has "
                "them, such as v1.0-trainval"
            )
        if self.needs_map and truth.road_edges is None:
            raise InputError(
                f"protocol {self.name} needs road edges, and the truth was read without a map; "
                "open the data with road_edges=True, or leave the protocol out"
            )
        steps_counted = self.steps_counted(truth)
        counted = bool(steps_counted.any())
        collides = self.collision_test(truth) if counted else _touches_nothing
        crosses = self.intersection_test(truth) if counted and self.intersection_test else _touches_nothing
        true_waypoints = self._true_waypoints(truth)
        truth_hits, edge_truth_hits = collides(true_waypoints), crosses(true_waypoints)

        def score(plan: ArrayLike) -> Score:
            waypoints = _checked(plan)
            distance = np.linalg.norm(waypoints - true_waypoints, axis=1) * truth.future_exists
            raw, edge_raw = collides(waypoints), crosses(waypoints)
            hits = raw & ~truth_hits
            result = Score(
                counted=counted,
                steps_counted=tuple(steps_counted.tolist()),
                l2_m=_at_horizons(distance * steps_counted, self.reporting),
                collision=_at_horizons(hits, self.collision_reporting),
                distance_m=tuple(distance.tolist()),
                hits=tuple(hits.tolist()),
                raw_hits=tuple(raw.tolist()),
                truth_hits=tuple(truth_hits.tolist()),
            )
            if not self.needs_map:
                return result
            return replace(
                result,
                intersection=_at_horizons(edge_raw & ~edge_truth_hits, self.collision_reporting),
                edge_raw_hits=tuple(edge_raw.tolist()),
                edge_truth_hits=tuple(edge_truth_hits.tolist()),
            )

        return score

    def _true_waypoints(self, truth: OpenLoopTruth) -> Waypoints:
        if self.follows == "lidar":
            return np.asarray(truth.waypoints, dtype=np.float32)
        if truth.rear_axle_waypoints is None:
            raise InputError(
                f"protocol {self.name} follows the rear axle, and the truth holds no rear_axle_waypoints"
            )
        return np.asarray(truth.rear_axle_waypoints, dtype=np.float32)


def all_steps(truth: OpenLoopTruth) -> Mask:
    """Every sample counts with all its steps, whether they exist or not."""
    return np.ones(STEPS, dtype=bool)


def if_complete(truth: OpenLoopTruth) -> Mask:
    """A sample counts whole, if all six future keyframes exist."""
    return np.full(STEPS, truth.complete)


def _at_horizons(per_step: NDArray[np.generic], reporting: Reporting) -> tuple[float, ...]:
    values = per_step.astype(np.float64)
    if reporting == "at":
        return tuple(float(values[end - 1]) for end in _HORIZON_ENDS)
    if reporting == "mean":
        return tuple(float(values[:end].mean()) for end in _HORIZON_ENDS)
    return tuple(float(values[:end].max()) for end in _HORIZON_ENDS)


def _checked(plan: ArrayLike) -> Waypoints:
    waypoints = np.asarray(plan, dtype=np.float32)
    if waypoints.shape != (STEPS, 2):
        raise InputError(
            f"a plan to score is [{STEPS}, 2] waypoints at 0.5 … 3.0 s, not {list(waypoints.shape)}"
        )
    if not np.isfinite(waypoints).all():
        step = int(np.flatnonzero(~np.isfinite(waypoints).all(axis=1))[0])
        raise InputError(
            f"waypoint {step} of the plan is {waypoints[step].tolist()}; waypoints must be finite"
        )
    return waypoints


def _touches_nothing(waypoints: Waypoints) -> Mask:
    return np.zeros(len(waypoints), dtype=bool)
