"""Plans as ROS messages, with the real message classes and their serialisation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from vla_autoprune.errors import PlanError
from vla_autoprune.frame import WAYPOINT_TIMES_S, Plan

pytest.importorskip("nav_msgs", reason="needs ROS 2 messages: pip install '.[ros-test]' or source ROS")
pytestmark = pytest.mark.ros

from ros_nodes.messages import path_message, time_message

STAMP_NS = 1_532_402_927_647_951_000


@pytest.fixture
def plan() -> Plan:
    waypoints = np.array([[3.0 * i, 0.1 * i * i, 0.05 * i] for i in range(1, 7)])
    return Plan(
        waypoints_in_ego=waypoints,
        times_s=WAYPOINT_TIMES_S,
        text="",
        bucket="full",
        complexity=None,
        visual_tokens_into_layers=(216,) * 8,
        kept_visual=(),
        work_fraction=1.0,
        kv_mib=1.0,
        timings_ms={},
    )


def test_path_survives_the_wire_with_the_input_time(plan: Plan) -> None:
    from nav_msgs.msg import Path
    from rclpy.serialization import deserialize_message, serialize_message

    path = deserialize_message(serialize_message(path_message(plan, STAMP_NS)), Path)
    assert (path.header.stamp.sec, path.header.stamp.nanosec) == divmod(STAMP_NS, 10**9)
    assert path.header.frame_id == "base_link"
    assert len(path.poses) == 6
    for pose, (x, y, heading), due_s in zip(path.poses, plan.waypoints_in_ego, plan.times_s, strict=True):
        assert (pose.pose.position.x, pose.pose.position.y) == (x, y)
        assert 2 * math.atan2(pose.pose.orientation.z, pose.pose.orientation.w) == pytest.approx(heading)
        stamp_ns = pose.header.stamp.sec * 10**9 + pose.header.stamp.nanosec
        assert stamp_ns - STAMP_NS == pytest.approx(due_s * 1e9, abs=1)


def test_a_path_is_finite_or_refused(plan: Plan) -> None:
    broken = plan.waypoints_in_ego.copy()
    broken[3, 1] = np.nan
    with pytest.raises(PlanError, match="waypoint 3"):
        path_message(replace(plan, waypoints_in_ego=broken), STAMP_NS)


def test_negative_time_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        time_message(-1)
