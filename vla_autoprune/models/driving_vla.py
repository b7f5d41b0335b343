"""The small driving VLA: a LLaVA of transformers, scaled down, with the files it is shipped in."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from vla_autoprune.errors import InputError
from vla_autoprune.models.actions import ActionCodec
from vla_autoprune.models.preprocess import Preprocessing
from vla_autoprune.models.prompt import PromptBuilder, prompt_layout
from vla_autoprune.models.tokenizer import (
    BOS,
    EOS,
    IMAGE,
    PAD,
    action_codec,
    build_tokenizer,
    ordinal_families,
)

if TYPE_CHECKING:
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

SHIPPED = Path(__file__).parent / "shipped"
"""The trained model that comes with the package."""

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "actions.json", "preprocess.json")


@dataclass(frozen=True)
class ModelSize:
    """What can be scaled: the defaults give about 2.6 million parameters.

    Attributes:
        image_size: pixels per side of a camera image.
        patch_size: pixels per side of a patch; a patch is one visual token.
        layers: decoder layers.
        width: hidden size of the tower and the decoder.
        heads: attention heads of the decoder and the tower.
        kv_heads: key/value heads of the decoder.
        feed_forward: width of the decoder's gated feed-forward.
        tower_layers: layers of the vision tower.
    """

    image_size: int = 96
    patch_size: int = 16
    layers: int = 8
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 352
    tower_layers: int = 4


@dataclass(frozen=True)
class DrivingVla:
    """A model with everything needed to ask it: prompt, actions, preprocessing."""

    model: LlavaForConditionalGeneration
    prompt: PromptBuilder
    codec: ActionCodec
    preprocessing: Preprocessing

    @property
    def decoder_config(self) -> Any:
        """The LlamaConfig."""
        return self.model.config.text_config

    @property
    def tower_config(self) -> Any:
        """The CLIPVisionConfig."""
        return self.model.config.vision_config

    def to(self, device: torch.device) -> DrivingVla:
        """Move the model, in place."""
        torch_module: Any = self.model
        torch_module.to(device)
        return self


def model_config(size: ModelSize, tokenizer: Tokenizer) -> LlavaConfig:
    """The transformers configuration of a size.

    Raises:
        InputError: widths and heads do not divide.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    if size.width % size.heads or size.heads % size.kv_heads or (size.width // size.heads) % 2:
        raise InputError(
            f"width {size.width} with {size.heads} heads and {size.kv_heads} KV heads does not divide; the "
            "width must be an even multiple of the heads, the heads a multiple of the KV heads"
        )
    vocabulary = tokenizer.get_vocab()
    special: dict[str, Any] = {
        "bos_token_id": vocabulary[BOS],
        "eos_token_id": vocabulary[EOS],
        "pad_token_id": vocabulary[PAD],
    }
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=size.width,
            intermediate_size=3 * size.width,
            num_hidden_layers=size.tower_layers,
            num_attention_heads=size.heads,
            image_size=size.image_size,
            patch_size=size.patch_size,
            projection_dim=size.width,
        ),
        text_config=LlamaConfig(
            vocab_size=64 * math.ceil(tokenizer.get_vocab_size() / 64),
            hidden_size=size.width,
            intermediate_size=size.feed_forward,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            **special,
        ),
        image_token_index=vocabulary[IMAGE],
        image_seq_length=(size.image_size // size.patch_size) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **special,
    )


def build_model(size: ModelSize | None = None, seed: int = 0) -> DrivingVla:
    """An untrained model.

    Args:
        size: its measures; None takes the shipped model's.
        seed: of the initial weights.

    Returns:
        The model in float32 on the CPU.

    Raises:
        InputError: the size is impossible.
    """
    import torch
    from transformers import LlavaForConditionalGeneration

    size = size or ModelSize()
    tokenizer = build_tokenizer()
    config = model_config(size, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
        _spread_numbers(model, tokenizer, seed)
    return DrivingVla(
        model=model.eval(),
        prompt=PromptBuilder(tokenizer, prompt_layout(size.image_size, size.patch_size)),
        codec=action_codec(tokenizer),
        preprocessing=Preprocessing(width=size.image_size, height=size.image_size, aspect_ratio=16 / 9),
    )


def save_model(vla: DrivingVla, directory: Path) -> None:
    """Write a model's files in half precision; an existing directory is replaced once all are written.

    Args:
        vla: the model; stays as it is.
        directory: its parent must exist or be creatable.
    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    directory.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        half = {
            name: tensor.detach().to("cpu", torch.float16) for name, tensor in vla.model.state_dict().items()
        }
        vla.model.save_pretrained(made, state_dict=half)
        (made / "tokenizer.json").write_text(vla.prompt.tokenizer.to_str(pretty=True), encoding="utf-8")
        (made / "actions.json").write_text(vla.codec.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (made / "preprocess.json").write_text(
            vla.preprocessing.model_dump_json(indent=2) + "\n", encoding="utf-8"
        )
        made.chmod(0o755)
        _replace_directory(made, directory)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def load_model(directory: Path) -> DrivingVla:
    """Read a model that `save_model` wrote.

    Returns:
        The model in float32 on the CPU, in evaluation mode.

    Raises:
        InputError: a file is missing or cannot be read; the message names it.
    """
    import torch
    from transformers import LlavaForConditionalGeneration
    from transformers.utils import logging

    for name in MODEL_FILES:
        if not (directory / name).is_file():
            raise InputError(f"{directory} has no {name}; a model directory holds {', '.join(MODEL_FILES)}")
    logging.disable_progress_bar()
    try:
        codec = ActionCodec.model_validate_json((directory / "actions.json").read_text(encoding="utf-8"))
        preprocessing = Preprocessing.model_validate_json(
            (directory / "preprocess.json").read_text(encoding="utf-8")
        )
        model = LlavaForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
    except Exception as error:  # pydantic, safetensors and transformers each raise their own
        raise InputError(f"the model in {directory} cannot be read: {error}") from error
    vision: Any = model.config.vision_config
    return DrivingVla(
        model=model.eval(),
        prompt=PromptBuilder.from_files(
            directory / "tokenizer.json", prompt_layout(vision.image_size, vision.patch_size)
        ),
        codec=codec,
        preprocessing=preprocessing,
    )


def load_shipped() -> DrivingVla:
    """The trained model that comes with the package.

    Raises:
        InputError: it is not there; the message says how to train it.
    """
    if not SHIPPED.is_dir():
        raise InputError(f"no trained model in {SHIPPED}; train one with: vla-autoprune train --out DIR")
    return load_model(SHIPPED)


def _spread_numbers(model: Any, tokenizer: Tokenizer, seed: int) -> None:
    """Give words of neighbouring numbers similar embeddings, so that bins need not be learnt one by one."""
    import torch

    random = np.random.default_rng(seed)
    width = model.config.text_config.hidden_size
    tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    with torch.no_grad():
        for table in tables:
            scale = float(table.std())
            for family in ordinal_families(tokenizer):
                place = np.linspace(-1.0, 1.0, len(family))[:, None]
                frequency, phase = random.normal(0.0, 4.0, width), random.uniform(0, 2 * np.pi, width)
                waves = scale * math.sqrt(2) * np.cos(place * frequency + phase)
                table[family.start : family.stop] = torch.from_numpy(waves).to(table.dtype)


def _replace_directory(made: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        target.replace(old)
    made.replace(target)
    shutil.rmtree(old, ignore_errors=True)
