"""Every benchmark runs, at its smallest, and leaves well-formed tables: a script that nobody runs rots."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")


@pytest.fixture
def run(repository, tmp_path):
    """Runs a script of benchmarks/ in a folder of its own; gives what it printed."""

    def run(script, *arguments, exits=(0,), domain=0):
        command = [sys.executable, repository / "benchmarks" / f"{script}.py", *map(str, arguments)]
        path = f"{repository}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200", "ROS_DOMAIN_ID": str(domain)},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode in exits, f"exit {done.returncode}\n{done.stdout}\n{done.stderr[-4000:]}"
        return done.stdout

    return run


def rows(markdown):
    """The table of a Markdown text, a dictionary a row."""
    cells = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in markdown.splitlines()
        if line.startswith("|")
    ]
    header, rule, *body = cells
    assert set(rule) == {"---"} and body
    assert {len(row) for row in cells} == {len(header)}
    return [dict(zip(header, row, strict=True)) for row in body]


def results(folder, name):
    """What a script wrote: its figures, and the rows of its table."""
    figures = json.loads((folder / f"{name}.json").read_text())
    return figures, rows((folder / f"{name}.md").read_text())


def test_full_size(run, tmp_path):
    options = ["--shrink", 16, "--budgets", 0.5, "--rounds", 1, "--threads", 1]
    printed = run("full_size", "--out", tmp_path, *options)
    figures, table = results(tmp_path, "full_size")
    assert "llava-1.5-7b shapes, widths divided by 16, random weights" in printed
    assert figures["layers"] == 32 and [row["bucket"] for row in table] == ["full", "b50_s0"]
    assert [float(row["prefill ms"]) for row in table] == [round(b["prefill_ms"]) for b in figures["buckets"]]
    unpruned, pruned = figures["buckets"]
    assert pruned["kv_mib"] < unpruned["kv_mib"] and 0 < pruned["work"] < unpruned["work"] == 1


def test_large_export(run, tmp_path):
    options = ["--shrink", 16, "--layers", 2, "--stage-layers", 1, "--threads", 1, "--check"]
    printed = run("large_export", "--out", tmp_path, *options)
    (figures,), (row,) = results(tmp_path, "large_export")
    assert "widths divided by 16" in printed and "met: peak at most the largest stage plus 2 GiB" in printed
    assert row["layers"] == "2" and 0 < float(row["largest difference"]) < 2e-2
    assert figures["imports_gib"] < figures["export_peak_gib"] <= figures["check_peak_gib"]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []  # gigabytes, where not shrunk


@pytest.mark.slow
def test_prefill(run, tmp_path):
    options = ["--layers", 12, "--hidden", 64, "--tokens-per-camera", 16, "--rounds", 1, "--threads", 1]
    run("prefill", "--out", tmp_path, *options)
    figures, table = results(tmp_path, "prefill")
    assert [row[""] for row in table] == ["transformers SDPA", "full", "b50_s0", "b25_s0", "b11_s0"]
    assert figures["disk_ratio"] < 1.2 and all(peak > 0 for peak in figures["memory_mib"].values())


def test_side_by_side(run, tmp_path):
    options = ["--random", "--layers", 4, "--hidden", 64, "--image-size", 32, "--frames", 1]
    run("side_by_side", "--out", tmp_path, *options, "--budgets", 0.6)
    figures, table = results(tmp_path, "side_by_side")
    assert [row[""] for row in table] == list(figures["runs_ms"])
    assert all(float(row["prefill ms"]) > 0 for row in table) and len(table) == 5
    unpruned = next(row for row in figures["rows"] if row["way"] == "bundle, unpruned")
    assert unpruned["same_tokens"] == 1


def test_image_input(run, synthetic_root, stored_bundle):
    printed = run("image_input", "filters", "--turns", 1, "--width", 160, "--height", 90)
    assert all(name in printed for name in ("area", "bicubic", "medians of 1, one thread"))
    options = ["--bundle", stored_bundle.path, "--data", synthetic_root]
    printed = run("image_input", "reduction", *options, "--frames", 2, "--enlarge", 6)
    assert "pixel values differ by 0.0" in printed and "differ by 0.0000," not in printed
    assert "of 2 plans the same" in printed and "unpruned:" in printed and "40%:" in printed


def test_open_loop(run):
    printed = run("open_loop", "--samples", 4, "--protocols", "uniad,standard", exits=(0, 1))
    assert all(name in printed for name in ("uniad", "standard", "all", "ms per sample"))
    assert "4 samples, seed 0" in printed


def test_navsim(run):
    printed = run("navsim", "--tracks", 4, "--lanes", 2, "--rounds", 3, exits=(0, 1))
    found = {line.split("  ")[0].strip(): line.split() for line in printed.splitlines() if "busy" in line}
    assert set(found) == {"busy, v1", "busy, v2"}
    assert all(float(cell) > 0 for words in found.values() for cell in words[-5:])


def test_guard_limits(run, synthetic_root):
    printed = run("guard_limits", synthetic_root)
    (line,) = [line for line in printed.splitlines() if "driver of the data" in line]
    assert "%" in line


@pytest.mark.slow
def test_encoder_score(run, synthetic_root):
    options = ["--split", "val", "--frames", 2, "--layers", 0]
    printed = run("encoder_score", "--data", synthetic_root, *options)
    scores = ("text alone", "text + cls, tower layer 0", "text + received, tower layer 0")
    assert " left out; without pruning " in printed and all(f"{name} " in printed for name in scores)


@pytest.mark.ros
@pytest.mark.slow
def test_guard(run, ros_domain):
    pytest.importorskip("rclpy")
    printed = run("guard", "--seconds", 1, "--silences", 1, "--domain", ros_domain)
    assert "plan to trajectory, over DDS: p50" in printed and "last plan to first stop: p50" in printed


@pytest.mark.ros
@pytest.mark.slow
def test_ros_pipeline(run, ros_domain, stored_bundle, tmp_path):
    pytest.importorskip("rclpy")
    pytest.importorskip("psutil")
    options = ["--part", "pipeline", "--seconds", 3, "--rate", 2, "--size", 160, 90]
    run("ros_pipeline", "--bundle", stored_bundle.path, "--out", tmp_path, *options, domain=ros_domain)
    figures = json.loads((tmp_path / "ros_pipeline.json").read_text())["pipeline"]
    assert figures["frames_sent"] > 0 and figures["frames_planned"] > 0
    assert set(figures["plan_ms"]) == {"p50", "p95", "p99"}
