"""`vla-autoprune evaluate` from the command line: a stored bundle on a small data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

pytest.importorskip("nuscenes")
pytest.importorskip("matplotlib")

from eval_nuscenes.nuscenes_writer import dataset_options, write_dataset
from eval_nuscenes.summary import STEPS_OF_A_PLAN
from vla_autoprune.bundle import Bundle
from vla_autoprune.cli import app
from vla_autoprune.errors import InputError, RecipeError


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two drives of nine keyframes, small images."""
    root = tmp_path_factory.mktemp("data") / "synth"
    options = dataset_options(scenes=2, duration_s=4.0, width=96, height=54, kinds=("free", "lead"))
    return write_dataset(root, options, workers=1).root


def evaluate(bundle: Bundle, world: Path, out: Path, *options: str) -> Result:
    where = (str(bundle.path), "--data", str(world), "--split", "all", "--out", str(out))
    return CliRunner().invoke(app, ["evaluate", *where, "--threads", "1", "--warm-up", "1", *options])


def numbers(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def test_a_run_writes_table_numbers_and_report(stored_bundle: Bundle, world: Path, tmp_path: Path) -> None:
    result = evaluate(stored_bundle, world, tmp_path / "out")
    assert result.exit_code == 0, result.output
    for word in ("autoprune 60%", "random 40%", "images blanked", "constant velocity", "uniad", "vad"):
        assert word in result.output
    found = numbers(tmp_path / "out")
    assert [variant["name"] for variant in found["variants"]][:2] == ["full", "autoprune 60%"]
    assert found["conditions"]["samples"] == 18
    assert (tmp_path / "out" / "report.html").stat().st_size > 50_000
    assert not list((tmp_path / "out").glob("*.tmp"))

    (log,) = (tmp_path / "out").glob("plans-*.jsonl")
    samples = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    planned = [variant for variant in found["variants"] if variant["cost"] is not None]
    assert len(planned) == 6
    for variant in planned:
        plans = [sample["plans"][variant["name"]] for sample in samples]
        assert [plan["error"] for plan in plans] == [None] * 18
        split = variant["cost"]["split_ms"]
        assert tuple(split) == STEPS_OF_A_PLAN and min(split.values()) > 0
        total = np.mean([plan["timings_ms"]["total"] for plan in plans])
        assert sum(split.values()) == pytest.approx(total, abs=1e-3)
    tokens = {variant["name"]: variant["cost"]["visual_tokens_into_layers"] for variant in planned}
    assert tokens["full"] == tokens["images blanked"] == 96
    assert tokens["autoprune 40%"] == pytest.approx(0.4 * 96, abs=0.5)


def test_a_second_run_plans_nothing_again_and_says_the_same(
    stored_bundle: Bundle, world: Path, tmp_path: Path
) -> None:
    evaluate(stored_bundle, world, tmp_path, "--limit", "5")
    first = numbers(tmp_path)
    (log,) = tmp_path.glob("plans-*.jsonl")
    plans = log.read_text()
    result = evaluate(stored_bundle, world, tmp_path, "--limit", "5")
    assert "5 of 5 samples are done already" in result.output
    assert log.read_text() == plans
    assert numbers(tmp_path)["variants"] == first["variants"]
    evaluate(stored_bundle, world, tmp_path, "--limit", "7")
    assert numbers(tmp_path)["conditions"]["samples"] == 7
    assert log.read_text().startswith(plans)


def test_other_policies_can_be_compared(stored_bundle: Bundle, world: Path, tmp_path: Path) -> None:
    result = evaluate(
        stored_bundle, world, tmp_path, "--policies", "uniform,fixed", "--budgets", "0.4", "--limit", "4"
    )
    assert result.exit_code == 0, result.output
    names = [variant["name"] for variant in numbers(tmp_path)["variants"]]
    assert names == ["full", "uniform 40%", "fixed 40%", "images blanked", "constant velocity"]
    fixed = numbers(tmp_path)["variants"][2]
    (default,) = (bucket.name for bucket in stored_bundle.recipe.buckets_of(0.4) if bucket.default)
    assert fixed["buckets"] == {default: 4}
    assert "evenly spread tokens" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("--budgets", "0.33"), RecipeError, "recipe has no budget 0.33; it offers 0.6, 0.4"),
        (("--budgets", "half"), InputError, "--budgets is 'half'; expected values"),
        (("--policies", "autoprune,best"), InputError, "--policies is 'autoprune,best'; expected values"),
        (("--budgets", ","), InputError, "--budgets is ','; expected values"),
    ],
)
def test_wrong_options_leave_nothing_behind(
    stored_bundle: Bundle, world: Path, tmp_path: Path, options: tuple[str, ...], error: type, message: str
) -> None:
    result = evaluate(stored_bundle, world, tmp_path / "out", *options)
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused(stored_bundle: Bundle, world: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    result = evaluate(stored_bundle, world, tmp_path / "out")
    assert isinstance(result.exception, InputError) and "out is a file; give a dir" in str(result.exception)
    assert (tmp_path / "out").read_text() == "mine"
