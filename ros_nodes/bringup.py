"""What the launch files share: nodes that come up in order, and a launch that goes down with them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.actions import (
    DeclareLaunchArgument,
    EmitEvent,
    OpaqueFunction,
    RegisterEventHandler,
    SetEnvironmentVariable,
)
from launch.event_handlers import OnProcessExit, OnProcessStart
from launch.events import matches_action
from launch.launch_context import LaunchContext
from launch_ros.actions import LifecycleNode, Node
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from lifecycle_msgs.msg import Transition

from ros_nodes import topics
from ros_nodes.programs import LAUNCH_PID
from vla_autoprune.errors import InputError
from vla_autoprune.frame import CAMERAS

OLDER_FAST_DDS = ("humble", "iron", "jazzy")
"""Distributions whose Fast DDS reads FASTRTPS_DEFAULT_PROFILES_FILE; later ones warn about it."""

Entities = list[Any]


def argument(name: str, default: str | None, description: str, choices: Sequence[str] = ()) -> Any:
    """A launch argument; required where `default` is None."""
    given = {} if default is None else {"default_value": default}
    return DeclareLaunchArgument(name, description=description, choices=list(choices) or None, **given)


def common_arguments(config: Path, use_sim_time: str) -> Entities:
    """Arguments of every launch file."""
    inputs = (topics.ODOMETRY, topics.ACCELERATION, topics.COMMAND)
    return [
        argument("bundle", None, "directory of the bundle, as vla-autoprune export writes it"),
        argument("namespace", "", "of every node, hence of every topic"),
        argument("params_file", str(config / "drive.yaml"), "parameters of the nodes"),
        argument("deadline_ms", "", "replaces the file's: from an image's stamp to its plan"),
        argument("budget", "", "replaces the file's: a budget of the bundle's recipe, 1 prunes nothing"),
        argument("output_type", "", "replaces the file's", ("", "auto", "path", "trajectory")),
        argument("use_sim_time", use_sim_time, "take the time from /clock", ("true", "false")),
        *(
            argument(f"{camera.lower()}_topic", "", f"where {camera} comes from, if not from its own name")
            for camera in CAMERAS
        ),
        *(argument(f"{name}_topic", "", f"where {name} comes from, if not from {name}") for name in inputs),
        argument("record", "", "directory to record all inputs and outputs to, as MCAP"),
        argument("rviz", "false", "open RViz with the package's view", ("true", "false")),
        argument("foxglove", "false", "start foxglove_bridge, for config/foxglove.json", ("true", "false")),
        argument("log_to", "screen", "where the nodes' logs go", ("screen", "log", "both")),
    ]


class Bringup:
    """Makes the nodes of one launch from its arguments.

    Args:
        context: with the arguments' values.
        config: the folder of configuration files.
    """

    def __init__(self, context: LaunchContext, config: Path) -> None:
        self.values: Mapping[str, str] = dict(context.launch_configurations)
        self.config = config

    def environment(self) -> Entities:
        """What nodes find in their environment.

        That is the launch they end with, and the shared-memory profile for our own publishers unless the user
        has a profile.
        """
        launch = SetEnvironmentVariable(LAUNCH_PID, str(os.getpid()))
        older = os.environ.get("ROS_DISTRO") in OLDER_FAST_DDS
        variable = f"{'FASTRTPS' if older else 'FASTDDS'}_DEFAULT_PROFILES_FILE"
        if os.environ.get(variable):
            return [launch]
        return [launch, SetEnvironmentVariable(variable, str(self.config / "fastdds_shared_memory.xml"))]

    def planner(self, **fixed: Any) -> Entities:
        """vla_planner, configured and activated, with parameters that the launch file fixes."""
        given = {"bundle": str(Path(self.values["bundle"]).absolute()), **fixed}
        for name in ("deadline_ms", "budget"):
            if self.values[name]:
                given[name] = number(name, self.values[name])
        if self.values["output_type"]:
            given["output_type"] = self.values["output_type"]
        return self._lifecycle("ros_nodes.planner_node", "vla_planner", given)

    def guard(self) -> Entities:
        """trajectory_guard, configured and activated."""
        return self._lifecycle("ros_nodes.guard_node", "trajectory_guard", {})

    def recorder(self) -> Entities:
        """The recorder, if a directory is given; it may not die either, but end when the disk is full."""
        if not self.values["record"]:
            return []
        out = str(Path(self.values["record"]).absolute())
        recorder = self.node("ros_nodes.recording", "recorder", {"out": out})
        return [recorder, goes_down_with(recorder, "recorder", may_end=[])]

    def views(self) -> Entities:
        """RViz and Foxglove's bridge, if asked for; closing them ends nothing."""
        entities: Entities = []
        if self.values["rviz"] == "true":
            view = str(self.config / "drive.rviz")
            entities.append(Node(package="rviz2", executable="rviz2", arguments=["-d", view], output="log"))
        if self.values["foxglove"] == "true":
            entities.append(Node(package="foxglove_bridge", executable="foxglove_bridge", output="log"))
        return entities

    def node(self, module: str, name: str, given: Mapping[str, Any], kind: Any = Node) -> Any:
        """A node of ours, run by the interpreter that runs the launch: the one that has our packages."""
        return kind(
            executable=sys.executable,
            arguments=["-m", "ros_nodes.start", module],
            exec_name=name,
            name=name,
            namespace=self.values["namespace"],
            parameters=[
                self.values["params_file"],
                {"use_sim_time": self.values["use_sim_time"] == "true", **given},
            ],
            remappings=list(self._remappings()),
            output=self.values["log_to"],
            emulate_tty=False,
        )

    def _lifecycle(self, module: str, name: str, given: Mapping[str, Any]) -> Entities:
        node = self.node(module, name, given, LifecycleNode)

        def change(transition: int) -> Any:
            event = ChangeState(lifecycle_node_matcher=matches_action(node), transition_id=transition)
            return EmitEvent(event=event)

        def when(goal: str, then: Any, start: str | None = None) -> Any:
            return RegisterEventHandler(
                OnStateTransition(
                    target_lifecycle_node=node, start_state=start, goal_state=goal, entities=[then]
                )
            )

        configure = change(Transition.TRANSITION_CONFIGURE)
        return [
            goes_down_with(node, name),
            when("inactive", change(Transition.TRANSITION_ACTIVATE), start="configuring"),
            when("unconfigured", _refusal(name, "be configured"), start="configuring"),
            when("inactive", _refusal(name, "be activated"), start="activating"),
            RegisterEventHandler(OnProcessStart(target_action=node, on_start=[configure])),
            node,
        ]

    def _remappings(self) -> Iterable[tuple[str, str]]:
        raw = _transport(self.values["params_file"]) == "raw"
        for camera in CAMERAS:
            if given := self.values[f"{camera.lower()}_topic"]:
                yield topics.camera_topic(camera, raw), given
        for name in (topics.ODOMETRY, topics.ACCELERATION, topics.COMMAND):
            if given := self.values[f"{name}_topic"]:
                yield name, given


