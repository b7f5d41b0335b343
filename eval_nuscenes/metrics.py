"""Open-loop planning metrics on nuScenes, by the name of their protocol, as the original code computes them.

Everything here lives in the 2-D LiDAR frame at t0: x right, y forward, metres, yaw counter-clockwise from +x,
so a car that drives straight ahead has yaw pi/2. Waypoints are where the LiDAR is 0.5, 1.0, … 3.0 s later.

The quirks of each protocol are kept on purpose, since a published number means what its code computed, and
`OpenLoopProtocol.quirks` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vla_autoprune.errors import InputError

HORIZONS_S = (1, 2, 3)
STEPS = 6
CELL_M = 0.5
GRID = 200
GRID_HALF_M = 50.0
VAD_REACH_M = (15.0, 30.0)
"""To the side and along; VAD's perception range."""

VEHICLES = frozenset(
    {
        "vehicle.car",
        "vehicle.truck",
        "vehicle.construction",
        "vehicle.bus.bendy",
        "vehicle.bus.rigid",
        "vehicle.trailer",
        "vehicle.motorcycle",
        "vehicle.bicycle",
    }
)
"""Categories behind the seven vehicle classes of the nuScenes detection task."""

PEDESTRIANS = frozenset(
    {
        "human.pedestrian.adult",
        "human.pedestrian.child",
        "human.pedestrian.construction_worker",
        "human.pedestrian.police_officer",
    }
)
"""Categories behind the detection task's pedestrian class."""

Waypoints = NDArray[np.float32]
Maps = NDArray[np.uint8]
Hits = NDArray[np.bool_]
PointMap = Callable[[NDArray[np.float64]], NDArray[np.float64]]
CollisionTest = Callable[[Waypoints], Hits]


@dataclass(frozen=True)
class TrackedBox:
    """One annotated road user at one time, in the LiDAR frame at t0.

    Attributes:
        category: full nuScenes category, such as vehicle.car.
        track: the same for the same road user at all times.
        lidar_points: LiDAR returns inside the box at its own time.
        seen: visible (more than the lowest level) at t0 or in the two keyframes before.
    """

    x: float
    y: float
    length: float
    width: float
    yaw: float
    category: str
    track: str
    lidar_points: int = 1
    seen: bool = True


@dataclass(frozen=True)
class OpenLoopTruth:
    """What really happened in the 3 s after a sample.

    Attributes:
        waypoints: [6, 2] float32 true positions; rows beyond the last keyframe are 0.
        exists: [7] whether the keyframes 0.0, 0.5, … 3.0 s after the sample exist in its scene.
        boxes: per keyframe (7, the first is t0) the road users, in the LiDAR frame at t0.
        past_keyframes: keyframes of the scene before the sample.
        lidar_to_rear_axle_m: how far the LiDAR sits in front of the rear axle.
    """

    waypoints: Waypoints
    exists: tuple[bool, ...]
    boxes: tuple[tuple[TrackedBox, ...], ...]
    past_keyframes: int = 2
    lidar_to_rear_axle_m: float = 0.985793

    @property
    def complete(self) -> bool:
        """All six future keyframes exist."""
        return all(self.exists)


@dataclass(frozen=True)
class Score:
    """One plan against the truth under one protocol.

    Attributes:
        counted: the sample takes part in the protocol's means.
        l2_m: [3] what the protocol reports at 1, 2, 3 s.
        collision: [3] share of colliding steps it reports at 1, 2, 3 s, as a fraction.
        distance_m: [6] distance per step, 0 where the keyframe is missing.
        hits: [6] steps that count as a collision.
        raw_hits: [6] steps where the planned ego box touches anything.
        truth_hits: [6] steps where the true ego box does, which the protocol therefore leaves out.
    """

    counted: bool
    l2_m: tuple[float, ...]
    collision: tuple[float, ...]
    distance_m: tuple[float, ...]
    hits: tuple[bool, ...]
    raw_hits: tuple[bool, ...]
    truth_hits: tuple[bool, ...]


