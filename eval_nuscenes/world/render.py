"""Draws what the six cameras see: flat ground, boxes shaded by face, far things first.

Traffic lights are drawn oversized (lamps of 1.2 m) and lit brake lights span the car's tail, so that both
still show when an image is squeezed to 96 pixels. Beside every colour image goes an image of labels, drawn by
the same calls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from eval_nuscenes.world.scene import Actor, Points, RoadMap, Scene, WorldState
from vla_autoprune.frame import Image

NATIVE_WIDTH, NATIVE_HEIGHT = 1600, 900

LABELS = ("nothing", "road", "lane_marking", "light_red", "light_amber", "light_green", "brake_light")
"""Label values 0 … 6."""
VEHICLE_LABEL, PEDESTRIAN_LABEL = 16, 136
"""A vehicle's label is VEHICLE_LABEL + its distance in metres, a pedestrian's likewise."""
FARTHEST_LABEL_M = 119

_NEAR_M = 0.5
_GROUND_REACH_M = 110.0
_UPRIGHT_REACH_M = 95.0
_SUPERSAMPLED_UP_TO = 256
_SUPERSAMPLING = 3
_SHIFT = 4
_PIXEL_LIMIT = 1 << 22

_SKY_TOP, _SKY_LOW = (112, 160, 214), (204, 218, 230)
_GRASS, _ROAD, _WALKWAY = (94, 122, 72), (84, 86, 92), (176, 166, 152)
_WHITE, _YELLOW = (238, 238, 234), (238, 190, 40)
_HAZE = (206, 212, 218)
_HAZE_DEPTH_M = 45.0
_SIGN_RIM = (200, 30, 60)
_GLASS = (34, 40, 50)
_SKIN = (214, 164, 130)
_ARM_M = 3.6
_POLE, _BOARD = (70, 72, 76), (22, 22, 24)
_LAMPS = {"red": (255, 24, 16), "amber": (255, 176, 0), "green": (20, 255, 110)}
_LAMP_OFF = (52, 50, 48)
_BRAKING, _TAIL = (255, 30, 30), (120, 16, 20)
_HEADLIGHT = (250, 246, 220)
_WALLS = ((170, 126, 104), (190, 180, 160), (132, 140, 150), (158, 150, 128))


@dataclass(frozen=True)
class Camera:
    """A calibrated camera.

    Attributes:
        translation: x, y, z of the lens in the ego frame, metres.
        rotation: quaternion w, x, y, z from the camera frame (x right, y down, z ahead) to the ego frame.
        intrinsic: [3, 3] at 1600x900 pixels.
    """

    name: str
    translation: tuple[float, float, float]
    rotation: tuple[float, float, float, float]
    intrinsic: NDArray[np.float64]

    def intrinsic_at(self, width: int, height: int) -> NDArray[np.float64]:
        """[3, 3] for the whole image scaled to another size, each axis by itself."""
        return np.diag([width / NATIVE_WIDTH, height / NATIVE_HEIGHT, 1.0]) @ self.intrinsic

    @cached_property
    def ego_from_camera(self) -> NDArray[np.float64]:
        """[3, 3] rotation."""
        w, x, y, z = self.rotation
        return np.array(
            [
                [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
                [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
                [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
            ]
        )


@dataclass(frozen=True)
class Rig:
    """Cameras by channel name."""

    cameras: Mapping[str, Camera]


def _camera(name: str, x: float, y: float, z: float, yaw_deg: float, focal: float) -> Camera:
    # Looking along +x, a camera's axes are (x right, y down, z ahead) = (-y, -z, x) of the ego.
    ahead = (0.5, -0.5, 0.5, -0.5)
    half = math.radians(yaw_deg) / 2
    c, s = math.cos(half), math.sin(half)
    w0, x0, y0, z0 = ahead
    rotation = (c * w0 - s * z0, c * x0 - s * y0, c * y0 + s * x0, c * z0 + s * w0)
    return Camera(name, (x, y, z), rotation, np.array([[focal, 0, 800.0], [0, focal, 450.0], [0, 0, 1.0]]))


RIG = Rig(
    {
        camera.name: camera
        for camera in (
            _camera("CAM_FRONT_LEFT", 1.55, 0.5, 1.5, 55.0, 1260.0),
            _camera("CAM_FRONT", 1.7, 0.0, 1.5, 0.0, 1260.0),
            _camera("CAM_FRONT_RIGHT", 1.55, -0.5, 1.5, -55.0, 1260.0),
            _camera("CAM_BACK_LEFT", 1.05, 0.5, 1.55, 110.0, 1260.0),
            _camera("CAM_BACK", 0.05, 0.0, 1.55, 180.0, 800.0),
            _camera("CAM_BACK_RIGHT", 1.05, -0.5, 1.55, -110.0, 1260.0),
        )
    }
)
"""Six cameras with round numbers close to the nuScenes cars': same places, directions and angles of view."""


