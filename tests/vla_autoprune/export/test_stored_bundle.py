"""The bundle in tests/data is what the export makes today; VLA_WRITE_STORED_BUNDLE=1 writes it anew."""

from __future__ import annotations

import os
import shutil

import pytest

torch = pytest.importorskip("torch")


def test_the_stored_bundle_is_todays_export(repository, tiny_bundles):
    from vla_autoprune.bundle import load_bundle

    path = repository / "tests" / "data" / "tiny_bundle"
    fresh = tiny_bundles["plain"]
    if os.environ.get("VLA_WRITE_STORED_BUNDLE"):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(fresh.path, path)
    stored = load_bundle(path)
    if stored.manifest.options.versions["torch"] != torch.__version__:
        pytest.skip("random weights may differ between versions of torch")
    assert stored.recipe == fresh.recipe, "set VLA_WRITE_STORED_BUNDLE=1 and run this test to renew it"
    assert stored.graphs == fresh.graphs
