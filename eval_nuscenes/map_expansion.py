"""Roads as the nuScenes map expansion writes them: NuScenesMap's layers, arcs for lanes, the map mask."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np

from eval_nuscenes.world.scene import Lane, Points, RoadMap
from vla_autoprune.errors import InputError

LOCATIONS = ("singapore-onenorth", "singapore-hollandvillage", "singapore-queenstown", "boston-seaport")
"""The only names NuScenesMap opens."""

LIST_LAYERS = (
    "polygon", "line", "node", "drivable_area", "road_segment", "road_block", "lane", "ped_crossing",
    "walkway", "stop_line", "carpark_area", "road_divider", "lane_divider", "traffic_light", "lane_connector",
)  # fmt: skip
DICT_LAYERS = ("arcline_path_3", "connectivity")

Record = dict[str, Any]
NewToken = Callable[..., str]
"""Makes a record's token from what names it, such as ("lane", "north_0"); equal names give equal tokens."""

_MASK_PIXELS_PER_M = 10  # the devkit takes this for granted
_MASK_STRIP_ROWS = 512
_CURVE_TOLERANCE_M = 0.02
_SAME_NODE_M = 0.05
_STOP_LINE_DEPTH_M = 1.0
_STRAIGHT_RADIUS_M = 999.999
_STRAIGHT_WITHIN_M = 0.001


@dataclass(frozen=True)
class MapLayers:
    """The layers of one location's map; the roads of several scenes are added one after another.

    Attributes:
        lists: layers that are lists of records, by name.
        dicts: layers keyed by lane token.
        paved: outlines of drivable area and walkways, counter-clockwise, each before its holes, clockwise.
    """

    lists: dict[str, list[Record]] = field(default_factory=lambda: {name: [] for name in LIST_LAYERS})
    dicts: dict[str, dict[str, Any]] = field(default_factory=lambda: {name: {} for name in DICT_LAYERS})
    paved: list[Points] = field(default_factory=list)

    def extend(self, other: MapLayers) -> None:
        """Add another map's records."""
        for name, records in other.lists.items():
            self.lists[name].extend(records)
        for name, mapping in other.dicts.items():
            self.dicts[name].update(mapping)
        self.paved.extend(other.paved)

    def expansion(self, width_m: float, height_m: float) -> Record:
        """The content of maps/expansion/<location>.json, for a canvas of this size."""
        return {"version": "1.3", "canvas_edge": [width_m, height_m], **self.lists, **self.dicts}

    def write_mask(self, path: Path, width_m: int, height_m: int) -> None:
        """Write the map mask: 10 pixels a metre, 255 on roads and walkways, row 0 at the north edge.

        It is drawn and packed in strips: the mask of a large data set would not fit in memory.
        """
        rows, columns = height_m * _MASK_PIXELS_PER_M, width_m * _MASK_PIXELS_PER_M
        to_pixels = np.array([_MASK_PIXELS_PER_M, -_MASK_PIXELS_PER_M])
        shapes = [
            (np.round(outline * to_pixels + (0, rows)).astype(np.int32), _signed_area(outline) > 0)
            for outline in self.paved
        ]
        with path.open("wb") as file:
            file.write(b"\x89PNG\r\n\x1a\n")
            _write_png_chunk(file, b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 0, 0, 0, 0))
            packer = zlib.compressobj(level=6)
            for top in range(0, rows, _MASK_STRIP_ROWS):
                strip = np.zeros((min(_MASK_STRIP_ROWS, rows - top), columns), dtype=np.uint8)
                for pixels, solid in shapes:
                    if pixels[:, 1].min() < top + len(strip) and pixels[:, 1].max() >= top:
                        cv2.fillPoly(
                            strip, [pixels - np.array([0, top], dtype=np.int32)], [255 if solid else 0]
                        )
                unfiltered = np.pad(
                    strip, ((0, 0), (1, 0))
                )  # every row of a PNG begins with its filter's number
                _write_png_chunk(file, b"IDAT", packer.compress(unfiltered.tobytes()))
            _write_png_chunk(file, b"IDAT", packer.flush())
            _write_png_chunk(file, b"IEND", b"")


