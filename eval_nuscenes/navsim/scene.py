"""What NAVSIM knows about one frame when it scores a plan.

Metres, seconds, radians. Global means the map's frame, where NAVSIM computes everything. A pose is x, y,
heading of the rear axle; a box is x, y, heading of its centre, length, width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

STEP_S = 0.1
HORIZON = 40
"""Steps of 0.1 s that NAVSIM drives and judges a plan for: 4 s."""

AGENT_TYPES = frozenset({"vehicle", "pedestrian", "bicycle"})
"""Every other type of track is a static object; touching one costs half."""

AreaType = Literal["roadblock", "lane", "lane_connector", "intersection", "carpark_area", "drivable_area"]
Rings = tuple[Floats, ...]
"""Closed rings [n, 2], the outline before its holes."""

Devkit = Literal["v1", "v2"]
"""v1: devkit 1.1, scored by PDMS. v2: devkit 2.2, scored by EPDMS."""


@dataclass(frozen=True)
class Vehicle:
    """The car that follows a plan; its front wheels steer, its pose is the rear axle's."""

    length_m: float
    width_m: float
    rear_overhang_m: float
    wheel_base_m: float

    @property
    def rear_axle_to_centre_m(self) -> float:
        """How far the box's centre is ahead of the rear axle."""
        return self.length_m / 2 - self.rear_overhang_m

    def boxes(self, poses: Floats) -> Floats:
        """[..., 5] boxes of the car at poses [..., 3]."""
        heading = poses[..., 2]
        ahead = np.stack([np.cos(heading), np.sin(heading)], axis=-1) * self.rear_axle_to_centre_m
        size = np.broadcast_to([self.length_m, self.width_m], (*heading.shape, 2))
        return np.concatenate([ahead + poses[..., :2], heading[..., None], size], axis=-1)


PACIFICA = Vehicle(length_m=5.176, width_m=2.297, rear_overhang_m=1.127, wheel_base_m=3.089)
"""NAVSIM drives nuPlan's car."""


@dataclass(frozen=True)
class EgoMotion:
    """The ego vehicle at one moment; rates are 0 where a log has none.

    Attributes:
        time_us: microseconds.
        pose: [3] global.
        velocity_mps: [2] forward, left.
        acceleration_mps2: [2] forward, left.
    """

    time_us: int
    pose: Floats
    velocity_mps: Floats
    acceleration_mps2: Floats
    steering_rad: float = 0.0
    steering_rate_rps: float = 0.0
    yaw_rate_rps: float = 0.0
    yaw_acceleration_rps2: float = 0.0

    def state(self) -> Floats:
        """[11] in the order of `simulation.STATE`."""
        return np.array(
            [
                *self.pose,
                *self.velocity_mps,
                *self.acceleration_mps2,
                self.steering_rad,
                self.steering_rate_rps,
                self.yaw_rate_rps,
                self.yaw_acceleration_rps2,
            ]
        )


@dataclass(frozen=True)
class MapArea:
    """A piece of the map; lanes belong to roadblocks, lane connectors to intersections."""

    id: str
    type: AreaType
    polygons: tuple[Rings, ...]


@dataclass(frozen=True)
class Tracks:
    """Other road users and objects at 10 Hz from now on.

    Attributes:
        tokens: N names.
        types: N; see `AGENT_TYPES`.
        boxes: [N, steps, 5] global, NaN where a track is absent.
        first_speed_mps: [N] when first seen: NAVSIM takes a track for stopped, or not, by this speed.
    """

    tokens: tuple[str, ...]
    types: tuple[str, ...]
    boxes: Floats
    first_speed_mps: Floats


@dataclass(frozen=True)
class PlannedPath:
    """A plan as NAVSIM takes it.

    Attributes:
        poses_in_ego: [n, 3] in the ego frame at now, the first one `interval_s` later.
        interval_s: between poses; NAVSIM's own plans have 8 at 0.5 s.
    """

    poses_in_ego: Floats
    interval_s: float = 0.5


@dataclass(frozen=True)
class Scene:
    """One frame to plan on, with everything the scores need.

    Attributes:
        token: of the frame.
        log: the drive it was cut from.
        devkit: whose cache this was, which decides how it is scored.
        centreline: [n, 2] global, the route's.
        route_lane_ids: ids of areas on the route.
        reference: [n, 4] microseconds, x, y, heading: the plan of PDM-Closed, the yardstick of progress.
        past: ego motion up to now, oldest first (v2).
        red_lights: ids of red lane connectors on the route at each step, and their polygons (v2).
        human: the logged plan (v2; absent in synthetic scenes).
        synthetic: a second-stage scene, which no human filter applies to.
        horizon: steps of 0.1 s to drive; the same for all of NAVSIM.
        vehicle: the car that drives; the same for all of NAVSIM.
    """

    token: str
    log: str
    devkit: Devkit
    ego: EgoMotion
    centreline: Floats
    route_lane_ids: frozenset[str]
    areas: tuple[MapArea, ...]
    reference: Floats
    tracks: Tracks
    past: tuple[EgoMotion, ...] = ()
    red_lights: tuple[tuple[str, ...], ...] = ()
    red_light_polygons: Mapping[str, tuple[Rings, ...]] = field(default_factory=dict)
    human: PlannedPath | None = None
    synthetic: bool = False
    horizon: int = HORIZON
    vehicle: Vehicle = PACIFICA


def box_corners(boxes: Floats) -> Floats:
    """Corners of boxes.

    Args:
        boxes: [..., 5].

    Returns:
        [..., 4, 2] front left, rear left, rear right, front right.
    """
    along = np.stack([np.cos(boxes[..., 2]), np.sin(boxes[..., 2])], axis=-1) * (boxes[..., 3, None] / 2)
    left = np.stack([-np.sin(boxes[..., 2]), np.cos(boxes[..., 2])], axis=-1) * (boxes[..., 4, None] / 2)
    signs = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    return boxes[..., None, :2] + signs[:, :1] * along[..., None, :] + signs[:, 1:] * left[..., None, :]


def wrapped(angle: Floats) -> Floats:
    """Angles in [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi
