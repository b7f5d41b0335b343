import json
from pathlib import Path

import pytest
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
        ("--stages", "1,2", "'1,2'; give three counts"),
        ("--stages", "1,2,many", "'1,2,many'; expected values separated by commas"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, option: str, value: str, named: str) -> None:
    with pytest.raises(InputError, match=named):
        train(tmp_path / "out", option, value)
    assert not (tmp_path / "out").exists()