@dataclass(frozen=True)
class _Faces:
    """Polygons in 3-D, the vertices of one after those of another.

    Attributes:
        vertices: [V, 3].
        starts: [F + 1] first vertex of each polygon.
        colours: [F, 3].
        glows: [F] does not darken at dusk or fade in haze.
        labels: [F].
        things: [F] index of the thing that a polygon is part of.
        places: [T, 2] where the things stand; far ones are drawn first.
    """

    vertices: NDArray[np.float64]
    starts: NDArray[np.int64]
    colours: NDArray[np.float64]
    glows: NDArray[np.bool_]
    labels: NDArray[np.int64]
    things: NDArray[np.int64]
    places: NDArray[np.float64]


class _Collector:
    """Gathers polygons, thing by thing."""

    def __init__(self) -> None:
        self._parts: list[tuple[NDArray[np.float64], ArrayLike, ArrayLike, ArrayLike, ArrayLike]] = []
        self._places = [np.zeros((0, 2))]
        self._count = 0

    def stand(self, places: NDArray[np.float64]) -> NDArray[np.int64]:
        """Register things at [n, 2] places; their numbers."""
        self._places.append(places)
        self._count += len(places)
        return np.arange(self._count - len(places), self._count)

    def add(
        self,
        polygons: NDArray[np.float64],
        colours: ArrayLike,
        labels: ArrayLike = 0,
        glows: ArrayLike = False,
        things: ArrayLike = -1,
    ) -> None:
        """Add [n, k, 2 or 3] polygons of k corners each; the rest is one for each, or one for all."""
        self._parts.append((polygons, colours, labels, glows, things))

    def add_boxes(
        self, corners: NDArray[np.float64], colours: ArrayLike, labels: ArrayLike, things: NDArray[np.int64]
    ) -> None:
        """Add the sides and tops, shaded, of [n, 8, 3] boxes in [n, 3] colours."""
        faces = corners[:, _BOX_FACES].reshape(-1, 4, 3)
        each = np.broadcast_to(np.asarray(colours, dtype=np.float64), (len(corners), 3))
        shaded = (each[:, None] * _BOX_SHADES[:, None]).reshape(-1, 3)
        spread = np.broadcast_to(np.asarray(labels), (len(corners),)).repeat(len(_BOX_FACES))
        self.add(faces, shaded, spread, things=things.repeat(len(_BOX_FACES)))

    def faces(self) -> _Faces:
        """Everything gathered."""
        shapes = [part[0].shape for part in self._parts]
        count, corners = sum(n for n, _, _ in shapes), sum(n * k for n, k, _ in shapes)
        vertices, sizes = np.zeros((corners, 3)), np.empty(count, dtype=np.int64)
        colours, labels = np.empty((count, 3)), np.empty(count, dtype=np.int64)
        glows, things = np.empty(count, dtype=bool), np.empty(count, dtype=np.int64)
        face = corner = 0
        for polygons, colour, label, glow, thing in self._parts:
            n, k, axes = polygons.shape
            vertices[corner : corner + n * k, :axes] = polygons.reshape(-1, axes)
            part = slice(face, face + n)
            sizes[part], colours[part], labels[part], glows[part], things[part] = (
                k,
                colour,
                label,
                glow,
                thing,
            )
            face, corner = face + n, corner + n * k
        starts = np.concatenate([[0], np.cumsum(sizes)])
        return _Faces(vertices, starts, colours, glows, labels, things, np.concatenate(self._places))


