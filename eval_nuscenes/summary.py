"""From plans and truth to a report's numbers: metrics per protocol with intervals over scenes, and costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eval_nuscenes.bootstrap import CONFIDENCE, RESAMPLES, Interval, SceneBootstrap
from eval_nuscenes.comparison import LatencyComparison, MeasuredVariant, compare_at_equal_latency
from eval_nuscenes.evaluation import (
    PlanRecord,
    Record,
    RunKey,
    SampleRecord,
    Variant,
    VariantKind,
    counterparts,
)
from eval_nuscenes.lateness import late_waypoints
from eval_nuscenes.metrics import Score, protocol_named
from eval_nuscenes.nuscenes_reader import Sample
from eval_nuscenes.scenarios import traits_of
from vla_autoprune.files import write_whole
from vla_autoprune.recipe import PruningRecipe, published_work_fraction

DEFAULT_PROTOCOLS = ("standard", "uniad", "stp3", "vad")
"""The first one is what headlines, scenarios and worst scenes go by."""
STEPS_OF_A_PLAN = ("vision", "prefill", "decode", "rest")
ENOUGH_SAMPLES = 50
ENOUGH_SCENES = 5
COMPLEXITY_BINS = 5


class LatePlanning(Record):
    """How a variant plans when each plan takes effect only after its latency.

    Attributes:
        latency_ms: mean over all samples.
        l2_above_on_time_m: how much the mean L2 lies above that of the plans taken at once, paired.
    """

    latency_ms: float
    l2_m: tuple[Interval, ...]
    collision: tuple[Interval, ...]
    l2_above_on_time_m: Interval


class Planning(Record):
    """How a variant plans under one protocol: values at 1, 2, 3 s and their mean.

    Attributes:
        counted: [3] samples the protocol divides by at 1, 2, 3 s.
        scenes: how many scenes those at 3 s come from.
        collision: fractions, not percent.
        intersection: likewise, of road edges; None where the protocol has no such figure.
        l2_above_reference_m: how much the mean L2 lies above the reference's, paired over scenes.
        collision_above_reference: likewise.
        l2_above_counterpart_m: how much the mean L2 lies above the first bundle's at the same policy and
            budget, paired over scenes; None for rows of the first bundle.
        collision_above_counterpart: likewise.
        late: None where the latency of plans is not known.
    """

    counted: tuple[int, ...]
    scenes: int
    l2_m: tuple[Interval, ...]
    collision: tuple[Interval, ...]
    intersection: tuple[Interval, ...] | None = None
    l2_above_reference_m: Interval | None = None
    collision_above_reference: Interval | None = None
    l2_above_counterpart_m: Interval | None = None
    collision_above_counterpart: Interval | None = None
    late: LatePlanning | None = None

    @property
    def few(self) -> bool:
        """So few samples or scenes count that nothing should rest on the figures."""
        return min(self.counted) < ENOUGH_SAMPLES or self.scenes < ENOUGH_SCENES


class ScenarioFigures(Record):
    """A variant on one kind of sample, such as manoeuvre "turning", under the first protocol."""

    aspect: str
    value: str
    counted: int
    scenes: int
    l2_m: Interval
    collision: Interval


class ComplexityBin(Record):
    """Frames of similar complexity, and the mean L2 of their plans under the first protocol."""

    low: float
    high: float
    counted: int
    l2_m: Interval


class ErrorByComplexity(Record):
    """Whether a variant's plans are worse where frames are more complex.

    Attributes:
        rank_correlation: Spearman's, of complexity and mean L2.
    """

    bins: tuple[ComplexityBin, ...]
    rank_correlation: Interval


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


class CameraTokens(Record):
    """What is left of a camera in the last stage, over the samples where there was a plan.

    Attributes:
        visual_tokens: it has before anything is dropped.
        floor: tokens of it that the recipe keeps at least.
        mean: visual tokens of it that enter the last stage.
        least: in the frame with the fewest.
        most: in the frame with the most.
    """

    visual_tokens: int
    floor: int
    mean: float
    least: int
    most: int


class VariantSummary(Record):
    """One row of the evaluation.

    Attributes:
        bundle: name of the bundle that plans; empty where none does.
        counterpart: row of the first bundle with the same policy and budget; None for its own rows.
        cameras: what is left of each camera in the last stage; empty without a bundle.
        scenarios: by the first of the evaluation's protocols.
        error_by_complexity: by the first of the evaluation's protocols.
    """

    name: str
    kind: VariantKind
    budget: float | None
    bundle: str
    counterpart: str | None
    planning: dict[str, Planning]
    cost: Cost | None
    cameras: dict[str, CameraTokens]
    failed_plans: int
    first_failure: str | None
    flags: dict[str, int]
    buckets: dict[str, int]
    complexities: tuple[float, ...]
    scenarios: tuple[ScenarioFigures, ...]
    error_by_complexity: ErrorByComplexity | None


class Conditions(Record):
    """What a figure carries: data, machine, versions, command.

    Attributes:
        source: the bundles or the files that were evaluated.
        samples: scored.
        samples_asked: of the split, after `--scenes` and `--limit`.
        samples_in_split: before them.
        latency_ms: given for all plans; None where each has its own.
        warm_up: uncounted plans per variant; None where nothing was timed here.
    """

    key: RunKey
    source: str
    command: str
    data_root: str
    version: str
    split: str
    samples: int
    samples_asked: int
    samples_in_split: int
    scenes: int
    ego_sources: dict[str, int]
    latency_ms: float | None = None
    warm_up: int | None = None
    resamples: int = RESAMPLES
    confidence: float = CONFIDENCE

    @property
    def coverage(self) -> str:
        """How much of what was asked for is scored, in words."""
        scored, chosen = f"{self.samples} samples", ""
        if self.samples < self.samples_asked:
            share = self.samples / self.samples_asked
            scored = f"only {self.samples} of {self.samples_asked} samples ({share:.1%})"
        if self.samples_asked < self.samples_in_split:
            chosen = f", chosen from the split's {self.samples_in_split} samples"
        return f"{scored} of {self.scenes} scenes{chosen}"


class EvaluationSummary(Record):
    """results.json.

    Attributes:
        reference: the variant that differences are taken to.
        comparisons: pruning policies at equal measured latency.
    """

    conditions: Conditions
    reference: str
    variants: tuple[VariantSummary, ...]
    comparisons: tuple[LatencyComparison, ...]

    @property
    def protocols(self) -> tuple[str, ...]:
        """In the order asked for; scenarios and complexity go by the first."""
        return tuple(self.variants[0].planning)

    @property
    def bundles(self) -> tuple[str, ...]:
        """Names of the bundles that plan, the first one first."""
        return tuple(dict.fromkeys(variant.bundle for variant in self.variants if variant.bundle))

    @property
    def has_camera_floors(self) -> bool:
        """Whether a recipe keeps some tokens of a camera in every frame."""
        return any(left.floor for variant in self.variants for left in variant.cameras.values())

    def variant(self, kind: VariantKind) -> VariantSummary | None:
        """The first variant of a kind."""
        return next((variant for variant in self.variants if variant.kind == kind), None)


@dataclass(frozen=True)
class SampleScores:
    """Scores of one sample: protocol, then variant.

    Attributes:
        scores: of the plans as they are.
        late: of the plans as they are driven after their latency; only where that is known.
        latency_ms: per variant with a known latency.
        traits: what kind of sample it is, see `scenarios.traits_of`.
    """

    token: str
    scene: str
    scores: Mapping[str, Mapping[str, Score]]
    late: Mapping[str, Mapping[str, Score]] = field(default_factory=dict)
    latency_ms: Mapping[str, float] = field(default_factory=dict)
    traits: Mapping[str, str] = field(default_factory=dict)


def score_sample(
    sample: Sample,
    record: SampleRecord,
    protocols: Sequence[str] = DEFAULT_PROTOCOLS,
    latency_ms: float | None = None,
    description: str = "",
) -> SampleScores:
    """Score every variant's plan of a sample under every protocol, taken at once and taken late.

    Args:
        sample: the truth.
        record: the plans.
        protocols: names in `metrics.PROTOCOLS`.
        latency_ms: of every plan; each plan's own measured time unless given.
        description: of the sample's scene.
    """
    plans = {name: np.array(plan.waypoints_in_ego) for name, plan in record.plans.items()}
    latencies = {name: _latency_ms(plan, latency_ms) for name, plan in record.plans.items()}
    known = {name: value for name, value in latencies.items() if value is not None}
    driven = {name: late_waypoints(plans[name], sample.ego, value) for name, value in known.items()}
    scores, late = {}, {}
    for protocol in protocols:
        score = sample.scorer(protocol_named(protocol))
        scores[protocol] = {name: score(plan) for name, plan in plans.items()}
        late[protocol] = {name: score(plan) for name, plan in driven.items()}
    return SampleScores(sample.token, sample.scene, scores, late, known, traits_of(sample, description))


def _latency_ms(plan: PlanRecord, given: float | None) -> float | None:
    if plan.error is not None:
        return 0.0  # there is nothing to wait for: it stands still from the start
    return plan.timings_ms.get("total") if given is None else given


def summarise(
    variants: Sequence[Variant],
    records: Sequence[SampleRecord],
    scored: Sequence[SampleScores],
    conditions: Conditions,
    recipes: Mapping[str, PruningRecipe] | None = None,
) -> EvaluationSummary:
    """Put the numbers of a report together.

    Args:
        variants: rows, in order. Differences are taken to the unpruned one, else to the first.
        records: plans per sample.
        scored: their scores, in the same order.
        conditions: go into the result as they are.
        recipes: by name of the bundle.

    Returns:
        Means and intervals; the same for the same input.
    """
    bootstrap = SceneBootstrap([sample.scene for sample in scored])
    reference = next((variant.name for variant in variants if variant.kind == "full"), variants[0].name)
    protocols = list(scored[0].scores)
    rows = []
    for variant in variants:
        recipe = (recipes or {}).get(variant.bundle)
        counterpart = _counterpart(variants, variant)
        plans = [record.plans[variant.name] for record in records]
        rows.append(
            VariantSummary(
                name=variant.name,
                kind=variant.kind,
                budget=variant.budget,
                bundle=variant.bundle,
                counterpart=counterpart,
                planning={
                    protocol: _planning(scored, protocol, variant.name, reference, counterpart, bootstrap)
                    for protocol in protocols
                },
                cost=_cost(plans, recipe),
                cameras={} if recipe is None else _cameras(plans, recipe),
                failed_plans=sum(plan.error is not None for plan in plans),
                first_failure=next((plan.error for plan in plans if plan.error is not None), None),
                flags=dict(Counter(flag for plan in plans for flag in plan.flags)),
                buckets=dict(Counter(plan.bucket for plan in plans if plan.bucket)),
                complexities=tuple(plan.complexity for plan in plans if plan.complexity is not None),
                scenarios=tuple(_scenarios(scored, protocols[0], variant.name, bootstrap)),
                error_by_complexity=_error_by_complexity(plans, scored, protocols[0], variant.name),
            )
        )
    comparisons: list[LatencyComparison] = []
    for protocol in protocols:
        for measured in _measured(rows):
            figures = {row.name: _figures(scored, protocol, row.name) for row in measured}
            comparisons += compare_at_equal_latency(
                protocol,
                measured,
                {name: found.l2_m for name, found in figures.items()},
                {name: found.collision for name, found in figures.items()},
                _figures(scored, protocol, reference).counted,
                bootstrap,
            )
    return EvaluationSummary(
        conditions=conditions, reference=reference, variants=tuple(rows), comparisons=tuple(comparisons)
    )


def _counterpart(variants: Sequence[Variant], variant: Variant) -> str | None:
    """Name of the first bundle's row with the same policy and budget."""
    same = counterparts(variants, variant) if variant.budget is not None else []
    return next((row.name for row in same if row.bundle == variants[0].bundle), None)


