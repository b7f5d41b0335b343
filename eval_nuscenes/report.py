"""The evaluation as one HTML file that needs nothing else: table, plots, pictures, protocols, conditions."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import numpy as np

from eval_nuscenes import pictures
from eval_nuscenes.evaluation import PrunedKind, SampleRecord, Variant
from eval_nuscenes.metrics import PROTOCOLS
from eval_nuscenes.nuscenes_reader import NuScenesSplit, Sample
from eval_nuscenes.pictures import BLANKED, INK, NEUTRAL, PLAN, RANDOM, TRUTH
from eval_nuscenes.summary import STEPS_OF_A_PLAN, EvaluationSummary, Interval, SampleScores, VariantSummary
from vla_autoprune.files import write_whole
from vla_autoprune.frame import FloatArray, Image, Plan
from vla_autoprune.recipe import Bucket, PruningRecipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEP_COLOURS = {"vision": "#56b4e9", "prefill": "#e6a700", "decode": "#a98bd0", "rest": "#a4abb3"}
REFERENCES = ("blanked", "constant_velocity")
LABEL_LEAK = (
    "<b>Label leak:</b> the driving command was derived from the true future trajectory (2 m to a side at "
    "its end). Figures are optimistic; use a route command where there is one."
)
_ABOUT_TABLE = """L2 in metres, below it collisions in percent: at 1 / 2 / 3 s and, bold, their mean, as each
protocol reports them. Work is prefill FLOPs against unpruned; below it the paper's own count."""
_ABOUT_LATENCY = """Each point is a variant: its mean over 1, 2 and 3 s with a 95 % interval over scenes,
against the median time of a whole plan. Lower left is better. All variants planned one frame before the next,
in turning order."""
_ABOUT_SPLIT = """Mean milliseconds per plan. Pruning inside the decoder shortens the prefill; the rest is
preprocessing, building the prompt and reading the answer."""
_ABOUT_RETENTION = """Visual tokens that enter each decoder layer, one curve per bucket. All curves of a
budget have about the same mean; the frame's complexity picks which one runs."""
_ABOUT_COMPLEXITY = """Information that stage 0 measured in each frame, coloured by the bucket the frame took.
Dashed lines are the bucket edges."""
_ABOUT_TOKENS = """Cells without a visual token are dark. Front cameras above, rear cameras below."""
_ABOUT_ABOVE = """Ahead is up, metres; one dot per half second. Road users as they stood when the plan was
made. From the smallest to the largest error of the pruned plan at 3 s."""

KIND_STYLE: dict[str, dict[str, Any]] = {
    "full": {"color": INK, "marker": "s"},
    "autoprune": {"color": PLAN, "marker": "o"},
    "random": {"color": RANDOM, "marker": "^"},
    "uniform": {"color": "#b8860b", "marker": "P"},
    "fixed": {"color": "#6a5acd", "marker": "X"},
    "blanked": {"color": BLANKED, "marker": "v"},
    "constant_velocity": {"color": NEUTRAL, "marker": "D"},
}

PRUNED: tuple[PrunedKind, ...] = get_args(PrunedKind)
KIND_LABEL = {
    "random": "random tokens",
    "uniform": "evenly spread tokens",
    "fixed": "AutoPrune, one bucket",
    "autoprune": "AutoPrune",
    "full": "unpruned",
}

Row = TypeVar("Row", Variant, VariantSummary)


@dataclass(frozen=True)
class SceneView:
    """One sample to show from above, with the plans that were made on it."""

    sample: Sample
    record: SampleRecord
    road: Sequence[FloatArray]


@dataclass(frozen=True)
class TokenView:
    """One sample to show through the eyes of each stage."""

    sample: Sample
    images: Mapping[str, Image]
    plans: Mapping[str, Plan]
    """Variant name -> plan, with its kept tokens."""


def pruned_example(variants: Sequence[Row]) -> Row | None:
    """The pruned variant that pictures show: AutoPrune where it was run, at the smallest budget."""
    return next((row for kind in PRUNED for row in reversed(variants) if row.kind == kind), None)


