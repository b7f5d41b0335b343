"""What happens in a drive: the roads, the ego's route, who else is there and what they will do.

Everything random is drawn here, once; how it plays out follows from the rules of traffic and of the expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from eval_nuscenes.world.expert import FRONT_M, HALF_WIDTH_M, Obstacle
from eval_nuscenes.world.roads import (
    CROSSING_DEPTH_M,
    CROSSING_SETBACK_M,
    LANE_WIDTH_M,
    LEAD_IN_M,
    SHOULDER_M,
    SPEED_LIMITS_MPS,
    STRAIGHT_AT_JUNCTION_M,
    WALKWAY_M,
    DrivingPath,
    Leg,
    Network,
    build_network,
    path_through,
)
from eval_nuscenes.world.scene import Actor
from vla_autoprune.frame import Command

KINDS: tuple[str, ...] = ("free", "lead", "light", "pedestrian", "lane_change", "yield", "curve")
"""What a drive has most of."""

KIND_SHARES: tuple[float, ...] = (0.07, 0.17, 0.21, 0.17, 0.14, 0.13, 0.11)
"""How often each kind is met."""
_LAYOUT_ATTEMPTS = 60

_CAR_COLOURS = (
    (225, 228, 230),
    (150, 156, 162),
    (42, 46, 54),
    (38, 84, 160),
    (30, 120, 120),
    (96, 72, 52),
    (196, 186, 150),
)
_CROSSING_CLOTHES = ((255, 60, 200), (255, 40, 160), (240, 80, 240))
_WALKWAY_CLOTHES = ((60, 66, 90), (84, 80, 76), (48, 74, 78))


@dataclass(frozen=True)
class Stream:
    """A path that vehicles follow one behind the other.

    Attributes:
        shares_lane: it starts out as the ego's own lane.
    """

    driving_path: DrivingPath
    shares_lane: bool = False


@dataclass(frozen=True)
class VehicleRole:
    """A vehicle that moves.

    Attributes:
        actor: index in `Storyline.actors`.
        stream: index in `Storyline.streams`; vehicles of a stream are listed from front to back.
        start_m: where on its stream it begins.
        speed_mps: what it starts with.
        wished_mps: what it drives when nothing is in the way.
        appears_m: it appears once the ego has come this far along its route.
        stop_m: where it stops once, for `stop_s` seconds; infinite for never.
        is_slow: of a kind that never goes fast.
    """

    actor: int
    stream: int
    start_m: float
    speed_mps: float
    wished_mps: float
    appears_m: float = -math.inf
    stop_m: float = math.inf
    stop_s: float = 0.0
    is_slow: bool = False


@dataclass(frozen=True)
class ParkedRole:
    """A parked vehicle, beside the ego's route."""

    actor: int
    along_m: float
    beside_m: float


@dataclass(frozen=True)
class WalkerRole:
    """A pedestrian who walks in a straight line.

    Attributes:
        start: x, y.
        heading: walking direction.
        length_m: of the walk; then the pedestrian stands.
        starts_within_m: begins to walk when the ego is this close; infinite for at once.
        along_m: where the walk crosses the ego's route; None if it does not.
        beside_m: of the start, from the route's centreline.
        heads_left: as the ego sees it.
    """

    actor: int
    start: tuple[float, float]
    heading: float
    length_m: float
    speed_mps: float
    starts_within_m: float
    along_m: float | None = None
    beside_m: float = 0.0
    heads_left: bool = True


@dataclass(frozen=True)
class LightProgramme:
    """When a junction's lights change.

    Attributes:
        starts: "green" or "red", for the route.
        changes_within_m: once the ego is this close to the stop line, green turns amber at once, or red turns
            green after `hold_s`; 0 for never.
        hold_s: how long red lasts after that (after amber, for a light that starts green).
    """

    starts: str
    changes_within_m: float
    hold_s: float


