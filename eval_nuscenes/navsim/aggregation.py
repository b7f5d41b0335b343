"""From frames to a result: NAVSIM's one-stage mean and its two-stage weighted product."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from eval_nuscenes.navsim.comfort import extended_comfort
from eval_nuscenes.navsim.scoring import EC, FrameScore
from vla_autoprune.errors import InputError

NEIGHBOUR_GAP_S = 0.55
STAGE_VARIANCE_M2 = 0.1
"""A second-stage scene counts by a Gaussian of how far its start is from where the plan ends."""


@dataclass(frozen=True)
class Stages:
    """What belongs together in a two-stage test: a frame with the one before it, and what could follow.

    Attributes:
        now: token of a first-stage frame.
        previous: token of the frame half a second earlier.
        second: tokens of second-stage frames, each with the one half a second earlier.
    """

    now: str
    previous: str
    second: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class OneStageResult:
    """Frames, with extended comfort where they have a neighbour, and means over those that have a value."""

    frames: tuple[FrameScore, ...]
    sub_scores: Mapping[str, float]
    score: float


@dataclass(frozen=True)
class TwoStageResult:
    """A two-stage result.

    Attributes:
        frames: with extended comfort.
        weights: by token, 1 in the first stage.
        stage_one: sub-scores and "score", means over the first-stage frames.
        stage_two: the same over the weighted means of the second stage.
        score: the extended PDM score, the mean of products of both stages.
    """

    frames: tuple[FrameScore, ...]
    weights: Mapping[str, float]
    stage_one: Mapping[str, float]
    stage_two: Mapping[str, float]
    score: float


def one_stage(scores: Sequence[FrameScore]) -> OneStageResult:
    """Mean over frames; under EPDMS a frame is first compared with the one before it in its log.

    Synthetic frames have no neighbour here, as in the devkit.

    Args:
        scores: at least one frame, all of one metric.

    Raises:
        InputError: there is no frame, a token comes twice, or metrics are mixed.
    """
    _check(scores)
    by_token = {score.token: score for score in scores}
    if scores[0].metric.devkit == "v2":
        logs: dict[str, list[FrameScore]] = defaultdict(list)
        for score in scores:
            if not score.synthetic:
                logs[score.log].append(score)
        for log in logs.values():
            log.sort(key=lambda score: score.time_us)
            for before, now in pairwise(log):
                if 0 < _gap_s(now, before) <= NEIGHBOUR_GAP_S:
                    by_token[now.token] = with_extended_comfort(now, _agree(now, before))
    frames = tuple(by_token.values())
    means = _means([_row(frame) for frame in frames])
    return OneStageResult(frames, means, means.pop("score"))


def two_stage(scores: Sequence[FrameScore], groups: Sequence[Stages]) -> TwoStageResult:
    """Weigh second-stage frames by how near they start to where the first-stage plan ends.

    Args:
        scores: of every frame named in the groups, all of EPDMS.
        groups: from the split's `reactive_all_mapping`.

    Raises:
        InputError: a frame is missing, comes twice or is not half a second from its neighbour, or a group has
            no second stage; the message lists them.
    """
    _check(scores)
    by_token = {score.token: score for score in scores}
    check_stages(groups, by_token)
    _check_gaps(by_token, groups)
    frames, weights = {}, {}
    products, first_rows, second_rows = [], [], []
    for group in groups:
        pairs = [(group.now, group.previous), *group.second]
        for now, previous in pairs:
            agree = _agree(by_token[now], by_token[previous])
            for token in (now, previous):
                frames[token] = with_extended_comfort(by_token[token], agree)
        for side, first in enumerate((group.now, group.previous)):
            second = [pair[side] for pair in group.second]
            weights[first] = 1.0
            weights |= zip(second, _weights(frames[first], [frames[token] for token in second]), strict=True)
            first_row = _row(frames[first])
            rows = [_row(frames[token]) for token in second]
            second_row = {
                name: sum(weights[token] * row[name] for token, row in zip(second, rows, strict=True))
                for name in first_row
            }
            first_rows.append(first_row)
            second_rows.append(second_row)
            products.append(first_row["score"] * second_row["score"])
    return TwoStageResult(
        tuple(frames.values()), weights, _means(first_rows), _means(second_rows), float(np.mean(products))
    )


def with_extended_comfort(score: FrameScore, agrees: bool) -> FrameScore:
    """The frame with the sub-score that needs a neighbour."""
    sub_scores = {**score.sub_scores, EC: float(agrees)}
    return replace(score, sub_scores=sub_scores, score=score.metric.score(sub_scores))


def _gap_s(now: FrameScore, before: FrameScore) -> float:
    return (now.time_us - before.time_us) * 1e-6


def _agree(now: FrameScore, before: FrameScore) -> bool:
    return extended_comfort(now.drive.states, before.drive.states, _gap_s(now, before))[0]


def _weights(first: FrameScore, second: Sequence[FrameScore]) -> list[float]:
    away = np.array([np.hypot(*(frame.start_m - first.end_m)) for frame in second])
    weights = np.exp(-(away**2) / (2 * STAGE_VARIANCE_M2))
    if np.isclose(weights.sum(), 0.0):
        weights = np.ones(len(second))
    return list(weights / weights.sum())


def _row(frame: FrameScore) -> dict[str, float]:
    return {**frame.sub_scores, "score": frame.score}


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def _check(scores: Sequence[FrameScore]) -> None:
    if not scores:
        raise InputError("no frame was scored; at least one plan has to belong to a scene")
    counts = Counter(score.token for score in scores)
    if repeated := [token for token, count in counts.items() if count > 1]:
        raise InputError(f"frames come twice: {', '.join(repeated)}")
    if len({score.metric.name for score in scores}) > 1:
        raise InputError("frames of devkit v1 (PDMS) and v2 (EPDMS) are mixed; score them apart")


def check_stages(groups: Sequence[Stages], tokens: Container[str]) -> None:
    """Refuse groups that cannot be scored, before any work.

    Args:
        groups: of a two-stage test.
        tokens: of the frames there are.

    Raises:
        InputError: there is no group, a frame is missing, or a group has no second stage.
    """
    if not groups:
        raise InputError("two-stage scoring needs at least one group of frames")
    missing = sorted({token for pair in _pairs(groups) for token in pair if token not in tokens})
    if missing:
        raise InputError(
            f"{len(missing)} frames of the stages have no plan or scene: {', '.join(missing[:20])}"
            f"{', …' if len(missing) > 20 else ''}; two-stage scoring needs all"
        )
    alone = [group.now for group in groups if not group.second]
    if alone:
        raise InputError(f"frames without a second stage: {', '.join(alone)}")


def _check_gaps(by_token: Mapping[str, FrameScore], groups: Sequence[Stages]) -> None:
    apart = [
        f"{now} is {gap:.3f} s after {previous}"
        for now, previous in _pairs(groups)
        if not 0 < (gap := _gap_s(by_token[now], by_token[previous])) < NEIGHBOUR_GAP_S
    ]
    if apart:
        raise InputError(f"neighbours must be less than {NEIGHBOUR_GAP_S} s apart: {'; '.join(apart)}")


def _pairs(groups: Sequence[Stages]) -> list[tuple[str, str]]:
    return [pair for group in groups for pair in [(group.now, group.previous), *group.second]]
