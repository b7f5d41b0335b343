"""Procedural roads: curved roads of one or two lanes per direction that cross at right angles.

A network is made along the ego's route: each leg of the route is a stretch of road with at most one curve,
followed by a junction where the route goes straight on or turns onto the crossing road. Traffic keeps right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from eval_nuscenes.world.scene import Lane, Points, RoadMap, TrafficLight
from vla_autoprune.frame import Command

LANE_WIDTH_M = 3.5
SHOULDER_M = 0.5
WALKWAY_M = 2.6
CORNER_M = 5.0
"""From the kerb of the crossing road to the edge of the junction."""
CROSSING_DEPTH_M = 3.0
CROSSING_SETBACK_M = 0.7
"""From the edge of the junction to its crossings."""
STOP_SETBACK_M = 4.7
"""From the edge of the junction to its stop line."""
LIGHT_HEIGHT_M = 3.4
"""Of a signal's middle lamp: the upper one must stay in view of a driver who waits at the line."""
ARM_M = 85
"""How far a road goes on after the last junction, as seen from its middle."""
LEAD_IN_M = 60
"""Road behind the start of the first leg."""
STRAIGHT_AT_JUNCTION_M = 24
SPEED_LIMITS_MPS = {1: 9.5, 2: 13.0}
"""By lanes per direction, so that the limit shows in the images."""

_TURNS = {Command.STRAIGHT: 0, Command.LEFT: 1, Command.RIGHT: 3}


@dataclass(frozen=True)
class Path:
    """A line to move along, sampled every metre: entry i is i metres from the start.

    Attributes:
        points: [N, 2].
        heading: [N] radians, without jumps.
        curvature: [N] 1/m, left positive.
    """

    points: Points
    heading: NDArray[np.float64]
    curvature: NDArray[np.float64]

    @cached_property
    def _columns(self) -> tuple[list[float], list[float], list[float]]:
        return self.points[:, 0].tolist(), self.points[:, 1].tolist(), self.heading.tolist()

    @property
    def length_m(self) -> float:
        """Metres from the first to the last point."""
        return len(self.heading) - 1.0

    def pose(self, along_m: float) -> tuple[float, float, float]:
        """x, y and heading; beyond the ends the line goes straight on."""
        x, y, heading = self._columns
        i = min(max(int(along_m), 0), len(x) - 2)
        t = along_m - i
        return (
            x[i] + t * (x[i + 1] - x[i]),
            y[i] + t * (y[i + 1] - y[i]),
            heading[i] + min(max(t, 0.0), 1.0) * (heading[i + 1] - heading[i]),
        )


def path_through(points: Points) -> tuple[Path, NDArray[np.float64]]:
    """A path along a polyline.

    Args:
        points: [M, 2], M >= 3.

    Returns:
        The path, and [M] metres along it of the given points.
    """
    steps = points[1:] - points[:-1]
    along = np.concatenate([[0.0], np.cumsum(np.hypot(steps[:, 0], steps[:, 1]))])
    grid = np.arange(int(along[-1]) + 1.0)
    even = np.stack([np.interp(grid, along, points[:, 0]), np.interp(grid, along, points[:, 1])], axis=1)
    chords = even[1:] - even[:-1]
    angles = np.unwrap(np.arctan2(chords[:, 1], chords[:, 0]))
    # A chord's direction is that of its middle; a short box filter takes out what resampling left.
    angles = np.concatenate([angles[:1], angles[:1], angles, angles[-1:], angles[-1:]])
    heading = (angles[:-3] + angles[1:-2] + angles[2:-1] + angles[3:])[: len(grid)] / 4
    curvature = np.empty_like(heading)
    curvature[1:-1] = (heading[2:] - heading[:-2]) / 2
    curvature[0], curvature[-1] = curvature[1], curvature[-2]
    return Path(even, heading, curvature), along


