"""A storyline made ready to be played: what each vehicle heeds, and what a route has to do with everybody."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from eval_nuscenes.world import expert
from eval_nuscenes.world.expert import Conflict, Ego, Gate, Neighbour, Route, Surroundings, Walker
from eval_nuscenes.world.roads import DrivingPath, Passage, squared_distances
from eval_nuscenes.world.scene import Points
from eval_nuscenes.world.storyline import Storyline
from vla_autoprune.frame import Command

AMBER_S = 3.0
RED_AMBER_S = 2.0
GONE = -1e6
"""Place of a vehicle that has left its stream."""

_CROSSROAD_GREEN_DELAY_S = 4.0
_TO_THE_END_M = 1000.0
_FAR_M = 9.0
"""Beyond this from the route a vehicle does not concern the ego."""
_NOWHERE = 99.0
_TOUCHING_M = 2.3
"""Paths closer than this cannot be driven at the same time."""


@dataclass
class Moment:
    """Everything that changes during a drive. Lists are by vehicle, walker or junction."""

    time_s: float
    ego: Ego
    along: list[float]
    speed: list[float]
    acceleration: list[float]
    present: list[bool]
    stopped_until: list[float]
    """Of a vehicle's one stop: infinite before, the time it ends once it stands."""
    walked: list[float]
    walking: list[bool]
    amber_at: list[float]
    green_at: list[float]

    def copy(self) -> Moment:
        """An independent one."""
        return replace(
            self,
            along=self.along.copy(),
            speed=self.speed.copy(),
            acceleration=self.acceleration.copy(),
            present=self.present.copy(),
            stopped_until=self.stopped_until.copy(),
            walked=self.walked.copy(),
            walking=self.walking.copy(),
            amber_at=self.amber_at.copy(),
            green_at=self.green_at.copy(),
        )


@dataclass(frozen=True)
class View:
    """A route together with what it has to do with every stream."""

    route: Route
    along: list[list[float]]
    """Per stream and metre: the nearest place on the route."""
    beside: list[list[float]]
    """Per stream and metre: metres to the left of the route; _NOWHERE if far."""
    conflicts: list[list[Conflict]]
    """Per stream."""
    walkers: tuple[int, ...]
    """Those who cross this route."""


