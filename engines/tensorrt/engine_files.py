"""Engine files: what TensorRT built, and beside each a record of what it was built from, by and for.

An engine is tied to the bundle, to TensorRT's version and to the GPU. `stage_01.engine` is TensorRT's own
serialized plan, so its tools read it; `stage_01.json` is the record. Both are data.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engines.tensorrt.cuda import Gpu
from vla_autoprune.bundle import ENGINES, Bundle
from vla_autoprune.contract import Graph
from vla_autoprune.errors import BackendError
from vla_autoprune.files import first_fault, write_whole

ENGINE_VERSION = 2
"""Raised whenever records or the use of profiles change; readers refuse other versions."""

TIMING_CACHE = "timing.cache"

ANY_GPU = "tensorrt-ampere-plus"
"""Folder of hardware-compatible engines."""

_GET_TENSORRT = (
    "on a Jetson it comes with JetPack (sudo apt install python3-libnvinfer, and a virtual environment made "
    "with --system-site-packages); elsewhere pip install tensorrt"
)

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class BuildOptions(BaseModel):
    """What the builder is told beyond the graphs.

    Attributes:
        workspace_mib: most device memory a kernel may use while it works; None leaves TensorRT's own limit.
        optimization_level: 0 builds fast, 5 tries most; TensorRT's own default is 3.
        tf32: products of matrices in TF32, faster and with ten bits of mantissa.
        version_compatible: newer TensorRT of the same major version may load the engines.
        hardware_compatible: any GPU from Ampere on may load them; not on a Jetson.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    workspace_mib: int | None = Field(default=None, ge=1)
    optimization_level: int = Field(default=3, ge=0, le=5)
    tf32: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False


class EngineRecord(BaseModel):
    """What an engine file is.

    Attributes:
        profiles: the graph's variants, in the order of the engine's optimisation profiles.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine_version: int
    graph: str
    bundle_id: Hash
    tensorrt_version: str
    gpu: str
    compute_capability: str
    multiprocessors: int
    options: BuildOptions
    profiles: tuple[str, ...]
    bytes: int = Field(ge=0)
    sha256: Hash
    build_seconds: float = Field(ge=0)


def require_tensorrt() -> str:
    """TensorRT's version.

    Raises:
        BackendError: the package or its libraries are absent, or older than 10.3; the message has a way out.
    """
    try:
        import tensorrt as trt
    except (ImportError, OSError) as error:
        raise BackendError(f"TensorRT cannot be imported ({error}); {_GET_TENSORRT}") from error
    version = str(trt.__version__)
    if _numbers(version) < (10, 3):
        raise BackendError(f"TensorRT is {version}, at least 10.3 is needed; {_GET_TENSORRT}")
    return version


def how_to_build(bundle: Bundle) -> str:
    """What to do where engines are missing or do not fit: a sentence's end."""
    return f"build engines on this machine with: vla-autoprune build {bundle.path} --backend tensorrt"


def engine_folder(bundle: Bundle, gpu: Gpu, options: BuildOptions) -> Path:
    """Where a bundle's engines for a GPU are built; those for any GPU have a folder that any GPU finds."""
    if options.hardware_compatible:
        return bundle.path / ENGINES / ANY_GPU
    name = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    capability = gpu.compute_capability.replace(".", "")
    return bundle.path / ENGINES / f"tensorrt-{name}-sm{capability}-{gpu.multiprocessors}mp"


def find_engines(bundle: Bundle, gpu: Gpu) -> Path:
    """Where the engines to load lie: those built for this GPU, else those for any, should they be there."""
    own, any_gpu = engine_folder(bundle, gpu, BuildOptions()), bundle.path / ENGINES / ANY_GPU
    return any_gpu if any_gpu.is_dir() and not own.is_dir() else own


def has_profiles(graph: Graph) -> bool:
    """Whether a graph has symbols; the engine of one without gets a profile from TensorRT itself."""
    return any(isinstance(size, str) for tensor in graph.inputs for size in tensor.shape)