def scene_views(
    split: NuScenesSplit,
    records: Sequence[SampleRecord],
    scored: Sequence[SampleScores],
    variant: str,
    count: int = 8,
) -> list[SceneView]:
    """Samples to draw from above: spread from the smallest to the largest error of a variant at 3 s."""
    errors = {
        index: sample.scores["vad"][variant].distance_m[-1]
        for index, sample in enumerate(scored)
        if sample.scores["vad"][variant].counted
    }
    views = []
    for index in _spread(errors, count):
        sample = split[index]
        views.append(SceneView(sample, records[index], split.drivable_area(sample)))
    return views


def token_views(
    split: NuScenesSplit, records: Sequence[SampleRecord], variant: Variant, cameras: Sequence[str]
) -> list[TokenView]:
    """Plan two samples again to show their tokens: the least and the most complex frame a variant met."""
    plans = [record.plans[variant.name] for record in records]
    complexity = {index: plan.complexity or 0.0 for index, plan in enumerate(plans) if plan.error is None}
    views = []
    for index in _spread(complexity, 2):
        sample = split[index]
        frame = sample.frame(cameras)
        views.append(TokenView(sample, frame.images, {variant.name: variant.agent.plan(frame)}))
    return views


def _spread(values: Mapping[int, float], count: int) -> list[int]:
    """Keys of at most `count` entries, evenly from the smallest to the largest value."""
    ranked = sorted(values, key=lambda index: values[index])
    places = np.linspace(0, len(ranked) - 1, count).round().astype(int) if ranked else ()
    return list(dict.fromkeys(ranked[place] for place in places))


def write_report(
    path: Path,
    summary: EvaluationSummary,
    recipe: PruningRecipe,
    scenes: Sequence[SceneView],
    tokens: Sequence[TokenView],
) -> None:
    """Write the report; the file appears only when it is whole.

    Args:
        path: .html file, replaced if there.
        summary: the numbers.
        recipe: of the bundle, for retention curves and bucket edges.
        scenes: samples to draw from above.
        tokens: samples to paint kept tokens on.
    """
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context(pictures.STYLE):
        body = "\n".join(_sections(summary, recipe, scenes, tokens))
    title = f"Open-loop evaluation · {summary.conditions.version} {summary.conditions.split}"
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>\n<body><main>{body}</main></body></html>\n"
    )
    write_whole(path, page.encode())


def _section(title: str, about: str, content: str) -> str:
    return f"<h2>{title}</h2><p>{about}</p>{content}"


def headlines(summary: EvaluationSummary, protocol: str = "vad") -> list[str]:
    """What the numbers say; a difference inside its interval is not called a difference."""
    full = summary.variant("full")
    if full is None or full.cost is None:
        return []
    said = [
        f"Unpruned, the model is {full.planning[protocol].l2_m[3].mean:.2f} m off on average "
        f"({protocol} protocol) at {full.cost.total_ms.p50:.0f} ms per plan"
        + _references(summary, protocol)
        + "."
    ]
    for variant in summary.variants:
        if variant.kind not in PRUNED or variant.cost is None:
            continue
        above = variant.planning[protocol].l2_above_full_m
        prefill = variant.cost.prefill_ms.p50 / max(full.cost.prefill_ms.p50, 1e-9)
        total = variant.cost.total_ms.p50 / max(full.cost.total_ms.p50, 1e-9)
        said.append(
            f"{variant.name}: L2 {_difference(above)}; prefill takes {prefill:.0%} of the unpruned time, "
            f"the whole plan {total:.0%}."
        )
    without = full.cost.total_ms.p50 - full.cost.prefill_ms.p50
    said.append(
        f"A prefill that cost nothing would still leave {without:.0f} of {full.cost.total_ms.p50:.0f} ms: "
        "pruning inside the decoder saves neither the vision tower nor the decoding."
    )
    return said


