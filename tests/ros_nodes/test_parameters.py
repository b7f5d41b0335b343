"""Parameters on a real node: refused when it is configured, with name, value and range."""

from __future__ import annotations

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2: pip install '.[ros-test]' or source ROS")
pytestmark = pytest.mark.ros

import rclpy
from rclpy.parameter import Parameter as RosParameter

from ros_nodes.parameters import NodeParameters, Parameter
from vla_autoprune.errors import InputError

PARAMETERS = (
    Parameter("deadline_ms", 100.0, "time for a plan", 1.0, 10_000.0),
    Parameter("threads", 0, "0 takes all", 0, 64),
    Parameter("missing", "black", "what replaces a camera", choices=("black", "refuse")),
    Parameter("raw", False, "images are not compressed"),
)


@pytest.fixture
def make(ros_domain):
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=ros_domain)
    nodes = []

    def node_with(**overrides):
        values = [RosParameter(name, value=value) for name, value in overrides.items()]
        node = rclpy.create_node("tested", context=context, parameter_overrides=values)
        nodes.append(node)
        return node, NodeParameters(node, PARAMETERS)

    yield node_with
    for node in nodes:
        node.destroy_node()
    rclpy.shutdown(context=context)


def test_defaults_overrides_and_whole_numbers_for_floats(make):
    _, parameters = make(deadline_ms=80, missing="refuse")
    assert parameters.read() == {"deadline_ms": 80.0, "threads": 0, "missing": "refuse", "raw": False}


@pytest.mark.parametrize(
    "name,value,allowed",
    [
        ("deadline_ms", -1.0, "finite numbers 1..10000"),
        ("deadline_ms", float("nan"), "finite numbers 1..10000"),
        ("deadline_ms", "soon", "finite numbers"),
        ("threads", 65, "whole numbers 0..64"),
        ("threads", 2.5, "whole numbers"),
        ("missing", "grey", "'black', 'refuse'"),
        ("raw", 1, "true or false"),
    ],
)
def test_what_is_not_allowed_is_named_and_can_be_mended(make, name, value, allowed):
    node, parameters = make(**{name: value})
    with pytest.raises(InputError, match=f"parameter {name} is .*; allowed: {allowed}"):
        parameters.read()
    default = next(parameter.default for parameter in PARAMETERS if parameter.name == name)
    assert node.set_parameters([RosParameter(name, value=default)])[0].successful
    assert parameters.read()[name] == default


def test_values_are_fixed_from_reading_to_release(make):
    node, parameters = make()
    parameters.read()
    result = node.set_parameters([RosParameter("deadline_ms", value=50.0)])[0]
    assert not result.successful and "clean it up" in result.reason
    parameters.release()
    assert node.set_parameters([RosParameter("deadline_ms", value=50.0)])[0].successful
    refused = node.set_parameters([RosParameter("missing", value="grey")])[0]
    assert not refused.successful and "'black', 'refuse'" in refused.reason
    assert parameters.read()["deadline_ms"] == 50.0


def test_descriptors_teach(make):
    node, _ = make()
    descriptor = node.describe_parameter("deadline_ms")
    assert descriptor.description == "time for a plan"
    (allowed,) = descriptor.floating_point_range
    assert (allowed.from_value, allowed.to_value) == (1.0, 1e4)
