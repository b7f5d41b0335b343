"""The evaluation as one HTML file that needs nothing else: table, plots, pictures, protocols, conditions."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from eval_nuscenes import pictures, plots
from eval_nuscenes.bootstrap import Interval
from eval_nuscenes.evaluation import PlanRecord, SampleRecord, Variant, pruned_example
from eval_nuscenes.headlines import comparison_sentence, headlines
from eval_nuscenes.metrics import protocol_named
from eval_nuscenes.nuscenes_reader import NuScenesSplit, Sample
from eval_nuscenes.scenarios import MANOEUVRES
from eval_nuscenes.summary import CameraTokens, EvaluationSummary, Planning, SampleScores, VariantSummary
from vla_autoprune.errors import PlanError
from vla_autoprune.files import write_whole
from vla_autoprune.frame import FloatArray, Image, Plan
from vla_autoprune.images import Reduction
from vla_autoprune.page import html_page, section
from vla_autoprune.recipe import PruningRecipe

LABEL_LEAK = (
    "<b>Label leak:</b> the driving command was derived from the true future trajectory (2 m to a side at "
    "its end). Figures are optimistic; use a route command where there is one."
)
_ABOUT_TABLE = """L2 in metres, below it collisions in percent: at 1 / 2 / 3 s and, bold, their mean, as
each protocol reports them; a dash where it counts no sample. <i>Late</i>: the mean when each plan takes
effect only after its latency. Work is prefill FLOPs against unpruned; below it the paper's own count."""
_ABOUT_LATENCY = """Each point is a variant: its mean over 1, 2 and 3 s with a 95 % interval over scenes
(none below five), against the median time of a whole plan. Lower left is better. All variants planned one
frame before the next, in turning order, and met the same scenes: intervals that overlap do not rule out a
difference, which the paired comparisons tell."""
_ABOUT_EQUAL = """Policies compared where they take the same time, not at the same budget: at the latency
of each variant, the other policy's curve is read off between its two nearest points. Differences are
paired over scenes; one whose 95 % interval contains zero is not called a difference."""
_ABOUT_BUNDLES = """The same frames, policy and budget with another bundle: its value minus that of the first
bundle, paired over scenes. A difference whose 95 % interval contains zero is not called a difference."""
_ABOUT_CAMERAS = """Visual tokens of each camera that enter the last stage, mean over the frames; in the
table also the frames with the fewest and the most."""
_ABOUT_FLOORS = " A thick line is the camera's floor: what the recipe keeps of it in every frame."
_ABOUT_SPLIT = """Mean milliseconds per plan. Pruning inside the decoder shortens the prefill; the rest is
preprocessing, building the prompt and reading the answer."""
_ABOUT_RETENTION = """Visual tokens that enter each decoder layer, one curve per bucket. All curves of a
budget have about the same mean; the frame's complexity picks which one runs."""
_ABOUT_COMPLEXITY = """Information that stage 0 measured in each frame, coloured by the bucket the frame took.
Dashed lines are the bucket edges."""
_ABOUT_ERROR = """Whether complex frames are harder: the mean L2 over fifths of the frames, from the least
to the most complex. A rank correlation whose interval contains zero shows no relation."""
_ABOUT_TOKENS = """Cells without a visual token are dark. Front cameras above, rear cameras below."""
_ABOUT_ABOVE = """Ahead is up, metres; one dot per half second. Road users as they stood when the plan was
made. From the smallest to the largest error at 3 s."""
_ABOUT_WORST = """The samples with the largest error at 3 s, one per scene: the plan on the front camera,
what the last stage saw, and the scene from above (metres, ahead is up)."""


@dataclass(frozen=True)
class SceneView:
    """One sample to show from above, with the plans that were made on it."""

    sample: Sample
    record: SampleRecord
    road: Sequence[FloatArray]


@dataclass(frozen=True)
class TokenView:
    """One sample to show through the eyes of each stage.

    Attributes:
        plans: variant -> plan, with its kept tokens.
    """

    sample: Sample
    images: Mapping[str, Image]
    plans: Mapping[str, Plan]