def _measured(rows: Sequence[VariantSummary]) -> list[list[MeasuredVariant]]:
    """Per bundle, what takes time; the first one's unpruned row where a bundle has none of its own."""
    found = []
    for bundle in dict.fromkeys(row.bundle for row in rows if row.cost is not None):
        own = [row for row in rows if row.bundle == bundle]
        unpruned = [row for row in (*own, *rows) if row.kind == "full"][:1]
        found.append(
            [
                MeasuredVariant(name=row.name, kind=row.kind, latency_ms=row.cost.total_ms.p50)
                for row in (*unpruned, *(row for row in own if row.kind != "full"))
                if row.cost is not None
            ]
        )
    return found


def write_summary(path: Path, summary: EvaluationSummary) -> None:
    """Write results.json; the file appears only when it is whole."""
    write_whole(path, (summary.model_dump_json(indent=1) + "\n").encode())


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


@dataclass(frozen=True)
class _Figures:
    """A variant under a protocol, each [samples, 3] at 1, 2, 3 s."""

    counted: NDArray[np.bool_]
    l2_m: NDArray[np.float64]
    collision: NDArray[np.float64]
    intersection: NDArray[np.float64] | None


def _figures(scored: Sequence[SampleScores], protocol: str, name: str, late: bool = False) -> _Figures:
    scores = [(sample.late if late else sample.scores)[protocol][name] for sample in scored]
    edges = [score.intersection for score in scores if score.intersection is not None]
    return _Figures(
        counted=np.array([score.counted_at for score in scores]),
        l2_m=np.array([score.l2_m for score in scores]),
        collision=np.array([score.collision for score in scores]),
        intersection=np.array(edges) if edges else None,
    )


