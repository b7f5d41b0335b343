from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest

from vla_autoprune.bundle import MANIFEST, Manifest, load_bundle
from vla_autoprune.errors import BundleError
from vla_autoprune.recipe import read_recipe


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


@pytest.mark.parametrize(
    "name", ["weights.data", "rotary.npy", "stage_01.onnx", "manifest.json", "recipe.json"]
)
def test_no_file_of_another_bundle_passes(folder, stored_bundle, tmp_path, name):
    """The other bundle is whole, of the same recipe's shapes and file sizes; only its weights differ."""
    other = shutil.copytree(stored_bundle.path, tmp_path / "other")
    weights = np.fromfile(other / "weights.data", dtype=np.float32)
    (weights[::-1].copy()).tofile(other / "weights.data")
    np.save(other / "rotary.npy", np.load(other / "rotary.npy")[::-1])
    graph = bytearray((other / "stage_01.onnx").read_bytes())
    graph[-1] ^= 1
    (other / "stage_01.onnx").write_bytes(graph)
    recipe = (other / "recipe.json").read_text()
    (other / "recipe.json").write_text(recipe.replace('"tiny"', '"tinu"'))
    reseal(other)
    assert load_bundle(other).manifest.bundle_id != stored_bundle.manifest.bundle_id
    shutil.copy(other / name, folder / name)
    assert "belongs to another bundle" in refusal(folder)


def test_an_array_of_python_objects_is_refused(folder):
    """What numpy would have to unpickle is never read, even where the manifest fits it."""
    np.save(folder / "embedding.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    reseal(folder)
    assert "embedding.npy is not an array file" in refusal(folder)


def test_a_file_that_is_listed_twice_is_named(folder):
    reseal(folder, lambda content: content["files"].append(content["files"][0]))
    assert "lists actions.json twice" in refusal(folder)


def test_a_bundle_without_a_version_is_refused(folder):
    edit_manifest(folder, lambda content: content.pop("bundle_version"))
    with pytest.raises(BundleError, match="bundle_version is None, this library reads 2; export the"):
        load_bundle(folder)


def test_the_id_covers_weights_recipe_and_options(stored_bundle):
    manifest = stored_bundle.manifest
    ids = {manifest.bundle_id}
    for change in (
        {"weights_sha256": "0" * 64},
        {"recipe_sha256": "0" * 64},
        {"options": manifest.options.model_copy(update={"opset": 18})},
        {"files": manifest.files[1:]},
    ):
        ids.add(manifest.model_copy(update=change).computed_id())
    assert len(ids) == 5


def test_a_missing_file_is_named(folder):
    (folder / "head.onnx").unlink()
    with pytest.raises(BundleError, match=r"head\.onnx is missing"):
        load_bundle(folder)


def test_a_newer_bundle_asks_for_a_newer_library(folder):
    edit_manifest(folder, lambda content: content.update(bundle_version=99))
    with pytest.raises(BundleError, match="bundle_version is 99, this library reads 2; update"):
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


def reseal(folder, change=lambda content: None) -> None:
    """Rewrite the manifest so that sizes, hashes and id fit whatever the files now hold."""

    def rewrite(content):
        content["files"] = [entry for entry in content["files"] if (folder / entry["path"]).exists()]
        for entry in content["files"]:
            raw = (folder / entry["path"]).read_bytes()
            entry.update(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
        content["recipe_sha256"] = read_recipe(folder / "recipe.json").sha256
        change(content)
        content["bundle_id"] = Manifest.model_validate(content).computed_id()

    edit_manifest(folder, rewrite)


def refusal(folder) -> str:
    with pytest.raises(BundleError) as caught:
        load_bundle(folder)
    message = str(caught.value)
    assert str(folder) in message and "export the bundle anew" in message and "\n" not in message
    return message


@pytest.mark.parametrize(
    "name", ["weights.data", "embedding.npy", "rotary.npy", "recipe.json", "select.onnx"]
)
def test_a_manifest_must_list_what_loading_reads(folder, name):
    reseal(folder, lambda content: content.update(files=[e for e in content["files"] if e["path"] != name]))
    assert f"does not list {name}, which a bundle needs" in refusal(folder)


@pytest.mark.parametrize(
    "name,change,message",
    [
        ("embedding.npy", lambda a: a.astype(np.float64), "holds float64 [512, 32], expected float32"),
        ("embedding.npy", lambda a: a[:, :-1], "[512, 31], expected float32 [vocabulary, 32]"),
        ("embedding.npy", lambda a: a[0], "holds float32 [32], expected float32 [vocabulary, 32]"),
        ("embedding.npy", lambda a: a[:-1], "logits of 'head' is float32 [1, 512], recipe and embedding.npy"),
        ("rotary.npy", lambda a: a[:-1], "holds float32 [123, 2, 8], expected float32 [124, 2, 8]"),
        ("rotary.npy", lambda a: a[:, :1], "holds float32 [124, 1, 8], expected float32 [124, 2, 8]"),
    ],
)
def test_tables_of_another_shape_are_named(folder, name, change, message):
    np.save(folder / name, change(np.load(folder / name)))
    reseal(folder)
    text = refusal(folder)
    assert message in text and name in text


@pytest.mark.parametrize("content", [b"", b"not an array", b"PK\x05\x06" + bytes(18)])
def test_a_table_that_is_no_array_is_named(folder, content):
    (folder / "rotary.npy").write_bytes(content)
    reseal(folder)
    assert "rotary.npy is not an array file" in refusal(folder)


def test_graphs_must_be_those_of_the_recipe(folder):
    def widen(content):
        content["graphs"][1]["inputs"][0]["shape"][2] = 33

    def forget(content):
        del content["graphs"][1]

    reseal(folder, widen)
    assert "tensor hidden of 'stage_00' is float32 [1, 'n', 33]" in refusal(folder)
    reseal(folder, forget)
    assert "graphs are vision, stage_01, " in refusal(folder)


def test_a_recipe_that_cannot_be_exported_is_refused(folder):
    path = folder / "recipe.json"
    path.write_text(path.read_text().replace('"calibrated"', '"reference"'))
    reseal(folder)
    assert "only 'calibrated' recipes are exported" in refusal(folder)


def test_only_engines_and_samples_may_be_added(folder):
    for name in ("engines/onnxruntime-cpu/plan.bin", "samples/more.npz", ".hidden"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    load_bundle(folder)
    (folder / "notes.txt").touch()
    assert "notes.txt is not in manifest.json; only engines/ and samples/" in refusal(folder)


def test_other_directories_are_not_bundles(tmp_path):
    with pytest.raises(BundleError, match="is not a bundle"):
        load_bundle(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(BundleError, match="truncated or not JSON"):
        load_bundle(tmp_path)
