from __future__ import annotations

import hashlib
import itertools
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eval_nuscenes.world.expert import FRONT_M, HALF_WIDTH_M, REAR_M
from eval_nuscenes.world.scene import Scene
from eval_nuscenes.world.storyline import KINDS
from eval_nuscenes.world.traffic import simulate_scene
from vla_autoprune.errors import InputError
from vla_autoprune.frame import Command

SEEDS = range(28)
EGO_MIDDLE_M, EGO_LENGTH_M = (FRONT_M - REAR_M) / 2, FRONT_M + REAR_M


@pytest.fixture(scope="module")
def drives() -> list[Scene]:
    return [simulate_scene(f"scene-{seed:04d}", seed, kind=KINDS[seed % len(KINDS)]) for seed in SEEDS]


def ego_table(scene: Scene) -> np.ndarray:
    """[states, 6] x, y, heading, speed, acceleration, yaw rate."""
    egos = [state.ego for state in scene.states]
    return np.array([(e.x, e.y, e.heading, e.speed_mps, e.acceleration_mps2, e.yaw_rate_rps) for e in egos])


def corners(x: float, y: float, heading: float, length: float, width: float) -> np.ndarray:
    ahead = np.array([math.cos(heading), math.sin(heading)]) * length / 2
    left = np.array([-math.sin(heading), math.cos(heading)]) * width / 2
    return np.array([x, y]) + np.array([ahead + left, ahead - left, -ahead - left, -ahead + left])


def overlap(one: np.ndarray, other: np.ndarray) -> bool:
    for box in (one, other):
        for axis in (box[1] - box[0], box[2] - box[1]):
            a, b = one @ axis, other @ axis
            if a.max() < b.min() or b.max() < a.min():
                return False
    return True


def collisions(scene: Scene) -> list[tuple[int, str]]:
    found = []
    for index, state in enumerate(scene.states):
        ego = state.ego
        x, y = (
            ego.x + EGO_MIDDLE_M * math.cos(ego.heading),
            ego.y + EGO_MIDDLE_M * math.sin(ego.heading),
        )
        box = corners(x, y, ego.heading, EGO_LENGTH_M, 2 * HALF_WIDTH_M)
        for other in state.actors:
            if math.hypot(other.x - x, other.y - y) < 9.0:
                actor = scene.actors[other.actor]
                if overlap(box, corners(other.x, other.y, other.heading, actor.length_m, actor.width_m)):
                    found.append((index, actor.name))
    return found


def digest(scene: Scene) -> str:
    return hashlib.sha256(pickle.dumps(scene, protocol=4)).hexdigest()


def test_same_seed_same_drive_in_every_process(repository: Path) -> None:
    here = digest(simulate_scene("scene-0007", 7, 5.0))
    code = (
        "import hashlib, pickle; from eval_nuscenes.world.traffic import simulate_scene;"
        "scene = simulate_scene('scene-0007', 7, 5.0);"
        "print(hashlib.sha256(pickle.dumps(scene, protocol=4)).hexdigest())"
    )
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(repository)}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
        assert run.stdout.decode().strip() == here
    assert digest(simulate_scene("scene-0007", 8, 5.0)) != here


def test_states_are_a_tenth_of_a_second_apart_and_complete(drives: list[Scene]) -> None:
    for scene in drives:
        assert len(scene.states) == 201
        assert [state.time_s for state in scene.states] == pytest.approx(np.arange(201) * 0.1)
        for state in scene.states:
            assert len(state.lights) == len(scene.map.lights)
            assert all(0 <= other.actor < len(scene.actors) for other in state.actors)
            assert len({other.actor for other in state.actors}) == len(state.actors)


def test_the_expert_drives_within_what_a_car_can_do(drives: list[Scene]) -> None:
    for scene in drives:
        ego = ego_table(scene)
        assert ego[:, 4].min() >= -6.0 and ego[:, 4].max() <= 3.0, scene.seed
        assert np.abs(ego[:, 3] * ego[:, 5]).max() <= 4.0, scene.seed
        assert ego[:, 3].min() >= 0.0


def test_poses_speeds_and_yaw_rates_agree(drives: list[Scene]) -> None:
    for scene in drives:
        ego = ego_table(scene)
        moved = np.diff(ego[:, :2], axis=0)
        mean_speed = (ego[1:, 3] + ego[:-1, 3]) / 2
        assert np.hypot(*moved.T) * 10 == pytest.approx(mean_speed, abs=0.15)
        turned = np.diff(np.unwrap(ego[:, 2]))
        assert turned * 10 == pytest.approx((ego[1:, 5] + ego[:-1, 5]) / 2, abs=0.12)
        middle = ego[:-1, 2] + turned / 2
        sideways = moved[:, 1] * np.cos(middle) - moved[:, 0] * np.sin(middle)
        assert np.abs(sideways).max() < 0.03, "the rear axle does not slip"


