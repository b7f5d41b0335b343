"""What the car does when it follows a plan: NAVSIM's tracker and its kinematic bicycle model.

Several plans of one scene are driven side by side; everything is in the global frame.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from eval_nuscenes.navsim.scene import HORIZON, PACIFICA, STEP_S, EgoMotion, Floats, PlannedPath, wrapped

X, Y, HEADING, VX, VY, AX, AY, STEERING, STEERING_RATE, YAW_RATE, YAW_ACCELERATION = range(11)
STATE = (
    "x", "y", "heading", "vx", "vy", "ax", "ay", "steering", "steering rate", "yaw rate", "yaw acceleration",
)  # fmt: skip

LOOK_AHEAD = 10
"""Steps the tracker looks ahead."""
STOPPED_MPS = 0.2
STOPPING_GAIN = 0.5
SPEED_GAIN = 10 / 11
"""One-step LQR with weight 10 on the speed error, 1 on the acceleration, over a second."""
LATERAL_WEIGHTS = (1.0, 10.0)
"""On lateral and heading error; the steering angle has none, the steering rate 1."""
ACCELERATION_LAG_S = 0.2
STEERING_LAG_S = 0.05
MAX_STEERING_RAD = np.pi / 3
JERK_PENALTY = 1e-4
CURVATURE_RATE_PENALTY = 1e-2
CURVATURE_PENALTY = 1e-10


def in_map(path: PlannedPath, ego: EgoMotion) -> Floats:
    """[n, 3] the poses of a plan in the global frame."""
    cos, sin = np.cos(ego.pose[2]), np.sin(ego.pose[2])
    x, y, turned = np.asarray(path.poses_in_ego, dtype=np.float64).T
    heading = ego.pose[2] + turned
    return np.column_stack(
        [
            cos * x - sin * y + ego.pose[0],
            sin * x + cos * y + ego.pose[1],
            np.arctan2(np.sin(heading), np.cos(heading)),
        ]
    )


def plan_poses(path: PlannedPath, ego: EgoMotion, horizon: int = HORIZON) -> Floats:
    """A plan at 10 Hz, held at its last pose where it is shorter than the horizon, cut where it is longer.

    Returns:
        [horizon + 1, 3] global; the first is the present pose.
    """
    placed = in_map(path, ego)
    # The devkit goes through seconds in floating point and truncates: real stamps can lose a microsecond.
    start_s = 1e-6 * ego.time_us
    stamps = (1e6 * (start_s + np.arange(1, len(placed) + 1) * path.interval_s)).astype(np.int64)
    return stamped_poses(
        np.concatenate([[ego.time_us], stamps]), np.concatenate([ego.pose[None], placed]), ego, horizon
    )


def stamped_poses(stamps_us: Floats, poses: Floats, ego: EgoMotion, horizon: int = HORIZON) -> Floats:
    """Poses at given times, sampled at 10 Hz from now on.

    Args:
        stamps_us: [n] rising.
        poses: [n, 3].
        ego: says when now is.
        horizon: steps of 0.1 s.

    Returns:
        [horizon + 1, 3].
    """
    start_s = 1e-6 * ego.time_us
    wanted = (1e6 * (start_s + np.arange(horizon + 1) * STEP_S)).astype(np.int64)
    # Relative to the start: differences of epoch stamps would lose digits in the interpolation.
    wanted = np.clip(wanted, stamps_us[0], stamps_us[-1]) - ego.time_us
    known = np.asarray(stamps_us, dtype=np.int64) - ego.time_us
    headings = np.interp(wanted, known, np.unwrap(poses[:, 2]))
    return np.column_stack(
        [np.interp(wanted, known, poses[:, 0]), np.interp(wanted, known, poses[:, 1]), wrapped(headings)]
    )


def simulate(ego: EgoMotion, poses: Floats, wheel_base_m: float = PACIFICA.wheel_base_m) -> Floats:
    """Drive along poses.

    Args:
        ego: where and how the car starts.
        poses: [P, n, 3] at 10 Hz, one row per plan; n is 41 throughout NAVSIM.
        wheel_base_m: of the car.

    Returns:
        [P, n, 11] states in the order of `STATE`.
    """
    speeds, curvatures = profiles(poses)
    states = np.empty((*poses.shape[:2], len(STATE)))
    states[:, 0] = ego.state()
    for step in range(poses.shape[1] - 1):
        state = states[:, step]
        commands = _commands(state, poses[:, step], speeds, curvatures, step, wheel_base_m)
        states[:, step + 1] = _drive(state, *commands, wheel_base_m)
    return states


def profiles(poses: Floats) -> tuple[Floats, Floats]:
    """Speeds and curvatures that fit poses.

    Two regularised least-squares fits: an initial speed with accelerations, then an initial curvature with
    its rates. The devkit's penalty on jerk is, through an overwritten diagonal, a penalty on nearly every
    acceleration instead; the published scores come from that, so it is kept.

    Args:
        poses: [P, n, 3].

    Returns:
        [P, n - 1] m/s and [P, n - 1] 1/m.
    """
    steps = poses.shape[1] - 1
    moved = np.diff(poses[:, :, :2], axis=1)
    heading = poses[:, :-1, 2]
    turned = wrapped(np.diff(poses[:, :, 2], axis=1))
    integral = _integral(steps)

    # Along the heading and across it: the fit's speed has no component across, so only this part counts.
    along = moved[..., 0] * np.cos(heading) + moved[..., 1] * np.sin(heading)
    speeds = along @ _speed_fit(steps).T

    weighted = speeds[..., None] * integral * STEP_S
    normal = np.swapaxes(weighted, 1, 2) @ weighted
    penalty = np.full(steps, CURVATURE_RATE_PENALTY)
    penalty[0] = CURVATURE_PENALTY
    normal[:, np.arange(steps), np.arange(steps)] += penalty
    right = np.swapaxes(weighted, 1, 2) @ turned[..., None]
    rates = (np.linalg.pinv(normal, hermitian=True) @ right)[..., 0]
    return speeds, rates @ integral.T


@cache
def _integral(steps: int) -> Floats:
    """[steps, steps]: from an initial value and its rates per step to the values."""
    matrix = np.tril(np.ones((steps, steps))) * STEP_S
    matrix[:, 0] = 1.0
    return matrix


@cache
def _speed_fit(steps: int) -> Floats:
    """[steps, steps]: from distances driven along the heading in each step to the fitted speeds.

    The fit's normal matrix does not depend on the headings, since a direction has length one.
    """
    integral = _integral(steps)
    design = integral * STEP_S
    rough = np.zeros((steps - 2, steps - 1))
    rough[:, :-1] = -np.eye(steps - 2)
    rough[-1, -1] = 1.0
    penalty = np.zeros((steps, steps))
    penalty[1:, 1:] = rough.T @ rough
    return integral @ np.linalg.pinv(design.T @ design + JERK_PENALTY * penalty) @ design.T


def _commands(
    state: Floats, pose: Floats, speeds: Floats, curvatures: Floats, step: int, wheel_base_m: float
) -> tuple[Floats, Floats]:
    """[P] acceleration and [P] steering rate that the tracker asks for."""
    speed = state[:, VX]
    last = speeds.shape[1] - 1
    wanted = speeds[:, min(step + LOOK_AHEAD, last)]
    stopping = (wanted <= STOPPED_MPS) & (speed <= STOPPED_MPS)
    gain: Floats = np.where(stopping, STOPPING_GAIN, SPEED_GAIN)
    acceleration = gain * (wanted - speed)

    dx, dy = state[:, X] - pose[:, 0], state[:, Y] - pose[:, 1]
    lateral = dy * np.cos(pose[:, 2]) - dx * np.sin(pose[:, 2])
    off_heading = wrapped(state[:, HEADING] - pose[:, 2])
    ahead = np.minimum(step + np.arange(LOOK_AHEAD), last)
    driven = (speed[:, None] + acceleration[:, None] * STEP_S * np.arange(LOOK_AHEAD)) * STEP_S
    # The linear model rolled out: heading error before each step, without steering rate and per unit of it.
    free = np.cumsum(driven * (state[:, STEERING, None] / wheel_base_m - curvatures[:, ahead]), axis=1)
    steered = np.cumsum(driven * (np.arange(LOOK_AHEAD) * STEP_S / wheel_base_m), axis=1)
    end_lateral = lateral + driven.sum(axis=1) * off_heading + (driven[:, 1:] * free[:, :-1]).sum(axis=1)
    end_heading = wrapped(off_heading + free[:, -1])
    per_lateral = (driven[:, 1:] * steered[:, :-1]).sum(axis=1)
    per_heading = steered[:, -1]
    by_lateral, by_heading = LATERAL_WEIGHTS
    steering_rate = -(by_lateral * per_lateral * end_lateral + by_heading * per_heading * end_heading) / (
        by_lateral * per_lateral**2 + by_heading * per_heading**2 + 1.0
    )
    return acceleration, np.where(stopping, 0.0, steering_rate)


def _drive(state: Floats, acceleration: Floats, steering_rate: Floats, wheel_base_m: float) -> Floats:
    """One step of the bicycle with first-order lags on both commands; the old speed moves the car."""
    applied = state[:, AX] + STEP_S / (STEP_S + ACCELERATION_LAG_S) * (acceleration - state[:, AX])
    rate = STEP_S / (STEP_S + STEERING_LAG_S) * steering_rate
    speed = state[:, VX]
    moved = np.zeros_like(state)
    moved[:, X] = state[:, X] + speed * np.cos(state[:, HEADING]) * STEP_S
    moved[:, Y] = state[:, Y] + speed * np.sin(state[:, HEADING]) * STEP_S
    turn = speed * np.tan(state[:, STEERING]) / wheel_base_m
    moved[:, HEADING] = wrapped(state[:, HEADING] + turn * STEP_S)
    moved[:, VX] = speed + applied * STEP_S
    moved[:, AX] = applied
    moved[:, STEERING] = np.clip(state[:, STEERING] + rate * STEP_S, -MAX_STEERING_RAD, MAX_STEERING_RAD)
    moved[:, STEERING_RATE] = rate
    moved[:, YAW_RATE] = moved[:, VX] * np.tan(moved[:, STEERING]) / wheel_base_m
    moved[:, YAW_ACCELERATION] = (moved[:, YAW_RATE] - state[:, YAW_RATE]) / STEP_S
    return moved
