from __future__ import annotations

import json
import shutil

import pytest

from vla_autoprune.bundle import MANIFEST, load_bundle
from vla_autoprune.errors import BundleError


@pytest.fixture
def folder(stored_bundle, tmp_path):
    """A copy to damage."""
    return shutil.copytree(stored_bundle.path, tmp_path / "bundle")


def edit_manifest(folder, change) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def test_a_whole_bundle_loads_and_maps_its_tables(folder, stored_bundle):
    bundle = load_bundle(folder)
    assert bundle.recipe == stored_bundle.recipe and bundle.graphs == stored_bundle.graphs
    assert list(bundle.graphs) == ["vision", "stage_00", "stage_01", "stage_02", "select", "head"]
    assert bundle.embedding().shape[1] == bundle.recipe.model.hidden
    assert bundle.rotary().shape == (bundle.recipe.layout.length + 12, 2, bundle.recipe.model.head_dim)


def test_a_truncated_file_is_refused_by_name(folder):
    path = folder / "weights.data"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"weights\.data is truncated: \d+ bytes, the manifest says \d+"):
        load_bundle(folder)


def test_an_edited_graph_is_refused_by_name(folder):
    path = folder / "stage_01.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"stage_01\.onnx has been edited or belongs to another bundle"):
        load_bundle(folder)


def test_files_of_two_bundles_do_not_mix(folder):
    (folder / "recipe.json").write_text((folder / "recipe.json").read_text().replace('"tiny"', '"tinu"'))
    with pytest.raises(BundleError, match=r"recipe\.json has been edited or belongs to another bundle"):
        load_bundle(folder)


def test_a_missing_file_is_named(folder):
    (folder / "head.onnx").unlink()
    with pytest.raises(BundleError, match=r"head\.onnx is missing"):
        load_bundle(folder)


def test_a_newer_bundle_asks_for_a_newer_library(folder):
    edit_manifest(folder, lambda content: content.update(bundle_version=99))
    with pytest.raises(BundleError, match="bundle_version is 99, this library reads 1; update"):
        load_bundle(folder)


def test_an_edited_manifest_is_noticed(folder):
    def forge(content):
        content["options"]["opset"] = 18

    edit_manifest(folder, forge)
    with pytest.raises(BundleError, match=r"manifest\.json has been edited"):
        load_bundle(folder)


def test_a_manifest_cannot_point_outside_the_bundle(folder):
    edit_manifest(folder, lambda content: content["files"][0].update(path="../secret"))
    with pytest.raises(BundleError, match=r"files\.0\.path"):
        load_bundle(folder)


def test_other_directories_are_not_bundles(tmp_path):
    with pytest.raises(BundleError, match="is not a bundle"):
        load_bundle(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(BundleError, match="truncated or not JSON"):
        load_bundle(tmp_path)
