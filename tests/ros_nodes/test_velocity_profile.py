from __future__ import annotations

import numpy as np
import pytest

from ros_nodes.velocity_profile import velocity_profile
from vla_autoprune.frame import WAYPOINT_TIMES_S, Plan


def plan_of(waypoints) -> Plan:
    return Plan(np.array(waypoints, np.float32), WAYPOINT_TIMES_S, "", "full", None, (), (), 1.0, 1.0, {})


def test_speeds_and_accelerations_belong_together():
    times = np.array(WAYPOINT_TIMES_S)
    travelled = 8.0 * times - 0.5 * times**2
    radius = 40.0
    angle = travelled / radius
    circle = np.column_stack([radius * np.sin(angle), radius * (1 - np.cos(angle)), angle])
    profile = velocity_profile(plan_of(circle), 8.0)
    assert profile.poses_in_ego.shape == (7, 3) and not profile.poses_in_ego[0].any()
    assert profile.speed_mps[0] == 8.0
    assert profile.speed_mps[1:-1] == pytest.approx(8.0 - times[:-1], abs=1e-4)
    steps = np.diff(profile.times_s)
    reached = profile.speed_mps[:-1] + profile.acceleration_mps2[:-1] * steps
    assert reached == pytest.approx(profile.speed_mps[1:])
    turned = np.cumsum(profile.heading_rate_rps[:-1] * steps)
    assert turned == pytest.approx(angle, abs=1e-6)


def test_headings_may_wrap_and_the_vehicle_may_stand():
    waypoints = [[-0.1 * i, 0.0, -np.pi + 0.01 * (-1) ** i] for i in range(1, 7)]
    profile = velocity_profile(plan_of(waypoints), 0.0)
    assert np.isfinite(profile.speed_mps).all() and np.abs(profile.heading_rate_rps[1:]).max() < 0.1
    standing = velocity_profile(plan_of(np.zeros((6, 3))), 0.0)
    assert not standing.speed_mps.any() and not standing.acceleration_mps2.any()
