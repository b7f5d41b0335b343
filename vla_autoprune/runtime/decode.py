"""From logits to the next action token."""

from __future__ import annotations

from typing import Literal

import numpy as np

from vla_autoprune.errors import PlanError
from vla_autoprune.frame import FloatArray

Rule = Literal["median", "greedy"]
"""The median over neighbouring bins is the better estimate of a distance; greedy is what `generate` does."""


def choose_token(logits: FloatArray, allowed: range, rule: Rule, position: int) -> int:
    """The next token of a plan.

    Args:
        logits: [vocabulary] finite.
        allowed: token ids a plan may have here; neighbours stand for neighbouring numbers.
        rule: "greedy" takes the likeliest token, "median" the middle of the distribution over `allowed`.
        position: where in the answer this is, for messages.

    Returns:
        A token id of `allowed`.

    Raises:
        PlanError: the model prefers a token that no plan has here.
    """
    likeliest = int(logits.argmax())
    if likeliest not in allowed:
        raise PlanError(
            f"answer token {position} would be {likeliest}, a plan has {allowed.start}..{allowed.stop - 1} "
            "there; the model's answer is not a plan"
        )
    if rule == "greedy":
        return likeliest
    return median_token(logits, allowed)


def median_token(logits: FloatArray, allowed: range) -> int:
    """The middle of the distribution over `allowed`, whatever else the model would rather say."""
    exact = logits[allowed.start : allowed.stop].astype(np.float64)
    cumulative = np.cumsum(np.exp(exact - exact.max()))
    return allowed.start + int(np.searchsorted(cumulative, cumulative[-1] / 2))
