"""A PDM score on nuScenes-format data: NAVSIM's rules, our scenes. Not comparable to any NAVSIM figure.

Tracks, drivable area, lanes and route come from annotations and map expansion. What differs from NAVSIM: 3 s
instead of 4, the nuScenes car, and the logged drive in place of PDM-Closed as the yardstick of progress.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from eval_nuscenes.metrics import TrackedBox
from eval_nuscenes.navsim.scene import (
    STEP_S,
    AreaType,
    EgoMotion,
    Floats,
    MapArea,
    PlannedPath,
    Rings,
    Scene,
    Tracks,
    Vehicle,
    wrapped,
)
from eval_nuscenes.navsim.scoring import PDMS, FrameScore, score_plan
from eval_nuscenes.nuscenes_reader import Sample
from eval_nuscenes.road_map import Layer, Pose, RoadMap, Shape
from vla_autoprune.errors import InputError
from vla_autoprune.frame import WAYPOINT_TIMES_S, FloatArray

PDMS_NUSCENES = replace(
    PDMS,
    name="PDMS-nuScenes",
    reference="logged drive",
    summary="Ours, not comparable to NAVSIM's: NC x DAC x (5 EP + 5 TTC + 2 C) / 12 over 3 s of "
    "nuScenes-format data, with the nuScenes car, progress against the logged drive, roads from the map "
    "expansion.",
)
ZOE = Vehicle(length_m=4.084, width_m=1.85, rear_overhang_m=1.0, wheel_base_m=2.588)
"""The nuScenes car, with the box that the open-loop protocols use."""

INTERVAL_S = 0.5
HORIZON = round(WAYPOINT_TIMES_S[-1] / STEP_S)
REACH_M = 100.0
"""Of the map around the car, as in NAVSIM."""
ON_LANE_M = 3.0
"""A centre line this near to the car, within `SAME_WAY_RAD`, may be that of its lane."""
ROUTE_WIDTH_M = 6.0
"""Lanes that run this near to the route, the same way, belong to it: the neighbours."""
SAME_WAY_RAD = np.radians(60)
ROUTE_AHEAD_M = 80.0
ROUTE_BEHIND_M = 10.0

_LANE_LAYERS: tuple[Layer, ...] = ("lane", "lane_connector")
_TYPES = {
    "vehicle.bicycle": "bicycle",
    "vehicle": "vehicle",
    "human": "pedestrian",
    "movable_object.barrier": "barrier",
    "movable_object.trafficcone": "traffic_cone",
}
"""NAVSIM's types by the start of a nuScenes category; everything else is a generic object."""


class OffLaneError(InputError):
    """No lane of the map lies under the car: there is no route to judge progress by."""


def score_on_nuscenes(scene: Scene, waypoints_in_ego: FloatArray) -> FrameScore:
    """Score a plan on a keyframe by PDM's rules.

    Args:
        scene: from `scene_of_sample`.
        waypoints_in_ego: [6, 3] x, y, heading every 0.5 s in the ego frame.

    Returns:
        Sub-scores as in PDMS, under the name of `PDMS_NUSCENES`.

    Raises:
        InputError: the plan has another shape or is not finite.
    """
    waypoints = np.asarray(waypoints_in_ego, dtype=np.float64)
    if waypoints.shape != (len(WAYPOINT_TIMES_S), 3):
        raise InputError(
            f"plan of {scene.token} is {list(waypoints.shape)}; expected [{len(WAYPOINT_TIMES_S)}, 3] "
            "waypoints x, y, heading at 0.5 … 3.0 s"
        )
    return replace(score_plan(scene, PlannedPath(waypoints, INTERVAL_S)), metric=PDMS_NUSCENES)