def _strokes(line: Points, every: int, length: int, half_width: float) -> NDArray[np.float64]:
    """[n, 4, 2] pieces of a painted line, along a polyline with points a metre apart."""
    begins = np.arange(0, max(len(line) - 1, 0), every)
    ends = np.minimum(begins + length, len(line) - 1)
    a, b = line[begins], line[ends]
    along = b - a
    along = along / np.maximum(np.hypot(along[:, :1], along[:, 1:]), 1e-6) * half_width
    side = np.stack([-along[:, 1], along[:, 0]], axis=1)
    return np.stack([a + side, a - side, b - side, b + side], axis=1)


def _ground(roads: RoadMap) -> _Faces:
    paint = _Collector()
    for outline in roads.walkways:
        paint.add(outline[None], _WALKWAY)
    for outline in (*roads.road_segments, *roads.intersections):
        paint.add(outline[None], _ROAD, 1)
    for corners in roads.crossings:
        across, deep = corners[1] - corners[0], corners[3] - corners[0]
        stripes = int(math.hypot(*across) / 1.2)
        a = corners[0] + ((np.arange(stripes) + 0.25) / stripes)[:, None] * across
        paint.add(_quads(a, a + 0.5 / stripes * across, deep), _WHITE, 2)
    for line in roads.road_dividers:
        paint.add(_strokes(line, 6, 6, 0.13), _YELLOW, 2)
    for line in roads.lane_dividers:
        paint.add(_strokes(line, 8, 3, 0.13), _WHITE, 2)
    for light in roads.lights:
        back = 0.6 * np.array([math.cos(light.heading), math.sin(light.heading)])
        paint.add(_quads(light.stop_line[:1], light.stop_line[1:], back), _WHITE, 2)
    for a, b in roads.yield_lines:
        along = b - a
        back = np.array([along[1], -along[0]]) / math.hypot(*along) * 0.9
        teeth = int(math.hypot(*along) / 0.9)
        left = a + (np.arange(teeth) / teeth)[:, None] * along
        right = left + 0.85 / teeth * along
        paint.add(np.stack([left, right, (left + right) / 2 + back], axis=1), _WHITE, 2)
    return paint.faces()


