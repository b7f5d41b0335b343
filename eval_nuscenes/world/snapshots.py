"""Moments of simulated drives for training: images, labels, and what the expert does from there.

A snapshot is a keyframe of the very drive that `simulate_scene` makes of the same seed, so training data and
data sets have the same distribution; further queries ask what the expert would do from there at other speeds,
or with another command.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from eval_nuscenes.world import expert
from eval_nuscenes.world.drive import Drive, Moment, View
from eval_nuscenes.world.expert import Ego
from eval_nuscenes.world.render import (
    FARTHEST_LABEL_M,
    LABELS,
    PEDESTRIAN_LABEL,
    RIG,
    VEHICLE_LABEL,
    Renderer,
    noise_seed,
)
from eval_nuscenes.world.roads import road_map
from eval_nuscenes.world.storyline import draw_kind, tell
from eval_nuscenes.world.traffic import actor_states, advance, world_state
from vla_autoprune.frame import WAYPOINT_TIMES_S, Command, EgoState
from vla_autoprune.models.training_data import (
    PATCH_CHANNELS,
    QUERIES_PER_SCENE,
    Query,
    TrainingScene,
    obstacles_array,
)

PATCH_PIXELS = 16
DRIVE_S = 20.0
KEYFRAME_S = 0.5

_STEPS_PER_WAYPOINT = round(0.5 / expert.STEP_S)
_LAST_KEYFRAME = round((DRIVE_S - WAYPOINT_TIMES_S[-1]) / KEYFRAME_S)
_MANY_PIXELS = 40
"""Along a patch: from here on, every second pixel counts."""
_OTHER_COMMAND_SHARE = 0.4


def training_scene(seed: int, image_size: int = 96) -> TrainingScene:
    """One moment of the drive with this seed.

    Args:
        seed: same seed, same bytes.
        image_size: of the square images, a multiple of 16.

    Returns:
        Six images, labels of their patches, and four queries; the first is how the ego was really driven.

    Raises:
        ValueError: image_size is not a positive multiple of 16.
    """
    if image_size < PATCH_PIXELS or image_size % PATCH_PIXELS:
        raise ValueError(f"image_size: {image_size} is not a positive multiple of {PATCH_PIXELS}")
    rng = np.random.default_rng(seed)
    kind = draw_kind(rng)
    drive = Drive(tell(rng, kind, DRIVE_S))
    view, moment = drive.view, drive.begin()
    index = _STEPS_PER_WAYPOINT * int(rng.integers(_LAST_KEYFRAME + 1))
    for _ in range(index):
        advance(drive, view, moment)
    story = drive.story
    state = world_state(drive, view, moment)
    roads = road_map(story.network, with_lanes=False)
    renderer = Renderer(roads, story.actors, RIG, image_size, image_size, story.daylight, story.haze)
    images, labels = renderer.render(state, noise_seed=noise_seed(seed, index))
    queries = [_query(drive, view, moment)]
    other = _other_view(drive, view, moment, rng)
    while len(queries) < QUERIES_PER_SCENE:
        chosen = other if other is not None and rng.random() < _OTHER_COMMAND_SHARE else view
        ego = _imagined(drive, chosen, moment, rng)
        queries.append(_query(drive, chosen, replace(moment.copy(), ego=ego)))
    return TrainingScene(images, patch_labels(labels, image_size // PATCH_PIXELS), tuple(queries), kind)


def patch_labels(labels: NDArray[np.uint8], per_side: int) -> NDArray[np.float32]:
    """What each patch of an image shows.

    Args:
        labels: [cameras, pixels, pixels] label values as `render.LABELS` explains.
        per_side: patches along each side of an image.

    Returns:
        [cameras, per_side, per_side, len(PATCH_CHANNELS)] coverage; ten over the nearest actor's distance.
    """
    cameras, size, _ = labels.shape
    if size // per_side >= _MANY_PIXELS and size // per_side % 2 == 0:
        labels, size = labels[:, ::2, ::2], size // 2
    pixels = size // per_side
    patches = np.arange(cameras * per_side * per_side).reshape(cameras, per_side, 1, per_side, 1)
    keys = labels.reshape(cameras, per_side, pixels, per_side, pixels) + 256 * patches
    counts = np.bincount(keys.ravel(), minlength=256 * patches.size).reshape(-1, 256)
    shares, nearness = _label_meanings()
    channels = counts @ shares / (pixels * pixels)
    channels[:, PATCH_CHANNELS.index("inverse_distance")] = np.where(counts > 0, nearness, 0.0).max(axis=1)
    return channels.reshape(cameras, per_side, per_side, -1).astype(np.float32)


@lru_cache(maxsize=1)
def _label_meanings() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[256, channels] what a pixel of each label counts for, and [256] ten over its distance."""
    shares = np.zeros((256, len(PATCH_CHANNELS)))
    for value, name in enumerate(LABELS):
        if name in PATCH_CHANNELS:
            shares[value, PATCH_CHANNELS.index(name)] = 1.0
    shares[LABELS.index("brake_light"), PATCH_CHANNELS.index("vehicle")] = 1.0
    shares[LABELS.index("lane_marking"), PATCH_CHANNELS.index("road")] = 1.0
    nearness = np.zeros(256)
    for name, first in (("vehicle", VEHICLE_LABEL), ("pedestrian", PEDESTRIAN_LABEL)):
        distances = np.arange(FARTHEST_LABEL_M + 1)
        shares[first + distances, PATCH_CHANNELS.index(name)] = 1.0
        nearness[first + distances] = 10.0 / np.maximum(distances, 1)
    return shares, nearness


