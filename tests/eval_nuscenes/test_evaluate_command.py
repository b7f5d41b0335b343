"""`vla-autoprune evaluate` from the command line, with a pretended bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from vla_autoprune.cli import app
from vla_autoprune.errors import InputError, RecipeError
from vla_autoprune.frame import CAMERAS
from vla_autoprune.recipe import ModelShape, PromptLayout, PruningRecipe, bucket_for, build_recipe


@pytest.fixture
def recipe() -> PruningRecipe:
    spans: list = [("text", 1)]
    for camera in CAMERAS:
        spans += [("text", 1), ("visual", camera, 36)]
    shape = ModelShape(id="tiny", weights_sha256="0" * 64, layers=8, hidden=128, heads=4, kv_heads=2, ffn=352)
    layout = PromptLayout(segments=(*spans, ("text", 6)), image_size=(96, 96))
    return build_recipe(shape, layout, decode_length=12, budgets=(0.6, 0.25))


@pytest.fixture
def planned(
    recipe: PruningRecipe, make_drive: Callable, pretend_planner: type, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Put a pretended bundle and drive behind the command; holds the frames planned so far."""
    drive = make_drive(scenes=2, keyframes=8)
    frames: list[str] = []

    class Planner:
        def __init__(self, *_: object, budget: float | None = None, policy: str = "autoprune") -> None:
            self.budget, self.policy = budget, policy

        def variant(self, budget: float | None, policy: str) -> Planner:
            return Planner(budget=budget, policy=policy)

        def plan(self, frame: object) -> object:
            plan = pretend_planner(self.budget, self.policy).plan(frame)
            bucket = bucket_for(recipe, self.budget, plan.complexity)
            into = bucket.visual_tokens_into_layers
            kept = tuple(np.arange(into[layers[0]]) for layers in recipe.stages)
            frames.append(plan.bucket)
            return type(plan)(
                **{
                    **vars(plan),
                    "bucket": bucket.name,
                    "visual_tokens_into_layers": into,
                    "kept_visual": kept,
                }
            )

    def split(root: Path, version: str, name: str, source: str, limit: int | None) -> object:
        return type(drive)(drive.samples[: limit or len(drive)])

    manifest = SimpleNamespace(bundle_id="b" * 64)
    monkeypatch.setattr(
        "vla_autoprune.bundle.load_bundle", lambda path: SimpleNamespace(recipe=recipe, manifest=manifest)
    )
    monkeypatch.setattr(
        "engines.onnxruntime.OnnxRuntimeBackend",
        lambda bundle, threads: SimpleNamespace(device="pretended", close=lambda: None),
    )
    monkeypatch.setattr("vla_autoprune.runtime.planner.Planner", Planner)
    monkeypatch.setattr("eval_nuscenes.nuscenes_reader.NuScenesSplit", split)
    return frames


def run(*options: str) -> object:
    return CliRunner().invoke(app, ["evaluate", "bundle", "--data", "data", *options])


def test_a_run_writes_table_numbers_and_report(planned: list[str], tmp_path: Path) -> None:
    result = run("--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    for row in (
        "full",
        "autoprune 60%",
        "random 25%",
        "images blanked",
        "constant velocity",
        "uniad",
        "stp3",
        "vad",
    ):
        assert row in result.output
    numbers = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [variant["name"] for variant in numbers["variants"]][:2] == ["full", "autoprune 60%"]
    assert numbers["conditions"]["samples"] == 16
    assert (tmp_path / "out" / "report.html").stat().st_size > 50_000
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_second_run_plans_nothing_anew_and_says_the_same(planned: list[str], tmp_path: Path) -> None:
    run("--out", str(tmp_path), "--limit", "5")
    first = json.loads((tmp_path / "results.json").read_text())
    before = len(planned)
    result = run("--out", str(tmp_path), "--limit", "5")
    assert "5 of 5 samples are done already" in result.output
    assert len(planned) - before <= 2  # the two frames whose tokens are painted
    second = json.loads((tmp_path / "results.json").read_text())
    assert second["variants"] == first["variants"]
    run("--out", str(tmp_path))
    assert json.loads((tmp_path / "results.json").read_text())["conditions"]["samples"] == 16


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("--budgets", "0.33"), RecipeError, "recipe has no budget 0.33; it offers 0.6, 0.25"),
        (("--budgets", "half"), InputError, "--budgets is 'half'; expected fractions"),
        (("--command-source", "gps"), InputError, "allowed: route, future"),
    ],
)
def test_wrong_options_leave_nothing_behind(
    planned: list[str], tmp_path: Path, options: tuple[str, ...], error: type, message: str
) -> None:
    result = run("--out", str(tmp_path / "out"), *options)
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()
    assert not planned


def test_an_output_that_is_a_file_is_refused(planned: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    result = run("--out", str(tmp_path / "out"))
    assert isinstance(result.exception, InputError) and "is a file; give a directory" in str(result.exception)
    assert (tmp_path / "out").read_text() == "mine"