@dataclass(frozen=True)
class WorstView:
    """One of the samples that went worst.

    Attributes:
        traits: what kind of sample it is.
        error_m: distance from the truth after 3 s.
        hits: steps that count as a collision.
        images: of its cameras; empty where they are not there.
        plan: made once more, for its kept tokens; None where no model is at hand.
    """

    scene: SceneView
    traits: Mapping[str, str]
    error_m: float
    hits: int
    images: Mapping[str, Image]
    plan: Plan | None


def scene_views(
    split: NuScenesSplit,
    records: Sequence[SampleRecord],
    scored: Sequence[SampleScores],
    variant: str,
    count: int = 8,
) -> list[SceneView]:
    """Samples to draw from above: spread from the smallest to the largest error of a variant at 3 s."""
    chosen = _spread(_errors_at_3_s(scored, variant), count)
    return [_scene_view(split, records[index]) for index in chosen]


def worst_views(
    split: NuScenesSplit,
    records: Sequence[SampleRecord],
    scored: Sequence[SampleScores],
    variant: Variant,
    cameras: Sequence[str],
    reduction: Reduction | None = None,
    count: int = 4,
) -> list[WorstView]:
    """The samples of a variant with the largest error at 3 s under the first protocol, one per scene.

    Args:
        split: where the samples come from.
        records: their plans.
        scored: their scores, in the same order.
        variant: whose errors count; it plans once more unless it only stands for a predictions file.
        cameras: images to decode; the front camera where a file was evaluated.
        reduction: as for the plans; pictures have every pixel.
        count: at most so many.
    """
    errors = _errors_at_3_s(scored, variant.name)
    worst: dict[str, int] = {}
    for index in sorted(errors, key=lambda each: -errors[each]):
        worst.setdefault(scored[index].scene, index)
    views = []
    for index in list(worst.values())[:count]:
        scene = _scene_view(split, records[index])
        there = [name for name in cameras if name in scene.sample.cameras]
        readable = all(scene.sample.cameras[name].path.is_file() for name in there)
        frame = scene.sample.frame(there) if there and readable else None
        plan = None
        if variant.kind != "predictions" and frame is not None:
            try:
                plan = variant.agent.plan(scene.sample.frame(there, reduction))
            except PlanError:
                plan = None  # its record says so, and it stands still in the picture
        first = next(iter(scored[index].scores.values()))[variant.name]
        views.append(
            WorstView(
                scene=scene,
                traits=scored[index].traits,
                error_m=errors[index],
                hits=sum(first.hits),
                images={} if frame is None else frame.images,
                plan=plan,
            )
        )
    return views


def token_views(
    split: NuScenesSplit,
    records: Sequence[SampleRecord],
    variants: Sequence[Variant],
    cameras: Sequence[str],
    reduction: Reduction | None = None,
) -> list[TokenView]:
    """Plan two samples again to show their tokens: the least and most complex frame the first variant met."""
    plans = [record.plans[variants[0].name] for record in records]
    complexity = {index: plan.complexity or 0.0 for index, plan in enumerate(plans) if plan.error is None}
    views = []
    for index in _spread(complexity, 2):
        sample = _sample(split, records[index])
        frame = sample.frame(cameras, reduction)
        shown = {}
        for variant in variants:
            with contextlib.suppress(PlanError):  # its record says so
                shown[variant.name] = variant.agent.plan(frame)
        views.append(TokenView(sample, sample.frame(cameras).images, shown))
    return views


def _errors_at_3_s(scored: Sequence[SampleScores], variant: str) -> dict[int, float]:
    scores = [next(iter(sample.scores.values()))[variant] for sample in scored]
    return {index: score.distance_m[-1] for index, score in enumerate(scores) if score.counted_at[-1]}


def _sample(split: NuScenesSplit, record: SampleRecord) -> Sample:
    return split[split.tokens.index(record.token)]


def _scene_view(split: NuScenesSplit, record: SampleRecord) -> SceneView:
    sample = _sample(split, record)
    return SceneView(sample, record, split.drivable_area(sample))