@dataclass(frozen=True)
class Storyline:
    """A drive before it happens."""

    kind: str
    network: Network
    route: DrivingPath
    turns: tuple[tuple[int, Command, int], ...]
    """Junction, turn and lane after it, of the junctions where the route turns."""
    start_lane: int
    start_m: float
    start_speed_mps: float
    actors: tuple[Actor, ...]
    streams: tuple[Stream, ...]
    vehicles: tuple[VehicleRole, ...]
    parked: tuple[ParkedRole, ...]
    walkers: tuple[WalkerRole, ...]
    lights: tuple[LightProgramme | None, ...]
    """Per junction."""
    daylight: float
    haze: float
    """0 clear … 1 the road fades at about 100 m."""

    def obstacles(self) -> tuple[Obstacle, ...]:
        """The parked vehicles that the ego has to go around."""
        found = []
        for role in self.parked:
            actor = self.actors[role.actor]
            shift = role.beside_m + actor.width_m / 2 + 0.75 + HALF_WIDTH_M
            if shift > 1.3 and self._lane_to_the_left(role.along_m):
                shift = LANE_WIDTH_M
            if shift > 0.2:
                half = actor.length_m / 2
                found.append(Obstacle(role.along_m - half, role.along_m + half, shift))
        return tuple(sorted(found, key=lambda obstacle: obstacle.begin_m))

    def _lane_to_the_left(self, along_m: float) -> bool:
        for stretch in self.route.stretches:
            if stretch.start_m <= along_m < stretch.end_m:
                return stretch.lane + 1 < self.network.roads[stretch.road].lanes
        return False


def draw_kind(rng: np.random.Generator) -> str:
    """A kind of drive, as often as training sees it."""
    return _pick(rng, KINDS, KIND_SHARES)


def _pick(rng: np.random.Generator, names: Sequence[str], shares: Sequence[float]) -> str:
    """One of the names, as often as its share of 1."""
    drawn = float(rng.random())
    for name, share in zip(names, shares, strict=True):
        drawn -= share
        if drawn < 0.0:
            return name
    return names[-1]


def tell(rng: np.random.Generator, kind: str, duration_s: float) -> Storyline:
    """Think up a drive.

    Args:
        rng: decides everything.
        kind: one of KINDS.
        duration_s: how long the ego will drive.
    """
    lanes = 2 if rng.random() < (0.7 if kind == "lane_change" else 0.35) else 1
    events, network = _roads(rng, kind, lanes, duration_s)
    teller = _Teller(rng, kind, network, events)
    return teller.tell()


