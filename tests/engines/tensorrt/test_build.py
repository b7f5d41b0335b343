from __future__ import annotations

import json
import os
import signal
import sys
import threading

import pytest

pytest.importorskip("onnxruntime")

from engines.tensorrt.build import build_engines
from engines.tensorrt.cuda import Gpu
from engines.tensorrt.engine_files import BuildOptions, engine_folder
from vla_autoprune.errors import BackendError

VERSIONS = [
    ("tensorrt-10.3.0", "cuda-12.6.2.post1"),
    ("tensorrt-10.13.3.9", "cuda-13.0.2"),
    ("tensorrt-11.4.0.106", "cuda-13.5.0"),
]


def named(calls, name: str) -> list:
    return [(given, keywords) for call, given, keywords in calls if call == name]


@pytest.mark.parametrize("tensorrt,cuda", VERSIONS)
def test_every_variant_is_a_static_profile_of_its_graphs_engine(bundle, make_double, tensorrt, cuda):
    double = make_double(bundle, tensorrt, cuda)
    done = build_engines(bundle, BuildOptions(workspace_mib=512))
    assert [record.graph for record in done.records] == list(bundle.graphs) and not done.reused
    assert done.folder == bundle.path / "engines" / "tensorrt-double-sm87-16mp"
    for record in done.records:
        graph = bundle.graphs[record.graph]
        plan = json.loads((done.folder / f"{record.graph}.engine").read_bytes())
        symbolic = any(isinstance(size, str) for tensor in graph.inputs for size in tensor.shape)
        wanted = [
            {tensor.name: list(graph.shapes(variant)[tensor.name]) for tensor in graph.inputs}
            for variant in graph.variants
        ]
        assert plan["profiles"] == (wanted if symbolic else [])
        assert record.profiles == tuple(graph.variants)
        assert (record.tensorrt_version, record.gpu, record.compute_capability) == (
            double.trt.__version__,
            "Double",
            "8.7",
        )
    assert record.bundle_id == bundle.manifest.bundle_id
    assert named(double.calls, "IBuilderConfig.set_memory_pool_limit")[0][0][1] == 512 << 20
    assert len(named(double.calls, "IBuilderConfig.clear_flag")) == len(bundle.graphs)
    # The builder works in a thread of its own, and CUDA gives every new thread device 0.
    assert len(named(double.gpu.calls, "cudaSetDevice")) == 1 + len(bundle.graphs)
    assert not double.gpu.blocks


def test_options_reach_the_builder(bundle, make_double):
    double = make_double(bundle)
    options = BuildOptions(
        tf32=True, version_compatible=True, hardware_compatible=True, optimization_level=5, workspace_mib=64
    )
    assert build_engines(bundle, options).folder.name == "tensorrt-ampere-plus"
    flags = [given[0].name for given, _ in named(double.calls, "IBuilderConfig.set_flag")]
    assert set(flags) == {"TF32", "VERSION_COMPATIBLE"}
    assert not named(double.calls, "IBuilderConfig.clear_flag")
    (level,) = {given for given, _ in named(double.calls, "IBuilderConfig.builder_optimization_level")}
    assert level == (5,)
    (hardware,) = {given for given, _ in named(double.calls, "IBuilderConfig.hardware_compatibility_level")}
    assert hardware[0].name == "AMPERE_PLUS"


def test_a_second_build_reuses_engines_and_timings(bundle, make_double):
    double = make_double(bundle)
    folder = build_engines(bundle, BuildOptions()).folder
    assert (folder / "timing.cache").read_bytes() == b"+" * len(bundle.graphs)
    again = build_engines(bundle, BuildOptions())
    assert again.reused == tuple(bundle.graphs)
    (folder / "stage_01.engine").write_bytes(b"short")
    double.calls.clear()
    assert set(build_engines(bundle, BuildOptions()).reused) == set(bundle.graphs) - {"stage_01"}
    (kept,) = {given[0] for given, _ in named(double.calls, "IBuilderConfig.create_timing_cache")}
    assert kept == b"+" * len(bundle.graphs)
    assert not build_engines(bundle, BuildOptions(tf32=True)).reused
    assert not build_engines(bundle, BuildOptions(tf32=True), overwrite=True).reused


def test_progress_names_graph_and_phase(bundle, make_double):
    make_double(bundle)
    told = []
    build_engines(bundle, BuildOptions(), progress=lambda *given: told.append(given))
    assert ("stage_00", 1, len(bundle.graphs), "Building", 1.0) in told


