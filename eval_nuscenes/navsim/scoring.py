"""Sub-scores of a drive, and what PDMS and EPDMS make of them.

Names of sub-scores are the columns of the devkit's result tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from eval_nuscenes.navsim import simulation
from eval_nuscenes.navsim.comfort import comfort_signals, history_states, within_limits
from eval_nuscenes.navsim.scene import (
    AGENT_TYPES,
    PACIFICA,
    STEP_S,
    Devkit,
    Flags,
    Floats,
    PlannedPath,
    Rings,
    Scene,
    Tracks,
    Vehicle,
    box_corners,
)
from vla_autoprune.errors import InputError

if TYPE_CHECKING:
    from shapely import LineString, Polygon

NC = "no_at_fault_collisions"
DAC = "drivable_area_compliance"
DDC = "driving_direction_compliance"
TLC = "traffic_light_compliance"
EP = "ego_progress"
TTC = "time_to_collision_within_bound"
LK = "lane_keeping"
COMFORT = "comfort"
HC = "history_comfort"
EC = "two_frame_extended_comfort"

Contact = Literal["stopped_ego", "stopped_track", "rear", "front", "lateral"]


@dataclass(frozen=True)
class Metric:
    """How sub-scores become one number.

    Attributes:
        name: as the field says it.
        devkit: whose rules the sub-scores follow.
        multipliers: each can void the score.
        weights: of the mean of the rest; a sub-score that a frame has not got drops out with its weight.
        summary: one sentence for a reader of the report.
        reference: whose plan progress is compared to.
    """

    name: str
    devkit: Devkit
    multipliers: tuple[str, ...]
    weights: Mapping[str, float]
    summary: str
    reference: str = "PDM-Closed"

    @property
    def columns(self) -> tuple[str, ...]:
        """All sub-scores, multipliers first."""
        return (*self.multipliers, *self.weights)

    def score(self, sub_scores: Mapping[str, float]) -> float:
        """Product of the multipliers times the weighted mean of the others."""
        product = float(np.prod([sub_scores[name] for name in self.multipliers]))
        known = [name for name in self.weights if name in sub_scores]
        weights = [self.weights[name] for name in known]
        return product * float(np.dot(weights, [sub_scores[name] for name in known])) / sum(weights)


PDMS = Metric(
    name="PDMS",
    devkit="v1",
    multipliers=(NC, DAC),
    weights={EP: 5.0, TTC: 5.0, COMFORT: 2.0, DDC: 0.0},
    summary="NAVSIM v1: NC x DAC x (5 EP + 5 TTC + 2 C) / 12; DDC is reported with weight 0.",
)
EPDMS = Metric(
    name="EPDMS",
    devkit="v2",
    multipliers=(NC, DAC, DDC, TLC),
    weights={EP: 5.0, TTC: 5.0, LK: 2.0, HC: 2.0, EC: 2.0},
    summary="NAVSIM v2.2: NC x DAC x DDC x TLC x (5 EP + 5 TTC + 2 LK + 2 HC + 2 EC) / 16, "
    "after the human filter; a frame without a neighbour has no EC and divides by 14.",
)
EPDMS_UNFILTERED = replace(
    EPDMS,
    name="EPDMS-unfiltered",
    summary=EPDMS.summary.replace("after the human filter", "without the official one's human filter"),
)
METRICS: dict[Devkit, Metric] = {"v1": PDMS, "v2": EPDMS}

STOPPED_MPS = 5e-2
TTC_STOPPED_MPS = 5e-3
AHEAD_RAD = np.radians(30)
BEHIND_RAD = np.radians(150)
TTC_AHEAD_STEPS = (0, 3, 6, 9)
WRONG_WAY_STEPS = 11
WRONG_WAY_M = (2.0, 6.0)
"""Driven off the route within a second: half below the second, nothing from it on."""
LEAST_PROGRESS_M = 5.0
"""Where neither plan nor reference gets further, progress counts as made."""
OFF_CENTRE_M = 0.5
OFF_CENTRE_STEPS = 20
STATIC_COST = 0.5


@dataclass(frozen=True)
class Drive:
    """A simulated plan with what was found about it.

    Attributes:
        states: [41, 11], see `simulation.STATE`.
        sub_scores: all but progress, which needs the reference, and extended comfort, which needs a
            neighbour.
        progress_m: along the route's centre line.
        collision_step: first step of an at-fault collision.
        ttc_step: first step at which one is less than a second ahead.
        multiple_lanes: [41].
        non_drivable: [41].
        off_route: [41] the centre is in no lane of the route; the devkit calls it oncoming.
    """

    states: Floats
    sub_scores: Mapping[str, float]
    progress_m: float
    collision_step: int | None
    ttc_step: int | None
    multiple_lanes: Flags
    non_drivable: Flags
    off_route: Flags


@dataclass(frozen=True)
class FrameScore:
    """One plan on one frame.

    Attributes:
        time_us: when the plan starts.
        start_m: [2] global, the rear axle when the plan starts.
        end_m: [2] global, where the plan (not the drive) ends.
        synthetic: a second-stage scene.
        sub_scores: after the human filter where it applies.
        score: PDMS, or EPDMS without extended comfort.
        unfiltered: sub-scores as driven.
        drive: the plan's own drive.
        reference: the drive of the plan that progress is compared to.
    """

    token: str
    log: str
    time_us: int
    start_m: Floats
    end_m: Floats
    synthetic: bool
    metric: Metric
    sub_scores: Mapping[str, float]
    score: float
    unfiltered: Mapping[str, float]
    drive: Drive
    reference: Drive


@dataclass(frozen=True)
class _Map:
    """The areas of a scene as geometries, grouped by what they are asked for."""

    lanes: list[Polygon]
    on_route: list[bool]
    drivable: list[Polygon]
    intersections: list[Polygon]
    centreline: LineString


@dataclass(frozen=True)
class _Surroundings:
    """Where the ego vehicle's corners and centre are: everything [P, 41]."""

    multiple_lanes: Flags
    non_drivable: Flags
    off_route: Flags
    centre_in_intersection: Flags
    axle_in_intersection: Flags


