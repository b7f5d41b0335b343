"""The record of a synthetic scene: what simulation writes and rendering, data-set writing and training read.

World frame: metres, x east, y north, z up, headings counter-clockwise from +x. The ego pose is its rear axle,
on the ground, as in nuScenes. Actor poses are box centres projected to the ground.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla_autoprune.frame import Command

Points = NDArray[np.float64]


@dataclass(frozen=True)
class Lane:
    """One driving lane. `centreline` is [N, 2] in driving direction, about a metre apart."""

    name: str
    centreline: Points
    width_m: float
    speed_limit_mps: float
    successors: tuple[str, ...] = ()
    left_neighbour: str | None = None
    right_neighbour: str | None = None
    is_connector: bool = False
    """Inside an intersection."""


@dataclass(frozen=True)
class TrafficLight:
    """A signal head that governs the lanes that end at its stop line."""

    name: str
    position: tuple[float, float, float]
    heading: float
    """The direction the lamp faces (towards approaching traffic)."""
    stop_line: Points
    """[2, 2] end points."""
    lanes: tuple[str, ...]


@dataclass(frozen=True)
class RoadMap:
    """The static world. Polygons are [N, 2], counter-clockwise, not closed."""

    lanes: tuple[Lane, ...]
    road_segments: tuple[Points, ...]
    intersections: tuple[Points, ...]
    crossings: tuple[Points, ...]
    walkways: tuple[Points, ...]
    lane_dividers: tuple[Points, ...]
    """[N, 2] dashed polylines between lanes of one direction."""
    road_dividers: tuple[Points, ...]
    """[N, 2] solid polylines between directions."""
    lights: tuple[TrafficLight, ...]
    buildings: tuple[tuple[Points, float], ...]
    """Footprint and height; scenery only."""
    yield_lines: tuple[Points, ...] = ()
    """[2, 2] end points, where the other road has priority and no light says so."""


@dataclass(frozen=True)
class Actor:
    """A thing with a box. `category` is a nuScenes category name (vehicle.car, human.pedestrian.adult, …)."""

    name: str
    category: str
    width_m: float
    length_m: float
    height_m: float
    colour: tuple[int, int, int]


@dataclass(frozen=True)
class ActorState:
    """Where an actor is at one time."""

    actor: int
    """Index into `Scene.actors`."""
    x: float
    y: float
    heading: float
    speed_mps: float
    braking: bool = False


@dataclass(frozen=True)
class EgoPose:
    """The ego vehicle at one time."""

    x: float
    y: float
    heading: float
    speed_mps: float
    acceleration_mps2: float
    yaw_rate_rps: float


@dataclass(frozen=True)
class WorldState:
    """Everything that moves, at one time."""

    time_s: float
    ego: EgoPose
    actors: tuple[ActorState, ...]
    lights: tuple[str, ...]
    """Colour of each light of the map: red, red_amber (about to turn green), amber or green."""
    command: Command
    """Where the ego's route goes next (known from the route ahead, not from the future trajectory)."""


@dataclass(frozen=True)
class Scene:
    """A simulated drive. `states` are 0.1 s apart."""

    name: str
    """scene-NNNN, as the nuScenes CAN bus reader demands."""
    kind: str
    """free, lead, light, pedestrian, lane_change, yield, …"""
    location: str
    """One of the four nuScenes map names, so that NuScenesMap opens it."""
    seed: int
    map: RoadMap
    actors: tuple[Actor, ...]
    states: tuple[WorldState, ...]
    route: tuple[str, ...]
    """Lane names the ego follows."""
    daylight: float
    """1 noon … 0 dusk; scales the rendered brightness."""
    haze: float = 0.0
    """0 clear … 1 things fade at about 60 m."""
