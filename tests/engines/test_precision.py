"""Half precision: what is float16 in a bundle, what stays float32, and which backend runs what."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

from engines.lint import lint_bundle
from engines.onnxruntime import OnnxRuntimeBackend
from engines.parity import TOLERANCES, check_parity
from engines.stage_parity import check_stages
from engines.torch_graphs import TorchBackend
from engines.verify import ModelInput
from vla_autoprune.errors import BackendError, InputError, ParityError
from vla_autoprune.export.export import export_bundle, text_files
from vla_autoprune.models.adapter import LlavaAdapter
from vla_autoprune.recipe import FULL
from vla_autoprune.recipe_building import build_recipe


@pytest.fixture(scope="module")
def model(tiny_vla):
    return LlavaAdapter(tiny_vla.model)


@pytest.fixture(scope="module")
def bundles(model, tiny_vla, tmp_path_factory):
    recipe = build_recipe(
        model.shape("tiny"),
        tiny_vla.prompt.layout,
        decode_length=4,
        pruning_points=(0,),
        budgets=(0.5,),
        slopes=(0.0,),
    )
    folder = tmp_path_factory.mktemp("half")
    return {
        precision: export_bundle(
            model, recipe, folder / precision, text_files(tiny_vla), opset=opset, precision=precision
        )
        for precision, opset in (("fp16", 18), ("bf16", 23))
    }


@pytest.fixture(scope="module")
def given(bundles, tiny_vla):
    layout = bundles["fp16"].recipe.layout
    random = np.random.default_rng(0)
    pixels = random.normal(size=(len(layout.cameras), 3, 64, 64)).astype(np.float32)
    token_ids = random.integers(8, 200, layout.length)
    token_ids[layout.visual_positions] = tiny_vla.model.config.image_token_id
    return ModelInput(pixels, token_ids, layout.length)


def test_float16_runs_on_onnxruntime_within_its_tolerance(bundles, model, given):
    backend = OnnxRuntimeBackend(bundles["fp16"], threads=1)
    report = check_parity(bundles["fp16"], backend, model, [given])
    assert 1e-5 < max(report.stage_error) < TOLERANCES["fp16"]  # rounded, and rightly


def test_bfloat16_runs_on_torch_and_is_refused_by_onnxruntime(bundles, model, given):
    report = check_parity(bundles["bf16"], TorchBackend(bundles["bf16"]), model, [given])
    assert 1e-4 < max(report.stage_error) < TOLERANCES["bf16"]
    with pytest.raises(BackendError, match=r"no bfloat16 MatMul.*--backend torch.*--precision fp16"):
        OnnxRuntimeBackend(bundles["bf16"])


@pytest.mark.parametrize(("precision", "target"), [("fp16", "jetpack6"), ("bf16", "rtx")])
def test_the_linter_finds_nothing(bundles, precision, target):
    assert lint_bundle(bundles[precision], [target]).findings == ()


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", "float16"), ("bf16", "bfloat16")])
def test_keys_and_values_are_half_and_what_ranks_is_float32(bundles, precision, dtype):
    bundle = bundles[precision]
    types = {tensor.name: tensor.dtype for tensor in bundle.graphs["stage_00"].tensors}
    cached = [name for name in types if name.startswith(("past_k", "past_v", "new_"))]
    assert len(cached) == 4 and {types[name] for name in cached} == {dtype}
    assert {types[name] for name in ("hidden", "score", "complexity", "cos", "hidden_out")} == {"float32"}
    proto = onnx.shape_inference.infer_shapes(onnx.load(bundle.graph_file("stage_00")))
    kinds = {info.name: info.type.tensor_type.elem_type for info in proto.graph.value_info}
    for node in proto.graph.node:
        if node.op_type == "Softmax":
            assert kinds[node.input[0]] == onnx.TensorProto.FLOAT
        if node.op_type == "Attention":
            wanted = {"softmax_precision": onnx.TensorProto.FLOAT}
            assert wanted.items() <= {item.name: item.i for item in node.attribute}.items()
    rows = sum(bundle.recipe.bucket(FULL).kv_tokens_per_layer)
    width = bundle.recipe.model.kv_heads * bundle.recipe.model.head_dim
    assert bundle.kv_mib(bundle.recipe.bucket(FULL)) == rows * 2 * width * 2 / 2**20


def test_stage_by_stage_the_bundle_computes_what_the_layers_do(bundles, model, given):
    asked = (model, given.pixel_values, given.token_ids, given.length)
    report = check_stages(bundles["fp16"], *asked, tolerance=TOLERANCES["fp16"])
    assert set(report.errors) == set(bundles["fp16"].graphs)
    layer = model.layers[2].mlp.down_proj
    with torch.no_grad():
        layer.weight.mul_(1.5)
    try:
        with pytest.raises(ParityError, match=r"stage_01 .*: hidden differs"):
            check_stages(bundles["fp16"], *asked, tolerance=TOLERANCES["fp16"])
    finally:
        with torch.no_grad():
            layer.weight.div_(1.5)


def test_bfloat16_asks_for_the_newer_opset(model, tiny_recipes, tmp_path):
    with pytest.raises(InputError, match="bf16 needs opset 23"):
        export_bundle(model, tiny_recipes["plain"], tmp_path / "b", {}, opset=18, precision="bf16")
