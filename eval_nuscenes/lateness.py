"""What a plan is worth when it arrives late: the vehicle has gone on in the meantime.

A plan made from the frame at t0 is there at t0 + latency. Until then the vehicle keeps the speed and yaw
rate it had at t0; from then on it does what the plan says, from where it stands by then. The path it drives
that way is scored like any other. With no latency it is the plan itself.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from vla_autoprune.errors import InputError
from vla_autoprune.frame import WAYPOINT_TIMES_S, EgoState, FloatArray


def late_waypoints(waypoints_in_ego: ArrayLike, ego: EgoState, latency_ms: float) -> FloatArray:
    """Where the rear axle gets when a plan is carried out late.

    Args:
        waypoints_in_ego: [6, 3] the plan: x, y, heading in the ego frame at t0.
        ego: motion at t0, which goes on until the plan arrives.
        latency_ms: from t0 to the plan's arrival.

    Returns:
        [6, 3] in the ego frame at t0, at the same times as the plan: 0.5 … 3.0 s after t0.

    Raises:
        InputError: the latency is negative or not finite.
    """
    if not (np.isfinite(latency_ms) and latency_ms >= 0):
        raise InputError(f"a latency is {latency_ms} ms; it must be finite and at least 0")
    latency_s = latency_ms / 1e3
    times = np.asarray(WAYPOINT_TIMES_S)
    plan = np.vstack([np.zeros(3), np.asarray(waypoints_in_ego, dtype=np.float64)])
    plan[:, 2] = np.unwrap(plan[:, 2])
    since_arrival = times - latency_s
    knots = np.concatenate([[0.0], times])
    x, y, heading = (np.interp(since_arrival, knots, column) for column in plan.T)
    ((start_x, start_y, turned),) = _gone_on(ego, np.array([latency_s]))
    cos, sin = np.cos(turned), np.sin(turned)
    carried_out = np.column_stack(
        [start_x + cos * x - sin * y, start_y + sin * x + cos * y, turned + heading]
    )
    return np.where(since_arrival[:, None] < 0, _gone_on(ego, times), carried_out)


def _gone_on(ego: EgoState, seconds: FloatArray) -> FloatArray:
    """[n, 3] the rear axle's poses after some times at constant speed and yaw rate."""
    turned = ego.yaw_rate_rps * seconds
    chord = ego.speed_mps * seconds * np.sinc(turned / 2 / np.pi)
    return np.column_stack([chord * np.cos(turned / 2), chord * np.sin(turned / 2), turned])