@dataclass(frozen=True)
class _Touch:
    """The ego box of a plan at a step, moved ahead, touches a track."""

    plan: int
    step: int
    ahead: int
    track: int


def score_plan(scene: Scene, path: PlannedPath, human_filter: bool = True) -> FrameScore:
    """Drive a plan and score it by the rules of the scene's devkit.

    Args:
        scene: from a metric cache, a scene file or nuScenes data.
        path: the plan.
        human_filter: EPDMS forgives what the logged human plan did as well.

    Returns:
        Sub-scores and score; extended comfort needs two frames, see `aggregation`.

    Raises:
        InputError: the plan is empty, not finite or has no positive interval.
    """
    check_path(path, scene.token)
    metric = METRICS[scene.devkit] if human_filter or scene.devkit == "v1" else EPDMS_UNFILTERED
    paths = [simulation.plan_poses(path, scene.ego, scene.horizon)]
    paths.append(
        simulation.stamped_poses(scene.reference[:, 0], scene.reference[:, 1:], scene.ego, scene.horizon)
    )
    filtered = human_filter and scene.devkit == "v2" and scene.human is not None and not scene.synthetic
    if filtered and scene.human is not None:
        paths.append(simulation.plan_poses(scene.human, scene.ego, scene.horizon))
    driven = simulation.simulate(scene.ego, np.stack(paths), scene.vehicle.wheel_base_m)
    agent, reference, *human = judge(scene, driven)
    unfiltered = dict(agent.sub_scores) | {EP: progress_score(metric, agent, reference)}
    sub_scores = dict(unfiltered)
    if human:
        # The human plan is scored alone and without history: its progress and history comfort are 1.
        forgiven = [
            name for name, value in human[0].sub_scores.items() if value == 0 and name not in (EP, HC)
        ]
        sub_scores |= dict.fromkeys(forgiven, 1.0)
    return FrameScore(
        token=scene.token,
        log=scene.log,
        time_us=scene.ego.time_us,
        start_m=scene.ego.pose[:2],
        end_m=simulation.in_map(path, scene.ego)[-1, :2],
        synthetic=scene.synthetic,
        metric=metric,
        sub_scores=sub_scores,
        score=metric.score(sub_scores),
        unfiltered=unfiltered,
        drive=agent,
        reference=reference,
    )