class Drive:
    """A storyline made ready to be played: speed profiles, stops and conflicts worked out."""

    def __init__(self, story: Storyline) -> None:
        self.story = story
        network = story.network
        self.profiles: list[list[float]] = []
        self.stops: list[list[tuple[float, float, int, int]]] = []
        for stream in story.streams:
            path = stream.driving_path
            self.profiles.append(expert.speed_profile(path, network))
            stops = []
            for passage in path.passages:
                side = self._side(path, passage.stop_m, passage.junction)
                stops.append((passage.stop_m, passage.exit_m, passage.junction, side))
            self.stops.append(sorted(stops))
        self.walker_stops = [self._walkers_on(stream.driving_path) for stream in story.streams]
        self.rivals = self._find_rivals()
        self.half_lengths = [story.actors[role.actor].length_m / 2 for role in story.vehicles]
        self.half_widths = [story.actors[role.actor].width_m / 2 for role in story.vehicles]

    @cached_property
    def view(self) -> View:
        """Of the storyline's own route."""
        return self.view_of(self.story.route)

    def alternative(self, moment: Moment, turn: Command) -> View | None:
        """The view along the route that turns otherwise at the junction ahead; None where there is none."""
        story = self.story
        front = moment.ego.along_m + expert.FRONT_M
        ahead = [passage for passage in story.route.passages if passage.stop_m > front]
        if not ahead or ahead[0].turn is turn or moment.ego.move.after_m != 0.0:
            return None
        passage = ahead[0]
        stretch = [s for s in story.route.stretches if s.start_m <= front][-1]
        lanes = story.network.roads[stretch.road].lanes
        if (turn is Command.LEFT and stretch.lane != lanes - 1) or (
            turn is Command.RIGHT and stretch.lane != 0
        ):
            return None
        turns = [entry for entry in story.turns if entry[0] < passage.junction]
        if turn is not Command.STRAIGHT:
            turns.append((passage.junction, turn, 0))
        path = story.network.follow((0, 1, story.start_lane), 0, turns, _TO_THE_END_M)
        return self.view_of(path, passage.enter_m)

    def view_of(self, path: DrivingPath, until_m: float = math.inf) -> View:
        """Work out what a route has to do with the streams.

        Args:
            path: the route.
            until_m: parked vehicles and pedestrians of the storyline count up to here.
        """
        story, network = self.story, self.story.network
        along, beside = self._projections(path)
        conflicts: list[list[Conflict]] = [[] for _ in story.streams]
        gates = []
        for passage in path.passages:
            junction = network.junctions[passage.junction]
            side = self._side(path, passage.stop_m, passage.junction)
            here = []
            for number, stream in enumerate(story.streams):
                if stream.shares_lane:
                    continue
                conflict = self._conflict(number, path, passage, side, along[number], beside[number])
                if conflict is not None:
                    here.append(conflict)
                    conflicts[number].append(conflict)
            gates.append(
                Gate(
                    passage.junction,
                    passage.turn,
                    junction.control,
                    side,
                    passage.stop_m,
                    passage.enter_m,
                    passage.exit_m,
                    tuple(here),
                )
            )
        left_lane = []
        for stretch in path.stretches:
            if stretch.lane + 1 < network.roads[stretch.road].lanes:
                cuts = [p for p in path.passages if stretch.start_m - 1 <= p.stop_m <= stretch.end_m]
                begin = stretch.start_m
                for passage in cuts:
                    left_lane.append((begin, passage.stop_m))
                    begin = passage.exit_m
                left_lane.append((begin, stretch.end_m))
        route = Route(
            path,
            expert.speed_profile(path, network),
            tuple(gates),
            tuple(obstacle for obstacle in story.obstacles() if obstacle.begin_m < until_m),
            tuple(left_lane),
        )
        walkers = tuple(
            number
            for number, role in enumerate(story.walkers)
            if role.along_m is not None and role.along_m < until_m
        )
        return View(route, along, beside, conflicts, walkers)

    def begin(self) -> Moment:
        """The start of the drive."""
        story = self.story
        limit = self.view.route.allowed_mps[int(story.start_m)]
        ego = Ego(story.start_m, min(story.start_speed_mps, limit), 0.0)
        moment = Moment(
            0.0,
            ego,
            [role.start_m for role in story.vehicles],
            [role.speed_mps for role in story.vehicles],
            [0.0] * len(story.vehicles),
            [role.appears_m <= story.start_m for role in story.vehicles],
            [math.inf] * len(story.vehicles),
            [0.0] * len(story.walkers),
            [role.starts_within_m == math.inf for role in story.walkers],
            [-100.0 if light and light.starts == "red" else math.inf for light in story.lights],
            [math.inf] * len(story.lights),
        )
        for other in self.surroundings(self.view, moment, ego).neighbours:
            if abs(other.beside_m) < 2.4 and abs(other.along_m - ego.along_m) < 4.0 + other.half_length_m:
                moment.present[other.vehicle] = False
                moment.along[other.vehicle] = GONE
        moment.ego = self.at_safe_speed(self.view, moment, ego)
        return moment

    def at_safe_speed(self, view: View, moment: Moment, ego: Ego) -> Ego:
        """The ego, slowed down until it need not brake hard from here."""
        seen = self.surroundings(view, moment, ego)
        return replace(ego, speed_mps=expert.comfortable_speed(view.route, ego, seen))

    def surroundings(self, view: View, moment: Moment, ego: Ego) -> Surroundings:
        """What there is to be seen of everything that moves."""
        story = self.story
        neighbours: list[Neighbour] = []
        streams: list[list[tuple[float, float, float]]] = [[] for _ in story.streams]
        for number, role in enumerate(story.vehicles):
            if not moment.present[number]:
                continue
            place = moment.along[number]
            index = min(int(place), len(view.beside[role.stream]) - 2)
            half_length, speed = self.half_lengths[number], moment.speed[number]
            streams[role.stream].append((place, half_length, speed))
            beside = view.beside[role.stream]
            if beside[index] == _NOWHERE or beside[index + 1] == _NOWHERE:
                continue
            along = view.along[role.stream]
            slope = along[index + 1] - along[index]
            here = along[index] + (place - index) * slope
            if abs(here - ego.along_m) < 110.0:
                neighbours.append(
                    Neighbour(
                        number,
                        here,
                        beside[index],
                        speed * slope,
                        half_length,
                        self.half_widths[number],
                        role.is_slow,
                    )
                )
        walkers = []
        for number in view.walkers:
            walker = story.walkers[number]
            if walker.along_m is not None and moment.walked[number] < walker.length_m:
                walked = moment.walked[number] if walker.heads_left else -moment.walked[number]
                walkers.append(Walker(walker.along_m, walker.beside_m + walked, walker.heads_left))
        colours = [self.light_colours(moment, number) for number in range(len(story.lights))]
        return Surroundings(neighbours, walkers, colours, streams)

    def light_colours(self, moment: Moment, junction: int) -> tuple[str, str]:
        """What a junction's lights show to the route's road and to the other one; empty without lights."""
        if self.story.lights[junction] is None:
            return "", ""
        now, amber, green = moment.time_s, moment.amber_at[junction], moment.green_at[junction]
        if now >= green:
            return "green", "red"
        if now >= green - RED_AMBER_S:
            return "red_amber", "red"
        red = amber + AMBER_S
        if now < amber:
            return "green", "red"
        if now < red:
            return "amber", "red"
        if now >= green - RED_AMBER_S - AMBER_S:
            return "red", "amber"
        return "red", "green" if now >= amber + _CROSSROAD_GREEN_DELAY_S else "red"

    def _side(self, path: DrivingPath, along: float, junction: int) -> int:
        road = [s.road for s in path.stretches if s.start_m <= along + 0.01][-1]
        return self.story.network.junctions[junction].side(road)

    def _walkers_on(self, path: DrivingPath) -> list[tuple[float, int]]:
        """Where a stream has to stop for which crossing pedestrian."""
        found = []
        for number, role in enumerate(self.story.walkers):
            if role.along_m is None:
                continue
            reach = role.length_m / 2
            middle = (
                role.start[0] + reach * math.cos(role.heading),
                role.start[1] + reach * math.sin(role.heading),
            )
            away = path.path.points - middle
            distances = np.hypot(away[:, 0], away[:, 1])
            nearest = int(distances.argmin())
            if distances[nearest] < reach:
                found.append((nearest - 3.0, number))
        return found

    def _find_rivals(self) -> list[list[tuple[int, float, float, float]]]:
        """Per vehicle, the vehicles that may be ahead of it in its lane.

        Entries are the vehicle, what to add to its place to get the follower's coordinates, and between which
        of its own places it is in the follower's way. Of the same stream there is only the next one ahead.
        """
        story = self.story
        shared = {
            (one, other): self._shared_lane(one, other)
            for one in range(len(story.streams))
            for other in range(len(story.streams))
            if one != other
        }
        rivals: list[list[tuple[int, float, float, float]]] = []
        for number, role in enumerate(story.vehicles):
            ahead = [
                (other.start_m, -index)
                for index, other in enumerate(story.vehicles)
                if other.stream == role.stream and (other.start_m, -index) > (role.start_m, -number)
            ]
            found = [(-min(ahead)[1], 0.0, -math.inf, math.inf)] if ahead else []
            for index, other in enumerate(story.vehicles):
                place = shared.get((role.stream, other.stream))
                if place is not None:
                    found.append((index, *place))
            rivals.append(found)
        return rivals

    def _shared_lane(self, one: int, other: int) -> tuple[float, float, float] | None:
        """What to add to the other stream's places, and between which of these both share a lane, if ever."""
        path, other_path = self.story.streams[one].driving_path, self.story.streams[other].driving_path
        pairs = [
            (stretch, candidate)
            for stretch in path.stretches
            for candidate in other_path.stretches
            if (stretch.road, stretch.direction, stretch.lane)
            == (candidate.road, candidate.direction, candidate.lane)
        ]
        if not pairs:
            return None
        stretch, candidate = pairs[0]
        until = pairs[-1][1].end_m + 5.0
        # Both begin somewhere on the lane; it is shared from the later beginning.
        points, other_points = path.path.points, other_path.path.points
        begin = min(int(candidate.start_m) + 1, len(other_points) - 1)
        place, distance = _nearest(points, other_points[begin])
        if distance < 2.0 and place >= int(stretch.start_m):
            return place - begin, candidate.start_m, until
        begin = min(int(stretch.start_m) + 1, len(points) - 1)
        place, distance = _nearest(other_points, points[begin])
        return (begin - place, place - 1.0, until) if distance < 2.0 else None

    def _projections(self, path: DrivingPath) -> tuple[list[list[float]], list[list[float]]]:
        """Every stream's points in the coordinates of a route."""
        paths = [stream.driving_path.path.points for stream in self.story.streams]
        if not paths:
            return [], []
        points = np.concatenate(paths)
        route, heading = path.path.points, path.path.heading
        # Every fourth point finds the neighbourhood, and stepping along the tangent the place.
        rough = 4 * squared_distances(points[::4], route[::4]).argmin(axis=1)
        nearest = np.repeat(rough, 4)[: len(points)]
        cos, sin = np.cos(heading), np.sin(heading)
        for _ in range(3):
            away = points - route[nearest]
            ahead = away[:, 0] * cos[nearest] + away[:, 1] * sin[nearest]
            nearest = np.clip(nearest + np.rint(ahead).astype(np.int64), 0, len(route) - 1)
        away = points - route[nearest]
        ahead = away[:, 0] * cos[nearest] + away[:, 1] * sin[nearest]
        left = away[:, 1] * cos[nearest] - away[:, 0] * sin[nearest]
        left[(np.abs(left) > _FAR_M) | (np.abs(ahead) > 2.0)] = _NOWHERE
        cuts = np.cumsum([len(points) for points in paths])[:-1]
        along = [part.tolist() for part in np.split(nearest + ahead, cuts)]
        return along, [part.tolist() for part in np.split(left, cuts)]

    def _conflict(
        self,
        number: int,
        path: DrivingPath,
        passage: Passage,
        side: int,
        along: list[float],
        beside: list[float],
    ) -> Conflict | None:
        """Where a stream meets the route inside a junction."""
        story = self.story
        stream = story.streams[number].driving_path
        crossing = [p for p in stream.passages if p.junction == passage.junction]
        if not crossing:
            return None
        first, last = int(crossing[0].enter_m) - 2, int(crossing[0].exit_m) + 8
        touched = [
            index
            for index in range(max(first, 0), min(last, len(beside)))
            if abs(beside[index]) < 2.3 and passage.enter_m - 4.0 < along[index] < passage.exit_m + 6.0
        ]
        if not touched:
            return None
        stream_side = self._side(stream, crossing[0].stop_m, passage.junction)
        control = story.network.junctions[passage.junction].control
        if stream_side != side:
            has_priority = control == "yield"
        else:
            if (
                abs(beside[max(int(crossing[0].stop_m), 0)]) < 6.0
                and along[touched[-1]] > along[touched[0]]
                and (along[int(crossing[0].stop_m)] < passage.enter_m)
            ):
                return None  # it goes the same way
            has_priority = passage.turn is Command.LEFT
        places = [along[index] for index in touched]
        return Conflict(
            number,
            touched[0] - 0.5,
            min(touched[-1], touched[0] + 12) + 0.5,
            min(places) - 0.5,
            max(places) + 0.5,
            has_priority,
        )


def _nearest(points: Points, spot: Points) -> tuple[int, float]:
    """Index of the point nearest to a spot, and the distance."""
    away = points - spot
    squared = np.einsum("ij,ij->i", away, away)
    index = int(squared.argmin())
    return index, math.sqrt(squared[index])