@dataclass(frozen=True)
class Road:
    """A two-way road, described by its middle line, sampled about every metre.

    Attributes:
        name: unique in its network.
        middle: [N, 2] between the two directions.
        heading: [N] of the middle line; "+1" traffic goes along it, "-1" traffic against it.
        lanes: per direction.
    """

    name: str
    middle: Points
    heading: NDArray[np.float64]
    lanes: int

    @property
    def half_width_m(self) -> float:
        """From the middle to the kerb."""
        return self.lanes * LANE_WIDTH_M + SHOULDER_M

    @property
    def speed_limit_mps(self) -> float:
        """The same on the whole road."""
        return SPEED_LIMITS_MPS[self.lanes]

    @cached_property
    def _left(self) -> Points:
        return np.stack([-np.sin(self.heading), np.cos(self.heading)], axis=1)

    def offset(self, left_m: float) -> Points:
        """[N, 2], the middle line moved to the left."""
        return self.middle + left_m * self._left

    def lane_offset(self, direction: int, lane: int) -> float:
        """Metres from the middle line to a lane's centreline, left positive; lane 0 is at the kerb."""
        return -direction * (self.lanes - lane - 0.5) * LANE_WIDTH_M

    def lane(self, direction: int, lane: int) -> Points:
        """[N, 2] centreline in driving direction."""
        return self.offset(self.lane_offset(direction, lane))[::direction]

    def index(self, direction: int, along: int) -> int:
        """Of the point of `lane` that lies beside point `along` of the middle line."""
        return along if direction > 0 else len(self.middle) - 1 - along


@dataclass(frozen=True)
class Junction:
    """Where two roads cross.

    Attributes:
        roads: indices of the road the route comes along and of the other one.
        at: index of the crossing point on the middle line of each.
        half_m: from the crossing point to the edge of the junction, along either road.
        control: "plain" (the route has priority), "yield" (the other road has) or "signal".
        crossroad_leads_left: the other road's "+1" traffic goes to the left, as the route sees it.
    """

    roads: tuple[int, int]
    at: tuple[int, int]
    half_m: int
    control: str
    crossroad_leads_left: bool

    def side(self, road: int) -> int:
        """0 for the road the route comes along, 1 for the other."""
        return self.roads.index(road)

    def arms(self) -> list[tuple[int, int]]:
        """The four roads out of the junction with their directions: right, straight on, left and back."""
        first = self.roads[0]
        turns = (Command.RIGHT, Command.STRAIGHT, Command.LEFT)
        return [*(self.exit(first, 1, turn) for turn in turns), (first, -1)]

    def exit(self, road: int, direction: int, turn: Command) -> tuple[int, int]:
        """The road and direction in which a vehicle leaves that comes along `road` in `direction`."""
        left = 1 if self.crossroad_leads_left else -1
        quarters = [(self.roads[0], 1), (self.roads[1], left), (self.roads[0], -1), (self.roads[1], -left)]
        return quarters[(quarters.index((road, direction)) + _TURNS[turn]) % 4]


@dataclass(frozen=True)
class Leg:
    """A stretch of the route up to and including a junction.

    Attributes:
        before_m: straight road before the curve.
        curve_rad: how far the road turns left (negative: right); 0 is no curve.
        radius_m: of the curve's middle part.
        after_m: straight road after the curve, up to the middle of the junction.
        crossing_m: where a pedestrian crossing lies, in metres from the start of the leg; None for none.
        control: of the junction.
        turn: where the route goes at the junction.
        crossroad_lanes: lanes per direction of the other road.
    """

    before_m: int
    curve_rad: float
    radius_m: float
    after_m: int
    crossing_m: int | None
    control: str
    turn: Command
    crossroad_lanes: int

    @property
    def curve_m(self) -> int:
        """Length of the curve on the middle line."""
        return math.ceil(abs(self.curve_rad) * self.radius_m * 1.25) if self.curve_rad else 0

    @property
    def length_m(self) -> int:
        """To the middle of the junction."""
        return self.before_m + self.curve_m + self.after_m