def check_path(path: PlannedPath, token: str) -> None:
    """Refuse what is no plan.

    Raises:
        InputError: poses are not [n, 3] and finite with n >= 1, or the interval is not positive.
    """
    poses = np.asarray(path.poses_in_ego, dtype=np.float64)
    if poses.ndim != 2 or poses.shape[1:] != (3,) or not len(poses):
        raise InputError(
            f"plan of {token} is {list(poses.shape)}; expected [n, 3] poses x, y, heading in the ego frame"
        )
    if not np.isfinite(poses).all():
        row = int(np.flatnonzero(~np.isfinite(poses).all(axis=1))[0])
        raise InputError(f"plan of {token}: pose {row} is {poses[row].tolist()}; every number must be finite")
    if not (np.isfinite(path.interval_s) and path.interval_s > 0):
        raise InputError(f"plan of {token}: its interval is {path.interval_s} s; it must be above 0")


def progress_score(metric: Metric, agent: Drive, reference: Drive) -> float:
    """Progress of a plan as a share of what it and PDM-Closed reach without breaking a rule."""
    own = float(np.prod([agent.sub_scores[name] for name in metric.multipliers]))
    other = float(np.prod([reference.sub_scores[name] for name in metric.multipliers]))
    most = max(agent.progress_m * own, reference.progress_m * other)
    if metric.devkit == "v1":
        if most > LEAST_PROGRESS_M:
            return agent.progress_m * own / most
        return float(own > 0)
    return float(np.clip(agent.progress_m / most, 0.0, 1.0)) if most > LEAST_PROGRESS_M else 1.0


def judge(scene: Scene, states: Floats) -> list[Drive]:
    """Everything about drives that needs neither each other nor another frame.

    Args:
        scene: where they happen.
        states: [P, 41, 11].

    Returns:
        P drives.
    """
    import shapely

    v2 = scene.devkit == "v2"
    boxes = scene.vehicle.boxes(states[..., :3])
    corners, centres = box_corners(boxes), boxes[..., :2]
    polygons = _rectangles(corners)
    roads = _roads(scene)
    around = _surroundings(roads, corners, centres, states[..., :2])
    tracks = _replayed(scene) if v2 else scene.tracks
    # As long as tracks are known: v1 knows them a second longer than it drives.
    looking_ahead = min(scene.horizon + 1, tracks.boxes.shape[1] - max(TTC_AHEAD_STEPS))
    touches = _touches(states, boxes, tracks, looking_ahead)

    collisions, collision_steps = _collisions(states, scene.vehicle, around, tracks, touches)
    ttc, ttc_steps = _time_to_collision(states, around, tracks, touches, looking_ahead)
    excused = around.centre_in_intersection if v2 else np.zeros_like(around.off_route)
    signals = comfort_signals(_with_history(scene, states), scene.devkit)
    comfortable = within_limits(signals).all(axis=-1)
    with np.errstate(invalid="ignore"):  # GEOS minds the points that a centre line repeats at lane joins
        along = shapely.line_locate_point(roads.centreline, shapely.points(centres[:, [0, -1]]))
    progress = np.maximum(along[:, 1] - along[:, 0], 0.0)

    columns = {
        NC: collisions,
        DAC: 1.0 - around.non_drivable.any(axis=1),
        DDC: _direction(centres, around.off_route & ~excused),
        TTC: ttc,
        HC if v2 else COMFORT: comfortable,
    }
    if v2:
        columns[TLC] = _traffic_lights(scene, polygons)
        columns[LK] = _lane_keeping(roads.centreline, centres, around.centre_in_intersection)
    return [
        Drive(
            states=states[plan],
            sub_scores={name: float(values[plan]) for name, values in columns.items()},
            progress_m=float(progress[plan]),
            collision_step=collision_steps[plan],
            ttc_step=ttc_steps[plan],
            multiple_lanes=around.multiple_lanes[plan],
            non_drivable=around.non_drivable[plan],
            off_route=around.off_route[plan],
        )
        for plan in range(len(states))
    ]