def _references(summary: EvaluationSummary, protocol: str) -> str:
    values = [
        f"{variant.name} {variant.planning[protocol].l2_m[3].mean:.2f} m"
        for variant in summary.variants
        if variant.kind in REFERENCES
    ]
    return f" (for comparison: {', '.join(values)})" if values else ""


def _difference(above: Interval | None) -> str:
    if above is None or above.low is None or above.high is None:
        return "has no interval (one scene only)"
    interval = f"{_signed(above.mean)} m [{_signed(above.low)}, {_signed(above.high)}]"
    if above.low <= 0 <= above.high:
        return f"{interval}, no difference from unpruned can be shown"
    return f"{interval} {'worse' if above.mean > 0 else 'better'} than unpruned"


def _signed(metres: float) -> str:
    return f"{round(metres, 3) + 0.0:+.3f}"


def _sections(
    summary: EvaluationSummary,
    recipe: PruningRecipe,
    scenes: Sequence[SceneView],
    tokens: Sequence[TokenView],
) -> Iterable[str]:
    conditions = summary.conditions
    yield (
        f"<h1>Open-loop planning, {escape(conditions.version)} {escape(conditions.split)}</h1>"
        f'<p class="lead">{conditions.samples} samples of {conditions.scenes} scenes · bundle '
        f"<code>{escape(conditions.key.bundle_id[:12])}</code> · {escape(recipe.model.id)} · "
        f"{escape(conditions.key.machine)}</p>"
    )
    if conditions.key.command_source == "future":
        yield f'<p class="warning">{LABEL_LEAK}</p>'
    yield "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in headlines(summary)) + "</ul>"
    yield _section("All variants", _ABOUT_TABLE, _table(summary))
    yield _section("Metric against measured latency", _ABOUT_LATENCY, _latency_plot(summary))
    yield _section("Where the time goes", _ABOUT_SPLIT, _split_plot(summary))
    yield _section("Retention curves", _ABOUT_RETENTION, _retention_plot(recipe))
    yield _section("Complexity and buckets", _ABOUT_COMPLEXITY, _complexity_plot(summary, recipe))
    if tokens:
        figures = "".join(_token_figures(view, recipe) for view in tokens)
        yield _section("What each stage still sees", _ABOUT_TOKENS, figures)
    if scenes:
        yield _section("Plans from above", _ABOUT_ABOVE, _bird_eye_plot(summary, scenes))
    yield "<h2>How it was measured</h2>" + _explanations(summary) + _conditions(summary)


