from __future__ import annotations

import gc
import json
import shutil
import weakref

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from engines.onnxruntime import OnnxRuntimeBackend
from engines.tensorrt.backend import TensorRtBackend
from engines.tensorrt.build import build_engines
from engines.tensorrt.cuda import Gpu
from engines.tensorrt.engine_files import (
    BuildOptions,
    engine_folder,
    find_engines,
    read_record,
    require_fit,
)
from vla_autoprune.errors import BackendError, PlanError
from vla_autoprune.frame import CAMERAS, Command, EgoState, Frame
from vla_autoprune.runtime.pipeline import Pipeline, Timings
from vla_autoprune.runtime.planner import Planner


def frame(seed: int) -> Frame:
    generator = np.random.default_rng(seed)
    images = {name: generator.integers(0, 255, (90, 160, 3), dtype=np.uint8) for name in CAMERAS}
    return Frame(images, EgoState(7.0 + seed, -0.4, 0.02), Command.STRAIGHT, token=f"frame-{seed}")


@pytest.fixture
def planner(bundle, built):
    return Planner(bundle, TensorRtBackend(bundle), budget=0.4)


@pytest.fixture(scope="module")
def reference(stored_bundle):
    return Planner(stored_bundle, OnnxRuntimeBackend(stored_bundle, threads=1), budget=0.4)


@pytest.mark.parametrize("budget,policy", [(0.4, "autoprune"), (None, "autoprune"), (0.4, "random")])
def test_captured_programs_plan_what_onnxruntime_plans(planner, reference, budget, policy):
    ours, theirs = planner.variant(budget, policy), reference.variant(budget, policy)
    for seed in range(3):
        plan, expected = ours.plan(frame(seed)), theirs.plan(frame(seed))
        assert plan.bucket == expected.bucket and plan.text == expected.text
        assert plan.complexity == pytest.approx(expected.complexity, abs=1e-5)
        assert np.allclose(plan.waypoints_in_ego, expected.waypoints_in_ego)
        for kept, wanted in zip(plan.kept_visual, expected.kept_visual, strict=True):
            assert np.array_equal(kept, wanted)
        assert set(plan.timings_ms) == set(expected.timings_ms)


@pytest.mark.parametrize(
    "tensorrt,cuda", [("tensorrt-10.13.3.9", "cuda-13.0.2"), ("tensorrt-11.4.0.106", "cuda-13.5.0")]
)
def test_newer_versions_plan_the_same(bundle, make_double, reference, tensorrt, cuda):
    double = make_double(bundle, tensorrt, cuda)
    build_engines(bundle, BuildOptions())
    plan = Planner(bundle, TensorRtBackend(bundle), budget=0.4).plan(frame(0))
    assert plan.text == reference.plan(frame(0)).text and double.gpu.launches


def test_a_frame_launches_one_graph_per_program_and_allocates_nothing(planner, built):
    planner.plan(frame(0))
    calls, before = built.gpu.calls, built.gpu.launches
    calls.clear()
    built.calls.clear()
    planner.plan(frame(1))
    names = [name for name, _, _ in calls]
    # Vision, up to the complexity, the rest of the prefill, its logits; then one per further token.
    assert built.gpu.launches - before == 4 + planner.codec.length - 1
    assert not {"cudaMalloc", "cudaHostAlloc", "cudaStreamBeginCapture", "cudaGraphInstantiate"} & set(names)
    assert not built.calls, "between frames only graphs are launched"
    stages = len(planner.recipe.stages)
    # Beside the graphs: the row whose logits are wanted, and every token's keys and values, once per stage.
    assert names.count("cudaMemcpy2DAsync") == 1 + stages * (planner.codec.length - 1)


def test_between_an_image_and_its_logits_only_the_complexity_is_waited_for(planner, built):
    planner.plan(frame(0))
    pipeline, calls = planner.pipeline, built.gpu.calls
    ids = planner.prompt.build(frame(0).ego, frame(0).command)
    seen = []

    def choose(complexity):
        seen.append(len(calls))
        return planner.recipe.bucket("full")

    calls.clear()
    timings = Timings()
    pipeline.encode(timings)
    assert not timings.ms
    pipeline.prefill(ids, len(ids), choose, Timings())
    assert timings.ms == {"vision": 0.5}
    names = [name for name, _, _ in calls]
    until_logits = names[seen[0] :][: names[seen[0] :].index("cudaStreamSynchronize")]
    until_choice = names[: names.index("cudaStreamSynchronize")]
    assert until_choice == ["cudaGraphLaunch"] * 2 and "cudaStreamSynchronize" in names[: seen[0]]
    assert until_logits == ["cudaGraphLaunch", "cudaMemcpy2DAsync", "cudaGraphLaunch"]