def classify_contact(
    pose: Floats,
    speed_mps: float,
    box: Floats,
    type: str,
    first_speed_mps: float,
    vehicle: Vehicle = PACIFICA,
) -> Contact:
    """What kind of contact it is when the ego vehicle touches a box.

    Args:
        pose: [3] of the ego rear axle.
        speed_mps: of the ego vehicle.
        box: [5].
        type: of the track.
        first_speed_mps: of the track when it was first seen.
        vehicle: the ego vehicle.
    """
    import shapely

    if speed_mps <= STOPPED_MPS:
        return "stopped_ego"
    if type not in AGENT_TYPES or first_speed_mps <= STOPPED_MPS:
        return "stopped_track"
    if _bearing(pose, box[:2]) > BEHIND_RAD:
        return "rear"
    corners = box_corners(vehicle.boxes(pose))
    if shapely.intersects(shapely.linestrings(corners[[0, 3]]), shapely.polygons(box_corners(box))):
        return "front"
    return "lateral"


def is_ahead(pose: Floats, point: Floats) -> bool:
    """A point lies less than 30 degrees off the ego heading, seen from the rear axle."""
    return bool(_bearing(pose, point) < AHEAD_RAD)


def is_behind(pose: Floats, point: Floats) -> bool:
    """A point lies more than 150 degrees off the ego heading, seen from the rear axle."""
    return bool(_bearing(pose, point) > BEHIND_RAD)


def _bearing(pose: Floats, point: Floats) -> float:
    """Angle between ego heading and a point, 0 … pi.

    NaN where rounding leaves the cosine's range, as in nuPlan: such a point is neither ahead nor behind.
    """
    away = np.asarray(point) - pose[:2]
    away = away / np.linalg.norm(away)
    with np.errstate(invalid="ignore"):
        return float(np.arccos(np.dot([np.cos(pose[2]), np.sin(pose[2])], away)))


def _rectangles(corners: Floats) -> Any:
    """Geometries of [..., 4, 2] corners."""
    import shapely

    return shapely.polygons(np.concatenate([corners, corners[..., :1, :]], axis=-2))


def _shapes(polygons: Sequence[Rings]) -> list[Polygon]:
    import shapely

    return [shapely.Polygon(outline, holes) for outline, *holes in polygons]


def _roads(scene: Scene) -> _Map:
    import shapely

    lanes, on_route, drivable, intersections = [], [], [], []
    for area in scene.areas:
        shapes = _shapes(area.polygons)
        shape = shapes[0] if len(shapes) == 1 else shapely.MultiPolygon(shapes)
        shapely.prepare(shape)
        if area.type in ("lane", "lane_connector"):
            lanes.append(shape)
            on_route.append(area.id in scene.route_lane_ids)
        else:
            drivable.append(shape)
        if area.type == "intersection":
            intersections.append(shape)
    return _Map(lanes, on_route, drivable, intersections, shapely.LineString(scene.centreline))


def _surroundings(roads: _Map, corners: Floats, centres: Floats, axles: Floats) -> _Surroundings:
    in_lanes = _inside(roads.lanes, corners)
    lanes_with_a_corner = in_lanes.any(axis=-1).sum(axis=0)
    whole_in_one = in_lanes.all(axis=-1).any(axis=0)
    route = [lane for lane, on_route in zip(roads.lanes, roads.on_route, strict=True) if on_route]
    return _Surroundings(
        multiple_lanes=(lanes_with_a_corner > 1) & ~whole_in_one,
        non_drivable=~_inside(roads.drivable, corners).any(axis=0).all(axis=-1),
        off_route=~_inside(route, centres).any(axis=0),
        centre_in_intersection=_inside(roads.intersections, centres).any(axis=0),
        axle_in_intersection=_inside(roads.intersections, axles).any(axis=0),
    )