@dataclass(frozen=True)
class Passage:
    """Where a path passes a junction, in metres along the path."""

    junction: int
    turn: Command
    stop_m: float
    """The stop line."""
    enter_m: float
    exit_m: float


@dataclass(frozen=True)
class Stretch:
    """Part of a path on one lane, in metres along the path."""

    road: int
    direction: int
    lane: int
    start_m: float
    end_m: float


@dataclass(frozen=True)
class DrivingPath:
    """A path along lanes and through junctions."""

    path: Path
    stretches: tuple[Stretch, ...]
    passages: tuple[Passage, ...]


@dataclass(frozen=True)
class Network:
    """Roads, the junctions between them and the crossings between junctions.

    Attributes:
        roads: the first one carries the start of the route.
        junctions: in the order of the route.
        crossings: road and index on its middle line of crossings away from junctions.
        legs: what the network was made from.
    """

    roads: tuple[Road, ...]
    junctions: tuple[Junction, ...]
    crossings: tuple[tuple[int, int], ...]
    legs: tuple[Leg, ...]

    def junctions_of(self, road: int) -> list[tuple[int, int]]:
        """(index on the road's middle line, junction index), along the road."""
        found = [
            (junction.at[junction.side(road)], number)
            for number, junction in enumerate(self.junctions)
            if road in junction.roads
        ]
        return sorted(found)

    def follow(
        self,
        start: tuple[int, int, int],
        from_index: int,
        turns: Sequence[tuple[int, Command, int]],
        reach_m: float,
    ) -> DrivingPath:
        """The path of a vehicle that turns at the given junctions and goes straight on elsewhere.

        Args:
            start: road, direction and lane.
            from_index: where the path begins, an index into the lane's centreline.
            turns: junction, turn and lane after it, in order.
            reach_m: how far the path goes after the last turn, if the road does.
        """
        road, direction, lane = start
        index = from_index
        pieces: list[Points] = []
        count = 0
        lanes_at: list[tuple[int, int, int, int]] = []  # road, direction, lane, first point
        marks: list[
            tuple[int, Command, int, int, int]
        ] = []  # junction, turn, points of stop line, entry, exit
        for target, turn, lane_after in [*turns, (-1, Command.STRAIGHT, 0)]:
            line = self.roads[road].lane(direction, lane)
            lanes_at.append((road, direction, lane, count))
            last = min(index + int(reach_m), len(line) - 1) if target < 0 else 0
            for at, number in self.junctions_of(road)[::direction]:
                half = self.junctions[number].half_m
                middle = self.roads[road].index(direction, at)
                if middle < index:
                    continue
                if number == target:
                    last = middle - half
                    break
                # Vehicles stop STOP_SETBACK_M before the junction; points are close to a metre apart there.
                if target >= 0 or middle < last - half:
                    first = count - index + middle
                    stop = first - half - round(STOP_SETBACK_M)
                    marks.append((number, Command.STRAIGHT, stop, first - half, first + half))
            pieces.append(line[index : last + 1])
            count += last + 1 - index
            if target < 0:
                break
            junction = self.junctions[target]
            entry = count - 1
            road_after, direction_after = junction.exit(road, direction, turn)
            line_after = self.roads[road_after].lane(direction_after, lane_after)
            middle = self.roads[road_after].index(direction_after, junction.at[junction.side(road_after)])
            index = middle + junction.half_m
            bend = _corner(line[last - 1], line[last], line_after[index], line_after[index + 1])
            pieces.append(bend)
            count += len(bend)
            marks.append((target, turn, entry - round(STOP_SETBACK_M), entry, count))
            road, direction, lane = road_after, direction_after, lane_after
        path, along = path_through(np.concatenate(pieces))
        ends = [first for *_, first in lanes_at[1:]] + [count - 1]
        return DrivingPath(
            path,
            tuple(
                Stretch(road, direction, lane, float(along[first]), float(along[end]))
                for (road, direction, lane, first), end in zip(lanes_at, ends, strict=True)
            ),
            tuple(
                Passage(
                    number, turn, float(along[max(stop, 0)]), float(along[max(entry, 0)]), float(along[leave])
                )
                for number, turn, stop, entry, leave in marks
                if entry >= 0
            ),
        )


