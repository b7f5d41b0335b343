"""Which models can be taken apart, and refusing the others by name before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla_autoprune.errors import InputError
from vla_autoprune.files import read_json

if TYPE_CHECKING:
    from vla_autoprune.models.adapter import LlavaAdapter
    from vla_autoprune.models.qwen_vl import QwenVlAdapter

CLASSES = (
    "LlavaForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
)
"""transformers' classes with an adapter."""

ROTARY = ("default", "linear", "llama3")
"""Rotary variants that are tables of the position alone; mrope counts as default."""

SHARDS = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def adapter_for(model: Any) -> LlavaAdapter | QwenVlAdapter:
    """Take a model apart.

    Args:
        model: of one of `CLASSES`; made float32 in place.

    Returns:
        The model as a `StageModel`.

    Raises:
        InputError: the class or a part of it is not supported; the message says what is.
    """
    from vla_autoprune.models.adapter import LlavaAdapter
    from vla_autoprune.models.qwen_vl import QwenVlAdapter

    check_config({**model.config.to_dict(), "architectures": [type(model).__name__]}, type(model).__name__)
    return LlavaAdapter(model) if type(model).__name__ == CLASSES[0] else QwenVlAdapter(model)


def check_config(config: dict[str, Any], where: str) -> None:
    """Refuse a configuration that the stages cannot express.

    Args:
        config: content of a config.json.
        where: names it in messages.

    Raises:
        InputError: naming what is not supported, and what is.
    """
    names = config.get("architectures") or ["nothing"]
    if names[0] not in CLASSES:
        raise InputError(f"{where}: class {names[0]} is not supported; supported: {', '.join(CLASSES)}")
    text = config.get("text_config") or config
    for part in (config, text):
        quantised = part.get("quantization_config")
        if quantised:
            method = quantised.get("quant_method", "unnamed")
            raise InputError(
                f"{where}: quantization_config says the weights are quantised ({method}); supported are "
                "checkpoints in float32, float16 or bfloat16"
            )
    rotary = text.get("rope_parameters") or text.get("rope_scaling") or {}
    variant = rotary.get("rope_type", rotary.get("type", "default"))
    if variant not in (*ROTARY, "mrope"):
        raise InputError(
            f"{where}: rotary variant {variant!r} is not supported; supported: {', '.join(ROTARY)}, mrope"
        )
    kinds = sorted(set(text.get("layer_types") or ["full_attention"]) - {"full_attention"})
    if kinds or (text.get("use_sliding_window") and text.get("sliding_window")):
        raise InputError(
            f"{where}: decoder layers use {', '.join(kinds) or 'sliding_attention'}; supported are decoders "
            "whose layers are all full_attention"
        )
    # Mistral-like decoders have no use_sliding_window: their window is on where it is given.
    if "use_sliding_window" not in text and text.get("sliding_window"):
        raise InputError(
            f"{where}: decoder layers use a sliding window of {text['sliding_window']}; supported are "
            "decoders whose layers are all full_attention"
        )
    if text.get("num_local_experts") or text.get("num_experts"):
        raise InputError(f"{where}: the decoder mixes experts; supported are dense feed-forwards")


def check_checkpoint(folder: Path) -> None:
    """Refuse a checkpoint folder that cannot be exported, before loading it.

    Args:
        folder: with config.json and safetensors files, as `save_pretrained` writes them.

    Raises:
        InputError: a file is missing or not valid, or the configuration is not supported.
    """
    check_description(folder)
    shards = weight_files(folder)
    missing = [path.name for path in shards if not path.is_file()]
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if len(missing) == len(shards) and pickled:
        raise InputError(
            f"{folder} has no safetensors, only {', '.join(pickled[:3])}; pickled weights are not read, as "
            "they may run any code: save the model once with transformers' save_pretrained"
        )
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} of {len(shards)} weight files are missing: {', '.join(missing[:5])}"
            f"{', …' if len(missing) > 5 else ''}; download the checkpoint again"
        )


def check_description(folder: Path) -> None:
    """The part of `check_checkpoint` that needs no weights.

    Args:
        folder: with config.json and tokenizer.json.

    Raises:
        InputError: one is missing, or the configuration is not supported.
    """
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise InputError(
                f"{folder} has no {name}; give a folder that transformers' save_pretrained wrote, model and "
                "processor"
            )
    check_config(read_json(folder / "config.json"), str(folder / "config.json"))


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files a checkpoint should consist of, whether they are there or not.

    Raises:
        InputError: the index of shards is not valid.
    """
    index = folder / SHARDS
    if not index.is_file():
        return (folder / WEIGHTS,)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{index} is not an index of shards ({error}); download the checkpoint again"
        ) from error
    return tuple(folder / name for name in names)
