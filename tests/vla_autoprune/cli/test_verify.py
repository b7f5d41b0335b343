from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("onnxruntime")

from vla_autoprune.bundle import load_bundle, write_manifest
from vla_autoprune.cli import app


@pytest.fixture(scope="module")
def recorded(stored_bundle, tmp_path_factory):
    """A copy whose sample holds what ONNX Runtime itself answers, in place of an original model."""
    from engines.onnxruntime import OnnxRuntimeBackend
    from engines.verify import Answer, Sample, feature_rows, text_rows, write_sample
    from vla_autoprune.runtime.pipeline import Pipeline, Timings

    folder = shutil.copytree(stored_bundle.path, tmp_path_factory.mktemp("verify") / "bundle")
    recipe = stored_bundle.recipe
    pipeline = Pipeline(stored_bundle, OnnxRuntimeBackend(stored_bundle, threads=1))
    pixels = np.random.default_rng(0).normal(size=pipeline.pixels.shape).astype(np.float32)
    ids = np.full(recipe.layout.length, 20)
    answers = {}
    for bucket in recipe.buckets:
        hidden, scores = [], []

        def inspect(stage, read, hidden=hidden, scores=scores):
            hidden.append(read("hidden_out")[0].copy())
            if stage < len(recipe.pruning_points):
                scores.append(read("score").copy())

        pipeline.pixels[:] = pixels
        pipeline.encode(Timings())
        run = pipeline.prefill(ids, len(ids), lambda _, b=bucket: b, Timings(), inspect=inspect)
        kept = run.kept_visual
        answers[bucket.name] = Answer(
            tokens=run.logits.argmax(keepdims=True),
            logits=run.logits[None].copy(),
            kept=kept,
            scores=tuple(scores),
            hidden=tuple(
                rows[text_rows(recipe.layout, k, len(ids))] for rows, k in zip(hidden, kept, strict=True)
            ),
        )
    features = feature_rows(pipeline.features()[0][0]).copy()
    (folder / "samples").mkdir()
    sample = Sample(pixels, ids, len(ids), run.complexity, features, answers)
    write_sample(folder / "samples" / "sample_00.npz", sample)
    write_manifest(folder, recipe, list(stored_bundle.graphs.values()), stored_bundle.manifest.options)
    return load_bundle(folder)


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