def _quads(a: NDArray[np.float64], b: NDArray[np.float64], deep: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n, 4, 2] parallelograms from sides a-b and their depth."""
    return np.stack([a, b, b + deep, a + deep], axis=1)


# Corners of a box, lower four counter-clockwise from rear right, then the upper four.
_CORNERS = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]] * 2, dtype=np.float64) * 0.5
# right, front, left, rear, top; counter-clockwise from outside.
_BOX_FACES = np.array([[0, 1, 5, 4], [1, 2, 6, 5], [2, 3, 7, 6], [3, 0, 4, 7], [4, 5, 6, 7]])
_BOX_SHADES = np.array([0.78, 0.9, 0.72, 0.86, 1.0])
_OCTAGON = np.stack(
    [np.cos(np.arange(8) * math.pi / 4 + 0.39), np.sin(np.arange(8) * math.pi / 4 + 0.39)], axis=1
)


def _boxes(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    heading: NDArray[np.float64],
    sizes: NDArray[np.float64],
    forward: NDArray[np.float64] | float = 0.0,
) -> NDArray[np.float64]:
    """[n, 8, 3] corners of upright boxes; sizes [n, 4] are length, width, bottom and top."""
    cos, sin = np.cos(heading)[:, None], np.sin(heading)[:, None]
    ahead = _CORNERS[None, :, 0] * sizes[:, :1] + np.asarray(forward).reshape(-1, 1)
    left = _CORNERS[None, :, 1] * sizes[:, 1:2]
    corners = np.empty((len(x), 8, 3))
    corners[:, :, 0] = x[:, None] + ahead * cos - left * sin
    corners[:, :, 1] = y[:, None] + ahead * sin + left * cos
    corners[:, :4, 2] = sizes[:, 2:3]
    corners[:, 4:, 2] = sizes[:, 3:4]
    return corners


def _plates(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    heading: NDArray[np.float64],
    ahead: NDArray[np.float64],
    side_from: NDArray[np.float64],
    side_to: NDArray[np.float64],
    bottom: NDArray[np.float64],
    top: NDArray[np.float64],
) -> NDArray[np.float64]:
    """[n, 4, 3] upright rectangles across the heading; seen from ahead, or from behind if `ahead` < 0."""
    cos, sin = np.cos(heading), np.sin(heading)
    flip = ahead < 0
    first, second = np.where(flip, side_to, side_from), np.where(flip, side_from, side_to)
    plates = np.empty((len(x), 4, 3))
    for corner, (side, height) in enumerate(((first, bottom), (second, bottom), (second, top), (first, top))):
        plates[:, corner, 0] = x + ahead * cos - side * sin
        plates[:, corner, 1] = y + ahead * sin + side * cos
        plates[:, corner, 2] = height
    return plates


class Renderer:
    """Draws states of one scene's world.

    Args:
        roads: the static world.
        actors: everybody that states may refer to.
        rig: the cameras.
        width: of every image, pixels.
        height: of every image, pixels.
        daylight: 1 noon … 0 dusk.
        haze: 0 clear … 1 thick.
    """

    def __init__(
        self,
        roads: RoadMap,
        actors: Sequence[Actor],
        rig: Rig,
        width: int,
        height: int,
        daylight: float = 1.0,
        haze: float = 0.0,
    ) -> None:
        self._rig, self._width, self._height = rig, width, height
        self._scale = _SUPERSAMPLING if width <= _SUPERSAMPLED_UP_TO else 1
        self._brightness, self._haze = 0.45 + 0.55 * daylight, haze
        self._roads, self._actors = roads, actors
        self._ground = _ground(roads)
        self._ground_centres, self._ground_reach = _extents(self._ground)
        self._buildings = np.zeros((len(roads.buildings), 8, 3))
        for number, (outline, tall) in enumerate(roads.buildings):
            self._buildings[number, :, :2] = np.concatenate([outline, outline])
            self._buildings[number, 4:, 2] = tall

    def render(self, state: WorldState, noise_seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Draw one state.

        Args:
            state: what to draw.
            noise_seed: of the sensor noise.

        Returns:
            [cameras, height, width, 3] RGB in the order of the rig, and labels
            [cameras, height * k, width * k]: small images are drawn k times larger and then scaled down.
        """
        ego = state.ego
        width, height = self._width * self._scale, self._height * self._scale
        cos, sin = math.cos(ego.heading), math.sin(ego.heading)
        to_ego = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
        here = np.array([ego.x, ego.y, 0.0])
        near = _within(self._ground_centres, here[:2], self._ground_reach + _GROUND_REACH_M)
        ground = _chosen(self._ground, near)
        ground_vertices = (ground.vertices - here) @ to_ego
        ground_fill = _fill(ground.colours * self._brightness, ground.labels)
        upright = self._upright(state)
        upright_vertices = (upright.vertices - here) @ to_ego
        places = (upright.places - here[:2]) @ to_ego[:2, :2]
        upright_fill = _fill(self._lit(upright, places), upright.labels)
        background = _background(width, height, self._brightness)
        cameras = tuple(self._rig.cameras.values())
        images = np.empty((len(cameras), self._height, self._width, 3), dtype=np.uint8)
        labels = np.empty((len(cameras), height, width), dtype=np.uint8)
        for number, camera in enumerate(cameras):
            canvas = background.copy()
            lens, turn = np.array(camera.translation), camera.ego_from_camera
            intrinsic = camera.intrinsic_at(width, height)
            _draw(canvas, (ground_vertices - lens) @ turn, ground.starts, ground_fill, intrinsic)
            away = places - lens[:2]
            nearness = -np.hypot(away[:, 0], away[:, 1])
            order = np.argsort(nearness[upright.things], kind="stable")
            _draw(canvas, (upright_vertices - lens) @ turn, upright.starts, upright_fill, intrinsic, order)
            cv2.extractChannel(canvas, 3, labels[number])
            cv2.cvtColor(_scaled_down(canvas, self._scale), cv2.COLOR_RGBA2RGB, images[number])
        _add_noise(images, noise_seed)
        return images, labels

    def _lit(self, faces: _Faces, places: NDArray[np.float64]) -> NDArray[np.float64]:
        """Colours as daylight and haze show them."""
        colours = faces.colours * np.where(faces.glows, 1.0, self._brightness)[:, None]
        if self._haze <= 0.0:
            return colours
        distance = np.hypot(places[:, 0], places[:, 1])[faces.things]
        fade = np.where(faces.glows, 0.0, 1.0 - np.exp(-distance * self._haze / _HAZE_DEPTH_M))[:, None]
        return colours * (1.0 - fade) + np.array(_HAZE) * self._brightness * fade

    def _upright(self, state: WorldState) -> _Faces:
        """What stands on the ground near the ego."""
        collector = _Collector()
        here = np.array([state.ego.x, state.ego.y])
        chosen = np.flatnonzero(_within(self._buildings[:, :4, :2].mean(axis=1), here, _UPRIGHT_REACH_M))
        if len(chosen):
            corners = self._buildings[chosen]
            colours = np.array(_WALLS, dtype=np.float64)[chosen % len(_WALLS)]
            collector.add_boxes(corners, colours, 0, collector.stand(corners[:, :4, :2].mean(axis=1)))
        self._add_actors(collector, state, here)
        self._add_lights(collector, state, here)
        self._add_signs(collector, here)
        return collector.faces()

    def _add_actors(self, collector: _Collector, state: WorldState, here: NDArray[np.float64]) -> None:
        rows = [
            (a.x, a.y, a.heading, math.hypot(a.x - here[0], a.y - here[1]), a.braking, index)
            for index, a in enumerate(state.actors)
        ]
        rows = [row for row in rows if row[3] < _UPRIGHT_REACH_M]
        kinds = [_body(self._actors[state.actors[row[5]].actor].category) for row in rows]
        for kind in ("car", "truck", "pedestrian"):
            members = [row for row, other in zip(rows, kinds, strict=True) if other == kind]
            if not members:
                continue
            who = [self._actors[state.actors[row[5]].actor] for row in members]
            table = np.array([row[:4] for row in members])
            sizes = np.array([(a.length_m, a.width_m, a.height_m) for a in who])
            colours = np.array([a.colour for a in who], dtype=np.float64)
            things = collector.stand(table[:, :2])
            distance = np.minimum(table[:, 3].astype(np.int64), FARTHEST_LABEL_M)
            if kind == "pedestrian":
                _add_pedestrians(collector, table, sizes, colours, PEDESTRIAN_LABEL + distance, things)
            else:
                braking = np.array([row[4] for row in members])
                labels = VEHICLE_LABEL + distance
                _add_vehicles(
                    collector, table, sizes, colours, braking, labels, things, has_cabin=kind == "car"
                )

    def _add_lights(self, collector: _Collector, state: WorldState, here: NDArray[np.float64]) -> None:
        pairs = list(zip(self._roads.lights, state.lights, strict=True))
        pairs = [
            (light, colour)
            for light, colour in pairs
            if math.hypot(light.position[0] - here[0], light.position[1] - here[1]) < _UPRIGHT_REACH_M
        ]
        if not pairs:
            return
        spots = np.array([light.position for light, _ in pairs])
        heading = np.array([light.heading for light, _ in pairs])
        things = collector.stand(spots[:, :2])
        n, zeros = len(pairs), np.zeros(len(pairs))
        x, y, z = spots.T
        # The mast stands at the kerb, to the right of the approaching traffic, which the lamps face.
        side = np.stack([-np.sin(heading), np.cos(heading)], axis=1) * _ARM_M
        pole = _boxes(
            x + side[:, 0], y + side[:, 1], heading, np.stack([zeros + 0.25, zeros + 0.25, zeros, z], 1)
        )
        arm = _boxes(
            x + side[:, 0] / 2,
            y + side[:, 1] / 2,
            heading,
            np.stack([zeros + 0.2, zeros + _ARM_M, z, z + 0.2], 1),
        )
        board = _boxes(x, y, heading, np.stack([zeros + 0.3, zeros + 1.7, z - 2.1, z + 2.1], 1))
        collector.add_boxes(np.concatenate([pole, arm]), _POLE, 0, np.tile(things, 2))
        collector.add_boxes(board, _BOARD, 0, things)
        octagon = 0.6 * _OCTAGON
        for row, name in enumerate(("red", "amber", "green")):
            lit = np.array([name in colour.split("_") for _, colour in pairs])
            lamp = np.empty((n, 8, 3))
            lamp[:, :, 0] = (
                x[:, None] + 0.2 * np.cos(heading)[:, None] - octagon[:, 0] * np.sin(heading)[:, None]
            )
            lamp[:, :, 1] = (
                y[:, None] + 0.2 * np.sin(heading)[:, None] + octagon[:, 0] * np.cos(heading)[:, None]
            )
            lamp[:, :, 2] = z[:, None] + 1.35 * (1 - row) + octagon[:, 1]
            shown = np.where(lit[:, None], np.array(_LAMPS[name]), np.array(_LAMP_OFF))
            collector.add(lamp, shown, np.where(lit, 3 + row, 0), lit, things)

    def _add_signs(self, collector: _Collector, here: NDArray[np.float64]) -> None:
        """A yield sign at the right end of each yield line."""
        for a, b in self._roads.yield_lines:
            if not _within(b[None], here, np.array([_UPRIGHT_REACH_M]))[0]:
                continue
            across = (b - a) / np.hypot(*(b - a))
            spot = b + 1.2 * across
            heading = np.array([math.atan2(-across[0], across[1])])
            things = collector.stand(spot[None])
            pole = _boxes(spot[:1], spot[1:], heading, np.array([[0.15, 0.15, 0.0, 2.0]]))
            collector.add_boxes(pole, _POLE, 0, things)
            for size, ahead, colour in ((1.15, 0.1, _SIGN_RIM), (0.7, 0.15, _WHITE)):
                front = spot + ahead * np.array([across[1], -across[0]])
                middle = 2.9
                triangle = np.array(
                    [
                        [*front, middle - size],
                        [*(front + size * across), middle + 0.6 * size],
                        [*(front - size * across), middle + 0.6 * size],
                    ]
                )
                collector.add(triangle[None], colour, 0, things=things)