def _planning(
    scored: Sequence[SampleScores],
    protocol: str,
    name: str,
    reference: str,
    counterpart: str | None,
    bootstrap: SceneBootstrap,
) -> Planning:
    mine = _figures(scored, protocol, name)
    counted = mine.counted

    def above(other: str | None) -> tuple[Interval | None, Interval | None]:
        if other is None or other == name:
            return None, None
        there = _figures(scored, protocol, other)
        return (
            bootstrap.mean(mine.l2_m - there.l2_m, counted),
            bootstrap.mean(mine.collision - there.collision, counted),
        )

    above_reference, above_counterpart = above(reference), above(counterpart)
    late = None
    if all(name in sample.latency_ms for sample in scored):
        then = _figures(scored, protocol, name, late=True)
        late = LatePlanning(
            latency_ms=float(np.mean([sample.latency_ms[name] for sample in scored])),
            l2_m=_at_horizons(then.l2_m, counted, bootstrap),
            collision=_at_horizons(then.collision, counted, bootstrap),
            l2_above_on_time_m=bootstrap.mean(then.l2_m - mine.l2_m, counted),
        )
    return Planning(
        counted=tuple(int(count) for count in counted.sum(axis=0)),
        scenes=bootstrap.scenes(counted[:, -1]),
        l2_m=_at_horizons(mine.l2_m, counted, bootstrap),
        collision=_at_horizons(mine.collision, counted, bootstrap),
        intersection=None
        if mine.intersection is None
        else _at_horizons(mine.intersection, counted, bootstrap),
        l2_above_reference_m=above_reference[0],
        collision_above_reference=above_reference[1],
        l2_above_counterpart_m=above_counterpart[0],
        collision_above_counterpart=above_counterpart[1],
        late=late,
    )