def build_network(lanes: int, legs: Sequence[Leg], heading: float) -> Network | None:
    """Lay out roads along a route.

    The first road begins LEAD_IN_M before the origin, where the first leg starts.

    Args:
        lanes: per direction, of the first road.
        legs: the route, at least one leg.
        heading: of the route at the origin, radians.

    Returns:
        The network, or None if its roads would meet elsewhere than at junctions.
    """
    chains = _chains(legs)
    roads: list[Road] = []
    crossroads: list[Road] = []
    junctions: list[Junction] = []
    crossings: list[tuple[int, int]] = []
    start, lead_in = -LEAD_IN_M * _unit(heading), LEAD_IN_M
    for chain in chains:
        number = len(roads)
        road, begins = _road_along(chain, f"road{number}", start, heading, lead_in, lanes)
        roads.append(road)
        for leg, begin in zip(chain, begins, strict=True):
            if leg.crossing_m is not None:
                crossings.append((number, begin + leg.crossing_m))
            at = begin + leg.length_m
            half = math.ceil(max(lanes, leg.crossroad_lanes) * LANE_WIDTH_M + SHOULDER_M + CORNER_M)
            leads_left = leg.turn is not Command.RIGHT
            side = float(road.heading[at]) + (math.pi / 2 if leads_left else -math.pi / 2)
            if leg.turn is Command.STRAIGHT:
                other = len(chains) + len(crossroads)
                crossroads.append(_crossroad(f"road{other}", road.middle[at], side, leg.crossroad_lanes))
            else:
                # The route goes on along the road it turns onto, which begins beyond the junction.
                other = number + 1
                start, heading, lead_in = road.middle[at] - ARM_M * _unit(side), side, ARM_M
                lanes = leg.crossroad_lanes
            junctions.append(Junction((number, other), (at, ARM_M), half, leg.control, leads_left))
    network = Network((*roads, *crossroads), tuple(junctions), tuple(crossings), tuple(legs))
    return None if _roads_collide(network) else network


def _chains(legs: Sequence[Leg]) -> list[list[Leg]]:
    """The legs along each road of the route; a last road without legs if the route ends with a turn."""
    chains: list[list[Leg]] = [[]]
    for leg in legs:
        chains[-1].append(leg)
        if leg.turn is not Command.STRAIGHT:
            chains.append([])
    return chains


def _road_along(
    legs: Sequence[Leg], name: str, start: Points, heading: float, lead_in: int, lanes: int
) -> tuple[Road, list[int]]:
    """A road with the curves of these legs, and at which point of it each leg begins."""
    knots = [(0.0, 0.0), (float(lead_in), 0.0)]
    begins = []
    for leg in legs:
        begins.append(int(knots[-1][0]))
        if leg.curve_rad:
            first, length = begins[-1] + leg.before_m, leg.curve_m
            ramp = 0.2 * length
            bend = leg.curve_rad / (length - ramp)
            knots += [
                (first, 0.0),
                (first + ramp, bend),
                (first + length - ramp, bend),
                (first + length, 0.0),
            ]
        knots.append((float(begins[-1] + leg.length_m), 0.0))
    grid = np.arange(knots[-1][0] + ARM_M + 1)
    along, bends = np.array(knots).T
    angles = heading + np.concatenate([[0.0], np.cumsum(np.interp(grid[:-1] + 0.5, along, bends, right=0.0))])
    between = (angles[1:] + angles[:-1]) / 2
    steps = np.stack([np.cos(between), np.sin(between)], axis=1)
    middle = start + np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])
    return Road(name, middle, angles, lanes), begins


def _crossroad(name: str, centre: Points, heading: float, lanes: int) -> Road:
    """A straight road through a junction, ARM_M to either side."""
    grid = np.arange(-ARM_M, ARM_M + 1.0)[:, None]
    return Road(name, centre + grid * _unit(heading), np.full(len(grid), heading), lanes)


