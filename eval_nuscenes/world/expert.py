"""The expert who drives the ego: along a route, at a speed that follows from what can be seen.

The ego's rear axle moves along the route's centreline, `along` metres from its start and `beside` metres to
its left, so every trajectory is kinematically feasible by construction. The longitudinal rules are stateless
apart from the acceleration, whose change is limited; the only other memory is the sideways move under way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eval_nuscenes.world.roads import LANE_WIDTH_M, DrivingPath, Network, Path
from vla_autoprune.frame import Command

STEP_S = 0.1
FRONT_M = 3.4
"""From the rear axle to the front bumper."""
REAR_M = 0.7
HALF_WIDTH_M = 0.9

HARDEST_BRAKING_MPS2 = 6.0
STRONGEST_ACCELERATION_MPS2 = 2.4
_STOP_BRAKING_MPS2 = 2.1
_LEAST_STOP_BRAKING_MPS2 = 1.2
_CURVE_BRAKING_MPS2 = 1.6
_SIDEWAYS_MPS2 = 2.3
_LAG_S = 0.6
_TIME_GAP_S = 1.1
_STANDSTILL_GAP_M = 2.5
_RISING_JERK_MPS3 = 5.0
_FALLING_JERK_MPS3 = 9.0
_FORESIGHT_S = 6.0
_MARGIN_S = 1.0
"""Between the ego's leaving a conflict area and another's entering it."""
_WAIT_BEHIND_OBSTACLE_M = 13.0
_CLOSEST_TO_OBSTACLE_M = 9.0
_OVERSHOOT_M = 1.0
"""Who has come this far beyond a stop line goes on."""
_SHORTEST_MOVE_M = 12.0
_MOVE_S = 1.5
"""Time that a sideways move of a metre takes; longer ones take longer by their square root."""
_COMMAND_KNOWN_M = 50.0
"""The route's next turn is announced this far before the stop line."""


@dataclass(frozen=True)
class Conflict:
    """Where another stream's path crosses or joins the route inside a junction."""

    stream: int
    stream_enter_m: float
    stream_leave_m: float
    enter_m: float
    leave_m: float
    has_priority: bool


@dataclass(frozen=True)
class Gate:
    """A junction on the route."""

    junction: int
    turn: Command
    control: str
    side: int
    """Of the junction, see `Junction.side`."""
    stop_m: float
    enter_m: float
    exit_m: float
    conflicts: tuple[Conflict, ...]


@dataclass(frozen=True)
class Obstacle:
    """A parked vehicle beside or in the lane; it has to be passed `shift_m` to the left of the centreline."""

    begin_m: float
    end_m: float
    shift_m: float


class Neighbour(NamedTuple):
    """A moving vehicle near the route, in the route's coordinates."""

    vehicle: int
    along_m: float
    beside_m: float
    speed_mps: float
    """Along the route; negative when oncoming."""
    half_length_m: float
    half_width_m: float
    is_slow: bool
    """Of a kind that never goes fast, and so may be overtaken."""


class Walker(NamedTuple):
    """A pedestrian who crosses the route, or is about to."""

    along_m: float
    beside_m: float
    heads_left: bool


@dataclass(frozen=True)
class Surroundings:
    """What the expert sees at one time."""

    neighbours: list[Neighbour]
    walkers: list[Walker]
    light_colours: list[tuple[str, str]]
    """Per junction, for either side; "" without lights."""
    stream_vehicles: list[list[tuple[float, float, float]]]
    """Per stream: metres along it, half length and speed of its vehicles."""


@dataclass(frozen=True)
class Move:
    """A sideways move: from one offset to another while the ego goes `length_m` along the route."""

    start_m: float
    length_m: float
    before_m: float
    after_m: float

    def at(self, along_m: float) -> tuple[float, float]:
        """Offset and its slope."""
        t = (along_m - self.start_m) / self.length_m
        if t <= 0.0:
            return self.before_m, 0.0
        if t >= 1.0:
            return self.after_m, 0.0
        rise = self.after_m - self.before_m
        return (
            self.before_m + rise * t * t * t * (10.0 + t * (6.0 * t - 15.0)),
            rise * 30.0 * t * t * (1.0 - t) * (1.0 - t) / self.length_m,
        )

    def fastest_mps(self, along_m: float) -> float:
        """The speed at which the move stays comfortable; infinite when it is over."""
        if along_m >= self.start_m + self.length_m:
            return math.inf
        return self.length_m / (_MOVE_S * math.sqrt(abs(self.after_m - self.before_m)))


