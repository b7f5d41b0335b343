"""What really happened after a sample: true waypoints, road users, road edges, in one frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

STEPS = 6

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
Points = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class TrackedBox:
    """One annotated road user at one time, in the LiDAR frame at t0.

    Attributes:
        category: full nuScenes category, such as vehicle.car.
        track: the same for the same road user at all times.
        lidar_points: LiDAR returns inside the box at its own time.
        radar_points: radar returns likewise.
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
    radar_points: int = 0
    seen: bool = True


@dataclass(frozen=True)
class OpenLoopTruth:
    """What really happened in the 3 s after a sample.

    Attributes:
        waypoints: [6, 2] float32 true positions of the LiDAR; rows beyond the last keyframe are 0.
        exists: [7] whether the keyframes 0.0, 0.5, … 3.0 s after the sample exist in its scene.
        boxes: per keyframe (7, the first is t0) the road users, in the LiDAR frame at t0.
        past_keyframes: keyframes of the scene before the sample.
        lidar_to_rear_axle_m: how far the LiDAR sits in front of the rear axle.
        rear_axle_waypoints: [6, 2] float32 true positions of the rear axle, x right and y forward of where
            it is at t0. None where unknown; protocols that follow the rear axle refuse that.
        road_edges: polylines [n, 2] of the road's edges in the LiDAR frame at t0, as
            `eval_nuscenes.road_map` cuts them out. None where no map was read; protocols that need a map
            refuse that.
        annotated: the data set has annotations at all, unlike v1.0-test; without them nothing is scored.
        can_bus_blacklisted: a scene without usable CAN bus, which ST-P3 leaves out.
    """

    waypoints: Waypoints
    exists: tuple[bool, ...]
    boxes: tuple[tuple[TrackedBox, ...], ...]
    past_keyframes: int = 2
    lidar_to_rear_axle_m: float = 0.985793
    rear_axle_waypoints: Waypoints | None = None
    road_edges: tuple[Points, ...] | None = None
    annotated: bool = True
    can_bus_blacklisted: bool = False

    @property
    def complete(self) -> bool:
        """All six future keyframes exist."""
        return all(self.exists)

    @cached_property
    def future_exists(self) -> Mask:
        """[6] whether each future keyframe exists."""
        return np.asarray(self.exists[1:], dtype=bool)

    def future_corners(self, counts: Callable[[TrackedBox], bool]) -> BoxesOfSteps:
        """The boxes of the six future keyframes for which `counts` holds."""
        chosen = np.fromiter(map(counts, self._future_boxes), dtype=bool, count=len(self._future_boxes))
        return BoxesOfSteps(self._all_future_corners.corners[chosen], self._all_future_corners.steps[chosen])

    @cached_property
    def _future_boxes(self) -> list[TrackedBox]:
        return [box for boxes in self.boxes[1:] for box in boxes]

    @cached_property
    def _all_future_corners(self) -> BoxesOfSteps:
        boxes = self._future_boxes
        table = np.array([(b.x, b.y, b.yaw, b.length, b.width) for b in boxes]).reshape(-1, 5)
        steps = np.repeat(np.arange(STEPS), [len(boxes) for boxes in self.boxes[1:]])
        return BoxesOfSteps(rectangles(*table.T), steps)


@dataclass(frozen=True)
class BoxesOfSteps:
    """Boxes of several steps in one table.

    Attributes:
        corners: [n, 4, 2] in order around each box.
        steps: [n] from 0 at 0.5 s to 5 at 3.0 s, ascending.
    """

    corners: Points
    steps: NDArray[np.intp]


def rectangles(x: Points, y: Points, yaw: Points, length: Points | float, width: Points | float) -> Points:
    """Corners of oriented rectangles.

    Args:
        x: [n] centres.
        y: [n] centres.
        yaw: [n] direction of the length.
        length: [n] or one for all.
        width: [n] or one for all.

    Returns:
        [n, 4, 2] corners in order around each.
    """
    along = np.stack([np.cos(yaw), np.sin(yaw)], axis=-1) * np.reshape(np.asarray(length) / 2, (-1, 1))
    across = np.stack([-np.sin(yaw), np.cos(yaw)], axis=-1) * np.reshape(np.asarray(width) / 2, (-1, 1))
    centre = np.stack([x, y], axis=-1)
    front, back = centre + along, centre - along
    return np.stack([front + across, front - across, back - across, back + across], axis=1)
