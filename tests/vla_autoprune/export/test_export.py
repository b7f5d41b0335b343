from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

from vla_autoprune import contract
from vla_autoprune.errors import InputError, ParityError, RecipeError
from vla_autoprune.export.export import export_bundle, text_files, trace
from vla_autoprune.export.pinning import open_dimensions, pin
from vla_autoprune.models.adapter import LlavaAdapter


@pytest.mark.parametrize("name", ["plain", "rich"])
def test_every_variant_leaves_no_dimension_open(tiny_bundles, name):
    bundle = tiny_bundles[name]
    for graph in bundle.graphs.values():
        proto = onnx.load(bundle.graph_file(graph.name), load_external_data=False)
        for variant in graph.variants:
            pinned = pin(proto, graph, variant)
            assert open_dimensions(pinned) == (), (graph.name, variant)
            shapes = graph.shapes(variant)
            for info in pinned.graph.output:
                dims = tuple(dim.dim_value for dim in info.type.tensor_type.shape.dim)
                assert dims == shapes[info.name], (graph.name, variant, info.name)


def test_stage_tensors_are_never_the_size_of_the_attention_matrix(tiny_bundles):
    """Per head, only text rows by keys may exist: n x n values are the fused attention's business."""
    bundle = tiny_bundles["plain"]
    graph = bundle.graphs["stage_00"]
    pinned = pin(onnx.load(bundle.graph_file("stage_00"), load_external_data=False), graph, "prefill")
    rows = graph.shapes("prefill")["hidden"][1]
    heads = bundle.recipe.model.heads
    for info in pinned.graph.value_info:
        dims = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        assert np.prod(dims) < heads * rows * rows, info.name


def test_weights_are_stored_once(tiny_bundles, tiny_vla):
    bundle = tiny_bundles["plain"]
    parameters = 4 * sum(p.numel() for p in tiny_vla.model.parameters())
    stored = sum(entry.bytes for entry in bundle.manifest.files if entry.role in ("weights", "embedding"))
    assert stored < 1.25 * parameters  # pages are padded; the tiny model has many small tensors


def test_the_same_export_gives_the_same_bytes(tiny_bundles, tiny_recipes, tiny_vla):
    bundle = tiny_bundles["plain"]
    stored = onnx.load(bundle.graph_file("stage_01"))
    again = trace(LlavaAdapter(tiny_vla.model), tiny_recipes["plain"], bundle.graphs["stage_01"], 23)
    for proto in (stored, again):
        for tensor in proto.graph.initializer:
            raw = onnx.numpy_helper.to_array(tensor).tobytes()
            tensor.ClearField("data_location")
            for field in ("raw_data", "float_data", "int64_data"):
                tensor.ClearField(field)
            tensor.raw_data = raw
    assert stored.SerializeToString(deterministic=True) == again.SerializeToString(deterministic=True)


def test_a_failed_check_leaves_no_bundle(tiny_recipes, tiny_vla, tmp_path, monkeypatch):
    from vla_autoprune.export import export

    def refuse(_):
        raise ParityError("stage_01: differs")

    whole = contract.graphs
    monkeypatch.setattr(export.contract, "graphs", lambda *given: whole(*given)[-1:])
    model, recipe = LlavaAdapter(tiny_vla.model), tiny_recipes["plain"]
    with pytest.raises(ParityError, match="stage_01"):
        export_bundle(model, recipe, tmp_path / "b", text_files(tiny_vla), check=refuse)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_with_the_place_and_leaves_no_bundle(
    tiny_recipes, tiny_vla, tmp_path, monkeypatch
):
    from vla_autoprune.export import export

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export, "trace", full)
    with pytest.raises(OSError, match="No space left") as caught:
        export_bundle(
            LlavaAdapter(tiny_vla.model), tiny_recipes["plain"], tmp_path / "b", text_files(tiny_vla)
        )
    assert caught.value.filename == str(tmp_path / "b") and list(tmp_path.iterdir()) == []


def test_a_failed_rename_brings_the_old_bundle_back(tmp_path):
    from vla_autoprune.export.export import _replace_directory

    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").touch()
    with pytest.raises(FileNotFoundError):
        _replace_directory(tmp_path / "absent", tmp_path / "b")
    assert [path.name for path in tmp_path.rglob("*")] == ["b", "manifest.json"]


