"""A profile as one HTML file that needs nothing else: where the time goes, how it spreads, what limits it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_autoprune.page import INK, html_page, section, svg
from vla_autoprune.profiling.document import PHASES, BucketProfile, Distribution, Phase, Profile
from vla_autoprune.profiling.roofline import amdahl, reached
from vla_autoprune.recipe import FULL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PHASE_COLOURS: Mapping[Phase, str] = {
    "input": "#a4abb3",
    "vision": "#56b4e9",
    "prefill": "#e6a700",
    "decode": "#a98bd0",
    "answer": "#4fa37e",
}
BUCKET_COLOURS = ("#6bb8f2", "#2f86d1", "#7a5fc7", "#b86fa0", "#d55e00")
"""From the first pruned bucket to the leanest; the unpruned one is drawn in ink."""

_STYLE = {
    "font.size": 9,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}

_ABOUT_STAGES = """Median milliseconds of each part of a plan. <i>Input</i> is reading images down and
building the prompt, <i>answer</i> choosing tokens and reading the plan. Pruning inside the decoder shortens
prefill and, through a smaller cache, decoding; it cannot shorten the rest. On a disturbed machine medians of
the parts sum to less than the median of the whole."""
_ABOUT_SPREAD = """Share of plans that took at most so long. Steep is steady; a long tail to the right is what
a deadline meets."""
_ABOUT_TOKENS = """Each point is a bucket: median time, with a bar up to its 90th percentile where there are
enough frames. Buckets of one budget have almost the same cost by construction."""
_ABOUT_ROOF = """Each point is a stage: operations a second against operations per byte that must move
at least; numbers are those of the stages. Under the slope memory limits, under the flat roof arithmetic. A
point above the slope works on data that stayed in a cache. Stages whose work is not counted (vision, host)
are not shown."""


def profile_page(profile: Profile) -> str:
    """The whole report.

    Args:
        profile: what was measured.

    Returns:
        HTML.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    conditions = profile.conditions
    title = f"Latency profile of {conditions.model}"
    body = "\n".join(_sections(profile))
    lead = (
        f'<h1>{escape(title)}</h1><p class="lead">{conditions.frames} frames per bucket · '
        f"{escape(conditions.backend)} on {escape(conditions.device)} · "
        f"{escape(conditions.machine.get('cpu', ''))}</p>\n"
    )
    return html_page(title, lead + body)


def _sections(profile: Profile) -> Iterator[str]:
    for note in profile.notes:
        yield f'<p class="warning">{escape(note)}</p>'
    limit = amdahl(profile)
    if limit is not None:
        yield f"<p><b>{escape(str(limit))}.</b></p>"
    yield section("Where the time goes", _ABOUT_STAGES, _drawn(stage_figure, profile))
    yield _bucket_table(profile)
    yield section("How it spreads", _ABOUT_SPREAD, _drawn(spread_figure, profile))
    yield section("Latency against tokens", _ABOUT_TOKENS, _drawn(token_figure, profile))
    if profile.ceiling.flops_per_s is None or profile.ceiling.bytes_per_s is None:
        why = f"<p>The machine's ceilings are not both measured: {escape(profile.ceiling.source)}.</p>"
        yield section("Roofline", "", why)
    else:
        yield section("Roofline", _ABOUT_ROOF, _drawn(roof_figure, profile))
    for bucket in _shown(profile):
        yield f"<h3>Stages of {escape(bucket.name)}, milliseconds per plan</h3>"
        yield _stage_table(profile, bucket)
    yield "<h2>Power, clocks, memory</h2>" + _power(profile)
    if profile.ros is not None:
        ros = profile.ros
        about = f"{ros.plans} plans and {ros.refused} refused frames in <code>{escape(ros.recording)}</code>."
        yield section("Latencies of the ROS path", about, _ros_table(profile))
    yield "<h2>Conditions</h2>" + _conditions(profile)


def stage_figure(profile: Profile) -> Figure:
    """Medians of the phases, stacked, a bar per bucket."""
    figure = _figure(10.5, 0.9 + 0.42 * len(profile.buckets))
    axes = figure.subplots()
    left = np.zeros(len(profile.buckets))
    longest = max(sum(bucket.phase_ms(phase) for phase in PHASES) for bucket in profile.buckets)
    for phase in PHASES:
        widths = np.array([bucket.phase_ms(phase) for bucket in profile.buckets])
        axes.barh(range(len(widths)), widths, left=left, color=PHASE_COLOURS[phase], label=phase, height=0.68)
        for row, (start, width) in enumerate(zip(left, widths, strict=True)):
            if width > 0.05 * longest:
                text = f"{width:.1f}" if width < 100 else f"{width:.0f}"
                place = {"ha": "center", "va": "center", "fontsize": 8, "color": "#14181d"}
                axes.text(start + width / 2, row, text, **place)
        left += widths
    axes.set_yticks(range(len(left)), [bucket.name for bucket in profile.buckets])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("milliseconds per plan (medians)")
    figure.legend(loc="outside upper center", ncols=len(PHASES))
    return figure


