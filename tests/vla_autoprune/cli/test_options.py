from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from vla_autoprune.cli import app
from vla_autoprune.cli.options import PolicyName, comma_list, finite, require_directory, require_file
from vla_autoprune.errors import InputError
from vla_autoprune.runtime.planner import POLICIES


def test_lists_keep_their_order() -> None:
    assert comma_list("--budgets", "0.25, 0.6", finite, "0.6,0.4") == [0.25, 0.6]
    assert comma_list("--points", "3", int, "1,3") == [3]


@pytest.mark.parametrize("text", ["", ",", "0.6,", "0.6,half", "nan", "inf"])
def test_lists_with_a_hole_or_a_stranger_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"--budgets is '{text}'; expected values .* like 0.6,0.4"):
        comma_list("--budgets", text, finite, "0.6,0.4")


def test_places_that_can_be_written_are_taken_and_left_alone(tmp_path: Path) -> None:
    require_directory("--out", tmp_path)
    require_directory("--out", tmp_path / "deep" / "new")
    require_file("--out", tmp_path / "deep" / "new.json")
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(InputError, match=r"--out .*file is a file; give a directory"):
            require_directory("--out", path)
    with pytest.raises(InputError, match="is a directory; give the name of a file"):
        require_file("--out", tmp_path)
    with pytest.raises(InputError, match="file is a file"):
        require_file("--out", tmp_path / "file" / "recipe.json")


def test_the_policies_are_those_of_the_planner() -> None:
    assert {policy.value for policy in PolicyName} == set(POLICIES)


@pytest.mark.parametrize(
    ("command", "option", "choices"),
    [
        ("calibrate", "--reduction", "mean|max"),
        ("calibrate", "--command-source", "route|future"),
        ("evaluate", "--command-source", "route|future"),
        ("predict", "--policy", "autoprune|fixed|random|uniform"),
        ("train", "--device", "auto|cpu|cuda"),
    ],
)
def test_choices_are_listed_and_others_refused(command: str, option: str, choices: str) -> None:
    runner = CliRunner(env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
    assert choices in runner.invoke(app, [command, "--help"]).output
    required = {
        "calibrate": ["--data", "d"],
        "evaluate": ["bundle", "--data", "d"],
        "predict": ["bundle", "--images", "i", "--speed", "1"],
        "train": ["--out", "o"],
    }
    refused = runner.invoke(app, [command, *required[command], option, "other"])
    assert refused.exit_code == 2 and "is not one of" in refused.output


@pytest.mark.parametrize("command", ["calibrate", "evaluate"])
def test_a_limit_of_nothing_is_refused(command: str) -> None:
    arguments = [*(["bundle"] if command == "evaluate" else []), "--data", "d", "--limit", "0"]
    assert CliRunner().invoke(app, [command, *arguments]).exit_code == 2
