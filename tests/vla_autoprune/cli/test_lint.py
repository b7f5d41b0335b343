from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

from vla_autoprune.cli import app


def test_what_a_target_would_refuse_is_shown(stored_bundle):
    run = CliRunner().invoke(app, ["lint", str(stored_bundle.path), "--target", "jetpack6", "--json"])
    assert run.exit_code == 1
    report = json.loads(run.stdout)
    assert {finding["rule"] for finding in report["findings"]} == {"opset", "operator"}
    assert report["variants"] == sum(len(graph.variants) for graph in stored_bundle.graphs.values())


def test_one_clean_target_is_enough_unless_one_is_named(stored_bundle):
    run = CliRunner().invoke(app, ["lint", str(stored_bundle.path)])
    assert run.exit_code == 0, run.output
    assert "rtx (RTX, TensorRT 11, parser of TensorRT 11.2): clean; 6 graphs in 35 sets" in run.stdout
    assert "known from 10.14 on" in " ".join(run.stdout.split())
