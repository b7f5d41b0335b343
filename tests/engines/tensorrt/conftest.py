"""Descriptions of the real bindings, and modules beside the tests."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent


def beside(name: str) -> ModuleType:
    """A module of this folder; tests are imported by path, so that names in it do not find each other."""
    full = f"tensorrt_tests_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, HERE / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


def descriptions(kind: str) -> dict[str, dict]:
    """Committed descriptions of TensorRT's or CUDA's bindings, by version."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(HERE.glob(f"bindings/{kind}-*.json"))}


@pytest.fixture(scope="session")
def api_walk() -> ModuleType:
    return beside("api_walk")


@pytest.fixture(scope="session")
def describe_bindings() -> ModuleType:
    return beside("describe_bindings")


@pytest.fixture(scope="session")
def doubles() -> ModuleType:
    return beside("doubles")


@pytest.fixture
def bundle(stored_bundle, tmp_path):
    """A copy of the stored bundle: engines are written into it."""
    folder = shutil.copytree(stored_bundle.path, tmp_path / "bundle")
    return dataclasses.replace(stored_bundle, path=folder)


@pytest.fixture
def make_double(doubles, api_walk, monkeypatch):
    """Installs doubles of TensorRT and CUDA for a bundle, of any described version."""

    devices = []

    def make(bundle, tensorrt="tensorrt-10.3.0", cuda="cuda-12.6.2.post1", **gpu):
        devices.append(doubles.Gpu(descriptions("cuda")[cuda], api_walk.mismatch, **gpu))
        double = doubles.TensorRt(descriptions("tensorrt")[tensorrt], api_walk.mismatch, devices[-1], bundle)
        double.install(monkeypatch)
        return double

    yield make
    for device in devices:
        device.check_freed()


@pytest.fixture
def built(bundle, make_double):
    """A bundle whose engines the double has built."""
    from engines.tensorrt.build import build_engines
    from engines.tensorrt.engine_files import BuildOptions

    double = make_double(bundle)
    build_engines(bundle, BuildOptions())
    return double
