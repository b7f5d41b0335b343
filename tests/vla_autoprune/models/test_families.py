"""What is not supported is refused by name, before anything is loaded."""

from __future__ import annotations

import json

import pytest

from vla_autoprune.errors import InputError
from vla_autoprune.models.families import CLASSES, check_checkpoint, check_config

GOOD = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "text_config": {
        "rope_parameters": {"rope_type": "default"},
        "use_sliding_window": False,
        "sliding_window": 32768,
        "layer_types": ["full_attention"] * 2,
    },
}


def with_text(**changes):
    return {**GOOD, "text_config": {**GOOD["text_config"], **changes}}


@pytest.mark.parametrize(
    "config,message",
    [
        ({**GOOD, "architectures": ["Idefics3ForConditionalGeneration"]}, f"supported: {', '.join(CLASSES)}"),
        ({**GOOD, "quantization_config": {"quant_method": "awq"}}, r"quantised \(awq\)"),
        (with_text(quantization_config={"quant_method": "gptq"}), r"quantised \(gptq\)"),
        (with_text(rope_parameters={"rope_type": "yarn"}), "'yarn' is not supported; supported: default"),
        (with_text(rope_parameters=None, rope_scaling={"type": "dynamic"}), "'dynamic' is not supported"),
        (with_text(use_sliding_window=True), "layers use sliding_attention"),
        (with_text(layer_types=["full_attention", "linear_attention"]), "layers use linear_attention"),
        (
            {"architectures": [CLASSES[0]], "text_config": {"model_type": "mistral", "sliding_window": 4096}},
            "sliding window of 4096",
        ),
        (with_text(num_experts=8), "mixes experts"),
        (
            {"architectures": [CLASSES[0]], "text_config": {"model_type": "gemma"}},
            "decoder is a gemma, which is not supported in a LLaVA; supported: llama, mistral",
        ),
        (
            {"architectures": [CLASSES[0]], "vision_config": {"model_type": "siglip_vision_model"}},
            "vision tower is a siglip_vision_model, .* supported: clip_vision_model",
        ),
        ({"architectures": "Qwen"}, "class Qwen is not supported"),
        ([], "it or its text_config is no JSON object"),
        ({**GOOD, "text_config": 3}, "it or its text_config is no JSON object"),
    ],
)
def test_what_is_not_supported_is_named(config, message):
    check_config(GOOD, "config.json")
    with pytest.raises(InputError, match=message):
        check_config(config, "config.json")


def test_old_checkpoints_with_flat_configurations_pass():
    check_config({"architectures": [CLASSES[1]], "rope_scaling": {"type": "mrope"}}, "config.json")


def test_missing_shards_are_named(tmp_path):
    with pytest.raises(InputError, match=r"has no config\.json; give a folder"):
        check_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"1 of 1 weight files are missing: model\.safetensors;"):
        check_checkpoint(tmp_path)
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(InputError, match=r"1 of 2 weight files are missing: model-00002-of-00002"):
        check_checkpoint(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").touch()
    check_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(InputError, match="not an index of shards"):
        check_checkpoint(tmp_path)
