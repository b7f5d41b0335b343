"""The torch backend against ONNX Runtime: every stage in every variant, then whole plans."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from engines.lint import lint_bundle
from engines.onnxruntime import OnnxRuntimeBackend
from engines.torch_graphs import TorchBackend
from vla_autoprune.errors import BackendError, BundleError
from vla_autoprune.frame import CAMERAS, Command, EgoState, Frame
from vla_autoprune.runtime.planner import Planner

TOLERANCE = 1e-4
"""Of a tensor's largest value; both sides are float32."""


def random_inputs(graph, variant: str) -> dict[str, np.ndarray]:
    """Values a graph can meet: rows that exist and differ, weights and scores that are positive."""
    generator, shapes = np.random.default_rng(5), graph.shapes(variant)
    values = {}
    for tensor in graph.inputs:
        shape = shapes[tensor.name]
        rows = shapes.get("hidden", (1, 1))[1]
        if tensor.name == "past_length":
            value = np.array([shapes["past_k_" + min(n[7:] for n in shapes if n[:7] == "past_k_")][2] - 1])
        elif tensor.name == "visual_rows":
            value = np.arange(shape[0])
        elif tensor.name in ("text_rows", "other_rows"):  # text comes last and sees all
            value = np.arange(rows - shape[0], rows)
        elif tensor.name in ("camera", "floors"):
            value = generator.integers(0, 3, shape)
        elif tensor.name.endswith(("score", "weight")):
            value = generator.uniform(0.1, 1, shape)
        else:
            value = generator.normal(size=shape)
        values[tensor.name] = value.astype(tensor.dtype)
    return values


def outputs(backend, graph: str, variant: str, values) -> dict[str, np.ndarray]:
    contract = backend.graphs[graph]
    shapes = contract.shapes(variant)
    buffers = {
        tensor.name: backend.view(
            backend.allocate(int(np.prod(shapes[tensor.name])), tensor.dtype), shapes[tensor.name]
        )
        for tensor in contract.tensors
    }
    run = backend.bind(graph, variant, buffers)
    for _ in range(2):  # a module keeps nothing from run to run
        for name, value in values.items():
            backend.write(buffers[name], value)
        run()
    for tensor in contract.outputs:
        backend.fetch(buffers[tensor.name])
    return {tensor.name: backend.read(buffers[tensor.name]).copy() for tensor in contract.outputs}


def compare_all(bundle) -> None:
    reference, backend = OnnxRuntimeBackend(bundle, threads=1), TorchBackend(bundle, threads=1)
    for graph in bundle.graphs.values():
        for variant in graph.variants:
            values = random_inputs(graph, variant)
            wanted = outputs(reference, graph.name, variant, values)
            found = outputs(backend, graph.name, variant, values)
            for name, value in wanted.items():
                assert found[name].dtype == value.dtype and np.isfinite(value).all()
                error = np.abs(found[name] - value).max() / max(np.abs(value).max(), 1e-6)
                assert error <= TOLERANCE, (graph.name, variant, name)


def test_every_stage_agrees_with_onnx_runtime(stored_bundle):
    compare_all(stored_bundle)


def test_merging_fusing_and_floors_agree_too_when_decomposed(tiny_bundles):
    compare_all(tiny_bundles["rich"])


def test_plans_are_the_same(stored_bundle):
    generator = np.random.default_rng(7)
    images = {name: generator.integers(0, 255, (90, 160, 3), dtype=np.uint8) for name in CAMERAS}
    frame = Frame(images, EgoState(7.0, -0.4, 0.02), Command.STRAIGHT, token="frame-7")
    plans = [
        Planner(stored_bundle, backend(stored_bundle, threads=1), budget=0.4).plan(frame)
        for backend in (OnnxRuntimeBackend, TorchBackend)
    ]
    assert np.array_equal(plans[0].waypoints_in_ego, plans[1].waypoints_in_ego)
    assert plans[0].bucket == plans[1].bucket
    assert plans[0].complexity == pytest.approx(plans[1].complexity, abs=1e-5)
    assert all(np.array_equal(a, b) for a, b in zip(plans[0].kept_visual, plans[1].kept_visual, strict=True))


def test_weights_are_in_memory_once(stored_bundle):
    backend = TorchBackend(stored_bundle)
    weights = {}
    for variant in ("b40_s0/prefill", "b40_s0/decode", "full/prefill"):
        outputs(backend, "stage_01", variant, random_inputs(backend.graphs["stage_01"], variant))
        weights[variant] = len(backend._weights)
    assert len(set(weights.values())) == 1


