from __future__ import annotations

import re

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("matplotlib")

from vla_autoprune.profiling.document import Ceiling
from vla_autoprune.profiling.report import profile_page


def test_the_page_has_every_plot_stage_and_note(tiny_profile):
    page = profile_page(tiny_profile)
    assert page.count("<svg") == 4 and page.startswith("<!doctype html>")
    for bucket in tiny_profile.buckets:
        assert bucket.name in page
    for stage in tiny_profile.buckets[0].stages:
        assert f"<th>{stage.name}</th>" in page
    assert "p99 needs 100" in page and "of an unpruned plan" in page
    assert "currentColor" in page and not re.search(r"(src|href)=\"https?:", page)


def test_without_ceilings_the_page_says_so_instead_of_a_roof(tiny_profile):
    unknown = tiny_profile.model_copy(update={"ceiling": Ceiling(source="nobody measured")})
    page = profile_page(unknown)
    assert page.count("<svg") == 3 and "not both measured: nobody measured" in page