@dataclass(frozen=True)
class OpenLoopProtocol:
    """A published way to score plans.

    Attributes:
        reporting: "at" reports the value of the step at 1, 2, 3 s; "mean" the mean of the steps up to there.
        summary: one sentence for a reader of the report.
        counter: which samples its means divide by, in one sentence.
        quirks: what its code does that one would not expect.
        counts: whether a sample takes part.
        collision_test: given the truth, the function that says which steps of a trajectory collide.
    """

    name: str
    reporting: Literal["at", "mean"]
    summary: str
    counter: str
    quirks: tuple[str, ...]
    counts: Callable[[OpenLoopTruth], bool]
    collision_test: Callable[[OpenLoopTruth], CollisionTest]

    def scorer(self, truth: OpenLoopTruth) -> Callable[[ArrayLike], Score]:
        """Prepare a sample once to score several plans on it.

        Args:
            truth: the sample's future.

        Returns:
            A function from [6, 2] waypoints in the LiDAR frame at t0 to their score. It leaves its argument
            as it is, unlike several originals, and raises InputError for another shape or values not finite.
        """
        counted = self.counts(truth)
        exists = np.asarray(truth.exists[1:], dtype=bool)
        true_waypoints = np.asarray(truth.waypoints, dtype=np.float32)
        collides = self.collision_test(truth) if counted else _never_collides
        truth_hits = collides(true_waypoints)

        def score(plan: ArrayLike) -> Score:
            waypoints = _checked(plan)
            distance = np.linalg.norm(waypoints - true_waypoints, axis=1) * exists
            raw = collides(waypoints)
            hits = raw & ~truth_hits
            return Score(
                counted=counted,
                l2_m=self._at_horizons(distance) if counted else (0.0,) * len(HORIZONS_S),
                collision=self._at_horizons(hits),
                distance_m=tuple(distance.tolist()),
                hits=tuple(hits.tolist()),
                raw_hits=tuple(raw.tolist()),
                truth_hits=tuple(truth_hits.tolist()),
            )

        return score

    def _at_horizons(self, per_step: NDArray[np.generic]) -> tuple[float, ...]:
        ends = [2 * seconds for seconds in HORIZONS_S]
        values = per_step.astype(np.float64)
        if self.reporting == "at":
            return tuple(float(values[end - 1]) for end in ends)
        return tuple(float(values[:end].mean()) for end in ends)


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


def _never_collides(waypoints: Waypoints) -> Hits:
    return np.zeros(len(waypoints), dtype=bool)


# The ego's cells at the origin: 4.084 m x 1.85 m, centred 0.5 m ahead of the LiDAR, as skimage fills them.
_EGO_ROWS, _EGO_COLUMNS = (
    index.ravel() for index in np.meshgrid(np.arange(97, 105), np.arange(98, 102), indexing="ij")
)


def _box_corners(boxes: Sequence[TrackedBox]) -> NDArray[np.float64]:
    """[n, 4, 2] corners in order around each box."""
    if not boxes:
        return np.zeros((0, 4, 2))
    x, y, length, width, yaw = np.array([(b.x, b.y, b.length, b.width, b.yaw) for b in boxes]).T
    along = np.stack([np.cos(yaw), np.sin(yaw)], axis=-1) * (length / 2)[:, None]
    across = np.stack([-np.sin(yaw), np.cos(yaw)], axis=-1) * (width / 2)[:, None]
    centre = np.stack([x, y], axis=-1)
    front, back = centre + along, centre - along
    return np.stack([front + across, front - across, back - across, back + across], axis=1)


def _occupancy(steps: Iterable[Sequence[TrackedBox]], to_columns_and_rows: PointMap) -> Maps:
    """Draw the boxes of each step, outline cells included.

    Args:
        steps: road users per step.
        to_columns_and_rows: from [n, 2] metres to (column, row) in metres from the grid's corner.

    Returns:
        [steps, 200, 200] of 0 and 1.
    """
    import cv2

    maps = []
    for boxes in steps:
        grid = np.zeros((GRID, GRID), dtype=np.uint8)
        for polygon in np.round(to_columns_and_rows(_box_corners(boxes)) / CELL_M).astype(np.int32):
            cv2.fillPoly(grid, [polygon], (1,))
        maps.append(grid)
    return np.stack(maps)


def _touches(maps: Maps, rows: Waypoints, columns: Waypoints) -> Hits:
    """[steps] whether any of the ego's [steps, cells] is taken; cells truncate, and clip to the border."""
    row = np.clip(rows.astype(np.int32), 0, GRID - 1)
    column = np.clip(columns.astype(np.int32), 0, GRID - 1)
    return maps[np.arange(len(maps))[:, None], row, column].any(axis=1)


def _uniad_test(truth: OpenLoopTruth) -> CollisionTest:
    annotated = [[box for box in boxes if box.category in VEHICLES] for boxes in truth.boxes[1:]]
    maps = _occupancy(annotated, lambda corners: corners + GRID_HALF_M)
    maps[~np.asarray(truth.exists[1:], dtype=bool)] = 255

    def collides(waypoints: Waypoints) -> Hits:
        cells = waypoints / np.float32(CELL_M)
        return _touches(maps, _EGO_ROWS + cells[:, 1:], _EGO_COLUMNS + cells[:, :1])

    return collides