def _roads_collide(network: Network) -> bool:
    """Whether two roads come close away from the junction they share."""
    samples = [(road.middle[::6], road.half_width_m + WALKWAY_M) for road in network.roads]
    for number, (points, margin) in enumerate(samples):
        for other in range(number + 1, len(samples)):
            others, other_margin = samples[other]
            near = squared_distances(points, others) < (margin + other_margin + 4) ** 2
            for junction in network.junctions:
                if set(junction.roads) == {number, other}:
                    centre = network.roads[number].middle[junction.at[junction.side(number)]]
                    away = squared_distances(points, centre[None])
                    near &= away > (junction.half_m + 24) ** 2
            if near.any():
                return True
    return False


@lru_cache(maxsize=1)
def _quarter_turn() -> Points:
    """[65, 2] a left turn from (0, 0) heading +x to (1, 1) heading +y; curvature rises and falls linearly."""
    grid = np.linspace(0.0, 1.0, 65)
    middle = (grid[1:] + grid[:-1]) / 2
    curvature = np.interp(middle, [0.0, 0.3, 0.7, 1.0], [0.0, 1.0, 1.0, 0.0])
    heading = np.concatenate([[0.0], np.cumsum(curvature)])
    heading *= math.pi / 2 / heading[-1]
    angles = (heading[1:] + heading[:-1]) / 2
    steps = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    points = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])
    return points / points[-1]


def _corner(before: Points, first: Points, last: Points, after: Points) -> Points:
    """The points between `first` and `last` of a quarter turn that leaves both lines along their tangents."""
    ahead, beyond = first - before, after - last
    ahead, beyond = ahead / np.hypot(*ahead), beyond / np.hypot(*beyond)
    gap = last - first
    reach, rise = float(gap @ ahead), float(gap @ beyond)
    size = min(reach, rise)
    curve = _quarter_turn() * size
    begin = first + (reach - size) * ahead
    points = begin + curve[:, :1] * ahead + curve[:, 1:] * beyond
    return points[0 if reach > size else 1 : len(points) if rise > size else -1]


def road_map(network: Network, with_lanes: bool = True) -> RoadMap:
    """The network as the record that rendering and data-set writing read.

    Args:
        network: the roads.
        with_lanes: without them it is done in a fraction of the time, and good enough for rendering.
    """
    segments: list[Points] = []
    walkways: list[Points] = []
    crossings: list[Points] = []
    lane_dividers: list[Points] = []
    road_dividers: list[Points] = []
    for number, road in enumerate(network.roads):
        half = road.half_width_m
        left, right = road.offset(half), road.offset(-half)
        outer_left, outer_right = road.offset(half + WALKWAY_M), road.offset(-half - WALKWAY_M)
        inner = [road.offset(LANE_WIDTH_M), road.offset(-LANE_WIDTH_M)] if road.lanes == 2 else []
        for first, last in _pieces(network, number):
            part = slice(first, last + 1)
            thin = _thinned(road.heading[part]) + first
            segments.append(np.concatenate([right[thin], left[thin][::-1]]))
            walkways.append(np.concatenate([left[thin], outer_left[thin][::-1]]))
            walkways.append(np.concatenate([outer_right[thin], right[thin][::-1]]))
            road_dividers.append(road.middle[part])
            lane_dividers.extend(line[part] for line in inner)
    for road_number, at in network.crossings:
        road = network.roads[road_number]
        crossings.append(_crossing(road, at, 1, -CROSSING_DEPTH_M / 2))
    intersections: list[Points] = []
    lights: list[TrafficLight] = []
    yield_lines: list[Points] = []
    for number, junction in enumerate(network.junctions):
        corners: list[Points] = []
        outer: list[Points] = []
        for road_number, direction in junction.arms():
            road, at = network.roads[road_number], junction.at[junction.side(road_number)]
            edge = at + direction * junction.half_m
            middle, ahead = road.middle[edge], _unit(road.heading[edge]) * direction
            side = np.array([-ahead[1], ahead[0]])
            half = road.half_width_m
            corners += [middle - half * side, middle + half * side]
            outer += [middle - (half + WALKWAY_M) * side, middle + (half + WALKWAY_M) * side]
            crossings.append(_crossing(road, edge, direction, CROSSING_SETBACK_M))
            stop = middle + STOP_SETBACK_M * ahead
            line = np.stack([stop, stop + road.lanes * LANE_WIDTH_M * side])
            if junction.control == "signal":
                lights.append(_light(network, number, road_number, direction, line, ahead))
            elif junction.control == "yield" and road_number == junction.roads[0]:
                yield_lines.append(line)
        intersections.append(np.array(corners))
        for index in range(4):
            a, b = 2 * index + 1, (2 * index + 2) % 8
            walkways.append(np.array([corners[a], corners[b], outer[b], outer[a]])[::-1])
    lanes = _lanes(network) if with_lanes else ()
    return RoadMap(
        lanes=lanes,
        road_segments=tuple(segments),
        intersections=tuple(intersections),
        crossings=tuple(crossings),
        walkways=tuple(walkways),
        lane_dividers=tuple(lane_dividers),
        road_dividers=tuple(road_dividers),
        lights=tuple(lights),
        buildings=_buildings(network),
        yield_lines=tuple(yield_lines),
    )


