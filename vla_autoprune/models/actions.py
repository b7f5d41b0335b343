"""Waypoints as action tokens and back: per step a distance and a heading change per metre.

No torch here: the vehicle's runtime decodes with this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field

from vla_autoprune.errors import PlanError
from vla_autoprune.frame import WAYPOINT_TIMES_S


class ActionCodec(BaseModel):
    """The bins of the action tokens and where they start in the vocabulary; a JSON file of every bundle.

    A step drives `distance` metres straight along a bearing that differs from the last step's bearing by
    `distance * curvature`. Because a chord's bearing is chosen anew from where the last decoded step ended,
    quantisation errors neither add up nor make the headings oscillate, as they do with arcs.

    Attributes:
        first_distance_token: token id of distance bin 0.
        distance_bins: number of distances, from 0 in equal steps.
        distance_step_m: metres between neighbouring distances.
        first_curvature_token: token id of curvature bin 0, the sharpest turn to the right.
        curvature_bins: number of curvatures, odd; the middle one is straight on.
        curvature_max_per_m: heading change per metre of the outermost bins, in radians.
        curvature_power: bins are spaced as |u| ** power over u in -1..1: finer towards straight on.
        steps: waypoints of a plan.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["bins"] = "bins"
    first_distance_token: int = Field(ge=0)
    distance_bins: int = Field(default=121, ge=2)
    distance_step_m: float = Field(default=0.1, gt=0)
    first_curvature_token: int = Field(ge=0)
    curvature_bins: int = Field(default=81, ge=3)
    curvature_max_per_m: float = Field(default=0.25, gt=0)
    curvature_power: float = Field(default=2.0, ge=1)
    steps: int = Field(default=len(WAYPOINT_TIMES_S), ge=1)

    @property
    def length(self) -> int:
        """Action tokens of one plan."""
        return 2 * self.steps

    @property
    def distances_m(self) -> NDArray[np.float64]:
        """[distance_bins] metres."""
        return np.arange(self.distance_bins) * self.distance_step_m

    @property
    def curvatures_per_m(self) -> NDArray[np.float64]:
        """[curvature_bins] radians per metre, rising; positive turns left."""
        u = np.linspace(-1.0, 1.0, self.curvature_bins)
        return np.sign(u) * np.abs(u) ** self.curvature_power * self.curvature_max_per_m

    @property
    def largest_token(self) -> int:
        """The largest token id of the bins."""
        return max(self.tokens_at(0).stop, self.tokens_at(1).stop) - 1

    def is_complete(self, tokens: Sequence[int]) -> bool:
        """Whether an answer ends here."""
        return len(tokens) == self.length

    def waypoints(self, tokens: Sequence[int], text: str) -> NDArray[np.float32]:
        """`decode`, as every answer format offers it; the text is not needed."""
        return self.decode(tokens)

    def tokens_at(self, position: int) -> range:
        """Token ids a plan may have at a position: distances at even ones, curvatures at odd ones."""
        if position % 2:
            return range(self.first_curvature_token, self.first_curvature_token + self.curvature_bins)
        return range(self.first_distance_token, self.first_distance_token + self.distance_bins)

    def encode(self, waypoints_in_ego: ArrayLike) -> NDArray[np.int64]:
        """The action tokens whose decoded path stays closest to the waypoints, step by step.

        Args:
            waypoints_in_ego: [..., steps, 2 or 3] x, y (metres) of one path or many; a heading is not needed,
                the path implies it. Steps longer than the largest distance and turns sharper than the
                outermost curvature are clipped.

        Returns:
            [..., 2 * steps] token ids: distance, curvature, distance, …

        Raises:
            PlanError: wrong shape, or a number that is not finite.
        """
        waypoints = np.asarray(waypoints_in_ego, dtype=np.float64)
        if waypoints.ndim < 2 or waypoints.shape[-2] != self.steps or waypoints.shape[-1] not in (2, 3):
            raise PlanError(f"waypoints have shape {list(waypoints.shape)}, expected [{self.steps}, 2 or 3]")
        if not np.isfinite(waypoints).all():
            where = tuple(int(index) for index in np.argwhere(~np.isfinite(waypoints))[0][:-1])
            raise PlanError(f"waypoint {where} is {waypoints[where].tolist()}; every value must be finite")
        curvatures = self.curvatures_per_m
        tokens = np.empty((*waypoints.shape[:-2], self.length), dtype=np.int64)
        x, y, bearing = np.zeros((3, *waypoints.shape[:-2]))
        for step in range(self.steps):
            dx, dy = waypoints[..., step, 0] - x, waypoints[..., step, 1] - y
            # Quantisation may have overshot a car that stops: what lies behind is no distance to drive.
            ahead = dx * np.cos(bearing) + dy * np.sin(bearing) > 0
            metres = np.where(ahead, np.hypot(dx, dy), 0.0)
            distance = np.minimum(np.rint(metres / self.distance_step_m), self.distance_bins - 1).astype(
                np.int64
            )
            driven = distance * self.distance_step_m
            turn = (np.arctan2(dy, dx) - bearing + np.pi) % (2 * np.pi) - np.pi
            wanted = np.where(distance > 0, turn / np.maximum(driven, self.distance_step_m), 0.0)
            curvature = np.abs(curvatures - wanted[..., None]).argmin(axis=-1)
            tokens[..., 2 * step] = self.first_distance_token + distance
            tokens[..., 2 * step + 1] = self.first_curvature_token + curvature
            bearing = bearing + curvatures[curvature] * driven
            x = x + driven * np.cos(bearing)
            y = y + driven * np.sin(bearing)
        return tokens

    def decode(self, tokens: Sequence[int] | NDArray[np.integer]) -> NDArray[np.float32]:
        """The waypoints action tokens stand for.

        Args:
            tokens: [2 * steps] token ids.

        Returns:
            [steps, 3] x, y (metres) and heading (radians) in the ego frame. A waypoint's heading lies halfway
            between the bearings of the steps before and after it.

        Raises:
            PlanError: too few or too many tokens, or one that is not allowed where it stands; the message
                names it.
        """
        ids = [int(token) for token in tokens]
        if len(ids) != self.length:
            raise PlanError(f"the answer has {len(ids)} action tokens, a plan has {self.length}")
        for position, token in enumerate(ids):
            allowed = self.tokens_at(position)
            if token not in allowed:
                what = "curvature" if position % 2 else "distance"
                raise PlanError(
                    f"answer token {position} is {token}, not a {what} token "
                    f"({allowed.start}..{allowed.stop - 1})"
                )
        distances = self.distances_m[np.array(ids[0::2]) - self.first_distance_token]
        turns = distances * self.curvatures_per_m[np.array(ids[1::2]) - self.first_curvature_token]
        bearings = np.cumsum(turns)
        headings = bearings + np.append(turns[1:], turns[-1]) / 2
        x = np.cumsum(distances * np.cos(bearings))
        y = np.cumsum(distances * np.sin(bearings))
        return np.stack([x, y, headings], axis=1).astype(np.float32)
