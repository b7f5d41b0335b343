"""The protocols on half-metre cells: UniAD, ST-P3, VAD, and the GPT-Driver family, which reads their maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from eval_nuscenes.metrics.drawing import Maps, draw
from eval_nuscenes.metrics.protocol import OpenLoopProtocol, StepTest, all_steps, if_complete
from eval_nuscenes.metrics.truth import (
    PEDESTRIANS,
    VEHICLES,
    BoxesOfSteps,
    Mask,
    OpenLoopTruth,
    Points,
    Waypoints,
    rectangles,
)

CELL_M = 0.5
GRID = 200
GRID_HALF_M = 50.0
VAD_REACH_M = (15.0, 30.0)
"""To the side and along; VAD's perception range."""
NO_REACH_M = (np.inf, np.inf)

PointMap = Callable[[Points], Points]

# The ego's cells at the origin: 4.084 m x 1.85 m, centred 0.5 m ahead of the LiDAR, as skimage fills them.
_EGO_ROWS, _EGO_COLUMNS = (
    index.ravel() for index in np.meshgrid(np.arange(97, 105), np.arange(98, 102), indexing="ij")
)


def _occupancy(boxes: BoxesOfSteps, to_columns_and_rows: PointMap) -> Maps:
    """Draw the boxes of each step, outline cells included.

    Args:
        boxes: what to draw.
        to_columns_and_rows: from metres to (column, row) in metres from the grid's corner.

    Returns:
        [6, 200, 200] of 0 and 1.
    """
    cells = np.round(to_columns_and_rows(boxes.corners) / CELL_M).astype(np.int32)
    return draw(cells, boxes.steps, GRID)


def _touches(maps: Maps, rows: Waypoints, columns: Waypoints) -> Mask:
    """[steps] whether any of the ego's [steps, cells] is taken; cells truncate, and clip to the border."""
    row = np.clip(rows.astype(np.int32), 0, GRID - 1)
    column = np.clip(columns.astype(np.int32), 0, GRID - 1)
    return maps[np.arange(len(maps))[:, None], row, column].any(axis=1)


def _on(maps: Maps, side: int, waypoints: Waypoints) -> Mask:
    """Look the ego's cells up; side -1 where the code negates x."""
    cells = waypoints / np.float32(CELL_M)
    return _touches(maps, _EGO_ROWS + cells[:, 1:], _EGO_COLUMNS + side * cells[:, :1])


def _uniad_maps(truth: OpenLoopTruth) -> Maps:
    vehicles = truth.future_corners(lambda box: box.category in VEHICLES)
    maps = _occupancy(vehicles, lambda corners: corners + GRID_HALF_M)
    maps[~truth.future_exists] = 255
    return maps


def _uniad_test(truth: OpenLoopTruth) -> StepTest:
    return partial(_on, _uniad_maps(truth), 1)


def _mirrored_uniad_test(truth: OpenLoopTruth) -> StepTest:
    return partial(_on, _uniad_maps(truth)[:, :, ::-1], -1)


def _stp3_test(truth: OpenLoopTruth) -> StepTest:
    seen = truth.future_corners(lambda box: box.seen and box.category.startswith(("vehicle.", "human.")))

    def to_grid(corners: Points) -> Points:
        # The rear-axle frame (x forward, y left), while the trajectory stays in the LiDAR frame.
        forward, left = corners[..., 1] + truth.lidar_to_rear_axle_m, -corners[..., 0]
        return np.stack([left, forward], axis=-1) + GRID_HALF_M

    return partial(_on, _occupancy(seen, to_grid), -1)


def _vad_maps(truth: OpenLoopTruth, reach_m: tuple[float, float]) -> Maps:
    """Rows run backwards here: the first is the farthest ahead."""
    scored = VEHICLES | PEDESTRIANS
    rolled = [
        box
        for box in truth.boxes[0]
        if box.category in scored
        and box.lidar_points > 0
        and abs(box.x) < reach_m[0]
        and abs(box.y) < reach_m[1]
    ]
    table, steps = [], []
    for step, boxes in enumerate(truth.boxes[1:]):
        now = {box.track: box for box in boxes} if rolled else {}
        # A track ends for good at its first gap, and keeps the size it had at t0.
        rolled = [box for box in rolled if box.track in now]
        steps += [step] * len(rolled)
        for box in rolled:
            later = now[box.track]
            table.append((later.x, later.y, later.yaw, box.length, box.width))
    corners = rectangles(*np.array(table).reshape(-1, 5).T)

    def to_grid(corners: Points) -> Points:
        return np.stack([corners[..., 0] + GRID_HALF_M, GRID_HALF_M - corners[..., 1]], axis=-1)

    return _occupancy(BoxesOfSteps(corners, np.array(steps, dtype=np.intp)), to_grid)


def _vad_test(truth: OpenLoopTruth, reach_m: tuple[float, float]) -> StepTest:
    maps = _vad_maps(truth, reach_m)

    def collides(waypoints: Waypoints) -> Mask:
        cells = waypoints / np.float32(CELL_M)
        return _touches(maps, GRID - (_EGO_ROWS + cells[:, 1:]), _EGO_COLUMNS + cells[:, :1])

    return collides


