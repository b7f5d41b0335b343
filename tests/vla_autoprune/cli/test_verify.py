from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("onnxruntime")

from vla_autoprune.bundle import write_manifest
from vla_autoprune.cli import app


def test_agreement_is_printed_and_exits_with_0(recorded):
    pytest.importorskip("torch")
    command = ["verify", str(recorded.path), "--backend", "torch", "--threads", "1"]
    run = CliRunner().invoke(app, command, env={"COLUMNS": "120"}, catch_exceptions=False)
    assert run.exit_code == 0, run.output
    assert "42 comparisons, all pass (cosine at least 0.9999, norm ratio within 0.01 of 1)" in run.stdout
    assert "the worst is" in run.stdout and "sample_00.npz" in run.stdout


def test_a_gate_that_is_not_passed_exits_with_1_and_is_named(recorded, tmp_path):
    folder = shutil.copytree(recorded.path, tmp_path / "bundle")
    path = folder / "samples" / "sample_00.npz"
    with np.load(path) as stored:
        arrays = dict(stored)
    arrays["b40_s1/hidden_01"] = arrays["b40_s1/hidden_01"] * 1.5
    np.savez_compressed(path, **arrays)
    write_manifest(folder, recorded.recipe, list(recorded.graphs.values()), recorded.manifest.options)
    run = CliRunner().invoke(app, ["verify", str(folder), "--threads", "1", "--json"])
    assert run.exit_code == 1
    failed = [row for row in json.loads(run.stdout)["agreements"] if not row["passed"]]
    assert [(row["graph"], row["tensor"], row["bucket"]) for row in failed] == [
        ("stage_01", "hidden", "b40_s1")
    ]
    assert failed[0]["norm_ratio"] == pytest.approx(1 / 1.5) and failed[0]["cosine"] > 0.9999
    loose = CliRunner().invoke(app, ["verify", str(folder), "--threads", "1", "--max-norm-error", "0.4"])
    assert loose.exit_code == 0 and "the worst is hidden of stage_01 in bucket b40_s1" in loose.stdout