def test_memory_is_that_of_the_largest_bucket_and_does_not_grow(bundle, built):
    planner = Planner(bundle, TensorRtBackend(bundle), budget=None)
    used = built.gpu.used
    pinned = len(built.gpu.pinned)
    for index, bucket in enumerate([*planner.recipe.buckets, *planner.recipe.buckets]):
        planner.plan_in_bucket(frame(index), bucket.name)
    assert (built.gpu.used, len(built.gpu.pinned)) == (used, pinned)
    scratch = 4096 * len(bundle.graphs)
    wiring = planner.pipeline._wiring.memory()
    sizes = {"float32": 4, "int64": 8}
    assert used == scratch + sum(count * sizes[dtype] for count, dtype in wiring.values())
    assert planner.backend.buffer_bytes == used


def test_without_capture_the_same_calls_are_queued_every_time(bundle, built, reference):
    planner = Planner(bundle, TensorRtBackend(bundle, cuda_graphs=False), budget=0.4)
    assert planner.plan(frame(2)).text == reference.plan(frame(2)).text
    assert not built.gpu.launches


def test_a_nan_from_a_stage_is_an_error_and_the_next_frame_plans(planner):
    good = planner.plan(frame(0))
    pipeline = planner.pipeline
    pipeline.pixels[:] = np.nan
    pipeline.encode(Timings())
    ids = planner.prompt.build(frame(0).ego, frame(0).command)
    with pytest.raises(PlanError, match="not finite"):
        pipeline.prefill(ids, len(ids), lambda _: planner.recipe.buckets[0], Timings())
    assert planner.plan(frame(0)).text == good.text


@pytest.mark.parametrize(
    "spoiled,message",
    [
        (("stage_00", "complexity"), "complexity of stage_00 is nan"),
        (("stage_00", "score"), "scores of stage_00 are not finite"),
        (("stage_01", "hidden_out"), "logits contain NaN"),
        (("stage_01", "new_v_02"), "logits contain NaN"),
        (("head", "logits"), "logits contain NaN"),
    ],
)
def test_a_nan_born_in_any_stage_is_an_error_and_the_next_frame_plans(planner, built, spoiled, message):
    good = planner.plan(frame(0))
    built.spoiled = spoiled
    with pytest.raises(PlanError, match=message):
        planner.plan(frame(0))
    built.spoiled = None
    assert planner.plan(frame(0)).text == good.text


def test_closing_gives_everything_back(bundle, built):
    planner = Planner(bundle, TensorRtBackend(bundle), budget=0.4)
    planner.plan(frame(0))
    planner.backend.close()
    assert not built.gpu.blocks and not built.gpu.pinned
    asked = [name for name, *_ in built.gpu.calls]
    for made, given_back in (
        ("cudaGraphInstantiate", "cudaGraphDestroy"),
        ("cudaGraphInstantiate", "cudaGraphExecDestroy"),
        ("cudaEventCreate", "cudaEventDestroy"),
        ("cudaStreamCreateWithFlags", "cudaStreamDestroy"),
    ):
        assert asked.count(made) == asked.count(given_back) > 0
    with pytest.raises(IndexError):  # to plan would fill the pixels, which are given back
        planner.pipeline.encode(Timings())


def test_a_pipeline_that_outlives_its_backend_keeps_no_context(bundle, built):
    pipeline = Pipeline(bundle, TensorRtBackend(bundle))
    kept = [weakref.ref(context) for context in pipeline.backend._contexts]
    pipeline.backend.close()
    gc.collect()
    assert pipeline.recipe and kept and not any(context() for context in kept)


def test_a_lost_context_is_told_by_what_lost_it_not_by_closing(bundle, built, monkeypatch):
    backend = TensorRtBackend(bundle)
    lost = (built.gpu.runtime.cudaError_t.cudaErrorIllegalAddress,)
    for name in ("cudaStreamSynchronize", "cudaFree", "cudaFreeHost", "cudaStreamDestroy"):
        monkeypatch.setattr(built.gpu.runtime, name, lambda *given: lost)
    with pytest.raises(BackendError, match="cudaErrorIllegalAddress; the device context may be lost"):
        backend.wait()
    backend.close()


def test_shapes_that_contradict_each_other_are_an_error_of_ours(bundle, built, monkeypatch):
    def infer(context):
        raise RuntimeError("infer_shapes error code: -1")

    monkeypatch.setattr(built.trt.IExecutionContext, "infer_shapes", infer)
    with pytest.raises(BackendError, match=r"vision \(only\): infer_shapes error code: -1: .*; build eng"):
        Pipeline(bundle, TensorRtBackend(bundle))


