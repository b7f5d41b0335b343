"""Recipes: what they hold, how they are built, chosen from, stored, and refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from vla_autoprune.cli import app
from vla_autoprune.errors import RecipeError, VlaError
from vla_autoprune.frame import CAMERAS
from vla_autoprune.pruning.calibration import SlopeMapping
from vla_autoprune.pruning.schedule import reference_schedule
from vla_autoprune.recipe import (
    FULL,
    ModelShape,
    PromptLayout,
    PruningRecipe,
    Scorer,
    bucket_for,
    published_work_fraction,
    read_recipe,
    rows_into_layers,
    symbols,
    write_recipe,
)
from vla_autoprune.recipe_building import build_recipe, coarsening_error, minimum_budget, with_camera_floors

SMALL = ModelShape(
    id="small-vla", weights_sha256="a" * 64, layers=8, hidden=128, heads=4, kv_heads=2, ffn=352
)
MIDDLE = ModelShape(
    id="mid", weights_sha256="b" * 64, layers=24, hidden=1024, heads=16, kv_heads=16, ffn=2816
)


def layout(tokens: int = 36, suffix: int = 13) -> PromptLayout:
    spans: list[Any] = [("text", 1)]
    for camera in CAMERAS:
        spans += [("text", 1), ("visual", camera, tokens)]
    return PromptLayout(segments=(*spans, ("text", suffix)), image_size=(96, 96))


@pytest.fixture(scope="module")
def recipe() -> PruningRecipe:
    return build_recipe(SMALL, layout(), decode_length=12)


def test_layout_knows_its_rows() -> None:
    prompt = layout()
    assert (prompt.length, prompt.visual_tokens, prompt.text_tokens) == (236, 216, 20)
    assert prompt.cameras == CAMERAS
    assert prompt.visual_positions[:2].tolist() == [2, 3] and prompt.visual_positions[36] == 39
    assert prompt.suffix_rows.tolist() == list(range(223, 236))
    assert prompt.camera_of_visual.tolist() == np.repeat(range(6), 36).tolist()
    together = np.concatenate([prompt.visual_positions, prompt.text_positions])
    assert sorted(together.tolist()) == list(range(236))
    assert set(prompt.suffix_rows) <= set(prompt.text_positions)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ((("text", 3),), "no visual span"),
        ((("visual", "CAM_FRONT", 4),), "ends with the visual span of CAM_FRONT"),
        ((("visual", "A", 4), ("visual", "A", 4), ("text", 1)), "names a camera twice: A, A"),
    ],
)
def test_layouts_that_cannot_rank_are_refused(segments: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        PromptLayout(segments=segments)


def test_buckets_meet_their_budget_at_almost_equal_work(recipe: PruningRecipe) -> None:
    assert [bucket.name for bucket in recipe.buckets] == [
        "full", "b60_s0", "b60_s1", "b60_s2", "b40_s0", "b40_s1", "b40_s2", "b25_s0", "b25_s1", "b25_s2",
    ]  # fmt: skip
    for budget in recipe.budgets:
        buckets = recipe.buckets_of(budget)
        for bucket in buckets:
            assert np.mean(bucket.visual_tokens_into_layers) == pytest.approx(budget * 216, abs=0.3)
        work = [bucket.work_fraction for bucket in buckets]
        assert max(work) - min(work) < 0.02
        assert [bucket.default for bucket in buckets] == [False, True, False]
    full = recipe.bucket(FULL)
    assert full.work_fraction == 1.0 and set(full.visual_tokens_into_layers) == {216}


def test_work_fractions_of_the_benchmark_model() -> None:
    recipe = build_recipe(MIDDLE, layout(250, 93), decode_length=12, budgets=(0.5, 0.25, 0.11))
    assert [len(stage) for stage in recipe.stages] == [1, 4, 5, 4, 5, 5]
    for budget, fraction in ((0.5, 0.50), (0.25, 0.275), (0.11, 0.15)):
        for bucket in recipe.buckets_of(budget):
            assert bucket.work_fraction == pytest.approx(fraction, abs=0.05)
            assert abs(published_work_fraction(recipe, bucket) - bucket.work_fraction) < 0.03


def test_kv_and_rows_follow_the_tokens(recipe: PruningRecipe) -> None:
    bucket = recipe.bucket("b25_s1")
    assert bucket.visual_tokens_into_layers == (216, 57, 57, 36, 36, 10, 10, 10)
    assert rows_into_layers(recipe, bucket) == (236, 77, 77, 56, 56, 30, 30, 30)
    assert bucket.kv_tokens_per_layer == (248, 89, 89, 68, 68, 42, 42, 42)


def test_every_symbol_has_a_value(recipe: PruningRecipe) -> None:
    assert symbols(recipe, recipe.bucket("b25_s1"), "prefill") == {
        "stage_00": {"n": 236, "t": 13, "v": 216, "s": 1},
        "select_00": {"n": 236, "v": 216, "x": 20, "t": 13, "k": 57},
        "stage_01": {"n": 77, "t": 13, "v": 57, "s": 1},
        "select_01": {"n": 77, "v": 57, "x": 20, "t": 13, "k": 36},
        "stage_02": {"n": 56, "t": 13, "v": 36, "s": 1},
        "select_02": {"n": 56, "v": 36, "x": 20, "t": 13, "k": 10},
        "stage_03": {"n": 30, "t": 13, "v": 10, "s": 1},
    }
    assert symbols(recipe, recipe.bucket("b25_s1"), "decode") == {
        "stage_00": {"n": 1, "t": 1, "v": 1, "s": 248},
        "stage_01": {"n": 1, "t": 1, "v": 1, "s": 89},
        "stage_02": {"n": 1, "t": 1, "v": 1, "s": 68},
        "stage_03": {"n": 1, "t": 1, "v": 1, "s": 42},
    }


def test_recovery_adds_merged_tokens_within_the_same_budget() -> None:
    recipe = build_recipe(SMALL, layout(), decode_length=12, recovery=True)
    plain = build_recipe(SMALL, layout(), decode_length=12)
    for bucket, without in zip(recipe.buckets, plain.buckets, strict=True):
        assert bucket.visual_tokens_into_layers == without.visual_tokens_into_layers
        assert bucket.after_points == without.after_points
    point = symbols(recipe, recipe.bucket("b25_s0"), "prefill")["select_00"]
    assert point == {"n": 236, "v": 216, "x": 20, "t": 13, "k": 25, "r": 58, "g": 6}


def test_camera_floors_hold_at_every_point() -> None:
    floors = dict.fromkeys(CAMERAS, 2)
    recipe = build_recipe(SMALL, layout(), decode_length=12, camera_floors=floors)
    assert all(min(bucket.kept) >= 12 for bucket in recipe.buckets)
    assert minimum_budget(SMALL, layout(), camera_floors=floors) > minimum_budget(SMALL, layout())


@pytest.mark.parametrize("recovery", [False, True])
def test_floors_change_nothing_else_and_come_off_again(recovery: bool) -> None:
    mapping = SlopeMapping(edges=(0.5, 0.5), slopes=(0.4, 0.0, 0.2), fixed_slope=0.2)
    options = {"mappings": {0.25: mapping}, "scorer": Scorer(reduction="max"), "recovery": recovery}
    recipe = build_recipe(SMALL, layout(), decode_length=12, **options)
    floored = with_camera_floors(recipe, {"CAM_FRONT": 20, "CAM_BACK": 0})
    assert floored.camera_floors == {"CAM_FRONT": 20}
    assert all(min(bucket.kept) >= 20 for bucket in floored.buckets)
    assert floored.sha256 != recipe.sha256
    for old, new in zip(recipe.buckets, floored.buckets, strict=True):
        same = ("name", "budget", "slope", "complexity", "default")
        assert [getattr(new, field) for field in same] == [getattr(old, field) for field in same]
        if min(old.kept) >= 20:
            assert new == old
    assert floored.buckets != recipe.buckets
    assert with_camera_floors(floored, {}) == recipe


def test_floors_beyond_what_a_budget_can_keep_are_refused(recipe: PruningRecipe) -> None:
    most = 30  # 216 tokens enter the first of 8 layers; 54 * 8 = 216 + 7 * 30.9
    wanted = {"CAM_FRONT": most}
    assert min(bucket.kept[-1] for bucket in with_camera_floors(recipe, wanted).buckets) == most
    told = (
        r"budget 0\.25 cannot hold the camera floors CAM_FRONT 30 and CAM_BACK 1: they add up to 31, .* at "
        r"most 30 of 216 .* allowed: floors that add up to 0\.\.30, or budgets from 0\.2506 on"
    )
    with pytest.raises(RecipeError, match=told):
        with_camera_floors(recipe, {**wanted, "CAM_BACK": 1})


def test_floors_are_given_on_the_command_line(recipe: PruningRecipe, tmp_path: Path) -> None:
    write_recipe(recipe, tmp_path / "recipe.json")
    out = tmp_path / "made" / "front12.json"
    command = ["recipe", "floors", str(tmp_path), "--out", str(out), "--camera-floors"]
    done = CliRunner().invoke(app, [*command, "CAM_FRONT=8, CAM_BACK=4"])
    assert done.exit_code == 0, done.output
    assert "b25_s1: visual tokens into stages were 216 → 57 → 36 → 10, now 216 → " in done.output
    assert "floors CAM_FRONT 8, CAM_BACK 4; they add up to 12 of at least 12 visual tokens" in done.output
    assert read_recipe(out) == with_camera_floors(recipe, {"CAM_FRONT": 8, "CAM_BACK": 4})
    shown = CliRunner(env={"COLUMNS": "140"}).invoke(app, ["recipe", "show", str(out)]).output
    assert f"sha256 {read_recipe(out).sha256[:16]}" in shown and "floors CAM_FRONT 8, CAM_BACK 4" in shown
    for wrong, why in (
        (
            "CAM_TOP=1",
            "--camera-floors CAM_TOP=1: camera_floors names CAM_TOP; the prompt has CAM_FRONT_LEFT",
        ),
        ("CAM_BACK=37", "camera_floors.CAM_BACK is 37; allowed: 0..36"),
        ("CAM_BACK=31", "cannot hold the camera floors CAM_BACK 31"),
        ("CAM_BACK=1,CAM_BACK=2", "CAM_BACK is named twice"),
    ):
        out.unlink(missing_ok=True)
        refused = CliRunner().invoke(app, [*command, wrong])
        assert isinstance(refused.exception, VlaError) and why in str(refused.exception)
        assert not out.exists()


def test_reference_form_holds_the_published_counts() -> None:
    recipe = build_recipe(SMALL, layout(), decode_length=12, form="reference", budgets=(0.25,))
    assert recipe.pruning_points == tuple(range(7))
    assert recipe.recovery and recipe.positions == "compact" and recipe.scorer == Scorer(encoder_weight=1.0)
    for bucket in recipe.buckets_of(0.25):
        schedule = reference_schedule(216, 8, 54, bucket.slope)
        assert bucket.visual_tokens_into_layers == schedule.into_layer
        assert (bucket.kept, bucket.merged) == (schedule.kept[:-1], schedule.merged[:-1])
        assert coarsening_error(recipe, bucket) == 0.0
    # k = 0.4 - 0.2 * bits is nearest to 0.2 between 0.5 and 1.5 bits.
    assert [bucket.complexity for bucket in recipe.buckets_of(0.25)] == [(1.5, None), (0.5, 1.5), (None, 0.5)]
    coarse = build_recipe(
        SMALL, layout(), decode_length=12, form="reference", budgets=(0.25,), pruning_points=(0, 2, 4)
    )
    assert all(0 < coarsening_error(coarse, bucket) < 0.1 for bucket in coarse.buckets_of(0.25))
    with pytest.raises(RecipeError, match="caps after layer 0"):
        build_recipe(SMALL, layout(), decode_length=12, form="reference", pruning_points=(1, 4))


def test_coarsening_error_vanishes_where_every_layer_prunes() -> None:
    fine = build_recipe(SMALL, layout(), decode_length=12, pruning_points=range(7))
    assert all(coarsening_error(fine, bucket) == 0.0 for bucket in fine.buckets)


@pytest.mark.parametrize("slopes", [(0.0, 0.2, 0.4), (0.4, 0.2, 0.0)])
def test_a_fitted_mapping_decides_the_buckets(slopes: tuple[float, ...]) -> None:
    mapping = SlopeMapping(edges=(0.5, 1.0), slopes=slopes, fixed_slope=0.4)
    recipe = build_recipe(SMALL, layout(), decode_length=12, budgets=(0.4,), mappings={0.4: mapping})
    taken = [bucket_for(recipe, 0.4, complexity).slope for complexity in (-3.0, 0.4999, 0.5, 0.99, 1.0, 99.0)]
    assert taken == [slopes[0], slopes[0], slopes[1], slopes[1], slopes[2], slopes[2]]
    assert bucket_for(recipe, 0.4).slope == 0.4
    assert bucket_for(recipe, None).name == FULL


def test_an_interval_may_be_empty() -> None:
    mapping = SlopeMapping(edges=(0.5, 0.5), slopes=(0.0, 0.2, 0.4), fixed_slope=0.2)
    recipe = build_recipe(SMALL, layout(), decode_length=12, budgets=(0.4,), mappings={0.4: mapping})
    assert [bucket_for(recipe, 0.4, c).slope for c in (0.4, 0.5, 0.6)] == [0.0, 0.4, 0.4]


@settings(max_examples=40)
@given(
    budget=st.floats(0.14, 0.98),
    slopes=st.lists(st.floats(0.0, 2.0), min_size=1, max_size=4, unique=True),
    recovery=st.booleans(),
    complexity=st.floats(-10, 10),
)
def test_every_complexity_has_exactly_one_bucket(
    budget: float, slopes: list[float], recovery: bool, complexity: float
) -> None:
    recipe = build_recipe(
        SMALL, layout(), decode_length=12, budgets=(budget,), slopes=slopes, recovery=recovery
    )
    bucket = bucket_for(recipe, budget, complexity)
    assert bucket in recipe.buckets_of(budget)
    low, high = bucket.complexity
    assert (low is None or complexity >= low) and (high is None or complexity < high)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": (0.1,)}, r"budget 0\.1 is out of reach: .* it must be in 0\.1291\.\.1"),
        ({"budgets": (1.0,)}, r"budget 1 is out of range; allowed: 0\.\.1"),
        ({"budgets": (-0.2,)}, r"budget -0\.2 is out of range"),
        ({"budgets": (0.4, 0.4)}, r"\[0\.4, 0\.4\] must fall strictly"),
        ({"slopes": ()}, "at least one"),
        ({"slopes": (0.2, 0.2)}, "different values"),
        ({"slopes": (-0.1, 0.2)}, "different values >= 0"),
        ({"pruning_points": (4, 2)}, r"rise strictly within 0\.\.6 for 8 layers"),
        ({"camera_floors": {"CAM_TOP": 1}}, "camera_floors names CAM_TOP; the prompt has CAM_FRONT_LEFT"),
        ({"camera_floors": {"CAM_FRONT": 37}}, r"camera_floors\.CAM_FRONT is 37; allowed: 0\.\.36"),
        ({"form": "reference", "recovery": False}, "the published arithmetic merges"),
        ({"mappings": {0.3: SlopeMapping((), (0.2,), 0.2)}}, r"mappings are given for budgets \[0\.3\]"),
    ],
)
def test_options_out_of_range_are_refused_with_the_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_recipe(SMALL, layout(), decode_length=12, **options)


def test_choosing_names_what_is_on_offer(recipe: PruningRecipe) -> None:
    with pytest.raises(RecipeError, match=r"no budget 0\.3; it offers 0\.6, 0\.4, 0\.25"):
        bucket_for(recipe, 0.3, 1.0)
    with pytest.raises(RecipeError, match="no bucket 'b10_s0'; it has full, b60_s0"):
        recipe.bucket("b10_s0")
    with pytest.raises(ValueError, match="complexity is nan"):
        bucket_for(recipe, 0.4, float("nan"))
    with pytest.raises(RecipeError, match=r"weights aaaaaaaaaaaa…, model\.safetensors has cccccccccccc…"):
        recipe.require_model("c" * 64, "model.safetensors")


def test_stored_recipes_are_readable_and_come_back_equal(recipe: PruningRecipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    write_recipe(recipe, path)
    assert read_recipe(path) == recipe and read_recipe(path).sha256 == recipe.sha256
    text = path.read_text()
    assert '"kept": [57, 36, 10],\n' in text and '["visual", "CAM_FRONT", 36],\n' in text
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.json"]
    other = build_recipe(SMALL, layout(), decode_length=13)
    assert other.sha256 != recipe.sha256


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(contract_version=9, new="field"), "contract version 9, this library reads 1"),
        (lambda r: r.pop("contract_version"), "contract_version: Field required"),
        (lambda r: r["model"].update(heads="four"), "model.heads: .* got 'four'"),
        (lambda r: r["model"].update(kv_heads=3), "4 heads cannot share 3 KV heads"),
        (lambda r: r.pop("layout"), "layout: Field required"),
        (lambda r: r.update(colour="red"), "colour: Extra inputs"),
        (lambda r: r["buckets"].pop(0), "the first must be 'full'"),
        (lambda r: r["buckets"][0].update(kept=[216, 216, 215]), "full: visual_tokens_into_layers must be"),
        (lambda r: r["buckets"][1].update(kept=[118, 119, 117]), r"119 .* after layer 2; allowed: 0\.\.118"),
        (lambda r: r["buckets"][1].update(kept=[118, 117]), "kept has 2 entries, expected 3"),
        (lambda r: r["buckets"][1].update(merged=[1, 0, 0]), "1 tokens merged after layer 0; .* is off"),
        (lambda r: r["buckets"][1].update(kv_tokens_per_layer=[9] * 8), "kv_tokens_per_layer must be"),
        (lambda r: r["buckets"][1].update(work_fraction=0.5), "work_fraction is 0.5, its counts give 0.60"),
        (lambda r: r["buckets"][1].update(budget=0.5), "129.6 visual tokens enter .* budget 0.5 is 108.0"),
        (lambda r: r["buckets"][1].update(complexity=[0.9, None]), "must cover every value once"),
        (lambda r: r["buckets"][1].update(default=True), "default buckets .*'b60_s0', 'b60_s1'"),
        (lambda r: r.update(camera_floors={"CAM_BACK": 11}), "7 .* after layer 4; allowed: 11"),
    ],
)
def test_edited_recipes_are_refused_by_file_and_field(
    recipe: PruningRecipe, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = tmp_path / "recipe.json"
    write_recipe(recipe, path)
    edit(path, change)
    with pytest.raises(RecipeError, match=message) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"buckets": NaN}'])
def test_files_that_are_no_recipe_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(content)
    with pytest.raises(RecipeError, match=re.escape(str(path))):
        read_recipe(path)
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path / "absent.json")


def test_show_and_check_on_the_command_line(recipe: PruningRecipe, tmp_path: Path) -> None:
    write_recipe(recipe, tmp_path / "recipe.json")
    shown = CliRunner(env={"COLUMNS": "140"}).invoke(app, ["recipe", "show", str(tmp_path)])
    assert shown.exit_code == 0
    for bucket in recipe.buckets:
        assert bucket.name in shown.output
    assert "216 → 57 → 36 → 10" in shown.output and "█" in shown.output
    for columns in ("80", "130", "140"):
        fitting = CliRunner(env={"COLUMNS": columns}).invoke(app, ["recipe", "show", str(tmp_path)]).output
        below_the_path = fitting.splitlines()[1:]
        assert max(map(len, below_the_path)) <= int(columns)
        names = ("full ", "b60_", "b40_", "b25_")
        rows = [line for line in below_the_path if line.lstrip().startswith(names)]
        tables = 1 if columns == "140" else 2
        assert len(rows) == len(recipe.buckets) * tables
        for bucket in recipe.buckets:
            name = f"{bucket.name} *" if bucket.default else bucket.name
            assert sum(row.lstrip().startswith(f"{name} ") for row in rows) == tables
        assert "…" not in "".join(row for row in rows if "→" in row and " … " not in row)
    checked = CliRunner().invoke(app, ["recipe", "check", str(tmp_path / "recipe.json")])
    assert checked.exit_code == 0 and "10 buckets" in checked.output
    edit(tmp_path / "recipe.json", lambda r: r.update(contract_version=9))
    assert isinstance(CliRunner().invoke(app, ["recipe", "check", str(tmp_path)]).exception, RecipeError)


def test_curves_can_be_drawn(recipe: PruningRecipe, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_recipe(recipe, tmp_path / "recipe.json")
    runner = CliRunner()
    png = tmp_path / "curves.png"
    assert runner.invoke(app, ["recipe", "show", str(tmp_path), "--png", str(png)]).exit_code == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["curves.png", "recipe.json"]
    for bad, why in ((tmp_path / "a.jpg", "must end in .png"), (png / "a.png", "curves.png is a file")):
        refused = runner.invoke(app, ["recipe", "show", str(tmp_path), "--png", str(bad)])
        assert why in str(refused.exception)
        assert refused.output == ""


def test_the_published_counter_gives_the_published_work_of_llava() -> None:
    """23.2 % at "64 of 576" for LLaVA-1.5-7B with 71 text tokens around the image; 82 are computed."""
    llava = ModelShape(
        id="llava-1.5-7b", weights_sha256="0" * 64, layers=32, hidden=4096, heads=32, kv_heads=32, ffn=11008
    )
    segments = (("text", 35), ("visual", "CAM_FRONT", 576), ("text", 36))
    recipe = build_recipe(
        llava,
        PromptLayout(segments=segments, image_size=(336, 336)),
        decode_length=12,
        form="reference",
        budgets=(64 / 576,),
        slopes=(0.4,),
    )
    bucket = recipe.buckets[1]
    assert published_work_fraction(recipe, bucket) == pytest.approx(0.232, abs=5e-4)
    assert np.mean(bucket.visual_tokens_into_layers) == pytest.approx(81.94, abs=0.01)
    assert bucket.work_fraction == pytest.approx(0.2344, abs=5e-4)  # causal
