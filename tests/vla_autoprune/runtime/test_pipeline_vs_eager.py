"""The staged runtime against transformers' generate and against the eager pruned model."""

from __future__ import annotations

import numpy as np
import pytest

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def pipelines(tiny_bundles):
    pytest.importorskip("onnxruntime")
    from engines.onnxruntime import OnnxRuntimeBackend
    from vla_autoprune.runtime.pipeline import Pipeline

    return {
        name: Pipeline(bundle, OnnxRuntimeBackend(bundle, threads=1)) for name, bundle in tiny_bundles.items()
    }


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(6, 3, 64, 64)).astype(np.float32)


def prompt_ids(vla, valid: int | None = None) -> np.ndarray:
    from vla_autoprune.frame import Command, EgoState

    ids = vla.prompt.build(EgoState(6.0, 0.4, 0.02), Command.LEFT)
    if valid is not None:
        ids = ids.copy()
        ids[valid:] = np.random.default_rng(0).integers(10, 200, -valid)
    return ids


def run_staged(pipeline, bucket, ids, length, pixels, ranking=None):
    from vla_autoprune.runtime.pipeline import Timings

    timings = Timings()
    pipeline.pixels[:] = pixels
    pipeline.encode(timings)
    prefill = pipeline.prefill(ids, length, lambda _: bucket, timings, ranking)
    logits = [prefill.logits.copy()]
    while len(logits) < pipeline.recipe.decode_length:
        logits.append(pipeline.decode(int(logits[-1].argmax()), timings)[:].copy())
    return prefill, np.stack(logits), timings


def test_unpruned_stages_generate_what_transformers_generates(tiny_vla, pipelines, pixels):
    import torch

    pipeline = pipelines["plain"]
    ids = prompt_ids(tiny_vla)
    _, logits, _ = run_staged(pipeline, pipeline.recipe.bucket("full"), ids, len(ids), pixels)
    with torch.no_grad():
        answer = tiny_vla.model.generate(
            input_ids=torch.from_numpy(ids)[None],
            pixel_values=torch.from_numpy(pixels),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    expected = torch.cat(answer.logits).numpy()
    assert np.array_equal(logits.argmax(axis=1), answer.sequences[0, len(ids) :].numpy())
    assert np.abs(logits - expected).max() < TOLERANCE


@pytest.mark.parametrize("name", ["plain", "rich"])
@pytest.mark.parametrize("valid", [None, -3], ids=["whole", "padded"])
def test_pruned_stages_match_the_eager_pruned_model(tiny_vla, tiny_recipes, pipelines, pixels, name, valid):
    from vla_autoprune.export.eager import encode_eager, run_eager
    from vla_autoprune.models.adapter import LlavaAdapter

    recipe, pipeline = tiny_recipes[name], pipelines[name]
    model = LlavaAdapter(tiny_vla.model)
    ids = prompt_ids(tiny_vla, valid)
    length = len(ids) + (valid or 0)
    features, encoder, _ = encode_eager(model, recipe, pixels)
    for bucket in recipe.buckets:
        prefill, logits, _ = run_staged(pipeline, bucket, ids, length, pixels)
        eager = run_eager(model, recipe, bucket, ids, length, features, encoder)
        for staged, expected in zip(prefill.kept_visual, eager.kept_visual, strict=True):
            assert np.array_equal(staged, expected), bucket.name
        assert abs(prefill.complexity - eager.complexity) < TOLERANCE
        assert np.array_equal(logits.argmax(axis=1), eager.tokens)
        assert np.abs(logits - eager.logits).max() < TOLERANCE
