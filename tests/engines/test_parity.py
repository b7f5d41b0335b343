from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

from engines.onnxruntime import OnnxRuntimeBackend
from engines.parity import check_parity, parity_inputs
from vla_autoprune.errors import ParityError
from vla_autoprune.export.eager import run_eager
from vla_autoprune.frame import Command, EgoState
from vla_autoprune.models.adapter import LlavaAdapter


@pytest.fixture(scope="module")
def inputs(tiny_bundles, tiny_vla):
    prompts = [tiny_vla.prompt.build(EgoState(8.0), Command.STRAIGHT)]
    return parity_inputs(tiny_bundles["plain"], prompts, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.mark.parametrize("name", ["plain", "rich"])
def test_an_export_passes_and_leaves_samples(tiny_bundles, tiny_vla, inputs, tmp_path, name):
    bundle = tiny_bundles[name]
    report = check_parity(
        bundle,
        OnnxRuntimeBackend(bundle, threads=1),
        LlavaAdapter(tiny_vla.model),
        inputs,
        record=tmp_path / "samples",
    )
    assert report.comparisons == len(bundle.recipe.buckets) and report.ties == 0
    assert max(*report.stage_error, report.logit_error, report.generate_error) < 1e-4
    with np.load(tmp_path / "samples" / "sample_00.npz", allow_pickle=False) as sample:
        assert sample["full/tokens"].shape == (12,)


def test_other_weights_are_noticed_at_the_stage_that_has_them(tiny_bundles, tiny_vla, inputs):
    bundle = tiny_bundles["plain"]
    weight = tiny_vla.model.model.language_model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight[0] += 0.05
    try:
        with pytest.raises(ParityError, match=r"stage_01 \(bucket full, input 0\): hidden states differ"):
            check_parity(bundle, OnnxRuntimeBackend(bundle, threads=1), LlavaAdapter(tiny_vla.model), inputs)
    finally:
        with torch.no_grad():
            weight[0] -= 0.05


def test_another_complexity_is_noticed(tiny_bundles, tiny_vla, inputs, monkeypatch):
    bundle = tiny_bundles["plain"]

    def off(*given, **options):
        run = run_eager(*given, **options)
        return dataclasses.replace(run, complexity=run.complexity + 1e-3)

    monkeypatch.setattr("engines.parity.run_eager", off)
    with pytest.raises(ParityError, match=r"complexity \(bucket full, input 0\) is"):
        check_parity(bundle, OnnxRuntimeBackend(bundle, threads=1), LlavaAdapter(tiny_vla.model), inputs)


def test_hidden_states_of_another_shape_are_noticed(tiny_bundles, tiny_vla, inputs, monkeypatch):
    bundle = tiny_bundles["plain"]

    def shorter(*given, **options):
        run = run_eager(*given, **options)
        return dataclasses.replace(run, hidden=(run.hidden[0], run.hidden[1][1:], run.hidden[2]))

    monkeypatch.setattr("engines.parity.run_eager", shorter)
    with pytest.raises(ParityError, match=r"stage_01 \(bucket full, input 0\): hidden states differ by inf"):
        check_parity(bundle, OnnxRuntimeBackend(bundle, threads=1), LlavaAdapter(tiny_vla.model), inputs)


def test_an_answer_that_may_not_end_is_followed(tiny_bundles, tiny_vla, inputs, monkeypatch):
    """`generate` takes the second best word where the end token is the likeliest; so must the comparison."""
    bundle, model = tiny_bundles["plain"], LlavaAdapter(tiny_vla.model)
    given = inputs[0]
    images = torch.from_numpy(given.pixel_values)
    free, _ = model.generate(given.token_ids, images, 12)
    monkeypatch.setattr(tiny_vla.model.generation_config, "eos_token_id", int(free[0]))
    held, logits = model.generate(given.token_ids, images, 12)
    assert held[0] != free[0] and logits[0].argmax() == free[0]
    report = check_parity(bundle, OnnxRuntimeBackend(bundle, threads=1), model, inputs)
    assert 0 < report.generate_error < 1e-4
