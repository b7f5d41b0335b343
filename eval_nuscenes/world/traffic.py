"""Traffic around the ego, in steps of 0.1 s, and whole simulated drives."""

from __future__ import annotations

import math

import numpy as np

from eval_nuscenes.world import expert
from eval_nuscenes.world.drive import AMBER_S, GONE, Drive, Moment, View
from eval_nuscenes.world.expert import Neighbour, Surroundings
from eval_nuscenes.world.roads import lane_names, road_map
from eval_nuscenes.world.scene import ActorState, EgoPose, Scene, WorldState
from eval_nuscenes.world.storyline import KINDS, VehicleRole, draw_kind, tell
from vla_autoprune.errors import InputError

LOCATIONS = ("singapore-onenorth", "singapore-hollandvillage", "singapore-queenstown", "boston-seaport")
LONGEST_DRIVE_S = 60.0

_ACCELERATION_MPS2 = 1.8
_LAG_S = 0.6
_WORTH_STOPPING_MPS2 = 5.5
"""Who would have to brake harder than this at a closed stop line goes on."""
_GIVES_WAY_S = 4.5
_ROOM_TO_GET_BACK_M = 17.0
_BRAKE_LIGHTS_MPS2 = -0.4


def simulate_scene(name: str, seed: int, duration_s: float = 20.0, kind: str | None = None) -> Scene:
    """Simulate a drive.

    Args:
        name: scene-NNNN.
        seed: same arguments, same drive.
        duration_s: how long it takes, up to LONGEST_DRIVE_S.
        kind: what there is most of, one of KINDS; None draws it as training does.

    Returns:
        The drive, with a state every 0.1 s, both ends included.

    Raises:
        InputError: name, duration or kind is not allowed.
    """
    if not (name.startswith("scene-") and len(name) == 10 and name[6:].isdigit()):
        raise InputError(f"scene name: {name!r} is not of the form scene-NNNN, as the CAN bus reader demands")
    if not 1.0 <= duration_s <= LONGEST_DRIVE_S:
        raise InputError(f"duration_s: {duration_s} is not within 1 to {LONGEST_DRIVE_S:.0f} seconds")
    if kind is not None and kind not in KINDS:
        raise InputError(f"kind: there is no {kind!r}; choose from {', '.join(KINDS)}")
    rng = np.random.default_rng(seed)
    drawn = draw_kind(rng)
    drive = Drive(tell(rng, kind or drawn, duration_s))
    view, moment = drive.view, drive.begin()
    states = [world_state(drive, view, moment)]
    for _ in range(round(duration_s / expert.STEP_S)):
        advance(drive, view, moment)
        states.append(world_state(drive, view, moment))
    story = drive.story
    return Scene(
        name=name,
        kind=story.kind,
        location=LOCATIONS[int(name[6:]) % len(LOCATIONS)],
        seed=seed,
        map=road_map(story.network),
        actors=story.actors,
        states=tuple(states),
        route=lane_names(story.network, story.route),
        daylight=story.daylight,
        haze=story.haze,
    )


def advance(drive: Drive, view: View, moment: Moment) -> None:
    """Play expert.STEP_S of a drive, the ego following the view's route."""
    before = moment.copy()
    seen = drive.surroundings(view, before, before.ego)
    moment.ego = expert.step(view.route, before.ego, seen)
    _move_vehicles(drive, view, before, moment, seen)
    _move_walkers(drive, before, moment)
    _change_lights(drive, view, before, moment)
    moment.time_s += expert.STEP_S


def _move_vehicles(drive: Drive, view: View, before: Moment, moment: Moment, seen: Surroundings) -> None:
    """Move vehicles from `before` to `moment`."""
    busy = _busy(drive, view, before)
    near_route = {other.vehicle: other for other in seen.neighbours}
    for number, role in enumerate(drive.story.vehicles):
        place, speed = before.along[number], before.speed[number]
        if not before.present[number]:
            moment.present[number] = (
                place != GONE and role.appears_m <= before.ego.along_m and _can_appear(drive, before, number)
            )
            continue
        profile = drive.profiles[role.stream]
        if place > len(profile) - 4:
            moment.present[number], moment.along[number] = False, GONE
            continue
        goal = min(role.wished_mps, profile[min(int(place + _LAG_S * speed), len(profile) - 1)])
        wanted = min(
            _free(speed, goal),
            _behind_others(drive, before, number, goal),
            _at_stops(drive, before, number, role, seen, busy),
            _for_ego(drive, view, before, number, role, near_route.get(number), goal),
        )
        if before.time_s < before.stopped_until[number] and place < role.stop_m:
            gap = role.stop_m - place
            wanted = min(wanted, expert.stop_before(speed, gap))
            if speed < 0.2 and gap < 1.5 and before.stopped_until[number] == math.inf:
                moment.stopped_until[number] = before.time_s + role.stop_s
        acceleration = before.acceleration[number]
        acceleration = max(acceleration + min(max(wanted - acceleration, -1.0), 0.5), -6.5)
        new_speed = speed + acceleration * expert.STEP_S
        if new_speed < 0.0:
            new_speed, acceleration = 0.0, 0.0
        moment.along[number] = place + (speed + new_speed) / 2 * expert.STEP_S
        moment.speed[number] = new_speed
        moment.acceleration[number] = acceleration