def _table(summary: EvaluationSummary) -> str:
    protocols = list(summary.variants[0].planning)
    costs = (
        "visual tokens<br>into layers",
        "work",
        "prefill ms<br>p50 / p90",
        "total ms<br>p50 / p90",
        "KV MiB",
        "flags",
    )
    head = "".join(f"<th>{name}</th>" for name in ("variant", *costs, *protocols))
    rows = []
    for variant in summary.variants:
        cells = [
            f'<th class="{variant.kind}">{escape(variant.name)}{_failures(variant)}</th>',
            *_cost_cells(variant),
        ]
        for protocol in protocols:
            planning = variant.planning[protocol]
            cells.append(f"<td>{_horizons(planning.l2_m)}<br>{_horizons(planning.collision, 100)} %</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _cost_cells(variant: VariantSummary) -> list[str]:
    cost = variant.cost
    if cost is None:
        return ['<td class="none" colspan="6">plans without the model</td>']
    published = ""
    if cost.published_work_fraction is not None:
        published = f"<small>{cost.published_work_fraction:.2f}</small>"
    return [
        f"<td>{cost.visual_tokens_into_layers:.0f}</td>",
        f"<td>{cost.work_fraction:.2f}{published}</td>",
        f"<td>{cost.prefill_ms.p50:.1f} / {cost.prefill_ms.p90:.1f}</td>",
        f"<td>{cost.total_ms.p50:.1f} / {cost.total_ms.p90:.1f}</td>",
        f"<td>{cost.kv_mib:.2f}</td>",
        f"<td>{sum(variant.flags.values())}</td>",
    ]


def _failures(variant: VariantSummary) -> str:
    if not variant.failed_plans:
        return ""
    why = escape(variant.first_failure or "")
    return f'<small title="{why}">{variant.failed_plans} failed plans, scored standing still</small>'


def _horizons(values: Sequence[Interval], factor: float = 1.0) -> str:
    single = " / ".join(f"{value.mean * factor:.2f}" for value in values[:3])
    mean = values[3]
    shown = f"{single} · <b>{mean.mean * factor:.2f}</b>"
    if mean.low is None or mean.high is None:
        return shown
    return f'<span title="mean {mean.low * factor:.3f} to {mean.high * factor:.3f}">{shown}</span>'


def _latency_plot(summary: EvaluationSummary) -> str:
    from matplotlib.figure import Figure

    protocols = list(summary.variants[0].planning)
    figure = Figure(figsize=(3.9 * len(protocols), 6.4), layout="constrained")
    grid: Any = figure.subplots(2, len(protocols), sharex=True, squeeze=False)
    for column, protocol in enumerate(protocols):
        for row, (field, factor, label) in enumerate(
            (("l2_m", 1.0, "L2, m"), ("collision", 100.0, "collision, %"))
        ):
            axes = grid[row, column]
            _latency_panel(axes, summary, protocol, field, factor)
            axes.set_ylabel(label if column == 0 else "")
            if row == 0:
                axes.set_title(protocol, loc="left")
            else:
                axes.set_xlabel("total latency, ms (p50)")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return _figure(figure)


def _latency_panel(axes: Axes, summary: EvaluationSummary, protocol: str, field: str, factor: float) -> None:
    def mean_of(variant: VariantSummary) -> Interval:
        return getattr(variant.planning[protocol], field)[3]

    top = 0.0
    for kind, label in KIND_LABEL.items():
        style = KIND_STYLE[kind]
        rows = [(variant, variant.cost) for variant in summary.variants if variant.kind == kind]
        timed = [(variant, cost.total_ms.p50) for variant, cost in rows if cost is not None]
        if not timed:
            continue
        latencies = [latency for _, latency in timed]
        means = np.array([mean_of(variant).mean for variant, _ in timed]) * factor
        bars = np.array([_reach(mean_of(variant)) for variant, _ in timed]).T * factor
        axes.errorbar(
            latencies, means, yerr=bars, label=label, capsize=2.5, elinewidth=1.1, linewidth=1.3, **style
        )
        top = max(top, float((means + bars[1]).max()))
        for (variant, latency), mean in zip(timed, means, strict=True):
            if variant.budget is not None:
                offset = (5, 4) if kind == "autoprune" else (5, -11)
                axes.annotate(
                    f"{variant.budget:.0%}",
                    (latency, mean),
                    xytext=offset,
                    textcoords="offset points",
                    fontsize=8,
                    color=style["color"],
                )
    limit = 1.25 * top if top > 0 else 1.0
    above = 0
    for variant in summary.variants:
        if variant.kind not in REFERENCES:
            continue
        value = mean_of(variant).mean * factor
        colour = KIND_STYLE[variant.kind]["color"]
        line = {"blanked": (0, (1, 1)), "constant_velocity": (0, (5, 2))}[variant.kind]
        axes.plot([], [], color=colour, linestyle=line, linewidth=1.6, label=variant.name)
        if value <= limit:
            axes.axhline(value, color=colour, linestyle=line, linewidth=1.3)
        else:
            place = (0.99, 0.98 - 0.08 * above)
            axes.annotate(
                f"\u2191 {variant.name} {value:.2f}",
                place,
                xycoords="axes fraction",
                ha="right",
                va="top",
                fontsize=8,
                color=colour,
            )
            above += 1
    axes.set_ylim(0, limit)
    axes.margins(x=0.12)
    axes.grid(axis="y")


def _reach(interval: Interval) -> tuple[float, float]:
    """How far the interval reaches below and above its mean."""
    if interval.low is None or interval.high is None:
        return 0.0, 0.0
    return max(0.0, interval.mean - interval.low), max(0.0, interval.high - interval.mean)


def _split_plot(summary: EvaluationSummary) -> str:
    from matplotlib.figure import Figure

    rows = [variant for variant in summary.variants if variant.cost is not None and variant.kind != "blanked"]
    figure = Figure(figsize=(10.5, 0.9 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(rows))
    for step in STEPS_OF_A_PLAN:
        widths = np.array([variant.cost.split_ms[step] for variant in rows if variant.cost is not None])
        axes.barh(range(len(rows)), widths, left=left, color=STEP_COLOURS[step], label=step, height=0.68)
        for row, (start, width) in enumerate(zip(left, widths, strict=True)):
            if width > 0.045 * max(left.max() + widths.max(), 1e-9):
                axes.text(
                    start + width / 2,
                    row,
                    f"{width:.1f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="#14181d",
                )
        left += widths
    axes.set_yticks(range(len(rows)), [variant.name for variant in rows])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("milliseconds per plan (mean)")
    figure.legend(loc="outside upper center", ncols=4)
    return _figure(figure)


def _retention_plot(recipe: PruningRecipe) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.9 * len(recipe.budgets), 3.6), layout="constrained")
    panels: Any = figure.subplots(1, len(recipe.budgets), sharey=True, squeeze=False)
    visual = recipe.layout.visual_tokens
    layers = recipe.model.layers
    edges = np.arange(layers + 1) + 0.5
    for axes, budget in zip(panels[0], recipe.budgets, strict=True):
        buckets = recipe.buckets_of(budget)
        for number, bucket in enumerate(buckets):
            axes.stairs(
                bucket.visual_tokens_into_layers, edges, baseline=None, linewidth=2,
                color=_shade(number, len(buckets)), linestyle=("-", "--", ":", "-.")[number % 4],
                label=f"{bucket.name}: slope {bucket.slope:g}, {_interval_text(bucket)}",
            )  # fmt: skip
        axes.set_title(f"budget {budget:.0%}", loc="left")
        axes.set_xlabel("decoder layer")
        axes.set_ylim(0, visual * 1.05)
        axes.set_xlim(0.5, layers + 0.5)
        axes.grid(axis="y")
        axes.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    panels[0, 0].set_ylabel("visual tokens into the layer")
    return _figure(figure)


