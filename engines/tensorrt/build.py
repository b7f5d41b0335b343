"""Build a bundle's engines on the machine that will run them.

Networks are strongly typed: precision is what the ONNX files say, and the builder may not change it. Every
variant of a graph, one bucket in prefill or decode, is an optimisation profile with min = opt = max, so that
kernels are chosen for exactly the shapes that run. All profiles of a graph are in one engine over one set of
weights.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.tensorrt.cuda import Cuda, Gpu
from engines.tensorrt.engine_files import (
    ENGINE_VERSION,
    TIMING_CACHE,
    BuildOptions,
    EngineRecord,
    digest,
    engine_folder,
    has_profiles,
    how_to_build,
    is_current,
    read_record,
    require_tensorrt,
    write_engine,
)
from engines.tensorrt.log import SEE, make_log, said
from vla_autoprune.bundle import Bundle
from vla_autoprune.contract import Graph
from vla_autoprune.errors import BackendError
from vla_autoprune.files import write_whole

if TYPE_CHECKING:
    import tensorrt as trt

Progress = Callable[[str, int, int, str, float], None]
"""Called with a graph, which of how many it is, what the builder does, and how far that is (0..1)."""

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class BuiltEngines:
    """Where the engines lie, what they are, and which were already there."""

    folder: Path
    gpu: Gpu
    records: tuple[EngineRecord, ...]
    reused: tuple[str, ...]


def build_engines(
    bundle: Bundle,
    options: BuildOptions,
    *,
    device: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> BuiltEngines:
    """Build an engine for every graph of a bundle, into its `engines/` folder.

    An interrupt ends the build after the builder's next step; engines finished before stay and are not built
    again. Kernel timings are kept beside the engines, so that a second build is faster.

    Args:
        bundle: a checked bundle.
        options: what the builder is told.
        device: CUDA's index of the GPU.
        overwrite: build even where an engine of the same bundle and options lies.
        progress: told what is going on.

    Returns:
        The records of all engines.

    Raises:
        BackendError: TensorRT or CUDA are absent, or TensorRT refuses a graph; the message has its reason.
    """
    version = require_tensorrt()
    cuda = Cuda(device)
    gpu = cuda.gpu
    folder = engine_folder(bundle, gpu, options)
    folder.mkdir(parents=True, exist_ok=True)
    say = progress or (lambda graph, index, count, what, share: None)
    records, reused = [], []
    try:
        for index, graph in enumerate(bundle.graphs.values()):

            def tell(what: str, share: float, name: str = graph.name, index: int = index) -> None:
                say(name, index, len(bundle.graphs), what, share)

            tell("reading", 0.0)
            if not overwrite and is_current(folder, bundle, graph, gpu, version, options):
                reused.append(graph.name)
                records.append(read_record(folder, graph.name, how_to_build(bundle)))
                continue
            begin = time.perf_counter()
            plan = _build(bundle, graph, options, cuda, folder / TIMING_CACHE, tell)
            record = EngineRecord(
                engine_version=ENGINE_VERSION,
                graph=graph.name,
                bundle_id=bundle.manifest.bundle_id,
                tensorrt_version=version,
                gpu=gpu.name,
                compute_capability=gpu.compute_capability,
                multiprocessors=gpu.multiprocessors,
                options=options,
                profiles=tuple(graph.variants),
                bytes=plan.nbytes,
                sha256=digest(plan),
                build_seconds=time.perf_counter() - begin,
            )
            write_engine(folder, record, plan)
            records.append(record)
    finally:
        cuda.close()
    return BuiltEngines(folder, gpu, tuple(records), tuple(reused))


def _build(
    bundle: Bundle,
    graph: Graph,
    options: BuildOptions,
    cuda: Cuda,
    cache_file: Path,
    tell: Callable[[str, float], None],
) -> memoryview:
    """One graph's serialized engine."""
    import tensorrt as trt

    problems: deque[str] = deque(maxlen=5)
    log = make_log(problems)
    try:
        builder = trt.Builder(log)
    except TypeError as error:  # what the bindings raise where the library gives no builder
        raise BackendError(f"TensorRT {trt.__version__} gives no builder: {said(problems)}; {SEE}") from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    path = bundle.graph_file(graph.name)
    if not parser.parse_from_file(str(path)):
        reasons = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise BackendError(
            f"TensorRT {trt.__version__} cannot read {path} (opset {bundle.manifest.options.opset}): "
            f"{reasons or said(problems)}; export with --opset 18 for TensorRT before 10.15, and see what "
            "vla-autoprune lint says"
        )
    config = builder.create_builder_config()
    _configure(config, options)
    _add_profiles(builder, network, config, graph)
    cache = _attach_timings(config, cache_file)
    monitor = _make_monitor(tell)
    config.progress_monitor = monitor
    plan = _serialize(builder, network, config, monitor, cuda)
    if plan is None:
        raise BackendError(
            f"TensorRT {trt.__version__} cannot build {graph.name}: {said(problems)}; if memory ran out, "
            "lower --workspace-mib or close what else uses the GPU"
        )
    write_whole(cache_file, memoryview(cache.serialize()).tobytes())
    return memoryview(plan)


def _configure(config: trt.IBuilderConfig, options: BuildOptions) -> None:
    import tensorrt as trt

    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    config.builder_optimization_level = options.optimization_level
    if options.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:  # TensorRT sets it by itself
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS


def _add_profiles(
    builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig, graph: Graph
) -> None:
    """One profile per variant, in the order of the variants; a graph without symbols needs none."""
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.is_shape_tensor:
            raise BackendError(
                f"{graph.name}: TensorRT takes {tensor.name} for a shape; counts are dimensions, not values"
            )
    if not has_profiles(graph):
        return
    for expected, variant in enumerate(graph.variants):
        shapes = graph.shapes(variant)
        profile = builder.create_optimization_profile()
        for tensor in graph.inputs:
            shape = shapes[tensor.name]
            profile.set_shape(tensor.name, min=shape, opt=shape, max=shape)
        if config.add_optimization_profile(profile) != expected:
            raise BackendError(f"{graph.name}: TensorRT refuses the profile of {variant}: {shapes}")


def _attach_timings(config: trt.IBuilderConfig, file: Path) -> trt.ITimingCache:
    """Kernel timings of earlier builds; those of another GPU or TensorRT are left aside, and replaced."""
    kept = file.read_bytes() if file.is_file() else b""
    cache = config.create_timing_cache(kept)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _make_monitor(tell: Callable[[str, float], None]) -> Any:
    """TensorRT's progress monitor: reports the innermost phase, and stops the build once `stopped` is set."""
    import tensorrt as trt

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped = False
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            tell(phase_name, 0.0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            tell(phase_name, (step + 1) / max(self.steps.get(phase_name, 1), 1))
            return not self.stopped

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def _serialize(
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    config: trt.IBuilderConfig,
    monitor: Any,
    cuda: Cuda,
) -> trt.IHostMemory | None:
    """Build beside the main thread, which stays free to notice an interrupt and stop the builder."""

    def build() -> trt.IHostMemory | None:
        cuda.select()
        return builder.build_serialized_network(network, config)

    with ThreadPoolExecutor(1, thread_name_prefix="tensorrt-build") as pool:
        # An interrupt may come as early as in submit, with the builder running already.
        try:
            future = pool.submit(build)
            while not future.done():
                wait([future], timeout=_POLL_SECONDS)
        except KeyboardInterrupt:
            monitor.stopped = True
            raise
        return future.result()
