"""Prompts from a template file, for models with a tokenizer of their own. No torch here.

    {"text": "<|im_start|>user\\n<|vision_start|>{CAM_FRONT}<|vision_end|> speed {speed_mps:.1f} m/s,
     {command}<|im_end|>\\n<|im_start|>assistant\\n", "suffix_tokens": 40, "image_size": [448, 252]}

A camera's name stands for its image tokens. What changes from frame to frame comes after the last image: rows
before it are fixed, and the text after it is padded to `suffix_tokens`.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from tokenizers import Tokenizer

from vla_autoprune.bundle import PROMPT, TOKENIZER
from vla_autoprune.errors import BundleError, InputError
from vla_autoprune.files import first_fault
from vla_autoprune.frame import Command, EgoState
from vla_autoprune.models.prompt import Prompt, PromptBuilder, read_tokenizer
from vla_autoprune.recipe import PromptLayout

EGO_FIELDS = ("speed_mps", "acceleration_mps2", "yaw_rate_rps", "command")
"""What a template may say of a frame."""

SAMPLE_EGO = EgoState(12.3, -1.23, -0.123)

Pixels = Annotated[int, Field(ge=1, le=8192)]


class PromptTemplate(BaseModel):
    """A prompt with fields; a JSON file, of the user and of a bundle.

    Attributes:
        text: the prompt, with cameras and ego fields in braces and formats as Python has them.
        suffix_tokens: tokens the text after the last image is padded to.
        image_size: (width, height) in pixels of every camera's input; None where the model fixes it.
        commands: what `{command}` prints for left, straight and right.
        image_token: the word that stands for one visual token; None takes the model's.
        add_special_tokens: the tokenizer puts its own tokens around the prompt, as transformers does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    suffix_tokens: int = Field(ge=1)
    image_size: tuple[Pixels, Pixels] | None = None
    commands: Mapping[Command, str] = {command: command.value for command in Command}
    image_token: str | None = Field(default=None, min_length=1)
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check(self) -> PromptTemplate:
        names = _fields(self.text)
        for name in names:
            if name not in EGO_FIELDS and not (name.isidentifier() and name.isupper()):
                raise ValueError(
                    f"text has the field {{{name}}}; allowed are cameras (capitals, like {{CAM_FRONT}}) and "
                    f"{', '.join(EGO_FIELDS)}"
                )
        cameras = self.cameras
        if not cameras or len(set(cameras)) < len(cameras):
            raise ValueError(f"text names the cameras {list(cameras)}; at least one, each once")
        early = [name for name in names[: names.index(cameras[-1])] if name in EGO_FIELDS]
        if early:
            raise ValueError(
                f"text has {{{early[0]}}} before the last image; what changes with the frame comes after it"
            )
        missing = [command.value for command in Command if command not in self.commands]
        if missing:
            raise ValueError(f"commands lacks {', '.join(missing)}")
        return self

    @property
    def cameras(self) -> tuple[str, ...]:
        """Cameras in prompt order."""
        return tuple(name for name in _fields(self.text) if name not in EGO_FIELDS)

    def printed(self, ego: EgoState, command: Command) -> str:
        """The prompt as text, each image one word.

        Raises:
            InputError: a format does not fit its number.
        """
        images = dict.fromkeys(self.cameras, self.image_token or "")
        try:
            return self.text.format(**images, **asdict(ego), command=self.commands[command])
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise InputError(f"prompt template: text cannot be filled in ({error})") from error

    def layout(self, tokenizer: Tokenizer, visual_tokens: int, image_size: tuple[int, int]) -> PromptLayout:
        """The layout the prompt has with a tokenizer.

        Args:
            tokenizer: the model's.
            visual_tokens: tokens of one image.
            image_size: (width, height) in pixels of every camera's input.

        Raises:
            InputError: images are not where the template says, or the text after them is longer than
                `suffix_tokens`.
        """
        before, after = _split(self, tokenizer, SAMPLE_EGO, Command.STRAIGHT)
        if not len(after):
            raise InputError(
                f"prompt template: text ends with {{{self.cameras[-1]}}}; the text after the last image "
                "ranks the visual tokens, so there must be some"
            )
        if len(after) > self.suffix_tokens:
            raise InputError(
                f"prompt template: suffix_tokens is {self.suffix_tokens}; a common frame's text after the "
                f"last image has {len(after)} tokens, so give that and some more"
            )
        spans: list[tuple] = []
        for camera, ids in zip(self.cameras, before, strict=True):
            spans += [("text", len(ids))] if len(ids) else []
            spans.append(("visual", camera, visual_tokens))
        return PromptLayout(segments=(*spans, ("text", self.suffix_tokens)), image_size=image_size)


