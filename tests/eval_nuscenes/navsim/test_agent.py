"""The agent against the devkit's published signatures, 1.1 and 2.2, with a real bundle inside.

The devkit cannot be installed here, so its few classes that an agent touches are written down as published.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_autoprune.errors import InputError

torch = pytest.importorskip("torch")

STAND_INS = {
    "CAM_FRONT_LEFT": "cam_l0",
    "CAM_FRONT": "cam_f0",
    "CAM_FRONT_RIGHT": "cam_r0",
    "CAM_BACK_LEFT": "cam_l2",
    "CAM_BACK": "cam_b0",
    "CAM_BACK_RIGHT": "cam_r2",
}
SENSORS = ("cam_f0", "cam_l0", "cam_l1", "cam_l2", "cam_r0", "cam_r1", "cam_r2", "cam_b0")


@dataclasses.dataclass
class TrajectorySampling:
    num_poses: int | None = None
    time_horizon: float | None = None
    interval_length: float | None = None

    def __post_init__(self) -> None:
        self.num_poses = self.num_poses or round(self.time_horizon / self.interval_length)


@dataclasses.dataclass
class Trajectory:
    poses: Any
    trajectory_sampling: TrajectorySampling

    def __post_init__(self) -> None:
        assert self.poses.shape == (self.trajectory_sampling.num_poses, 3)


SensorConfig = dataclasses.make_dataclass("SensorConfig", [*SENSORS, "lidar_pc"])
Cameras = dataclasses.make_dataclass("Cameras", SENSORS)


class AgentV1(torch.nn.Module):
    def __init__(self, requires_scene: bool = False) -> None:
        super().__init__()
        assert isinstance(requires_scene, bool)
        self.requires_scene = requires_scene


class AgentV2(torch.nn.Module):
    def __init__(self, trajectory_sampling: TrajectorySampling, requires_scene: bool = False) -> None:
        super().__init__()
        self.requires_scene = requires_scene
        self._trajectory_sampling = trajectory_sampling


@pytest.fixture(params=[AgentV1, AgentV2])
def agent_module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    sampling_module = "nuplan.planning.simulation.trajectory.trajectory_sampling"
    contents = {
        "navsim.agents.abstract_agent": {"AbstractAgent": request.param},
        "navsim.common.dataclasses": {"SensorConfig": SensorConfig, "Trajectory": Trajectory},
        sampling_module: {"TrajectorySampling": TrajectorySampling},
    }
    for name, members in contents.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            partial = ".".join(parts[:end])
            if partial not in sys.modules:
                monkeypatch.setitem(sys.modules, partial, types.ModuleType(partial))
        vars(sys.modules[name]).update(members)
    sys.modules.pop("eval_nuscenes.navsim.agent", None)
    yield importlib.import_module("eval_nuscenes.navsim.agent")
    sys.modules.pop("eval_nuscenes.navsim.agent", None)


@pytest.fixture
def bundle(repository: Path) -> str:
    return str(repository / "tests" / "data" / "tiny_bundle")


def agent_input(command: int = 1, absent: str = "", seed: int = 0) -> Any:
    generator = np.random.default_rng(seed)
    statuses = [
        types.SimpleNamespace(
            ego_pose=np.array([-3.0 * (3 - index), 0.0, 0.05 * (index - 3)]),
            ego_velocity=np.array([6.0, 0.1]),
            ego_acceleration=np.array([0.5, 0.0]),
            driving_command=np.eye(4, dtype=int)[command],
        )
        for index in range(4)
    ]
    images = {
        name: None if name == absent else generator.integers(0, 255, (270, 480, 3), dtype=np.uint8)
        for name in SENSORS
    }
    now = Cameras(**{name: types.SimpleNamespace(image=image) for name, image in images.items()})
    return types.SimpleNamespace(ego_statuses=statuses, cameras=[None, None, None, now], lidars=[None] * 4)


def test_a_plan_of_four_seconds(agent_module: Any, bundle: str) -> None:
    agent = agent_module.VlaAutopruneAgent(bundle, cameras=STAND_INS)
    assert isinstance(agent, torch.nn.Module)
    assert agent.requires_scene is False
    assert agent.name() == "VlaAutopruneAgent"
    config = agent.get_sensor_config()
    assert {name for name in SENSORS if getattr(config, name)} == set(STAND_INS.values())
    assert config.cam_f0 == [3]
    assert config.lidar_pc is False
    with pytest.raises(InputError, match="before initialize"):
        agent.compute_trajectory(agent_input())
    agent.initialize()
    trajectory = agent.compute_trajectory(agent_input())
    assert trajectory.poses.dtype == np.float32
    assert trajectory.trajectory_sampling.num_poses == 8
    again = agent.compute_trajectory(agent_input())
    np.testing.assert_array_equal(again.poses, trajectory.poses)
    inner = agent._planner.plan(agent._frame(agent_input()))
    np.testing.assert_allclose(trajectory.poses[:6], inner.waypoints_in_ego, atol=1e-5)


def test_what_the_model_gets(agent_module: Any, bundle: str) -> None:
    agent = agent_module.VlaAutopruneAgent(bundle, cameras=STAND_INS)
    given = agent_input(command=0)
    frame = agent._frame(given)
    assert frame.command.value == "left"
    assert (frame.ego.speed_mps, frame.ego.acceleration_mps2) == (6.0, 0.5)
    assert frame.ego.yaw_rate_rps == pytest.approx(0.1)
    np.testing.assert_array_equal(frame.images["CAM_BACK"], given.cameras[3].cam_b0.image)
    assert agent._frame(agent_input(command=3)).command.value == "straight"
    strict = agent_module.VlaAutopruneAgent(bundle, cameras=STAND_INS, unknown_command="refuse")
    with pytest.raises(InputError, match="driving command is unknown"):
        strict._frame(agent_input(command=3))
    with pytest.raises(InputError, match="no image of cam_l2; check sensor_blobs_path"):
        agent._frame(agent_input(absent="cam_l2"))


def test_another_rig_is_refused_with_the_difference_spelled_out(agent_module: Any, bundle: str) -> None:
    with pytest.raises(
        InputError, match=r"6 cameras \(CAM_FRONT_LEFT.*NAVSIM has 8 \(cam_f0.*has no CAM_FRONT_LEFT"
    ):
        agent_module.VlaAutopruneAgent(bundle)
    for cameras, message in (
        ({**STAND_INS, "CAM_BACK": "cam_x9"}, "not of NAVSIM: cam_x9"),
        ({**STAND_INS, "CAM_BACK": "cam_f0"}, "named twice: cam_f0"),
        ({**STAND_INS, "CAM_TOP": "cam_l1"}, "not in the bundle: CAM_TOP"),
        ({"CAM_FRONT": "cam_f0"}, "no stand-in for CAM_FRONT_LEFT, CAM_FRONT_RIGHT"),
    ):
        with pytest.raises(InputError, match=message):
            agent_module.VlaAutopruneAgent(bundle, cameras=cameras)
    own = agent_module.camera_map(("CAM_F0", "cam_b0"), None)
    assert own == {"CAM_F0": "cam_f0", "cam_b0": "cam_b0"}


def test_wrong_options_are_refused(agent_module: Any, bundle: str) -> None:
    for options, message in (
        ({"beyond_plan": "guess"}, "beyond_plan is 'guess'"),
        ({"unknown_command": "up"}, "unknown_command is 'up'"),
        ({"trajectory_sampling": TrajectorySampling(40, 4.0, 0.1)}, "interval_length is 0.1"),
    ):
        with pytest.raises(InputError, match=message):
            agent_module.VlaAutopruneAgent(bundle, cameras=STAND_INS, **options)


def test_a_plan_goes_on_along_its_arc(agent_module: Any) -> None:
    turn = 0.1 * np.arange(1, 9)
    arc = np.column_stack([20 * np.sin(turn), 20 * (1 - np.cos(turn)), turn])
    np.testing.assert_allclose(agent_module.extended(arc[:6], 8, "continue"), arc, atol=1e-9)
    held = agent_module.extended(arc[:6], 8, "hold")
    np.testing.assert_array_equal(held[6:], arc[[5, 5]])
    np.testing.assert_array_equal(agent_module.extended(arc, 4, "continue"), arc[:4])


def test_the_hydra_config_fits_the_constructor(agent_module: Any, repository: Path) -> None:
    yaml = pytest.importorskip("yaml")
    folder = repository / "eval_nuscenes" / "navsim" / "devkit_config"
    config = yaml.safe_load((folder / "agent" / "vla_autoprune_agent.yaml").read_text())
    assert config.pop("_target_") == "eval_nuscenes.navsim.agent.VlaAutopruneAgent"
    assert config.pop("_convert_") == "all"
    parameters = inspect.signature(agent_module.VlaAutopruneAgent).parameters
    assert set(config) == set(parameters)
    sampling = config.pop("trajectory_sampling")
    assert sampling["_target_"].endswith("trajectory_sampling.TrajectorySampling")
    assert (sampling["time_horizon"], sampling["interval_length"]) == (4, 0.5)
    for name, value in config.items():
        if name != "bundle":
            assert value == parameters[name].default
    assert (folder / "__init__.py").is_file()
