"""The nuScenes map expansion around a pose: drivable area, lanes, road edges, in map and ego frame.

Poses are (x, y, heading) of the rear axle in the map; the ego frame is x forward, y left there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from vla_autoprune.errors import InputError

if TYPE_CHECKING:
    import shapely

Points = NDArray[np.float64]
Pose = tuple[float, float, float]
Record = dict[str, Any]

Layer = Literal[
    "drivable_area",
    "road_segment",
    "road_block",
    "lane",
    "lane_connector",
    "ped_crossing",
    "walkway",
    "stop_line",
    "carpark_area",
]
"""Layers of polygons."""

EDGES_AHEAD_M, EDGES_ASIDE_M = 51.2, 25.0
EDGE_POINTS = 20
_EDGE_MARGIN_M = 0.2
_OLDEST_VERSION = (1, 3)
_HOW_TO_GET = (
    "get the map expansion pack v1.3 from https://www.nuscenes.org/nuscenes#download and unpack it into maps/"
)


@dataclass(frozen=True)
class Shape:
    """One polygon of a layer.

    Attributes:
        token: of the layer's record, such as a lane's token.
        polygon: its outline with holes, in the map.
    """

    token: str
    polygon: shapely.Polygon


@dataclass(frozen=True)
class _Layer:
    shapes: tuple[Shape, ...]
    tree: shapely.STRtree


class RoadMap:
    """The map of one location, as NuScenesMap reads it; layers are built when first asked for.

    Attributes:
        path: maps/expansion/<location>.json.
    """

    def __init__(self, root: Path, location: str) -> None:
        """Read a location's map.

        Args:
            root: the data set's folder, which holds `maps/`.
            location: as in the log table, such as boston-seaport.

        Raises:
            InputError: shapely is not installed, the file is missing, damaged, or of a version before 1.3.
        """
        try:
            import shapely  # noqa: F401 - only to see that it is there
        except ImportError as error:
            raise InputError("reading maps needs shapely: pip install 'vla_autoprune[eval]'") from error
        self.path = map_path(root, location)
        require_map(root, location)
        try:
            self._content: Record = json.loads(self.path.read_text())
            version = str(self._content.get("version", "1.0"))
            if tuple(int(part) for part in version.split(".")) < _OLDEST_VERSION:
                raise InputError(f"{self.path} is of version {version}; {_HOW_TO_GET}")
            nodes = {node["token"]: number for number, node in enumerate(self._content["node"])}
            self._nodes = np.array([(node["x"], node["y"]) for node in self._content["node"]]).reshape(-1, 2)
            self._rings = {
                polygon["token"]: [
                    [nodes[token] for token in tokens]
                    for tokens in (
                        polygon["exterior_node_tokens"],
                        *(hole["node_tokens"] for hole in polygon["holes"] if hole["node_tokens"]),
                    )
                ]
                for polygon in self._content["polygon"]
            }
            self._records = {layer: self._content[layer] for layer in get_args(Layer)}
            self._arcs = self._content["arcline_path_3"]
            self._connectivity = self._content["connectivity"]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.path} is no map expansion ({type(error).__name__}: {error}); {_HOW_TO_GET}"
            ) from error
        self._layers: dict[str, _Layer] = {}

    def shapes(self, layer: Layer, pose: Pose | None = None, reach_m: float = 60.0) -> tuple[Shape, ...]:
        """Polygons of a layer, in the map frame.

        Args:
            layer: which.
            pose: only those that reach into a square around it, aligned with its heading; all if None.
            reach_m: half the square's side.

        Returns:
            Whole polygons, not cut off at the square.
        """
        built = self._layer(layer)
        if pose is None:
            return built.shapes
        found = built.tree.query(_patch(pose, reach_m, reach_m), predicate="intersects")
        return tuple(built.shapes[index] for index in sorted(found))

    def intersections(self, pose: Pose, reach_m: float = 60.0) -> tuple[Shape, ...]:
        """Road segments that the map calls intersections, chosen like `shapes`."""
        marked = {record["token"] for record in self._records["road_segment"] if record["is_intersection"]}
        return tuple(shape for shape in self.shapes("road_segment", pose, reach_m) if shape.token in marked)

    def centreline(self, lane_token: str, step_m: float = 0.5) -> Points:
        """[N, 3] x, y, heading along a lane or lane connector, in the map frame.

        Raises:
            InputError: the map has no such lane.
        """
        from nuscenes.map_expansion.arcline_path_utils import discretize_lane

        if lane_token not in self._arcs:
            raise InputError(f"{self.path} has no lane {lane_token}")
        return np.array(discretize_lane(self._arcs[lane_token], resolution_meters=step_m)).reshape(-1, 3)

    def successors(self, lane_token: str) -> tuple[str, ...]:
        """Lanes and lane connectors that a lane leads into; none where the map says nothing."""
        return tuple(self._connectivity.get(lane_token, {}).get("outgoing", ()))

    def road_edges(self, pose: Pose) -> tuple[Points, ...]:
        """The edges of the road around a pose, as MapTR-style data pipelines cut them out.

        The outlines, holes included, of all road segments and lanes together, within 51.2 m ahead and behind
        and 25 m to the sides (less 0.2 m), each piece resampled to 20 points evenly spaced along it.

        Returns:
            [20, 2] polylines in the ego frame.

        Source: BEV-Planner's data set, class `boundary`.
        """
        import shapely

        patch = _patch(pose, EDGES_AHEAD_M, EDGES_ASIDE_M)
        unions = []
        for layer in ("road_segment", "lane"):
            built = self._layer(layer)
            near = [built.shapes[index].polygon for index in built.tree.query(patch, predicate="intersects")]
            inside = [polygon.intersection(patch) for polygon in near if polygon.is_valid]
            unions.append(shapely.union_all([in_ego(polygon, pose) for polygon in inside]))
        road = shapely.union_all(unions)
        rim = shapely.box(
            _EDGE_MARGIN_M - EDGES_AHEAD_M,
            _EDGE_MARGIN_M - EDGES_ASIDE_M,
            EDGES_AHEAD_M - _EDGE_MARGIN_M,
            EDGES_ASIDE_M - _EDGE_MARGIN_M,
        )
        edges: list[shapely.LineString] = []
        for polygon in _parts(road, "Polygon"):
            for ring in (polygon.exterior, *polygon.interiors):
                outer = ring is polygon.exterior
                # As the original: outlines clockwise, holes counter-clockwise.
                directed = ring.reverse() if ring.is_ccw == outer else ring
                cut = directed.intersection(rim)
                if cut.geom_type == "MultiLineString":
                    cut = shapely.line_merge(cut)
                edges.extend(_parts(cut, "LineString"))
        along = np.linspace(0, 1, EDGE_POINTS)
        return tuple(
            shapely.get_coordinates(shapely.line_interpolate_point(edge, along, normalized=True))
            for edge in edges
        )

    def _layer(self, name: Layer) -> _Layer:
        import shapely

        if name not in self._layers:
            shapes = [shape for record in self._records[name] for shape in self._shapes_of(record, name)]
            tree = shapely.STRtree([shape.polygon for shape in shapes])
            self._layers[name] = _Layer(tuple(shapes), tree)
        return self._layers[name]

    def _shapes_of(self, record: Record, layer: Layer) -> list[Shape]:
        import shapely

        shapes = []
        try:
            tokens = record["polygon_tokens"] if layer == "drivable_area" else [record["polygon_token"]]
            for token in tokens:
                exterior, *holes = (self._nodes[ring] for ring in self._rings[token])
                if len(exterior):
                    shapes.append(Shape(record["token"], shapely.Polygon(exterior, holes)))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.path}: {layer} {record.get('token')} is no polygon "
                f"({type(error).__name__}: {error}); {_HOW_TO_GET}"
            ) from error
        return shapes


def map_path(root: Path, location: str) -> Path:
    """Where a location's map lies in a data set."""
    return Path(root) / "maps" / "expansion" / f"{location}.json"


