from __future__ import annotations

import pytest
from typer.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("nuscenes")

from vla_autoprune.cli import app
from vla_autoprune.errors import InputError


@pytest.fixture(scope="module")
def model(tiny_vla, tmp_path_factory):
    from vla_autoprune.models.driving_vla import save_model

    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(tiny_vla, folder)
    return folder


@pytest.mark.parametrize(
    "options,message",
    [
        (["--budgets", "0.6,nan"], "--budgets is '0.6,nan'; expected numbers"),
        (["--slopes", "flat"], "--slopes is 'flat'; expected numbers"),
        (["--points", "1.5"], "--points is '1.5'; expected layer numbers"),
        (["--encoder-weight", "inf"], "--encoder-weight is inf"),
        (["--reduction", "sum"], "--reduction is 'sum'; allowed: mean, max"),
        ([], "data root .* does not exist"),
    ],
)
def test_options_out_of_range_are_refused_before_any_work(model, tmp_path, options, message):
    out = tmp_path / "recipe.json"
    command = ["calibrate", "--data", str(tmp_path / "absent"), "--model", str(model), "--out", str(out)]
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(app, [*command, *options], catch_exceptions=False)
    assert list(tmp_path.iterdir()) == []
