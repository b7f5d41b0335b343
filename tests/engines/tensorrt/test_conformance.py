"""What our source asks of TensorRT and CUDA is there, in every supported version of the real bindings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SOURCES = sorted((HERE.parents[2] / "engines" / "tensorrt").glob("*.py"))
TENSORRT = sorted(path.stem for path in HERE.glob("bindings/tensorrt-*.json"))
CUDA = sorted(path.stem for path in HERE.glob("bindings/cuda-*.json"))


def description(name: str) -> dict:
    return json.loads((HERE / "bindings" / f"{name}.json").read_text())


@pytest.mark.parametrize("cuda", CUDA)
@pytest.mark.parametrize("tensorrt", TENSORRT)
def test_all_our_source_uses_is_in_the_bindings(api_walk, tensorrt, cuda):
    found = {"tensorrt": description(tensorrt), "cuda": description(cuda)}
    walks = [api_walk.Walk(path, found) for path in SOURCES]
    assert not [fault for walk in walks for fault in walk.faults]
    used = set().union(*(walk.used for walk in walks))
    assert {
        "IExecutionContext.execute_async_v3",
        "IOptimizationProfile.set_shape",
        "IProgressMonitor.step_complete",
        "cudart.cudaGraphLaunch",
        "BuilderFlag.TF32",
        "cudaDeviceProp.major",
    } <= used
    assert len(used) > 80


@pytest.mark.parametrize(
    "source,fault",
    [
        ("trt.BuilderFlag.FP16", "11.4.0.106 has no BuilderFlag.FP16"),
        ("trt.Runtime(make_log()).deserialize_engine(plan)", "has no Runtime.deserialize_engine"),
        (
            "trt.Builder(log).create_optimization_profile().set_shape('x', min=(1,), best=(1,), max=(1,))",
            "IOptimizationProfile.set_shape has no parameter 'best'",
        ),
        ("trt.Builder(log).create_network(1, 2)", "Builder.create_network takes 1 arguments, given 2"),
        ("trt.Builder(log).build_serialized_network(network)", "build_serialized_network needs config"),
        ("other.set_tensor_address('x', 1)", "what has .set_tensor_address here"),
        ("cudart.cudaMemcpyAsync(1, 2, 3)", "cudart.cudaMemcpyAsync needs kind, stream"),
        ("cudart.cudaMallocFast(1)", "has no cudart.cudaMallocFast"),
        ("[item.device_memory_size for item in engines.values()]", "has no ICudaEngine.device_memory_size"),
    ],
)
def test_the_walk_finds_what_is_not_there(api_walk, tmp_path, source, fault):
    body = "def use(engines: dict[str, trt.ICudaEngine], plan, log, network, other):\n    " + source + "\n"
    (tmp_path / "use.py").write_text(body)
    found = {"tensorrt": description("tensorrt-11.4.0.106"), "cuda": description("cuda-13.5.0")}
    assert any(fault in line for line in api_walk.Walk(tmp_path / "use.py", found).faults)


def test_overriding_methods_have_the_parameters_they_are_called_with(api_walk, tmp_path):
    source = """
        class Monitor(trt.IProgressMonitor):
            def step_complete(self, phase_name):
                return True

            def phase_done(self, phase_name):
                pass
    """
    (tmp_path / "use.py").write_text(textwrap.dedent(source))
    found = {"tensorrt": description("tensorrt-10.3.0"), "cuda": description("cuda-13.5.0")}
    faults = api_walk.Walk(tmp_path / "use.py", found).faults
    assert len(faults) == 2
    assert "step_complete has other parameters" in faults[0] and "no method phase_done" in faults[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TENSORRT, *CUDA])
def test_descriptions_are_those_of_the_real_bindings(describe_bindings, name):
    """Imports the real wheels, TensorRT's over stubs; skipped where neither cached nor downloadable."""
    try:
        found = describe_bindings.describe(name, describe_bindings.default_cache())
    except describe_bindings.Unavailable as error:
        pytest.skip(str(error))
    committed = (HERE / "bindings" / f"{name}.json").read_text()
    assert describe_bindings.text_of(found) == committed, "renew with describe_bindings.py, see what changed"


WITH_REAL_BINDINGS = """
import sys
from collections import deque
from pathlib import Path

import tensorrt_bindings as trt

sys.modules["tensorrt"] = trt
from engines.tensorrt.build import _build, _make_monitor
from engines.tensorrt.cuda import Cuda
from engines.tensorrt.engine_files import BuildOptions, require_tensorrt
from engines.tensorrt.log import make_log
from vla_autoprune.bundle import load_bundle
from vla_autoprune.errors import BackendError

problems, told = deque(maxlen=2), []
log = make_log(problems)
log.log(trt.ILogger.Severity.ERROR, "broken\\nin two")
log.log(trt.ILogger.Severity.INFO, "fine")
assert list(problems) == ["broken in two"], problems
monitor = _make_monitor(lambda what, share: told.append((what, share)))
monitor.phase_start("phase", None, 2)
assert monitor.step_complete("phase", 0)
monitor.stopped = True
assert not monitor.step_complete("phase", 1)
monitor.phase_finish("phase")
assert told == [("phase", 0.0), ("phase", 0.5), ("phase", 1.0)], told

bundle = load_bundle(Path(sys.argv[1]))
print(require_tensorrt())
for attempt in (
    lambda: _build(bundle, bundle.graphs["stage_00"], BuildOptions(), None, Path("timing"), print),
    lambda: Cuda(0),
):
    try:
        attempt()
    except BackendError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", TENSORRT)
def test_our_logger_monitor_and_refusals_work_with_the_real_bindings(describe_bindings, stored_bundle, name):
    """As far as the libraries' stubs go: they give null for a builder, and here is no GPU."""
    try:
        variables = describe_bindings.environment(describe_bindings.default_cache(), name, "cuda-12.9.10")
    except describe_bindings.Unavailable as error:
        pytest.skip(str(error))
    variables["PYTHONPATH"] += os.pathsep + str(HERE.parents[2])
    variables["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-c", WITH_REAL_BINDINGS, str(stored_bundle.path)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    version, builder, gpu = done.stdout.splitlines()
    assert version == name.removeprefix("tensorrt-")
    assert builder.startswith(f"TensorRT {version} gives no builder: ")
    assert gpu.startswith("CUDA failed when looking for a GPU: cudaError")
