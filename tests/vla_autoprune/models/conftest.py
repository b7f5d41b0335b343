"""A toy world with one lesson: brake for a red bar in the front image, the harder the lower it is."""

import numpy as np
import pytest

from vla_autoprune.frame import CAMERAS, Command, EgoState
from vla_autoprune.models.driving_vla import DrivingVla, ModelSize, build_model
from vla_autoprune.models.training_data import PATCH_CHANNELS, Query, TrainingScene

FRONT = CAMERAS.index("CAM_FRONT")
SMALL = ModelSize(image_size=32, width=32, layers=4, heads=2, kv_heads=1, feed_forward=48, tower_layers=1)


def toy_scene(seed: int) -> TrainingScene:
    random = np.random.default_rng(seed)
    images = random.integers(80, 140, (6, 32, 32, 3)).astype(np.uint8)
    labels = np.zeros((6, 2, 2, len(PATCH_CHANNELS)), dtype=np.float32)
    labels[..., PATCH_CHANNELS.index("road")] = random.random((6, 2, 2))
    stop_m = float(random.uniform(4.0, 30.0))
    row = round(28 - 24 * stop_m / 30.0)
    images[FRONT, row : row + 4, 4:28] = (240, 10, 10)
    labels[FRONT, row // 16, :, PATCH_CHANNELS.index("vehicle")] = 0.25
    queries = []
    for command in (Command.LEFT, Command.STRAIGHT, Command.RIGHT, Command.STRAIGHT):
        speed = float(random.uniform(4.0, 10.0))
        times = np.arange(1, 7) * 0.5
        deceleration = speed**2 / (2 * stop_m)
        travelled = np.where(
            times < speed / deceleration,
            speed * times - deceleration * times**2 / 2,
            speed**2 / 2 / deceleration,
        )
        waypoints = np.stack([travelled, np.zeros(6), np.zeros(6)], axis=1).astype(np.float32)
        queries.append(Query(EgoState(speed), command, waypoints))
    return TrainingScene(images, labels, tuple(queries), "stop")


@pytest.fixture(scope="session")
def toy_shards(tmp_path_factory: pytest.TempPathFactory) -> list:
    from vla_autoprune.models.scene_store import make_scenes

    return make_scenes(toy_scene, 0, 64, tmp_path_factory.mktemp("toy"), "toy world", workers=1)


@pytest.fixture
def small_size() -> ModelSize:
    return SMALL


@pytest.fixture
def small_vla(small_size: ModelSize) -> DrivingVla:
    import torch

    torch.set_num_threads(1)
    return build_model(small_size)
