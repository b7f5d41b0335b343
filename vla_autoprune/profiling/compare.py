"""Two profiles against each other: what became slower, and whether that can be said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from vla_autoprune.errors import InputError
from vla_autoprune.profiling.document import PHASES, BucketProfile, Profile, Ratio, Record, StageProfile
from vla_autoprune.profiling.percentiles import median_ratio

Verdict = Literal["slower", "faster", "no difference shown", "too few frames"]

TOLERANCE = 0.05
"""A change of the median below this is nobody's regression, however certain."""

LEAST_SHARE = 0.02
"""Stages below this share of a plan are left out: their ratios are of microseconds."""


class Change(Record):
    """One quantity of one bucket in both profiles."""

    bucket: str
    what: str
    base_ms: float
    other_ms: float
    ratio: Ratio
    verdict: Verdict

    @property
    def regression(self) -> bool:
        """Whether the other is slower, beyond tolerance and doubt."""
        return self.verdict == "slower"


class Comparison(Record):
    """Two profiles side by side.

    Attributes:
        differences: conditions that differ, hence may explain a change, and what only one of them has.
        changes: totals, phases and stages of every bucket that both have.
    """

    base: str
    other: str
    differences: tuple[str, ...]
    changes: tuple[Change, ...]

    @property
    def regressions(self) -> tuple[Change, ...]:
        """What became slower."""
        return tuple(change for change in self.changes if change.regression)


def compare(base: Profile, other: Profile, tolerance: float = TOLERANCE) -> Comparison:
    """Ratios of medians, with intervals by bootstrap.

    Args:
        base: the profile to measure against.
        other: the new one.
        tolerance: a change is called one if its whole interval lies beyond 1 ± tolerance.

    Returns:
        The comparison.

    Raises:
        InputError: the profiles have no bucket in common.
    """
    names = [bucket.name for bucket in base.buckets if other.bucket(bucket.name)]
    if not names:
        raise InputError(
            f"the profiles have no bucket in common: {', '.join(b.name for b in base.buckets)} against "
            f"{', '.join(b.name for b in other.buckets)}; profile bundles of the same budgets"
        )
    changes: list[Change] = []
    for name in names:
        one, two = base.bucket(name), other.bucket(name)
        assert one is not None and two is not None
        rows = {
            what: (before, after) for (what, before), (_, after) in zip(_rows(one), _rows(two), strict=True)
        }
        for what, ms in _stages(one, two):
            rows[what] = ms
        for what, (before, after) in rows.items():
            change = _change(name, what, before, after, tolerance)
            if change is not None:
                changes.append(change)
    return Comparison(
        base=_label(base),
        other=_label(other),
        differences=tuple(_differences(base, other)),
        changes=tuple(changes),
    )


def _rows(bucket: BucketProfile) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Total and phases, frame by frame."""
    yield "total", bucket.total_ms
    for phase in PHASES:
        yield phase, bucket.frames_ms(phase)


def _stages(
    one: BucketProfile, two: BucketProfile
) -> Iterator[tuple[str, tuple[tuple[float, ...], tuple[float, ...]]]]:
    phases = {*PHASES, "total"}
    for stage in one.stages:
        again = two.stage(stage.name)
        if stage.name in phases or again is None:
            continue
        shares = (stage.time.p50 / one.total.p50, again.time.p50 / two.total.p50)
        if max(shares) >= LEAST_SHARE:
            yield stage.name, (stage.ms, again.ms)


def _change(
    bucket: str, what: str, before: tuple[float, ...], after: tuple[float, ...], tolerance: float
) -> Change | None:
    base_ms, other_ms = (float(np.median(values)) if values else 0.0 for values in (before, after))
    if not min(base_ms, other_ms) > 0:
        return None
    ratio = median_ratio(before, after)
    verdict: Verdict = "no difference shown"
    if ratio.low is None or ratio.high is None:
        verdict = "too few frames"
    elif ratio.low > 1 + tolerance:
        verdict = "slower"
    elif ratio.high < 1 - tolerance:
        verdict = "faster"
    return Change(bucket=bucket, what=what, base_ms=base_ms, other_ms=other_ms, ratio=ratio, verdict=verdict)


def _differences(base: Profile, other: Profile) -> Iterator[str]:
    """Conditions that are not the same, first those that make a comparison doubtful."""
    one, two = base.conditions, other.conditions
    for name in ("device", "backend", "bundle_id", "recipe_sha256", "precision", "input_sha256", "frames"):
        before, after = getattr(one, name), getattr(two, name)
        if before != after:
            yield f"{name}: {_short(before)} against {_short(after)}"
    yield from _only_in_one("bucket", base.buckets, other.buckets)
    for bucket in base.buckets:
        again = other.bucket(bucket.name)
        if again is not None:
            yield from _only_in_one(f"stage of {bucket.name}", bucket.stages, again.stages)
    for name in sorted({*one.machine, *two.machine}):
        before, after = one.machine.get(name, "absent"), two.machine.get(name, "absent")
        if before != after:
            yield f"{name}: {before} against {after}"


def _only_in_one(
    what: str, base: Sequence[BucketProfile | StageProfile], other: Sequence[BucketProfile | StageProfile]
) -> Iterator[str]:
    """Names that have nothing to be compared with."""
    before, after = [each.name for each in base], [each.name for each in other]
    for where, names, others in (("A", before, after), ("B", after, before)):
        alone = [name for name in names if name not in others]
        if alone:
            yield f"{what}, only in {where}: {', '.join(alone)}"


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text


def _label(profile: Profile) -> str:
    conditions = profile.conditions
    return f"{conditions.model} {conditions.bundle_id[:12]}, {conditions.backend} on {conditions.device}"
