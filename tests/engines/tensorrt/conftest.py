"""Descriptions of the real bindings, and modules beside the tests."""

from __future__ import annotations

import importlib.util
import json
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