def goes_down_with(node: Any, name: str, may_end: Sequence[Any] | None = None) -> Any:
    """End the launch, with a non-zero code, when a node ends that should not.

    Args:
        node: the action.
        name: for the message.
        may_end: what to do when it ends with code 0; None if it may not.
    """

    def ended(event: Any, context: LaunchContext) -> Any:
        if context.is_shutdown:
            return None
        if may_end is not None and event.returncode == 0:
            return list(may_end)
        return [_refusal(name, "go on", f"its process ended with code {event.returncode}")]

    return RegisterEventHandler(OnProcessExit(target_action=node, on_exit=ended))


def _refusal(name: str, what: str, why: str = "the reason is in its log above") -> Any:
    """Raising is the one thing that makes `ros2 launch` return a non-zero code."""

    def refuse(context: LaunchContext) -> None:
        if not context.is_shutdown:
            raise RuntimeError(f"{name} cannot {what}: {why}; everything is stopped")

    return OpaqueFunction(function=refuse)


def number(name: str, text: str) -> float:
    """A launch argument's number.

    Raises:
        InputError: it is none.
    """
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{name}:={text} is no number") from None


def _transport(params_file: str) -> str:
    import yaml

    try:
        with Path(params_file).open(encoding="utf-8") as file:
            nodes = yaml.safe_load(file) or {}
    except OSError as error:
        raise InputError(f"params_file:={params_file} cannot be read: {error.strerror}") from None
    transport = "compressed"
    for name, section in nodes.items():  # of several that match, the last counts, as in rcl
        if name.rsplit("/", 1)[-1] in ("vla_planner", "**"):
            transport = section.get("ros__parameters", {}).get("image_transport", transport)
    return transport
