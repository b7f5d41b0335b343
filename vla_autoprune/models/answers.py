"""What models answer with: waypoints as text, action tokens of a codebook, or our own bins. No torch here.

Parsing is strict. An answer that is not exactly a plan raises; no waypoint is ever made up.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from vla_autoprune.errors import BundleError, InputError, PlanError
from vla_autoprune.files import first_fault
from vla_autoprune.frame import WAYPOINT_TIMES_S, FloatArray
from vla_autoprune.models.actions import ActionCodec

STANDSTILL_M = 0.05
"""Shorter steps have no direction of their own: the heading stays."""

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
PAIR = rf"[(\[]\s*({NUMBER})\s*,\s*({NUMBER})\s*[)\]]"

EndTokens = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]


class AnswerFormat(Protocol):
    """How a plan is read off generated tokens."""

    @property
    def length(self) -> int:
        """Longest answer in tokens."""

    @property
    def steps(self) -> int:
        """Waypoints of an answer, every 0.5 s; a plan takes the first six."""

    @property
    def largest_token(self) -> int:
        """The largest token id the format names."""

    def tokens_at(self, position: int) -> range | None:
        """Neighbouring tokens that stand for neighbouring numbers; None where the likeliest word is taken."""

    def is_complete(self, tokens: Sequence[int]) -> bool:
        """Whether an answer ends here."""

    def waypoints(self, tokens: Sequence[int], text: str) -> NDArray[np.float32]:
        """[steps, 3] x, y (metres) and heading (radians) in the ego frame.

        Raises:
            PlanError: the answer is not exactly a plan.
        """

    def model_dump_json(self, *, indent: int | None = None) -> str:
        """The JSON file of a bundle."""


class _Format(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    length: int = Field(ge=1, description="longest answer in tokens")
    steps: int = Field(default=len(WAYPOINT_TIMES_S), ge=len(WAYPOINT_TIMES_S))
    end_tokens: EndTokens
    largest_distance_m: float = Field(default=200.0, gt=0)

    def tokens_at(self, position: int) -> range | None:
        return None

    def _checked(self, path: FloatArray) -> NDArray[np.float32]:
        """[steps, 3] waypoints with headings, after a check that they lie in reach."""
        farthest = float(np.abs(path[:, :2]).max())
        if not farthest <= self.largest_distance_m:
            raise PlanError(
                f"the answer has a waypoint {farthest:g} m away; allowed are {self.largest_distance_m:g} m"
            )
        return path.astype(np.float32)


class WaypointText(_Format):
    """Waypoints written as a list of pairs, `(x, y)` or `[x, y]`, and nothing else between the marks.

    Attributes:
        length: longest answer in tokens.
        steps: pairs of an answer, every 0.5 s.
        end_tokens: any of these ends the answer.
        axes: what a pair says: metres forward and to the left, or to the right and forward.
        begin: the list follows the last of these words; None expects nothing in front of the list.
        end: the list stops at these words; None expects nothing after the list.
        largest_distance_m: no waypoint may lie farther away along an axis.
    """

    kind: Literal["waypoints"] = "waypoints"
    axes: Literal["forward_left", "right_forward"] = "forward_left"
    begin: str | None = Field(default=None, min_length=1)
    end: str | None = Field(default=None, min_length=1)

    @property
    def largest_token(self) -> int:
        """The largest end token."""
        return max(self.end_tokens)

    def is_complete(self, tokens: Sequence[int]) -> bool:
        """An end token has come."""
        return bool(tokens) and tokens[-1] in self.end_tokens

    def waypoints(self, tokens: Sequence[int], text: str) -> NDArray[np.float32]:
        """Read the list of pairs.

        Args:
            tokens: the answer, its end token included.
            text: the answer as text, without the end token.

        Returns:
            [steps, 3] x, y (metres) and heading (radians) in the ego frame; a waypoint's heading is the
            direction of the step that led there.

        Raises:
            PlanError: there is no such list, or more or fewer pairs, or one is out of reach.
        """
        part = text
        if self.begin is not None:
            _, found, part = text.rpartition(self.begin)
            if not found:
                raise PlanError(f"the answer has no {self.begin!r}: {_shown(text)}")
        if self.end is not None:
            part, found, _ = part.partition(self.end)
            if not found:
                raise PlanError(f"the answer's list does not end with {self.end!r}: {_shown(text)}")
        pairs = rf"{PAIR}(?:\s*,?\s*{PAIR})*"
        if not re.fullmatch(rf"\s*(?:[(\[]\s*{pairs}\s*[)\]]|{pairs})\s*\.?\s*", part):
            raise PlanError(f"the answer is not a list of {self.steps} pairs of numbers: {_shown(text)}")
        path = np.array([[float(x), float(y)] for x, y in re.findall(PAIR, part)])
        if len(path) != self.steps:
            raise PlanError(f"the answer has {len(path)} waypoints, a plan has {self.steps}: {_shown(text)}")
        if self.axes == "right_forward":
            path = np.stack([path[:, 1], -path[:, 0]], axis=1)
        return self._checked(np.column_stack([path, _headings(path)]))


class ActionCodebook(_Format):
    """One token per step; each stands for a motion in the frame of the step before.

    Attributes:
        length: longest answer in tokens.
        steps: action tokens of an answer, one every 0.5 s.
        end_tokens: any of these ends the answer, after the action tokens.
        first_token: token id of the first motion; the others follow it.
        motions: x, y (metres, forward and left) and turn (radians) of every token.
        text_first: words may come before the first action token; otherwise the answer begins with it.
        largest_distance_m: no waypoint may lie farther away along an axis.
    """

    kind: Literal["codebook"] = "codebook"
    first_token: int = Field(ge=0)
    motions: Annotated[tuple[tuple[float, float, float], ...], Field(min_length=2)]
    text_first: bool = False

    @model_validator(mode="after")
    def _check(self) -> ActionCodebook:
        if self.length < self.steps:
            raise ValueError(f"length is {self.length}; {self.steps} action tokens need at least as many")
        return self

    @property
    def tokens(self) -> range:
        """The action tokens."""
        return range(self.first_token, self.first_token + len(self.motions))

    @property
    def largest_token(self) -> int:
        """The largest of action and end tokens."""
        return max(*self.end_tokens, self.tokens.stop - 1)

    def is_complete(self, tokens: Sequence[int]) -> bool:
        """All action tokens have come, or the model has ended its answer."""
        return bool(tokens) and (
            tokens[-1] in self.end_tokens or sum(token in self.tokens for token in tokens) == self.steps
        )

    def waypoints(self, tokens: Sequence[int], text: str) -> NDArray[np.float32]:
        """Put the motions together.

        Args:
            tokens: the answer.
            text: the same as text, for messages.

        Returns:
            [steps, 3] x, y (metres) and heading (radians) in the ego frame.

        Raises:
            PlanError: too few action tokens, other words among them, or a waypoint out of reach.
        """
        ids = list(tokens)
        first = next((place for place, token in enumerate(ids) if token in self.tokens), len(ids))
        if first and not self.text_first:
            raise PlanError(f"the answer does not begin with an action token: {_shown(text)}")
        actions = ids[first : first + self.steps]
        for place, token in enumerate(actions):
            if token not in self.tokens:
                raise PlanError(
                    f"action {place} of the answer is token {token}, not one of "
                    f"{self.tokens.start}..{self.tokens.stop - 1}: {_shown(text)}"
                )
        if len(actions) < self.steps:
            raise PlanError(f"the answer has {len(actions)} action tokens, a plan has {self.steps}")
        path, (x, y, heading) = [], (0.0, 0.0, 0.0)
        for token in actions:
            forward, left, turn = self.motions[token - self.first_token]
            x += forward * math.cos(heading) - left * math.sin(heading)
            y += forward * math.sin(heading) + left * math.cos(heading)
            heading += turn
            path.append((x, y, heading))
        return self._checked(np.array(path))


_ANY: TypeAdapter[ActionCodec | WaypointText | ActionCodebook] = TypeAdapter(
    Annotated[ActionCodec | WaypointText | ActionCodebook, Field(discriminator="kind")]
)


def parse_answer_format(content: bytes, end_tokens: Sequence[int] = ()) -> AnswerFormat:
    """An answer format from JSON.

    Args:
        content: of the file; `kind` says which format, and is "bins" where there is none.
        end_tokens: of the model, for a file that names none.

    Returns:
        The format.

    Raises:
        ValidationError: it is not one.
    """
    values = json.loads(content)
    if isinstance(values, dict):
        values.setdefault("kind", "bins")
        if values["kind"] != "bins" and end_tokens:
            values.setdefault("end_tokens", list(end_tokens))
    # Through JSON again: only that mode reads lists as tuples.
    return _ANY.validate_json(json.dumps(values))


def read_answer_format(path: Path) -> AnswerFormat:
    """Read the `actions.json` of a bundle.

    Raises:
        BundleError: it is missing or not valid; the message names file and field.
    """
    anew = "export the bundle anew with vla-autoprune export"
    try:
        return parse_answer_format(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}); {anew}") from error
    except ValidationError as error:
        raise BundleError(f"{path}: {first_fault(error)}; {anew}") from error
    except ValueError as error:
        raise BundleError(f"{path} is not JSON ({error}); {anew}") from error


def decoder_option(given: str, end_tokens: Sequence[int]) -> AnswerFormat:
    """The answer format that `--decoder` names.

    Args:
        given: "waypoints" for six pairs of metres forward and to the left, or a JSON file.
        end_tokens: that end an answer of the model.

    Raises:
        InputError: neither; the message says what is wrong with the file.
    """
    if given == "waypoints":
        return WaypointText(length=96, end_tokens=tuple(end_tokens))
    try:
        return parse_answer_format(Path(given).read_bytes(), end_tokens)
    except OSError as error:
        raise InputError(
            f"--decoder {given} cannot be read ({error.strerror}); allowed: waypoints, or a JSON file of "
            "kind waypoints, codebook or bins (docs/model_families.md)"
        ) from error
    except ValidationError as error:
        raise InputError(f"--decoder {given}: {first_fault(error)}") from error
    except ValueError as error:
        raise InputError(f"--decoder {given} is not JSON ({error})") from error


def _headings(path: FloatArray) -> NDArray[np.float64]:
    """[steps] direction of the step that led to each waypoint."""
    steps = np.diff(np.vstack([np.zeros((1, 2)), path]), axis=0)
    headings, heading = [], 0.0
    for dx, dy in steps:
        if math.hypot(dx, dy) >= STANDSTILL_M:
            heading = math.atan2(dy, dx)
        headings.append(heading)
    return np.unwrap(headings)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:117]}…")