def _spread(values: Mapping[int, float], count: int) -> list[int]:
    """Keys of at most `count` entries, evenly from the smallest to the largest value."""
    ranked = sorted(values, key=lambda index: values[index])
    places = np.linspace(0, len(ranked) - 1, count).round().astype(int) if ranked else ()
    return list(dict.fromkeys(ranked[place] for place in places))


def write_report(
    path: Path,
    summary: EvaluationSummary,
    recipes: Mapping[str, PruningRecipe] | None = None,
    scenes: Sequence[SceneView] = (),
    tokens: Sequence[TokenView] = (),
    worst: Sequence[WorstView] = (),
) -> None:
    """Write the report; the file appears only when it is whole.

    Args:
        path: .html file, replaced if there.
        summary: the numbers.
        recipes: by name of the bundle, for retention curves and bucket edges; none for predictions.
        scenes: samples to draw from above.
        tokens: samples to paint kept tokens on.
        worst: samples to look into.
    """
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context(pictures.STYLE):
        body = "\n".join(_sections(summary, recipes or {}, scenes, tokens, worst))
    title = f"Open-loop evaluation · {summary.conditions.version} {summary.conditions.split}"
    write_whole(path, html_page(title, body, _LOOK).encode())


def _sections(
    summary: EvaluationSummary,
    recipes: Mapping[str, PruningRecipe],
    scenes: Sequence[SceneView],
    tokens: Sequence[TokenView],
    worst: Sequence[WorstView],
) -> Iterable[str]:
    conditions = summary.conditions
    model = "".join(
        f"{escape(name)} · " for name in dict.fromkeys(recipe.model.id for recipe in recipes.values())
    )
    yield (
        f"<h1>Open-loop planning, {escape(conditions.version)} {escape(conditions.split)}</h1>"
        f'<p class="lead">{conditions.coverage} · {escape(conditions.source)} · '
        f"{model}{escape(conditions.key.machine)}</p>"
    )
    if conditions.samples < conditions.samples_asked:
        yield f'<p class="warning"><b>Not all samples:</b> {escape(conditions.coverage)} have a plan.</p>'
    if conditions.key.command_source == "future":
        yield f'<p class="warning">{LABEL_LEAK}</p>'
    if any(planning.few for planning in summary.variants[0].planning.values()):
        few = [name for name, planning in summary.variants[0].planning.items() if planning.few]
        names = ", ".join(few)
        yield f'<p class="warning"><b>Few samples</b> count under {names}: a trial run, no result.</p>'
    yield "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in headlines(summary)) + "</ul>"
    yield section("All variants", _ABOUT_TABLE, _table(summary))
    timed = [variant for variant in summary.variants if variant.cost is not None]
    if timed:
        yield section("Metric against measured latency", _ABOUT_LATENCY, plots.latency_plot(summary))
    if summary.comparisons:
        yield section("At equal latency", _ABOUT_EQUAL, _comparisons(summary))
    if any(variant.counterpart for variant in summary.variants):
        about = f"{_ABOUT_BUNDLES} The first bundle is {escape(summary.bundles[0])}."
        yield section("Bundles against each other", about, _bundle_differences(summary))
    if any(variant.budget is not None and variant.cameras for variant in summary.variants):
        shown = plots.camera_plot(summary) + _camera_table(summary)
        about = _ABOUT_CAMERAS + (_ABOUT_FLOORS if summary.has_camera_floors else "")
        yield section("What is left of each camera", about, shown)
    if timed:
        yield section("Where the time goes", _ABOUT_SPLIT, plots.split_plot(summary))
    about = "; ".join(f"<i>{escape(name)}</i>: {escape(what)}" for name, what in MANOEUVRES.items())
    yield section(
        "By kind of driving",
        "Mean over 1, 2 and 3 s with a 95 % interval over scenes (none below five); n counts samples. "
        f"Manoeuvres: {about}.",
        plots.scenario_plot(summary),
    )
    if worst:
        figures = "".join(_worst_figures(view, summary, recipes) for view in worst)
        yield section("Worst scenes", _ABOUT_WORST, figures)
    if recipes:
        curves = {name: plots.retention_plot(recipe) for name, recipe in recipes.items()}
        yield section("Retention curves", _ABOUT_RETENTION, _by_bundle(curves))
        met = {name: plots.complexity_plot(summary, recipe, name) for name, recipe in recipes.items()}
        yield section("Complexity and buckets", _ABOUT_COMPLEXITY, _by_bundle(met))
    example = pruned_example(summary.variants)
    known = [each for each in (summary.variant("full"), example) if each and each.error_by_complexity]
    if known:
        errors = plots.error_by_complexity_plot(summary.protocols[0], known)
        yield section("Complexity and error", _ABOUT_ERROR, errors)
    if tokens and recipes:
        planned_by = {variant.name: recipes.get(variant.bundle) for variant in summary.variants}
        figures = "".join(_token_figures(view, planned_by) for view in tokens)
        yield section("What each stage still sees", _ABOUT_TOKENS, figures)
    if scenes:
        yield section("Plans from above", _ABOUT_ABOVE, plots.bird_eye_plot(summary, scenes))
    yield "<h2>How it was measured</h2>" + _explanations(summary) + _conditions(summary)


