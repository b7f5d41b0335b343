"""BEV-Planner's protocol: cells of a tenth of a metre, an ego box that turns, collisions and road edges."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eval_nuscenes.metrics.drawing import draw
from eval_nuscenes.metrics.protocol import OpenLoopProtocol, StepTest, if_complete
from eval_nuscenes.metrics.truth import STEPS, VEHICLES, Mask, OpenLoopTruth, Points, Waypoints

CELL_M = np.float32(0.1)
FIRST_CELL_M = np.float32(-49.95)
GRID = 1000
TURNS_FROM_M = 1.0

# The ego's cells at the origin, forward and left: 4.084 m x 1.85 m, centred 0.5 + 0.985793 m ahead of the
# rear axle, as skimage fills them; relative to the rear axle's own, fractional, cell.
_ORIGIN_CELL = FIRST_CELL_M / CELL_M
_EGO_CELLS = (
    np.stack(np.meshgrid(np.arange(494, 535), np.arange(491, 509), indexing="ij"), axis=-1).reshape(-1, 2)
    + _ORIGIN_CELL
)


def _ego_cells(waypoints: Waypoints) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """[6, cells] forward and left cells of the ego along rear-axle waypoints (x right, y forward)."""
    path = np.stack([waypoints[:, 1], -waypoints[:, 0]], axis=1)
    moves = np.diff(path, axis=0, prepend=np.zeros((1, 2), dtype=np.float32))
    headings = np.arctan2(moves[:, 1], moves[:, 0])
    headings[np.linalg.norm(moves, axis=1) < TURNS_FROM_M] = 0
    cos, sin = np.cos(headings), np.sin(headings)
    turns = np.stack([np.stack([cos, sin], axis=-1), np.stack([-sin, cos], axis=-1)], axis=1)
    turned = np.round(_EGO_CELLS @ turns - _ORIGIN_CELL)
    cells = np.clip(((path / CELL_M)[:, None] + turned).astype(np.int32), 0, GRID - 1)
    return cells[..., 0], cells[..., 1]


def _to_cells(points_in_lidar: Points, truth: OpenLoopTruth) -> Points:
    """(forward, left) cells, not yet truncated, in the rear-axle frame."""
    forward, left = points_in_lidar[..., 1] + truth.lidar_to_rear_axle_m, -points_in_lidar[..., 0]
    metres = np.stack([forward, left], axis=-1).astype(np.float32)
    return (metres - FIRST_CELL_M) / CELL_M


def _box_test(truth: OpenLoopTruth) -> StepTest:
    measured = truth.future_corners(
        lambda box: box.category in VEHICLES and box.lidar_points + box.radar_points > 0
    )
    maps = draw(_to_cells(measured.corners, truth).astype(np.int32), measured.steps, GRID)

    def collides(waypoints: Waypoints) -> Mask:
        forward, left = _ego_cells(waypoints)
        return maps[np.arange(STEPS)[:, None], left, forward].any(axis=1)

    return collides


def _edge_test(truth: OpenLoopTruth) -> StepTest:
    import cv2

    edges = np.zeros((GRID, GRID), dtype=np.uint8)
    lines = [np.clip(_to_cells(line, truth), 0, GRID - 1).astype(np.int32) for line in truth.road_edges or ()]
    cv2.polylines(edges, lines, isClosed=False, color=(1,))

    def crosses(waypoints: Waypoints) -> Mask:
        forward, left = _ego_cells(waypoints)
        return edges[left, forward].any(axis=1)

    return crosses


BEVPLANNER = OpenLoopProtocol(
    name="bevplanner",
    reporting="mean",
    collision_reporting="any",
    summary="BEV-Planner: mean distance, and whether any step up to 1, 2 and 3 s hits a vehicle or the edge "
    "of the road (its CCR, also called intersection rate).",
    counter="divides by the samples with six keyframes after them in their scene",
    quirks=(
        "waypoints are of the rear axle, not the LiDAR",
        "the ego box turns with each step by itself, but points straight ahead at steps shorter than 1 m",
        "a road edge, however long, is drawn straight between 20 of its points, in lines of single cells",
        "edges are those within 51 m ahead and behind and 25 m to the sides of the car at t0, and everything "
        "farther than 50 m is tested on the border of the grid",
        "steps where the true ego box touches a vehicle or an edge cannot count as touching one",
    ),
    steps_counted=if_complete,
    collision_test=_box_test,
    intersection_test=_edge_test,
    follows="rear_axle",
)
