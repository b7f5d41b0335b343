"""The HTML report stands alone and says what was measured."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from html.parser import HTMLParser

import numpy as np
import pytest

from eval_nuscenes.evaluation import PlanLog, RunKey, plan_samples, planner_variants
from eval_nuscenes.report import SceneView, TokenView, headlines, write_report
from eval_nuscenes.summary import Conditions, EvaluationSummary, Interval, score_sample, summarise
from vla_autoprune.frame import CAMERAS, Frame, Plan
from vla_autoprune.recipe import ModelShape, PromptLayout, PruningRecipe, bucket_for, build_recipe


@pytest.fixture(scope="module")
def recipe() -> PruningRecipe:
    spans: list = [("text", 1)]
    for camera in CAMERAS:
        spans += [("text", 1), ("visual", camera, 36)]
    shape = ModelShape(
        id="tiny <vla>", weights_sha256="0" * 64, layers=8, hidden=128, heads=4, kv_heads=2, ffn=352
    )
    layout = PromptLayout(segments=(*spans, ("text", 6)), image_size=(96, 96))
    return build_recipe(shape, layout, decode_length=12, budgets=(0.6, 0.25))


@pytest.fixture(scope="module")
def written(
    recipe: PruningRecipe,
    make_drive: Callable,
    pretend_planner: type,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, EvaluationSummary]:
    @dataclasses.dataclass(frozen=True)
    class Planner:
        budget: float | None
        policy: str

        def plan(self, frame: Frame) -> Plan:
            plan = pretend_planner(self.budget, self.policy).plan(frame)
            bucket = bucket_for(recipe, self.budget, plan.complexity)
            into = bucket.visual_tokens_into_layers
            kept = tuple(np.arange(into[layers[0]]) for layers in recipe.stages)
            return dataclasses.replace(
                plan,
                bucket=bucket.name,
                visual_tokens_into_layers=into,
                kept_visual=kept,
                flags=("pretended",),
            )

    folder = tmp_path_factory.mktemp("report")
    drive = make_drive()
    variants = planner_variants(Planner, recipe.budgets)
    key = RunKey(
        bundle_id="feed" * 16,
        data_hash="da7a" * 16,
        variants=tuple(variant.name for variant in variants),
        command_source="future",
        code="c0de" * 16,
        machine="a box",
        versions={"python": "3.11"},
    )
    records = list(plan_samples(drive, variants, PlanLog(folder, key), warm_up=0))
    scored = [score_sample(sample, record) for sample, record in zip(drive.samples, records, strict=True)]
    conditions = Conditions(
        key=key,
        command="vla-autoprune evaluate <bundle>",
        data_root="data",
        version="v1.0-synth",
        split="val",
        samples=27,
        scenes=3,
        ego_sources={"can_bus": 27},
        warm_up=0,
    )
    summary = summarise(variants, records, scored, conditions)
    scenes = [
        SceneView(drive[index], records[index], drive.drivable_area(drive[index])) for index in (0, 10, 20)
    ]
    frame = drive[4].frame()
    tokens = [TokenView(drive[4], frame.images, {variants[3].name: variants[3].agent.plan(frame)})]
    path = folder / "report.html"
    write_report(path, summary, recipe, scenes, tokens)
    assert [file.name for file in folder.glob("report*")] == ["report.html"]
    return path.read_text(), summary


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
    for protocol in ("uniad", "stp3", "vad"):
        assert f"<dt>{protocol}</dt>" in page
    for fact in (
        "feed" * 16,
        "da7a" * 16,
        "a box",
        "evaluate &lt;bundle&gt;",
        "tiny &lt;vla&gt;",
        "can_bus 27",
    ):
        assert fact in page
    assert "Label leak" in page
    assert "pretended" in page


def test_plots_take_the_ink_of_the_page(written: tuple[str, EvaluationSummary]) -> None:
    page, _ = written
    assert page.count("<svg") == 5
    assert "currentColor" in page
    assert page.count("data:image/jpeg") == 4


def test_a_difference_inside_its_interval_is_not_called_one(written: tuple[str, EvaluationSummary]) -> None:
    _, summary = written

    def with_difference(interval: Interval) -> str:
        variant = summary.variants[1]
        planning = {"vad": variant.planning["vad"].model_copy(update={"l2_above_full_m": interval})}
        rows = (summary.variants[0], variant.model_copy(update={"planning": planning}))
        return headlines(summary.model_copy(update={"variants": rows}))[1]

    assert "no difference from unpruned can be shown" in with_difference(
        Interval(mean=0.1, low=-0.1, high=0.3)
    )
    assert "worse than unpruned" in with_difference(Interval(mean=0.1, low=0.05, high=0.3))
    assert "better than unpruned" in with_difference(Interval(mean=-0.1, low=-0.2, high=-0.05))
    assert "one scene only" in with_difference(Interval(mean=-0.1))
