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
    out = tmp_path / "new" / "result.json"
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
    assert failed == ["every stage and answer is the original model's"]


def test_a_captured_program_that_gives_another_answer_fails(recorded):
    from engines.acceptance import accept
    from engines.onnxruntime import OnnxRuntimeBackend

    class Forgetful(OnnxRuntimeBackend):
        """Its programs lack the last step of a pruned prefill."""

        def program(self, steps):
            pruned = steps[0][0] == "store_00" and any(name.startswith("select") for name, _ in steps)
            return super().program(steps[:-1] if pruned else steps)

    result = accept(recorded, Forgetful(recorded, threads=1), frames=1)
    passed = {check.name: check.passed for check in result.checks}
    assert passed["every stage and answer is the original model's"]
    assert not passed["captured programs give the same answers"]
    assert result.bundle["precision"] == "fp32"


@pytest.mark.parametrize("given", [["--tf32"], ["--device", "1"], ["--workspace-mib", "64"]])
def test_options_of_tensorrt_are_refused_with_another_backend(recorded, tmp_path, given):
    from vla_autoprune.errors import InputError

    command = ["accept", str(recorded.path), "--backend", "torch", "--out", str(tmp_path / "a.json"), *given]
    run = CliRunner().invoke(app, command)
    assert isinstance(run.exception, InputError)
    assert "belong to --backend tensorrt; --backend is torch" in str(run.exception)


def test_a_bundle_without_samples_is_refused_before_engines_are_built(stored_bundle, tmp_path):
    from vla_autoprune.errors import ParityError

    run = CliRunner().invoke(app, ["accept", str(stored_bundle.path), "--out", str(tmp_path / "a.json")])
    assert isinstance(run.exception, ParityError)
    assert "has no recorded samples to compare with" in str(run.exception)


def test_without_tensorrt_the_command_says_how_to_get_it(recorded, tmp_path, monkeypatch):
    import sys

    from vla_autoprune.errors import BackendError

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    for command in (["accept", "--out", str(tmp_path / "result.json")], ["build"]):
        run = CliRunner().invoke(app, [command[0], str(recorded.path), *command[1:]])
        assert isinstance(run.exception, BackendError)
        assert "on a Jetson it comes with JetPack" in str(run.exception)
    assert not list(tmp_path.iterdir())
