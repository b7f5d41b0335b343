"""A bundle as an agent of NAVSIM's devkit (1.1 and 2.2); importing this module needs the devkit.

`devkit_config/agent/vla_autoprune_agent.yaml` configures it; docs/navsim.md says how to run it, and what the
shipped model can do there.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from navsim.agents.abstract_agent import AbstractAgent
from navsim.common.dataclasses import SensorConfig, Trajectory
from nuplan.planning.simulation.trajectory.trajectory_sampling import TrajectorySampling

from engines.backends import Name as BackendName
from engines.backends import open_backend
from eval_nuscenes.navsim.scene import Floats, wrapped
from vla_autoprune.bundle import RECIPE, load_bundle
from vla_autoprune.errors import InputError
from vla_autoprune.frame import Command, EgoState, Frame
from vla_autoprune.recipe import read_recipe
from vla_autoprune.runtime.planner import Planner, Policy

CAMERAS = ("cam_f0", "cam_l0", "cam_l1", "cam_l2", "cam_r0", "cam_r1", "cam_r2", "cam_b0")
"""NAVSIM's rig."""
COMMANDS = (Command.LEFT, Command.STRAIGHT, Command.RIGHT, None)
"""In the order of NAVSIM's one-hot command; the fourth is unknown."""
NOW = 3
"""Index of the present frame in the four frames of history."""
INTERVAL_S = 0.5


class VlaAutopruneAgent(AbstractAgent):
    """Plans with a bundle's static stages on NAVSIM's cameras."""

    def __init__(
        self,
        bundle: str,
        cameras: Mapping[str, str] | None = None,
        budget: float | None = None,
        policy: Policy = "autoprune",
        backend: BackendName = "onnxruntime",
        threads: int | None = 1,
        beyond_plan: Literal["continue", "hold"] = "continue",
        unknown_command: Literal["left", "straight", "right", "refuse"] = "straight",
        trajectory_sampling: TrajectorySampling | None = None,
    ) -> None:
        """Check what can be checked before the weights are read.

        Args:
            bundle: directory that `vla-autoprune export` wrote.
            cameras: which of NAVSIM's cameras stands in for each of the bundle's. Without it the bundle must
                be of NAVSIM's rig, its cameras named like NAVSIM's.
            budget: one of the recipe's; None prunes nothing.
            policy: how bucket and tokens are chosen.
            backend: what runs the stages.
            threads: CPU threads of this worker.
            beyond_plan: a plan shorter than NAVSIM's 4 s goes on at its last speed and turn rate, or holds
                its last pose.
            unknown_command: what NAVSIM's unknown command is taken for.
            trajectory_sampling: of the plans, at 2 Hz; 4 s unless given.

        Raises:
            InputError: the bundle's rig is not NAVSIM's, or an option is not one of those above.
            RecipeError: the recipe is missing or not valid.
        """
        sampling = trajectory_sampling or TrajectorySampling(time_horizon=4, interval_length=INTERVAL_S)
        if "trajectory_sampling" in inspect.signature(AbstractAgent.__init__).parameters:
            super().__init__(trajectory_sampling=sampling, requires_scene=False)
        else:  # devkit 1.1
            super().__init__(requires_scene=False)
        if abs(sampling.interval_length - INTERVAL_S) > 1e-6:
            raise InputError(
                f"trajectory_sampling.interval_length is {sampling.interval_length}; plans have poses every "
                f"{INTERVAL_S} s"
            )
        if beyond_plan not in ("continue", "hold"):
            raise InputError(f"beyond_plan is {beyond_plan!r}; allowed: continue, hold")
        allowed = [*(command.value for command in Command), "refuse"]
        if unknown_command not in allowed:
            raise InputError(f"unknown_command is {unknown_command!r}; allowed: {', '.join(allowed)}")
        self._trajectory_sampling = sampling
        self._bundle, self._budget, self._policy = Path(bundle), budget, policy
        self._backend, self._threads = backend, threads
        self._beyond_plan, self._unknown_command = beyond_plan, unknown_command
        self._cameras = camera_map(read_recipe(self._bundle / RECIPE).layout.cameras, cameras)
        self._planner: Planner | None = None

    def name(self) -> str:
        """As the devkit's logs show it."""
        return type(self).__name__

    def initialize(self) -> None:
        """Read the bundle; the devkit calls this once per worker."""
        bundle = load_bundle(self._bundle)
        backend = open_backend(self._backend, bundle, threads=self._threads)
        self._planner = Planner(bundle, backend, self._budget, self._policy)

    def get_sensor_config(self) -> SensorConfig:
        """The present image of the bundle's cameras, nothing else."""
        used = set(self._cameras.values())
        return SensorConfig(lidar_pc=False, **{name: [NOW] if name in used else False for name in CAMERAS})

    def compute_trajectory(self, agent_input: Any) -> Trajectory:
        """Plan on the last frame of an AgentInput.

        Raises:
            InputError: an image is missing or the command is unknown and refused.
            PlanError: the model's answer is no plan; the devkit counts the scene as failed.
        """
        if self._planner is None:
            raise InputError("the agent plans before initialize() was called")
        plan = self._planner.plan(self._frame(agent_input))
        poses = extended(plan.waypoints_in_ego, self._trajectory_sampling.num_poses, self._beyond_plan)
        return Trajectory(poses.astype(np.float32), self._trajectory_sampling)

    def _frame(self, agent_input: Any) -> Frame:
        now = agent_input.ego_statuses[-1]
        sensors = agent_input.cameras[-1]
        images = {ours: getattr(sensors, theirs).image for ours, theirs in self._cameras.items()}
        absent = [self._cameras[ours] for ours, image in images.items() if image is None]
        if absent:
            raise InputError(f"NAVSIM gave no image of {', '.join(absent)}; check sensor_blobs_path")
        command = COMMANDS[int(np.argmax(now.driving_command))]
        if command is None:
            if self._unknown_command == "refuse":
                raise InputError("the driving command is unknown; set unknown_command to take it for one")
            command = Command(self._unknown_command)
        yaw_rate = 0.0
        if len(agent_input.ego_statuses) > 1:
            before = agent_input.ego_statuses[-2]
            turned = wrapped(np.asarray(now.ego_pose[2] - before.ego_pose[2], dtype=np.float64))
            yaw_rate = float(turned) / INTERVAL_S
        ego = EgoState(float(now.ego_velocity[0]), float(now.ego_acceleration[0]), yaw_rate)
        return Frame(images=images, ego=ego, command=command)