def _inside(shapes: list[Polygon], points: Floats) -> Flags:
    """[shapes, ...]: which points [..., 2] are strictly inside which shapes."""
    import shapely

    flat = points.reshape(-1, 2)
    low, high = flat.min(axis=0), flat.max(axis=0)
    inside = np.zeros((len(shapes), len(flat)), dtype=bool)
    if shapes:
        bounds = shapely.bounds(np.array(shapes, dtype=object))
        near = (bounds[:, :2] <= high).all(axis=1) & (bounds[:, 2:] >= low).all(axis=1)
        for index in np.flatnonzero(near):
            inside[index] = shapely.contains_xy(shapes[index], flat[:, 0], flat[:, 1])
    return inside.reshape(len(shapes), *points.shape[:-1])


def _replayed(scene: Scene) -> Tracks:
    """Without the tracks that touch the ego vehicle at the start, which v2's log replay takes out."""
    import shapely

    tracks = scene.tracks
    now = tracks.boxes[:, 0]
    present = np.flatnonzero(np.isfinite(now[:, 0]))
    ego = _rectangles(box_corners(scene.vehicle.boxes(scene.ego.pose)))
    touching = present[shapely.intersects(ego, _rectangles(box_corners(now[present])))]
    if not len(touching):
        return tracks
    kept = np.setdiff1d(np.arange(len(tracks.tokens)), touching)
    return Tracks(
        tuple(tracks.tokens[index] for index in kept),
        tuple(tracks.types[index] for index in kept),
        tracks.boxes[kept],
        tracks.first_speed_mps[kept],
    )


def _speeds(states: Floats) -> Floats:
    return np.hypot(states[..., simulation.VX], states[..., simulation.VY])


def _touches(states: Floats, boxes: Floats, tracks: Tracks, looking_ahead: int) -> list[_Touch]:
    """Contacts of the ego boxes, where they are and moved ahead at constant speed, in order of time.

    Args:
        states: [P, 41, 11].
        boxes: [P, 41, 5].
        tracks: N of them.
        looking_ahead: first steps from which the boxes are moved ahead.
    """
    import shapely

    if not tracks.tokens:
        return []
    ahead = np.array(TTC_AHEAD_STEPS)
    heading = states[..., simulation.HEADING]
    velocity = np.stack([np.cos(heading), np.sin(heading)], axis=-1) * _speeds(states)[..., None]
    reach = np.hypot(*boxes[0, 0, 3:]) / 2 + np.hypot(tracks.boxes[..., 3], tracks.boxes[..., 4]) / 2
    found = []
    for seconds, steps in zip(ahead * STEP_S, ahead, strict=True):
        count = states.shape[1] if steps == 0 else looking_ahead
        moved = boxes[:, :count].copy()
        moved[..., :2] += velocity[:, :count] * seconds
        others = tracks.boxes[:, steps : steps + count]
        apart = np.hypot(
            moved[:, :, None, 0] - others[None, :, :, 0].swapaxes(1, 2),
            moved[:, :, None, 1] - others[None, :, :, 1].swapaxes(1, 2),
        )
        with np.errstate(invalid="ignore"):
            close = apart <= reach[:, steps : steps + count].T[None]
        plans, at, who = np.nonzero(close)
        hit = shapely.intersects(
            _rectangles(box_corners(moved[plans, at])), _rectangles(box_corners(others[who, at]))
        )
        found += [
            _Touch(*map(int, (p, k, steps, n))) for p, k, n in zip(plans[hit], at[hit], who[hit], strict=True)
        ]
    return sorted(found, key=lambda touch: (touch.plan, touch.step, touch.ahead, touch.track))


