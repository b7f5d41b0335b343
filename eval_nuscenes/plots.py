"""The figures of a report, each as an <svg> in a <div>."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eval_nuscenes import pictures
from eval_nuscenes.bootstrap import Interval
from eval_nuscenes.evaluation import PRUNED, pruned_example
from eval_nuscenes.metrics import protocol_named
from eval_nuscenes.pictures import BLANKED, NEUTRAL, PLAN, RANDOM, TRUTH
from eval_nuscenes.summary import STEPS_OF_A_PLAN, EvaluationSummary, ScenarioFigures, VariantSummary
from vla_autoprune.frame import FloatArray
from vla_autoprune.page import INK, svg
from vla_autoprune.recipe import Bucket, PruningRecipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from eval_nuscenes.report import SceneView

STEP_COLOURS = {"vision": "#56b4e9", "prefill": "#e6a700", "decode": "#a98bd0", "rest": "#a4abb3"}
REFERENCES = ("blanked", "constant_velocity")
MOST_BESIDE = 4
"""Protocols in a row of panels; more would be too small to read."""
LEGEND_ENTRY_IN = 1.7
"""Width of a legend's entry, in inches, with a name of usual length."""
MOST_COMPARED = 6
"""Variants that a scenario plot shows; more would cover each other."""

KIND_STYLE: dict[str, dict[str, Any]] = {
    "full": {"color": INK, "marker": "s"},
    "autoprune": {"color": PLAN, "marker": "o"},
    "random": {"color": RANDOM, "marker": "^"},
    "uniform": {"color": "#b8860b", "marker": "P"},
    "fixed": {"color": "#6a5acd", "marker": "X"},
    "blanked": {"color": BLANKED, "marker": "v"},
    "constant_velocity": {"color": NEUTRAL, "marker": "D"},
    "predictions": {"color": PLAN, "marker": "o"},
}

KIND_LABEL = {
    "random": "random tokens",
    "uniform": "evenly spread tokens",
    "fixed": "AutoPrune, one bucket",
    "autoprune": "AutoPrune",
    "full": "unpruned",
}
BUDGET_LABEL = {"autoprune": (-5, 5), "random": (5, -11), "uniform": (5, 5), "fixed": (-5, -11)}
"""Where a point's budget stands, in points to the right and up."""
OTHERS = ("#2f86d1", "#d55e00", "#b8860b", "#6a5acd", "#b86fa0")
"""Colours of predictions files beside each other."""
BUNDLE_COLOURS = ("#009e73", "#cc3d6b", "#b8860b", "#7f6bd6")
"""Colours of further bundles."""


CAMERA_COLOURS = ("#8fc1e8", "#2f86d1", "#a98bd0", "#e6a700", "#d55e00", "#b86fa0")
"""By place in the prompt; beyond the sixth they come again."""


