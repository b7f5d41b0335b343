from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("onnxruntime")

from vla_autoprune.bundle import write_manifest
from vla_autoprune.cli import app


def test_the_result_file_holds_checks_times_and_machine(recorded, tmp_path):
    out = tmp_path / "result.json"
    command = ["accept", str(recorded.path), "--backend", "onnxruntime", "--frames", "20", "--out", str(out)]
    run = CliRunner().invoke(app, command, env={"COLUMNS": "120"}, catch_exceptions=False)
    assert run.exit_code == 0, run.output
    assert "a frame repeats to the bit" in run.stdout and "fails" not in run.stdout
    result = json.loads(out.read_text())
    assert result["result_version"] == 1 and result["bundle"]["id"] == recorded.manifest.bundle_id
    assert all(check["passed"] for check in result["checks"]) and len(result["checks"]) == 5
    assert set(result["times"]) == {bucket.name for bucket in recorded.recipe.buckets}
    full = result["times"]["full"]
    assert full["frames"] == 4 and full["prefill_ms"][0] > 0
    assert full["prefill_ms"][1] is None and "4 frames per bucket are too few" in run.stdout
    assert {"vision", "stage_00", "head", "decode_stage_01"} <= set(full["steps_ms"])
    assert result["machine"]["onnxruntime"] != "absent" and result["machine"]["python"]


def test_another_answer_than_recorded_fails_and_is_written(recorded, tmp_path):
    folder = shutil.copytree(recorded.path, tmp_path / "bundle")
    path = folder / "samples" / "sample_00.npz"
    with np.load(path) as stored:
        arrays = dict(stored)
    arrays["full/logits"] = arrays["full/logits"] * 1.5
    np.savez_compressed(path, **arrays)
    write_manifest(folder, recorded.recipe, list(recorded.graphs.values()), recorded.manifest.options)
    out = tmp_path / "result.json"
    command = ["accept", str(folder), "--backend", "onnxruntime", "--frames", "1", "--out", str(out)]
    run = CliRunner().invoke(app, command, env={"COLUMNS": "120"})
    assert run.exit_code == 1
    failed = [check["name"] for check in json.loads(out.read_text())["checks"] if not check["passed"]]
    assert failed == [
        "every stage and answer is the original model's",
        "captured programs give the same answers",
    ]


def test_without_tensorrt_the_command_says_how_to_get_it(recorded, tmp_path, monkeypatch):
    import sys

    from vla_autoprune.errors import BackendError

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    for command in (["accept", "--out", str(tmp_path / "result.json")], ["build"]):
        run = CliRunner().invoke(app, [command[0], str(recorded.path), *command[1:]])
        assert isinstance(run.exception, BackendError)
        assert "on a Jetson it comes with JetPack" in str(run.exception)
    assert not list(tmp_path.iterdir())