def _stp3_test(truth: OpenLoopTruth) -> CollisionTest:
    annotated = [
        [box for box in boxes if box.seen and box.category.startswith(("vehicle.", "human."))]
        for boxes in truth.boxes[1:]
    ]

    def to_grid(corners: NDArray[np.float64]) -> NDArray[np.float64]:
        # The rear-axle frame (x forward, y left), while the trajectory below stays in the LiDAR frame.
        forward, left = corners[..., 1] + truth.lidar_to_rear_axle_m, -corners[..., 0]
        return np.stack([left, forward], axis=-1) + GRID_HALF_M

    maps = _occupancy(annotated, to_grid)

    def collides(waypoints: Waypoints) -> Hits:
        cells = waypoints / np.float32(CELL_M)
        return _touches(maps, _EGO_ROWS + cells[:, 1:], _EGO_COLUMNS - cells[:, :1])

    return collides


def _vad_test(truth: OpenLoopTruth, reach_m: tuple[float, float]) -> CollisionTest:
    scored = VEHICLES | PEDESTRIANS
    rolled = [
        box
        for box in truth.boxes[0]
        if box.category in scored
        and box.lidar_points > 0
        and abs(box.x) < reach_m[0]
        and abs(box.y) < reach_m[1]
    ]
    steps = []
    for boxes in truth.boxes[1:]:
        now = {box.track: box for box in boxes}
        # A track ends for good at its first gap, and keeps the size it had at t0.
        rolled = [
            replace(now[box.track], length=box.length, width=box.width) for box in rolled if box.track in now
        ]
        steps.append(rolled)

    def to_grid(corners: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack([corners[..., 0] + GRID_HALF_M, GRID_HALF_M - corners[..., 1]], axis=-1)

    maps = _occupancy(steps, to_grid)

    def collides(waypoints: Waypoints) -> Hits:
        cells = waypoints / np.float32(CELL_M)
        return _touches(maps, GRID - (_EGO_ROWS + cells[:, 1:]), _EGO_COLUMNS + cells[:, :1])

    return collides


PROTOCOLS: dict[str, OpenLoopProtocol] = {
    protocol.name: protocol
    for protocol in (
        OpenLoopProtocol(
            name="uniad",
            reporting="at",
            summary="UniAD: distance and collision of the single step at 1, 2 and 3 s; vehicles only.",
            counter="divides by all samples; steps past the end of a scene add zero and still count",
            quirks=(
                "the ego box never turns with the trajectory",
                "road users are drawn 0.25 m to the right and ahead of where the ego box is tested",
                "steps where the true ego box touches a vehicle, or past the scene's end, cannot collide "
                "but stay in the denominator",
                "waypoints farther than 50 m are tested on the border of the grid",
            ),
            counts=lambda truth: True,
            collision_test=_uniad_test,
        ),
        OpenLoopProtocol(
            name="stp3",
            reporting="mean",
            summary="ST-P3: mean over the steps up to 1, 2 and 3 s; vehicles and people.",
            counter="divides by the samples with two keyframes before and six after them in their scene",
            quirks=(
                "road users are drawn from the rear axle while the trajectory starts at the LiDAR: they sit "
                "about a metre too far ahead",
                "only road users already seen by t0 count",
                "the ego box never turns with the trajectory",
            ),
            counts=lambda truth: truth.complete and truth.past_keyframes >= 2,
            collision_test=_stp3_test,
        ),
        OpenLoopProtocol(
            name="vad",
            reporting="mean",
            summary="VAD: mean over the steps up to 1, 2 and 3 s; vehicles and people near the ego at t0.",
            counter="divides by the samples with six keyframes after them in their scene",
            quirks=(
                "only road users seen by LiDAR at t0 within 15 m to the side and 30 m ahead or behind count, "
                "not those who appear later",
                "a road user whose track has a gap vanishes from there on",
                "the ego box never turns with the trajectory",
            ),
            counts=lambda truth: truth.complete,
            collision_test=lambda truth: _vad_test(truth, VAD_REACH_M),
        ),
        OpenLoopProtocol(
            name="vad_unfiltered",
            reporting="mean",
            summary="VAD without its range filter: all road users annotated at t0.",
            counter="divides by the samples with six keyframes after them in their scene",
            quirks=("as vad, without the limit of 15 m and 30 m",),
            counts=lambda truth: truth.complete,
            collision_test=lambda truth: _vad_test(truth, (np.inf, np.inf)),
        ),
    )
}
"""Every protocol by name."""