def _roads(
    rng: np.random.Generator, kind: str, lanes: int, duration_s: float
) -> tuple[tuple[str, ...], Network]:
    """The events of each leg, and the network."""
    needed = SPEED_LIMITS_MPS[2] * duration_s + 15.0
    for attempt in range(_LAYOUT_ATTEMPTS):
        legs: list[Leg] = []
        events: list[str] = []
        turned = 0.0
        while sum(leg.length_m for leg in legs) < needed:
            leg, event = _leg(rng, kind, turned, winding=attempt < _LAYOUT_ATTEMPTS // 2)
            if attempt == _LAYOUT_ATTEMPTS - 1:
                leg = replace(leg, turn=Command.STRAIGHT, curve_rad=0.0)
            legs.append(leg)
            events.append(event)
            turned += leg.curve_rad + {"left": 1, "right": -1, "straight": 0}[leg.turn.value] * math.pi / 2
        network = build_network(lanes, legs, float(rng.uniform(-math.pi, math.pi)))
        if network is not None:
            return tuple(events), network
    raise AssertionError("a straight road with crossroads never meets itself")


def _leg(rng: np.random.Generator, kind: str, turned: float, winding: bool) -> tuple[Leg, str]:
    """A leg and its event, given how far the route has turned left so far."""
    own = {
        "free": "none",
        "lead": "none",
        "light": "none",
        "pedestrian": "crossing",
        "lane_change": "blocked",
        "yield": "none",
        "curve": "curve",
    }[kind]
    others = ("none", "crossing", "exit_crossing", "kerb", "curve")
    event = own if rng.random() < 0.75 else others[int(rng.integers(len(others)))]
    if event == "crossing" and rng.random() < 0.3:
        event = "exit_crossing"
    shares = {"light": (0.85, 0.05, 0.1), "yield": (0.05, 0.85, 0.1), "free": (0.1, 0.0, 0.9)}
    control = _pick(rng, ("signal", "yield", "plain"), shares.get(kind, (0.35, 0.25, 0.4)))
    turns = [Command.STRAIGHT, Command.STRAIGHT, Command.LEFT, Command.RIGHT]
    if turned > 0.6:
        turns = [Command.STRAIGHT, Command.RIGHT, Command.RIGHT]
    elif turned < -0.6:
        turns = [Command.STRAIGHT, Command.LEFT, Command.LEFT]
    turn = turns[int(rng.integers(len(turns)))]
    sign = 1.0 if rng.random() < 0.5 - 0.4 * np.clip(turned, -1, 1) else -1.0
    before, after = int(rng.integers(26, 50)), int(rng.integers(STRAIGHT_AT_JUNCTION_M + 4, 50))
    curve, radius, crossing = 0.0, 40.0, None
    if event == "curve":
        curve, radius = sign * float(rng.uniform(0.7, 1.3)), float(rng.uniform(18.0, 34.0))
    elif event in ("blocked", "kerb"):
        before = int(rng.integers(74, 86))
    else:
        if event == "crossing":
            crossing = int(rng.integers(36, 60))
            before = crossing - 8
        if rng.random() < 0.5:
            curve, radius = sign * float(rng.uniform(0.15, 0.7)), float(rng.uniform(45.0, 90.0))
    if not winding:
        curve *= 0.3
    crossroad_lanes = 2 if rng.random() < 0.25 else 1
    return Leg(before, curve, radius, after, crossing, control, turn, crossroad_lanes), event


class _Teller:
    """Fills the roads, one event after another."""

    def __init__(
        self, rng: np.random.Generator, kind: str, network: Network, events: tuple[str, ...]
    ) -> None:
        self.rng, self.kind, self.network, self.events = rng, kind, network, events
        self.actors: list[Actor] = []
        self.streams: list[Stream] = []
        self.vehicles: list[VehicleRole] = []
        self.parked: list[ParkedRole] = []
        self.walkers: list[WalkerRole] = []
        self.lanes = self._lanes()
        self.turns = tuple(
            (number, leg.turn, self.lanes[number + 1])
            for number, leg in enumerate(network.legs)
            if leg.turn is not Command.STRAIGHT
        )
        self.route = network.follow((0, 1, self.lanes[0]), 0, self.turns, 1000.0)
        self.leg_starts = [float(LEAD_IN_M)] + [
            passage.exit_m - network.junctions[passage.junction].half_m for passage in self.route.passages
        ]
        first = network.legs[0].length_m
        self.start_m = LEAD_IN_M + float(rng.uniform(0.0, max(first - 40.0, 10.0)))
        self.limit = network.roads[0].speed_limit_mps

    def tell(self) -> Storyline:
        rng = self.rng
        for number, event in enumerate(self.events):
            begin = self.leg_starts[number]
            if event == "blocked":
                self._block(begin + float(rng.uniform(50.0, 62.0)))
            elif event == "kerb":
                self._kerb(begin + float(rng.uniform(34.0, 48.0)))
            elif event == "crossing":
                crossing = self.network.legs[number].crossing_m
                if crossing is not None:
                    self._cross(begin + crossing)
            elif event == "exit_crossing" and number < len(self.route.passages):
                passage = self.route.passages[number]
                self._cross(passage.exit_m + CROSSING_SETBACK_M + CROSSING_DEPTH_M / 2)
            # Walkways lie between this leg's junctions.
            first = begin + (self.network.junctions[number - 1].half_m if number else 0.0) + 3.0
            last = self.route.passages[number].enter_m - 3.0
            for _ in range(int(rng.integers(0, 3))):
                along = float(rng.uniform(first, last))
                if all(abs(along - (walker.along_m or -99.0)) > 4.0 for walker in self.walkers):
                    self._stroll(along, first, last)
        lights = tuple(self._programme(junction.control) for junction in self.network.junctions)
        self._leads()
        self._neighbours()
        self._oncoming()
        for number in range(len(self.network.junctions)):
            self._crossroad(number, lights[number])
        return Storyline(
            kind=self.kind,
            network=self.network,
            route=self.route,
            turns=self.turns,
            start_lane=self.lanes[0],
            start_m=self.start_m,
            start_speed_mps=self.limit * float(rng.uniform(0.25, 1.0)),
            actors=tuple(self.actors),
            streams=tuple(self.streams),
            vehicles=tuple(
                role
                for role in self.vehicles
                if role.start_m < self.streams[role.stream].driving_path.path.length_m - 10.0
            ),
            parked=tuple(self.parked),
            walkers=tuple(self.walkers),
            lights=lights,
            daylight=float(rng.uniform(0.55, 1.0)),
            haze=float(rng.uniform(0.0, 0.5)) ** 2,
        )

    def _lanes(self) -> list[int]:
        """The ego's lane on each leg, and after the last one: kept until a turn, which decides it."""
        legs = self.network.legs
        lanes: list[int] = []
        for number in range(len(legs) + 1):
            turn = next((leg.turn for leg in legs[number:] if leg.turn is not Command.STRAIGHT), None)
            road = sum(leg.turn is not Command.STRAIGHT for leg in legs[:number])
            width = self.network.roads[road].lanes
            if number and legs[number - 1].turn is Command.STRAIGHT:
                lanes.append(lanes[-1])
            elif turn is Command.LEFT:
                lanes.append(width - 1)
            elif turn is Command.RIGHT or self.kind == "lane_change":
                lanes.append(0)
            else:
                lanes.append(int(self.rng.integers(width)))
        return lanes

    def _actor(
        self, category: str, length: float, width: float, height: float, colour: tuple[int, int, int]
    ) -> int:
        self.actors.append(
            Actor(f"{category.split('.')[1]}{len(self.actors)}", category, width, length, height, colour)
        )
        return len(self.actors) - 1

    def _car(self) -> int:
        rng = self.rng
        colour = _CAR_COLOURS[int(rng.integers(len(_CAR_COLOURS)))]
        length, height = float(rng.uniform(4.0, 4.9)), float(rng.uniform(1.45, 1.9))
        return self._actor("vehicle.car", length, float(rng.uniform(1.8, 2.0)), height, colour)

    def _truck(self) -> int:
        length = float(self.rng.uniform(6.5, 8.5))
        return self._actor("vehicle.truck", length, 2.4, 3.2, (236, 190, 40))

    def _pedestrian(self, clothes: tuple[tuple[int, int, int], ...]) -> int:
        height = float(self.rng.uniform(1.6, 1.9))
        colour = clothes[int(self.rng.integers(len(clothes)))]
        return self._actor("human.pedestrian.adult", 0.6, 0.7, height, colour)

    def _kerb_offsets(self, along: float) -> tuple[float, float]:
        """Metres to the right and to the left kerb from the route's centreline."""
        stretches = [s for s in self.route.stretches if s.start_m <= along] or [self.route.stretches[0]]
        stretch = stretches[-1]
        road = self.network.roads[stretch.road]
        right = (stretch.lane + 0.5) * LANE_WIDTH_M + SHOULDER_M
        return right, 2 * road.half_width_m - right

    def _block(self, along: float) -> None:
        if self._kerb_offsets(along)[0] > LANE_WIDTH_M:
            return
        actor = self._truck() if self.rng.random() < 0.3 else self._car()
        self._park(actor, along, float(self.rng.uniform(-0.7, -0.2)))

    def _park(self, actor: int, along: float, beside: float) -> None:
        """Park a vehicle, unless the ego starts too close to it."""
        if not -9.0 < along - self.start_m < 22.0:
            self.parked.append(ParkedRole(actor, along, beside))

    def _kerb(self, along: float) -> None:
        right, _ = self._kerb_offsets(along)
        for number in range(int(self.rng.integers(1, 4))):
            beside = -right + float(self.rng.uniform(-0.1, 0.8))
            self._park(self._car(), along + 6.5 * number, beside)

    def _cross(self, along: float) -> None:
        """One or two pedestrians who want to cross here."""
        rng = self.rng
        right, left = self._kerb_offsets(along)
        x, y, heading = self.route.path.pose(along)
        heads_left = bool(rng.random() < 0.65)
        count = 1 if rng.random() < 0.6 else 2
        for number in range(count):
            wait = 0.5 + 0.9 * number
            beside = -(right + wait) if heads_left else left + wait
            shift = float(rng.uniform(-0.3, 0.3)) + (0.7 if number else -0.7) * (count - 1)
            way = heading + (math.pi / 2 if heads_left else -math.pi / 2)
            self.walkers.append(
                WalkerRole(
                    self._pedestrian(_CROSSING_CLOTHES),
                    (
                        x - beside * math.sin(heading) + shift * math.cos(heading),
                        y + beside * math.cos(heading) + shift * math.sin(heading),
                    ),
                    way,
                    left + right + 2.4,
                    float(rng.uniform(1.5, 2.3)),
                    float(rng.uniform(14.0, 40.0)),
                    along,
                    beside,
                    heads_left,
                )
            )

    def _stroll(self, along: float, first: float, last: float) -> None:
        """A pedestrian on the walkway, who never crosses the road."""
        rng = self.rng
        right, left = self._kerb_offsets(along)
        side = -1.0 if rng.random() < 0.5 else 1.0
        beside = side * ((right if side < 0 else left) + float(rng.uniform(1.5, WALKWAY_M - 0.4)))
        way = 1.0 if rng.random() < 0.5 else -1.0
        speed = float(rng.uniform(0.8, 1.6))
        x, y, heading = self.route.path.pose(along)
        end = min(max(along + 12.0 * way, first), last)
        # A straight walk leaves the walkway where the road bends.
        bends = abs(self.route.path.pose(end)[2] - heading) > 0.04
        length = 0.0 if bends or rng.random() < 0.4 else abs(end - along)
        self.walkers.append(
            WalkerRole(
                self._pedestrian(_WALKWAY_CLOTHES),
                (x - beside * math.sin(heading), y + beside * math.cos(heading)),
                heading if way > 0 else heading + math.pi,
                length,
                speed,
                math.inf,
            )
        )

    def _programme(self, control: str) -> LightProgramme | None:
        if control != "signal":
            return None
        rng = self.rng
        share = rng.random()
        if share < 0.6:
            return LightProgramme("red", float(rng.uniform(12.0, 45.0)), float(rng.uniform(5.0, 8.0)))
        if share < 0.72:
            return LightProgramme("green", float(rng.uniform(30.0, 55.0)), float(rng.uniform(8.0, 11.0)))
        return LightProgramme("green", 0.0, 0.0)

    def _leads(self) -> None:
        """Vehicles in the ego's lane: one or two ahead, sometimes one behind."""
        rng = self.rng
        blocks = [role.along_m for role in self.parked if role.beside_m > -1.0]
        wish = {"lead": 1.0, "free": 0.0, "curve": 0.2, "lane_change": 0.35}.get(self.kind, 0.3)
        if rng.random() < wish:
            ahead = self.start_m + FRONT_M + float(rng.uniform(9.0, 40.0))
            free_until = min([block for block in blocks if block > self.start_m], default=math.inf)
            passed = all(ahead > block + 10.0 or ahead + 200.0 < block for block in blocks)
            if passed and free_until == math.inf:
                stream = self._lead_stream(ahead)
                count = 1 if rng.random() < 0.7 else 2
                first = len(self.vehicles)
                for number in range(count):
                    self._lead(
                        stream,
                        ahead + 12.0 * (count - 1 - number) + float(rng.uniform(0, 6)),
                        number == count - 1,
                    )
                self.vehicles[first:] = sorted(self.vehicles[first:], key=lambda role: -role.start_m)
        elif self.kind == "lane_change" and rng.random() < 0.5 and not blocks:
            stream = self._lead_stream(self.start_m)
            self._lead(stream, self.start_m + float(rng.uniform(25.0, 60.0)), slow=True)
        if rng.random() < 0.5:
            behind = self.start_m - float(rng.uniform(9.0, 26.0))
            self.streams.append(Stream(self._around_parked(self.route), shares_lane=True))
            speed = self.limit * float(rng.uniform(0.4, 0.9))
            self.vehicles.append(
                VehicleRole(self._car(), len(self.streams) - 1, behind, speed, self.limit * 0.97)
            )

    def _lead_stream(self, ahead: float) -> int:
        """The path of the vehicles ahead: straight on where the route first turns, or the route itself."""
        later = [p for p in self.route.passages if p.stop_m > ahead]
        turning = [p for p in later if p.turn is not Command.STRAIGHT]
        driving_path = self.route
        if turning and (turning[0].turn is Command.LEFT or self.rng.random() < 0.6):
            done = [turn for turn in self.turns if turn[0] < turning[0].junction]
            driving_path = self.network.follow((0, 1, self.lanes[0]), 0, done, 1000.0)
        self.streams.append(Stream(self._around_parked(driving_path), shares_lane=True))
        return len(self.streams) - 1

    def _around_parked(self, driving_path: DrivingPath) -> DrivingPath:
        """The path with bends around parked vehicles in it or at its right."""
        points, heading = driving_path.path.points, driving_path.path.heading
        shift = np.zeros(len(points))
        for role in self.parked:
            x, y, ahead = self.route.path.pose(role.along_m)
            spot = np.array([x - role.beside_m * math.sin(ahead), y + role.beside_m * math.cos(ahead)])
            away = spot - points
            nearest = int(np.einsum("ij,ij->i", away, away).argmin())
            dx, dy = away[nearest]
            left = dy * math.cos(heading[nearest]) - dx * math.sin(heading[nearest])
            needed = left + self.actors[role.actor].width_m / 2 + 1.5
            if abs(dx) + abs(dy) < 5.0 and left < 1.0 and needed > 0.2:
                bump = np.clip((22.0 - np.abs(np.arange(len(points)) - nearest)) / 16.0, 0.0, 1.0)
                shift = np.maximum(shift, needed * bump * bump * (3.0 - 2.0 * bump))
        if not shift.any():
            return driving_path
        sideways = np.stack([-np.sin(heading), np.cos(heading)], axis=1) * shift[:, None]
        return replace(driving_path, path=path_through(points + sideways)[0])

    def _lead(self, stream: int, along: float, slow: bool | None = None) -> None:
        rng = self.rng
        if slow is None or self.kind == "lead":
            slow = bool(rng.random() < 0.35)
        actor = self._truck() if slow else self._car()
        wished = self.limit * (0.5 if slow else float(rng.uniform(0.85, 0.95)))
        stops = rng.random() < 0.35 and not slow
        self.vehicles.append(
            VehicleRole(
                actor,
                stream,
                along,
                wished * float(rng.uniform(0.6, 1.0)),
                wished,
                stop_m=along + float(rng.uniform(20.0, 90.0)) if stops else math.inf,
                stop_s=float(rng.uniform(2.0, 4.0)),
                is_slow=slow,
            )
        )

    def _neighbours(self) -> None:
        """Vehicles in the other lane of the ego's direction, on the roads of the route that have one."""
        rng = self.rng
        for number, stretch in enumerate(self.route.stretches):
            road = self.network.roads[stretch.road]
            if road.lanes < 2:
                continue
            driving_path = self.network.follow((stretch.road, 1, 1 - stretch.lane), 0, (), 1000.0)
            self.streams.append(Stream(self._around_parked(driving_path)))
            # Beside each other, lanes count almost the same metres.
            here = self.start_m if number == 0 else 10.0
            places = here + 55.0 - np.cumsum(rng.uniform(12.0, 60.0, size=int(rng.integers(1, 4))))
            wished = road.speed_limit_mps * float(rng.uniform(0.8, 1.0))
            for place in places.tolist():
                if place > 3.0:
                    self.vehicles.append(
                        VehicleRole(self._car(), len(self.streams) - 1, place, wished * 0.8, wished)
                    )

    def _oncoming(self) -> None:
        rng = self.rng
        for stretch in self.route.stretches:
            road = self.network.roads[stretch.road]
            for lane in range(road.lanes):
                count = int(rng.integers(0, 4))
                if not count or (lane and rng.random() < 0.5):
                    continue
                driving_path = self.network.follow((stretch.road, -1, lane), 0, (), 1000.0)
                self.streams.append(Stream(driving_path))
                length = driving_path.path.length_m
                wished = road.speed_limit_mps * float(rng.uniform(0.75, 0.95))
                places = length - 30.0 - np.cumsum(rng.uniform(14.0, 0.5 * length, size=count))
                for place in places.tolist():
                    if place > 4.0:
                        self.vehicles.append(
                            VehicleRole(self._car(), len(self.streams) - 1, place, wished, wished)
                        )

    def _crossroad(self, number: int, lights: LightProgramme | None) -> None:
        """Traffic on the other road of a junction, timed to meet the ego."""
        rng = self.rng
        junction = self.network.junctions[number]
        passage = self.route.passages[number]
        other = junction.roads[1]
        turns_onto = passage.turn is not Command.STRAIGHT
        chance = {"yield": 0.75, "signal": 0.7, "plain": 0.12}[junction.control]
        for direction in (1, -1):
            # Roads the route turns onto have their oncoming traffic already.
            if rng.random() > chance or (turns_onto and direction < 0):
                continue
            lanes = self.network.roads[other].lanes
            lane = int(rng.integers(lanes))
            driving_path = self.network.follow((other, direction, lane), 0, (), 1000.0)
            self.streams.append(Stream(driving_path))
            crossing = next(p for p in driving_path.passages if p.junction == number)
            wished = self.network.roads[other].speed_limit_mps * float(rng.uniform(0.75, 0.95))
            ego_speed = 0.75 * self.limit
            arrival = float(rng.uniform(-2.0, 2.5))
            last_place = math.inf
            for _ in range(int(rng.integers(1, 4))):
                # Where this vehicle is when the ego is `lead` metres before the stop line.
                lead = passage.stop_m - self.start_m
                place = crossing.enter_m - wished * (max(lead, 0.0) / ego_speed + arrival)
                appears = -math.inf
                if place < 4.0:
                    appears = passage.stop_m - ego_speed * ((crossing.enter_m - 4.0) / wished - arrival)
                    place = 4.0
                if lights is not None:
                    place = min(place, crossing.stop_m - 3.0)
                if appears == -math.inf:
                    place = last_place = min(place, last_place - 8.0)
                if place < 4.0:
                    break
                self.vehicles.append(
                    VehicleRole(self._car(), len(self.streams) - 1, place, wished * 0.9, wished, appears)
                )
                arrival += float(rng.uniform(1.6, 3.5))