def _query(drive: Drive, view: View, moment: Moment) -> Query:
    """What the expert does in the next seconds, everybody else reacting to it."""
    route, start = view.route, moment.ego
    state = EgoState(start.speed_mps, start.acceleration_mps2, start.speed_mps * route.path_curvature(start))
    x0, y0, heading0 = route.pose(start)
    cos, sin = math.cos(heading0), math.sin(heading0)
    played = moment.copy()
    waypoints = np.empty((len(WAYPOINT_TIMES_S), 3), dtype=np.float32)
    boxes = []
    for step in range(len(WAYPOINT_TIMES_S)):
        for _ in range(_STEPS_PER_WAYPOINT):
            advance(drive, view, played)
        x, y, heading = route.pose(played.ego)
        dx, dy = x - x0, y - y0
        turned = math.remainder(heading - heading0, 2 * math.pi)
        waypoints[step] = (dx * cos + dy * sin, dy * cos - dx * sin, turned)
        others = [
            (
                (other.x - x0) * cos + (other.y - y0) * sin,
                (other.y - y0) * cos - (other.x - x0) * sin,
                math.remainder(other.heading - heading0, 2 * math.pi),
                drive.story.actors[other.actor].length_m,
                drive.story.actors[other.actor].width_m,
            )
            for other in actor_states(drive, played)
        ]
        boxes.append(np.array(others).reshape(-1, 5))
    return Query(state, route.command(start.along_m), waypoints, obstacles_array(boxes))


def _imagined(drive: Drive, view: View, moment: Moment, rng: np.random.Generator) -> Ego:
    """The ego at the same place with another speed and acceleration, from which it can still drive safely."""
    allowed = view.route.allowed_mps[int(moment.ego.along_m)]
    speed = float(rng.uniform(0.0, 1.05)) * allowed
    ego = drive.at_safe_speed(view, moment, replace(moment.ego, speed_mps=speed))
    acceleration = float(np.clip(rng.normal(0.0, 0.9), -2.0, 1.8)) if ego.speed_mps > 0.5 else 0.0
    return replace(ego, acceleration_mps2=acceleration)


def _other_view(drive: Drive, view: View, moment: Moment, rng: np.random.Generator) -> View | None:
    """A route with another command, where the junction ahead is close enough for one."""
    order = rng.permutation(len(Command)).tolist()
    if not view.route.command_is_known(moment.ego.along_m):
        return None
    for turn in (list(Command)[number] for number in order):
        found = drive.alternative(moment, turn)
        if found is not None:
            return found
    return None