def test_a_shape_the_recipe_does_not_pin_is_refused(stored_bundle):
    backend = TorchBackend(stored_bundle)
    graph = backend.graphs["head"]
    buffers = {tensor.name: torch.zeros(tensor.pinned({})) for tensor in graph.tensors}
    buffers["hidden"] = buffers["hidden"][..., :-1]
    with pytest.raises(BackendError, match=r"head \(only\): hidden got float32.*the recipe pins float32"):
        backend.bind("head", "only", buffers)


def with_head(bundle, folder, change):
    """The bundle with another head graph."""
    copy = shutil.copytree(bundle.path, folder / "bundle")
    proto = onnx.load(copy / "head.onnx", load_external_data=False)
    change(proto.graph)
    onnx.save(proto, copy / "head.onnx")
    return dataclasses.replace(bundle, path=copy)


def test_operators_that_are_not_known_are_named(stored_bundle, tmp_path):
    def change(graph):
        graph.node[0].op_type = "MeanVarianceNormalization"

    with pytest.raises(BackendError, match=r"head\.onnx: operator ai\.onnx\.MeanVarianceNormalization"):
        TorchBackend(with_head(stored_bundle, tmp_path, change))


def test_weights_of_another_file_are_not_read(stored_bundle, tmp_path):
    def change(graph):
        for entry in next(tensor for tensor in graph.initializer if tensor.external_data).external_data:
            if entry.key == "location":
                entry.value = "../weights.data"

    backend = TorchBackend(with_head(stored_bundle, tmp_path, change))
    buffers = {tensor.name: torch.zeros(tensor.pinned({})) for tensor in backend.graphs["head"].tensors}
    with pytest.raises(BackendError, match=r"lies in \.\./weights\.data, not in weights\.data"):
        backend.bind("head", "only", buffers)


def test_a_file_that_is_no_graph_is_named(stored_bundle, tmp_path):
    bundle = with_head(stored_bundle, tmp_path, lambda graph: None)
    (bundle.path / "vision.onnx").write_bytes(b"not a graph")
    for read in (TorchBackend, lambda bundle: lint_bundle(bundle, ["rtx"])):
        with pytest.raises(BundleError, match=r"vision\.onnx is not an ONNX graph.*export the bundle anew"):
            read(bundle)


def test_attributes_that_are_not_known_are_named(stored_bundle, tmp_path):
    def change(graph):
        next(a for a in graph.node[0].attribute if a.name == "stash_type").i = 16

    backend = TorchBackend(with_head(stored_bundle, tmp_path, change))
    buffers = {tensor.name: torch.zeros(tensor.pinned({})) for tensor in backend.graphs["head"].tensors}
    with pytest.raises(BackendError, match=r"head \(only\) cannot run.*stash_type 16, only 1 is known"):
        backend.bind("head", "only", buffers)


def test_a_shape_that_depends_on_data_is_refused(stored_bundle, tmp_path):
    def change(graph):
        graph.node.insert(0, onnx.helper.make_node("Cast", ["hidden"], ["sizes"], to=7))
        graph.node.insert(1, onnx.helper.make_node("Reshape", ["hidden", "sizes"], ["other"], "wild"))

    backend = TorchBackend(with_head(stored_bundle, tmp_path, change))
    buffers = {tensor.name: torch.zeros(tensor.pinned({})) for tensor in backend.graphs["head"].tensors}
    with pytest.raises(BackendError, match=r"Reshape 'wild' takes a shape from sizes, which depends on data"):
        backend.bind("head", "only", buffers)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(stored_bundle):
    with pytest.raises(BackendError, match="sees no CUDA device; install a CUDA build of torch"):
        TorchBackend(stored_bundle, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graphs_plan_what_the_cpu_plans(stored_bundle):
    generator = np.random.default_rng(7)
    images = {name: generator.integers(0, 255, (90, 160, 3), dtype=np.uint8) for name in CAMERAS}
    frame = Frame(images, EgoState(7.0, -0.4, 0.02), Command.STRAIGHT, token="frame-7")
    planners = [Planner(stored_bundle, TorchBackend(stored_bundle, device=d)) for d in ("cpu", "cuda")]
    for bucket in stored_bundle.recipe.buckets:
        plans = [planner.plan_in_bucket(frame, bucket.name) for planner in planners for _ in range(2)]
        for plan in plans[1:]:
            assert np.array_equal(plan.waypoints_in_ego, plans[0].waypoints_in_ego)
            assert plan.complexity == pytest.approx(plans[0].complexity, abs=1e-4)
