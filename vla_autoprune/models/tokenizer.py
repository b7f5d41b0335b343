"""The small driving VLA's own word-level tokenizer: prompts and answers read as text. No torch here.

A prompt reads `<bos> CAM_FRONT_LEFT: <image> … speed 7.4 accel +0.4 yaw +0.02 turn left plan:`, an answer
`3.7m +0.0025/m 3.8m +0.0006/m …`. Numbers are binned; every bin is one word.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from vla_autoprune.frame import CAMERAS, Command, EgoState
from vla_autoprune.models.actions import ActionCodec

PAD, BOS, EOS, UNKNOWN, IMAGE, HIDDEN = "<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<hidden>"
SPECIAL_WORDS: tuple[str, ...] = (PAD, BOS, EOS, UNKNOWN, IMAGE, HIDDEN)
"""HIDDEN stands in for action tokens the trainer hides from the decoder."""

FIELD_WORDS: tuple[str, ...] = ("speed", "accel", "yaw", "turn", "plan:")


@dataclass(frozen=True)
class Scale:
    """Numbers binned into words: low, low + step, … high, printed with a fixed number of decimals."""

    low: float
    high: float
    step: float
    decimals: int
    signed: bool

    @property
    def words(self) -> tuple[str, ...]:
        """One word per bin, rising."""
        bins = round((self.high - self.low) / self.step) + 1
        return tuple(self._print(self.low + index * self.step) for index in range(bins))

    def word(self, value: float) -> str:
        """The nearest bin's word; values beyond the ends take the outermost word."""
        index = round((min(max(value, self.low), self.high) - self.low) / self.step)
        return self._print(self.low + index * self.step)

    def heard(self, value: float) -> float:
        """The number that a value's word prints."""
        return float(self.word(value))

    @property
    def range(self) -> str:
        """From the lowest to the highest number, for people."""
        return f"{self.low:g} to {self.high:g}"

    def holds(self, value: float) -> bool:
        """Whether a value needs no clipping; half a bin beyond the ends still rounds to them."""
        return self.low - self.step / 2 <= value <= self.high + self.step / 2

    def _print(self, value: float) -> str:
        rounded = round(value, self.decimals) + 0.0  # turns -0.0 into 0.0
        return f"{rounded:{'+' if self.signed else ''}.{self.decimals}f}"


SPEED_MPS = Scale(0.0, 24.0, 0.2, decimals=1, signed=False)
ACCELERATION_MPS2 = Scale(-8.0, 4.0, 0.2, decimals=1, signed=True)
YAW_RATE_RPS = Scale(-0.6, 0.6, 0.02, decimals=2, signed=True)


EGO_SCALES: dict[str, Scale] = {
    "speed_mps": SPEED_MPS,
    "acceleration_mps2": ACCELERATION_MPS2,
    "yaw_rate_rps": YAW_RATE_RPS,
}
"""By field of an EgoState."""


def camera_word(camera: str) -> str:
    """The label in front of a camera's image tokens."""
    return f"{camera}:"


def build_tokenizer() -> Tokenizer:
    """The tokenizer, the same every time: special words, labels, ego bins, then the action bins."""
    vocabulary = {word: index for index, word in enumerate(_words())}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL_WORDS))
    return tokenizer


def action_codec(tokenizer: Tokenizer) -> ActionCodec:
    """The action bins with the token ids they have in a tokenizer of `build_tokenizer`."""
    words = _action_words()
    distances = ActionCodec(first_distance_token=0, first_curvature_token=0).distance_bins
    vocabulary = tokenizer.get_vocab()
    return ActionCodec(
        first_distance_token=vocabulary[words[0]], first_curvature_token=vocabulary[words[distances]]
    )


def ego_words(ego: EgoState, command: Command) -> tuple[str, ...]:
    """The words of a prompt's suffix, from "speed" to "plan:"."""
    return (
        "speed",
        SPEED_MPS.word(ego.speed_mps),
        "accel",
        ACCELERATION_MPS2.word(ego.acceleration_mps2),
        "yaw",
        YAW_RATE_RPS.word(ego.yaw_rate_rps),
        "turn",
        command.value,
        "plan:",
    )


def ordinal_families(tokenizer: Tokenizer) -> tuple[range, ...]:
    """Token ids whose order is the order of the numbers they print, one range per family of bins."""
    codec = action_codec(tokenizer)
    starts_and_sizes = [
        (tokenizer.get_vocab()[scale.words[0]], len(scale.words)) for scale in EGO_SCALES.values()
    ]
    families = [range(start, start + size) for start, size in starts_and_sizes]
    return (*families, codec.tokens_at(0), codec.tokens_at(1))


def _action_words() -> tuple[str, ...]:
    bins = ActionCodec(first_distance_token=0, first_curvature_token=0)
    decimals = 4
    distances = [f"{metres:.1f}m" for metres in bins.distances_m]
    curvatures = [f"{np.round(value, decimals) + 0.0:+.{decimals}f}/m" for value in bins.curvatures_per_m]
    return (*distances, *curvatures)


def _words() -> list[str]:
    words = [
        *SPECIAL_WORDS,
        *map(camera_word, CAMERAS),
        *FIELD_WORDS,
        *(command.value for command in Command),
    ]
    for scale in EGO_SCALES.values():
        words += scale.words
    words += _action_words()
    if len(set(words)) != len(words):
        raise AssertionError("two bins print the same word; give them more decimals")
    return words
