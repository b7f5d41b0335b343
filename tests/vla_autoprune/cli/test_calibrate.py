from __future__ import annotations

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("nuscenes")

from vla_autoprune.cli import app
from vla_autoprune.cli.calibrate import chosen_mapping
from vla_autoprune.errors import InputError
from vla_autoprune.pruning.calibration import SlopeMapping, fit_mapping
from vla_autoprune.recipe import bucket_for, read_recipe
from vla_autoprune.recipe_building import build_recipe


@pytest.mark.parametrize(
    "options,message",
    [
        (["--budgets", "0.6,nan"], "--budgets is '0.6,nan'; expected numbers between 0 and 1"),
        (["--budgets", "0.6,1.2"], "--budgets is '0.6,1.2'; expected numbers between 0 and 1"),
        (["--budgets", "0.1,0.2"], "budget 0.1 is out of reach.*; --budgets: budget 0.2 is out of"),
        (["--slopes", "flat"], "--slopes is 'flat'; expected numbers from 0 on"),
        (["--slopes=-1,0"], "--slopes is '-1,0'; expected different numbers from 0 on"),
        (["--points", "1.5"], "--points is '1.5'; expected layers"),
        (["--points", "1,9"], r"--points: pruning points \[1, 9\] must rise strictly within 0..2"),
        (["--points", "x", "--budgets", "2"], "--budgets is '2'.*; --points is 'x'"),
        (["--budgets", "0.6,0.4"], "data root .* does not exist"),
    ],
)
def test_options_out_of_range_are_refused_before_any_work(model, tmp_path, options, message):
    out = tmp_path / "recipe.json"
    command = ["calibrate", "--data", str(tmp_path / "absent"), "--model", str(model), "--out", str(out)]
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(app, [*command, *options], catch_exceptions=False)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def drives(tmp_path_factory):
    """Ten very short drives, all in the calibration split."""
    pytest.importorskip("shapely")
    from eval_nuscenes.nuscenes_writer import dataset_options, write_dataset

    options = dataset_options(
        scenes=10, duration_s=4.0, width=96, height=54, val_fraction=0.0, calibration_fraction=1.0
    )
    return write_dataset(tmp_path_factory.mktemp("data") / "drives", options, workers=1).root


@pytest.mark.slow
def test_a_recipe_is_calibrated_and_says_what_was_measured(model, drives, tmp_path):
    out = tmp_path / "new" / "recipe.json"
    command = ["calibrate", "--data", str(drives), "--model", str(model), "--out", str(out)]
    command += ["--budgets", "0.6", "--slopes", "0,0.4", "--points", "1", "--limit", "20", "--threads", "1"]
    run = CliRunner(env={"COLUMNS": "130"}).invoke(
        app, [*command, "--reduction", "max", "--keep-mapping"], catch_exceptions=False
    )
    assert run.exit_code == 0
    used, left_out = map(int, re.findall(r"(\d+) frames of 10 scenes \((\d+) left out\)", run.output)[0])
    assert used + left_out == 20 and left_out < 5  # the last keyframes of a drive have no future
    assert "60%, at equal mean work:" in run.output
    recipe = read_recipe(out)
    assert (recipe.model.id, recipe.budgets, recipe.pruning_points) == ("tiny", (0.6,), (1,))
    assert recipe.scorer.reduction == "max"
    record = json.loads((tmp_path / "new" / "recipe.calibration.json").read_text())
    assert len(record["frames"]) == used and len({frame["scene"] for frame in record["frames"]}) == 10
    fitted = record["fits"]["0.6"]["mapping"]
    assert record["in_recipe"]["0.6"] == fitted
    assert {bucket.slope for bucket in recipe.buckets_of(0.6)} == set(fitted["slopes"])
    for frame in record["frames"]:
        assert len(frame["losses"]["0.6"]) == 2 and frame["complexity_bits"] > 0
        taken = bucket_for(recipe, 0.6, frame["complexity_bits"]).slope
        assert taken == fitted["slopes"][np.searchsorted(fitted["edges"], frame["complexity_bits"], "right")]
    assert sorted(path.name for path in out.parent.iterdir()) == ["recipe.calibration.json", "recipe.json"]


@pytest.mark.parametrize("helps", [True, False])
def test_a_budget_gets_the_fitted_mapping_only_where_it_helps(stored_bundle, helps):
    generator = np.random.default_rng(0)
    complexities, slopes = generator.uniform(size=200), (0.0, 0.2, 0.4)
    losses = np.abs(complexities[:, None] - [0.1, 0.5, 0.9]) if helps else generator.uniform(size=(200, 3))
    fit = fit_mapping(complexities, losses, slopes, (0.5, 0.5, 0.5))
    assert fit.helps == helps
    assert chosen_mapping(fit, keep=True) == fit.mapping
    fixed = fit.mapping.fixed_slope
    mapping = chosen_mapping(fit)
    assert mapping == (fit.mapping if helps else SlopeMapping((), (fixed,), fixed))
    stored = stored_bundle.recipe
    recipe = build_recipe(
        stored.model, stored.layout, decode_length=12, budgets=(0.5,), mappings={0.5: mapping}
    )
    taken = {bucket_for(recipe, 0.5, bits).slope for bits in (0.0, 0.5, 1.0)}
    assert taken == (set(slopes) if helps else {fixed})
    assert bucket_for(recipe, 0.5).slope == fixed


def test_camera_floors_are_read_and_refused_by_name():
    from vla_autoprune.cli.options import camera_floors

    assert camera_floors("CAM_FRONT=24, CAM_BACK=6") == {"CAM_FRONT": 24, "CAM_BACK": 6}
    for text in ("CAM_FRONT", "CAM_FRONT=many", "CAM_FRONT=1=2"):
        with pytest.raises(InputError, match=r"--camera-floors is .*; expected CAMERA=N separated by commas"):
            camera_floors(text)
