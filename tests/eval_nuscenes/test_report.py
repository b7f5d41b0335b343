"""The HTML report stands alone and says what was measured."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from eval_nuscenes.bootstrap import Interval
from eval_nuscenes.evaluation import PlannerSource, planner_variants
from eval_nuscenes.headlines import headlines
from eval_nuscenes.report import scene_views, token_views, worst_views, write_report
from eval_nuscenes.summary import EvaluationSummary
from vla_autoprune.frame import CAMERAS, Frame, Plan
from vla_autoprune.recipe import ModelShape, PromptLayout, PruningRecipe, bucket_for
from vla_autoprune.recipe_building import build_recipe, with_camera_floors


@pytest.fixture(scope="module")
def recipe(six_camera_layout: PromptLayout) -> PruningRecipe:
    shape = ModelShape(
        id="tiny <vla>", weights_sha256="0" * 64, layers=8, hidden=128, heads=4, kv_heads=2, ffn=352
    )
    return build_recipe(shape, six_camera_layout, decode_length=12, budgets=(0.6, 0.25))


@pytest.fixture(scope="module")
def written(
    recipe: PruningRecipe,
    make_drive: Callable,
    pretend_planner: type,
    evaluated: Callable,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, EvaluationSummary]:
    recipes = {"bundle": recipe, "front12": with_camera_floors(recipe, {"CAM_FRONT": 12})}

    @dataclasses.dataclass(frozen=True)
    class Planner:
        recipe: PruningRecipe
        budget: float | None
        policy: str

        def plan(self, frame: Frame) -> Plan:
            recipe = self.recipe
            plan = pretend_planner(self.budget, self.policy).plan(frame)
            bucket = bucket_for(recipe, self.budget, plan.complexity)
            into = bucket.visual_tokens_into_layers
            kept = tuple(np.arange(into[layers[0]]) for layers in recipe.stages)
            left = np.bincount(recipe.layout.camera_of_visual[kept[-1]], minlength=6)
            return dataclasses.replace(
                plan,
                bucket=bucket.name,
                visual_tokens_into_layers=into,
                kept_visual=kept,
                flags=("pretended",),
                visual_tokens_left=dict(zip(recipe.layout.cameras, left.tolist(), strict=True)),
            )

    folder = tmp_path_factory.mktemp("report")
    sources = [PlannerSource(name, partial(Planner, each), False) for name, each in recipes.items()]
    found = evaluated(make_drive(keyframes=11), planner_variants(sources, recipe.budgets), recipes)
    pruned = found.variants[5]
    assert pruned.name == "autoprune 25%"
    shown = found.drive, found.records, found.scored
    path = folder / "report.html"
    write_report(
        path,
        found.summary,
        recipes,
        scene_views(*shown, pruned.name, count=3),
        token_views(found.drive, found.records, [pruned, found.variants[6]], CAMERAS)[:1],
        worst_views(*shown, pruned, CAMERAS, count=2),
    )
    assert [file.name for file in folder.glob("report*")] == ["report.html"]
    return path.read_text(), found.summary


def test_the_report_needs_nothing_else(written: tuple[str, EvaluationSummary]) -> None:
    page, _ = written
    references = re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^"\s)>]+)', page)
    outside = [reference for reference in references if not reference.startswith(("data:", "#"))]
    assert not outside
    assert "<script" not in page


def test_the_report_is_well_formed(written: tuple[str, EvaluationSummary]) -> None:
    open_tags: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list) -> None:
            if tag not in ("meta", "img", "br"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Checker(convert_charrefs=True).feed(written[0])
    assert not open_tags


def test_every_variant_protocol_and_condition_is_named(written: tuple[str, EvaluationSummary]) -> None:
    page, summary = written
    for variant in summary.variants:
        assert f">{variant.name}" in page
    for protocol in ("standard", "uniad", "stp3", "vad"):
        assert f"<dt>{protocol}</dt>" in page
    for fact in (
        "feed" * 16,
        "da7a" * 16,
        "a box",
        "evaluate &lt;bundle&gt;",
        "bundle out/bundle",
        "tiny &lt;vla&gt;",
        "can_bus 33",
    ):
        assert fact in page
    assert "Label leak" in page
    assert "pretended" in page


def test_plots_take_the_ink_of_the_page(written: tuple[str, EvaluationSummary]) -> None:
    page, _ = written
    plots, worst, stages = 8 + 2, 2, 2 * 4  # retention and complexity once per bundle
    assert page.count("<svg") == plots + worst
    assert "currentColor" in page
    assert page.count("data:image/jpeg") == stages + 2 * worst


def test_bundles_stand_against_each_other(written: tuple[str, EvaluationSummary]) -> None:
    page, summary = written
    assert summary.bundles == ("bundle", "front12")
    (row,) = (row for row in summary.variants if row.name == "autoprune 25% front12")
    assert row.counterpart == "autoprune 25%"
    difference = row.planning["standard"].l2_above_counterpart_m
    assert difference is not None and difference.mean is not None
    cells = f">{row.name}</th><td>{row.counterpart}</td><td>standard</td><td>{difference.mean:+.3f}"
    assert cells in page
    said = f"autoprune 25% front12 against autoprune 25%: standard L2 {difference.mean:+.3f} m"
    assert any(sentence.startswith(said) for sentence in headlines(summary))


def test_what_is_left_of_each_camera_is_shown(written: tuple[str, EvaluationSummary]) -> None:
    page, summary = written
    rows = [row for row in summary.variants if row.budget is not None]
    assert len(rows) == 8
    for row in rows:
        floor = 12 if row.bundle == "front12" else 0
        assert {camera: left.floor for camera, left in row.cameras.items() if left.floor} == (
            {"CAM_FRONT": floor} if floor else {}
        )
        left = row.cameras["CAM_FRONT"]
        told = f", floor {floor}" if floor else ""
        assert f"<td>{left.mean:.1f}<small>{left.least} to {left.most}{told}</small></td>" in page
    assert summary.has_camera_floors and "A thick line is the camera's floor" in page
    first = tuple(row for row in summary.variants if row.bundle != "front12")
    assert not summary.model_copy(update={"variants": first}).has_camera_floors


def test_the_worst_samples_come_first_one_per_scene(written: tuple[str, EvaluationSummary]) -> None:
    page, _ = written
    errors = [float(found) for found in re.findall(r"<h3>scene-\d+, ([\d.]+) m off after 3 s", page)]
    scenes = re.findall(r"<h3>(scene-\d+), [\d.]+ m off after 3 s", page)
    assert errors == sorted(errors, reverse=True) and len(set(scenes)) == len(scenes) == 2


def test_a_difference_inside_its_interval_is_not_called_one(written: tuple[str, EvaluationSummary]) -> None:
    _, summary = written

    def with_difference(interval: Interval) -> str:
        variant = summary.variants[1]
        planning = variant.planning["standard"].model_copy(update={"l2_above_reference_m": interval})
        changed = variant.model_copy(update={"planning": {"standard": planning}})
        rows = (summary.variants[0], changed)
        return headlines(summary.model_copy(update={"variants": rows}))[2]

    assert "no difference from unpruned can be shown" in with_difference(
        Interval(mean=0.1, low=-0.1, high=0.3)
    )
    assert "worse than unpruned" in with_difference(Interval(mean=0.1, low=0.05, high=0.3))
    assert "better than unpruned" in with_difference(Interval(mean=-0.1, low=-0.2, high=-0.05))
    assert "without an interval (fewer than 5 scenes)" in with_difference(Interval(mean=-0.1))


def test_few_samples_are_called_few(written: tuple[str, EvaluationSummary]) -> None:
    page, summary = written
    said = headlines(summary)
    assert "standard, 9 to 21 samples of 3 scenes" in said[0]
    assert said[1].startswith("Few samples: 9 to 21 samples of 3 scenes count under standard")
    assert "<b>Few samples</b> count under standard, uniad, stp3, vad" in page


def test_what_counts_no_sample_is_a_dash(
    make_drive: Callable, pretend_planner: type, evaluated: Callable, tmp_path: Path
) -> None:
    variants = planner_variants([PlannerSource("bundle", pretend_planner)], (0.25,))
    summary = evaluated(make_drive(scenes=2, keyframes=2), variants).summary
    write_report(tmp_path / "report.html", summary)
    page = (tmp_path / "report.html").read_text()
    assert "n 0" in page and "– / – / – · <b>–</b>" in page
    only_vad = [row.model_copy(update={"planning": {"vad": row.planning["vad"]}}) for row in summary.variants]
    assert headlines(summary.model_copy(update={"variants": tuple(only_vad)})) == [
        "Protocol vad counts no sample here, so nothing can be said by it."
    ]