def _can_appear(drive: Drive, moment: Moment, number: int) -> bool:
    start = drive.story.vehicles[number].start_m
    return all(
        not moment.present[rival] or abs(moment.along[rival] + shift - start) > 12.0
        for rival, shift, _, _ in drive.rivals[number]
    )


def _free(speed: float, goal: float) -> float:
    if speed > goal:
        return max((goal - speed) / _LAG_S, -4.0)
    ratio = speed / goal
    return _ACCELERATION_MPS2 * (1.0 - ratio * ratio * ratio * ratio)


def _behind_others(drive: Drive, moment: Moment, number: int, goal: float) -> float:
    """Acceleration behind the vehicles ahead in the same lane."""
    wanted = math.inf
    place, half_length = moment.along[number], drive.half_lengths[number]
    for rival, shift, begin, until in drive.rivals[number]:
        there = moment.along[rival]
        ahead = there + shift - place
        if 0.0 < ahead < 70.0 and begin <= there <= until and moment.present[rival]:
            gap = ahead - drive.half_lengths[rival] - half_length
            if gap > -3.0:
                follow = expert.follow(moment.speed[number], goal, gap, moment.speed[rival])
                wanted = min(wanted, follow)
    return wanted


def _at_stops(
    drive: Drive, moment: Moment, number: int, role: VehicleRole, seen: Surroundings, busy: list[list[bool]]
) -> float:
    """Acceleration before closed junctions and before pedestrians on a crossing."""
    wanted = math.inf
    speed = moment.speed[number]
    front = moment.along[number] + drive.half_lengths[number]
    for stop, _, junction, side in drive.stops[role.stream]:
        gap = stop - front
        if gap < -1.0:
            continue
        if gap > 60.0:
            break
        in_time = speed * speed <= 2.0 * _WORTH_STOPPING_MPS2 * max(gap, 0.4)
        if in_time and _is_closed(drive, seen, busy, junction, side):
            wanted = min(wanted, expert.stop_before(speed, gap))
    for stop, walker in drive.walker_stops[role.stream]:
        gap = stop - front
        on_the_road = 0.0 < moment.walked[walker] < drive.story.walkers[walker].length_m - 1.0
        if on_the_road and gap > -1.0 and speed * speed <= 2.0 * _WORTH_STOPPING_MPS2 * max(gap, 0.4):
            wanted = min(wanted, expert.stop_before(speed, gap))
    return wanted


def _for_ego(
    drive: Drive,
    view: View,
    moment: Moment,
    number: int,
    role: VehicleRole,
    here: Neighbour | None,
    goal: float,
) -> float:
    """Acceleration because of the ego: behind it, towards it on the wrong side, where it is in a junction."""
    wanted = math.inf
    ego, speed, half_length = moment.ego, moment.speed[number], drive.half_lengths[number]
    ego_front, ego_rear = ego.along_m + expert.FRONT_M, ego.along_m - expert.REAR_M
    if here is not None:
        ego_beside, _ = ego.move.at(ego.along_m)
        in_line = abs(here.beside_m - ego_beside) < here.half_width_m + expert.HALF_WIDTH_M + 0.2
        if in_line and here.speed_mps >= 0.0 and ego.along_m > here.along_m:
            wanted = expert.follow(speed, goal, ego_rear - here.along_m - half_length, ego.speed_mps)
        elif in_line and here.speed_mps < -0.5 and here.along_m > ego.along_m:
            # The ego is on the wrong side of the road: leave it room to get back.
            back = ego_front if ego.passing_m is None else max(ego.passing_m, ego_front)
            gap = here.along_m - half_length - back - _ROOM_TO_GET_BACK_M
            wanted = expert.stop_before(speed, gap)
    front = moment.along[number] + half_length
    for conflict in view.conflicts[role.stream]:
        inside = ego_front > conflict.enter_m - 0.5 and ego_rear < conflict.leave_m + 0.5
        if inside and front < conflict.stream_enter_m + 1.0:
            wanted = min(wanted, expert.stop_before(speed, conflict.stream_enter_m - 1.0 - front))
    return wanted


def _is_closed(drive: Drive, seen: Surroundings, busy: list[list[bool]], junction: int, side: int) -> bool:
    """Whether traffic that comes along this side of a junction has to stop."""
    colour = seen.light_colours[junction][side]
    if colour:
        return colour != "green"
    control = drive.story.network.junctions[junction].control
    gives_way = side == 0 if control == "yield" else side == 1
    return gives_way and busy[junction][1 - side]


