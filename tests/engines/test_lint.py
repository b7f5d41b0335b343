"""The linter on real bundles, and on graphs made to break one rule each."""

from __future__ import annotations

import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

from onnx import TensorProto, helper, numpy_helper

from engines.lint import TARGETS, lint_bundle, lint_graph
from vla_autoprune import contract

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def findings(nodes, *, target="rtx", opset=18, initializers=(), x_type=FLOAT, y_type=FLOAT, size=8):
    """Lint a graph x [n] -> y [k] in one variant; other values are what the nodes make of them."""
    graph = helper.make_graph(
        list(nodes),
        "made",
        [helper.make_tensor_value_info("x", x_type, ["n"])],
        [helper.make_tensor_value_info("y", y_type, None)],
        list(initializers),
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    tensors = contract.Graph("made", (contract.Tensor("x", ("n",)),), (), {"b40/prefill": {"n": size}})
    return lint_graph(proto, tensors, [target])


def constant(name, values, kind=INT64):
    import numpy as np

    return numpy_helper.from_array(np.array(values, dtype=helper.tensor_dtype_to_np_dtype(kind)), name)


def only(found, rule: str, text: str) -> None:
    assert {finding.rule for finding in found} == {rule}, found
    assert any(text in finding.message for finding in found), found


def test_a_clean_graph_has_no_findings():
    assert findings([helper.make_node("Add", ["x", "x"], ["y"])], target="jetpack6") == ()


def test_an_opset_the_parser_does_not_know():
    found = findings([helper.make_node("Add", ["x", "x"], ["y"])], opset=23, target="jetpack6")
    only(found, "opset", "opset 23, the parser of TensorRT 10.3 knows 9 to 20; export with --target jetpack6")


def test_an_operator_in_no_table():
    found = findings([helper.make_node("BitwiseNot", ["x"], ["y"])], x_type=INT64, y_type=INT64)
    only(found, "operator", "BitwiseNot 'y': not in the table of TensorRT 11.2, in none of its tables")


def test_an_operator_that_only_newer_parsers_know():
    nodes = [helper.make_node("RMSNormalization", ["x", "w"], ["y"], name="norm")]
    weights = [constant("w", [1.0] * 8, FLOAT)]
    assert findings(nodes, opset=23, initializers=weights) == ()
    found = findings(nodes, opset=23, initializers=weights, target="jetpack7")
    assert {finding.rule for finding in found} == {"opset", "operator"}
    message = "RMSNormalization 'norm': not in the table of TensorRT 10.13, known from 10.15 on"
    assert any(message in finding.message for finding in found)


def test_operators_of_other_domains():
    nodes = [helper.make_node("FusedGelu", ["x"], ["y"], domain="com.microsoft")]
    assert "need a plugin" in " ".join(finding.message for finding in findings(nodes))


def test_control_flow():
    result = helper.make_tensor_value_info("z", FLOAT, None)
    body = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "b", [], [result])
    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)]
    found = findings(nodes, initializers=[constant("c", True, TensorProto.BOOL)])
    assert "control flow" in {finding.rule for finding in found}


def test_a_size_that_depends_on_values():
    nodes = [helper.make_node("NonZero", ["x"], ["y"])]
    found = findings(nodes, y_type=INT64)
    only(found, "static shape", "NonZero 'y': its output's size depends on values")
    assert "is open once the profile is applied" in found[-1].message and found[-1].variant == "b40/prefill"


def test_a_shape_computed_from_data():
    nodes = [
        helper.make_node("Cast", ["x"], ["sizes"], to=INT64),
        helper.make_node("ConstantOfShape", ["sizes"], ["y"]),
    ]
    only(findings(nodes), "static shape", "is open once the profile is applied")


def test_shapes_that_contradict_each_other():
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    found = findings(nodes, initializers=[constant("w", [1.0] * 5, FLOAT)])
    only(found, "static shape", "shape inference fails")


@pytest.mark.parametrize("count,bad", [(3839, False), (3840, True)])
def test_counts_that_are_too_large(count, bad):
    nodes = [
        helper.make_node("Shape", ["x"], ["k"]),
        helper.make_node("TopK", ["x", "k"], ["y", "i"], name="order"),
    ]
    found = findings(nodes, size=count)
    if bad:
        only(found, "TopK", "TopK 'order': K is 3840, the parser wants less than 3840")
    else:
        assert found == ()