def lane_names(network: Network, path: DrivingPath) -> tuple[str, ...]:
    """Names of the lanes and connectors that a path follows, in order."""
    names: list[str] = []
    by_start = sorted(path.passages, key=lambda passage: passage.enter_m)
    for stretch in path.stretches:
        road = network.roads[stretch.road]
        pieces = _pieces(network, stretch.road)
        inside = [p for p in by_start if stretch.start_m - 1.0 <= p.stop_m < stretch.end_m]
        junctions = [number for _, number in network.junctions_of(stretch.road)]
        before = len(junctions) if not inside else junctions.index(inside[0].junction)
        if stretch.direction > 0:
            order = range(before, before + len(inside) + 1)
        else:
            last = len(pieces) - 1 if not inside else before + 1
            order = range(last, last - len(inside) - 1, -1)
        stretch_names = [_lane_name(road, stretch.direction, piece, stretch.lane) for piece in order]
        if inside and inside[-1].turn is not Command.STRAIGHT:
            stretch_names.pop()
        for name in stretch_names:
            if names:
                number = by_start[sum("junction" in known for known in names)].junction
                names.append(f"junction{number}_{names[-1]}_{name}")
            names.append(name)
    return tuple(names)


def _unit(heading: float) -> Points:
    return np.array([math.cos(heading), math.sin(heading)])


def _pieces(network: Network, road: int) -> list[tuple[int, int]]:
    """First and last index of the stretches between junctions."""
    cuts = [(at, network.junctions[number].half_m) for at, number in network.junctions_of(road)]
    firsts = [0] + [at + half for at, half in cuts]
    lasts = [at - half for at, half in cuts] + [len(network.roads[road].middle) - 1]
    return list(zip(firsts, lasts, strict=True))