def _at_horizons(
    values: NDArray[np.float64], counted: NDArray[np.bool_], bootstrap: SceneBootstrap
) -> tuple[Interval, ...]:
    """At 1, 2, 3 s, then their mean."""
    single = (bootstrap.mean(column, taken) for column, taken in zip(values.T, counted.T, strict=True))
    return (*single, bootstrap.mean(values, counted))


def _scenarios(
    scored: Sequence[SampleScores], protocol: str, name: str, bootstrap: SceneBootstrap
) -> Iterable[ScenarioFigures]:
    figures = _figures(scored, protocol, name)
    present = {(aspect, value) for sample in scored for aspect, value in sample.traits.items()}
    for aspect, value in sorted(present):
        members = np.array([sample.traits.get(aspect) == value for sample in scored])
        counted = figures.counted & members[:, None]
        yield ScenarioFigures(
            aspect=aspect,
            value=value,
            counted=int(counted[:, -1].sum()),
            scenes=bootstrap.scenes(counted[:, -1]),
            l2_m=bootstrap.mean(figures.l2_m, counted),
            collision=bootstrap.mean(figures.collision, counted),
        )


def _error_by_complexity(
    plans: Sequence[PlanRecord], scored: Sequence[SampleScores], protocol: str, name: str
) -> ErrorByComplexity | None:
    known = [
        (plan.complexity, float(np.mean(sample.scores[protocol][name].l2_m)), sample.scene)
        for plan, sample in zip(plans, scored, strict=True)
        if plan.complexity is not None and all(sample.scores[protocol][name].counted_at)
    ]
    if len(known) < COMPLEXITY_BINS:
        return None
    complexity, error = (np.array([row[column] for row in known], dtype=float) for column in (0, 1))
    bootstrap = SceneBootstrap([scene for _, _, scene in known])
    edges = np.quantile(complexity, np.linspace(0, 1, COMPLEXITY_BINS + 1))
    places = np.clip(np.searchsorted(edges, complexity, side="right") - 1, 0, COMPLEXITY_BINS - 1)
    return ErrorByComplexity(
        bins=tuple(
            ComplexityBin(
                low=float(edges[number]),
                high=float(edges[number + 1]),
                counted=int((places == number).sum()),
                l2_m=bootstrap.mean(error, places == number),
            )
            for number in range(COMPLEXITY_BINS)
            if (places == number).any()
        ),
        rank_correlation=bootstrap.rank_correlation(complexity, error),
    )


def _cameras(plans: Iterable[PlanRecord], recipe: PruningRecipe) -> dict[str, CameraTokens]:
    done = [plan.visual_tokens_left for plan in plans if plan.visual_tokens_left]
    if not done:
        return {}
    layout = recipe.layout
    tokens = np.bincount(layout.camera_of_visual).tolist()
    return {
        camera: CameraTokens(
            visual_tokens=total,
            floor=recipe.camera_floors.get(camera, 0),
            mean=float(np.mean([left[camera] for left in done])),
            least=min(left[camera] for left in done),
            most=max(left[camera] for left in done),
        )
        for camera, total in zip(layout.cameras, tokens, strict=True)
    }


def _cost(plans: Iterable[PlanRecord], recipe: PruningRecipe | None) -> Cost | None:
    done = [plan for plan in plans if plan.visual_tokens_into_layers]
    if not done:
        return None
    splits = [latency_split(plan.timings_ms) for plan in done]
    published = None
    if recipe is not None:
        works = [published_work_fraction(recipe, recipe.bucket(plan.bucket)) for plan in done]
        published = float(np.mean(works))
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