def _busy(drive: Drive, view: View, moment: Moment) -> list[list[bool]]:
    """Per junction and side: whether traffic is in it or about to be."""
    busy = [[False, False] for _ in drive.story.lights]
    for number, role in enumerate(drive.story.vehicles):
        if moment.present[number]:
            place, reach = moment.along[number], _GIVES_WAY_S * moment.speed[number] + 2.0
            for stop, leave, junction, side in drive.stops[role.stream]:
                if place <= stop - reach:
                    break
                if place < leave + 4.0:
                    busy[junction][side] = True
    ego = moment.ego
    for gate in view.route.gates:
        if gate.stop_m - _GIVES_WAY_S * ego.speed_mps - 6.0 < ego.along_m < gate.exit_m + 4.0:
            busy[gate.junction][gate.side] = True
    return busy


def _move_walkers(drive: Drive, before: Moment, moment: Moment) -> None:
    ego = before.ego
    for number, role in enumerate(drive.story.walkers):
        if before.walking[number]:
            if before.walked[number] < role.length_m:
                moment.walked[number] += role.speed_mps * expert.STEP_S
        elif role.along_m is not None:
            gap = role.along_m - ego.along_m - expert.FRONT_M
            # Never into the path of someone who could not stop comfortably any more.
            if -2.0 < gap < role.starts_within_m and ego.speed_mps**2 < 7.0 * max(gap - 3.0, 0.5):
                moment.walking[number] = not _someone_close(drive, before, number)


def _someone_close(drive: Drive, moment: Moment, walker: int) -> bool:
    """Whether a vehicle could not stop for a pedestrian who began to cross now."""
    for number, role in enumerate(drive.story.vehicles):
        if moment.present[number]:
            front = moment.along[number] + drive.half_lengths[number]
            for stop, crossed in drive.walker_stops[role.stream]:
                if crossed == walker and -9.0 < stop - front < moment.speed[number] ** 2 / 6.0 + 0.5:
                    return True
    return False


def _change_lights(drive: Drive, view: View, before: Moment, moment: Moment) -> None:
    """Set when the lights of the ego's next junction will change, once the ego is near enough."""
    ego, now = before.ego, before.time_s
    gate = next((g for g in view.route.gates if g.stop_m - ego.along_m - expert.FRONT_M >= -1.0), None)
    programme = drive.story.lights[gate.junction] if gate is not None else None
    if gate is None or programme is None:
        return
    junction, gap = gate.junction, gate.stop_m - ego.along_m - expert.FRONT_M
    near = gap < programme.changes_within_m
    if programme.starts == "red":
        waits = ego.speed_mps < 0.5 and gap < 40.0
        if before.green_at[junction] == math.inf and (near or waits):
            moment.green_at[junction] = now + programme.hold_s
    elif before.amber_at[junction] == math.inf and near and ego.speed_mps**2 < 5.0 * max(gap, 0.1):
        moment.amber_at[junction] = now
        moment.green_at[junction] = now + AMBER_S + programme.hold_s


def world_state(drive: Drive, view: View, moment: Moment) -> WorldState:
    """The moment as a record, in world coordinates."""
    ego, network = moment.ego, drive.story.network
    x, y, heading = view.route.pose(ego)
    yaw_rate = ego.speed_mps * view.route.path_curvature(ego)
    lights = []
    for number, junction in enumerate(network.junctions):
        if junction.control == "signal":
            colours = drive.light_colours(moment, number)
            lights += [colours[junction.side(road)] for road, _ in junction.arms()]
    return WorldState(
        moment.time_s,
        EgoPose(x, y, heading, ego.speed_mps, ego.acceleration_mps2, yaw_rate),
        actor_states(drive, moment),
        tuple(lights),
        view.route.command(ego.along_m),
    )


def actor_states(drive: Drive, moment: Moment) -> tuple[ActorState, ...]:
    """Where everybody is, in world coordinates, ordered by actor."""
    story = drive.story
    states: list[ActorState] = []
    for number, role in enumerate(story.vehicles):
        if moment.present[number]:
            x, y, heading = story.streams[role.stream].driving_path.path.pose(moment.along[number])
            speed, acceleration = moment.speed[number], moment.acceleration[number]
            braking = acceleration < _BRAKE_LIGHTS_MPS2 or speed < 0.3
            states.append(ActorState(role.actor, x, y, heading, speed, braking))
    for parked in story.parked:
        x, y, heading = story.route.path.pose(parked.along_m)
        x, y = x - parked.beside_m * math.sin(heading), y + parked.beside_m * math.cos(heading)
        states.append(ActorState(parked.actor, x, y, heading, 0.0))
    for number, walker in enumerate(story.walkers):
        walked = min(moment.walked[number], walker.length_m)
        moves = moment.walking[number] and moment.walked[number] < walker.length_m
        x = walker.start[0] + walked * math.cos(walker.heading)
        y = walker.start[1] + walked * math.sin(walker.heading)
        states.append(ActorState(walker.actor, x, y, walker.heading, walker.speed_mps if moves else 0.0))
    return tuple(sorted(states, key=lambda state: state.actor))
