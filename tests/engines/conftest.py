"""Bundles with recorded samples, as an export leaves them."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture(scope="session")
def sampled_bundles(tiny_bundles, tiny_vla, tmp_path_factory):
    """`tiny_bundles` with one sample each: an input and what the original model made of it."""
    pytest.importorskip("onnxruntime")
    from engines.onnxruntime import OnnxRuntimeBackend
    from engines.parity import check_parity, parity_inputs
    from vla_autoprune.bundle import SAMPLES, load_bundle, write_manifest
    from vla_autoprune.frame import Command, EgoState
    from vla_autoprune.models.adapter import LlavaAdapter

    folder = tmp_path_factory.mktemp("sampled")
    sampled = {}
    for name, bundle in tiny_bundles.items():
        path = shutil.copytree(bundle.path, folder / name)
        prompts = [tiny_vla.prompt.build(EgoState(8.0), Command.STRAIGHT)]
        inputs = parity_inputs(bundle, prompts, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        backend = OnnxRuntimeBackend(bundle, threads=1)
        model = LlavaAdapter(tiny_vla.model)
        check_parity(bundle, backend, model, inputs, record=path / SAMPLES)
        write_manifest(path, bundle.recipe, list(bundle.graphs.values()), bundle.manifest.options)
        sampled[name] = load_bundle(path)
    return sampled