@pytest.mark.parametrize(
    "member,gives,message",
    [
        ("ICudaEngine.create_execution_context", None, r"no execution context; \d+ of 1024 .*: too little"),
        ("IExecutionContext.set_optimization_profile_async", False, "profile 0: TensorRT refuses it: too"),
        ("IExecutionContext.set_input_shape", False, r"pixel_values \[6, 3, .*\]: TensorRT refuses it: too"),
        ("IExecutionContext.set_tensor_address", False, "pixel_values: TensorRT refuses it: too little"),
        ("IExecutionContext.infer_shapes", ["features"], "TensorRT cannot tell the shape of features"),
        ("IExecutionContext.get_tensor_shape", (1, 2), r"TensorRT infers \[1, 2\] for features"),
        ("IExecutionContext.execute_async_v3", False, "cannot be queued: .*too little"),
    ],
)
def test_what_tensorrt_refuses_is_said_with_its_own_words(bundle, built, monkeypatch, member, gives, message):
    def refuse(*given, **keywords):
        log = [given[0] for name, given, _ in built.calls if name == "Runtime.__init__"][-1]
        log.log(built.trt.ILogger.Severity.ERROR, "too\nlittle")
        return gives

    cls, name = member.split(".")
    monkeypatch.setattr(getattr(built.trt, cls), name, refuse)
    with pytest.raises(BackendError, match=r"vision \(only\):? " + message) as caught:
        Pipeline(bundle, TensorRtBackend(bundle))
    assert "\n" not in str(caught.value)


def test_a_tensorrt_that_gives_nothing_says_where_to_look(bundle, built, monkeypatch):
    def nothing(*given):
        raise TypeError("factory function returned nullptr")  # as the bindings put it

    for cls, use in (
        ("Runtime", lambda: TensorRtBackend(bundle)),
        ("Builder", lambda: build_engines(bundle, BuildOptions(), overwrite=True)),
    ):
        monkeypatch.setattr(getattr(built.trt, cls), "__init__", nothing)
        with pytest.raises(BackendError, match=rf"gives no {cls.lower()}: .*nvidia-smi"):
            use()


@pytest.mark.parametrize("dtype,said", [("HALF", "float16"), ("BF16", "bfloat16"), ("INT8", "None")])
def test_an_engine_of_other_types_is_refused(bundle, built, monkeypatch, dtype, said):
    found = getattr(built.trt.DataType, dtype)
    monkeypatch.setattr(built.trt.ICudaEngine, "get_tensor_dtype", lambda *given: found)
    has = rf"vision.engine: tensor pixel_values is \('input', '?{said}'?\), the bundle has"
    with pytest.raises(BackendError, match=has):
        TensorRtBackend(bundle)


def test_a_capture_that_fails_does_not_ask_for_a_restart(bundle, built, monkeypatch):
    refused = (built.gpu.runtime.cudaError_t.cudaErrorStreamCaptureInvalidated, None)
    monkeypatch.setattr(built.gpu.runtime, "cudaStreamEndCapture", lambda stream: refused)
    with pytest.raises(BackendError, match=r"capturing vision: .*CaptureInvalidated; .*cuda_graphs=False"):
        Pipeline(bundle, TensorRtBackend(bundle))


def record_of(bundle, name: str):
    return bundle.path / "engines" / "tensorrt-double-sm87-16mp" / f"{name}.json"


