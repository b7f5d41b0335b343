"""A small drive made up in memory, and a planner that pretends to prune."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from eval_nuscenes.evaluation import PlanLog, RunKey, SampleRecord, Variant, plan_samples
from eval_nuscenes.metrics import OpenLoopTruth, TrackedBox
from eval_nuscenes.nuscenes_reader import CameraView, Sample
from eval_nuscenes.summary import Conditions, EvaluationSummary, SampleScores, score_sample, summarise
from vla_autoprune.errors import PlanError
from vla_autoprune.frame import CAMERAS, WAYPOINT_TIMES_S, Command, EgoState, Frame, Plan
from vla_autoprune.recipe import PromptLayout, PruningRecipe

LIDAR_MOUNT = np.array(
    [[0.0, 1.0, 0.0, 0.94], [-1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.84], [0.0, 0.0, 0.0, 1.0]]
)
CAMERA_MOUNT = np.array(
    [[0.0, 0.0, 1.0, 1.7], [-1.0, 0.0, 0.0, 0.0], [0.0, -1.0, 0.0, 1.5], [0.0, 0.0, 0.0, 1.0]]
)
YAWS = dict(zip(CAMERAS, np.radians([55, 0, -55, 110, 180, -110]), strict=True))
TOKENS_PER_CAMERA = 36
LAYERS = 8


@dataclass(frozen=True)
class Drive:
    """Stands in for a NuScenesSplit."""

    samples: tuple[Sample, ...]
    data_hash: str = "d" * 64
    command_source: str = "route"

    @property
    def tokens(self) -> tuple[str, ...]:
        return tuple(sample.token for sample in self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def check_images(self, cameras: tuple[str, ...]) -> None:
        assert cameras == CAMERAS

    def description(self, scene: str) -> str:
        return "Night, parked cars" if scene == "scene-0002" else "Turn right, rain"

    def drivable_area(self, sample: Sample) -> tuple[np.ndarray, ...]:
        return (np.array([[-60.0, -6.0], [60.0, -6.0], [60.0, 6.0], [-60.0, 6.0]]),)


@dataclass(frozen=True)
class PretendPlanner:
    """Drives straight, worse the smaller its budget; seeded by the frame."""

    budget: float | None = None
    policy: str = "autoprune"
    fails_on: str = ""
    calls: list[str] | None = None

    def plan(self, frame: Frame) -> Plan:
        if self.calls is not None:
            self.calls.append(f"{self.policy} {self.budget} {frame.token}")
        if frame.token == self.fails_on:
            raise PlanError("action token 3 is no action")
        generator = np.random.default_rng(zlib.crc32(f"{frame.token} {self.budget} {self.policy}".encode()))
        budget = self.budget or 1.0
        sees = float(np.ptp(frame.images["CAM_FRONT"]) > 0)
        error = (1 - budget) * (1.0 if self.policy == "autoprune" else 2.0) + 0.3 + 4 * (1 - sees)
        times = np.asarray(WAYPOINT_TIMES_S)
        x = frame.ego.speed_mps * times + error * generator.normal() * times / 3
        y = 0.3 * error * generator.normal() * times**2 / 9
        visual = TOKENS_PER_CAMERA * len(CAMERAS)
        counts = (
            [visual] * 2 + [round(visual * (budget * LAYERS - 2) / 6)] * 6
            if self.budget
            else [visual] * LAYERS
        )
        order = generator.permutation(visual)
        later = 9.0 * budget + generator.random()
        time.sleep(0.001 * budget)
        return Plan(
            waypoints_in_ego=np.column_stack([x, y, np.zeros(6)]),
            times_s=WAYPOINT_TIMES_S,
            text="a plan",
            bucket=f"b{budget:.0%}_s{generator.integers(2)}".replace("%", "") if self.budget else "full",
            complexity=float(4 + generator.normal()) if self.budget else None,
            visual_tokens_into_layers=tuple(counts),
            kept_visual=(
                np.arange(visual),
                np.sort(order[: counts[2]]),
                np.sort(order[: max(1, counts[2] // 2)]),
            ),
            work_fraction=float(np.mean(counts) / visual),
            kv_mib=1.6 * float(np.mean(counts) / visual),
            timings_ms={
                "preprocess": 2.0,
                "vision": 9.0,
                "stage_00": 4.0,
                "select_00": 0.1,
                "stage_01": later,
                "prefill": 4.1 + later,
                "decode_stage_00": 6.0,
                "decode": 6.0,
                "total": 31.5 + 9.0 * budget + generator.random(),
            },
        )


def _camera(path: Path, name: str) -> CameraView:
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(YAWS[name]), -np.sin(YAWS[name])], [np.sin(YAWS[name]), np.cos(YAWS[name])]]
    intrinsics = np.array([[126.6, 0.0, 80.0], [0.0, 126.6, 45.0], [0.0, 0.0, 1.0]])
    return CameraView(path, 160, 90, intrinsics, turn @ CAMERA_MOUNT)


def _sample(scene: int, index: int, keyframes: int, images: Path) -> Sample:
    speed = 4.0 + 2 * scene
    times = np.asarray(WAYPOINT_TIMES_S)
    exists = index + np.arange(1, 7) < keyframes
    future = np.column_stack([speed * times, 0.05 * scene * times**2, np.arctan2(0.1 * scene * times, speed)])
    future[~exists] = 0
    lead = TrackedBox(0.0, 14.0, 4.6, 1.9, np.pi / 2, "vehicle.car", "lead")
    walker = TrackedBox(-4.5, 9.0, 0.7, 0.7, 0.0, "human.pedestrian.adult", "walker")
    truth = OpenLoopTruth(
        waypoints=np.zeros((6, 2), dtype=np.float32),
        exists=(True, *exists.tolist()),
        boxes=tuple((lead, walker) if step == 0 or exists[step - 1] else () for step in range(7)),
        past_keyframes=index,
    )
    sample = Sample(
        token=f"s{scene}k{index}",
        scene=f"scene-{scene:04d}",
        location="boston-seaport",
        stamp_s=0.5 * index,
        cameras={name: _camera(images / f"{name}.jpg", name) for name in CAMERAS},
        ego=EgoState(speed),
        ego_source="can_bus",
        command=Command.STRAIGHT,
        history_in_ego=np.column_stack([-speed * np.array([0.5]), [0.0], [0.0]]),
        future_in_ego=future,
        future_exists=exists,
        truth=truth,
        ego_from_lidar=LIDAR_MOUNT,
        ego_pose=np.eye(4),
    )
    truth.waypoints[exists] = sample.lidar_waypoints(future)[exists]
    return sample


@pytest.fixture(scope="session")
def make_drive(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Drive]:
    images = tmp_path_factory.mktemp("images")
    shades = np.linspace(60, 200, 90, dtype=np.uint8)[:, None, None]
    for number, name in enumerate(CAMERAS):
        image = np.broadcast_to(shades, (90, 160, 3)).copy()
        cv2.rectangle(image, (20 + 10 * number, 40), (70 + 10 * number, 70), (40, 90, 180), -1)
        cv2.imwrite(str(images / f"{name}.jpg"), image)

    def make(scenes: int = 3, keyframes: int = 9) -> Drive:
        return Drive(
            tuple(
                _sample(scene, index, keyframes, images)
                for scene in range(scenes)
                for index in range(keyframes)
            )
        )

    return make


@dataclass(frozen=True)
class Evaluated:
    """A drive that was planned, scored and summed up."""

    drive: Drive
    variants: Sequence[Variant]
    records: Sequence[SampleRecord]
    scored: Sequence[SampleScores]
    summary: EvaluationSummary


@pytest.fixture(scope="session")
def run_key() -> RunKey:
    return RunKey(
        planned_by="bundle " + "feed" * 16,
        data_hash="da7a" * 16,
        variants=("full",),
        command_source="future",
        code="c0de" * 16,
        machine="a box",
        versions={"python": "3.11"},
    )


@pytest.fixture(scope="session")
def evaluated(run_key: RunKey, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Evaluated]:
    """Plan, score and sum up a drive with some variants."""

    def run(
        drive: Drive,
        variants: Sequence[Variant],
        recipes: Mapping[str, PruningRecipe] | None = None,
        **options: Any,
    ) -> Evaluated:
        log = PlanLog(tmp_path_factory.mktemp("run"), run_key)
        records = list(plan_samples(drive, variants, log, warm_up=0))
        scored = [
            score_sample(sample, record, description=drive.description(sample.scene), **options)
            for sample, record in zip(drive.samples, records, strict=True)
        ]
        conditions = Conditions(
            key=run_key,
            source="bundle out/bundle",
            command="vla-autoprune evaluate <bundle>",
            data_root="data",
            version="v1.0-synth",
            split="val",
            samples=len(drive),
            samples_asked=len(drive),
            samples_in_split=len(drive),
            scenes=len({sample.scene for sample in drive.samples}),
            ego_sources={"can_bus": len(drive)},
            warm_up=0,
        )
        summary = summarise(variants, records, scored, conditions, recipes)
        return Evaluated(drive, variants, records, scored, summary)

    return run


@pytest.fixture(scope="session")
def six_camera_layout() -> PromptLayout:
    spans: list = [("text", 1)]
    for camera in CAMERAS:
        spans += [("text", 1), ("visual", camera, TOKENS_PER_CAMERA)]
    return PromptLayout(segments=(*spans, ("text", 6)), image_size=(96, 96))


@pytest.fixture(scope="session")
def pretend_planner() -> type[PretendPlanner]:
    return PretendPlanner
