"""Which models can be taken apart, and refusing the others by name before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Collection
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

LLAVA_DECODERS = ("llama", "mistral", "qwen2", "qwen3")
"""Decoders of a LLaVA: stacks of pre-norm layers between a plain word table and a final norm."""

LLAVA_TOWERS = ("clip_vision_model",)
"""Vision towers of a LLaVA."""

SHARDS = "model.safetensors.index.json"
GENERATION = "generation_config.json"
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
    decoder, tower = _part(config, "text_config", where), _part(config, "vision_config", where)
    text = decoder or config
    names = config.get("architectures") or ["nothing"]
    if not isinstance(names, list) or names[0] not in CLASSES:
        name = names[0] if isinstance(names, list) else names
        raise InputError(f"{where}: class {name} is not supported; supported: {', '.join(CLASSES)}")
    if names[0] == CLASSES[0]:
        for part, what, supported in (
            (decoder, "decoder", LLAVA_DECODERS),
            (tower, "vision tower", LLAVA_TOWERS),
        ):
            kind = part.get("model_type", supported[0])
            if kind not in supported:
                raise InputError(
                    f"{where}: the {what} is a {kind}, which is not supported in a LLaVA; supported: "
                    f"{', '.join(supported)}"
                )
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


def _part(config: Any, name: str, where: str) -> dict[str, Any]:
    """An object within a configuration, empty where there is none."""
    part = config.get(name) or {} if isinstance(config, dict) else None
    if not isinstance(part, dict):
        raise InputError(f"{where} is not a model's configuration: it or its {name} is no JSON object")
    return part


def require_all_weights(folder: Path, missing: Collection[str], total: int) -> None:
    """Refuse a checkpoint whose files lack weights of its model.

    Args:
        folder: of the checkpoint, for the message.
        missing: names of the weights that no file holds.
        total: weights of the model.

    Raises:
        InputError: there is one; the message names the first three.
    """
    if missing:
        names = sorted(missing)
        raise InputError(
            f"{folder}: its files hold no {', '.join(names[:3])}{', …' if len(names) > 3 else ''} "
            f"({len(names)} of {total} weights); download the checkpoint again"
        )


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
    if (folder / GENERATION).is_file():  # its end tokens count, and transformers passes over a broken one
        read_json(folder / GENERATION)


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
