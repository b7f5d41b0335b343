"""Weights that stay in their files: the same graphs, hashes and tables as of a model in memory."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxscript")

from vla_autoprune.errors import InputError
from vla_autoprune.models.families import adapter_for
from vla_autoprune.models.stored_weights import open_stored
from vla_autoprune.recipe import Scorer


def saved(families, family, folder):
    """A random model, and its checkpoint in shards."""
    model = families.model(families.configuration(family))
    model.save_pretrained(folder, max_shard_size="50KB")
    (folder / "tokenizer.json").write_text("{}")
    return adapter_for(model)


@pytest.fixture(scope="module")
def checkpoint(families, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    return saved(families, "llava", folder), folder


@pytest.mark.parametrize("family", ["llava", "qwen2.5", "qwen3"])
def test_hash_tables_and_tower_are_those_of_the_model_in_memory(families, family, tmp_path):
    whole = saved(families, family, tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    stored = open_stored(tmp_path)
    assert stored.streams and not whole.streams
    assert stored.shape("x") == whole.shape("x")
    assert torch.equal(stored.embedding, whole.embedding)
    prompt = families.layout(families.configuration(family), cameras=2)
    for table, wanted in zip(stored.rotary(prompt, 60), whole.rotary(prompt, 60), strict=True):
        assert torch.equal(table, wanted)
    scorer = Scorer(encoder_weight=0.0)
    pixels = torch.randn(2, 3, *prompt.image_size[::-1])
    tower = stored.tower(prompt, scorer)
    with torch.no_grad(), stored.loaded(tower, torch.float32):
        found = tower(pixels).features
    with torch.no_grad():
        wanted = whole.tower(prompt, scorer)(pixels).features
    assert torch.equal(found, wanted)


def test_values_are_there_only_inside_the_context(checkpoint):
    whole, folder = checkpoint
    stored = open_stored(folder)
    layer, wanted = stored.layers[1].mlp.up_proj, whole.layers[1].mlp.up_proj.weight
    with stored.loaded(layer, torch.bfloat16):
        assert torch.equal(layer.weight, wanted.to(torch.bfloat16))
        remembered = layer.weight
    assert layer.weight.is_meta
    assert remembered.untyped_storage().nbytes() == 0  # exporters remember; two graphs' weights would add up
    with pytest.raises(InputError, match="transformers' generate needs them all in memory"):
        stored.generate(None, None, 1)


def test_a_missing_shard_is_named(families, tmp_path):
    saved(families, "llava", tmp_path)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(InputError, match=f"weight files are missing: {shard.name}"):
        open_stored(tmp_path)


def test_weights_that_no_file_holds_are_named(families, tmp_path):
    saved(families, "llava", tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    lost = next(file for key, file in content["weight_map"].items() if key.endswith("lm_head.weight"))
    content["weight_map"] = {key: file for key, file in content["weight_map"].items() if file != lost}
    index.write_text(json.dumps(content))
    (tmp_path / lost).unlink()
    with pytest.raises(InputError, match=r"its files hold no .*\(\d+ of \d+ weights\)"):
        open_stored(tmp_path)


def test_a_configuration_of_another_size_is_refused(families, tmp_path):
    saved(families, "llava", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 40
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"is \[48, 64\], config.json asks for \[40, 64\]"):
        open_stored(tmp_path)


def test_weights_too_large_for_half_precision_are_refused(checkpoint):
    whole, _ = checkpoint
    layer = torch.nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight[0, 0] = 1e5
    with (
        pytest.raises(InputError, match=r"a weight of the model reaches 1e\+05, torch.float16 ends at 6.55e"),
        whole.loaded(layer, torch.float16),
    ):
        pass
    assert layer.weight.dtype == torch.float32
