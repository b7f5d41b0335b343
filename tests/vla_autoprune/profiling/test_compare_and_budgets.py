from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from vla_autoprune.errors import InputError
from vla_autoprune.profiling.budgets import Budgets, check_budgets, read_budgets
from vla_autoprune.profiling.compare import compare
from vla_autoprune.profiling.percentiles import distribution


def with_times(profile, seed, slower=None, factor=1.0):
    """The profile with times drawn anew: each stage 1 ms ± 2 %, one of them slower in all buckets."""
    generator = np.random.default_rng(seed)
    buckets = []
    for bucket in profile.buckets:
        stages = []
        for stage in bucket.stages:
            ms = generator.normal(1.0, 0.02, 100) * (factor if stage.name == slower else 1.0)
            stages.append(stage.model_copy(update={"ms": tuple(ms), "time": distribution(ms)}))
        total = np.sum([stage.ms for stage in stages], axis=0)
        new = {"stages": tuple(stages), "total_ms": tuple(total), "total": distribution(total)}
        buckets.append(bucket.model_copy(update=new))
    return profile.model_copy(update={"buckets": tuple(buckets)})


def test_a_slower_stage_is_the_regression_and_the_rest_is_not(tiny_profile):
    base, slow = with_times(tiny_profile, 0), with_times(tiny_profile, 1, "stage_01", 1.3)
    assert compare(base, with_times(tiny_profile, 2)).regressions == ()
    found = compare(base, slow)
    assert {change.what for change in found.regressions} == {"stage_01"}
    assert len(found.regressions) == len(tiny_profile.buckets)
    for change in found.regressions:
        assert change.ratio.ratio == pytest.approx(1.3, abs=0.03) and change.ratio.low > 1.25
    assert {c.what for c in compare(slow, base).changes if c.verdict == "faster"} == {"stage_01"}
    # The prefill phase moves by 0.3 of about ten stages, within tolerance; without any it is seen.
    assert {"prefill", "total"} <= {change.what for change in compare(base, slow, tolerance=0.0).regressions}


def test_conditions_that_differ_are_named(tiny_profile):
    other = tiny_profile.conditions.model_copy(update={"device": "another", "input_sha256": "f" * 64})
    found = compare(tiny_profile, tiny_profile.model_copy(update={"conditions": other}))
    assert any(line.startswith("device: ") for line in found.differences)
    assert any("ffffffffffff…" in line for line in found.differences)


def test_what_only_one_profile_has_is_named(tiny_profile):
    full, *pruned = tiny_profile.buckets
    fewer = full.model_copy(update={"stages": full.stages[1:]})
    base = tiny_profile.model_copy(update={"buckets": (full, *pruned[1:])})
    found = compare(base, tiny_profile.model_copy(update={"buckets": (fewer, *pruned)}))
    assert f"bucket, only in B: {pruned[0].name}" in found.differences
    assert f"stage of full, only in A: {full.stages[0].name}" in found.differences
    assert not {change.what for change in found.changes if change.bucket == pruned[0].name}


def test_times_of_zero_have_no_ratio(tiny_profile):
    (full, *_) = tiny_profile.buckets
    ms = (1.0,) + (0.0,) * 11
    idle = full.stages[-1].model_copy(update={"ms": ms, "time": distribution(ms)})
    others = tuple(stage for stage in full.stages if stage.phase != idle.phase)
    changed = full.model_copy(update={"stages": (*others, idle)})
    found = compare(tiny_profile, tiny_profile.model_copy(update={"buckets": (changed,)}))
    assert idle.phase not in {change.what for change in found.changes}
    assert "total" in {change.what for change in found.changes}


def test_profiles_without_a_common_bucket_are_refused(tiny_profile):
    renamed = [b.model_copy(update={"name": f"other_{i}"}) for i, b in enumerate(tiny_profile.buckets)]
    with pytest.raises(InputError, match="no bucket in common: full"):
        compare(tiny_profile, tiny_profile.model_copy(update={"buckets": tuple(renamed)}))


def test_limits_are_checked_and_what_cannot_be_checked_fails(tiny_profile):
    profile = with_times(tiny_profile, 0)
    stages = len(profile.bucket("full").stages)
    budgets = Budgets.model_validate(
        {
            "total_ms": {"p50": 1.1 * stages},
            "stages_ms": {"stage_01": {"p99": 1.2, "max": 0.5}, "vision": {"p50": 5}, "flight": {"p50": 1}},
            "peak_host_mib": 1e6,
            "device_mib": 1000,
            "energy_per_plan_j": 5,
            "buckets": {"full": {"kv_mib": 1e-6}, "b1_s0": {"total_ms": {"p50": 1}}},
        }
    )
    found = {check.what: check for check in check_budgets(profile, budgets)}
    assert found["full total p50"].passed and found["full stage_01 p99"].passed
    assert found["peak host memory"].passed
    assert not found["full stage_01 max"].passed and found["full stage_01 max"].seen > 0.5
    assert "known are" in found["full flight p50"].reason
    assert "not measured" in found["device memory"].reason
    assert "no sensor" in found["full energy of a plan"].reason
    assert "profiled are full" in found["bucket b1_s0"].reason
    assert not found["full KV"].passed
    few = {c.what: c for c in check_budgets(tiny_profile, Budgets.model_validate({"total_ms": {"p99": 1e9}}))}
    assert not few["full total p99"].passed
    assert few["full total p99"].reason == "12 frames are too few, p99 needs 100"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("total_ms: {p95: 3}", r"total_ms.p95: Extra inputs are not permitted, got '3'"),
        ("total_ms: {p50: -3}", r"total_ms.p50: Input should be greater than 0, got '-3'"),
        ("total_ms: [", "is not YAML"),
        ("\udc80", "is not YAML: 'utf-8' codec can't decode byte 0x80"),
        ("total_ms: {p50: .nan}", "total_ms.p50: Input should be a finite number, got 'nan'"),
        ("", "limits nothing"),
        ("buckets: {full: {stages_ms: {vision: {}}}}", "limits nothing"),
    ],
)
def test_a_budget_file_that_makes_no_sense_is_refused(tmp_path, text, message):
    pytest.importorskip("yaml")
    path = tmp_path / "budgets.yaml"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(InputError, match=message):
        read_budgets(path)


def test_the_budget_file_of_the_documentation_is_one(repository):
    yaml = pytest.importorskip("yaml")
    page = (repository / "docs" / "profiling.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    budgets = Budgets.model_validate(yaml.safe_load(block))
    assert budgets.total_ms.p99 == 120 and budgets.buckets["b25_s0"].total_ms.p99 == 80