def _collisions(
    states: Floats, vehicle: Vehicle, around: _Surroundings, tracks: Tracks, touches: list[_Touch]
) -> tuple[Floats, list[int | None]]:
    """Score and first step of collisions the plan is at fault for."""
    scores = np.ones(len(states))
    first: list[int | None] = [None] * len(states)
    speeds = _speeds(states)
    no_fault: set[tuple[int, int]] = set()
    for touch in touches:
        plan, step, track = touch.plan, touch.step, touch.track
        if touch.ahead or (plan, track) in no_fault:
            continue
        kind = classify_contact(
            states[plan, step, :3],
            float(speeds[plan, step]),
            tracks.boxes[track, step],
            tracks.types[track],
            float(tracks.first_speed_mps[track]),
            vehicle,
        )
        straying = around.multiple_lanes[plan, step] or around.non_drivable[plan, step]
        if kind in ("stopped_track", "front") or (kind == "lateral" and straying):
            cost = 1.0 if tracks.types[track] in AGENT_TYPES else STATIC_COST
            scores[plan] = min(scores[plan], 1.0 - cost)
            first[plan] = step if first[plan] is None else first[plan]
        else:
            no_fault.add((plan, track))
    return scores, first


def _time_to_collision(
    states: Floats, around: _Surroundings, tracks: Tracks, touches: list[_Touch], steps: int
) -> tuple[Floats, list[int | None]]:
    """Score and first step at which going on for up to 0.9 s would hit something ahead."""
    scores = np.ones(len(states))
    first: list[int | None] = [None] * len(states)
    speeds = _speeds(states)
    harmless: set[tuple[int, int]] = set()
    for touch in touches:
        plan, step, track = touch.plan, touch.step, touch.track
        if step >= steps or speeds[plan, step] < TTC_STOPPED_MPS or (plan, track) in harmless:
            continue
        pose, centre = states[plan, step, :3], tracks.boxes[track, step + touch.ahead, :2]
        straying = (
            around.multiple_lanes[plan, step]
            or around.non_drivable[plan, step]
            or around.axle_in_intersection[plan, step]
        )
        if is_ahead(pose, centre) or (straying and not is_behind(pose, centre)):
            scores[plan] = 0.0
            first[plan] = step if first[plan] is None else first[plan]
        else:
            harmless.add((plan, track))
    return scores, first


def _direction(centres: Floats, off_route: Flags) -> Floats:
    """[P] from the longest way driven off the route within a second."""
    driven = np.zeros(off_route.shape)
    driven[:, 1:] = np.linalg.norm(np.diff(centres, axis=1), axis=-1)
    driven = np.where(off_route, driven, 0.0)
    padded = np.pad(driven, ((0, 0), (WRONG_WAY_STEPS - 1, 0)))
    most = np.lib.stride_tricks.sliding_window_view(padded, WRONG_WAY_STEPS, axis=1).sum(axis=-1).max(axis=1)
    allowed, forbidden = WRONG_WAY_M
    return np.where(most < allowed, 1.0, np.where(most < forbidden, 0.5, 0.0))


def _traffic_lights(scene: Scene, polygons: Any) -> Floats:
    """[P] 0 where the ego box touches a red connector of the route at any step."""
    import shapely

    clear = np.ones(len(polygons))
    red_at: dict[str, list[int]] = {}
    for step, ids in enumerate(scene.red_lights[: scene.horizon + 1]):
        for id in ids:
            red_at.setdefault(id, []).append(step)
    for id, steps in red_at.items():
        for shape in _shapes(scene.red_light_polygons[id]):
            clear[shapely.intersects(shape, polygons[:, steps]).any(axis=1)] = 0.0
    return clear


def _lane_keeping(centreline: LineString, centres: Floats, in_intersection: Flags) -> Floats:
    """[P] 0 after two seconds in a row off the centre line; samples in intersections are passed over."""
    import shapely

    off = shapely.distance(centreline, shapely.points(centres)) > OFF_CENTRE_M
    kept = np.ones(len(centres))
    for plan in range(len(centres)):
        in_a_row = 0
        for is_off in off[plan, ~in_intersection[plan]]:
            in_a_row = in_a_row + 1 if is_off else 0
            if in_a_row >= OFF_CENTRE_STEPS:
                kept[plan] = 0.0
    return kept


def _with_history(scene: Scene, states: Floats) -> Floats:
    """[P, n, 11] drives after the logged motion; v1 knows no history."""
    if scene.devkit == "v1" or not scene.past:
        return states
    history = history_states(scene.past)
    return np.concatenate([np.broadcast_to(history, (len(states), *history.shape)), states], axis=1)
