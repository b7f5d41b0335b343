from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from vla_autoprune.cli import app
from vla_autoprune.errors import BundleError


def test_the_contract_is_printed(stored_bundle):
    run = CliRunner().invoke(app, ["inspect", str(stored_bundle.path)], env={"COLUMNS": "120"})
    assert run.exit_code == 0, run.output
    assert f"id {stored_bundle.manifest.bundle_id[:12]}, opset 23" in run.stdout
    words = run.stdout.split()
    assert {"stage_02", "past_k_NN", "weights.data", "b40_s1", "124/56/30"} <= {w.strip("│") for w in words}


def test_json_has_every_static_shape(stored_bundle):
    run = CliRunner().invoke(app, ["inspect", str(stored_bundle.path), "--json"])
    content = json.loads(run.stdout)
    assert content["bundle_id"] == stored_bundle.manifest.bundle_id
    for entry in content["graphs"]:
        graph = stored_bundle.graphs[entry["name"]]
        assert set(entry["shapes"]) == set(graph.variants)
        for variant, shapes in entry["shapes"].items():
            assert {name: tuple(shape) for name, shape in shapes.items()} == graph.shapes(variant)
    assert set(content["buckets"]) == {bucket.name for bucket in stored_bundle.recipe.buckets}


def test_a_damaged_bundle_is_refused(stored_bundle, tmp_path):
    folder = shutil.copytree(stored_bundle.path, tmp_path / "bundle")
    (folder / "rotary.npy").unlink()
    with pytest.raises(BundleError, match=r"rotary\.npy is missing"):
        CliRunner().invoke(app, ["inspect", str(folder)], catch_exceptions=False)
