"""What `--model`, `--prompt` and `--decoder` name: the shipped model, one of ours, or any checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vla_autoprune.errors import InputError
from vla_autoprune.files import read_json
from vla_autoprune.frame import Command
from vla_autoprune.models.answers import AnswerFormat, decoder_option
from vla_autoprune.models.driving_vla import SHIPPED, load_model, load_shipped
from vla_autoprune.models.families import adapter_for, check_checkpoint, require_all_weights, weight_files
from vla_autoprune.models.hub import downloaded
from vla_autoprune.models.image_processor import read_image_processor
from vla_autoprune.models.preprocess import Preprocessing
from vla_autoprune.models.prompt import Prompt, read_tokenizer
from vla_autoprune.models.prompt_template import (
    SAMPLE_EGO,
    PromptTemplate,
    TemplatePrompt,
    read_template,
)
from vla_autoprune.models.stored_weights import StoredWeights, skeleton

if TYPE_CHECKING:
    from vla_autoprune.models.adapter import StageModel

STREAMED_BYTES = 2 << 30
"""Of weights in a checkpoint, from which on an export leaves them in their files if not told otherwise."""


class Vla(Protocol):
    """A model with everything needed to ask it."""

    @property
    def model(self) -> Any:
        """Of one of transformers' classes in `families.CLASSES`."""

    @property
    def prompt(self) -> Prompt:
        """Frames to token ids."""

    @property
    def codec(self) -> AnswerFormat:
        """Tokens to waypoints."""

    @property
    def preprocessing(self) -> Preprocessing:
        """Images to pixels."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of somebody else's, with a template and an answer format."""

    model: Any
    prompt: TemplatePrompt
    codec: AnswerFormat
    preprocessing: Preprocessing


@dataclass(frozen=True)
class Opened:
    """A model and where it came from.

    Attributes:
        vla: the model.
        folder: with its files.
        name: for people and recipes.
        streams: whether its weights stay in the files.
    """

    vla: Vla
    folder: Path
    name: str
    streams: bool = False

    def adapter(self) -> StageModel:
        """The model, taken apart."""
        adapter = adapter_for(self.vla.model)
        if self.streams:
            adapter.read_from(StoredWeights(self.folder, self.vla.model))
        return adapter


def open_model(
    model: str | None, prompt: Path | None, decoder: str | None, *, stream: bool | None = False
) -> Opened:
    """Open what the command line names.

    Args:
        model: a folder or a hub id; None is the shipped model.
        prompt: template file; only for checkpoints that are not ours, which need one.
        decoder: see `decoder_option`; the same.
        stream: leave a checkpoint's weights in its files; None does so from `STREAMED_BYTES` on.

    Returns:
        The model in float32 on the CPU, or without memory for its weights.

    Raises:
        InputError: something is missing, not supported, or does not fit together.
    """
    folder = None if model is None else Path(model)
    ours = folder is None or (folder / "actions.json").is_file()
    if ours and (prompt is not None or decoder is not None):
        option = "--prompt" if prompt is not None else "--decoder"
        raise InputError(
            f"{option} is for checkpoints without prompt and actions of their own; "
            f"{model or 'the shipped model'} has both"
        )
    if folder is None:
        return Opened(load_shipped(), SHIPPED, "driving_vla")
    if ours:
        return Opened(load_model(folder), folder, folder.resolve().name)
    assert model is not None
    if prompt is None or decoder is None:
        option = "--prompt" if prompt is None else "--decoder"
        raise InputError(
            f"--model {model} is not a model that vla-autoprune trained, so it needs --prompt FILE and "
            f"--decoder FORMAT; {option} is missing (docs/model_families.md has examples)"
        )
    template = read_template(prompt)
    place = folder if folder.is_dir() else downloaded(model)
    check_checkpoint(place)
    if stream is None:
        stream = sum(path.stat().st_size for path in weight_files(place)) >= STREAMED_BYTES
    opened = open_checkpoint(place, template, decoder, stream=stream)
    return Opened(opened, place, Path(model).resolve().name, stream)


def open_checkpoint(
    folder: Path, template: PromptTemplate, decoder: str, *, stream: bool = False
) -> Checkpoint:
    """Load a checkpoint and put prompt, answer format and preprocessing to it.

    Args:
        folder: as `save_pretrained` writes it, tokenizer and image processor included.
        template: of the driving prompt.
        decoder: see `decoder_option`.
        stream: build the model without memory for its weights.

    Returns:
        The checkpoint in float32 on the CPU.

    Raises:
        InputError: a file is missing, the model is not supported, or template and model do not fit.
    """
    import torch
    import transformers
    from transformers.utils import logging

    check_checkpoint(folder)
    (name,) = read_json(folder / "config.json")["architectures"][:1]
    image_processor = read_image_processor(folder)
    tokenizer = read_tokenizer(folder / "tokenizer.json", "download the checkpoint again")
    logging.disable_progress_bar()
    try:
        if stream:
            model = skeleton(folder)
        else:
            model, loading = getattr(transformers, name).from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation="sdpa",
                local_files_only=True,
                output_loading_info=True,
            )
            # transformers makes up what it does not find.
            require_all_weights(folder, loading["missing_keys"], len(model.state_dict()))
    except InputError:
        raise
    except Exception as error:  # safetensors and transformers each raise their own
        raise InputError(f"the model in {folder} cannot be read: {error}") from error
    adapter = adapter_for(model.eval())
    config = model.config
    if template.image_token is None:
        word = tokenizer.id_to_token(config.image_token_id)
        if word is None:
            raise InputError(
                f"{folder / 'tokenizer.json'} has no token {config.image_token_id}, which stands for images"
            )
        template = template.model_copy(update={"image_token": word})
    fixed = adapter.fixed_image_size
    if fixed is not None and template.image_size not in (None, fixed):
        raise InputError(
            f"prompt template: image_size is {template.image_size}; the model's tower takes {fixed}"
        )
    size = fixed or template.image_size
    if size is None:
        raise InputError("prompt template: image_size is missing; this model takes many, name yours")
    layout = template.layout(tokenizer, adapter.visual_tokens(size), size)
    prompt = TemplatePrompt(tokenizer, template, layout)
    _check_vision_marks(config, prompt)
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = getattr(config.text_config, "eos_token_id", None)
    tokens = tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)
    codec = decoder_option(decoder, tokens)
    vocabulary = adapter.head.out_features
    if codec.largest_token >= vocabulary:
        raise InputError(
            f"--decoder {decoder}: its tokens go up to {codec.largest_token}, the model's vocabulary to "
            f"{vocabulary - 1}; check first_token and end_tokens"
        )
    return Checkpoint(
        model=model,
        prompt=prompt,
        codec=codec,
        preprocessing=image_processor.preprocessing(layout.cameras, size),
    )


def _check_vision_marks(config: Any, prompt: TemplatePrompt) -> None:
    """Families that put tokens around images were trained with them; a template without them is a mistake."""
    start = getattr(config, "vision_start_token_id", None)
    if start is None:
        return
    ids = prompt.build(SAMPLE_EGO, Command.STRAIGHT)
    row = 0
    for span in prompt.layout.segments:
        if span[0] == "visual" and (row == 0 or ids[row - 1] != start):
            word = prompt.tokenizer.id_to_token(start)
            raise InputError(f"prompt template: {{{span[1]}}} must stand between {word!r} and its end token")
        row += span[-1]