@pytest.mark.parametrize(
    "field,value,message",
    [
        ("bundle_id", "a" * 64, r"built for bundle aaaaaaaaaaaa, here it is [0-9a-f]{12}; build engines"),
        ("tensorrt_version", "10.9.0", r"built for TensorRT 10\.9\.0, here it is 10\.3\.0; build engines"),
        ("gpu", "Orin", "built for GPU Orin, here it is Double; build engines on this machine with: vla"),
        ("compute_capability", "8.9", r"built for compute capability 8\.9, here it is 8\.7"),
        ("multiprocessors", 8, "built for multiprocessors 8, here it is 16; build engines"),
        ("profiles", ["prefill"], "built for recipe's variants prefill, here it is .*full/decode"),
        ("engine_version", 1, "engine_version is 1, this library reads 2; build engines"),
        ("bytes", 12, "longer than it should be: .* its record says 12; build engines"),
        ("sha256", "0" * 64, "is not the engine its record describes"),
        ("bytes", "many", r"bytes: .*got 'many'; build engines"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused_with_both_values(bundle, built, field, value, message):
    path = record_of(bundle, "stage_01")
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(BackendError, match=message) as caught:
        TensorRtBackend(bundle)
    assert "\n" not in str(caught.value) and "vla-autoprune build" in str(caught.value)


def test_compatible_engines_may_come_from_elsewhere(bundle, built):
    for name in bundle.graphs:
        path = record_of(bundle, name)
        content = json.loads(path.read_text())
        content |= {"gpu": "Orin", "compute_capability": "8.6", "tensorrt_version": "10.1.0"}
        content["multiprocessors"] = 84
        content["options"] |= {"version_compatible": True, "hardware_compatible": True}
        path.write_text(json.dumps(content))
    built.calls.clear()
    TensorRtBackend(bundle)
    asked = [name for name, *_ in built.calls]
    allowed = asked.index("Runtime.engine_host_code_allowed")  # such engines bring code of their own
    assert allowed < asked.index("Runtime.deserialize_cuda_engine")
    folder = path.parent.rename(path.parent.with_name("tensorrt-ampere-plus"))
    TensorRtBackend(bundle)
    path = folder / path.name
    content["tensorrt_version"] = "10.8.0"
    path.write_text(json.dumps(content))
    with pytest.raises(BackendError, match=r"built for TensorRT 10\.8\.0, here it is 10\.3\.0"):
        TensorRtBackend(bundle)


def test_compatibility_has_its_limits(bundle, built):
    folder = find_engines(bundle, Gpu("Double", "8.7", 16))
    record = read_record(folder, "vision", "build again").model_copy(
        update={"options": BuildOptions(version_compatible=True, hardware_compatible=True)}
    )
    ampere, turing = Gpu("A", "8.6", 84), Gpu("T", "7.5", 40)
    require_fit(record, folder, bundle, ampere, "10.13.3")
    with pytest.raises(BackendError, match=r"built for TensorRT 10\.3\.0, here it is 11\.4\.0"):
        require_fit(record, folder, bundle, ampere, "11.4.0")
    with pytest.raises(BackendError, match=r"compute capability 8\.0 or newer, here it is 7\.5"):
        require_fit(record, folder, bundle, turing, "10.3.0")


def test_engines_of_this_gpu_are_taken_before_those_of_any(bundle, built):
    gpu = Gpu("Double", "8.7", 16)
    any_gpu = engine_folder(bundle, gpu, BuildOptions(hardware_compatible=True))
    any_gpu.mkdir()
    assert find_engines(bundle, gpu) == engine_folder(bundle, gpu, BuildOptions())
    assert find_engines(bundle, Gpu("Other", "8.9", 128)) == any_gpu


def test_a_truncated_engine_is_named(bundle, built):
    path = record_of(bundle, "stage_02").with_suffix(".engine")
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(BackendError, match=r"stage_02.engine is truncated: \d+ bytes, its record says \d+"):
        TensorRtBackend(bundle)


def test_missing_engines_name_the_command(bundle, make_double):
    make_double(bundle)
    with pytest.raises(BackendError, match=r"no engine has been built here; build engines on this machine"):
        TensorRtBackend(bundle)


def test_an_engine_tensorrt_cannot_load_is_named_with_the_free_memory(bundle, built, monkeypatch):
    monkeypatch.setattr(built.trt.Runtime, "deserialize_cuda_engine", lambda *given: None)
    with pytest.raises(BackendError, match=r"vision.engine \(.*, \d+ of 1024 MiB .* free\) cannot be load"):
        TensorRtBackend(bundle)


@pytest.mark.parametrize(
    "missing,message",
    [
        (False, r"profile 1 \(.*/prefill\) takes hidden of .*, the recipe pins"),
        (True, r"stage_01.engine has \d+ profiles, the recipe needs \d+: full/prefill, "),
    ],
)
def test_a_profile_that_is_missing_or_of_other_shapes_is_named(bundle, built, missing, message):
    path = record_of(bundle, "stage_01").with_suffix(".engine")
    plan = json.loads(path.read_bytes())
    plan["profiles"][1]["hidden"][1] += 1
    if missing:
        plan["profiles"].pop()
    content = json.dumps(plan).encode()
    path.write_bytes(content)
    from engines.tensorrt.engine_files import digest

    record = json.loads(record_of(bundle, "stage_01").read_text())
    record |= {"bytes": len(content), "sha256": digest(content)}
    record_of(bundle, "stage_01").write_text(json.dumps(record))
    with pytest.raises(BackendError, match=message):
        TensorRtBackend(bundle)


def test_too_little_device_memory_is_named_with_the_figures(bundle, make_double):
    double = make_double(bundle, memory=200_000)
    build_engines(bundle, BuildOptions())
    figures = r"allocating \d+\.\d MiB \(0 of 0 MiB were free, .* holds \d+\.\d MiB"
    with pytest.raises(BackendError, match=figures):
        Planner(bundle, TensorRtBackend(bundle), budget=0.4)
    assert double.gpu.used <= 200_000


def test_a_program_may_not_write_from_ordinary_memory(bundle, built):
    backend = TensorRtBackend(bundle)
    buffer = backend.allocate(4, "float32")
    values = np.ones(4, dtype=np.float32)
    with pytest.raises(BackendError, match="may only write from memory that the backend's host"):
        backend.program([("write", lambda: backend.write(buffer, values))])
    backend.write(buffer, values)
    backend.fetch(buffer)
    assert np.array_equal(backend.read(buffer), values)


def test_rows_that_do_not_fit_are_refused(bundle, built):
    backend = TensorRtBackend(bundle)
    source, target = (backend.view(backend.allocate(24, "float32"), (2, 3, 4)) for _ in range(2))
    with pytest.raises(BackendError, match=r"3 rows from row 1 of \[2, 3, 4\] do not fit"):
        backend.move_rows(source, 1, target, 0, 3)


def test_the_acceptance_command_builds_verifies_and_measures(recorded, make_double, tmp_path):
    from typer.testing import CliRunner

    from vla_autoprune.bundle import load_bundle
    from vla_autoprune.cli import app

    folder = shutil.copytree(recorded.path, tmp_path / "bundle")
    double = make_double(load_bundle(folder))
    out = tmp_path / "result.json"
    run = CliRunner().invoke(
        app, ["accept", str(folder), "--frames", "10", "--out", str(out)], catch_exceptions=False
    )
    assert run.exit_code == 0, run.output
    result = json.loads(out.read_text())
    assert len(result["checks"]) == 5
    assert result["device"] == "Double (compute capability 8.7), TensorRT 10.3.0"
    assert [engine["graph"] for engine in result["engines"]] == list(recorded.graphs)
    assert result["times"]["full"]["steps_ms"]["stage_01"] == 0.5, "measured by the device's clock"
    assert double.gpu.launches > 100 and not double.gpu.blocks


def accepted(recorded, tmp_path, *options: str) -> tuple[int, dict]:
    """Exit code and result of an acceptance on a copy of the bundle."""
    from typer.testing import CliRunner

    from vla_autoprune.cli import app

    out = tmp_path / "result.json"
    command = ["accept", str(tmp_path / "bundle"), "--frames", "1", "--out", str(out), *options]
    run = CliRunner().invoke(app, command, catch_exceptions=False)
    return run.exit_code, json.loads(out.read_text())


@pytest.fixture
def to_accept(recorded, make_double, tmp_path):
    from vla_autoprune.bundle import load_bundle

    return make_double(load_bundle(shutil.copytree(recorded.path, tmp_path / "bundle")))


def test_a_graph_the_parser_refuses_is_in_the_acceptance_file(recorded, to_accept, tmp_path):
    to_accept.parse_errors.append("no importer registered for op: Attention")
    code, result = accepted(recorded, tmp_path)
    (check,) = result["checks"]
    assert code == 1 and not check["passed"] and "no importer registered for op" in check["seen"]
    assert result["machine"]["python"] and result["bundle"]["id"] == recorded.manifest.bundle_id


def test_a_capture_that_fails_is_in_the_acceptance_file(recorded, to_accept, tmp_path, monkeypatch):
    gpu = to_accept.gpu

    def refuse(stream):
        gpu.capture = None
        return (gpu.runtime.cudaError_t.cudaErrorStreamCaptureUnsupported, None)

    monkeypatch.setattr(gpu.runtime, "cudaStreamEndCapture", refuse)
    code, result = accepted(recorded, tmp_path)
    (check,) = result["checks"]
    assert code == 1 and "cudaErrorStreamCaptureUnsupported" in check["seen"]
    assert len(result["engines"]) == len(recorded.graphs)


def test_values_that_are_not_finite_fail_a_check_and_others_go_on(recorded, to_accept, tmp_path):
    to_accept.spoiled = ("head", "logits")
    code, result = accepted(recorded, tmp_path)
    assert code == 1 and len(result["checks"]) == 5
    assert "logits contain NaN" in result["checks"][0]["seen"] and not result["times"]
    assert not to_accept.gpu.blocks