class TemplatePrompt:
    """Turns frames into the token ids of a template's layout.

    Args:
        tokenizer: the model's.
        template: with its image token.
        layout: of the recipe.

    Raises:
        BundleError: template and tokenizer give another layout; the message spells out the difference.
    """

    def __init__(self, tokenizer: Tokenizer, template: PromptTemplate, layout: PromptLayout) -> None:
        self.tokenizer, self.template, self.layout = tokenizer, template, layout
        counts = {span[2] for span in layout.segments if span[0] == "visual"}
        assert layout.image_size is not None
        try:
            own = template.layout(tokenizer, max(counts), layout.image_size)
        except InputError as error:
            raise BundleError(str(error)) from error
        if own != layout:
            raise BundleError(f"the prompt's layout is {_told(own)}, the recipe's is {_told(layout)}")
        image = np.full(max(counts), tokenizer.token_to_id(template.image_token or ""), dtype=np.int64)
        before, _ = _split(template, tokenizer, SAMPLE_EGO, Command.STRAIGHT)
        self._prefix = np.concatenate([part for ids in before for part in (ids, image)])

    def build(self, ego: EgoState, command: Command) -> NDArray[np.int64]:
        """Token ids of a prompt, without padding.

        Args:
            ego: motion at the time of the frame.
            command: where the route goes.

        Returns:
            [at most N] token ids.

        Raises:
            InputError: a number of the ego state is not finite, or the text is longer than the layout.
        """
        for name, value in asdict(ego).items():
            if not math.isfinite(value):
                raise InputError(f"{name} of the ego state is {value}, not finite; check the odometry")
        _, after = _split(self.template, self.tokenizer, ego, command)
        if len(after) > self.template.suffix_tokens:
            raise InputError(
                f"the prompt's text after the last image has {len(after)} tokens; suffix_tokens of the "
                f"template allows {self.template.suffix_tokens}"
            )
        return np.concatenate([self._prefix, after])

    def heard(self, ego: EgoState) -> EgoState:
        """The ego state as it is, printed as the template says."""
        return ego

    def notes(self, ego: EgoState) -> tuple[str, ...]:
        """What the prompt could not say of the ego state: nothing, numbers are printed."""
        return ()

    def text(self, tokens: NDArray[np.integer]) -> str:
        """Tokens as text, without special tokens."""
        return self.tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)

    def files(self) -> dict[str, str]:
        """What a bundle needs to build these prompts: name to content."""
        return {
            TOKENIZER: self.tokenizer.to_str(pretty=True),
            PROMPT: self.template.model_dump_json(indent=1) + "\n",
        }


def read_template(path: Path) -> PromptTemplate:
    """Read a template file.

    Raises:
        InputError: it is missing or not valid; the message names file and field.
    """
    try:
        return PromptTemplate.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a prompt template") from error
    except ValidationError as error:
        raise InputError(f"{path}: {first_fault(error)}; see docs/model_families.md") from error


def read_prompt(folder: Path, layout: PromptLayout) -> Prompt:
    """The prompt of a bundle: its template's, or the small driving VLA's where there is no template.

    Args:
        folder: the bundle's.
        layout: of its recipe.

    Raises:
        BundleError: a file is not valid, or gives another layout than the recipe's.
    """
    path, anew = folder / PROMPT, "export the bundle anew with vla-autoprune export"
    if not path.is_file():
        return PromptBuilder.from_files(folder / TOKENIZER, layout)
    tokenizer = read_tokenizer(folder / TOKENIZER)
    try:
        return TemplatePrompt(tokenizer, read_template(path), layout)
    except (BundleError, InputError) as error:
        raise BundleError(f"{path}: {error}; {anew}") from error


def _fields(text: str) -> list[str]:
    try:
        return [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise ValueError(f"text has unmatched braces ({error}); write {{{{ for a brace") from error


def _split(
    template: PromptTemplate, tokenizer: Tokenizer, ego: EgoState, command: Command
) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
    """Token ids in front of each image, and after the last one."""
    image = tokenizer.token_to_id(template.image_token or "")
    if image is None:
        raise InputError(f"prompt template: the tokenizer does not know image_token {template.image_token!r}")
    text = template.printed(ego, command)
    ids = np.array(tokenizer.encode(text, add_special_tokens=template.add_special_tokens).ids, dtype=np.int64)
    places = np.flatnonzero(ids == image)
    if len(places) != len(template.cameras):
        raise InputError(
            f"prompt template: {len(places)} image tokens for {len(template.cameras)} cameras; write the "
            "image token only through the cameras' fields"
        )
    parts = np.split(ids, places)
    return [parts[0], *(part[1:] for part in parts[1:-1])], parts[-1][1:]


def _told(layout: PromptLayout) -> str:
    spans = " ".join(
        f"{span[1]}:{span[2]}" if span[0] == "visual" else str(span[1]) for span in layout.segments
    )
    return f"{spans} at {layout.image_size}"