def camera_map(wanted: tuple[str, ...], given: Mapping[str, str] | None) -> dict[str, str]:
    """Which of NAVSIM's cameras each camera of a bundle sees through.

    Args:
        wanted: the bundle's cameras.
        given: a choice, or None where the bundle is of NAVSIM's rig.

    Raises:
        InputError: the bundle is of another rig and nothing was chosen, or the choice does not fit.
    """
    if given is None:
        foreign = [camera for camera in wanted if camera.lower() not in CAMERAS]
        if foreign:
            raise InputError(
                f"the bundle was made for {len(wanted)} cameras ({', '.join(wanted)}), NAVSIM has "
                f"{len(CAMERAS)} ({', '.join(CAMERAS)}): it has no {', '.join(foreign)}. They stand and "
                "look elsewhere; a model trained on one rig is not valid on the other. To run it anyway, "
                f"name a stand-in for each: agent.cameras={{{wanted[0]}: cam_…, …}}"
            )
        return {camera: camera.lower() for camera in wanted}
    missing = [camera for camera in wanted if camera not in given]
    surplus = [camera for camera in given if camera not in wanted]
    unknown = [camera for camera in given.values() if camera not in CAMERAS]
    doubled = sorted({camera for camera in given.values() if list(given.values()).count(camera) > 1})
    faults = [
        f"{what} {', '.join(names)}"
        for what, names in (
            ("no stand-in for", missing),
            ("not in the bundle:", surplus),
            ("not of NAVSIM:", unknown),
            ("named twice:", doubled),
        )
        if names
    ]
    if faults:
        raise InputError(
            f"cameras: {'; '.join(faults)}. The bundle has {', '.join(wanted)}; "
            f"NAVSIM has {', '.join(CAMERAS)}"
        )
    return {camera: given[camera] for camera in wanted}


def extended(waypoints_in_ego: Floats, count: int, beyond: Literal["continue", "hold"]) -> Floats:
    """A plan of another length: cut, or continued.

    Args:
        waypoints_in_ego: [T, 3] x, y, heading every 0.5 s.
        count: poses wanted.
        beyond: "continue" repeats the last step (same distance, same turn), "hold" the last pose.

    Returns:
        [count, 3].
    """
    poses = [np.asarray(pose, dtype=np.float64) for pose in waypoints_in_ego[:count]]
    last, before = poses[-1], poses[-2] if len(poses) > 1 else np.zeros(3)
    cos, sin = np.cos(before[2]), np.sin(before[2])
    away = last[:2] - before[:2]
    ahead, aside = cos * away[0] + sin * away[1], cos * away[1] - sin * away[0]
    turned = wrapped(last[2] - before[2])
    while len(poses) < count:
        x, y, heading = poses[-1]
        if beyond == "continue":
            x, y = (
                x + np.cos(heading) * ahead - np.sin(heading) * aside,
                y + np.sin(heading) * ahead + np.cos(heading) * aside,
            )
            heading = wrapped(heading + turned)
        poses.append(np.array([x, y, heading]))
    return np.stack(poses)
