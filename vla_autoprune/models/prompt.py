"""The prompt of the small driving VLA: one fixed layout, token ids from an ego state and a command.

Layout: <bos>, then per camera its label and its image tokens, then the ego state and the command as words.
The text after the last image sees every visual token, so these are the rows that rank visual tokens.

No torch here: the vehicle's runtime builds its prompts with this module.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from vla_autoprune.bundle import TOKENIZER
from vla_autoprune.errors import BundleError, InputError
from vla_autoprune.frame import CAMERAS, Command, EgoState
from vla_autoprune.models.tokenizer import (
    BOS,
    EGO_SCALES,
    IMAGE,
    camera_word,
    ego_words,
)
from vla_autoprune.recipe import PromptLayout

SUFFIX_LENGTH = 9
"""Words after the last image."""


class Prompt(Protocol):
    """Turns frames into token ids, and tokens into text."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""

    @property
    def layout(self) -> PromptLayout:
        """What every prompt looks like."""

    def build(self, ego: EgoState, command: Command) -> NDArray[np.int64]:
        """Token ids without padding, at most as many as the layout has."""

    def heard(self, ego: EgoState) -> EgoState:
        """What the prompt says of an ego state."""

    def notes(self, ego: EgoState) -> tuple[str, ...]:
        """What the prompt could not say of an ego state."""

    def text(self, tokens: NDArray[np.integer]) -> str:
        """Tokens as text."""

    def files(self) -> dict[str, str]:
        """What a bundle needs to build these prompts: name to content."""


def prompt_layout(image_size: int = 96, patch_size: int = 16) -> PromptLayout:
    """The layout for square camera images of a size and a tower of a patch size, both in pixels."""
    tokens = (image_size // patch_size) ** 2
    spans: list[tuple] = [("text", 2)]
    for index, camera in enumerate(CAMERAS):
        spans.append(("visual", camera, tokens))
        spans.append(("text", SUFFIX_LENGTH if index == len(CAMERAS) - 1 else 1))
    return PromptLayout(segments=tuple(spans), image_size=(image_size, image_size))


class PromptBuilder:
    """Turns an ego state and a command into the token ids of a layout."""

    def __init__(self, tokenizer: Tokenizer, layout: PromptLayout):
        self.tokenizer = tokenizer
        self.layout = layout
        image = self.token_of(IMAGE)
        prefix = [self.token_of(BOS)]
        for span in layout.segments:
            if span[0] == "visual":
                prefix += [self.token_of(camera_word(span[1])), *[image] * span[2]]
        self._prefix = np.array(prefix, dtype=np.int64)
        if len(prefix) + SUFFIX_LENGTH != layout.length:
            raise BundleError(
                f"prompt layout has {layout.length} tokens, this prompt has {len(prefix) + SUFFIX_LENGTH}; "
                "the layout belongs to another model"
            )

    @classmethod
    def from_files(cls, tokenizer_json: Path, layout: PromptLayout) -> PromptBuilder:
        """A builder for the tokenizer of a bundle or a shipped model.

        Raises:
            BundleError: the file cannot be read as a tokenizer, or lacks a word; the message names it.
        """
        tokenizer = read_tokenizer(tokenizer_json)
        try:
            return cls(tokenizer, layout)
        except BundleError as error:
            raise BundleError(f"{tokenizer_json}: {error}; export the bundle anew") from error

    def build(self, ego: EgoState, command: Command) -> NDArray[np.int64]:
        """Token ids of a prompt.

        Args:
            ego: motion at the time of the frame; values beyond the bins are clipped, see `clipping_notes`.
            command: where the route goes.

        Returns:
            [N] token ids, N the layout's length.

        Raises:
            InputError: a number of the ego state is not finite.
        """
        for name, value in asdict(ego).items():
            if not math.isfinite(value):
                raise InputError(f"{name} of the ego state is {value}, not finite; check the odometry")
        return np.concatenate([self._prefix, self.suffix(ego, command)])

    @property
    def prefix(self) -> NDArray[np.int64]:
        """[N - SUFFIX_LENGTH] token ids up to the last image, the same in every prompt."""
        return self._prefix.copy()

    def suffix(self, ego: EgoState, command: Command) -> NDArray[np.int64]:
        """[SUFFIX_LENGTH] token ids after the last image."""
        return np.array([self.token_of(word) for word in ego_words(ego, command)], dtype=np.int64)

    def heard(self, ego: EgoState) -> EgoState:
        """`heard_ego`."""
        return heard_ego(ego)

    def notes(self, ego: EgoState) -> tuple[str, ...]:
        """`clipping_notes`."""
        return clipping_notes(ego)

    def files(self) -> dict[str, str]:
        """What a bundle needs to build these prompts: name to content."""
        return {TOKENIZER: self.tokenizer.to_str(pretty=True)}

    def text(self, tokens: NDArray[np.integer]) -> str:
        """Tokens as words, for people."""
        return " ".join(self.tokenizer.id_to_token(int(token)) or "?" for token in tokens)

    def token_of(self, word: str) -> int:
        """Id of a word.

        Raises:
            BundleError: the tokenizer does not know it.
        """
        token = self.tokenizer.token_to_id(word)
        if token is None:
            raise BundleError(f"the tokenizer does not know the word {word!r}; it belongs to another model")
        return token


def read_tokenizer(path: Path, way_out: str = "export the bundle anew") -> Tokenizer:
    """Read a `tokenizer.json`.

    Args:
        path: the file.
        way_out: what to do where it is broken, for the message.

    Raises:
        BundleError: it is missing or not one.
    """
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises bare Exception
        raise BundleError(f"{path} is not a tokenizer file: {error}; {way_out}") from error


def heard_ego(ego: EgoState) -> EgoState:
    """The ego state that the prompt's words print: rounded to their steps, clipped to their ranges."""
    return EgoState(**{name: scale.heard(getattr(ego, name)) for name, scale in EGO_SCALES.items()})


def clipping_notes(ego: EgoState) -> tuple[str, ...]:
    """Per field of the ego state beyond the prompt's bins: what was given, what is allowed, what was used."""
    given, used = asdict(ego), asdict(heard_ego(ego))
    return tuple(
        f"clipped: {name} is {given[name]:g}, outside {scale.range}; {used[name]:g} was used"
        for name, scale in EGO_SCALES.items()
        if not scale.holds(given[name])
    )
