from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eval_nuscenes.world.render import LABELS, PEDESTRIAN_LABEL, RIG, VEHICLE_LABEL, render_with_labels
from eval_nuscenes.world.snapshots import patch_labels, training_scene
from eval_nuscenes.world.storyline import KINDS
from eval_nuscenes.world.traffic import simulate_scene
from vla_autoprune.frame import CAMERAS, WAYPOINT_TIMES_S, Command
from vla_autoprune.models.training_data import PATCH_CHANNELS, QUERIES_PER_SCENE, TrainingScene

SEEDS = range(60)
TIMES = np.array(WAYPOINT_TIMES_S)


@pytest.fixture(scope="module")
def scenes() -> list[TrainingScene]:
    return [training_scene(seed) for seed in SEEDS]


def digest(scene: TrainingScene) -> str:
    hashed = hashlib.sha256(scene.images.tobytes() + scene.patch_labels.tobytes() + scene.kind.encode())
    for query in scene.queries:
        hashed.update(query.waypoints_in_ego.tobytes() + query.obstacles.tobytes())
        hashed.update(repr((query.ego, query.command)).encode())
    return hashed.hexdigest()


def test_shapes_and_types(scenes: list[TrainingScene]) -> None:
    for scene in scenes:
        assert scene.images.shape == (6, 96, 96, 3) and scene.images.dtype == np.uint8
        assert scene.patch_labels.shape == (6, 6, 6, len(PATCH_CHANNELS))
        assert scene.patch_labels.dtype == np.float32
        assert len(scene.queries) == QUERIES_PER_SCENE
        assert scene.kind in KINDS
        for query in scene.queries:
            assert query.waypoints_in_ego.shape == (6, 3) and query.waypoints_in_ego.dtype == np.float32
            assert np.isfinite(query.waypoints_in_ego).all()
            assert 0.0 <= query.ego.speed_mps < 16.0
            assert isinstance(query.command, Command)


def test_same_seed_same_bytes_in_every_process(scenes: list[TrainingScene], repository: Path) -> None:
    assert digest(training_scene(5)) == digest(scenes[5])
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import test_snapshots as here; print(here.digest(here.training_scene(5)))"
    )
    path = os.pathsep.join([str(repository), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONHASHSEED": "3", "PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, "-c", code, path], env=environment, capture_output=True, check=True, cwd=repository
    )
    assert run.stdout.decode().strip() == digest(scenes[5])


@pytest.mark.parametrize("seed", [3, 11])
def test_a_snapshot_is_a_keyframe_of_the_drive_with_its_seed(seed: int) -> None:
    snapshot, drive = training_scene(seed), simulate_scene("scene-0001", seed)
    assert snapshot.kind == drive.kind
    query = snapshot.queries[0]
    matches = [
        index
        for index in range(0, 171, 5)
        if drive.states[index].ego.speed_mps == query.ego.speed_mps
        and drive.states[index].ego.acceleration_mps2 == query.ego.acceleration_mps2
    ]
    assert matches
    for index in matches:
        images, labels = render_with_labels(drive, index, RIG, 96, 96)
        if all(np.array_equal(images[name], snapshot.images[k]) for k, name in enumerate(CAMERAS)):
            break
    else:
        pytest.fail("no keyframe of the drive looks like the snapshot")
    assert np.array_equal(patch_labels(np.stack(list(labels.values())), 6), snapshot.patch_labels)
    start = drive.states[index].ego
    assert query.command is drive.states[index].command
    assert query.ego.yaw_rate_rps == pytest.approx(start.yaw_rate_rps)
    cos, sin = math.cos(start.heading), math.sin(start.heading)
    for step, waypoint in enumerate(query.waypoints_in_ego, start=1):
        later = drive.states[index + 5 * step].ego
        dx, dy = later.x - start.x, later.y - start.y
        turned = math.remainder(later.heading - start.heading, 2 * math.pi)
        assert waypoint == pytest.approx((dx * cos + dy * sin, dy * cos - dx * sin, turned), abs=1e-4)


def test_patch_labels_are_what_the_pixels_show() -> None:
    labels = np.zeros((1, 96, 96), dtype=np.uint8)
    labels[0, :16, :16] = LABELS.index("road")
    labels[0, 16:32, 0:8] = VEHICLE_LABEL + 20
    labels[0, 16:20, 8:12] = PEDESTRIAN_LABEL + 5
    labels[0, 80:, 80:] = LABELS.index("light_red")
    patches = patch_labels(labels, 6)
    shares = {name: patches[0, ..., index] for index, name in enumerate(PATCH_CHANNELS)}
    assert shares["road"][0, 0] == 1.0
    assert shares["vehicle"][1, 0] == pytest.approx(0.5)
    assert shares["pedestrian"][1, 0] == pytest.approx(16 / 256)
    assert shares["inverse_distance"][1, 0] == pytest.approx(10 / 5)
    assert shares["light_red"][5, 5] == 1.0
    assert patches.sum() == pytest.approx(1.0 + 0.5 + 16 / 256 + 2.0 + 1.0)


def test_labels_of_all_kinds_occur(scenes: list[TrainingScene]) -> None:
    seen = np.max([scene.patch_labels.max(axis=(0, 1, 2)) for scene in scenes], axis=0)
    assert dict(zip(PATCH_CHANNELS, seen > 0.01, strict=True)) == dict.fromkeys(PATCH_CHANNELS, True)


def test_the_future_cannot_be_told_from_the_ego_alone(scenes: list[TrainingScene]) -> None:
    def constant_velocity(queries: list) -> float:
        errors = [
            np.hypot(q.waypoints_in_ego[:, 0] - q.ego.speed_mps * TIMES, q.waypoints_in_ego[:, 1])[-1]
            for q in queries
        ]
        return float(np.mean(errors))

    assert constant_velocity([scene.queries[0] for scene in scenes]) > 3.5
    assert constant_velocity([query for scene in scenes for query in scene.queries]) > 4.0


def test_further_queries_ask_about_other_speeds_and_commands(scenes: list[TrainingScene]) -> None:
    speeds = [len({round(query.ego.speed_mps, 3) for query in scene.queries}) for scene in scenes]
    assert np.mean(speeds) > 3.0
    assert any(len({query.command for query in scene.queries}) > 1 for scene in scenes)


def test_imagined_futures_can_be_driven(scenes: list[TrainingScene]) -> None:
    for scene in scenes:
        for query in scene.queries:
            path = np.concatenate([np.zeros((1, 3)), query.waypoints_in_ego])
            steps = np.hypot(*np.diff(path[:, :2], axis=0).T)
            speeds = np.concatenate([[query.ego.speed_mps], steps / 0.5])
            changes = np.diff(speeds) / 0.5
            # The first interval's mean speed lies a quarter of a second after the start.
            assert changes.min() > -7.0 and changes.max() < 3.5
            turned = np.abs(np.diff(path[:, 2]))
            assert (turned * steps / 0.25).max() < 4.5


def test_image_size_must_fit_patches() -> None:
    assert training_scene(0, 128).patch_labels.shape[:3] == (6, 8, 8)
    with pytest.raises(ValueError, match="100"):
        training_scene(0, 100)


def test_training_data_needs_no_learning_or_mapping_library(repository: Path) -> None:
    code = (
        "import sys, eval_nuscenes.world.snapshots\n"
        "heavy = ('torch', 'transformers', 'shapely', 'nuscenes', 'matplotlib')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, check=True,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )  # fmt: skip
    assert run.stdout.decode().strip() == "[]"