def _complexity_plot(summary: EvaluationSummary, recipe: PruningRecipe) -> str:
    from matplotlib.figure import Figure

    example = pruned_example(summary.variants)
    rows = [
        variant
        for variant in summary.variants
        if example is not None and variant.kind == example.kind and variant.complexities
    ]
    if not rows:
        return "<p>No plan asked for the complexity of its frame.</p>"
    figure = Figure(figsize=(3.9 * len(rows), 3.4), layout="constrained")
    panels: Any = figure.subplots(1, len(rows), sharey=True, squeeze=False)
    for axes, variant in zip(panels[0], rows, strict=True):
        buckets = recipe.buckets_of(variant.budget) if variant.budget is not None else ()
        values = np.array(variant.complexities)
        bins = np.histogram_bin_edges(values, bins=24)
        for number, bucket in enumerate(buckets):
            low, high = bucket.complexity
            inside = (values >= (-math.inf if low is None else low)) & (
                values < (math.inf if high is None else high)
            )
            share = variant.buckets.get(bucket.name, 0) / max(1, sum(variant.buckets.values()))
            label = f"{bucket.name}: {share:.0%} of frames"
            axes.hist(values[inside], bins=bins, color=_shade(number, len(buckets)), label=label)
            if low is not None and bins[0] <= low <= bins[-1]:
                axes.axvline(low, color=INK, linestyle="--", linewidth=0.9)
        axes.set_title(variant.name, loc="left")
        axes.set_xlabel("complexity, bits")
        axes.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.2))
        axes.grid(axis="y")
    panels[0, 0].set_ylabel("frames")
    return _figure(figure)


