"""Training scenes on disk and in memory: made once by worker processes, kept in shards, read at random."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vla_autoprune.errors import InputError
from vla_autoprune.files import write_whole
from vla_autoprune.frame import Command, EgoState
from vla_autoprune.models.driving_vla import DrivingVla
from vla_autoprune.models.prompt import SUFFIX_LENGTH
from vla_autoprune.models.training_data import TrainingScene
from vla_autoprune.progress import progress_bar

SHARD_SCENES = 64
COMMANDS: tuple[Command, ...] = tuple(Command)

SceneMaker = Callable[[int], TrainingScene]
"""A scene from a seed, always the same one; must be picklable."""


@dataclass(frozen=True)
class SceneStore:
    """Scenes ready for training, N of them, Q queries each.

    Attributes:
        images: per shard [n, 6, S, S, 3] uint8, memory-mapped; or one tensor on the accelerator.
        labels: [N, 6, patches, channels] float16.
        suffix_ids: [N, Q, suffix] int64 words of the queries.
        action_ids: [N, Q, actions] int64 what the expert does.
        waypoints: [N, Q, 6, 3] float32.
        speed_mps: [N, Q] float32.
        obstacles: [N, Q, 6, boxes, 5] float16, on the host.
        kinds: [N] situation of each scene.
    """

    images: list[NDArray[np.uint8]] | Tensor
    labels: Tensor
    suffix_ids: Tensor
    action_ids: Tensor
    waypoints: Tensor
    speed_mps: Tensor
    obstacles: NDArray[np.float16]
    kinds: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Where everything but the obstacles lies."""
        return self.labels.device

    def images_of(self, scenes: NDArray[np.integer], cameras: Sequence[int]) -> Tensor:
        """[B, cameras, S, S, 3] uint8 on the store's device."""
        if isinstance(self.images, Tensor):
            rows = torch.as_tensor(scenes, device=self.device)
            return self.images[rows[:, None], torch.as_tensor(list(cameras), device=self.device)]
        picked = [self.images[scene // SHARD_SCENES][scene % SHARD_SCENES] for scene in scenes]
        return torch.from_numpy(np.stack(picked)[:, list(cameras)])


def make_scenes(
    make: SceneMaker,
    first_seed: int,
    scenes: int,
    cache: Path,
    fingerprint: str,
    workers: int,
    what: str = "",
) -> list[Path]:
    """Make scenes with worker processes and keep them in shards; shards that exist are reused.

    Args:
        make: the world.
        first_seed: scene i has seed first_seed + i.
        scenes: how many; rounded up to whole shards of SHARD_SCENES.
        cache: directory of the shards.
        fingerprint: identifies the world's version; a cache of another version is refused.
        workers: processes; 1 works in this one.
        what: names the scenes in the progress bar.

    Returns:
        The shards' paths without suffix, in order.

    Raises:
        InputError: the cache was made by another world or with other seeds.
    """
    cache.mkdir(parents=True, exist_ok=True)
    note = cache / "scenes.json"
    described = {"world": fingerprint, "first_seed": first_seed, "shard_scenes": SHARD_SCENES}
    if note.exists():
        found = json.loads(note.read_text(encoding="utf-8"))
        if found != described:
            raise InputError(
                f"{note} describes other scenes ({found}) than wanted ({described}); "
                "name another --cache or delete that directory"
            )
    else:
        write_whole(note, (json.dumps(described) + "\n").encode())
    shards = [cache / f"shard_{index:05d}" for index in range(-(-scenes // SHARD_SCENES))]
    missing = [(index, shard) for index, shard in enumerate(shards) if not _labels_file(shard).exists()]
    if not missing:
        return shards
    with progress_bar() as progress:
        task = progress.add_task(f"making scenes {what}".strip(), total=len(missing) * SHARD_SCENES)
        if workers <= 1:
            for index, shard in missing:
                _make_shard(make, first_seed + index * SHARD_SCENES, shard)
                progress.advance(task, SHARD_SCENES)
            return shards
        # Spawned, not forked: the parent may hold CUDA or threads.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
            futures = [
                pool.submit(_make_shard, make, first_seed + index * SHARD_SCENES, shard)
                for index, shard in missing
            ]
            try:
                for future in as_completed(futures):
                    future.result()
                    progress.advance(task, SHARD_SCENES)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return shards


def load_scenes(shards: Sequence[Path], vla: DrivingVla, device: torch.device) -> SceneStore:
    """Read shards and turn queries into tokens.

    Args:
        shards: as `make_scenes` returns them.
        vla: whose prompt and actions the queries are written in.
        device: on "cuda" everything is held there, images included (0.17 MB a scene); else they stay on disk.

    Returns:
        The store.

    Raises:
        InputError: a shard cannot be read.
    """
    records = []
    images: list[NDArray[np.uint8]] = []
    for shard in shards:
        try:
            with np.load(_labels_file(shard)) as record:
                records.append({name: record[name] for name in record.files})
            images.append(np.load(_images_file(shard), mmap_mode="r"))
        except (OSError, ValueError) as error:
            raise InputError(f"{shard} cannot be read ({error}); delete it, it is made anew") from error
    table = {name: np.concatenate([record[name] for record in records]) for name in records[0]}
    suffix_ids = np.empty((*table["ego"].shape[:2], SUFFIX_LENGTH), dtype=np.int64)
    for place in np.ndindex(*table["ego"].shape[:2]):
        speed, acceleration, yaw_rate = (float(value) for value in table["ego"][place])
        command = COMMANDS[int(table["command"][place])]
        suffix_ids[place] = vla.prompt.suffix(EgoState(speed, acceleration, yaw_rate), command)
    held: list[NDArray[np.uint8]] | Tensor = images
    if device.type == "cuda":
        held = torch.empty((len(table["ego"]), *images[0].shape[1:]), dtype=torch.uint8, device=device)
        for index, shard_images in enumerate(images):
            start = index * SHARD_SCENES
            held[start : start + len(shard_images)] = torch.from_numpy(np.array(shard_images)).to(device)
    labels = table["labels"]
    return SceneStore(
        images=held,
        labels=torch.from_numpy(labels.reshape(*labels.shape[:2], -1, labels.shape[-1])).to(device),
        suffix_ids=torch.from_numpy(suffix_ids).to(device),
        action_ids=torch.from_numpy(vla.codec.encode(table["waypoints"])).to(device),
        waypoints=torch.from_numpy(table["waypoints"]).to(device),
        speed_mps=torch.from_numpy(table["ego"][..., 0]).to(device),
        obstacles=table["obstacles"],
        kinds=table["kind"],
    )


def _make_shard(make: SceneMaker, first_seed: int, shard: Path) -> None:
    scenes = [make(first_seed + index) for index in range(SHARD_SCENES)]
    queries = [scene.queries for scene in scenes]
    images = np.stack([scene.images for scene in scenes])
    table: dict[str, NDArray[Any]] = {
        "labels": np.stack([scene.patch_labels for scene in scenes]).astype(np.float16),
        "ego": np.array(
            [
                [(q.ego.speed_mps, q.ego.acceleration_mps2, q.ego.yaw_rate_rps) for q in some]
                for some in queries
            ],
            dtype=np.float32,
        ),
        "command": np.array([[COMMANDS.index(q.command) for q in some] for some in queries], dtype=np.int8),
        "waypoints": np.array([[q.waypoints_in_ego for q in some] for some in queries], dtype=np.float32),
        "obstacles": np.array([[q.obstacles for q in some] for some in queries], dtype=np.float16),
        "kind": np.array([scene.kind for scene in scenes]),
    }
    write_whole(_images_file(shard), lambda file: np.save(file, images))
    # Written last: its presence says that the shard is whole.
    write_whole(_labels_file(shard), lambda file: np.savez_compressed(file, **table))


def _images_file(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}_images.npy")


def _labels_file(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.npz")


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
