"""From plans and truth to a report's numbers: metrics per protocol with intervals over scenes, and costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eval_nuscenes.evaluation import PlanRecord, Record, RunKey, SampleRecord, Variant, VariantKind
from eval_nuscenes.metrics import PROTOCOLS, Score
from eval_nuscenes.nuscenes_reader import Sample
from vla_autoprune.files import write_whole

PROTOCOLS_REPORTED = ("uniad", "stp3", "vad")
RESAMPLES = 2000
CONFIDENCE = 0.95
STEPS_OF_A_PLAN = ("vision", "prefill", "decode", "rest")


class Interval(Record):
    """A mean with its confidence interval over scenes; no interval from a single scene."""

    mean: float
    low: float | None = None
    high: float | None = None


class Planning(Record):
    """How a variant plans under one protocol: values at 1, 2, 3 s and their mean.

    Attributes:
        counted: samples the protocol divides by.
        collision: fractions, not percent.
        l2_above_full_m: how much the mean L2 lies above the unpruned variant's, paired over scenes.
        collision_above_full: likewise.
    """

    counted: int
    l2_m: tuple[Interval, ...]
    collision: tuple[Interval, ...]
    l2_above_full_m: Interval | None = None
    collision_above_full: Interval | None = None


class Percentiles(Record):
    """Milliseconds."""

    p50: float
    p90: float


class Cost(Record):
    """What a variant's plans cost, over the samples where there was one.

    Attributes:
        visual_tokens_into_layers: mean over samples and decoder layers.
        work_fraction: mean prefill FLOPs over the unpruned prefill's.
        published_work_fraction: the same by the paper's own count, which leaves out text and grouped queries.
        split_ms: mean milliseconds of vision, prefill, decode and the rest.
    """

    visual_tokens_into_layers: float
    work_fraction: float
    published_work_fraction: float | None
    kv_mib: float
    prefill_ms: Percentiles
    total_ms: Percentiles
    split_ms: dict[str, float]


class VariantSummary(Record):
    """One row of the evaluation."""

    name: str
    kind: VariantKind
    budget: float | None
    planning: dict[str, Planning]
    cost: Cost | None
    failed_plans: int
    first_failure: str | None
    flags: dict[str, int]
    buckets: dict[str, int]
    complexities: tuple[float, ...]


class Conditions(Record):
    """What a figure carries: data, machine, versions, command."""

    key: RunKey
    command: str
    data_root: str
    version: str
    split: str
    samples: int
    scenes: int
    ego_sources: dict[str, int]
    warm_up: int
    resamples: int = RESAMPLES
    confidence: float = CONFIDENCE


class EvaluationSummary(Record):
    """results.json."""

    conditions: Conditions
    variants: tuple[VariantSummary, ...]

    def variant(self, kind: VariantKind) -> VariantSummary | None:
        """The first variant of a kind."""
        return next((variant for variant in self.variants if variant.kind == kind), None)


@dataclass(frozen=True)
class SampleScores:
    """Scores of one sample: protocol, then variant."""

    token: str
    scene: str
    scores: Mapping[str, Mapping[str, Score]]


def score_sample(
    sample: Sample, record: SampleRecord, protocols: Sequence[str] = PROTOCOLS_REPORTED
) -> SampleScores:
    """Score every variant's plan of a sample under every protocol."""
    plans = {
        name: sample.lidar_waypoints(np.array(plan.waypoints_in_ego)) for name, plan in record.plans.items()
    }
    scores = {}
    for protocol in protocols:
        score = PROTOCOLS[protocol].scorer(sample.truth)
        scores[protocol] = {name: score(plan) for name, plan in plans.items()}
    return SampleScores(sample.token, sample.scene, scores)


def summarise(
    variants: Sequence[Variant],
    records: Sequence[SampleRecord],
    scored: Sequence[SampleScores],
    conditions: Conditions,
    published_work: Callable[[str], float] | None = None,
) -> EvaluationSummary:
    """Put the numbers of a report together.

    Args:
        variants: rows, in order.
        records: plans per sample.
        scored: their scores, in the same order.
        conditions: go into the result as they are.
        published_work: from a bucket's name to the paper's own count of its work.

    Returns:
        Means and intervals; the same for the same input.
    """
    bootstrap = SceneBootstrap([sample.scene for sample in scored])
    full = next((variant.name for variant in variants if variant.kind == "full"), None)
    rows = []
    for variant in variants:
        plans = [record.plans[variant.name] for record in records]
        planning = {
            protocol: _planning(
                [sample.scores[protocol][variant.name] for sample in scored],
                [sample.scores[protocol][full] for sample in scored]
                if full not in (None, variant.name)
                else None,
                bootstrap,
            )
            for protocol in scored[0].scores
        }
        rows.append(
            VariantSummary(
                name=variant.name,
                kind=variant.kind,
                budget=variant.budget,
                planning=planning,
                cost=_cost(plans, published_work),
                failed_plans=sum(plan.error is not None for plan in plans),
                first_failure=next((plan.error for plan in plans if plan.error is not None), None),
                flags=dict(Counter(flag for plan in plans for flag in plan.flags)),
                buckets=dict(Counter(plan.bucket for plan in plans if plan.bucket)),
                complexities=tuple(plan.complexity for plan in plans if plan.complexity is not None),
            )
        )
    return EvaluationSummary(conditions=conditions, variants=tuple(rows))