def _token_figures(view: TokenView, recipe: PruningRecipe) -> str:
    blocks = []
    visual = recipe.layout.visual_tokens
    for name, plan in view.plans.items():
        figures = []
        for number, (layers, kept) in enumerate(zip(recipe.stages, plan.kept_visual, strict=True)):
            masks = pictures.kept_masks(recipe.layout, kept)
            image = pictures.jpeg(pictures.kept_mosaic(view.images, masks, width=250))
            caption = f"into {_layers_text(layers)}: <b>{len(kept)}</b> of {visual} tokens"
            figures.append(_image_figure(image, f"stage {number} of {name}", caption))
        complexity = "" if plan.complexity is None else f", complexity {plan.complexity:.2f} bits"
        title = f"{view.sample.scene}, {name} <small>bucket {plan.bucket}{complexity}</small>"
        blocks.append(f'<h3>{title}</h3><div class="stages">{"".join(figures)}</div>')
    return "".join(blocks)


def _image_figure(jpeg: bytes, alternative: str, caption: str) -> str:
    source = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    return (
        f'<figure><img alt="{escape(alternative)}" src="{source}"><figcaption>{caption}</figcaption></figure>'
    )


def _bird_eye_plot(summary: EvaluationSummary, scenes: Sequence[SceneView]) -> str:
    from matplotlib.figure import Figure

    example = pruned_example(summary.variants)
    shown = [variant for variant in (summary.variant("full"), example) if variant is not None]
    columns = min(4, len(scenes))
    rows = math.ceil(len(scenes) / columns)
    figure = Figure(figsize=(3.0 * columns, 3.7 * rows + 0.4), layout="constrained")
    panels: Any = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.ravel()[len(scenes) :]:
        axes.set_axis_off()
    for axes, view in zip(panels.ravel(), scenes, strict=False):
        truth = view.sample.future_in_ego[view.sample.future_exists]
        paths: dict[str, tuple[FloatArray, dict[str, Any]]] = {
            "truth": (truth, {"color": TRUTH, "linewidth": 4.5, "alpha": 0.75})
        }
        for variant in shown:
            style = {**KIND_STYLE[variant.kind], "linewidth": 1.4, "markersize": 3.5}
            paths[variant.name] = (np.array(view.record.plans[variant.name].waypoints_in_ego), style)
        pictures.draw_bird_eye(
            axes, paths, pictures.boxes_in_ego(view.sample), view.road, view.sample.history_in_ego
        )
        axes.set_title(f"{view.sample.scene}, {view.sample.command.value}", loc="left", fontsize=8.5)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return _figure(figure)


def _explanations(summary: EvaluationSummary) -> str:
    items = []
    for name, planning in summary.variants[0].planning.items():
        protocol = PROTOCOLS[name]
        items.append(
            f"<dt>{name}</dt><dd>{escape(protocol.summary)} Counter: {escape(protocol.counter)} "
            f"({planning.counted} here). Quirks kept: {escape('; '.join(protocol.quirks))}.</dd>"
        )
    conditions = summary.conditions
    items += [
        f"<dt>{name}</dt><dd>{escape(meaning)}</dd>"
        for name, meaning in (
            (
                "Intervals",
                f"{conditions.confidence:.0%} percentile bootstrap over whole scenes, {conditions.resamples} "
                "resamples, the same for every variant, so that differences are paired.",
            ),
            (
                "Visual tokens into layers",
                "Mean over decoder layers of what enters them, not of what leaves the last pruning point.",
            ),
            (
                "Work",
                "Prefill FLOPs over the unpruned prefill's, causal and grouped-query aware. The paper's own "
                "count knows neither.",
            ),
            ("KV", "Size of the KV caches of the bucket that ran."),
            (
                "Flags",
                f"Deviations from what was asked for, over all plans: {_flags_text(summary) or 'none'}.",
            ),
            ("Failed plans", "An answer that is no plan is scored as standing still, not left out."),
        )
    ]
    return f"<dl>{''.join(items)}</dl>"


