import inspect
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("shapely")

from eval_nuscenes.nuscenes_writer import DatasetOptions
from vla_autoprune.cli.synth import synth as command

Drawing = Callable[[int], "subprocess.Popen[str]"]
PATIENCE_S = 120.0
"""A loaded machine is slow, not wrong."""
TINY = ("--scenes", "2", "--duration-s", "4", "--image-size", "96x54", "--workers", "1")


def synth(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vla_autoprune.cli", "synth", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE_S, env={**os.environ, "COLUMNS": "200"}
    )


def test_a_data_set_is_written_then_reused(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "synth"
    first = synth("--out", root, *TINY)
    assert first.returncode == 0, first.stderr
    assert 'NuScenes(version="v1.0-synth"' in first.stdout
    assert "18 keyframes of six cameras" in first.stdout
    assert "as it was" not in first.stdout
    again = synth("--out", root, *TINY)
    assert again.returncode == 0, again.stderr
    assert "as it was" in again.stdout
    assert "drawing" not in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image-size", "800"), "--image-size 800: expected WIDTHxHEIGHT"),
        (("--image-size", "8x450"), "--image-size, width 8: expected 64 to 3840"),
        (("--kinds", "lead,flying"), "there is no flying; choose from free, lead"),
        (("--kinds", "lead,"), "--kinds is 'lead,'; expected values separated by commas"),
        (("--scenes", "0"), "--scenes 0: expected a number from 1 to 1000; see .* synth --help"),
        (("--val-fraction", "0.9"), r"--val-fraction 0.9 \+ --calibration-fraction 0.3 > 1; their sum"),
        (("--workers", "0"), "--workers 0: expected a number from 1 on"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = synth("--out", tmp_path / "synth", *arguments)
    assert result.returncode == 2
    assert re.search(message, result.stderr)
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "synth").exists()


def test_the_command_line_allows_what_a_data_set_does() -> None:
    limits = {name: field.metadata for name, field in DatasetOptions.model_fields.items()}
    for name, parameter in inspect.signature(command).parameters.items():
        if limits.get(name):
            bounds = [getattr(limit, "ge", getattr(limit, "le", None)) for limit in limits[name]]
            option = parameter.default
            assert [option.min, option.max][: len(bounds)] == bounds, name
            assert option.default == DatasetOptions.model_fields[name].default, name


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    result = synth("--out", tmp_path, *TINY)
    assert result.returncode == 2
    assert "is not a synthetic data set" in result.stderr


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = synth("--out", tmp_path / "file" / "synth", *TINY)
    assert result.returncode == 2
    assert f"{tmp_path / 'file'} is a file; give a directory" in result.stderr


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_leaves_nothing_half_written(drawing: Drawing, tmp_path: Path, workers: int) -> None:
    process = drawing(workers)
    # A terminal sends Ctrl-C to all processes of the group.
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_workers_end_with_a_main_process_that_was_killed(drawing: Drawing, tmp_path: Path) -> None:
    process = drawing(2)
    process.kill()
    process.wait()
    wait_for(lambda: not group_lives(process.pid))
    finished = synth("--out", tmp_path / "synth", *TINY)
    assert finished.returncode == 0, finished.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["synth"]


@pytest.fixture
def drawing(tmp_path: Path) -> Iterator[Drawing]:
    """Starts a run in a process group of its own and waits until it has drawn its first images."""
    started: list[subprocess.Popen[str]] = []

    def start(workers: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "vla_autoprune.cli", "synth", "--out", str(tmp_path / "synth")]
        process = subprocess.Popen(
            [*command, "--scenes", "50", "--workers", str(workers)],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        wait_for(lambda: list(tmp_path.glob("*/samples/CAM_BACK/*.jpg")))
        return process

    yield start
    for process in started:
        if group_lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"waited {PATIENCE_S:g} s in vain"
        time.sleep(0.1)
