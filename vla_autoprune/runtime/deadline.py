"""Which bucket still meets a deadline: measured before the first frame, corrected by every frame since."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping

import numpy as np

from vla_autoprune import contract
from vla_autoprune.frame import Frame, Plan, Rehearsal
from vla_autoprune.recipe import Bucket, PruningRecipe, bucket_for
from vla_autoprune.runtime.planner import LimitBucket, Planner

RECENT_PLANS = 20
QUANTILE = 0.9
"""Of the recent plans' slowdowns: a single outlier among `RECENT_PLANS` does not count, two do."""

_BEFORE_CHOICE = ("preprocess", "prompt", "vision", "embed", contract.stage_name(0))


def rest_ms(plan: Plan | Rehearsal) -> float:
    """Milliseconds a plan took from the choice of its bucket, after stage 0, to its waypoints."""
    spent = sum(plan.timings_ms.get(step, 0.0) for step in _BEFORE_CHOICE)
    return plan.timings_ms["total"] - spent


class BucketLatencies:
    """What the rest of a plan takes once its bucket is chosen.

    Every bucket has the time it took undisturbed; what disturbs (a busy machine, a hot device) slows all
    buckets down alike, so one slowdown is tracked over the recent plans, whichever buckets they took.

    Args:
        recipe: whose buckets these are.
        undisturbed_ms: per bucket, the least time measured from choice to waypoints.

    Raises:
        ValueError: a bucket is missing or its time is not above 0.
    """

    def __init__(self, recipe: PruningRecipe, undisturbed_ms: Mapping[str, float]) -> None:
        for bucket in recipe.buckets:
            if not undisturbed_ms.get(bucket.name, 0.0) > 0:
                raise ValueError(
                    f"undisturbed_ms of bucket {bucket.name} is {undisturbed_ms.get(bucket.name)}; "
                    "expected a time above 0 for every bucket of the recipe"
                )
        self.recipe = recipe
        self.undisturbed_ms = dict(undisturbed_ms)
        self._slowdowns: deque[float] = deque(maxlen=RECENT_PLANS)

    @property
    def slowdown(self) -> float:
        """Upper quantile of recent over undisturbed times; 1 before the first plan."""
        return float(np.quantile(self._slowdowns, QUANTILE)) if self._slowdowns else 1.0

    def expected_ms(self, bucket: str) -> float:
        """Time from choice to waypoints to reckon with."""
        return self.undisturbed_ms[bucket] * self.slowdown

    def observe(self, plan: Plan) -> None:
        """Learn from a plan."""
        self._slowdowns.append(rest_ms(plan) / self.undisturbed_ms[plan.bucket])

    def limit(self, remaining_ms: Callable[[], float]) -> LimitBucket:
        """The bucket asked for if it fits, else that of the largest budget that does, else the least work.

        Args:
            remaining_ms: milliseconds to the deadline at the time it is called.

        Returns:
            What `Planner.plan` takes as `limit`.
        """

        def within(wanted: Bucket, complexity: float) -> Bucket:
            remaining = remaining_ms()
            smaller = [budget for budget in self.recipe.budgets if budget < wanted.budget]
            options = [wanted, *(bucket_for(self.recipe, budget, complexity) for budget in smaller)]
            for bucket in options:
                if self.expected_ms(bucket.name) <= remaining:
                    return bucket
            return min(options, key=lambda bucket: bucket.work_fraction)

        return within


def measure_latencies(
    planner: Planner, frame: Frame, runs: int = 3, progress: Callable[[str], object] | None = None
) -> BucketLatencies:
    """Warm every bucket up and time it; the least of several runs is the undisturbed time.

    Buckets take turns, so that what disturbs for a while does not slow all runs of one of them. Answers are
    rehearsed at full length; where real ones are shorter, the slowdown of the plans to come says so.

    Args:
        planner: whose buckets to run.
        frame: any; the model need not have a plan for it.
        runs: timed runs per bucket, after one that is not timed.
        progress: told the bucket about to run.

    Returns:
        The latencies.

    Raises:
        InputError: the planner cannot take the frame.
        PlanError: values are not finite.
    """
    buckets = [bucket.name for bucket in planner.recipe.buckets]
    for bucket in buckets:
        if progress is not None:
            progress(bucket)
        planner.rehearse(frame, bucket)
    least = dict.fromkeys(buckets, math.inf)
    for _ in range(runs):
        for bucket in buckets:
            least[bucket] = min(least[bucket], rest_ms(planner.rehearse(frame, bucket)))
    return BucketLatencies(planner.recipe, least)