KEEPS_LANE = Move(0.0, 1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Ego:
    """The ego's state in the coordinates of its route.

    Attributes:
        along_m: of the rear axle.
        move: the sideways move under way, or the last one.
        passing_m: end of the parked vehicle being passed; None when not passing one.
        overtaking: index of the vehicle being overtaken, or None.
    """

    along_m: float
    speed_mps: float
    acceleration_mps2: float
    move: Move = KEEPS_LANE
    passing_m: float | None = None
    overtaking: int | None = None


@dataclass(frozen=True)
class Route:
    """A route with everything about it that does not move.

    Attributes:
        driving_path: where it leads.
        allowed_mps: per metre, the speed that limit and curvature allow, braking for curves in time.
        gates: the junctions, in order.
        obstacles: in order.
        may_use_left_lane: there is a lane of the same direction to the left, up to `left_lane_until_m`.
    """

    driving_path: DrivingPath
    allowed_mps: list[float]
    gates: tuple[Gate, ...]
    obstacles: tuple[Obstacle, ...]
    left_lane: tuple[tuple[float, float], ...]

    @property
    def path(self) -> Path:
        """The centreline."""
        return self.driving_path.path

    def command(self, along_m: float) -> Command:
        """Where the route goes at the junction ahead; straight when none is near."""
        for gate in self.gates:
            if along_m < gate.exit_m:
                return gate.turn if self.command_is_known(along_m) else Command.STRAIGHT
        return Command.STRAIGHT

    def command_is_known(self, along_m: float) -> bool:
        """Whether a junction is near enough for its turn to be announced."""
        return any(
            gate.stop_m - _COMMAND_KNOWN_M < along_m + FRONT_M and along_m < gate.exit_m
            for gate in self.gates
        )

    def pose(self, ego: Ego) -> tuple[float, float, float]:
        """World x, y and heading of the ego's rear axle."""
        x, y, heading = self.path.pose(ego.along_m)
        beside, slope = ego.move.at(ego.along_m)
        if beside == 0.0 and slope == 0.0:
            return x, y, heading
        x, y = x - beside * math.sin(heading), y + beside * math.cos(heading)
        return x, y, heading + math.atan2(slope, 1.0 - beside * self.curvature(ego.along_m))

    def curvature(self, along_m: float) -> float:
        """Of the centreline."""
        curvature = self.path.curvature
        return float(curvature[min(max(int(along_m + 0.5), 0), len(curvature) - 1)])

    def path_curvature(self, ego: Ego) -> float:
        """Of the line that the ego's rear axle takes, sideways move included."""
        heading_before = self.pose(replace(ego, along_m=ego.along_m - 0.5))[2]
        heading_after = self.pose(replace(ego, along_m=ego.along_m + 0.5))[2]
        return heading_after - heading_before


def speed_profile(driving_path: DrivingPath, network: Network) -> list[float]:
    """Per metre of a path, the speed that limits and comfortable curve driving allow.

    Args:
        driving_path: the path.
        network: has the roads' limits.

    Returns:
        One speed per point of the path; falling at a comfortable rate before every slower part.
    """
    curvature = np.abs(driving_path.path.curvature)
    limit = np.empty_like(curvature)
    for stretch in driving_path.stretches:
        limit[int(stretch.start_m) :] = network.roads[stretch.road].speed_limit_mps
    squared = np.minimum(limit * limit, _SIDEWAYS_MPS2 / np.maximum(curvature, 1e-3))
    # v² may fall by 2 b per metre; the smallest such line from any later point holds.
    grid = 2 * _CURVE_BRAKING_MPS2 * np.arange(len(squared))
    reachable: NDArray[np.float64] = np.minimum.accumulate((squared + grid)[::-1])[::-1] - grid
    speeds: list[float] = np.sqrt(reachable).tolist()
    return speeds


def step(route: Route, ego: Ego, seen: Surroundings) -> Ego:
    """Drive on for STEP_S.

    Args:
        route: where to go.
        ego: the state now.
        seen: everything that moves, now.
    """
    ego = _sideways(route, ego, seen)
    wanted = wanted_acceleration(route, ego, seen)
    if -3.5 < wanted < 0.0:
        wanted = max(wanted, -0.5 - 2.0 * ego.speed_mps)  # ease off just before standing
    now = ego.acceleration_mps2
    change = min(max(wanted - now, -_FALLING_JERK_MPS3 * STEP_S), _RISING_JERK_MPS3 * STEP_S)
    acceleration = min(max(now + change, -HARDEST_BRAKING_MPS2), STRONGEST_ACCELERATION_MPS2)
    speed = ego.speed_mps + acceleration * STEP_S
    if speed < 0.0:
        speed, acceleration = 0.0, -ego.speed_mps / STEP_S
    travelled = (ego.speed_mps + speed) / 2 * STEP_S
    beside, slope = ego.move.at(ego.along_m)
    stretch = 1.0 - beside * route.curvature(ego.along_m)
    travelled /= math.hypot(stretch, slope)
    return replace(ego, along_m=ego.along_m + travelled, speed_mps=speed, acceleration_mps2=acceleration)


def wanted_acceleration(route: Route, ego: Ego, seen: Surroundings) -> float:
    """What the expert would do now if the accelerator reacted at once, m/s²."""
    along, speed = ego.along_m, ego.speed_mps
    front = along + FRONT_M
    allowed = route.allowed_mps
    ahead = min(int(along + _LAG_S * speed), len(allowed) - 1)
    limit = allowed[min(int(along), len(allowed) - 1)]
    goal = min(allowed[ahead], limit, ego.move.fastest_mps(along))
    wanted = _free_acceleration(speed, goal)
    beside, _ = ego.move.at(along)
    leftmost = max(beside, ego.move.after_m) + HALF_WIDTH_M + 0.25
    rightmost = min(beside, ego.move.after_m) - HALF_WIDTH_M - 0.25
    for other in seen.neighbours:
        gap = other.along_m - other.half_length_m - front
        if (
            -1.0 < gap < 80.0
            and other.vehicle != ego.overtaking
            # What crosses the ego's turn is a matter of priority, see `_stops`.
            and (other.speed_mps > -0.5 or gap < 3.0 or ego.move.after_m > 0.0)
            and other.beside_m - other.half_width_m < leftmost
            and other.beside_m + other.half_width_m > rightmost
        ):
            wanted = min(wanted, follow(speed, limit, gap, other.speed_mps))
    for stop in _stops(route, ego, seen):
        wanted = min(wanted, stop_before(speed, stop - front))
    return wanted


def _free_acceleration(speed: float, goal: float) -> float:
    if speed <= goal:
        ratio = speed / goal
        return STRONGEST_ACCELERATION_MPS2 * (1.0 - ratio * ratio * ratio * ratio)
    return max((goal - speed) / _LAG_S, -4.0)


def follow(speed: float, goal: float, gap: float, lead_speed: float) -> float:
    """Acceleration behind another vehicle (the intelligent driver model).

    Source: Treiber, Hennecke, Helbing, Congested traffic states in empirical observations, 2000.
    """
    if gap < 0.3:
        return -HARDEST_BRAKING_MPS2 if speed > 1.0 else -speed / 0.3
    closing = speed * (speed - lead_speed) / 4.2  # twice the root of comfortable acceleration times braking
    wish = _STANDSTILL_GAP_M + max(0.0, _TIME_GAP_S * speed + closing)
    ratio = speed / max(goal, 1.0)
    return max(
        STRONGEST_ACCELERATION_MPS2 * (1.0 - ratio * ratio * ratio * ratio - (wish / gap) ** 2),
        -HARDEST_BRAKING_MPS2,
    )


def stop_before(speed: float, gap: float) -> float:
    """Acceleration that brings the front bumper to rest `gap` metres ahead; infinite while that has time."""
    if gap <= 0.2:
        return -2.5 if speed > 0.3 else -speed / STEP_S
    needed = speed * speed / (2.0 * gap)
    if needed < _LEAST_STOP_BRAKING_MPS2 and gap > 6.0:
        return math.inf
    room = max(gap - _LAG_S * speed, 0.0)
    wanted = (math.sqrt(2.0 * _STOP_BRAKING_MPS2 * room) - speed) / _LAG_S
    return max(wanted, -(1.1 * needed + 0.3))


def comfortable_speed(route: Route, ego: Ego, seen: Surroundings) -> float:
    """The highest speed, up to the present one, at which the ego need not brake hard from here."""
    front = ego.along_m + FRONT_M
    while ego.speed_mps > 0.5:
        stops = _stops(route, ego, seen, even_if_late=True)
        late = any(ego.speed_mps**2 > 6.4 * max(place - front, 0.1) for place in stops if place > front - 1.0)
        obstacle = _next_obstacle(route, ego)
        if obstacle is not None:
            late = late or not _fits(
                obstacle.begin_m - front, ego.speed_mps, obstacle.shift_m - ego.move.after_m
            )
        if not late and wanted_acceleration(route, ego, seen) > -3.2:
            break
        ego = replace(ego, speed_mps=0.85 * ego.speed_mps)
    return ego.speed_mps


def _stops(route: Route, ego: Ego, seen: Surroundings, even_if_late: bool = False) -> list[float]:
    """Places along the route that the front bumper must not pass now; those it can still stop at."""
    front, speed = ego.along_m + FRONT_M, ego.speed_mps
    sight = 10.0 + speed * speed / (2 * _LEAST_STOP_BRAKING_MPS2) + _LAG_S * speed
    allowed = route.allowed_mps
    stops: list[float] = []

    def can_stop(place: float, braking: float) -> bool:
        return front < place + _OVERSHOOT_M and (
            even_if_late or speed * speed <= 2.0 * braking * max(place - front, 0.4)
        )

    for gate in route.gates:
        if gate.stop_m - front > sight:
            break
        if ego.along_m - REAR_M > gate.exit_m:
            continue
        colour = seen.light_colours[gate.junction][gate.side]
        closed = colour in ("red", "red_amber")
        if (closed and can_stop(gate.stop_m, HARDEST_BRAKING_MPS2)) or (
            colour == "amber" and can_stop(gate.stop_m, 3.2)
        ):
            stops.append(gate.stop_m)
        for conflict in gate.conflicts:
            if front > conflict.enter_m + 1.0:
                continue
            pace = max(min(speed, allowed[int(conflict.enter_m)]), 4.5)
            needed = (conflict.enter_m - front) / max(speed, 4.5) + (
                conflict.leave_m + 5.0 - conflict.enter_m
            ) / pace
            if not _taken(
                conflict, seen.stream_vehicles[conflict.stream], min(needed, _FORESIGHT_S) + _MARGIN_S
            ):
                continue
            inside = conflict.enter_m - 1.5
            waits_inside = gate.control != "yield" and inside > gate.stop_m
            for place in (inside,) if waits_inside else (gate.stop_m, inside):
                if can_stop(place, 4.5):
                    stops.append(place)
                    break
    beside = ego.move.after_m
    for walker in seen.walkers:
        place = walker.along_m - 3.2
        passed = (
            walker.beside_m > beside + HALF_WIDTH_M + 0.9
            if walker.heads_left
            else walker.beside_m < beside - HALF_WIDTH_M - 0.9
        )
        if passed or place - front > sight:
            continue
        for stop in (place, walker.along_m - 1.0):
            if can_stop(stop, HARDEST_BRAKING_MPS2):
                stops.append(stop)
                break
    obstacle = _next_obstacle(route, ego)
    if obstacle is not None and obstacle.begin_m - front < sight + _WAIT_BEHIND_OBSTACLE_M:
        length = _move_length(speed, obstacle.shift_m - ego.move.after_m)
        gap = obstacle.begin_m - front
        if gap < length + 30.0 and not (
            _fits(gap, speed, obstacle.shift_m - ego.move.after_m)
            and _is_free(route, ego, seen, obstacle.shift_m, obstacle.end_m)
        ):
            place = obstacle.begin_m - _WAIT_BEHIND_OBSTACLE_M
            stops.append(place if can_stop(place, 3.5) else obstacle.begin_m - _CLOSEST_TO_OBSTACLE_M)
    return stops


def _taken(conflict: Conflict, vehicles: list[tuple[float, float, float]], needed_s: float) -> bool:
    """Whether a vehicle of the other stream is in the conflict area, or has priority and is near."""
    for along, half_length, speed in vehicles:
        if along - half_length > conflict.stream_leave_m:
            continue
        gap = conflict.stream_enter_m - (along + half_length)
        if gap < 1.0 or (conflict.has_priority and gap < speed * needed_s):
            return True
    return False


def _move_length(speed: float, shift_m: float) -> float:
    """How long a sideways move takes, so that it stays comfortable."""
    return max(_SHORTEST_MOVE_M * min(1.0, 0.4 + abs(shift_m) / 4), _MOVE_S * speed * math.sqrt(abs(shift_m)))


def _fits(gap: float, speed: float, shift_m: float) -> bool:
    """Whether a sideways move can still be made comfortably before an obstacle."""
    return gap - 1.0 >= (0.88 * _move_length(speed, shift_m) if speed > 1.0 else 0.5 * _SHORTEST_MOVE_M)


def _next_obstacle(route: Route, ego: Ego) -> Obstacle | None:
    """The first parked vehicle that the present line would hit."""
    for obstacle in route.obstacles:
        if obstacle.begin_m > ego.along_m + FRONT_M - 1.0 and obstacle.shift_m > ego.move.after_m + 0.1:
            return obstacle
    return None


def _sideways(route: Route, ego: Ego, seen: Surroundings) -> Ego:
    """Start a sideways move if it is time for one."""
    along, speed = ego.along_m, ego.speed_mps
    move = ego.move
    if along < move.start_m + move.length_m:
        return ego
    front = along + FRONT_M
    obstacle = _next_obstacle(route, ego)
    if obstacle is not None:
        length = _move_length(speed, obstacle.shift_m - move.after_m)
        gap = obstacle.begin_m - front
        if (
            gap < length + 3.0 + 0.3 * speed
            and _fits(gap, speed, obstacle.shift_m - move.after_m)
            and _is_free(route, ego, seen, obstacle.shift_m, obstacle.end_m)
        ):
            move = Move(along, min(length, gap - 1.0), move.after_m, obstacle.shift_m)
            return replace(ego, move=move, passing_m=obstacle.end_m)
    if move.after_m == 0.0:
        return _overtaking(route, ego, seen)
    end = ego.passing_m
    if ego.overtaking is not None:
        ends = [o.along_m + o.half_length_m + 5.0 for o in seen.neighbours if o.vehicle == ego.overtaking]
        end = ends[0] if ends else None
    length = _move_length(speed, move.after_m)
    if end is not None and along - REAR_M < end + 1.0:
        return ego
    later = [o for o in route.obstacles if 0.0 < o.begin_m - front < length + 20.0]
    if later:
        return ego
    return replace(ego, move=Move(along, length, move.after_m, 0.0), passing_m=None, overtaking=None)


def _overtaking(route: Route, ego: Ego, seen: Surroundings) -> Ego:
    """Change to the left lane behind a slow vehicle, where that lane goes on long enough."""
    along, speed = ego.along_m, ego.speed_mps
    if not any(begin <= along and along + 90.0 < end for begin, end in route.left_lane):
        return ego
    for other in seen.neighbours:
        gap = other.along_m - other.half_length_m - along - FRONT_M
        if not (other.is_slow and abs(other.beside_m) < 1.5 and gap > 0.0 and other.speed_mps > 1.0):
            continue
        length = _move_length(speed, LANE_WIDTH_M)
        end = other.along_m + other.half_length_m
        close = gap < max(length - 2.5 * other.speed_mps, 0.0) + 8.0 + 0.8 * speed
        if close and gap > 5.0 and _is_free(route, ego, seen, LANE_WIDTH_M, end):
            return replace(ego, move=Move(along, length, 0.0, LANE_WIDTH_M), overtaking=other.vehicle)
    return ego


def _is_free(route: Route, ego: Ego, seen: Surroundings, beside_m: float, end_m: float) -> bool:
    """Whether the line `beside_m` is free of traffic until the ego is back from it after `end_m`."""
    if beside_m < 0.75:
        return True
    along, speed = ego.along_m, ego.speed_mps
    front, rear = along + FRONT_M, along - REAR_M
    back = end_m + _move_length(speed, beside_m) + FRONT_M
    for other in seen.neighbours:
        if abs(other.beside_m - beside_m) > other.half_width_m + HALF_WIDTH_M + 0.3:
            continue
        if other.speed_mps < -0.5:
            if other.along_m + other.half_length_m < rear:
                continue
            duration = 1.0 + (back - along) / max(speed, 5.5)
            if other.along_m - other.half_length_m + other.speed_mps * duration < back + 4.0:
                return False
        elif other.along_m > along:
            gap = other.along_m - other.half_length_m - front
            if gap < 4.0 + 2.0 * max(0.0, speed - other.speed_mps):
                return False
        elif rear - other.along_m - other.half_length_m < 4.0 + 2.5 * max(0.0, other.speed_mps - speed):
            return False
    return True