def _table(summary: EvaluationSummary) -> str:
    timed = any(variant.cost is not None for variant in summary.variants)
    costs = (
        "visual tokens<br>into layers",
        "work",
        "prefill ms<br>p50 / p90",
        "total ms<br>p50 / p90",
        "KV MiB",
        "flags",
    )
    counted = summary.variants[0].planning
    protocols = [
        f"{name}<br><small>{protocol_named(name).reports}<br>{_counts(counted[name])}</small>"
        for name in summary.protocols
    ]
    rows = []
    for variant in summary.variants:
        cells = [
            f'<th class="{variant.kind}">{escape(variant.name)}{_failures(variant)}</th>',
            *(_cost_cells(variant) if timed else ()),
        ]
        cells += [_planning_cell(variant.planning[protocol]) for protocol in summary.protocols]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return _wide(("variant", *(costs if timed else ()), *protocols), rows)


def _counts(planning: Planning) -> str:
    counts = sorted(set(planning.counted), reverse=True)
    return f"n {' / '.join(str(count) for count in counts)}"


def _planning_cell(planning: Planning) -> str:
    lines = [_horizons(planning.l2_m), f"{_horizons(planning.collision, 100)} %"]
    if planning.intersection is not None:
        lines.append(f"edges {_horizons(planning.intersection, 100)} %")
    late = ""
    if planning.late is not None and planning.late.l2_m[-1].mean is not None:
        mean, hits = planning.late.l2_m[-1].mean, planning.late.collision[-1].mean or 0.0
        late = f"<small>late by {planning.late.latency_ms:.0f} ms: {mean:.2f} m, {hits * 100:.2f} %</small>"
    return f"<td>{'<br>'.join(lines)}{late}</td>"


def _by_bundle(plots_of: Mapping[str, str]) -> str:
    """One plot, or one per bundle with its name above."""
    if len(plots_of) == 1:
        return next(iter(plots_of.values()))
    return "".join(f"<h3>{escape(name)}</h3>{plot}" for name, plot in plots_of.items())


def _bundle_differences(summary: EvaluationSummary) -> str:
    """Rows of further bundles against the first one's."""
    rows = []
    for variant in summary.variants:
        for protocol, planning in variant.planning.items():
            l2_m, collision = planning.l2_above_counterpart_m, planning.collision_above_counterpart
            if l2_m is not None and collision is not None:
                rows.append(
                    f'<tr><th class="{variant.kind}">{escape(variant.name)}</th>'
                    f"<td>{escape(variant.counterpart or '')}</td>"
                    f"<td>{protocol}</td><td>{_difference_text(l2_m, 1, 3)}</td>"
                    f"<td>{_difference_text(collision, 100, 2)}</td></tr>"
                )
    return _wide(("variant", "against", "protocol", "L2 difference, m", "collision, points of %"), rows)


