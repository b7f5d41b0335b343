"""Golden cases of the published reference: every case in the folder becomes a test of its own.

The folder is tests/golden unless VLA_GOLDEN_DIR names another one that holds autoprune/.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GOLDEN = Path(os.environ.get("VLA_GOLDEN_DIR", Path(__file__).parents[2] / "golden")) / "autoprune"

CASES = {
    "information_case": ("mi_cases.json", "cases"),
    "schedule_case": ("schedule_cases.json", "cases"),
    "text_rank_case": ("parts_cases.json", "text_rank"),
    "first_layer_case": ("parts_cases.json", "first_layer"),
    "grouping_case": ("parts_cases.json", "grouping"),
    "trace": ("e2e_traces.json", "traces"),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, (file, key) in CASES.items():
        if name in metafunc.fixturenames:
            cases = json.loads((GOLDEN / file).read_text())[key]
            metafunc.parametrize(name, cases, ids=[f"{name}-{case['id']}" for case in cases])


@pytest.fixture(scope="session")
def information_arrays() -> Mapping[str, np.ndarray]:
    return np.load(GOLDEN / "mi_cases.npz")


@pytest.fixture(scope="session")
def parts_arrays() -> Mapping[str, np.ndarray]:
    return np.load(GOLDEN / "parts_arrays.npz")


@pytest.fixture(scope="session")
def trace_arrays() -> Mapping[str, np.ndarray]:
    return np.load(GOLDEN / "e2e_arrays.npz")


@pytest.fixture(scope="session")
def trace_weights() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "e2e_weights.npz") as stored:
        return {name: stored[name].astype(np.float32) for name in stored.files}


@pytest.fixture(scope="session")
def trace_models() -> Mapping[str, Mapping[str, Any]]:
    return json.loads((GOLDEN / "e2e_traces.json").read_text())["models"]
