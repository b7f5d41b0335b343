from __future__ import annotations

import errno
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vla_autoprune.cli import app, main
from vla_autoprune.cli.options import (
    PolicyName,
    comma_list,
    finite,
    gathered,
    refuse,
    require_directory,
    require_file,
    told_when_interrupted,
)
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
    with pytest.raises(InputError, match="--out /dev/null is a device or pipe; give the name of a file"):
        require_file("--out", Path("/dev/null"))
    with pytest.raises(InputError, match=r"--out .*recipe\.json: .*file is a file"):
        require_file("--out", tmp_path / "file" / "recipe.json")


def test_paths_with_brackets_are_printed_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "drive [" / "b]"
    folder.mkdir(parents=True)
    recipe = Path(__file__).parents[2] / "data" / "tiny_bundle" / "recipe.json"
    shutil.copy(recipe, folder / "[bold].json")
    for command in ("check", "show"):
        done = CliRunner().invoke(app, ["recipe", command, str(folder / "[bold].json")])
        assert done.exit_code == 0, done.exception
        assert "drive [/b]/[bold].json" in done.output


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


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["synth", "--scenes", "0"], "--scenes 0: expected a number from 1 to 1000; see vla-autoprune"),
        (["synth", "--seed=1.5"], "--seed 1.5: expected a whole number from 0 on; see vla-autoprune"),
        (["synth", "--duration-s", "nan"], "--duration-s nan: expected a number from 4 to 60; see"),
        (["synth", "--sceens", "3"], "No such option: --sceens"),
        (["predict", "b", "--images", "i", "--speed", "nan"], "--speed nan: expected a finite number; see"),
        (["predict", "b", "--images", "i"], "Missing option '--speed'; see vla-autoprune predict --help"),
        (["predict", "b", "--images", "i", "--speed", "1", "--command", "up"], "--command up: not one of"),
        (["fly"], "No such command 'fly'; see vla-autoprune --help"),
    ],
)
def test_a_mistyped_command_line_is_one_plain_line(
    arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["vla-autoprune", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    output, error = capsys.readouterr()
    assert error.startswith(f"error: {line}") and error.count("\n") == 1 and output == ""


@pytest.mark.parametrize("words", [(errno.ENOSPC, "No space left on device"), ("9 requested and 3 written",)])
def test_a_failed_write_is_one_plain_line(
    words: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        error = OSError(*words)
        error.filename = "out/plan.npy"
        raise error

    monkeypatch.setattr("vla_autoprune.cli.app", fail)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: out/plan.npy: {words[-1]}; check the path")


def test_faults_are_gathered_and_told_together() -> None:
    faults: list[str] = []
    with gathered(faults):
        whole = comma_list("--points", "1,3", int, "1,3")
    with gathered(faults):
        comma_list("--points", "1;3", int, "1,3")
    refuse([])
    assert whole == [1, 3]
    with gathered(faults):
        comma_list("--budgets", "half", finite, "0.6,0.4")
    with pytest.raises(InputError, match=r"--points is '1;3'.*; --budgets is 'half'"):
        refuse(faults)


@pytest.mark.parametrize("command", ["calibrate", "evaluate"])
def test_a_limit_of_nothing_is_refused(command: str) -> None:
    arguments = [*(["bundle"] if command == "evaluate" else []), "--data", "d", "--limit", "0"]
    assert CliRunner().invoke(app, [command, *arguments]).exit_code == 2


def test_an_interrupt_says_what_is_left_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    done = [1, 2]
    with pytest.raises(KeyboardInterrupt), told_when_interrupted(lambda: f"{len(done)} are kept [here]"):
        done.append(3)
        raise KeyboardInterrupt
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "interrupted: 3 are kept [here]\n")
