"""A simulated lidar sweep over boxes, walls and ground: the points on each box, and how much of it is seen.

Exact intersections, no noise: one spin happens at once, beams stop at the first surface, the ground is z = 0.
Geometry is in the ego frame (x forward, y left, z up, origin at the rear axle on the ground); point clouds
are in the lidar frame of nuScenes (x right, y forward, z up).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LIDAR_TRANSLATION = (0.94, 0.0, 1.84)
"""Where the sensor sits in the ego frame, metres."""
LIDAR_ROTATION = (0.5**0.5, 0.0, 0.0, -(0.5**0.5))
"""Quaternion w, x, y, z from the lidar frame to the ego frame: a quarter turn about z."""

RING_ELEVATIONS = np.radians(np.linspace(-30.67, 10.67, 32))
AZIMUTHS = 360
RANGE_M = 80.0

_INTENSITY = {"ground": 12.0, "box": 55.0, "wall": 30.0}
_GOLDEN_RATIO = 0.6180339887498949
_FRACTIONS = np.stack(
    np.meshgrid([-0.4, -0.15, 0.15, 0.4], [-0.35, 0.35], [-0.35, 0.0, 0.4], indexing="ij"), axis=-1
).reshape(-1, 3)
"""Test points inside a box, as fractions of length, width and height from its centre."""


@dataclass(frozen=True)
class Surroundings:
    """What beams can hit.

    Attributes:
        boxes: [B, 7] x, y, z of the centre, length, width, height in metres, heading in radians.
        walls: [W, 5] x, y of one foot, x, y of the other, height.
    """

    boxes: NDArray[np.float64]
    walls: NDArray[np.float64]


@dataclass(frozen=True)
class Sweep:
    """One spin of the lidar.

    Attributes:
        points: [P, 5] float32 x, y, z in the lidar frame, intensity 0..255, ring: what .pcd.bin files hold.
        points_on_box: [B] how many of them lie on each box.
    """

    points: NDArray[np.float32]
    points_on_box: NDArray[np.int64]


def sweep(around: Surroundings, spin: int = 0) -> Sweep:
    """Cast 32 rings of 360 beams.

    Args:
        around: what can be hit.
        spin: counts the sweeps of a drive; turns the beams by a fraction of their spacing, so that a narrow,
            distant object is not missed in every sweep.

    Returns:
        The points of all beams that hit something within 80 m.
    """
    azimuth = (np.arange(AZIMUTHS) + (spin * _GOLDEN_RATIO) % 1.0) * (2 * np.pi / AZIMUTHS)
    slope = np.tan(RING_ELEVATIONS)
    # A beam is followed by its horizontal distance from the sensor, so that azimuth and elevation separate.
    into_box, out_of_box = _box_crossings(around.boxes, azimuth)
    in_reach = np.flatnonzero(((into_box < out_of_box) & (into_box < RANGE_M)).any(axis=0))
    boxes, into_box, out_of_box = around.boxes[in_reach], into_box[:, in_reach], out_of_box[:, in_reach]
    bottom = boxes[:, 2] - boxes[:, 5] / 2 - LIDAR_TRANSLATION[2]
    top = boxes[:, 2] + boxes[:, 5] / 2 - LIDAR_TRANSLATION[2]
    at_bottom, at_top = bottom[None] / slope[:, None], top[None] / slope[:, None]
    entry = np.maximum(into_box[:, None], np.minimum(at_bottom, at_top)[None])
    leave = np.minimum(out_of_box[:, None], np.maximum(at_bottom, at_top)[None])
    to_box = np.where((entry < leave) & (entry > 0), entry, np.inf)

    to_wall = _wall_crossings(around.walls, azimuth)
    walls_in_reach = np.flatnonzero((to_wall < RANGE_M).any(axis=0))
    to_wall, wall_height = to_wall[:, None, walls_in_reach], around.walls[walls_in_reach, 4]
    above_ground = LIDAR_TRANSLATION[2] + np.where(np.isfinite(to_wall), to_wall, 0.0) * slope[None, :, None]
    to_wall = np.where(above_ground < wall_height, to_wall, np.inf).min(axis=2, initial=np.inf)
    with np.errstate(divide="ignore"):
        to_ground = np.where(slope < 0, -LIDAR_TRANSLATION[2] / slope, np.inf)
    to_ground = np.broadcast_to(to_ground, to_wall.shape)

    nearest_box = to_box.min(axis=2, initial=np.inf)
    distance = np.minimum(np.minimum(nearest_box, to_wall), to_ground)
    on_box = np.isfinite(distance) & (nearest_box == distance)
    seen = distance / np.cos(RING_ELEVATIONS) <= RANGE_M
    hits = np.zeros(len(around.boxes), dtype=np.int64)
    if len(in_reach):
        hits[in_reach] = np.bincount(to_box.argmin(axis=2)[on_box & seen], minlength=len(in_reach))

    which_azimuth, ring = np.nonzero(seen)
    reach = distance[seen]
    off_box = np.where(to_wall == distance, _INTENSITY["wall"], _INTENSITY["ground"])
    intensity = np.where(on_box, _INTENSITY["box"], off_box)
    points = np.stack(
        [
            -reach * np.sin(azimuth[which_azimuth]),
            reach * np.cos(azimuth[which_azimuth]),
            reach * slope[ring],
            intensity[seen],
            ring,
        ],
        axis=1,
    )
    return Sweep(points.astype(np.float32), hits)


def visible_fraction(around: Surroundings) -> NDArray[np.float64]:
    """How much of each box can be seen from the roof of the ego vehicle: [B] fractions 0..1.

    Sight lines go from the lidar to points spread through each box; one is blocked where another box or a
    wall stands before it. The cameras sit around the lidar and look everywhere, so it stands for them too.
    """
    boxes, count = around.boxes, len(_FRACTIONS)
    if not len(boxes):
        return np.zeros(0)
    along, across, up = np.moveaxis(_FRACTIONS[None] * boxes[:, None, 3:6], -1, 0)
    cos, sin = np.cos(boxes[:, 6:7]), np.sin(boxes[:, 6:7])
    targets = np.stack([cos * along - sin * across, sin * along + cos * across, up], axis=-1)
    lines = (boxes[:, None, :3] + targets - LIDAR_TRANSLATION).reshape(-1, 3)
    reach = np.hypot(lines[:, 0], lines[:, 1])
    slope = lines[:, 2] / np.maximum(reach, 1e-9)
    azimuth = np.arctan2(lines[:, 1], lines[:, 0])

    entry, leave = _box_crossings(boxes, azimuth)
    with np.errstate(divide="ignore", invalid="ignore"):
        at_bottom = (boxes[:, 2] - boxes[:, 5] / 2 - LIDAR_TRANSLATION[2]) / slope[:, None]
        at_top = (boxes[:, 2] + boxes[:, 5] / 2 - LIDAR_TRANSLATION[2]) / slope[:, None]
    entry = np.maximum(entry, np.minimum(at_bottom, at_top))
    leave = np.minimum(leave, np.maximum(at_bottom, at_top))
    blocked = (entry < leave) & (leave > 0) & (entry < reach[:, None])
    owner = np.repeat(np.arange(len(boxes)), count)
    blocked[np.arange(len(owner)), owner] = False
    to_wall = _wall_crossings(around.walls, azimuth)
    above_ground = LIDAR_TRANSLATION[2] + np.where(np.isfinite(to_wall), to_wall, 0.0) * slope[:, None]
    behind_wall = (to_wall < reach[:, None]) & (above_ground < around.walls[:, 4])
    return 1.0 - (blocked.any(axis=1) | behind_wall.any(axis=1)).reshape(-1, count).mean(axis=1)


def _box_crossings(
    boxes: NDArray[np.float64], azimuth: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Horizontal distances [A, B] at which beams enter and leave footprints; swapped where they miss."""
    cos, sin = np.cos(boxes[:, 6]), np.sin(boxes[:, 6])
    east, north = LIDAR_TRANSLATION[0] - boxes[:, 0], LIDAR_TRANSLATION[1] - boxes[:, 1]
    start = np.stack([cos * east + sin * north, cos * north - sin * east])
    heading = azimuth[:, None] - boxes[None, :, 6]
    direction = np.stack([np.cos(heading), np.sin(heading)])
    # A beam parallel to a side never crosses it; a tiny slope instead of none sends the crossing far away.
    direction = np.where(np.abs(direction) < 1e-12, 1e-12, direction)
    half = boxes[:, [3, 4]].T / 2
    one = (-half - start)[:, None] / direction
    other = (half - start)[:, None] / direction
    return np.minimum(one, other).max(axis=0), np.maximum(one, other).min(axis=0)


def _wall_crossings(walls: NDArray[np.float64], azimuth: NDArray[np.float64]) -> NDArray[np.float64]:
    """Horizontal distance at which beams meet the walls' feet, [A, W]; infinite where they miss."""
    x, y = walls[:, 0] - LIDAR_TRANSLATION[0], walls[:, 1] - LIDAR_TRANSLATION[1]
    along_x, along_y = walls[:, 2] - walls[:, 0], walls[:, 3] - walls[:, 1]
    cos, sin = np.cos(azimuth)[:, None], np.sin(azimuth)[:, None]
    facing: NDArray[np.float64] = cos * along_y - sin * along_x
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = (x * along_y - y * along_x) / facing
        share = (x * sin - y * cos) / facing
        met = (distance > 0) & (share >= 0) & (share <= 1)
    return np.where(met, distance, np.inf)
