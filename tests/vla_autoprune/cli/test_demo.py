from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("nuscenes")

from vla_autoprune.cli import app
from vla_autoprune.cli.demo import middle_budget


def test_the_frame_is_planned_at_the_middle_budget(stored_bundle) -> None:
    assert stored_bundle.recipe.budgets == (0.6, 0.4)
    assert middle_budget(stored_bundle.recipe) == 0.6
    shipped = stored_bundle.recipe.model_copy(update={"budgets": (0.6, 0.4, 0.25)})
    assert middle_budget(shipped) == 0.4


def test_too_few_drives_are_refused() -> None:
    assert CliRunner().invoke(app, ["demo", "--scenes", "3"]).exit_code == 2


def test_an_interrupt_leaves_the_step_time_to_tidy_up(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-m", "vla_autoprune.cli", "demo", "--out", "demo"]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as demo:  # fmt: skip
        partial = tmp_path / "demo" / "world.synth-partial" / "samples"
        while not list(partial.glob("*/*.jpg")) and demo.poll() is None:
            time.sleep(0.05)
        os.killpg(demo.pid, signal.SIGINT)  # as a terminal does
        assert demo.stdout is not None
        said = demo.stdout.read().decode()
        assert demo.wait() == 130, said
    assert "interrupted: demo/world is as it was; the same command starts from the beginning" in said
    assert list((tmp_path / "demo").iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_main_job_runs_and_names_its_report(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vla_autoprune.cli", "demo", "--out", "demo"]
    environment = {**os.environ, "PYTHONPATH": str(repository), "COLUMNS": "130"}

    def run() -> str:
        done = subprocess.run(
            [*command, "--scenes", "4", "--limit", "2"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = run()
    report = tmp_path / first.split("report: ")[-1].strip()
    assert report.read_text().lower().startswith("<!doctype html>")
    results = json.loads((report.parent / "results.json").read_text())
    assert results["conditions"]["samples"] == 2
    plan = json.loads((tmp_path / "demo" / "predict" / "waypoints.json").read_text())
    assert len(plan["waypoints"]) == 6
    assert (tmp_path / "demo" / "predict" / "picture.png").is_file()
    made = (tmp_path / "demo" / "bundle" / "manifest.json").stat().st_mtime_ns
    again = run()
    assert "as it was" in again and "is already the bundle" in again and "are done already" in again
    assert (tmp_path / "demo" / "bundle" / "manifest.json").stat().st_mtime_ns == made
