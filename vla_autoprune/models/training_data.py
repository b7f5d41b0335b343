"""What training consumes: rendered scenes with several driving queries each, in plain numpy.

The trainer takes any iterable of these records; which world they come from is the caller's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vla_autoprune.frame import Command, EgoState

PATCH_CHANNELS: tuple[str, ...] = (
    "road",
    "lane_marking",
    "vehicle",
    "pedestrian",
    "light_red",
    "light_amber",
    "light_green",
    "brake_light",
    "inverse_distance",
)
"""Labels of a patch: coverage fractions 0..1, and inverse_distance = 10 m / nearest actor (0: none)."""

QUERIES_PER_SCENE = 4
"""Ego states and commands asked of the same six images."""

MAX_OBSTACLES = 16
"""Road users per query whose future boxes are kept, nearest first, for the collision rate of evaluation."""


def no_obstacles() -> NDArray[np.float32]:
    """[6, MAX_OBSTACLES, 5] boxes that are all absent (NaN)."""
    return np.full((6, MAX_OBSTACLES, 5), np.nan, dtype=np.float32)


def obstacles_array(steps: Sequence[NDArray[np.floating]]) -> NDArray[np.float32]:
    """Boxes of a query in the fixed shape records have.

    Args:
        steps: per waypoint time, [n, 5] boxes x, y, heading, length, width in the ego frame at the time of
            the images.

    Returns:
        [6, MAX_OBSTACLES, 5]; of more boxes than fit, those nearest to the origin; absent ones are NaN.
    """
    boxes = no_obstacles()
    for step, present in enumerate(steps):
        nearest = np.argsort(np.hypot(present[:, 0], present[:, 1]), kind="stable")[:MAX_OBSTACLES]
        boxes[step, : len(nearest)] = present[nearest]
    return boxes


@dataclass(frozen=True)
class Query:
    """One driving question: the ego state and command, and what the expert does with them.

    Attributes:
        ego: motion at the time of the images.
        command: where the route goes.
        waypoints_in_ego: [6, 3] float32 x, y (metres) and heading (radians) at WAYPOINT_TIMES_S.
        obstacles: [6, MAX_OBSTACLES, 5] float32 boxes of other road users at those times (`obstacles_array`).
    """

    ego: EgoState
    command: Command
    waypoints_in_ego: NDArray[np.float32]
    obstacles: NDArray[np.float32] = field(default_factory=no_obstacles)


@dataclass(frozen=True)
class TrainingScene:
    """Six images of one moment, what every image patch shows, and the queries asked of them.

    Attributes:
        images: [6, S, S, 3] uint8 RGB in CAMERAS order; the whole 16:9 image squeezed to a square.
        patch_labels: [6, S/16, S/16, len(PATCH_CHANNELS)] float32.
        queries: QUERIES_PER_SCENE queries; the first is the state the ego was really driven in.
        kind: the situation, for example "light" or "pedestrian".
    """

    images: NDArray[np.uint8]
    patch_labels: NDArray[np.float32]
    queries: tuple[Query, ...]
    kind: str
