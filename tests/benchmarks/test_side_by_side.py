from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest

from vla_autoprune.recipe import PromptLayout


@pytest.fixture(scope="module")
def side_by_side(repository):
    path = repository / "benchmarks" / "side_by_side.py"
    spec = importlib.util.spec_from_file_location("side_by_side", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_one_shot_keeps_text_and_each_images_quota_of_the_least_alike(side_by_side):
    spans = [("text", 3), ("visual", "A", 10), ("text", 1), ("visual", "B", 7), ("text", 6)]
    layout = PromptLayout.model_validate({"segments": spans})
    embedded = np.random.default_rng(0).normal(size=(layout.length, 8))
    length = layout.length - 2
    rows = side_by_side.one_shot(embedded, layout, length, 0.5)
    assert (np.diff(rows) > 0).all() and rows.max() < length
    text = [row for row in layout.text_positions if row < length]
    assert set(text) <= set(rows) and len(rows) == len(text) + 5 + 4
    # Ten copies of one direction beside one of another: the other is the least like the pivots.
    alike = np.ones((layout.length, 8)) * 10
    odd = layout.visual_positions[9]
    alike[odd] = [1, -1, 1, -1, 1, -1, 1, -1]
    assert odd in side_by_side.one_shot(alike, layout, length, 0.5)
    assert layout.visual_positions[8] not in side_by_side.one_shot(alike, layout, length, 0.5)