def _flags_text(summary: EvaluationSummary) -> str:
    totals: dict[str, int] = {}
    for variant in summary.variants:
        for flag, count in variant.flags.items():
            totals[flag] = totals.get(flag, 0) + count
    return ", ".join(f"{flag} {count}×" for flag, count in totals.items())


def _conditions(summary: EvaluationSummary) -> str:
    conditions = summary.conditions
    ego = ", ".join(f"{source} {count}" for source, count in conditions.ego_sources.items())
    entries = {
        "command line": conditions.command,
        "bundle": conditions.key.bundle_id,
        "data": f"{conditions.data_root}, {conditions.version}, split {conditions.split}",
        "data hash": conditions.key.data_hash,
        "driving command from": conditions.key.command_source,
        "ego state from": ego,
        "machine": conditions.key.machine,
        "versions": ", ".join(f"{name} {version}" for name, version in conditions.key.versions.items()),
        "warm-up": f"{conditions.warm_up} plans per variant before the first sample, not counted",
    }
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td><code>{escape(value)}</code></td></tr>"
        for name, value in entries.items()
    )
    return f'<h3>Conditions</h3><div class="wide"><table class="conditions">{rows}</table></div>'


def _shade(number: int, count: int) -> str:
    """Light blue to vermilion, each readable on white and on black."""
    shades = ("#6bb8f2", "#2f86d1", "#7a5fc7", "#b86fa0", "#d55e00")
    return shades[round(number * (len(shades) - 1) / max(1, count - 1))] if count > 3 else shades[number]


def _interval_text(bucket: Bucket) -> str:
    low, high = bucket.complexity
    if low is None and high is None:
        return "any complexity"
    if low is None:
        return f"below {high:.2f} bits"
    return f"from {low:.2f} bits" if high is None else f"{low:.2f} to {high:.2f} bits"


def _layers_text(layers: range) -> str:
    first, last = layers[0] + 1, layers[-1] + 1
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def _figure(figure: Any) -> str:
    return f'<div class="plot">{pictures.svg(figure)}</div>'


_CSS = """
:root { color-scheme: light dark; --ink: #1d2733; --paper: #ffffff; --soft: #f2f4f7; --line: #d5dae1; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --paper: #14181d; --soft: #1e242c; --line: #38414c; }
}
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1300px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; margin: 8px 0 0; }
h2 { font-size: 19px; margin: 40px 0 6px; border-top: 1px solid var(--line); padding-top: 18px; }
h3 { font-size: 15px; margin: 20px 0 6px; }
h3 small, .lead { opacity: .75; font-weight: 400; }
p { max-width: 80ch; margin: 4px 0 12px; }
.warning { border-left: 4px solid #d55e00; background: var(--soft); padding: 8px 12px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: 5px 8px; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
thead th { font-weight: 600; background: var(--soft); }
tbody th, .conditions th { text-align: left; }
td small, th small { display: block; opacity: .7; font-weight: 400; }
td.none { text-align: center; opacity: .6; }
tbody th { border-left: 4px solid var(--ink); }
tbody th.autoprune { border-left-color: #2f86d1; }
tbody th.random { border-left-color: #d55e00; }
tbody th.uniform { border-left-color: #b8860b; }
tbody th.fixed { border-left-color: #6a5acd; }
tbody th.blanked { border-left-color: #b86fa0; }
tbody th.constant_velocity { border-left-color: #8a8f98; }
.conditions th { border-left: 0; }
.conditions td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.plot svg { max-width: 100%; height: auto; }
.stages { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 14px; }
figure { margin: 0; }
figure img { width: 100%; border-radius: 4px; }
figcaption { font-size: 13px; }
dt { font-weight: 600; margin-top: 8px; }
dd { margin: 0 0 0 18px; max-width: 90ch; }
code { font-size: 12.5px; }
"""