def _flipped_vad_test(truth: OpenLoopTruth) -> StepTest:
    return partial(_on, _vad_maps(truth, NO_REACH_M)[:, ::-1, ::-1], -1)


def _stp3_steps(truth: OpenLoopTruth) -> Mask:
    return if_complete(truth) & (truth.past_keyframes >= 2) & (not truth.can_bus_blacklisted)


_SHIFTED = "road users are drawn 0.25 m to the right and ahead of where the ego box is tested"
_NEVER_TURNS = "the ego box never turns with the trajectory"
_BORDER = "waypoints farther than 50 m are tested on the border of the grid"
_ALL_SAMPLES = "divides by all samples; steps past the end of a scene add zero and still count"
_COMPLETE = "divides by the samples with six keyframes after them in their scene"
_TRUTH_LEFT_OUT = (
    "steps where the true ego box touches a road user cannot collide but stay in the denominator"
)

UNIAD = OpenLoopProtocol(
    name="uniad",
    reporting="at",
    collision_reporting="at",
    summary="UniAD: distance and collision of the single step at 1, 2 and 3 s; vehicles only.",
    counter=_ALL_SAMPLES,
    quirks=(
        _NEVER_TURNS,
        _SHIFTED,
        "steps where the true ego box touches a vehicle, or past the scene's end, cannot collide "
        "but stay in the denominator",
        _BORDER,
    ),
    steps_counted=all_steps,
    collision_test=_uniad_test,
)
STP3 = OpenLoopProtocol(
    name="stp3",
    reporting="mean",
    collision_reporting="mean",
    summary="ST-P3: mean over the steps up to 1, 2 and 3 s; vehicles and people.",
    counter="divides by the samples with two keyframes before and six after them in their scene",
    quirks=(
        "road users are drawn from the rear axle while the trajectory starts at the LiDAR: they sit "
        "about a metre too far ahead",
        "road users are drawn 0.25 m to the left and ahead of where the ego box is tested",
        "only road users already seen by t0 count",
        "scenes on its list of bad CAN buses are left out",
        _NEVER_TURNS,
        _TRUTH_LEFT_OUT,
        _BORDER,
    ),
    steps_counted=_stp3_steps,
    collision_test=_stp3_test,
)
VAD = OpenLoopProtocol(
    name="vad",
    reporting="mean",
    collision_reporting="mean",
    summary="VAD: mean over the steps up to 1, 2 and 3 s; vehicles and people near the ego at t0.",
    counter=_COMPLETE,
    quirks=(
        "only road users seen by LiDAR at t0 within 15 m to the side and 30 m ahead or behind count, "
        "not those who appear later",
        "a road user whose track has a gap vanishes from there on",
        _SHIFTED,
        _NEVER_TURNS,
        _TRUTH_LEFT_OUT,
        _BORDER,
    ),
    steps_counted=if_complete,
    collision_test=partial(_vad_test, reach_m=VAD_REACH_M),
)
VAD_UNFILTERED = replace(
    VAD,
    name="vad_unfiltered",
    summary="VAD without its range filter: all road users annotated at t0.",
    quirks=("as vad, without the limit of 15 m and 30 m",),
    collision_test=partial(_vad_test, reach_m=NO_REACH_M),
)
AGENTDRIVER_UNIAD = replace(
    UNIAD,
    name="agentdriver_uniad",
    summary="Agent-Driver's and GPT-Driver's UniAD table: the same figures as uniad.",
)
AGENTDRIVER_STP3 = OpenLoopProtocol(
    name="agentdriver_stp3",
    reporting="mean",
    collision_reporting="mean",
    summary="Agent-Driver's and GPT-Driver's ST-P3 table: mean up to 1, 2 and 3 s; VAD's road users.",
    counter=_ALL_SAMPLES,
    quirks=(
        "not ST-P3: it draws the road users of vad_unfiltered, flips the map in both axes and mirrors the "
        "trajectory, which moves everything by one cell",
        "steps past the end of a scene lower the mean",
        _NEVER_TURNS,
        _TRUTH_LEFT_OUT,
        _BORDER,
    ),
    steps_counted=all_steps,
    collision_test=_flipped_vad_test,
)
OPENDRIVEVLA_VEHICLE = replace(
    UNIAD,
    name="opendrivevla_vehicle",
    summary="OpenDriveVLA's default: UniAD's map of vehicles, mirrored; the single step at 1, 2 and 3 s.",
    quirks=(
        "UniAD's map is flipped left to right and the trajectory mirrored, which moves road users by one "
        "cell against uniad",
        "its program prints an ST-P3 table from this map as well, without the people ST-P3 has",
        _NEVER_TURNS,
        _TRUTH_LEFT_OUT,
        _BORDER,
    ),
    collision_test=_mirrored_uniad_test,
)
OPENDRIVEVLA_VEHICLE_PED = replace(
    AGENTDRIVER_STP3,
    name="opendrivevla_vehicle_ped",
    summary="OpenDriveVLA with people (only_vehicle=False): the same figures as agentdriver_stp3.",
)
