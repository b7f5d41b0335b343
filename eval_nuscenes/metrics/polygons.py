"""The protocols with exact geometry: SparseDrive's, and our own."""

from __future__ import annotations

import numpy as np

from eval_nuscenes.metrics.protocol import (
    EGO_CENTRE_AHEAD_M,
    EGO_LENGTH_M,
    EGO_WIDTH_M,
    OpenLoopProtocol,
    StepTest,
    if_complete,
)
from eval_nuscenes.metrics.truth import (
    PEDESTRIANS,
    STEPS,
    VEHICLES,
    BoxesOfSteps,
    Mask,
    OpenLoopTruth,
    Points,
    Waypoints,
    rectangles,
)

SPARSEDRIVE_STANDS_M = 0.5
STANDARD_STANDS_M = 0.5
STANDARD_PAST = 2


def _ego_boxes(waypoints: Points, headings: Points) -> Points:
    """[6, 4, 2] corners of the ego at its waypoints."""
    ahead = EGO_CENTRE_AHEAD_M * np.stack([np.cos(headings), np.sin(headings)], axis=1)
    x, y = (waypoints + ahead).T
    return rectangles(x, y, headings, EGO_LENGTH_M, EGO_WIDTH_M)


class _Obstacles:
    """Road users per step as shapely polygons, made when an ego box comes near."""

    def __init__(self, boxes: BoxesOfSteps) -> None:
        self._corners, self._steps = boxes.corners, boxes.steps
        self._centres = self._corners.mean(axis=1)
        self._reach = np.linalg.norm(self._corners[:, 0] - self._centres, axis=1)

    def touched(self, ego: Points) -> Mask:
        """Which of the road users the ego touches, an edge in common included.

        Args:
            ego: [6, 4, 2] its corners per step.

        Returns:
            [n] over the road users of all steps.
        """
        import shapely

        offsets = self._centres - ego.mean(axis=1)[self._steps]
        touched = np.hypot(offsets[:, 0], offsets[:, 1]) <= self._reach + EGO_LENGTH_M
        near = np.flatnonzero(touched)
        if len(near):
            boxes = shapely.polygons(ego)[self._steps[near]]
            touched[near] = shapely.intersects(boxes, shapely.polygons(self._corners[near]))
        return touched

    def without(self, left_out: Mask) -> _Obstacles:
        """The others."""
        return _Obstacles(BoxesOfSteps(self._corners[~left_out], self._steps[~left_out]))

    def hits(self, ego: Points) -> Mask:
        """[6] the steps at which the ego touches any."""
        return np.bincount(self._steps[self.touched(ego)], minlength=STEPS) > 0


def _sparsedrive_headings(waypoints: Points) -> Points:
    if np.linalg.norm(waypoints[-1] - waypoints[0]) < SPARSEDRIVE_STANDS_M:
        return np.full(STEPS, np.pi / 2)
    path = np.vstack([np.zeros(2), waypoints])
    moves = np.vstack([path[2:] - path[:-2], path[-1] - path[-2]])
    return np.arctan2(moves[:, 1], moves[:, 0])


def _sparsedrive_test(truth: OpenLoopTruth) -> StepTest:
    obstacles = _Obstacles(truth.future_corners(lambda box: box.lidar_points > 0))

    def collides(waypoints: Waypoints) -> Mask:
        exact = waypoints.astype(np.float64)
        return obstacles.hits(_ego_boxes(exact, _sparsedrive_headings(exact)))

    return collides


def driven_headings(waypoints: Points) -> Points:
    """Where a car's nose points while it drives along waypoints.

    The direction from the waypoint before to the one after (at the last, from the one before to itself), with
    the origin before the first. Where these are less than 0.5 m apart the heading stays, at first straight
    ahead; a move by more than a right angle against it is reversing, and keeps the nose.

    Args:
        waypoints: [6, 2] x right, y forward.

    Returns:
        [6] yaw counter-clockwise from +x.
    """
    path = np.vstack([np.zeros(2), waypoints])
    heading, headings = np.pi / 2, []
    for move in np.vstack([path[2:] - path[:-2], path[-1] - path[-2]]):
        if np.hypot(*move) >= STANDARD_STANDS_M:
            backwards = move @ (np.cos(heading), np.sin(heading)) < 0
            heading = float(np.arctan2(*(-move if backwards else move)[::-1]))
        headings.append(heading)
    return np.array(headings)


def _standard_test(truth: OpenLoopTruth) -> StepTest:
    def ego(waypoints: Waypoints) -> Points:
        exact = waypoints.astype(np.float64)
        return _ego_boxes(exact, driven_headings(exact))

    road_users = VEHICLES | PEDESTRIANS
    obstacles = _Obstacles(truth.future_corners(lambda box: box.category in road_users))
    driven = truth.waypoints.copy()
    if not truth.complete:  # rows past the scene's end hold no position; the car stays where it was last
        last = int(truth.future_exists.sum())
        driven[last:] = driven[last - 1]
    obstacles = obstacles.without(obstacles.touched(ego(driven)))
    return lambda waypoints: obstacles.hits(ego(waypoints))


def _standard_steps(truth: OpenLoopTruth) -> Mask:
    return truth.future_exists & (truth.past_keyframes >= STANDARD_PAST)


SPARSEDRIVE = OpenLoopProtocol(
    name="sparsedrive",
    reporting="mean",
    collision_reporting="mean",
    summary="SparseDrive, as Impromptu-VLA reports: exact boxes, mean over the steps up to 1, 2 and 3 s.",
    counter="divides by the samples with six keyframes after them in their scene",
    quirks=(
        "everything annotated with a LiDAR return is an obstacle, barriers and traffic cones too",
        "the ego box points from the waypoint before to the one after, and straight ahead throughout where "
        "first and last waypoint are less than 0.5 m apart",
        "steps where the true ego box touches an obstacle cannot collide but stay in the denominator",
    ),
    steps_counted=if_complete,
    collision_test=_sparsedrive_test,
)
STANDARD = OpenLoopProtocol(
    name="standard",
    reporting="at",
    collision_reporting="at",
    summary="Ours, after PARA-Drive: turning ego box, exact geometry, each step by itself, existing "
    "keyframes only; vehicles and people.",
    counter="divides, step by step, by the samples whose scene has that keyframe and at least two before t0",
    quirks=(
        "not a published protocol: compare it with itself only",
        "a road user that the true ego box touches at a step is left out at that step",
    ),
    steps_counted=_standard_steps,
    collision_test=_standard_test,
)
