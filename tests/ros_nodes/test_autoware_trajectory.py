"""planner/trajectory against autoware_planning_msgs' own definition: classes that rosidl makes of it."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("geometry_msgs", reason="needs ROS 2 messages: pip install '.[ros-test]' or source ROS")
adapter = pytest.importorskip("rosidl_adapter.msg", reason="needs rosidl, which message packages bring")
generator = pytest.importorskip("rosidl_generator_py", reason="needs rosidl, which message packages bring")
pytestmark = pytest.mark.ros

from ros_nodes.ego_motion import OdometrySample
from ros_nodes.messages import autoware_trajectory_message, yaw_of
from vla_autoprune.frame import WAYPOINT_TIMES_S, Plan

PACKAGE = "autoware_planning_msgs"
# https://github.com/autowarefoundation/autoware_msgs, 1.9.0, Apache-2.0; without comments.
DEFINITIONS = {
    "Trajectory": """
std_msgs/Header header
autoware_planning_msgs/TrajectoryPoint[] points
""",
    "TrajectoryPoint": """
builtin_interfaces/Duration time_from_start
geometry_msgs/Pose pose
float32 longitudinal_velocity_mps
float32 lateral_velocity_mps
float32 acceleration_mps2
float32 heading_rate_rps
float32 front_wheel_angle_rad
float32 rear_wheel_angle_rad
""",
}
STAMP_NS = 1_532_402_927_647_951_000
SPEED_MPS = 8.0
RADIUS_M = 40.0


@pytest.fixture(scope="module")
def autoware(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The package, made of its definitions; it checks the type and range of every field."""
    templates = Path(generator.__file__).parents[4] / "share" / "rosidl_generator_py" / "resource"
    if not templates.is_dir():
        pytest.skip(f"rosidl_generator_py has no templates in {templates}")
    root = tmp_path_factory.mktemp("autoware")
    (root / "msg").mkdir()
    tuples = []
    for name, text in DEFINITIONS.items():
        (root / "msg" / f"{name}.msg").write_text(text)
        adapter.convert_msg_to_idl(root, PACKAGE, Path("msg") / f"{name}.msg", root / "idl" / "msg")
        tuples.append(f"{root / 'idl'}:msg/{name}.idl")
    arguments = root / "arguments.json"
    arguments.write_text(
        json.dumps(
            {
                "package_name": PACKAGE,
                "idl_tuples": tuples,
                "output_dir": str(root / "made" / PACKAGE),
                "template_dir": str(templates),
                "target_dependencies": [],
            }
        )
    )
    generator.generate_py(str(arguments), [])
    (root / "made" / PACKAGE / "__init__.py").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROS_PYTHON_CHECK_FIELDS", "1")
        patch.syspath_prepend(str(root / "made"))
        importlib.import_module(f"{PACKAGE}.msg")
        yield
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]


@pytest.fixture
def plan() -> Plan:
    """Braking with 1 m/s² on a circle."""
    times = np.array(WAYPOINT_TIMES_S)
    angle = (SPEED_MPS * times - 0.5 * times**2) / RADIUS_M
    circle = np.column_stack([RADIUS_M * np.sin(angle), RADIUS_M * (1 - np.cos(angle)), angle])
    return Plan(circle.astype(np.float32), WAYPOINT_TIMES_S, "", "full", None, (), (), 1.0, 1.0, {})


def column(trajectory: Any, name: str) -> np.ndarray:
    return np.array([getattr(point, name) for point in trajectory.points])


def test_every_field_is_of_the_published_type_and_they_belong_together(autoware: None, plan: Plan) -> None:
    trajectory = autoware_trajectory_message(plan, STAMP_NS, SPEED_MPS, "base_link")
    assert trajectory.header.frame_id == "base_link"
    assert (trajectory.header.stamp.sec, trajectory.header.stamp.nanosec) == divmod(STAMP_NS, 10**9)
    times = np.array(
        [point.time_from_start.sec + point.time_from_start.nanosec / 1e9 for point in trajectory.points]
    )
    assert times.tolist() == [0.0, *WAYPOINT_TIMES_S]
    speed = column(trajectory, "longitudinal_velocity_mps")
    acceleration = column(trajectory, "acceleration_mps2")
    steps = np.diff(times)
    assert speed[0] == SPEED_MPS
    assert speed[1:-1] == pytest.approx(SPEED_MPS - times[1:-1], abs=1e-3)
    assert speed[:-1] + acceleration[:-1] * steps == pytest.approx(speed[1:], abs=1e-5)
    headings = np.array([yaw_of(point.pose.orientation) for point in trajectory.points])
    turned = np.cumsum(column(trajectory, "heading_rate_rps")[:-1] * steps)
    assert turned == pytest.approx(headings[1:], abs=1e-5)
    places = np.array([(point.pose.position.x, point.pose.position.y) for point in trajectory.points])
    assert not places[0].any() and np.allclose(places[1:], plan.waypoints_in_ego[:, :2])
    for unused in ("lateral_velocity_mps", "front_wheel_angle_rad", "rear_wheel_angle_rad"):
        assert not column(trajectory, unused).any()


def test_in_the_map_it_lies_where_odometry_says_and_names_odometrys_frame(autoware: None, plan: Plan) -> None:
    north = OdometrySample(STAMP_NS, SPEED_MPS, 0.0, x=100.0, y=50.0, heading=np.pi / 2, frame_id="odom")
    trajectory = autoware_trajectory_message(plan, STAMP_NS, SPEED_MPS, "map", north)
    assert trajectory.header.frame_id == "odom", "whoever reads it must not take odom for the map"
    for point, (x, y, heading) in zip(trajectory.points[1:], plan.waypoints_in_ego.tolist(), strict=True):
        assert (point.pose.position.x, point.pose.position.y) == pytest.approx((100.0 - y, 50.0 + x))
        assert yaw_of(point.pose.orientation) == pytest.approx(heading + np.pi / 2)
    unnamed = OdometrySample(STAMP_NS, SPEED_MPS, 0.0)
    assert autoware_trajectory_message(plan, STAMP_NS, SPEED_MPS, "map", unnamed).header.frame_id == "map"


def test_the_classes_check_what_is_assigned(autoware: None) -> None:
    from autoware_planning_msgs.msg import TrajectoryPoint

    with pytest.raises(AssertionError, match="float"):
        TrajectoryPoint().acceleration_mps2 = "fast"
    with pytest.raises(AttributeError):
        TrajectoryPoint().velocity = 1.0
