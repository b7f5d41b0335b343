"""The bucket under a deadline: what is asked for, what fits, what is learnt."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from engines.onnxruntime import OnnxRuntimeBackend
from vla_autoprune.frame import CAMERAS, Command, EgoState, Frame, Rehearsal
from vla_autoprune.recipe import FULL, bucket_for
from vla_autoprune.runtime.deadline import RECENT_PLANS, BucketLatencies, measure_latencies, rest_ms
from vla_autoprune.runtime.planner import OVERRIDDEN, Planner


@pytest.fixture(scope="module")
def planner(stored_bundle):
    return Planner(stored_bundle, OnnxRuntimeBackend(stored_bundle, threads=1), budget=0.6)


@pytest.fixture(scope="module")
def frame() -> Frame:
    generator = np.random.default_rng(3)
    images = {name: generator.integers(0, 255, (90, 160, 3), dtype=np.uint8) for name in CAMERAS}
    return Frame(images, EgoState(6.0), Command.LEFT)


@pytest.fixture
def latencies(stored_bundle) -> BucketLatencies:
    """100 ms unpruned, otherwise in proportion to the budget."""
    recipe = stored_bundle.recipe
    return BucketLatencies(recipe, {bucket.name: 100 * bucket.budget for bucket in recipe.buckets})


@pytest.mark.parametrize(
    "remaining_ms,budget", [(1e3, 0.6), (60.1, 0.6), (59.9, 0.4), (40.1, 0.4), (39.9, 0.4), (-5.0, 0.4)]
)
def test_the_largest_budget_that_fits_runs(planner, frame, latencies, remaining_ms, budget):
    asked = planner.plan(frame)
    plan = planner.plan(frame, latencies.limit(lambda: remaining_ms))
    wanted = bucket_for(planner.recipe, budget, plan.complexity)
    assert plan.bucket == wanted.name
    if budget == 0.6:
        assert plan.flags == asked.flags == ()
        assert np.array_equal(plan.waypoints_in_ego, asked.waypoints_in_ego)
    else:
        assert plan.flags == (f"{OVERRIDDEN}: {wanted.name} instead of {asked.bucket}",)
        same = planner.plan_in_bucket(frame, wanted.name)
        assert np.array_equal(plan.waypoints_in_ego, same.waypoints_in_ego)


def test_an_unpruned_planner_prunes_when_it_must(planner, frame, latencies):
    plan = planner.variant(None).plan(frame, latencies.limit(lambda: 70.0))
    assert plan.bucket == bucket_for(planner.recipe, 0.6, plan.complexity).name


def test_a_slow_machine_slows_every_bucket(planner, frame, latencies):
    plan = planner.plan(frame)
    slow_ms = 3 * latencies.undisturbed_ms[plan.bucket]
    slow = dataclasses.replace(plan, timings_ms={"total": slow_ms + 50.0, "vision": 50.0})
    latencies.observe(slow)
    assert latencies.slowdown == pytest.approx(3.0)
    assert latencies.expected_ms(FULL) == pytest.approx(300.0)
    normal = dataclasses.replace(plan, timings_ms={"total": slow_ms / 3})
    for _ in range(RECENT_PLANS - 1):
        latencies.observe(normal)
    assert latencies.slowdown == pytest.approx(1.0), "one outlier does not count"
    latencies.observe(slow)
    latencies.observe(slow)
    latencies.observe(slow)
    assert latencies.slowdown > 1.2


def test_every_bucket_is_warmed_up_and_timed(planner, frame):
    seen: list[str] = []
    measured = measure_latencies(planner, frame, runs=1, progress=seen.append)
    assert seen == [bucket.name for bucket in planner.recipe.buckets] == list(measured.undisturbed_ms)
    plan = planner.plan(frame)
    timings = plan.timings_ms
    assert 0 < rest_ms(plan) < timings["total"] - timings["vision"] - timings["stage_00"]
    assert rest_ms(plan) > timings["decode"] + timings["stage_02"]


def test_what_disturbs_for_a_while_does_not_slow_every_run_of_a_bucket(planner, frame, monkeypatch):
    ran: list[str] = []

    def run(_, bucket: str) -> Rehearsal:
        ran.append(bucket)
        disturbed = 3 <= len(ran) - len(planner.recipe.buckets) <= 6
        return Rehearsal(bucket, (), 0.0, {"total": 100.0 if disturbed else 10.0}, 12)

    monkeypatch.setattr(planner, "rehearse", run)
    measured = measure_latencies(planner, frame, runs=3)
    assert set(measured.undisturbed_ms.values()) == {10.0}


def test_a_bucket_without_a_time_is_refused(stored_bundle):
    with pytest.raises(ValueError, match="bucket full is None"):
        BucketLatencies(stored_bundle.recipe, {})