def test_an_interrupt_stops_the_builder_and_leaves_whole_engines(bundle, make_double):
    double = make_double(bundle)
    stopped = threading.Event()

    def interrupt_in_the_third_graph(monitor):
        if len(named(double.calls, "Builder.build_serialized_network")) == 3 and not stopped.is_set():
            stopped.set()
            os.kill(os.getpid(), signal.SIGINT)
            while not monitor.stopped:  # TensorRT asks after every step whether to go on
                stopped.wait(0.01)

    double.during_build = interrupt_in_the_third_graph
    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, BuildOptions())
    folder = bundle.path / "engines" / "tensorrt-double-sm87-16mp"
    first_two = list(bundle.graphs)[:2]
    assert sorted(path.stem for path in folder.glob("*.engine")) == sorted(first_two)
    assert not list(folder.glob(".*"))
    assert build_engines(bundle, BuildOptions()).reused == tuple(first_two)


def test_what_the_parser_refuses_is_said(bundle, make_double):
    make_double(bundle).parse_errors.append("In node 3: no importer registered for op: Attention")
    with pytest.raises(BackendError, match=r"cannot read .*vision.onnx \(opset 23\): .*Attention; export"):
        build_engines(bundle, BuildOptions())


def test_a_refused_profile_is_named(bundle, make_double):
    make_double(bundle).refuse_profiles = True
    with pytest.raises(BackendError, match="stage_00: TensorRT refuses the profile of prefill"):
        build_engines(bundle, BuildOptions())


def test_an_input_taken_for_a_shape_is_named(bundle, make_double):
    make_double(bundle).shape_tensor = "past_length"
    with pytest.raises(BackendError, match=r"stage_00: TensorRT takes past_length for a shape"):
        build_engines(bundle, BuildOptions())


def test_a_graph_the_builder_gives_up_is_named(bundle, make_double, monkeypatch):
    double = make_double(bundle)
    monkeypatch.setattr(double.trt.Builder, "build_serialized_network", lambda *given: None)
    with pytest.raises(BackendError, match=r"cannot build vision: TensorRT gave no reason; if memory"):
        build_engines(bundle, BuildOptions())


@pytest.mark.parametrize("member", ["create_timing_cache", "set_timing_cache"])
def test_timings_of_another_gpu_or_tensorrt_are_replaced(bundle, make_double, monkeypatch, member):
    """TensorRT makes no cache of bytes it does not know, and attaches none of another device."""
    double = make_double(bundle)
    config = double.trt.IBuilderConfig
    real = getattr(config, member)

    def refuse(self, given, **keywords):
        content = given if isinstance(given, bytes) else given.__dict__["_content"]
        if content.startswith(b"foreign"):
            return None if member == "create_timing_cache" else False
        return real(self, given, **keywords)

    folder = engine_folder(bundle, Gpu("Double", "8.7", 16), BuildOptions())
    folder.mkdir(parents=True)
    (folder / "timing.cache").write_bytes(b"foreign")
    monkeypatch.setattr(config, member, refuse)
    assert build_engines(bundle, BuildOptions()).folder == folder
    assert (folder / "timing.cache").read_bytes() == b"+" * len(bundle.graphs)


def test_a_machine_without_tensorrt_or_gpu_says_how_to_get_them(bundle, make_double, monkeypatch):
    double = make_double(bundle)
    error = double.gpu.runtime.cudaError_t.cudaErrorNoDevice
    monkeypatch.setattr(double.gpu.runtime, "cudaGetDeviceCount", lambda: (error, None))
    with pytest.raises(BackendError, match=r"looking for a GPU: cudaErrorNoDevice; no GPU is visible"):
        build_engines(bundle, BuildOptions())
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackendError, match=r"cuda-python cannot be imported .*pip install"):
        build_engines(bundle, BuildOptions())
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match=r"TensorRT cannot be imported .*JetPack"):
        build_engines(bundle, BuildOptions())


def test_a_tensorrt_that_is_too_old_is_named(bundle, make_double, monkeypatch):
    monkeypatch.setattr(make_double(bundle).trt, "__version__", "10.0.1")
    with pytest.raises(BackendError, match=r"TensorRT is 10\.0\.1, at least 10\.3"):
        build_engines(bundle, BuildOptions())


def test_folders_are_named_after_the_gpu(bundle):
    gpu = Gpu("NVIDIA GeForce RTX 4090", "8.9", 128)
    assert engine_folder(bundle, gpu, BuildOptions()).name == "tensorrt-nvidia-geforce-rtx-4090-sm89-128mp"