def scene_of_sample(sample: Sample, road: RoadMap) -> Scene:
    """What PDM's rules need to know about a keyframe.

    Args:
        sample: with a whole future.
        road: the map of its location.

    Raises:
        OffLaneError: no lane lies under the car.
        InputError: the future is cut off by the end of the scene.
    """
    if not sample.future_exists.all():
        raise InputError(f"sample {sample.token} of {sample.scene} has no whole future of 3 s")
    pose = sample.pose_in_map
    future = _to_map(np.asarray(sample.future_in_ego, dtype=np.float64), pose)
    now_us = round(sample.stamp_s * 1e6)
    stamps = now_us + np.arange(len(future) + 1) * round(INTERVAL_S * 1e6)
    driven = np.vstack([np.array(pose), future])
    centreline = _centreline(sample, road, driven)
    lanes = {
        "lane": road.shapes("lane", pose, REACH_M),
        "lane_connector": road.shapes("lane_connector", pose, REACH_M),
    }
    route = [
        shape.token
        for shapes in lanes.values()
        for shape in shapes
        if _runs_along(road.centreline(shape.token), centreline)
    ]
    return Scene(
        token=sample.token,
        log=sample.scene,
        devkit="v1",
        ego=EgoMotion(
            time_us=now_us,
            pose=np.array(pose),
            velocity_mps=np.array([sample.ego.speed_mps, 0.0]),
            acceleration_mps2=np.array([sample.ego.acceleration_mps2, 0.0]),
        ),
        centreline=centreline[:, :2],
        route_lane_ids=frozenset(route),
        areas=(
            *_areas("drivable_area", road.shapes("drivable_area", pose, REACH_M)),
            *_areas("carpark_area", road.shapes("carpark_area", pose, REACH_M)),
            *_areas("intersection", road.intersections(pose, REACH_M)),
            *_areas("lane", lanes["lane"]),
            *_areas("lane_connector", lanes["lane_connector"]),
        ),
        reference=np.column_stack([stamps, driven]),
        tracks=_tracks(sample),
        horizon=HORIZON,
        vehicle=ZOE,
    )


def _areas(type: AreaType, shapes: Sequence[Shape]) -> list[MapArea]:
    return [MapArea(shape.token, type, (_rings(shape),)) for shape in shapes]


def _rings(shape: Shape) -> Rings:
    polygon = shape.polygon
    return tuple(np.array(ring.coords)[:, :2] for ring in (polygon.exterior, *polygon.interiors))


def _to_map(poses_in_ego: Floats, pose: Pose) -> Floats:
    x, y, heading = pose
    cos, sin = np.cos(heading), np.sin(heading)
    return np.column_stack(
        [
            x + cos * poses_in_ego[:, 0] - sin * poses_in_ego[:, 1],
            y + sin * poses_in_ego[:, 0] + cos * poses_in_ego[:, 1],
            wrapped(heading + poses_in_ego[:, 2]),
        ]
    )


def _centreline(sample: Sample, road: RoadMap, driven: Floats) -> Floats:
    """[n, 3] from a little behind the car along the lanes that the logged drive takes, and on."""
    start = driven[0]
    candidates = {
        shape.token: road.centreline(shape.token)
        for layer in _LANE_LAYERS
        for shape in road.shapes(layer, sample.pose_in_map, 2 * ON_LANE_M)
    }
    under = {
        token: line
        for token, line in candidates.items()
        if _distance(line, start) <= ON_LANE_M and _same_way(line, start)
    }
    if not under:
        raise OffLaneError(
            f"sample {sample.token} of {sample.scene}: no lane within {ON_LANE_M:g} m runs the car's way"
        )
    token = min(under, key=lambda name: _mismatch(under[name], driven))
    line = under[token]
    here = int(np.argmin(np.hypot(*(line[:, :2] - start[:2]).T)))
    behind = line[: here + 1]
    back = np.cumsum(np.hypot(*np.diff(behind[::-1, :2], axis=0).T)) if here else np.empty(0)
    first = here - int(np.searchsorted(back, ROUTE_BEHIND_M))
    parts, seen = [line[max(first, 0) :]], {token}
    while _length(np.vstack(parts)) < ROUTE_AHEAD_M + ROUTE_BEHIND_M:
        onward = {next: road.centreline(next) for next in road.successors(token) if next not in seen}
        onward = {next: points for next, points in onward.items() if len(points)}
        if not onward:
            break
        token = min(onward, key=lambda name: _mismatch(onward[name], driven))
        seen.add(token)
        parts.append(onward[token])
    return np.vstack(parts)