def test_the_expert_hits_nobody(drives: list[Scene]) -> None:
    assert {scene.seed: found for scene in drives if (found := collisions(scene))} == {}


@pytest.mark.slow
def test_the_expert_hits_nobody_in_many_drives() -> None:
    for seed in range(1000, 1060):
        scene = simulate_scene("scene-0001", seed)
        assert collisions(scene) == [], seed
        assert ego_table(scene)[:, 4].min() >= -6.0


def test_nobody_enters_a_junction_at_red(drives: list[Scene]) -> None:
    passed = 0
    for scene in drives:
        fronts = np.array([(s.ego.x, s.ego.y) for s in scene.states])
        fronts += FRONT_M * np.array(
            [(math.cos(s.ego.heading), math.sin(s.ego.heading)) for s in scene.states]
        )
        for number, light in enumerate(scene.map.lights):
            a, b = light.stop_line
            facing = np.array([math.cos(light.heading), math.sin(light.heading)])
            beyond = (fronts - a) @ facing < 0.0
            across = (fronts - a) @ (b - a) / ((b - a) @ (b - a))
            for index in np.flatnonzero(~beyond[:-1] & beyond[1:] & (across[1:] > 0) & (across[1:] < 1)):
                passed += 1
                assert scene.states[index].lights[number] in ("green", "amber"), (scene.seed, index)
    assert passed > 5


def test_route_and_command_tell_where_the_ego_goes(drives: list[Scene]) -> None:
    turned = set()
    for scene in drives:
        lanes = {lane.name: lane for lane in scene.map.lanes}
        for name, after in itertools.pairwise(scene.route):
            assert after in lanes[name].successors, scene.seed
        centrelines = np.concatenate([lanes[name].centreline for name in scene.route])
        ego = ego_table(scene)
        for x, y in ego[::20, :2]:
            assert np.hypot(*(centrelines - (x, y)).T).min() < 4.0
        for name in scene.route:
            line = lanes[name].centreline
            gaps = np.hypot(*(ego[:, :2] - line[0]).T)
            if not lanes[name].is_connector or gaps.min() > 2.0:
                continue
            first, last = line[1] - line[0], line[-1] - line[-2]
            sine = (first[0] * last[1] - first[1] * last[0]) / np.hypot(*first) / np.hypot(*last)
            command = Command.LEFT if sine > 0.9 else Command.RIGHT if sine < -0.9 else Command.STRAIGHT
            turned.add(command)
            assert scene.states[int(gaps.argmin())].command is command, (scene.seed, name)
    assert turned == set(Command)


def test_the_world_fits_its_box(drives: list[Scene]) -> None:
    for scene in drives:
        points = np.concatenate([lane.centreline for lane in scene.map.lanes])
        assert np.ptp(points, axis=0).max() < 1200.0


def test_kinds_have_what_they_are_named_after(drives: list[Scene]) -> None:
    def share(kind: str, has: object) -> float:
        return float(np.mean([has(scene) for scene in drives if scene.kind == kind]))

    assert share("light", lambda s: bool(s.map.lights)) == 1.0
    assert share("yield", lambda s: bool(s.map.yield_lines)) >= 0.75
    people = "human.pedestrian.adult"
    assert share("pedestrian", lambda s: any(a.category == people for a in s.actors)) == 1.0
    assert share("lead", lambda s: sum("vehicle" in a.category for a in s.actors) > 1) == 1.0


def test_braking_shows(drives: list[Scene]) -> None:
    states = [other for scene in drives for state in scene.states for other in state.actors]
    assert any(other.braking for other in states) and not all(other.braking for other in states)


def test_longer_drives_are_possible() -> None:
    scene = simulate_scene("scene-0003", 3, 60.0)
    assert scene.states[-1].time_s == pytest.approx(60.0)
    points = np.concatenate([lane.centreline for lane in scene.map.lanes])
    assert np.ptp(points, axis=0).max() < 1200.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("drive-1", 0), "scene-NNNN"),
        (("scene-0001", 0, 0.2), "1 to 60"),
        (("scene-0001", 0, 200.0), "1 to 60"),
        (("scene-0001", 0, 20.0, "rally"), "lane_change"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        simulate_scene(*arguments)
