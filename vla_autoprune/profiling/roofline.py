"""How close stages come to what the machine can do, and what pruning can gain at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vla_autoprune.profiling.document import BucketProfile, Ceiling, Profile, StageProfile, Work
from vla_autoprune.recipe import FULL

TOLERATED_EXCESS = 0.05
"""Another library's matrix product may be so much faster than the one that set the ceiling."""


@dataclass(frozen=True)
class Reached:
    """What a stage reached.

    Attributes:
        flops_per_s: by its median time.
        bytes_per_s: likewise, of the least traffic.
        bound: which ceiling its work meets first.
        share: of the time at that ceiling in the time it took; 1 is perfect.
    """

    flops_per_s: float
    bytes_per_s: float
    bound: Literal["compute", "memory"] | None
    share: float | None


def least_s(work: Work, ceiling: Ceiling) -> tuple[float, Literal["compute", "memory"]] | None:
    """Seconds that work takes at the ceilings, and the one it meets; None where they are not both known."""
    if ceiling.flops_per_s is None or ceiling.bytes_per_s is None:
        return None
    compute, memory = work.flops / ceiling.flops_per_s, work.bytes / ceiling.bytes_per_s
    return (compute, "compute") if compute >= memory else (memory, "memory")


def reached(stage: StageProfile, ceiling: Ceiling) -> Reached | None:
    """What a stage reached against the ceilings; None where its work is not counted."""
    if stage.work is None or not stage.time.p50 > 0:
        return None
    seconds = stage.time.p50 / 1e3
    least = least_s(stage.work, ceiling)
    return Reached(
        flops_per_s=stage.work.flops / seconds,
        bytes_per_s=stage.work.bytes / seconds,
        bound=least[1] if least else None,
        share=least[0] / seconds if least else None,
    )


def ceiling_doubts(profile: Profile) -> tuple[str, ...]:
    """What says that the ceilings are too low: arithmetic faster than the fastest; none in most profiles.

    Above the memory's ceiling stages may well be, on data that stayed in a cache.
    """
    found = [
        (seen.share, stage.name, bucket.name)
        for bucket in profile.buckets
        for stage in bucket.stages
        if (seen := reached(stage, profile.ceiling)) is not None
        and seen.bound == "compute"
        and seen.share is not None
    ]
    share, stage, bucket = max(found, default=(0.0, "", ""))
    if share <= 1 + TOLERATED_EXCESS:
        return ()
    return (
        f"{stage} of {bucket} reached {share:.0%} of the ceiling of arithmetic: the ceilings were measured "
        "while other programs took the machine's time, and shares of them are too high",
    )


@dataclass(frozen=True)
class Amdahl:
    """What a prefill that costs nothing would leave of the unpruned plan, and what a bucket made of it.

    Attributes:
        limit: speed-up of a plan without its prefill.
        speed_up: of the plans in this bucket.
    """

    prefill_share: float
    limit: float
    bucket: str
    speed_up: float

    def __str__(self) -> str:
        return (
            f"prefill is {self.prefill_share:.0%} of an unpruned plan: without it a plan would be "
            f"{self.limit:.2f} times as fast, {self.bucket} is {self.speed_up:.2f} times"
        )


def amdahl(profile: Profile) -> Amdahl | None:
    """Of the fastest bucket against the unpruned one; None where one of the two was not profiled."""
    full = profile.bucket(FULL)
    pruned = [bucket for bucket in profile.buckets if bucket.name != FULL]
    if full is None or not pruned:
        return None
    share = _prefill_share(full)
    fastest = min(pruned, key=lambda bucket: bucket.total.p50)
    return Amdahl(share, 1 / (1 - share), fastest.name, full.total.p50 / fastest.total.p50)


def _prefill_share(bucket: BucketProfile) -> float:
    whole = sum(stage.time.p50 for stage in bucket.stages)
    return bucket.phase_ms("prefill") / whole