def test_leftovers_of_killed_exports_are_cleared(tiny_recipes, tiny_vla, tmp_path, monkeypatch):
    from vla_autoprune.export import export

    def refuse(folder):
        assert folder.name == f".b.new-{os.getpid()}"
        raise ParityError("stage_01: differs")

    dead = 999_999_999
    for name in (
        f".b.new-{dead}",
        f".b.old-{dead}",
        f".b.new-{os.getpid()}",
        f".b.new-{os.getppid()}",
        ".b.x",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / f".b.old-{dead}" / "manifest.json").write_text('{"bundle_version": 1}')
    whole = contract.graphs
    monkeypatch.setattr(export.contract, "graphs", lambda *given: whole(*given)[-1:])
    with pytest.raises(ParityError, match="stage_01"):
        export_bundle(
            LlavaAdapter(tiny_vla.model),
            tiny_recipes["plain"],
            tmp_path / "b",
            text_files(tiny_vla),
            check=refuse,
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".b.new-{os.getppid()}", ".b.x", "b"]
    assert (tmp_path / "b" / "manifest.json").is_file()


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_the_working_directory_is_not_replaced(tiny_recipes, tiny_vla, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is or holds the working directory; name a directory of its own"):
        export_bundle(LlavaAdapter(tiny_vla.model), tiny_recipes["plain"], Path(out), {})


def test_a_recipe_of_another_model_is_refused(tiny_recipes, tiny_vla, tmp_path):
    plain = tiny_recipes["plain"]
    other = plain.model_copy(update={"model": plain.model.model_copy(update={"weights_sha256": "0" * 64})})
    with pytest.raises(RecipeError, match="the model to export has"):
        export_bundle(LlavaAdapter(tiny_vla.model), other, tmp_path / "b", {})


@pytest.mark.parametrize("name,content", [("notes.txt", "mine"), ("manifest.json", '{"name": "app"}')])
def test_a_foreign_directory_is_not_replaced(tiny_recipes, tiny_vla, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match="not a bundle"):
        export_bundle(LlavaAdapter(tiny_vla.model), tiny_recipes["plain"], tmp_path, {})
    with pytest.raises(InputError, match="opset is 17"):
        export_bundle(LlavaAdapter(tiny_vla.model), tiny_recipes["plain"], tmp_path / "b", {}, opset=17)


def test_vision_agrees_with_the_original(tiny_vla):
    from vla_autoprune.recipe import Scorer

    model, layout = LlavaAdapter(tiny_vla.model), tiny_vla.prompt.layout
    pixels = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, cls, _ = model.tower(layout, Scorer(encoder_weight=1.0))(pixels)
        received = model.tower(layout, Scorer(encoder_weight=1.0, encoder="received"))(pixels).encoder_score
        assert model.tower(layout, Scorer())(pixels).encoder_score is None
        expected = torch.stack(list(tiny_vla.model.model.get_image_features(pixels).pooler_output))
        tower = tiny_vla.model.model.vision_tower
        tower.set_attn_implementation("eager")
        attention = tower(pixels, output_attentions=True).attentions[-1]
        tower.set_attn_implementation("sdpa")
    assert (features - expected).abs().max() < 1e-5
    assert (cls - attention[:, :, 0, 1:].mean(dim=1)).abs().max() < 1e-6
    assert (received - attention[:, :, 1:, 1:].mean(dim=(1, 2))).abs().max() < 1e-6


@pytest.mark.parametrize("opset", [18, 23])
def test_heads_need_not_share_keys(tiny_recipes, opset):
    from vla_autoprune.models.driving_vla import ModelSize, build_model
    from vla_autoprune.recipe_building import build_recipe

    size = ModelSize(image_size=64, layers=3, width=32, heads=4, kv_heads=4, feed_forward=48, tower_layers=1)
    vla = build_model(size)
    model = LlavaAdapter(vla.model)
    recipe = build_recipe(model.shape("mha"), vla.prompt.layout, decode_length=12, budgets=(0.5,))
    graph = contract.graphs(recipe, model.embedding.shape[0])[1]
    proto = trace(model, recipe, graph, opset)
    assert ("Attention" in {node.op_type for node in proto.graph.node}) == (opset == 23)