def _camera_table(summary: EvaluationSummary) -> str:
    """Visual tokens in the last stage, by variant and camera."""
    shown = [variant for variant in summary.variants if variant.budget is not None and variant.cameras]
    cameras = list(dict.fromkeys(camera for variant in shown for camera in variant.cameras))
    rows = []
    for variant in shown:
        cells = [_camera_cell(variant.cameras.get(camera)) for camera in cameras]
        rows.append(f'<tr><th class="{variant.kind}">{escape(variant.name)}</th>{"".join(cells)}</tr>')
    return _wide(("variant", *map(escape, cameras)), rows)


def _camera_cell(left: CameraTokens | None) -> str:
    if left is None:
        return "<td></td>"
    floor = f", floor {left.floor}" if left.floor else ""
    return f"<td>{left.mean:.1f}<small>{left.least} to {left.most}{floor}</small></td>"


def _wide(columns: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{name}</th>" for name in columns)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _comparisons(summary: EvaluationSummary) -> str:
    rows = [
        f'<tr title="{escape(comparison_sentence(each))}"><th>{escape(each.variant)}</th>'
        f"<td>{each.latency_ms:.1f}</td><td>{escape(each.against)}<br>"
        f"<small>{escape(' and '.join(each.between))}</small></td><td>{each.protocol}</td>"
        f"<td>{_difference_text(each.l2_m, 1, 3)}</td>"
        f"<td>{_difference_text(each.collision, 100, 2)}</td></tr>"
        for each in summary.comparisons
    ]
    columns = ("variant", "ms per plan", "against", "protocol", "L2 difference, m", "collision, points of %")
    return _wide(columns, rows)


def _difference_text(difference: Interval, factor: float, decimals: int) -> str:
    if difference.mean is None:
        return "–"
    shown = f"{difference.mean * factor:+.{decimals}f}"
    if difference.low is not None and difference.high is not None:
        shown += f" [{difference.low * factor:+.{decimals}f}, {difference.high * factor:+.{decimals}f}]"
    said = {"lower": "better", "higher": "worse"}.get(difference.verdict, difference.verdict)
    return f"{shown}<small>{said}</small>"


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
    single = " / ".join(_number(value, factor) for value in values[:-1])
    mean = values[-1]
    shown = f"{single} · <b>{_number(mean, factor)}</b>"
    if mean.low is None or mean.high is None:
        return shown
    return f'<span title="mean {mean.low * factor:.3f} to {mean.high * factor:.3f}">{shown}</span>'


def _number(value: Interval, factor: float) -> str:
    return "–" if value.mean is None else f"{value.mean * factor:.2f}"


def _worst_figures(view: WorstView, summary: EvaluationSummary, recipes: Mapping[str, PruningRecipe]) -> str:
    sample, record = view.scene.sample, view.scene.record
    example = pruned_example(summary.variants) or summary.variants[0]
    name, recipe = example.name, recipes.get(example.bundle)
    planned: PlanRecord = record.plans[name]
    blocks = []
    front = sample.cameras.get("CAM_FRONT")
    if "CAM_FRONT" in view.images and front is not None:
        image = pictures.draw_path(
            view.images["CAM_FRONT"], sample.future_in_ego[sample.future_exists], front, pictures.TRUTH
        )
        image = pictures.draw_path(image, np.array(planned.waypoints_in_ego), front)
        narrow = pictures.jpeg(_narrowed(image, 640))
        blocks.append(_image_figure(narrow, "front camera", "plan blue, truth green, teal where both"))
    if view.plan is not None and view.plan.kept_visual and recipe is not None:
        kept = view.plan.kept_visual[-1]
        mosaic = pictures.kept_mosaic(view.images, pictures.kept_masks(recipe.layout, kept), width=213)
        caption = f"into the last stage: <b>{len(kept)}</b> of {recipe.layout.visual_tokens} tokens"
        blocks.append(_image_figure(pictures.jpeg(mosaic), f"kept tokens of {name}", caption))
    blocks.append(plots.bird_eye_plot(summary, [view.scene]))
    traits = ", ".join(view.traits.values())
    why = f", failed: {escape(planned.error)}" if planned.error else ""
    hits = f"{view.hits} of 6 steps collide" if view.hits else "no collision"
    return (
        f"<h3>{escape(sample.scene)}, {view.error_m:.1f} m off after 3 s, {hits} ({summary.protocols[0]}) "
        f"<small>{escape(name)}{why} · {escape(traits)} · command {sample.command.value} · "
        f"{sample.ego.speed_mps:.1f} m/s · <code>{escape(sample.token)}</code></small></h3>"
        f'<div class="worst">{"".join(blocks)}</div>'
    )


def _narrowed(image: Image, width: int) -> Image:
    import cv2

    height = round(width * image.shape[0] / image.shape[1])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def _token_figures(view: TokenView, recipes: Mapping[str, PruningRecipe | None]) -> str:
    blocks = []
    for name, plan in view.plans.items():
        recipe = recipes[name]
        if recipe is None:
            continue
        visual, figures = recipe.layout.visual_tokens, []
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


def _explanations(summary: EvaluationSummary) -> str:
    items = []
    for name, planning in summary.variants[0].planning.items():
        protocol = protocol_named(name)
        items.append(
            f"<dt>{name}</dt><dd>{escape(protocol.summary)} Counter: {escape(protocol.counter)} "
            f"({_counts(planning)} of {summary.conditions.samples} here). "
            f"Quirks kept: {escape('; '.join(protocol.quirks))}.</dd>"
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
            (
                "Late",
                "Until a plan arrives, the vehicle goes on at the speed and yaw rate it had; then it does "
                "what the plan says from where it stands. Latency: "
                + (
                    "each plan's own measured time."
                    if conditions.latency_ms is None
                    else f"{conditions.latency_ms:g} ms, as given."
                ),
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
        "evaluated": conditions.source,
        "planned by": conditions.key.planned_by,
        "data": f"{conditions.data_root}, {conditions.version}, split {conditions.split}",
        "data hash": conditions.key.data_hash,
        "driving command from": conditions.key.command_source,
        "ego state from": ego,
        "machine": conditions.key.machine,
        "versions": ", ".join(f"{name} {version}" for name, version in conditions.key.versions.items()),
    }
    if conditions.warm_up is not None:
        entries["warm-up"] = f"{conditions.warm_up} plans per variant before the first sample, not counted"
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td><code>{escape(value)}</code></td></tr>"
        for name, value in entries.items()
    )
    return f'<h3>Conditions</h3><div class="wide"><table class="conditions">{rows}</table></div>'


def _layers_text(layers: range) -> str:
    first, last = layers[0] + 1, layers[-1] + 1
    return f"layer {first}" if first == last else f"layers {first} to {last}"


_LOOK = """
main { max-width: 1500px; }
h3 { margin: 20px 0 6px; }
h3 small, .lead { opacity: .75; font-weight: 400; }
th, td { padding: 5px 8px; }
td small, th small { display: block; opacity: .7; font-weight: 400; }
td.none { text-align: center; opacity: .6; }
tbody th { border-left: 4px solid var(--ink); }
tbody th.autoprune { border-left-color: #2f86d1; }
tbody th.random { border-left-color: #d55e00; }
tbody th.uniform { border-left-color: #b8860b; }
tbody th.fixed { border-left-color: #6a5acd; }
tbody th.blanked { border-left-color: #b86fa0; }
tbody th.constant_velocity { border-left-color: #8a8f98; }
tbody th.predictions { border-left-color: #2f86d1; }
.conditions th { border-left: 0; }
.stages { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 14px; }
.worst { display: grid; grid-template-columns: 1fr 1fr 300px; gap: 14px; align-items: start; }
@media (max-width: 900px) { .worst { grid-template-columns: 1fr; } }
figure { margin: 0; }
figure img { width: 100%; border-radius: 4px; }
figcaption { font-size: 13px; }
dt { font-weight: 600; margin-top: 8px; }
dd { margin: 0 0 0 18px; max-width: 90ch; }
code { font-size: 12.5px; }
"""