def _thinned(heading: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices that keep a polyline's shape: every third in curves, the ends only of what is straight."""
    bends = np.abs(np.diff(heading)) > 1e-6
    keep = np.zeros(len(heading), dtype=bool)
    keep[::3] = True
    curved = np.zeros(len(heading), dtype=bool)
    curved[1:] |= bends
    curved[:-1] |= bends
    keep &= curved
    # Long faces cost nothing, but clipping and fog want a point now and then.
    keep[::24] = True
    keep[[0, -1]] = True
    return np.flatnonzero(keep)


def _crossing(road: Road, at: int, direction: int, begin_m: float) -> Points:
    """[4, 2] a crossing that begins `begin_m` from a point of the road; its first side runs across."""
    middle, ahead = road.middle[at], _unit(road.heading[at]) * direction
    side = np.array([-ahead[1], ahead[0]]) * road.half_width_m
    near, far = middle + begin_m * ahead, middle + (begin_m + CROSSING_DEPTH_M) * ahead
    return np.array([near + side, near - side, far - side, far + side])


def _light(
    network: Network, junction: int, road_number: int, direction: int, line: Points, ahead: Points
) -> TrafficLight:
    """The signal of the arm that leaves the junction in `direction`, for traffic that comes in on it."""
    road = network.roads[road_number]
    side = np.array([-ahead[1], ahead[0]])
    # Beside the entering lanes, past the stop line, where a driver who waits there still sees it.
    x, y = line[0] - 9.0 * ahead + (road.lanes * LANE_WIDTH_M + 1.2) * side
    entering = -direction
    edge = network.junctions[junction].at[network.junctions[junction].side(road_number)]
    edge += direction * network.junctions[junction].half_m
    piece = _piece_beside(network, road_number, edge, direction)
    return TrafficLight(
        name=f"light{junction}_{road.name}_{'f' if entering > 0 else 'b'}",
        position=(float(x), float(y), LIGHT_HEIGHT_M),
        heading=math.atan2(ahead[1], ahead[0]),
        stop_line=line,
        lanes=tuple(_lane_name(road, entering, piece, lane) for lane in range(road.lanes)),
    )


def _lane_name(road: Road, direction: int, piece: int, lane: int) -> str:
    return f"{road.name}_{'f' if direction > 0 else 'b'}{piece}_{lane}"


def _lanes(network: Network) -> tuple[Lane, ...]:
    """All lanes between junctions, and the connectors inside them."""
    followers: dict[str, list[str]] = {}
    connectors: list[Lane] = []
    for number, junction in enumerate(network.junctions):
        for road_number, leaving in junction.arms():
            road, direction = network.roads[road_number], -leaving
            at = junction.at[junction.side(road_number)]
            piece = _piece_beside(network, road_number, at + leaving * junction.half_m, leaving)
            for turn in _TURNS:
                road_after_number, direction_after = junction.exit(road_number, direction, turn)
                road_after = network.roads[road_after_number]
                at_after = junction.at[junction.side(road_after_number)]
                begin = at_after + direction_after * junction.half_m
                piece_after = _piece_beside(network, road_after_number, begin, direction_after)
                for lane, lane_after in _connections(road.lanes, road_after.lanes, turn):
                    before = _lane_name(road, direction, piece, lane)
                    after = _lane_name(road_after, direction_after, piece_after, lane_after)
                    name = f"junction{number}_{before}_{after}"
                    line = road.lane(direction, lane)
                    line_after = road_after.lane(direction_after, lane_after)
                    end = road.index(direction, at) - junction.half_m
                    start = road_after.index(direction_after, begin)
                    if turn is Command.STRAIGHT:
                        centreline = line[end : start + 1]
                    else:
                        bend = _corner(line[end - 1], line[end], line_after[start], line_after[start + 1])
                        centreline = _metre_apart(
                            np.concatenate([line[end : end + 1], bend, line_after[start : start + 1]])
                        )
                    limit = min(road.speed_limit_mps, road_after.speed_limit_mps)
                    connectors.append(
                        Lane(name, centreline, LANE_WIDTH_M, limit, successors=(after,), is_connector=True)
                    )
                    followers.setdefault(before, []).append(name)
    lanes: list[Lane] = []
    for number, road in enumerate(network.roads):
        lines = {(way, lane): road.lane(way, lane) for way in (1, -1) for lane in range(road.lanes)}
        for piece, (first, last) in enumerate(_pieces(network, number)):
            for (direction, lane), line in lines.items():
                ends = sorted((road.index(direction, first), road.index(direction, last)))
                name = _lane_name(road, direction, piece, lane)
                beside = {step: _lane_name(road, direction, piece, lane + step) for step in (1, -1)}
                lanes.append(
                    Lane(
                        name,
                        line[ends[0] : ends[1] + 1],
                        LANE_WIDTH_M,
                        road.speed_limit_mps,
                        successors=tuple(followers.get(name, ())),
                        left_neighbour=beside[1] if lane + 1 < road.lanes else None,
                        right_neighbour=beside[-1] if lane > 0 else None,
                    )
                )
    return (*lanes, *connectors)


def _piece_beside(network: Network, road: int, edge: int, direction: int) -> int:
    """The stretch that leads away from a junction's edge in `direction`."""
    ends = [first if direction > 0 else last for first, last in _pieces(network, road)]
    return ends.index(edge)


def _connections(lanes: int, lanes_after: int, turn: Command) -> list[tuple[int, int]]:
    """Pairs of lanes that a turn joins: right from the kerb lane, left from the innermost."""
    if turn is Command.STRAIGHT:
        return [(lane, lane) for lane in range(lanes)]
    return [(0 if turn is Command.RIGHT else lanes - 1, after) for after in range(lanes_after)]


def _metre_apart(points: Points) -> Points:
    """The polyline at about a metre between points, both ends kept."""
    steps = np.hypot(*np.diff(points, axis=0).T)
    along = np.concatenate([[0.0], np.cumsum(steps)])
    grid = np.linspace(0.0, along[-1], max(2, round(along[-1]) + 1))
    even = np.stack([np.interp(grid, along, points[:, 0]), np.interp(grid, along, points[:, 1])], axis=1)
    even[0], even[-1] = points[0], points[-1]
    return even


def _buildings(network: Network) -> tuple[tuple[Points, float], ...]:
    """Scenery along the roads, set back from junctions so that crossing traffic is seen in time."""
    sides: list[Points] = []
    depths: list[Points] = []
    tall: list[NDArray[np.float64]] = []
    for number, road in enumerate(network.roads):
        # Sizes and gaps repeat in a pattern: the map has no randomness besides its legs.
        pattern = np.arange(len(road.middle) // 19)
        length, depth = 10.0 + 3 * (pattern * 7 % 4), 8.0 + 2 * (pattern * 5 % 3)
        height, setback = 5 + 2.5 * (pattern * 11 % 5), 3.0 + 2 * (pattern % 3)
        at = 6 + 5 * (number % 3) + 19 * pattern + 4 * (pattern % 2)
        fits = at < len(road.middle) - 6
        at, length, depth = at[fits], length[fits, None], depth[fits, None]
        ahead = np.stack([np.cos(road.heading[at]), np.sin(road.heading[at])], axis=1)
        left = np.stack([-ahead[:, 1], ahead[:, 0]], axis=1)
        for side in (1, -1):
            out = side * left
            near = road.middle[at] + out * (road.half_width_m + WALKWAY_M + setback[fits, None])
            along = side * ahead * length / 2
            sides.append(np.stack([near - along, near + along], axis=1))
            depths.append(out * depth)
            tall.append(height[fits])
    front, back, heights = np.concatenate(sides), np.concatenate(depths), np.concatenate(tall)
    footprints = np.concatenate([front, front[:, ::-1] + back[:, None]], axis=1)
    middles = footprints.mean(axis=1)
    clear = np.ones(len(middles), dtype=bool)
    for road in network.roads:
        clear &= (
            squared_distances(middles, road.middle[::5]).min(axis=1)
            > (road.half_width_m + WALKWAY_M + 7) ** 2
        )
    for junction in network.junctions:
        centre = network.roads[junction.roads[0]].middle[junction.at[0]]
        clear &= squared_distances(middles, centre[None])[:, 0] > (junction.half_m + 26) ** 2
    return tuple((footprints[index], float(heights[index])) for index in np.flatnonzero(clear))


def squared_distances(points: Points, others: Points) -> Points:
    """[N, M] between two sets of points."""
    lengths, other_lengths = np.einsum("ij,ij->i", points, points), np.einsum("ij,ij->i", others, others)
    squared: Points = lengths[:, None] + other_lengths - 2 * points @ others.T
    return squared
