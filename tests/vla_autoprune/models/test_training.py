import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_autoprune.errors import InputError
from vla_autoprune.models.driving_vla import DrivingVla, ModelSize, build_model
from vla_autoprune.models.held_out import HeldOut, RankTest, overlaps, paired_test, schedule_counts
from vla_autoprune.models.scene_store import load_scenes, make_scenes
from vla_autoprune.models.training import Trainer, TrainingOptions

OPTIONS = TrainingOptions(
    batch=8, tower_scenes=32, front_scenes=80, surround_scenes=48, prune_budgets=(0.5,), prune_after=0.0
)
MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer(small_vla: DrivingVla, toy_shards: list[Path]) -> MakeTrainer:
    def make(out: Path, options: TrainingOptions = OPTIONS, vla: DrivingVla = small_vla) -> Trainer:
        store = load_scenes(toy_shards, vla, torch.device("cpu"))
        return Trainer(vla, store, HeldOut(store, 16, batch=8), out, options, say=lambda line: None)

    return make


def test_a_short_training_lowers_every_loss_and_leaves_a_model(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path / "out")
    assert trainer.run(evaluations=1)
    report = trainer.finish(rank_tests=False)
    losses = report["losses"]
    tower = [entry["loss"] for entry in losses if entry["stage"] == "tower"]
    drive = [entry["drive"] for entry in losses if entry.get("drive")]
    assert tower[-1] < tower[0]
    assert drive[-1] < drive[0] - 0.3
    assert {"drive", "drive_pruned"} <= {name for entry in losses for name in entry}
    assert set(report["held_out"]) == {"model", "images blanked", "constant velocity"}
    assert json.loads((tmp_path / "out" / "training.json").read_text())["parameters"] == report["parameters"]
    assert (tmp_path / "out" / "model" / "model.safetensors").stat().st_size > 0


