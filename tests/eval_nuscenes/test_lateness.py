"""Plans that arrive late."""

from __future__ import annotations

import numpy as np
import pytest

from eval_nuscenes.lateness import late_waypoints
from vla_autoprune.errors import InputError
from vla_autoprune.frame import WAYPOINT_TIMES_S, EgoState

TIMES = np.asarray(WAYPOINT_TIMES_S)


def braking(speed_mps: float, deceleration: float) -> np.ndarray:
    stopped = speed_mps / deceleration
    times = np.minimum(TIMES, stopped)
    return np.column_stack([speed_mps * times - deceleration * times**2 / 2, np.zeros((6, 2))])


def arc(speed_mps: float, yaw_rate: float) -> np.ndarray:
    turned = yaw_rate * TIMES
    radius = speed_mps / yaw_rate
    return np.column_stack([radius * np.sin(turned), radius * (1 - np.cos(turned)), turned])


def test_without_latency_a_plan_is_itself() -> None:
    plan = arc(7.0, 0.3)
    np.testing.assert_array_equal(late_waypoints(plan, EgoState(7.0, 0.0, 0.2), 0.0), plan)


@pytest.mark.parametrize("latency_ms", [120.0, 500.0, 1300.0])
def test_going_on_as_before_loses_nothing_by_coming_late(latency_ms: float) -> None:
    straight = np.column_stack([8.0 * TIMES, np.zeros((6, 2))])
    np.testing.assert_allclose(late_waypoints(straight, EgoState(8.0), latency_ms), straight, atol=1e-9)
    # Between its waypoints a plan is taken for straight, so a curve is met only at whole steps.
    curve = late_waypoints(arc(8.0, 0.3), EgoState(8.0, 0.0, 0.3), 500.0)
    np.testing.assert_allclose(curve, arc(8.0, 0.3), atol=1e-9)


def test_braking_late_takes_the_speed_times_the_latency_further() -> None:
    late = late_waypoints(braking(10.0, 5.0), EgoState(10.0), 500.0)
    assert late[-1, 0] == pytest.approx(10.0 + 5.0)  # it stops after 10 m, half a second late at 10 m/s
    np.testing.assert_allclose(late[:, 1:], 0.0)


def test_until_the_plan_is_there_the_vehicle_keeps_speed_and_yaw_rate() -> None:
    still = np.zeros((6, 3))
    late = late_waypoints(still, EgoState(6.0, 0.0, 0.4), 1200.0)
    np.testing.assert_allclose(late[:2], arc(6.0, 0.4)[:2], atol=1e-9)
    np.testing.assert_allclose(np.ptp(late[2:], axis=0), 0.0, atol=1e-12)
    assert late[2, 2] == pytest.approx(0.4 * 1.2)


@pytest.mark.parametrize("latency_ms", [-1.0, float("nan"), float("inf")])
def test_an_impossible_latency_is_refused(latency_ms: float) -> None:
    with pytest.raises(InputError, match=r"a latency is .* ms; it must be finite and at least 0"):
        late_waypoints(np.zeros((6, 3)), EgoState(5.0), latency_ms)