def spread_figure(profile: Profile) -> Figure:
    """Cumulative distributions of the total of every bucket."""
    figure = _figure(9.5, 4.0)
    axes = figure.subplots()
    for bucket, colour in _coloured(profile):
        values = np.sort(bucket.total_ms)
        shares = np.arange(1, len(values) + 1) / len(values)
        axes.step(values, shares, where="post", color=colour, linewidth=1.5, label=bucket.name)
    axes.set_xlabel("milliseconds of a whole plan")
    axes.set_ylabel("share of plans")
    axes.set_ylim(0, 1.02)
    axes.grid()
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def token_figure(profile: Profile) -> Figure:
    """Totals and prefills against the visual tokens that enter the layers."""
    figure = _figure(9.5, 3.8)
    panels: Any = figure.subplots(1, 2)
    for axes, name in zip(panels, ("whole plan", "prefill"), strict=True):
        _token_panel(axes, profile, name == "prefill")
        axes.set_title(name, loc="left")
        axes.set_xlabel("visual tokens into the layers (mean)")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid()
    panels[0].set_ylabel("milliseconds")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=9, fontsize=8)
    return figure


def _token_panel(axes: Axes, profile: Profile, prefill: bool) -> None:
    """Buckets of one budget lie on top of each other and share a colour."""
    colours: dict[str, str] = {}
    for bucket, colour in _coloured(profile):
        label = None if bucket.budget in colours else bucket.budget
        tokens = bucket.visual_tokens_into_layers
        samples = bucket.frames_ms("prefill") if prefill else bucket.total_ms
        middle = float(np.median(samples))
        up = float(np.quantile(samples, 0.9)) - middle if bucket.total.p90 is not None else 0.0
        style = {"fmt": "o", "markersize": 5, "capsize": 2.5, "label": label}
        shown = colours.setdefault(bucket.budget, colour)
        axes.errorbar(tokens, middle, yerr=[[0], [up]], color=shown, **style)