def test_unsorted_counts():
    nodes = [helper.make_node("TopK", ["x", "k"], ["y", "i"], sorted=0)]
    only(findings(nodes, initializers=[constant("k", [2])]), "TopK", "sorted is 0, the parser wants 1")


def test_axes_that_are_computed():
    nodes = [
        helper.make_node("Shape", ["x"], ["n"]),
        helper.make_node("Sub", ["n", "n"], ["axes"]),
        helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=1),
    ]
    assert "axes are computed" in " ".join(f.message for f in findings(nodes) if f.rule == "constant")


def test_axes_that_are_left_out():
    nodes = [helper.make_node("Squeeze", ["x"], ["y"])]
    only(findings(nodes, size=1), "constant", "axes are left out, parsers before TensorRT 11.5 want them")


def test_types_no_network_holds():
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.DOUBLE),
        helper.make_node("Cast", ["wide"], ["y"], to=FLOAT),
    ]
    only(findings(nodes), "type", "wide is DOUBLE, which a strongly typed network cannot hold")


def test_types_an_operator_does_not_take():
    nodes = [helper.make_node("Clip", ["x"], ["y"])]
    found = findings(nodes, x_type=INT64, y_type=INT64)
    only(found, "type", "Clip 'y': takes INT64, the table of TensorRT 11.2 has BF16, FP16, FP32")


def test_types_that_would_need_a_cast():
    nodes = [helper.make_node("Pow", ["x", "two"], ["y"])]
    found = findings(nodes, initializers=[constant("two", [2])])
    only(found, "type", "Pow 'y': its inputs differ in type")
    mixed = [helper.make_node("Add", ["x", "two"], ["y"])]
    only(findings(mixed, initializers=[constant("two", [2])]), "type", "types contradict each other")


def test_attention_in_a_form_that_is_not_taken():
    graph = [
        helper.make_node("Unsqueeze", ["x", "axes"], ["q"]),
        helper.make_node("Attention", ["q", "q", "q"], ["a"], q_num_heads=1, kv_num_heads=1, softcap=5.0),
        helper.make_node("Squeeze", ["a", "axes"], ["y"]),
    ]
    found = findings(graph, opset=23, initializers=[constant("axes", [0, 1])])
    messages = " ".join(finding.message for finding in found)
    assert "attribute softcap is not taken" in messages
    assert "inputs have [3, 3, 3] dimensions, the parser wants 4 each" in messages


def test_weights_outside_the_weights_file():
    tensor = TensorProto(name="w", data_type=FLOAT, dims=[8], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "../other.data"), ("offset", "0"), ("length", "32")):
        tensor.external_data.add(key=key, value=value)
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    only(findings(nodes, initializers=[tensor]), "weights", "w lies in ../other.data, not in weights.data")


@pytest.mark.slow
def test_exported_bundles_are_clean_where_they_are_meant_to_run(tiny_bundles):
    """Opset 18 with merging and floors everywhere, opset 23 where the parser knows whole attention."""
    report = lint_bundle(tiny_bundles["rich"], list(TARGETS))
    assert report.findings == () and report.variants == 21
    report = lint_bundle(tiny_bundles["plain"], list(TARGETS))
    assert report.of("rtx") == ()
    for target in ("jetpack6", "jetpack7"):
        assert {finding.rule for finding in report.of(target)} == {"opset", "operator"}


def test_a_target_that_would_refuse_gets_no_bundle(tiny_vla, tiny_recipes, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    from engines.parity import export_checked
    from vla_autoprune.errors import BundleError
    from vla_autoprune.models.adapter import LlavaAdapter

    whole = contract.graphs
    monkeypatch.setattr(contract, "graphs", lambda *given: whole(*given)[-1:])  # the head alone is quick
    model, recipe = LlavaAdapter(tiny_vla.model), tiny_recipes["plain"]
    with pytest.raises(BundleError, match=r"the bundle is not for jetpack6: head, opset 23.*more findings"):
        export_checked(model, tiny_vla, recipe, tmp_path / "b", opset=23, target="jetpack6")
    assert list(tmp_path.iterdir()) == []


def test_a_stored_stage_is_clean(stored_bundle):
    graph = stored_bundle.graphs["stage_00"]
    proto = onnx.load(stored_bundle.graph_file("stage_00"), load_external_data=False)
    assert lint_graph(proto, graph, ["rtx"]) == ()