def require_map(root: Path, location: str) -> None:
    """See that a location's map is there, without reading it.

    Raises:
        InputError: the file is missing; the message names it and how to get it.
    """
    path = map_path(root, location)
    if not path.is_file():
        raise InputError(f"no map of {location}: {path} is missing; {_HOW_TO_GET}")


def in_ego(geometry: shapely.Geometry, pose: Pose) -> shapely.Geometry:
    """A geometry of the map in the ego frame of a pose."""
    import shapely

    return shapely.transform(geometry, lambda points: points_in_ego(points, pose))


def points_in_ego(points: Points, pose: Pose) -> Points:
    """[N, 2] points of the map in the ego frame of a pose."""
    x, y, heading = pose
    forward_and_left = np.array([[np.cos(heading), -np.sin(heading)], [np.sin(heading), np.cos(heading)]])
    return (points - (x, y)) @ forward_and_left


def _patch(pose: Pose, ahead_m: float, aside_m: float) -> shapely.Polygon:
    """A rectangle around a pose, in the map."""
    import shapely

    x, y, heading = pose
    along, across = (
        ahead_m * np.array([np.cos(heading), np.sin(heading)]),
        aside_m * np.array([-np.sin(heading), np.cos(heading)]),
    )
    corners = [along + across, along - across, -along - across, -along + across]
    return shapely.Polygon(np.array(corners) + np.array([x, y]))


def _parts(geometry: shapely.Geometry, kind: str) -> Iterable[Any]:
    import shapely

    return [part for part in shapely.get_parts(geometry) if part.geom_type == kind and not part.is_empty]