def write_engine(folder: Path, record: EngineRecord, plan: Any) -> None:
    """Write an engine and its record; a reader never meets half of either."""
    write_whole(folder / f"{record.graph}.engine", plan)
    write_whole(folder / f"{record.graph}.json", (record.model_dump_json(indent=1) + "\n").encode())


def digest(plan: Any) -> str:
    """SHA-256 of an engine."""
    return hashlib.sha256(plan).hexdigest()


def read_record(folder: Path, graph: str, again: str) -> EngineRecord:
    """The record of a graph's engine.

    Args:
        folder: where engines lie.
        graph: its name.
        again: the build command, for messages.

    Raises:
        BackendError: it is missing or not a record of this version.
    """
    path = folder / f"{graph}.json"
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise BackendError(
            f"{path} cannot be read ({error.strerror}): no engine has been built here; {again}"
        ) from error
    except ValueError as error:
        raise BackendError(f"{path} is truncated or not JSON ({error}); {again}") from error
    version = content.get("engine_version") if isinstance(content, dict) else None
    if version != ENGINE_VERSION:
        raise BackendError(
            f"{path}: engine_version is {version}, this library reads {ENGINE_VERSION}; {again}"
        )
    try:
        return EngineRecord.model_validate(content)
    except ValidationError as error:
        raise BackendError(f"{path}: {first_fault(error)}; {again}") from error


def require_fit(record: EngineRecord, path: Path, bundle: Bundle, gpu: Gpu, tensorrt: str) -> None:
    """Refuse an engine of another bundle, TensorRT or GPU before it is deserialized.

    Args:
        record: the engine's.
        path: its file, for messages.
        bundle: what is to run.
        gpu: what it is to run on.
        tensorrt: version of the package.

    Raises:
        BackendError: something differs; the message has both values and the build command.
    """
    again = how_to_build(bundle)
    variants = tuple(bundle.graphs[record.graph].variants)
    facts: list[tuple[str, Any, Any]] = [
        ("bundle", record.bundle_id[:12], bundle.manifest.bundle_id[:12]),
        ("recipe's variants", ", ".join(record.profiles), ", ".join(variants)),
    ]
    if not (record.options.version_compatible and _newer_of_same_major(tensorrt, record.tensorrt_version)):
        facts.append(("TensorRT", record.tensorrt_version, tensorrt))
    if not record.options.hardware_compatible:
        facts.append(("GPU", record.gpu, gpu.name))
        facts.append(("compute capability", record.compute_capability, gpu.compute_capability))
        facts.append(("multiprocessors", record.multiprocessors, gpu.multiprocessors))
    elif _numbers(gpu.compute_capability) < (8, 0):
        facts.append(("compute capability", "8.0 or newer", gpu.compute_capability))
    for what, built, here in facts:
        if built != here:
            raise BackendError(f"{path} was built for {what} {built}, here it is {here}; {again}")


def read_engine(path: Path, record: EngineRecord, again: str) -> NDArray[np.uint8]:
    """An engine's bytes, memory-mapped, after a check that they are all there and unchanged.

    Raises:
        BackendError: the file is missing, truncated or another one.
    """
    try:
        plan = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise BackendError(f"{path} cannot be read ({error}); {again}") from error
    if plan.size != record.bytes:
        what = "truncated" if plan.size < record.bytes else "longer than it should be"
        raise BackendError(f"{path} is {what}: {plan.size} bytes, its record says {record.bytes}; {again}")
    if digest(plan) != record.sha256:
        raise BackendError(f"{path} is not the engine its record describes, or has been edited; {again}")
    return plan


def is_current(
    folder: Path, bundle: Bundle, graph: Graph, gpu: Gpu, tensorrt: str, options: BuildOptions
) -> bool:
    """Whether an engine of these options is there and would load."""
    again = how_to_build(bundle)
    path = folder / f"{graph.name}.engine"
    try:
        record = read_record(folder, graph.name, again)
        require_fit(record, path, bundle, gpu, tensorrt)
        read_engine(path, record, again)
    except BackendError:
        return False
    return record.options == options


def _newer_of_same_major(version: str, than: str) -> bool:
    here, there = _numbers(version), _numbers(than)
    return here[0] == there[0] and here >= there


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