def _body(category: str) -> str:
    if category.startswith("human."):
        return "pedestrian"
    return "car" if category == "vehicle.car" else "truck"


def _add_vehicles(
    collector: _Collector,
    table: NDArray[np.float64],
    sizes: NDArray[np.float64],
    colours: NDArray[np.float64],
    braking: NDArray[np.bool_],
    labels: NDArray[np.int64],
    things: NDArray[np.int64],
    has_cabin: bool,
) -> None:
    x, y, heading = table[:, 0], table[:, 1], table[:, 2]
    length, width, height = sizes.T
    zeros = np.zeros(len(x))
    belt = height * 0.58 if has_cabin else height
    body = _boxes(x, y, heading, np.stack([length, width, zeros + 0.25, belt], axis=1))
    collector.add_boxes(body, colours, labels, things)
    if has_cabin:
        cabin = _boxes(
            x, y, heading, np.stack([0.52 * length, 0.86 * width, belt, height], axis=1), -0.06 * length
        )
        faces = cabin[:, _BOX_FACES].reshape(-1, 4, 3)
        glass = np.tile(_GLASS, (len(x), 5, 1)).astype(np.float64)
        glass[:, 4] = colours
        collector.add(faces, glass.reshape(-1, 3), np.repeat(labels, 5), things=np.repeat(things, 5))
    else:
        half = width * 0.44
        pane = _plates(x, y, heading, length / 2 + 0.02, -half, half, height * 0.45, height * 0.8)
        collector.add(pane, _GLASS, labels, things=things)
    low, high = 0.42 + zeros, 0.42 + np.where(braking, 0.5, 0.22)
    rear, front = -length / 2 - 0.03, length / 2 + 0.03
    outer = width * 0.48
    # Unlit lamps sit at the corners; lit ones make one bright bar, so that they show from afar.
    inner = np.where(braking, 0.0, width * 0.28)
    tail = np.where(braking[:, None], np.array(_BRAKING), np.array(_TAIL))
    tail_labels = np.where(braking, 6, labels)
    for left, right in ((-outer, -inner), (inner, outer)):
        collector.add(
            _plates(x, y, heading, rear, left, right, low, high), tail, tail_labels, braking, things
        )
        lamps = _plates(
            x,
            y,
            heading,
            front,
            np.sign(left + right) * width * 0.38 - 0.18,
            np.sign(left + right) * width * 0.38 + 0.18,
            low,
            low + 0.25,
        )
        collector.add(lamps, _HEADLIGHT, labels, True, things)


