from __future__ import annotations

import shutil

import pytest
from typer.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from vla_autoprune.cli import app
from vla_autoprune.cli.export import Opset
from vla_autoprune.errors import InputError, RecipeError


@pytest.mark.slow
def test_an_export_is_checked_and_then_reused(model, tmp_path):
    from vla_autoprune.bundle import load_bundle
    from vla_autoprune.models.adapter import LlavaAdapter
    from vla_autoprune.models.driving_vla import load_model
    from vla_autoprune.recipe import write_recipe
    from vla_autoprune.recipe_building import build_recipe

    vla = load_model(model)
    shape = LlavaAdapter(vla.model).shape("tiny")
    recipe = build_recipe(
        shape, vla.prompt.layout, decode_length=12, budgets=(0.6,), slopes=(0.2,), pruning_points=(1,)
    )
    write_recipe(recipe, tmp_path / "recipe.json")
    command = [
        "export",
        str(tmp_path / "bundle"),
        "--model",
        str(model),
        "--recipe",
        str(tmp_path / "recipe.json"),
    ]
    first = CliRunner().invoke(app, command, catch_exceptions=False)
    assert "parity: 4 comparisons, 0 ties" in first.output
    assert "rtx no findings" in first.output and "jetpack6 no findings" not in first.output
    bundle = load_bundle(tmp_path / "bundle")
    assert "lint.json" in [entry.path for entry in bundle.manifest.files]
    assert [entry.path for entry in bundle.manifest.files if entry.role == "sample"] == [
        "samples/sample_00.npz",
        "samples/sample_01.npz",
    ]
    again = CliRunner().invoke(app, command, catch_exceptions=False)
    assert "is already the bundle" in again.output


def test_a_place_that_holds_something_else_is_refused_before_any_work(model, tmp_path, capsys):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(InputError, match="exists and is not a bundle; name another directory"):
        CliRunner().invoke(app, ["export", str(tmp_path), "--model", str(model)], catch_exceptions=False)
    assert capsys.readouterr().err == ""  # no bar either
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_the_opsets_are_those_of_the_exporter():
    from vla_autoprune.export.export import OPSETS

    assert {int(opset.value) for opset in Opset} == set(OPSETS)
    refused = CliRunner().invoke(app, ["export", "bundle", "--opset", "20"])
    assert refused.exit_code == 2 and "--opset" in refused.output


@pytest.mark.parametrize("there_already", [False, True])
def test_a_recipe_of_another_model_is_refused(model, stored_bundle, tmp_path, there_already):
    out = tmp_path / "bundle"
    if there_already:
        shutil.copytree(stored_bundle.path, out)
    recipe = stored_bundle.path / "recipe.json"
    command = ["export", str(out), "--model", str(model), "--recipe", str(recipe)]
    with pytest.raises(RecipeError, match="recipe is for model tiny"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    assert list(tmp_path.iterdir()) == ([out] if there_already else [])