@pytest.mark.parametrize("installed", [True, False])
def test_curves_are_drawn_or_their_absence_is_told(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    trainer = make_trainer(tmp_path)
    said: list[str] = []
    trainer.say = said.append
    if not installed:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    trainer.finish(rank_tests=False)
    assert (tmp_path / "curves.png").is_file() == installed
    drawn, missing = f"curves in {tmp_path / 'curves.png'}", "curves.png is not drawn: that needs pip install"
    assert (drawn in said, any(missing in line for line in said)) == (installed, not installed)


def test_twenty_steps_on_one_batch_lower_the_loss(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    options = dataclasses.replace(
        OPTIONS, batch=64, tower_scenes=0, front_scenes=20 * 64, surround_scenes=0, learning_rate=5e-3
    )
    trainer = make_trainer(tmp_path, options)
    trainer.run(evaluations=0)
    losses = [entry["drive"] for entry in trainer.progress.losses]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 1.0


def test_interrupted_and_resumed_is_the_same_training(
    make_trainer: MakeTrainer, small_size: ModelSize, tmp_path: Path
) -> None:
    whole = make_trainer(tmp_path / "whole")
    whole.run(evaluations=0)
    stops = 0
    while True:
        trainer = make_trainer(tmp_path / "parts", vla=build_model(small_size))
        assert trainer.resume() is (stops > 0)
        if trainer.run(max_minutes=0.0, evaluations=0):  # time is up after every step
            break
        stops += 1
    assert stops >= 10
    assert [entry["loss"] for entry in trainer.progress.losses] == [e["loss"] for e in whole.progress.losses]
    for name, tensor in whole.vla.model.state_dict().items():
        assert torch.equal(tensor, trainer.vla.model.state_dict()[name])


def test_a_checkpoint_of_other_options_is_refused(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(tmp_path).run(max_minutes=0.0, evaluations=0)
    other = make_trainer(tmp_path, dataclasses.replace(OPTIONS, learning_rate=0.5))
    with pytest.raises(InputError, match=r"learning_rate = 0\.0013, now it is 0\.5"):
        other.resume()
    trainer = make_trainer(tmp_path)
    trainer.checkpoint.write_bytes(b"half")
    with pytest.raises(InputError, match="cannot be read"):
        trainer.resume()


def test_scenes_of_another_world_are_not_reused(toy_shards: list[Path]) -> None:
    with pytest.raises(InputError, match="other scenes"):
        make_scenes(lambda seed: None, 0, 64, toy_shards[0].parent, "another world", workers=1)  # type: ignore[arg-type, return-value]


def test_a_ranking_that_matters_is_told_from_chance(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path)
    held_out = trainer.held_out
    drive = HeldOut.drive

    def pretend(self: HeldOut, vla: DrivingVla, cameras=(), pruning=None, blank=False, seed=0):
        judged = self.constant_velocity()
        lost = 0.0 if pruning is None else {"attention": 0.5, "random": 2.0}[pruning.ranking]
        noise = np.random.default_rng(seed).normal(0.0, 0.3, judged.l2_m.shape)
        return dataclasses.replace(judged, l2_m=judged.l2_m + lost + noise)

    monkeypatch.setattr(HeldOut, "drive", pretend)
    test, _ = held_out.rank_test(trainer.vla, (0, 2), (12, 6))
    assert test.budget == pytest.approx((24 + 2 * 12 + 6) / (4 * 24))
    assert test.p_value < 0.001
    assert 1.2 < test.gain_interval_m[0] < test.gain_m < test.gain_interval_m[1] < 1.8
    monkeypatch.setattr(HeldOut, "drive", drive)
    (real,) = held_out.rank_test(trainer.vla, (0, 2), (12, 6), reductions=("max",))
    assert real.random_m > 0
    assert 0 < real.p_value <= 1


def test_no_difference_is_not_significant() -> None:
    low, high, p_value = paired_test(np.random.default_rng(5).normal(0.0, 1.0, 200))
    assert low < 0 < high
    assert p_value > 0.05


def test_schedules_meet_their_budget() -> None:
    points = (0, 2)
    kept = schedule_counts(216, 8, points, 0.25)
    into = [216] + [kept[0]] * 2 + [kept[1]] * 5
    assert sum(into) / (8 * 216) == pytest.approx(0.25, abs=0.01)


def test_whole_schedules_use_only_layers_that_beat_chance(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With layer 2 no better than random, the schedules drop tokens after layer 0 alone."""

    def rank_test(
        self: HeldOut, vla: object, points: tuple[int, ...], kept: tuple[int, ...], reductions: object = ()
    ) -> tuple[RankTest, ...]:
        gain, p_value = (0.5, 0.001) if points == (0,) else (0.01, 0.6)
        return (RankTest(points, kept, 0.5, "mean", 1.0, 1.0, 1.0 + gain, gain, (0.0, 1.0), p_value),)

    monkeypatch.setattr(HeldOut, "rank_test", rank_test)
    trainer = make_trainer(tmp_path)
    tests = trainer.held_out.rank_tests(trainer.vla)
    *alone, half, quarter = [test.points for test in tests]
    assert len(alone) > 1
    assert alone[0] == half == quarter == (0,)


def test_boxes_overlap_where_they_do() -> None:
    plans = np.zeros((1, 6, 3))
    boxes = np.full((1, 6, 2, 5), np.nan)
    boxes[0, :, 0] = [
        (1.35, 0.0, 0.3, 4.0, 2.0),  # on top of the car
        (1.35, 2.0, 0.0, 4.0, 2.0),  # beside it, 7 cm apart
        (1.35, 1.8, 0.0, 4.0, 2.0),  # beside it, touching
        (6.5, 0.0, np.pi / 2, 4.0, 2.0),  # ahead, across
        (4.2, 1.9, np.pi / 4, 4.0, 2.0),  # a corner of it
        (np.nan,) * 5,
    ]
    assert overlaps(plans, boxes).tolist() == [[True, False, True, False, True, False]]
