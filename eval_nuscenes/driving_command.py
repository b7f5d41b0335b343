"""The driving command of a sample: recorded, or read off the route ahead; or off the future, a label leak.

A scene's commands come from `can_bus/scene-NNNN_command.json` where it is there, else from the CAN bus
expansion's `scene-NNNN_route.json`, the route that was planned. Neither knows what the car did.
"""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval_nuscenes.road_map import Pose, points_in_ego
from vla_autoprune.errors import InputError
from vla_autoprune.files import read_json
from vla_autoprune.frame import Command

TURN_M = 2.0
"""A path that ends this far to a side is called a turn, as the field does."""
AHEAD_S, AHEAD_AT_LEAST_M = 3.0, 20.0
"""How far along the route a turn is looked for."""
OFF_ROUTE_M = 5.0
"""Farther from its route than this, a car is not on it; the devkit draws the same line."""

_WAY_OUT = "take commands from the future (--command-source future), which leaks the label"
_KEYFRAME_ROUNDING_S = 1e-3


def command_of_offset(to_the_left_m: float) -> Command:
    """What a path is called that ends so far to a side."""
    if abs(to_the_left_m) < TURN_M:
        return Command.STRAIGHT
    return Command.LEFT if to_the_left_m > 0 else Command.RIGHT


def command_paths(root: Path, scene: str) -> tuple[Path, Path]:
    """Where a scene's recorded commands and its route lie, if they do."""
    folder = Path(root) / "can_bus"
    return folder / f"{scene}_command.json", folder / f"{scene}_route.json"


class RouteCommands:
    """Commands of one scene that do not know its future."""

    _route: NDArray[np.float64]
    _lengths_m: NDArray[np.float64]

    def __init__(self, root: Path, scene: str) -> None:
        """Read a scene's recorded commands, or its route.

        Raises:
            InputError: both files are missing, or the one that counts is damaged.
        """
        recorded, route = command_paths(root, scene)
        self._scene = scene
        self._recorded: list[dict[str, Any]] = []
        if recorded.is_file():
            self._recorded = sorted(_commands(recorded), key=lambda message: message["utime"])
        elif route.is_file():
            self._route = _points(route)
            gaps = np.linalg.norm(np.diff(self._route, axis=0), axis=1)
            self._lengths_m = np.concatenate([[0.0], np.cumsum(gaps)])
        else:
            raise InputError(
                f"no route command for {scene}: {recorded} is missing, and so is {route.name} of the CAN bus "
                f"expansion (https://www.nuscenes.org/nuscenes#download); get one of them, or {_WAY_OUT}"
            )

    def check(self, poses: list[Pose]) -> None:
        """See that the car is on its route.

        Raises:
            InputError: a pose is more than 5 m away from it.
        """
        if self._recorded:
            return
        farthest = max((self._nearest(pose)[1] for pose in poses), default=0.0)
        if farthest > OFF_ROUTE_M:
            raise InputError(
                f"the route of {self._scene} is up to {farthest:.0f} m away from the car (at most "
                f"{OFF_ROUTE_M:.0f}); nuScenes has some such routes: leave the scene out, or {_WAY_OUT}"
            )

    def at(self, stamp_s: float, pose: Pose, speed_mps: float) -> Command:
        """The command at a keyframe.

        Args:
            stamp_s: its time; the newest recorded command counts.
            pose: of the rear axle in the map.
            speed_mps: the route is looked at as far as the car gets in 3 s, at least 20 m.
        """
        if self._recorded:
            # A keyframe's own entry may round to the microsecond after it.
            utime = (stamp_s + _KEYFRAME_ROUNDING_S) * 1e6
            position = bisect_right(self._recorded, utime, key=lambda message: message["utime"])
            return Command(self._recorded[max(position, 1) - 1]["command"])
        begin_m, _ = self._nearest(pose)
        here, there = self._along(begin_m), self._along(begin_m + max(AHEAD_AT_LEAST_M, AHEAD_S * speed_mps))
        # From where the route passes the car: that it drives beside it is no turn.
        ahead = points_in_ego((there - here)[None], (0.0, 0.0, pose[2]))
        return command_of_offset(float(ahead[0, 1]))

    def _along(self, distance_m: float) -> NDArray[np.float64]:
        return np.array([np.interp(distance_m, self._lengths_m, column) for column in self._route.T])

    def _nearest(self, pose: Pose) -> tuple[float, float]:
        """How far along the route the car is, and how far from it."""
        starts, moves = self._route[:-1], np.diff(self._route, axis=0)
        lengths = np.linalg.norm(moves, axis=1)
        position, nose = np.array(pose[:2]), np.array([np.cos(pose[2]), np.sin(pose[2])])
        shares = np.clip(np.einsum("nd,nd->n", position - starts, moves) / lengths**2, 0, 1)
        distances = np.linalg.norm(starts + shares[:, None] * moves - position, axis=1)
        # A route may come by again the other way.
        candidates = np.where(moves @ nose > 0, distances, np.inf)
        if not np.isfinite(candidates).any():
            candidates = distances
        best = int(np.argmin(candidates))
        return float(self._lengths_m[best] + shares[best] * lengths[best]), float(candidates[best])


def _commands(path: Path) -> list[dict[str, Any]]:
    messages = read_json(path)
    allowed = [command.value for command in Command]
    if not messages:
        raise InputError(f"{path} holds no command; each keyframe needs one")
    for number, message in enumerate(messages):
        if message.get("command") not in allowed or "utime" not in message:
            raise InputError(
                f"{path}: entry {number} is {message}; expected utime (microseconds) and command, "
                f"one of {', '.join(allowed)}"
            )
    return list(messages)


def _points(path: Path) -> NDArray[np.float64]:
    try:
        points = np.asarray(read_json(path), dtype=np.float64)
    except (TypeError, ValueError):
        points = np.zeros(0)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise InputError(f"{path} is no route; expected a list of [x, y] in metres, in the map's frame")
    points = points[np.concatenate([[True], np.linalg.norm(np.diff(points, axis=0), axis=1) > 1e-6])]
    if len(points) < 2:
        raise InputError(f"{path} holds {len(points)} different points; a route needs at least 2")
    return points