def _length(line: Floats) -> float:
    return float(np.hypot(*np.diff(line[:, :2], axis=0).T).sum())


def _distance(line: Floats, pose: Floats) -> float:
    return float(np.hypot(*(line[:, :2] - pose[:2]).T).min()) if len(line) else np.inf


def _same_way(line: Floats, pose: Floats) -> bool:
    nearest = line[np.argmin(np.hypot(*(line[:, :2] - pose[:2]).T))]
    return bool(abs(wrapped(nearest[2] - pose[2])) < SAME_WAY_RAD)


def _mismatch(line: Floats, driven: Floats) -> float:
    """How far a lane runs from a drive, over the part of the drive that is abreast of the lane."""
    along = np.hypot(*(line[None, :, :2] - driven[:, None, :2]).transpose(2, 0, 1))
    nearest = along.argmin(axis=1)
    abreast = (nearest > 0) & (nearest < len(line) - 1)
    apart = along.min(axis=1)
    turned = np.abs(wrapped(line[nearest, 2] - driven[:, 2]))
    return (
        float((apart + turned)[abreast].mean()) if abreast.any() else float(apart.min() + turned.min() + 10.0)
    )


def _runs_along(line: Floats, route: Floats) -> bool:
    """Some part of a lane is near the route and goes the same way."""
    if not len(line):
        return False
    apart = np.hypot(*(line[:, None, :2] - route[None, :, :2]).transpose(2, 0, 1))
    turned = np.abs(wrapped(line[:, None, 2] - route[None, :, 2]))
    return bool(((apart < ROUTE_WIDTH_M) & (turned < SAME_WAY_RAD)).any())


def _tracks(sample: Sample) -> Tracks:
    """Boxes at 10 Hz, by NAVSIM's rule: linear between sightings, unmoved where there is but one."""
    sightings: dict[str, list[tuple[int, TrackedBox]]] = {}
    for keyframe, boxes in enumerate(sample.truth.boxes):
        for box in boxes:
            sightings.setdefault(box.track, []).append((keyframe, box))
    map_from_lidar = sample.ego_pose @ sample.ego_from_lidar
    yaw = float(np.arctan2(map_from_lidar[1, 0], map_from_lidar[0, 0]))
    wanted = np.arange(HORIZON + 1) * STEP_S
    tracks, types, speeds = np.full((len(sightings), HORIZON + 1, 5), np.nan), [], []
    for number, seen in enumerate(sightings.values()):
        times = np.array([keyframe * INTERVAL_S for keyframe, _ in seen])
        centres = np.array([(box.x, box.y, 0.0, 1.0) for _, box in seen]) @ map_from_lidar.T
        headings = np.unwrap([box.yaw + yaw for _, box in seen])
        first = seen[0][1]
        present = (wanted >= times[0] - 1e-6) & (wanted <= times[-1] + 1e-6) if len(seen) > 1 else wanted >= 0
        tracks[number, present] = np.column_stack(
            [
                np.interp(wanted[present], times, centres[:, 0]),
                np.interp(wanted[present], times, centres[:, 1]),
                wrapped(np.interp(wanted[present], times, headings)),
                np.full(present.sum(), first.length),
                np.full(present.sum(), first.width),
            ]
        )
        kinds = (name for start, name in _TYPES.items() if first.category.startswith(start))
        types.append(next(kinds, "generic_object"))
        moved = np.hypot(*(centres[1, :2] - centres[0, :2])) if len(seen) > 1 else 0.0
        speeds.append(float(moved / (times[1] - times[0])) if len(seen) > 1 else 0.0)
    return Tracks(tuple(sightings), tuple(types), tracks, np.array(speeds))
