"""Weights that stay in their files: the same graphs, hashes and tables as of a model in memory."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxscript")

from vla_autoprune import contract
from vla_autoprune.errors import InputError
from vla_autoprune.export.export import WeightsFile, trace
from vla_autoprune.models.families import adapter_for
from vla_autoprune.models.stored_weights import open_stored
from vla_autoprune.recipe import PromptLayout, Scorer, build_recipe

TEXT = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "depth": 2, "patch_size": 4}


def llava():
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        ),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=250,
    )


def qwen25():
    rotary = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 4]}
    return transformers.Qwen2_5_VLConfig(
        vision_config={**TOWER, "window_size": 16, "out_hidden_size": 64, "fullatt_block_indexes": [1]},
        text_config={**TEXT, "rope_parameters": rotary},
        tie_word_embeddings=True,
        image_token_id=250,
    )


def qwen3():
    rotary = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    return transformers.Qwen3VLConfig(
        vision_config={
            **TOWER,
            "out_hidden_size": 64,
            "num_position_embeddings": 25,
            "deepstack_visual_indexes": [0],
        },
        text_config={**TEXT, "head_dim": 16, "rope_parameters": {**rotary, "mrope_interleaved": True}},
        tie_word_embeddings=True,
        image_token_id=250,
    )


CLASSES = {
    llava: "LlavaForConditionalGeneration",
    qwen25: "Qwen2_5_VLForConditionalGeneration",
    qwen3: "Qwen3VLForConditionalGeneration",
}


def saved(family, folder):
    """A random model, and its checkpoint in shards."""
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES[family])._from_config(family(), attn_implementation="sdpa")
    model.save_pretrained(folder, max_shard_size="50KB")
    (folder / "tokenizer.json").write_text("{}")
    return adapter_for(model)


def layout(family):
    tokens, size = (16, (32, 32)) if family is llava else (12, (32, 24))
    return PromptLayout(segments=(("text", 3), ("visual", "CAM_0", tokens), ("text", 9)), image_size=size)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    return saved(llava, folder), folder


@pytest.mark.parametrize("family", CLASSES)
def test_hash_tables_and_tower_are_those_of_the_model_in_memory(family, tmp_path):
    whole = saved(family, tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    stored = open_stored(tmp_path)
    assert stored.streams and not whole.streams
    assert stored.shape("x") == whole.shape("x")
    assert torch.equal(stored.embedding, whole.embedding)
    prompt = layout(family)
    for table, wanted in zip(stored.rotary(prompt, 30), whole.rotary(prompt, 30), strict=True):
        assert torch.equal(table, wanted)
    scorer = Scorer(encoder_weight=0.0)
    pixels = torch.randn(1, 3, *prompt.image_size[::-1])
    tower = stored.tower(prompt, scorer)
    with torch.no_grad(), stored.loaded(tower, torch.float32):
        found = tower(pixels).features
    with torch.no_grad():
        wanted = whole.tower(prompt, scorer)(pixels).features
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_stage_is_exported_to_the_same_bytes_and_leaves_no_weights_in_memory(
    checkpoint, precision, tmp_path
):
    whole, folder = checkpoint
    stored = open_stored(folder)
    recipe = build_recipe(whole.shape("x"), layout(llava), decode_length=2, budgets=(0.6,))
    graph = contract.graphs(recipe, 256, precision)[1]
    made = []
    for number, model in enumerate((whole, stored)):
        (tmp_path / str(number)).mkdir()
        with WeightsFile(tmp_path / str(number) / "weights.data") as weights:
            proto = trace(model, recipe, graph, 23, precision, weights)
        made.append((proto.SerializeToString(deterministic=True), weights.path.read_bytes()))
    assert made[0] == made[1]
    assert len(made[0][1]) > 4096
    assert all(parameter.is_meta for parameter in stored.model.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in whole.model.parameters())


def test_values_are_there_only_inside_the_context(checkpoint):
    whole, folder = checkpoint
    stored = open_stored(folder)
    layer, wanted = stored.layers[1].mlp.up_proj, whole.layers[1].mlp.up_proj.weight
    with stored.loaded(layer, torch.bfloat16):
        assert torch.equal(layer.weight, wanted.to(torch.bfloat16))
    assert layer.weight.is_meta
    with pytest.raises(InputError, match="transformers' generate needs them all in memory"):
        stored.generate(None, None, 1)


def test_a_missing_shard_is_named(tmp_path):
    saved(llava, tmp_path)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(InputError, match=f"weight files are missing: {shard.name}"):
        open_stored(tmp_path)


def test_weights_that_no_file_holds_are_named(tmp_path):
    saved(llava, tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    lost = next(file for key, file in content["weight_map"].items() if key.endswith("lm_head.weight"))
    content["weight_map"] = {key: file for key, file in content["weight_map"].items() if file != lost}
    index.write_text(json.dumps(content))
    (tmp_path / lost).unlink()
    with pytest.raises(InputError, match=r"its files hold no .*\(\d+ of \d+ weights\)"):
        open_stored(tmp_path)


def test_a_configuration_of_another_size_is_refused(tmp_path):
    saved(llava, tmp_path)
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
