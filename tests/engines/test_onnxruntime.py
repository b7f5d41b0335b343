from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from engines import onnxruntime
from engines.onnxruntime import OnnxRuntimeBackend
from vla_autoprune.errors import BackendError, BundleError


@pytest.fixture(scope="module")
def backend(stored_bundle):
    return OnnxRuntimeBackend(stored_bundle, threads=1)


def buffers(backend, graph: str, variant: str) -> dict[str, np.ndarray]:
    shapes = backend.graphs[graph].shapes(variant)
    return {
        tensor.name: backend.view(
            backend.allocate(int(np.prod(shapes[tensor.name])), tensor.dtype), shapes[tensor.name]
        )
        for tensor in backend.graphs[graph].tensors
    }


def test_bound_memory_receives_the_outputs(backend):
    tensors = buffers(backend, "head", "only")
    run = backend.bind("head", "only", tensors)
    tensors["hidden"][:] = np.random.default_rng(0).normal(size=tensors["hidden"].shape)
    run()
    first = tensors["logits"].copy()
    assert np.abs(first).max() > 0
    tensors["hidden"][:] *= -1
    run()
    assert np.allclose(tensors["logits"], -first, atol=1e-5)


def test_a_shape_the_recipe_does_not_pin_is_refused(backend):
    tensors = buffers(backend, "stage_01", "b40_s0/prefill")
    tensors["hidden"] = tensors["hidden"][:, :-1]
    with pytest.raises(
        BackendError, match=r"stage_01 \(b40_s0/prefill\): hidden got float32.*the recipe pins float32"
    ):
        backend.bind("stage_01", "b40_s0/prefill", tensors)
    del tensors["hidden"]
    with pytest.raises(BackendError, match="hidden got nothing"):
        backend.bind("stage_01", "b40_s0/prefill", tensors)
    with pytest.raises(BundleError, match="has no variant"):
        backend.bind("stage_01", "b41_s0/prefill", tensors)


def test_rows_move_between_buffers(backend):
    source, target = np.arange(24.0).reshape(1, 2, 3, 4), np.zeros((1, 2, 5, 4))
    backend.move_rows(source, 1, target, 3, 2)
    assert np.array_equal(target[:, :, 3:], source[:, :, 1:]) and not target[:, :, :3].any()


def test_less_memory_gives_the_same_numbers(stored_bundle, backend):
    frugal = OnnxRuntimeBackend(stored_bundle, threads=1, low_memory=True)
    results = []
    for engine in (backend, frugal):
        tensors = buffers(engine, "stage_01", "b40_s0/prefill")
        tensors["visual_rows"][:] = np.arange(len(tensors["visual_rows"]))
        tensors["text_weight"][:] = 1
        tensors["hidden"][:] = np.random.default_rng(0).normal(size=tensors["hidden"].shape)
        engine.bind("stage_01", "b40_s0/prefill", tensors)()
        results.append(tensors["hidden_out"].copy())
    assert np.abs(results[0] - results[1]).max() < 1e-5


def test_the_folder_of_engines_is_there_before_onnxruntime_makes_one_in_it(
    stored_bundle, tmp_path, monkeypatch
):
    names = [f"{name}ExecutionProvider" for name in ("Tensorrt", "CUDA", "CPU")]
    monkeypatch.setattr(onnxruntime.onnxruntime, "get_available_providers", lambda: names)
    (asked, options), *_ = onnxruntime._providers(
        "tensorrt", dataclasses.replace(stored_bundle, path=tmp_path)
    )
    assert asked == names[0] and Path(options["trt_engine_cache_path"]).parent.is_dir()
