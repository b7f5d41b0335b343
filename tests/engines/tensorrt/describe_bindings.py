"""Describe the bindings of TensorRT and CUDA: names, signatures and enum members, read off the real packages.

    python tests/engines/tensorrt/describe_bindings.py [--check] [--cache FOLDER]

writes `bindings/*.json` beside this file. The wheels come from the package index into a cache folder outside
the repository (VLA_WHEEL_CACHE). TensorRT's libraries are not needed: the bindings load against stubs,
compiled here, that export the entry points and do nothing. To renew: change VERSIONS, run, commit the files.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "bindings"

VERSIONS = {
    "tensorrt-10.3.0": ("tensorrt-cu12-bindings==10.3.0",),  # JetPack 6
    "tensorrt-10.13.3.9": ("tensorrt-cu13-bindings==10.13.3.9",),  # JetPack 7
    "tensorrt-11.4.0.106": ("tensorrt-cu13-bindings==11.4.0.106",),
    "cuda-12.6.2.post1": ("cuda-python==12.6.2.post1",),  # JetPack 6
    "cuda-12.9.10": ("cuda-bindings==12.9.10", "cuda-pathfinder"),
    "cuda-13.0.2": ("cuda-bindings==13.0.2", "cuda-pathfinder"),  # JetPack 7
    "cuda-13.5.0": ("cuda-bindings==13.5.0", "cuda-pathfinder"),
}

PIP_DOWNLOAD = (
    *(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"),
    *("--retries", "1", "--timeout", "10", "--disable-pip-version-check"),
)
DOWNLOAD_S = 90
"""Longest for one package; the largest has some 30 MB."""

STUBS = {
    "nvinfer": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ),
    "nvinfer_plugin": ("initLibNvInferPlugins",),
    "nvonnxparser": (
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ),
}
"""Entry points the bindings ask of TensorRT's libraries; ours return null."""

CLASSES = (
    "Builder",
    "BuilderFlag",
    "DataType",
    "ExecutionContextAllocationStrategy",
    "HardwareCompatibilityLevel",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProgressMonitor",
    "ITensor",
    "ITimingCache",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "ParserError",
    "Runtime",
    "TensorIOMode",
)
"""Of TensorRT's; a class that our code uses and that is not here fails the conformance test."""

CUDA_ENUMS = ("cudaError_t", "cudaMemcpyKind", "cudaStreamCaptureMode")
CUDA_CONSTANTS = re.compile(r"cuda(Stream|Event|HostAlloc)[A-Z][a-z]+\w*$")
CUDA_FUNCTIONS = re.compile(
    r"cuda(Malloc|Free|Mem|HostAlloc|Stream|Graph(Launch|Instantiate|Destroy|Exec)|Event|Get|SetDevice|Device)\w*$"
)
CUDA_PROPERTIES = ("major", "minor", "multiProcessorCount", "name")


class Unavailable(Exception):
    """The wheels or a C compiler cannot be had here."""


_offline: list[str] = []
"""Why the package index could not be reached: it is not asked again."""


def describe(name: str, cache: Path) -> dict:
    """The description of one version, made in a process that imports the real package.

    Raises:
        Unavailable: wheels or compiler are missing.
    """
    kind = name.split("-")[0]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--inside", kind],
        env=environment(cache, name),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{name} cannot be described: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def environment(cache: Path, *names: str) -> dict[str, str]:
    """Variables under which a process can import the real packages.

    Raises:
        Unavailable: wheels or compiler are missing.
    """
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(str(_unpacked(name, cache)) for name in names)}
    for name in names:
        if name.startswith("tensorrt"):
            found["LD_LIBRARY_PATH"] = str(_stubs(name.split("-")[1].split(".")[0], cache))
    return found


def text_of(description: dict) -> str:
    """The committed form."""
    return json.dumps(description, indent=1, sort_keys=True) + "\n"


def default_cache() -> Path:
    """Where wheels are kept."""
    return Path(os.environ.get("VLA_WHEEL_CACHE", Path.home() / ".cache" / "vla_autoprune" / "wheels"))


def _unpacked(name: str, cache: Path) -> Path:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    site = cache / f"{name}-{tag}"
    if site.is_dir():
        return site
    if sys.platform != "linux":
        raise Unavailable("the wheels described are those of Linux")
    wheels = cache / f".{name}-{tag}.{os.getpid()}"
    try:
        for requirement in VERSIONS[name]:
            _download(requirement, wheels / "wheels", cache)
        for wheel in (wheels / "wheels").glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(wheels / "site")
        try:
            (wheels / "site").replace(site)
        except OSError:
            if not site.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(wheels, ignore_errors=True)
    return site


