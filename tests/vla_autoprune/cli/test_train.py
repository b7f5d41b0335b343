import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

from typer.testing import CliRunner

from vla_autoprune.cli import app
from vla_autoprune.errors import InputError

SMALL = ("--scenes=64", "--held-out=16", "--workers=1", "--threads=1", "--width=32", "--layers=4")


def train(out: Path, *more: str) -> str:
    done = CliRunner().invoke(app, ["train", "--out", str(out), *SMALL, *more], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


@pytest.mark.slow
def test_training_stops_when_told_goes_on_and_leaves_a_model(tmp_path: Path) -> None:
    how = ("--stages", "64,64,64", "--no-rank-tests", "--evaluations", "1")
    stopped = train(tmp_path, *how, "--max-minutes", "0")
    assert "the same command goes on" in stopped
    finished = train(tmp_path, *how)
    assert "going on from" in finished
    for driver in ("model", "images blanked", "constant velocity"):
        assert driver in finished
    report = json.loads((tmp_path / "training.json").read_text())
    assert report["held_out_scenes"] == 16
    assert (tmp_path / "model" / "tokenizer.json").exists()
    from vla_autoprune.models.driving_vla import load_model

    again = tmp_path / "again"
    start = ("--start-from", str(tmp_path / "model"), "--cache", str(tmp_path / "scenes"))
    train(again, "--stages", "0,0,16", "--no-rank-tests", "--evaluations", "0", *start)
    assert load_model(again / "model").decoder_config.hidden_size == 32


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--stages", "1,2", "'1,2'; expected three counts"),
        ("--stages", "0,0,0", "'0,0,0'; expected three counts of scenes, not all 0"),
        ("--stages", "1,2,many", "'1,2,many'; expected values separated by commas"),
        ("--width", "100", "--width 100: expected a multiple of 8, .* such as 96"),
        ("--start-from", "absent", "absent"),
    ],
)
def test_bad_options_are_named_before_scenes_are_made(
    tmp_path: Path, option: str, value: str, named: str
) -> None:
    with pytest.raises(InputError, match=named):
        train(tmp_path / "out", option, value)
    assert not (tmp_path / "out").exists()


def test_all_bad_options_are_named_together(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--cache .*file is a file; .*; --stages is .*; --width 100"):
        train(tmp_path / "out", "--cache", str(tmp_path / "file"), "--stages", "1", "--width", "100")


def test_a_size_other_than_the_started_model_s_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--width 64: the model of --start-from .* has 32"):
        train(tmp_path / "out", "--start-from", str(model), "--width", "64")
    assert not (tmp_path / "out").exists()