def write_summary(path: Path, summary: EvaluationSummary) -> None:
    """Write results.json; the file appears only when it is whole."""
    write_whole(path, (summary.model_dump_json(indent=1) + "\n").encode())


class SceneBootstrap:
    """Confidence intervals by resampling whole scenes: samples of one scene are not independent.

    Every statistic uses the same resamples, so differences between variants are paired.
    """

    def __init__(self, scenes: Sequence[str], resamples: int = RESAMPLES, seed: int = 0) -> None:
        names, self._scene_of_sample = np.unique(np.asarray(scenes), return_inverse=True)
        self._count = len(names)
        even = np.full(self._count, 1 / self._count)
        self._draws = np.random.default_rng(seed).multinomial(self._count, even, size=resamples)

    def mean(self, values: ArrayLike, counted: ArrayLike) -> Interval:
        """Mean of the counted samples.

        Args:
            values: [samples].
            counted: [samples] bool.

        Returns:
            The mean (0 where nothing counts), and its 95 % percentile interval over scenes.
        """
        weights = np.asarray(counted, dtype=np.float64)
        sums = np.bincount(self._scene_of_sample, np.asarray(values) * weights, minlength=self._count)
        counts = np.bincount(self._scene_of_sample, weights, minlength=self._count)
        if not counts.sum():
            return Interval(mean=0.0)
        mean = float(sums.sum() / counts.sum())
        if np.count_nonzero(counts) < 2:
            return Interval(mean=mean)
        drawn = self._draws @ counts
        means = (self._draws @ sums)[drawn > 0] / drawn[drawn > 0]
        low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return Interval(mean=mean, low=float(low), high=float(high))


def latency_split(timings_ms: Mapping[str, float]) -> dict[str, float]:
    """Put a plan's timings under the four headings that pruning should be judged by.

    Args:
        timings_ms: as in `Plan.timings_ms`; steps within prefill and decode are part of these sums.

    Returns:
        Milliseconds of vision, prefill (embedding, stages, selection, head), decode, and the rest of the
        total.
    """
    split = {heading: timings_ms.get(heading, 0.0) for heading in STEPS_OF_A_PLAN[:-1]}
    split["rest"] = timings_ms.get("total", 0.0) - sum(split.values())
    return split


def _planning(scores: Sequence[Score], full: Sequence[Score] | None, bootstrap: SceneBootstrap) -> Planning:
    counted = [score.counted for score in scores]
    l2, collision = (_columns(scores, field) for field in ("l2_m", "collision"))
    above: list[Interval | None] = [None, None]
    if full is not None:
        above = [
            bootstrap.mean((mine - _columns(full, field))[:, -1], counted)
            for mine, field in ((l2, "l2_m"), (collision, "collision"))
        ]
    return Planning(
        counted=sum(counted),
        l2_m=tuple(bootstrap.mean(column, counted) for column in l2.T),
        collision=tuple(bootstrap.mean(column, counted) for column in collision.T),
        l2_above_full_m=above[0],
        collision_above_full=above[1],
    )


def _columns(scores: Sequence[Score], field: str) -> NDArray[np.float64]:
    """[samples, 4]: values at 1, 2, 3 s and their mean."""
    at_horizons = np.array([getattr(score, field) for score in scores])
    return np.column_stack([at_horizons, at_horizons.mean(axis=1)])


def _cost(plans: Iterable[PlanRecord], published_work: Callable[[str], float] | None) -> Cost | None:
    done = [plan for plan in plans if plan.visual_tokens_into_layers]
    if not done:
        return None
    splits = [latency_split(plan.timings_ms) for plan in done]
    published = None
    if published_work is not None:
        published = float(np.mean([published_work(plan.bucket) for plan in done]))
    return Cost(
        visual_tokens_into_layers=float(np.mean([np.mean(plan.visual_tokens_into_layers) for plan in done])),
        work_fraction=float(np.mean([plan.work_fraction for plan in done])),
        published_work_fraction=published,
        kv_mib=float(np.mean([plan.kv_mib for plan in done])),
        prefill_ms=_percentiles([split["prefill"] for split in splits]),
        total_ms=_percentiles([plan.timings_ms["total"] for plan in done]),
        split_ms={
            heading: float(np.mean([split[heading] for split in splits])) for heading in STEPS_OF_A_PLAN
        },
    )


def _percentiles(milliseconds: Sequence[float]) -> Percentiles:
    p50, p90 = np.percentile(milliseconds, [50, 90])
    return Percentiles(p50=float(p50), p90=float(p90))