def _download(requirement: str, folder: Path, cache: Path) -> None:
    missing = f"{requirement} is not in {cache}"
    if _offline:
        raise Unavailable(f"{missing}; {_offline[0]}")
    try:
        done = subprocess.run(
            [*PIP_DOWNLOAD, "-d", str(folder), requirement],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        _offline.append(f"downloading takes longer than {DOWNLOAD_S} s")
        raise Unavailable(f"{missing}; {_offline[0]}") from error
    if done.returncode:
        why = f"it cannot be downloaded: {done.stderr.strip()[-200:]}"
        if "Retrying" in done.stderr:
            _offline.append(f"the package index could not be reached for {requirement}")
        raise Unavailable(f"{missing}; {why}")


def _stubs(major: str, cache: Path) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Unavailable("there is no C compiler to make TensorRT's stub libraries")
    folder = cache / f"stubs-{major}"
    folder.mkdir(parents=True, exist_ok=True)
    for library, entries in STUBS.items():
        target = folder / f"lib{library}.so.{major}"
        if target.is_file():
            continue
        source = "".join(f"void *{entry}(void) {{ return 0; }}\n" for entry in entries)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        flags = ("-shared", "-fPIC", f"-Wl,-soname,{target.name}", "-x", "c", "-", "-o", str(partial))
        subprocess.run([compiler, *flags], input=source, text=True, check=True, timeout=60)
        partial.replace(target)
    return folder


def _tensorrt() -> dict:
    import tensorrt_bindings as trt

    return {
        "version": trt.__version__,
        "classes": {name: _class(getattr(trt, name)) for name in CLASSES},
        "functions": {},
        "constants": {"__version__": trt.__version__},
    }


def _class(found: type) -> dict:
    members = getattr(found, "__members__", None)
    if members is not None:
        return {"enum": {name: int(value) for name, value in members.items()}}
    methods, properties, nested = {}, [], {}
    for name in dir(found):
        value = inspect.getattr_static(found, name)
        if name.startswith("_") and name != "__init__":
            continue
        if isinstance(value, property):
            properties.append(name)
        elif isinstance(value, type):
            nested[name] = _class(value)
        elif callable(getattr(found, name)):
            methods[name] = _overloads(name, getattr(found, name).__doc__ or "")
    return {"methods": methods, "properties": properties, "classes": nested}


def _overloads(name: str, doc: str) -> list[dict]:
    """Signatures off pybind11's docstrings: parameters after self, those with defaults, the result."""
    lines = re.findall(rf"^(?:\d+\. )?{re.escape(name)}\((.*)\)(?: -> (.*))?$", doc, flags=re.M)
    result = []
    for given, returns in lines:
        if given == "*args, **kwargs":
            continue
        # Commas inside of List[...] and <...> part nothing.
        plain = re.sub(r"<[^>]*>", "…", re.sub(r"\[[^\[\]]*\]", "", re.sub(r"\[[^\[\]]*\]", "", given)))
        parameters = [part.strip() for part in plain.split(",") if part.strip()]
        named = [(part.split(":")[0].split("=")[0].strip(), "=" in part) for part in parameters]
        named = [item for item in named if item[0] not in ("self", "*", "/")]
        gives = "list" if "[" in returns else (returns or "None").split(".")[-1].strip()
        result.append(
            {
                "parameters": [parameter for parameter, _ in named],
                "optional": [parameter for parameter, optional in named if optional],
                "returns": gives,
            }
        )
    return result


def _cuda() -> dict:
    import cuda.bindings
    from cuda.bindings import runtime

    functions, constants = {}, {}
    for name in dir(runtime):
        value = getattr(runtime, name)
        if isinstance(value, int) and not isinstance(value, type) and CUDA_CONSTANTS.match(name):
            constants[name] = int(value)
        elif callable(value) and not isinstance(value, type) and CUDA_FUNCTIONS.match(name):
            first = (value.__doc__ or "").split("\n")[0]
            found = re.fullmatch(rf"{name}\((.*)\)", first)
            if found:
                parts = [part.split(":")[0].strip() for part in found[1].split(",") if part.strip()]
                parameters = [part.split("=")[0].split()[-1] for part in parts]
                functions[name] = [{"parameters": parameters, "optional": [], "returns": "tuple"}]
    classes = {
        name: {"enum": {member.name: int(member) for member in getattr(runtime, name)}} for name in CUDA_ENUMS
    }
    properties = [name for name in CUDA_PROPERTIES if hasattr(runtime.cudaDeviceProp, name)]
    classes["cudaDeviceProp"] = {"methods": {}, "properties": properties, "classes": {}}
    version = cuda.bindings.__version__
    return {"version": version, "classes": classes, "functions": functions, "constants": constants}


def main() -> None:
    """Write the descriptions, or say which differ from the committed ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--inside", choices=("tensorrt", "cuda"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(_tensorrt() if options.inside == "tensorrt" else _cuda()))
        return
    FOLDER.mkdir(exist_ok=True)
    for name in VERSIONS:
        text, file = text_of(describe(name, options.cache)), FOLDER / f"{name}.json"
        if options.check:
            print(f"{name}: {'same' if file.read_text() == text else 'DIFFERS'}")
        else:
            file.write_text(text)
            print(f"{file}: {len(text)} bytes")


if __name__ == "__main__":
    main()