def _add_pedestrians(
    collector: _Collector,
    table: NDArray[np.float64],
    sizes: NDArray[np.float64],
    colours: NDArray[np.float64],
    labels: NDArray[np.int64],
    things: NDArray[np.int64],
) -> None:
    x, y, heading = table[:, 0], table[:, 1], table[:, 2]
    length, width, height = sizes.T
    zeros = np.zeros(len(x))
    body = _boxes(x, y, heading, np.stack([length, width, zeros, height - 0.3], axis=1))
    head = _boxes(x, y, heading, np.stack([zeros + 0.32, zeros + 0.32, height - 0.3, height], axis=1))
    collector.add_boxes(body, colours, labels, things)
    collector.add_boxes(head, _SKIN, labels, things)


def _within(places: NDArray[np.float64], here: NDArray[np.float64], reach: ArrayLike) -> NDArray[np.bool_]:
    away = places - here
    return np.asarray(np.hypot(away[:, 0], away[:, 1]) < reach)


def _extents(faces: _Faces) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[F, 2] middle of each polygon on the ground, and [F] how far it reaches from there."""
    first = faces.starts[:-1]
    low = np.minimum.reduceat(faces.vertices[:, :2], first)
    high = np.maximum.reduceat(faces.vertices[:, :2], first)
    size = high - low
    return (low + high) / 2, np.hypot(size[:, 0], size[:, 1]) / 2


def _chosen(faces: _Faces, keep: NDArray[np.bool_]) -> _Faces:
    counts = np.diff(faces.starts)
    return _Faces(
        faces.vertices[np.repeat(keep, counts)],
        np.concatenate([[0], np.cumsum(counts[keep])]),
        faces.colours[keep],
        faces.glows[keep],
        faces.labels[keep],
        faces.things[keep],
        faces.places,
    )


def _fill(colours: NDArray[np.float64], labels: NDArray[np.int64]) -> list[list[int]]:
    """Per polygon what is drawn: red, green, blue and label."""
    filled = np.empty((len(labels), 4), dtype=np.int64)
    filled[:, :3] = np.clip(np.rint(colours), 0, 255)
    filled[:, 3] = labels
    values: list[list[int]] = filled.tolist()
    return values


def _draw(
    image: NDArray[np.uint8],
    seen: NDArray[np.float64],
    starts: NDArray[np.int64],
    fill: list[list[int]],
    intrinsic: NDArray[np.float64],
    order: NDArray[np.int64] | None = None,
) -> None:
    """Draw polygons into an image.

    Args:
        image: [height, width, 4].
        seen: [V, 3] vertices in the camera frame.
        starts: [F + 1] first vertex of each polygon.
        fill: per polygon, what to fill it with.
        intrinsic: [3, 3] for this size.
        order: [F] in which order, for upright things, whose far sides are left out; None for the ground.
    """
    count = len(starts) - 1
    if not count:
        return
    width = image.shape[1]
    depth = seen[:, 2]
    first, last = starts[:-1], starts[1:] - 1
    # Which polygons could be seen: some vertex ahead, and not all beyond one side of the field of view.
    ahead = depth > _NEAR_M
    right = intrinsic[0, 0] * seen[:, 0] + (intrinsic[0, 2] - width) * depth
    left = intrinsic[0, 0] * seen[:, 0] + intrinsic[0, 2] * depth
    some_ahead = np.logical_or.reduceat(ahead, first)
    visible = some_ahead & np.logical_or.reduceat(right < 0, first) & np.logical_or.reduceat(left > 0, first)
    if order is not None:
        a, b, c = seen[first], seen[first + 1], seen[first + 2]
        normal = np.cross(b - a, c - a)
        visible &= np.einsum("ij,ij->i", normal, a) < 0
        numbers = order[visible[order]]
    else:
        numbers = np.flatnonzero(visible)
    if not len(numbers):
        return
    # The vertices of the chosen polygons, in drawing order, each with its successor around its polygon.
    counts = (last - first + 1)[numbers]
    ends = np.cumsum(counts)
    begins = ends - counts
    vertices = np.arange(ends[-1]) + np.repeat(first[numbers] - begins, counts)
    successor = np.arange(1, ends[-1] + 1)
    successor[ends - 1] = begins
    points, inside = seen[vertices], ahead[vertices]
    following, following_inside = points[successor], inside[successor]
    crosses = inside != following_inside
    # Two slots per vertex: itself, if in front of the near plane, and where its edge passes through it.
    slots = np.empty((len(points), 2, 3))
    slots[:, 0] = points
    if crosses.any():
        share = (_NEAR_M - points[:, 2]) / np.where(crosses, following[:, 2] - points[:, 2], 1.0)
        slots[:, 1] = points + share[:, None] * (following - points)
        used = np.stack([inside, crosses], axis=1)
        kept = slots[used]
        totals = np.add.reduceat(used.sum(axis=1), begins)
    else:
        kept, totals = points, counts
    scale = float(1 << _SHIFT)
    pixels = kept[:, :2] / kept[:, 2:] * (intrinsic[0, 0] * scale, intrinsic[1, 1] * scale)
    # Pixel centres lie at whole numbers in OpenCV and at halves in the calibration.
    pixels += ((intrinsic[0, 2] - 0.5) * scale, (intrinsic[1, 2] - 0.5) * scale)
    corners = np.clip(np.rint(pixels), -_PIXEL_LIMIT, _PIXEL_LIMIT).astype(np.int32)
    stops = np.cumsum(totals).tolist()
    begin = 0
    for number, stop in zip(numbers.tolist(), stops, strict=True):
        polygon = corners[begin:stop]
        if stop - begin <= 4 or order is not None:
            cv2.fillConvexPoly(image, polygon, fill[number], cv2.LINE_8, _SHIFT)
        else:
            cv2.fillPoly(image, [polygon], fill[number], cv2.LINE_8, _SHIFT)
        begin = stop


@lru_cache(maxsize=8)
def _background(width: int, height: int, brightness: float) -> NDArray[np.uint8]:
    """[height, width, 4] sky above the horizon, grass below; the cameras look level."""
    rows = np.linspace(0.0, 1.0, height // 2)[:, None]
    image = np.zeros((height, 1, 4))
    image[: height // 2, 0, :3] = np.array(_SKY_TOP) * (1 - rows) + np.array(_SKY_LOW) * rows
    image[height // 2 :, 0, :3] = _GRASS
    image *= brightness
    return np.repeat(np.rint(image).astype(np.uint8), width, axis=1)


def _scaled_down(image: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """The mean of each square of pixels; `factor` is odd."""
    if factor == 1:
        return image
    means = cv2.blur(image, (factor, factor))
    return np.ascontiguousarray(means[factor // 2 :: factor, factor // 2 :: factor])


@lru_cache(maxsize=4)
def _noise(width: int, height: int) -> NDArray[np.int16]:
    """[height + 255, width + 255, 3] sensor noise, grey, to cut pieces from."""
    grain = np.rint(np.random.default_rng(0).normal(0.0, 1.2, (256, 256, 1))).astype(np.int16)
    tiled = np.tile(grain, (height // 256 + 2, width // 256 + 2, 3))
    return np.ascontiguousarray(tiled[: height + 255, : width + 255])


def _add_noise(images: NDArray[np.uint8], seed: int) -> None:
    count, height, width, _ = images.shape
    noise = _noise(width, height)
    corners = np.random.default_rng(seed).integers(256, size=(count, 2)).tolist()
    for image, (row, column) in zip(images, corners, strict=True):
        cv2.add(image, noise[row : row + height, column : column + width], image, None, cv2.CV_8U)


def noise_seed(scene_seed: int, state_index: int) -> int:
    """Of the sensor noise in the images of one state."""
    return scene_seed * 1009 + state_index


def render_cameras(scene: Scene, state_index: int, rig: Rig, width: int, height: int) -> dict[str, Image]:
    """What the cameras see at one state of a scene.

    Args:
        scene: the drive.
        state_index: which of its states.
        rig: the cameras.
        width: of the images; each axis is scaled by itself, so 96 x 96 shows the whole squeezed image.
        height: of the images.

    Returns:
        [height, width, 3] RGB by camera name.
    """
    images, _ = render_with_labels(scene, state_index, rig, width, height)
    return images


def render_with_labels(
    scene: Scene, state_index: int, rig: Rig, width: int, height: int
) -> tuple[dict[str, Image], dict[str, NDArray[np.uint8]]]:
    """The images, and for each what its pixels show: [height * k, width * k] values as LABELS explains."""
    renderer = Renderer(scene.map, scene.actors, rig, width, height, scene.daylight, scene.haze)
    images, labels = renderer.render(
        scene.states[state_index], noise_seed=noise_seed(scene.seed, state_index)
    )
    return dict(zip(rig.cameras, images, strict=True)), dict(zip(rig.cameras, labels, strict=True))