def map_layers(roads: RoadMap, new_token: NewToken) -> MapLayers:
    """Write one scene's roads as map layers.

    The carpark_area layer stays empty: the world parks its cars at the kerb.

    Args:
        roads: the static world, in the coordinates of the location's map.
        new_token: gives tokens that no other scene of the location has.

    Returns:
        Every layer that NuScenesMap reads.

    Raises:
        InputError: shapely is not installed.
    """
    try:
        from shapely.geometry import Point, Polygon
    except ImportError as error:
        raise InputError("writing maps needs shapely: pip install 'vla_autoprune[eval]'") from error

    borders = {lane.name: _borders(lane) for lane in roads.lanes}
    lane_shapes = {name: np.concatenate([right, left[::-1]]) for name, (left, right) in borders.items()}
    lane_corners = [border[end] for pair in borders.values() for border in pair for end in (0, -1)]
    draw = _Drawing(new_token, np.array(lane_corners).reshape(-1, 2))
    segment_shapes = [*roads.road_segments, *roads.intersections]

    areas = _drivable_area([*segment_shapes, *lane_shapes.values()])
    drivable_area = draw.add(("drivable_area",), polygon_tokens=[draw.polygon(*area) for area in areas])
    for outline, holes in areas:
        draw.layers.paved.append(_counter_clockwise(outline))
        draw.layers.paved.extend(_counter_clockwise(hole)[::-1] for hole in holes)

    segments = [
        draw.add(
            ("road_segment", index),
            polygon_token=draw.polygon(shape),
            is_intersection=index >= len(roads.road_segments),
            drivable_area_token=drivable_area,
        )
        for index, shape in enumerate(segment_shapes)
    ]
    outlines = [Polygon(shape) for shape in segment_shapes]

    def segment_at(points: Points) -> str:
        middle = Point(*points.mean(axis=0))
        distances = [outline.distance(middle) for outline in outlines]
        return segments[int(np.argmin(distances))] if segments else ""

    blocks: dict[str, str] = {}
    for lanes in _side_by_side([lane for lane in roads.lanes if not lane.is_connector]):
        left, right = borders[lanes[0].name][0], borders[lanes[-1].name][1]
        block = draw.add(
            ("road_block", lanes[0].name),
            polygon_token=draw.polygon(np.concatenate([right, left[::-1]])),
            from_edge_line_token=draw.line([right[0], left[0]]),
            to_edge_line_token=draw.line([left[-1], right[-1]]),
            road_segment_token=segment_at(lanes[len(lanes) // 2].centreline),
        )
        blocks |= {lane.name: block for lane in lanes}

    for lane in roads.lanes:
        left, right = borders[lane.name]
        polygon = draw.polygon(lane_shapes[lane.name])
        if lane.is_connector:
            draw.add(("lane_connector", lane.name), polygon_token=polygon)
            continue
        draw.add(
            ("lane", lane.name),
            polygon_token=polygon,
            lane_type="CAR",
            from_edge_line_token=draw.line([right[0], left[0]]),
            to_edge_line_token=draw.line([left[-1], right[-1]]),
            left_lane_divider_segments=draw.divider(left, dashed=lane.left_neighbour is not None),
            right_lane_divider_segments=draw.divider(right, dashed=lane.right_neighbour is not None),
        )
    _connect(draw.layers, roads.lanes, new_token)

    for index, shape in enumerate(roads.crossings):
        polygon = draw.polygon(shape)
        draw.add(("ped_crossing", index), polygon_token=polygon, road_segment_token=segment_at(shape))
    for index, shape in enumerate(roads.walkways):
        draw.add(("walkway", index), polygon_token=draw.polygon(shape))
        draw.layers.paved.append(_counter_clockwise(shape))
    for index, points in enumerate(roads.road_dividers):
        line = draw.line(points)
        draw.add(("road_divider", index), line_token=line, road_segment_token=segment_at(points))
    for index, points in enumerate(roads.lane_dividers):
        line, marking = draw.line(points), draw.divider(points, dashed=True)
        draw.add(("lane_divider", index), line_token=line, lane_divider_segments=marking)
    for light in roads.lights:
        block = next((blocks[name] for name in light.lanes if name in blocks), "")
        x, y, z = light.position
        head = draw.add(
            ("traffic_light", light.name),
            line_token=draw.line([(x, y), (x + np.cos(light.heading), y + np.sin(light.heading))]),
            traffic_light_type="VERTICAL",
            from_road_block_token=block,
            items=[
                {
                    "color": colour,
                    "shape": "CIRCLE",
                    "rel_pos": {"tx": 0.0, "ty": 0.0, "tz": height, "rx": 0.0, "ry": 0.0, "rz": 0.0},
                    "to_road_block_tokens": [],
                }
                for colour, height in (("RED", 0.3), ("YELLOW", 0.0), ("GREEN", -0.3))
            ],
            pose={"tx": x, "ty": y, "tz": z, "rx": 0.0, "ry": 0.0, "rz": light.heading},
        )
        draw.stop_line(light.name, light.stop_line, "TRAFFIC_LIGHT", [head], block)
    for index, ends in enumerate(roads.yield_lines):
        draw.stop_line(index, ends, "YIELD", [], "")
    return draw.layers


def arcline_path(centreline: Points) -> list[Record]:
    """A lane's centreline as arcs and straights, each with the tangent the last one ended with.

    Args:
        centreline: [N, 2] points in driving direction, N >= 2.

    Returns:
        Records of the arcline_path_3 layer, one per arc; every given point lies within 2 cm of them.
    """
    tangents = _tangents(centreline)
    arcs: list[Record] = []
    pending = [(0, len(centreline) - 1)]
    while pending:
        first, last = pending.pop()
        pieces = _biarc(centreline[first], tangents[first], centreline[last], tangents[last])
        inner = slice(first + 1, last)
        # An arc that turns far could pass for the rest of its own circle.
        turns_far = (tangents[inner] @ tangents[first] < 0).any()
        if last - first > 1 and (turns_far or _deviation(centreline[inner], pieces) > _CURVE_TOLERANCE_M):
            middle = (first + last) // 2
            pending += [(middle, last), (first, middle)]
        else:
            arcs.extend(_arc_record(*piece) for piece in pieces)
    return arcs


@dataclass
class _Drawing:
    """Adds records to layers, with their nodes, lines and polygons.

    Nodes are rounded to a millimetre, nodes closer than 5 cm are one node, and a polygon gets a node wherever
    the corner of a lane touches it: the devkit's get_next_roads wants lanes and junctions to share nodes.
    """

    new_token: NewToken
    lane_corners: Points
    layers: MapLayers = field(default_factory=MapLayers)
    _cells: dict[tuple[int, int], list[Record]] = field(default_factory=dict)

    def add(self, names: tuple[Any, ...], **fields: Any) -> str:
        token = self.new_token(*names)
        self.layers.lists[names[0]].append({"token": token, **fields})
        return token

    def node(self, point: Sequence[float] | Points) -> str:
        x, y = round(float(point[0]), 3), round(float(point[1]), 3)
        column, row = int(x // _SAME_NODE_M), int(y // _SAME_NODE_M)
        for cell in [(column + i, row + j) for i in (0, -1, 1) for j in (0, -1, 1)]:
            for other in self._cells.get(cell, ()):
                if np.hypot(other["x"] - x, other["y"] - y) <= _SAME_NODE_M:
                    return str(other["token"])
        token = self.new_token("node", x, y)
        record = {"token": token, "x": x, "y": y}
        self._cells.setdefault((column, row), []).append(record)
        self.layers.lists["node"].append(record)
        return token

    def polyline(self, points: Sequence[Sequence[float]] | Points) -> list[str]:
        simple = _simplified(np.asarray(points, dtype=np.float64), closed=False)
        return list(dict.fromkeys(self.node(point) for point in simple))

    def ring(self, outline: Points) -> list[str]:
        simple = _with_corners(_simplified(outline, closed=True), self.lane_corners)
        return list(dict.fromkeys(self.node(point) for point in simple))

    def polygon(self, outline: Points, holes: Sequence[Points] = ()) -> str:
        exterior, inner = self.ring(outline), [{"node_tokens": self.ring(hole)} for hole in holes]
        count = len(self.layers.lists["polygon"])
        return self.add(("polygon", count), exterior_node_tokens=exterior, holes=inner)

    def line(self, points: Sequence[Sequence[float]] | Points) -> str:
        return self.add(("line", len(self.layers.lists["line"])), node_tokens=self.polyline(points))

    def stop_line(self, name: object, ends: Points, kind: str, lights: list[str], block: str) -> None:
        along = ends[1] - ends[0]
        across = np.array([-along[1], along[0]]) * (_STOP_LINE_DEPTH_M / 2 / np.linalg.norm(along))
        self.add(
            ("stop_line", name),
            polygon_token=self.polygon(np.concatenate([ends - across, ends[::-1] + across])),
            stop_line_type=kind,
            ped_crossing_tokens=[],
            traffic_light_tokens=lights,
            road_block_token=block,
        )

    def divider(self, border: Points, dashed: bool) -> list[Record]:
        marking = "DOUBLE_DASHED_WHITE" if dashed else "NIL"
        return [{"node_token": token, "segment_type": marking} for token in self.polyline(border)]


def _connect(layers: MapLayers, lanes: Sequence[Lane], new_token: NewToken) -> None:
    kinds = {lane.name: "lane_connector" if lane.is_connector else "lane" for lane in lanes}
    tokens = {name: new_token(kind, name) for name, kind in kinds.items()}
    incoming: dict[str, list[str]] = {name: [] for name in tokens}
    outgoing: dict[str, list[str]] = {name: [] for name in tokens}
    for lane in lanes:
        for successor in lane.successors:
            if successor in tokens:
                incoming[successor].append(tokens[lane.name])
                outgoing[lane.name].append(tokens[successor])
    for lane in lanes:
        token = tokens[lane.name]
        layers.dicts["arcline_path_3"][token] = arcline_path(lane.centreline)
        ends = {"incoming": incoming[lane.name], "outgoing": outgoing[lane.name]}
        layers.dicts["connectivity"][token] = ends


def _side_by_side(lanes: Sequence[Lane]) -> list[list[Lane]]:
    """Lanes of one direction next to each other, from left to right."""
    by_name = {lane.name: lane for lane in lanes}
    rows = []
    for lane in lanes:
        if lane.left_neighbour in by_name:
            continue
        row = [lane]
        while (neighbour := row[-1].right_neighbour) in by_name and by_name[str(neighbour)] not in row:
            row.append(by_name[str(neighbour)])
        rows.append(row)
    return rows


def _drivable_area(shapes: Sequence[Points]) -> list[tuple[Points, list[Points]]]:
    """The union of shapes: outlines, each with its holes."""
    from shapely.geometry import Polygon
    from shapely.ops import unary_union

    # A hair of growth closes the slits that rounding leaves between neighbours.
    grown = unary_union([Polygon(shape).buffer(0.01, join_style="mitre") for shape in shapes])
    areas = [area for area in getattr(grown, "geoms", [grown]) if not area.is_empty]
    rings = [[np.asarray(ring.coords)[:-1] for ring in (area.exterior, *area.interiors)] for area in areas]
    return [(outline, holes) for outline, *holes in rings]


def _borders(lane: Lane) -> tuple[Points, Points]:
    """The left and the right border of a lane, in driving direction."""
    tangents = _tangents(lane.centreline)
    to_left = np.stack([-tangents[:, 1], tangents[:, 0]], axis=1) * (lane.width_m / 2)
    return lane.centreline + to_left, lane.centreline - to_left


def _tangents(points: Points) -> Points:
    """Unit tangents [N, 2] of a smooth polyline."""
    along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    slopes = np.gradient(points, along, axis=0, edge_order=2 if len(points) > 2 else 1)
    return slopes / np.linalg.norm(slopes, axis=1, keepdims=True)


def _simplified(points: Points, closed: bool) -> Points:
    """The fewest of these points that keep within the tolerance."""
    if len(points) < 3:
        return points
    anchor = points[0]  # OpenCV computes in single precision: keep the numbers small
    kept = cv2.approxPolyDP((points - anchor).astype(np.float32)[:, None], _CURVE_TOLERANCE_M, closed)
    return kept[:, 0].astype(np.float64) + anchor


def _with_corners(outline: Points, corners: Points) -> Points:
    """The outline with those of the corners inserted that lie on it."""
    result = []
    for start, end in zip(outline, np.roll(outline, -1, axis=0), strict=True):
        result.append(start)
        side = end - start
        length = float(np.linalg.norm(side))
        if length < 2 * _SAME_NODE_M:
            continue
        along = (corners - start) @ side / length
        beside = np.abs((corners - start) @ np.array([-side[1], side[0]])) / length
        on_side = (along > _SAME_NODE_M) & (along < length - _SAME_NODE_M) & (beside < _SAME_NODE_M)
        result.extend(corners[on_side][np.argsort(along[on_side], kind="stable")])
    return np.array(result)


def _write_png_chunk(file: IO[bytes], kind: bytes, content: bytes) -> None:
    if content or kind != b"IDAT":
        file.write(struct.pack(">I", len(content)) + kind + content)
        file.write(struct.pack(">I", zlib.crc32(kind + content)))


def _signed_area(outline: Points) -> float:
    x, y = outline.T
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)) / 2


def _counter_clockwise(outline: Points) -> Points:
    return outline if _signed_area(outline) > 0 else outline[::-1]


_Arc = tuple[Points, Points, float, float]
"""Start point, unit tangent there, curvature (left positive), length."""


def _arc_to(start: Points, tangent: Points, end: Points) -> _Arc:
    chord = end - start
    forward, left = float(chord @ tangent), float(tangent[0] * chord[1] - tangent[1] * chord[0])
    reach = float(np.hypot(forward, left))
    half_turn = float(np.arctan2(left, forward))
    curvature = 2 * left / max(reach, 1e-9) ** 2
    length = reach if abs(half_turn) < 1e-6 else reach * half_turn / float(np.sin(half_turn))
    return start, tangent, curvature, length


def _biarc(start: Points, start_tangent: Points, end: Points, end_tangent: Points) -> list[_Arc]:
    """The two arcs that join two points with given tangents smoothly, or one where one does."""
    chord, bend = end - start, float(1 - start_tangent @ end_tangent)
    forward = float(chord @ (start_tangent + end_tangent))
    handle = float(chord @ chord) / max(forward + np.sqrt(forward**2 + 2 * bend * float(chord @ chord)), 1e-9)
    joint = (start + end + handle * (start_tangent - end_tangent)) / 2
    first = _arc_to(start, start_tangent, joint)
    turn = first[2] * first[3]
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ start_tangent
    second = _arc_to(joint, turned, end)
    if abs(first[2] - second[2]) * (first[3] + second[3]) ** 2 / 8 < _STRAIGHT_WITHIN_M:
        return [_arc_to(start, start_tangent, end)]
    return [first, second]


def _deviation(points: Points, arcs: Sequence[_Arc]) -> float:
    """How far the farthest of these points is from the arc it belongs to."""
    offsets = []
    for start, tangent, curvature, _ in arcs:
        relative = points - start
        forward, left = relative @ tangent, relative @ np.array([-tangent[1], tangent[0]])
        offsets.append(np.abs(left - curvature * (forward**2 + left**2) / 2))
        if len(arcs) == 2 and start is arcs[1][0]:
            return float(np.where(forward < 0, offsets[0], offsets[1]).max())
    return float(offsets[0].max())


def _arc_record(start: Points, tangent: Points, curvature: float, length: float) -> Record:
    heading, turn = float(np.arctan2(tangent[1], tangent[0])), curvature * length
    reach = length if abs(turn) < 1e-9 else 2 * np.sin(turn / 2) / curvature
    end = start + reach * np.array([np.cos(heading + turn / 2), np.sin(heading + turn / 2)])
    straight = abs(turn) * length / 8 < _STRAIGHT_WITHIN_M
    if straight:
        heading, turn, length = heading + turn / 2, 0.0, float(reach)
    # The whole length lies in one of the three segments: the devkit steps past the other, empty ones.
    lengths = [0.0, length, 0.0] if straight else [length, 0.0, 0.0]
    end_heading = float(np.arctan2(np.sin(heading + turn), np.cos(heading + turn)))
    return {
        "start_pose": [float(start[0]), float(start[1]), heading],
        "end_pose": [float(end[0]), float(end[1]), end_heading],
        "shape": "RSR" if curvature < 0 else "LSL",
        "radius": _STRAIGHT_RADIUS_M if straight else float(1 / abs(curvature)),
        "segment_length": lengths,
    }