def camera_plot(summary: EvaluationSummary) -> str:
    """Visual tokens in the last stage, by camera, with the part that a floor keeps in any case."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = [variant for variant in summary.variants if variant.budget is not None and variant.cameras]
    cameras = list(dict.fromkeys(camera for row in rows for camera in row.cameras))
    figure = Figure(figsize=(10.5, 1.1 + 0.46 * len(rows)), layout="constrained")
    axes = figure.subplots()
    widest = max(sum(left.mean for left in row.cameras.values()) for row in rows)
    for number, camera in enumerate(cameras):
        colour = CAMERA_COLOURS[number % len(CAMERA_COLOURS)]
        for place, row in enumerate(rows):
            left = row.cameras.get(camera)
            if left is None:
                continue
            before = sum(each.mean for name, each in row.cameras.items() if cameras.index(name) < number)
            axes.barh(place, left.mean, left=before, color=colour, height=0.6)
            if left.mean > 0.035 * widest:
                axes.text(
                    before + left.mean / 2, place, f"{left.mean:.1f}", ha="center", va="center", fontsize=8,
                    color="#14181d",
                )  # fmt: skip
            if left.floor:
                axes.plot(
                    [before, before + left.floor], [place + 0.38] * 2, color=INK, linewidth=2.5,
                    solid_capstyle="butt",
                )  # fmt: skip
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("visual tokens in the last stage (mean)")
    colours = [CAMERA_COLOURS[number % len(CAMERA_COLOURS)] for number in range(len(cameras))]
    handles = [
        Line2D([], [], color=colour, linewidth=7, label=camera)
        for camera, colour in zip(cameras, colours, strict=True)
    ]
    if summary.has_camera_floors:
        handles.append(Line2D([], [], color=INK, linewidth=2.5, label="floor"))
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 7), fontsize=8)
    return _figure(figure)


def latency_plot(summary: EvaluationSummary) -> str:
    """L2 and collisions of every protocol against the median time of a plan."""
    from matplotlib.figure import Figure

    protocols = summary.protocols
    blocks = math.ceil(len(protocols) / MOST_BESIDE)
    beside = math.ceil(len(protocols) / blocks)
    figure = Figure(figsize=(3.9 * beside, 0.4 + 6.0 * blocks), layout="constrained")
    grid: Any = figure.subplots(2 * blocks, beside, squeeze=False)
    for number, protocol in enumerate(protocols):
        block, column = divmod(number, beside)
        above, below = grid[2 * block : 2 * block + 2, column]
        below.sharex(above)
        _latency_panel(above, summary, protocol, "l2_m", 1.0)
        _latency_panel(below, summary, protocol, "collision", 100.0)
        above.set_title(f"{protocol}: {protocol_named(protocol).reports}", loc="left", fontsize=9)
        below.set_xlabel("total latency, ms (p50)")
        if column == 0:
            above.set_ylabel("L2, m")
            below.set_ylabel("collision, %")
    for axes in grid[2 * blocks - 2 :, len(protocols) - beside * (blocks - 1) :].ravel():
        axes.set_axis_off()
    handles, labels = grid[0, 0].get_legend_handles_labels()
    columns = max(2, int(3.9 * beside / LEGEND_ENTRY_IN))
    figure.legend(handles, labels, loc="outside upper center", ncols=min(columns, len(labels)))
    return _figure(figure)


def _latency_panel(axes: Axes, summary: EvaluationSummary, protocol: str, field: str, factor: float) -> None:
    def mean_of(variant: VariantSummary) -> Interval:
        return getattr(variant.planning[protocol], field)[3]

    top = 0.0
    series = [(kind, bundle) for bundle in summary.bundles or ("",) for kind in KIND_LABEL]
    for kind, bundle in series:
        rows = [
            (variant, variant.cost)
            for variant in summary.variants
            if (variant.kind, variant.bundle) == (kind, bundle)
        ]
        if not rows:
            continue
        style, label = _style(rows[0][0], summary), KIND_LABEL[kind]
        if bundle in summary.bundles[1:]:
            label = f"{label}, {bundle}"
        timed = [
            (variant, cost.total_ms.p50)
            for variant, cost in rows
            if cost is not None and mean_of(variant).mean is not None
        ]
        if not timed:
            continue
        latencies = [latency for _, latency in timed]
        means = np.array([mean_of(variant).mean for variant, _ in timed], dtype=float) * factor
        bars = np.array([_reach(mean_of(variant)) for variant, _ in timed]).T * factor
        axes.errorbar(
            latencies, means, yerr=bars, label=label, capsize=2.5, elinewidth=1.1, linewidth=1.3, **style
        )
        top = max(top, float((means + bars[1]).max()))
        for (variant, latency), mean in zip(timed, means, strict=True):
            if variant.budget is not None:
                right, up = BUDGET_LABEL[kind] if bundle not in summary.bundles[1:] else (5, -11)
                axes.annotate(
                    f"{variant.budget:.0%}",
                    (latency, mean),
                    xytext=(right, up),
                    textcoords="offset points",
                    ha="left" if right > 0 else "right",
                    fontsize=8,
                    color=style["color"],
                )
    limit = 1.25 * top if top > 0 else 1.0
    above = 0
    for variant in summary.variants:
        if variant.kind not in REFERENCES:
            continue
        mean = mean_of(variant).mean
        if mean is None:
            continue
        value = mean * factor
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
    axes.set_ylim(-0.09 * limit, limit)
    axes.margins(x=0.12)
    axes.grid(axis="y")


def _style(variant: VariantSummary, summary: EvaluationSummary) -> dict[str, Any]:
    """By kind; rows of further bundles are hollow and have a colour of their own."""
    style = KIND_STYLE[variant.kind]
    place = summary.bundles.index(variant.bundle) if variant.bundle in summary.bundles else 0
    if not place:
        return style
    colour = BUNDLE_COLOURS[(place - 1) % len(BUNDLE_COLOURS)]
    return {**style, "color": colour, "markerfacecolor": "none", "linestyle": "--"}


def _reach(interval: Interval) -> tuple[float, float]:
    """How far the interval reaches below and above its mean."""
    if interval.mean is None or interval.low is None or interval.high is None:
        return 0.0, 0.0
    return max(0.0, interval.mean - interval.low), max(0.0, interval.high - interval.mean)


def split_plot(summary: EvaluationSummary) -> str:
    """Where the time of a plan goes."""
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


def retention_plot(recipe: PruningRecipe) -> str:
    """Visual tokens into each layer, per budget and bucket."""
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


def complexity_plot(summary: EvaluationSummary, recipe: PruningRecipe, bundle: str) -> str:
    """How complex the frames were, and which of a bundle's buckets they took."""
    from matplotlib.figure import Figure

    example = pruned_example(summary.variants)
    rows = [
        variant
        for variant in summary.variants
        if example is not None
        and (variant.kind, variant.bundle) == (example.kind, bundle)
        and variant.complexities
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


def error_by_complexity_plot(protocol: str, variants: Sequence[VariantSummary]) -> str:
    """Mean L2 of frames of similar complexity under a protocol, per variant, with intervals over scenes."""
    from matplotlib.figure import Figure

    rows = [(variant, variant.error_by_complexity) for variant in variants]
    figure = Figure(figsize=(3.9 * len(rows), 3.2), layout="constrained")
    panels: Any = figure.subplots(1, len(rows), sharey=True, squeeze=False)
    for axes, (variant, found) in zip(panels[0], rows, strict=True):
        bins = [] if found is None else [each for each in found.bins if each.l2_m.mean is not None]
        centres = [(each.low + each.high) / 2 for each in bins]
        means = np.array([each.l2_m.mean for each in bins], dtype=float)
        bars = np.array([_reach(each.l2_m) for each in bins]).T
        widths = [[centre - each.low for centre, each in zip(centres, bins, strict=True)]] * 2
        style = KIND_STYLE[variant.kind]
        axes.errorbar(
            centres, means, yerr=bars, xerr=widths, capsize=2.5, linewidth=0, elinewidth=1.2, **style
        )
        correlation = "" if found is None else _correlation_text(found.rank_correlation)
        axes.set_title(f"{variant.name}\n{correlation}", loc="left", fontsize=9)
        axes.set_xlabel("complexity, bits")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
    panels[0, 0].set_ylabel(f"mean L2, m ({protocol})")
    return _figure(figure)


def scenario_plot(summary: EvaluationSummary) -> str:
    """Mean L2 per kind of sample, a few variants beside each other."""
    from matplotlib.figure import Figure

    rows = _compared(summary)
    kinds = [(each.aspect, each.value) for each in rows[0].scenarios if each.counted]
    if not kinds:
        return "<p>No sample has a known kind.</p>"
    figure = Figure(figsize=(9.5, 1.1 + 0.52 * len(kinds)), layout="constrained")
    axes = figure.subplots()
    spread = np.linspace(-0.27, 0.27, len(rows)) if len(rows) > 1 else [0.0]
    others = iter(OTHERS)
    for offset, variant in zip(spread, rows, strict=True):
        found: dict[tuple[str, str], ScenarioFigures] = {
            (each.aspect, each.value): each for each in variant.scenarios if each.l2_m.mean is not None
        }
        places = [number + offset for number, kind in enumerate(kinds) if kind in found]
        figures = [found[kind] for kind in kinds if kind in found]
        style = dict(_style(variant, summary), linestyle="none")
        if variant.kind == "predictions":
            style["color"] = next(others, NEUTRAL)
        axes.errorbar(
            [each.l2_m.mean for each in figures],
            places,
            xerr=np.array([_reach(each.l2_m) for each in figures]).T,
            elinewidth=1.2,
            capsize=2,
            markersize=5,
            label=variant.name,
            **style,
        )
    counts = {(each.aspect, each.value): (each.counted, each.scenes) for each in rows[0].scenarios}
    labels = [
        f"{aspect}: {value}  (n {counts[aspect, value][0]} of {counts[aspect, value][1]} scene"
        f"{'s' * (counts[aspect, value][1] != 1)})"
        for aspect, value in kinds
    ]
    axes.set_yticks(range(len(kinds)), labels)
    axes.invert_yaxis()
    for number in range(1, len(kinds)):
        axes.axhline(number - 0.5, color=NEUTRAL, linewidth=0.5, alpha=0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"mean L2, m ({summary.protocols[0]})")
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper center", ncols=min(len(rows), 4))
    return _figure(figure)


def bird_eye_plot(summary: EvaluationSummary, scenes: Sequence[SceneView]) -> str:
    """Scenes from above: truth, road users, and the plans of the reference and of the leanest AutoPrune."""
    from matplotlib.figure import Figure

    example = pruned_example(summary.variants)
    files = [variant for variant in summary.variants if variant.kind == "predictions"]
    shown = files or [variant for variant in (summary.variant("full"), example) if variant is not None]
    colours = dict(zip((variant.name for variant in files), OTHERS, strict=False))
    columns = min(4, len(scenes))
    rows = math.ceil(len(scenes) / columns)
    legend = 0.2 * (len(shown) + 1) if columns == 1 else 0.4
    figure = Figure(figsize=(3.0 * columns, 3.7 * rows + legend), layout="constrained")
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
            style["color"] = colours.get(variant.name, style["color"])
            paths[variant.name] = (np.array(view.record.plans[variant.name].waypoints_in_ego), style)
        pictures.draw_bird_eye(
            axes, paths, pictures.boxes_in_ego(view.sample), view.road, view.sample.history_in_ego
        )
        axes.set_title(f"{view.sample.scene}, {view.sample.command.value}", loc="left", fontsize=8.5)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=1 if columns == 1 else len(labels))
    return _figure(figure)


def _compared(summary: EvaluationSummary) -> list[VariantSummary]:
    """Unpruned, the leanest of each policy, the references; or the predictions files."""
    leanest = {
        (variant.kind, variant.bundle): variant.name for variant in summary.variants if variant.kind in PRUNED
    }
    rows = [
        variant
        for variant in summary.variants
        if variant.kind not in PRUNED or leanest[variant.kind, variant.bundle] == variant.name
    ]
    return rows[:MOST_COMPARED]


def _correlation_text(correlation: Interval) -> str:
    if correlation.mean is None:
        return "no rank correlation"
    bounds = "" if correlation.low is None else f" [{correlation.low:+.2f}, {correlation.high:+.2f}]"
    return f"rank correlation {correlation.mean:+.2f}{bounds}"


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


def _figure(figure: Any) -> str:
    return f'<div class="plot">{svg(figure)}</div>'