def roof_figure(profile: Profile) -> Figure:
    """Stages under the machine's roof."""
    figure = _figure(9.5, 4.6)
    axes = figure.subplots()
    flops, moved = profile.ceiling.flops_per_s, profile.ceiling.bytes_per_s
    assert flops is not None and moved is not None
    intensities: list[float] = []
    named: list[tuple[float, float, str]] = []
    for bucket, filled in zip(_shown(profile), (True, False), strict=False):
        for phase, marker in (("prefill", "o"), ("decode", "^")):
            points = [
                (stage.work.flops / stage.work.bytes, found.flops_per_s / 1e9, stage.name)
                for stage in bucket.stages
                if stage.phase == phase and stage.work is not None and stage.work.flops
                if (found := reached(stage, profile.ceiling)) is not None
            ]
            if not points:
                continue
            x, y, _ = zip(*points, strict=True)
            intensities += x
            colour = PHASE_COLOURS["prefill" if phase == "prefill" else "decode"]
            face = colour if filled else "none"
            label = f"{phase}, {bucket.name}"
            style = {"markersize": 6, "linestyle": "none", "markeredgewidth": 1.4}
            axes.plot(x, y, marker, color=colour, markerfacecolor=face, label=label, **style)
            if filled:
                named += points
    ridge = flops / moved
    span = np.geomspace(min([*intensities, ridge]) / 2, max([*intensities, ridge]) * 3, 100)
    axes.plot(span, np.minimum(flops, span * moved) / 1e9, color=INK, linewidth=1.4)
    axes.annotate(
        f"{flops / 1e9:.0f} GFLOP/s", (span[-1], flops / 1e9), xytext=(0, 4), textcoords="offset points",
        ha="right", fontsize=8,
    )  # fmt: skip
    halfway = np.sqrt(span[0] * ridge)
    axes.annotate(
        f"{moved / 1e9:.1f} GB/s", (halfway, halfway * moved / 1e9), xytext=(-6, 4),
        textcoords="offset points", ha="right", fontsize=8,
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    for place_x, place_y, names in _apart(named, axes):
        offset = {"xytext": (7, -2.5), "textcoords": "offset points", "fontsize": 7.5}
        axes.annotate(names, (place_x, place_y), **offset)
    axes.set_xlabel("operations per byte that must move")
    axes.set_ylabel("GFLOP/s reached")
    axes.grid(which="major")
    figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    return figure


def _apart(points: Sequence[tuple[float, float, str]], axes: Axes) -> list[tuple[float, float, str]]:
    """Labels of stages, those that would touch in one: x, y and text."""
    (left, right), (low, high) = np.log(axes.get_xlim()), np.log(axes.get_ylim())
    groups: list[list[tuple[float, float, str]]] = []
    for point in sorted(points, key=lambda point: point[1], reverse=True):
        for group in groups:
            x, y, _ = group[-1]
            across, down = np.log(point[0] / x) / (right - left), np.log(y / point[1]) / (high - low)
            if abs(across) < 0.06 and down < 0.045:
                group.append(point)
                break
        else:
            groups.append([point])
    return [
        (
            max(x for x, _, _ in group),
            float(np.exp(np.mean([np.log(y) for _, y, _ in group]))),
            ", ".join(dict.fromkeys(_short(name) for _, _, name in group)),
        )
        for group in groups
    ]


def _short(stage: str) -> str:
    return stage.removeprefix("decode_").removeprefix("stage_")


def _shown(profile: Profile) -> list[BucketProfile]:
    """The first bucket, which is the unpruned one if it was profiled, and the leanest."""
    leanest = min(profile.buckets, key=lambda bucket: bucket.work_fraction)
    return list({bucket.name: bucket for bucket in (profile.buckets[0], leanest)}.values())


def _coloured(profile: Profile) -> Iterator[tuple[BucketProfile, str]]:
    pruned = [bucket for bucket in profile.buckets if bucket.name != FULL]
    for bucket in profile.buckets:
        if bucket.name == FULL:
            yield bucket, INK
        else:
            place = pruned.index(bucket) * (len(BUCKET_COLOURS) - 1) / max(1, len(pruned) - 1)
            yield bucket, BUCKET_COLOURS[round(place)]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _drawn(draw: Callable[[Profile], Figure], profile: Profile) -> str:
    from matplotlib import rc_context

    with rc_context(_STYLE):
        return f'<div class="plot">{svg(draw(profile))}</div>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    header = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f'<div class="wide"><table class="{kind}">{header}<tbody>{lines}</tbody></table></div>'


def _times(time: Distribution | None) -> list[str]:
    if time is None:
        return ["–"] * 5
    values = (time.p50, time.p90, time.p99, time.max, time.jitter)
    return ["–" if value is None else f"{value:.3f}" for value in values]


_PERCENTILES = ("p50", "p90", "p99", "max", "jitter")


def _bucket_table(profile: Profile) -> str:
    times = [f"plan {name} ms" for name in _PERCENTILES]
    head = ["bucket", "visual tokens into layers", "work", "KV MiB", "ms per decoded token", *times]
    rows = []
    for bucket in profile.buckets:
        token = bucket.decode_per_token
        rows.append(
            [
                bucket.name,
                f"{bucket.visual_tokens_into_layers:.1f}",
                f"{bucket.work_fraction:.0%}",
                f"{bucket.kv_mib:.2f}",
                "–" if token is None else f"{token.p50:.3f}",
                *_times(bucket.total),
            ]
        )
    return _table(head, rows)


def _stage_table(profile: Profile, bucket: BucketProfile) -> str:
    head = ["stage", "clock", "runs", "rows", "visual", *_PERCENTILES, "GFLOP/s", "GB/s", "of ceiling"]
    rows = []
    for stage in bucket.stages:
        found = reached(stage, profile.ceiling)
        rows.append(
            [
                stage.name,
                stage.clock,
                str(stage.runs_per_plan),
                "" if stage.rows is None else str(stage.rows),
                "" if stage.visual_tokens is None else str(stage.visual_tokens),
                *_times(stage.time),
                f"{found.flops_per_s / 1e9:.2f}" if found else "",
                f"{found.bytes_per_s / 1e9:.2f}" if found else "",
                f"{found.share:.0%} {found.bound}" if found and found.share is not None else "",
            ]
        )
    return _table(head, rows)


def _power(profile: Profile) -> str:
    memory = profile.memory
    host = "not measured" if memory.peak_host_mib is None else f"{memory.peak_host_mib:.0f} MiB"
    device = "" if memory.device_mib is None else f"{memory.device_mib:.0f} MiB, "
    rows = [["peak host memory", host], ["device memory", f"{device}{memory.device_source}"]]
    for bucket in profile.buckets:
        for energy in bucket.energy:
            rails = ", ".join(f"{name} {watts:.2f} W" for name, watts in energy.rails_w.items())
            above = "" if energy.above_idle_j is None else f" ({energy.above_idle_j:.3f} J above idle)"
            rows.append(
                [
                    f"energy of a plan, {bucket.name}",
                    f"{energy.per_plan_j:.3f} J{above}, {energy.mean_w:.2f} W over {energy.plans} plans, "
                    f"{energy.sensor}; {rails}",
                ]
            )
    for state in profile.sensors:
        said = [f"{name} {value} → {state.after.get(name, '–')}" for name, value in state.before.items()]
        rows.append([state.sensor, "; ".join([*said, state.throttling])])
    rows += [[f"absent: {name}", why] for name, why in profile.absent_sensors.items()]
    return _table((), rows, "conditions")


def _ros_table(profile: Profile) -> str:
    assert profile.ros is not None
    rows = [[name, *_times(time)] for name, time in profile.ros.latencies_ms.items()]
    return _table(["latency, ms", *_PERCENTILES], rows)


def _conditions(profile: Profile) -> str:
    conditions = profile.conditions
    rows = [
        [name.replace("_", " "), str(value)]
        for name, value in conditions.model_dump(mode="json").items()
        if name != "machine"
    ]
    rows += [[name, value] for name, value in conditions.machine.items()]
    return _table((), [*rows, ["ceilings", profile.ceiling.source]], "conditions")
