from __future__ import annotations

import pytest

pytest.importorskip("onnxruntime")

from vla_autoprune.profiling.ceilings import _device_copy, better
from vla_autoprune.profiling.document import Ceiling, Work
from vla_autoprune.profiling.percentiles import distribution
from vla_autoprune.profiling.roofline import amdahl, ceiling_doubts, least_s, reached

CEILING = Ceiling(flops_per_s=1e11, bytes_per_s=1e10, source="made up")


def test_work_meets_the_ceiling_that_takes_longer():
    assert least_s(Work(flops=10**11, bytes=10**9), CEILING) == (1.0, "compute")
    assert least_s(Work(flops=10**9, bytes=10**10), CEILING) == (1.0, "memory")
    assert least_s(Work(flops=1, bytes=1), Ceiling(bytes_per_s=1e10, source="copy only")) is None


def test_a_stage_reaches_its_work_over_its_time(tiny_profile):
    stage = tiny_profile.buckets[0].stage("stage_01")
    stage = stage.model_copy(update={"work": Work(flops=10**9, bytes=10**6), "time": distribution([40.0])})
    found = reached(stage, CEILING)
    assert found.flops_per_s == pytest.approx(25e9) and found.bytes_per_s == pytest.approx(25e6)
    assert found.bound == "compute" and found.share == pytest.approx(0.25)
    assert reached(tiny_profile.buckets[0].stage("vision"), CEILING) is None


def with_times(bucket, **ms):
    """The bucket with one stage of so many milliseconds per phase."""
    stages = [next(stage for stage in bucket.stages if stage.phase == phase) for phase in ms]
    times = [distribution([value]) for value in ms.values()]
    new = [stage.model_copy(update={"time": time}) for stage, time in zip(stages, times, strict=True)]
    return bucket.model_copy(update={"stages": tuple(new), "total": distribution([sum(ms.values())])})


def test_amdahl_is_what_remains_without_the_prefill(tiny_profile):
    full, other, fast = tiny_profile.buckets[:3]
    buckets = (
        with_times(full, vision=20.0, prefill=60.0, decode=20.0),
        with_times(other, vision=20.0, prefill=30.0, decode=20.0),
        with_times(fast, vision=20.0, prefill=10.0, decode=20.0),
    )
    found = amdahl(tiny_profile.model_copy(update={"buckets": buckets}))
    assert found.prefill_share == pytest.approx(0.6) and found.limit == pytest.approx(2.5)
    assert found.bucket == fast.name and found.speed_up == pytest.approx(2.0)
    assert str(found) == (
        "prefill is 60% of an unpruned plan: without it a plan would be 2.50 times as fast, "
        f"{fast.name} is 2.00 times"
    )
    assert amdahl(tiny_profile.model_copy(update={"buckets": buckets[1:]})) is None


def test_arithmetic_above_its_ceiling_puts_the_ceilings_in_doubt(tiny_profile):
    assert ceiling_doubts(tiny_profile) == ()
    stage = tiny_profile.buckets[0].stage("stage_02")
    rate = stage.work.flops / (stage.time.p50 / 1e3)
    busy = Ceiling(flops_per_s=rate / 2, bytes_per_s=1e15, source="on a busy machine")
    (doubt,) = ceiling_doubts(tiny_profile.model_copy(update={"ceiling": busy}))
    assert "of the ceiling of arithmetic" in doubt
    slow_memory = Ceiling(flops_per_s=1e15, bytes_per_s=1e3, source="memory above its ceiling is no doubt")
    assert ceiling_doubts(tiny_profile.model_copy(update={"ceiling": slow_memory})) == ()


def test_of_two_measurements_the_better_counts():
    found = better(CEILING, Ceiling(flops_per_s=2e11, bytes_per_s=5e9, source="again"))
    assert (found.flops_per_s, found.bytes_per_s) == (2e11, 1e10) and "measured twice" in found.source
    assert better(Ceiling(source="a"), Ceiling(bytes_per_s=3.0, source="b")).flops_per_s is None


def test_a_copy_is_measured_through_the_backend(planner):
    assert 1e8 < _device_copy(planner.backend) < 1e13
