"""What every test shares: one thread per process, and where golden numbers and optional data lie."""

from __future__ import annotations

import os
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of golden numbers; VLA_GOLDEN_DIR replaces the one in the repository."""
    return Path(os.environ.get("VLA_GOLDEN_DIR", REPOSITORY / "tests" / "golden"))


@pytest.fixture(scope="session")
def shared_data_dir() -> Path:
    """Folder with data that is not in the repository (VLA_SHARED_DIR); tests skip without it."""
    folder = Path(os.environ.get("VLA_SHARED_DIR", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set VLA_SHARED_DIR to run this test")
    return folder
