from __future__ import annotations

import re
import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from vla_autoprune.errors import InputError, RecipeError
from vla_autoprune.profiling.document import BucketProfile, Profile, read_profile, write_profile
from vla_autoprune.profiling.measure import (
    ACCOUNTED_TOLERANCE,
    _bucket_profile,
    _work,
    frames_hash,
    synthetic_frames,
)
from vla_autoprune.profiling.stage_work import SUMS
from vla_autoprune.pruning.work import layer_parameters, prefill_flops
from vla_autoprune.recipe import rows_into_layers


@pytest.fixture(scope="module")
def around_steps(planner):
    """From an `Around` to a planner on a pipeline of its own."""
    from vla_autoprune.runtime.pipeline import Pipeline
    from vla_autoprune.runtime.planner import Planner

    def make(around):
        pipeline = Pipeline(planner.bundle, planner.backend, around)
        return Planner(planner.bundle, planner.backend, pipeline=pipeline)

    return make


def shares_of(bucket):
    return np.sum([stage.ms for stage in bucket.stages], axis=0) / np.array(bucket.total_ms)


def test_stages_sum_to_the_total(around_steps, make_profile):
    @contextmanager
    def slower(step):
        # Taking a step's time costs microseconds, which would count in steps as short as the tiny model's.
        if step not in SUMS:
            time.sleep(0.001)
        yield

    (bucket,) = make_profile(around_steps(slower), buckets=("full",)).buckets
    # Between stages other processes may run; the frame they disturb least shows what is the plan's own.
    assert 1 - ACCOUNTED_TOLERANCE < shares_of(bucket).max() <= 1


def test_every_stage_is_told_apart_and_none_is_counted_twice(tiny_profile):
    for bucket in tiny_profile.buckets:
        shares = shares_of(bucket)
        assert shares.max() < 1.001
        assert bucket.accounted == pytest.approx(np.median(shares), abs=1e-3)
        names = {stage.name for stage in bucket.stages}
        assert {"preprocess", "vision", "stage_00", "head", "choose", "decode_head", "detokenise"} <= names
        assert not names & {"total", "prefill", "decode"}
        assert all(len(stage.ms) == bucket.total.count == 12 for stage in bucket.stages)


STAGES = {
    "input": ("preprocess", "prompt"),
    "vision": ("vision",),
    "prefill": ("embed", "stage_00", "store_00", "select_00", "stage_01", "stage_02", "head", "check"),
    "decode": ("decode_embed", "decode_stage_01", "decode_head", "decode_store", "decode_check"),
    "answer": ("choose", "detokenise"),
}
"""A stage of every kind, by the phase that docs/profiling.md puts it in."""


class SleepingClock:
    """Goes on while a step sleeps by it, and stands still otherwise: other programs cannot disturb it."""

    def __init__(self):
        self.now_s, self.slow, self._slept = 1.0, "", False

    @contextmanager
    def around(self, step):
        """5 ms in the step that is slow, the first time that it comes in a plan."""
        if step == "total":
            self._slept = False
        if step == self.slow and not self._slept:
            self._slept = True
            self.now_s += 0.005
        yield


@pytest.fixture(scope="module")
def clocked(around_steps):
    clock = SleepingClock()
    return clock, around_steps(clock.around)


@pytest.mark.parametrize(("phase", "stage"), [(p, stage) for p, stages in STAGES.items() for stage in stages])
def test_an_injected_sleep_shows_where_it_is_and_nowhere_else(
    clocked, make_profile, monkeypatch, phase, stage
):
    clock, planner = clocked
    clock.slow = stage
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now_s)
    (found,) = make_profile(planner, frames=2, buckets=("b40_s1",)).buckets
    for each in found.stages:
        assert each.ms == pytest.approx([5.0 if each.name == stage else 0.0] * 2, abs=1e-3), each.name
    for each in STAGES:
        assert found.frames_ms(each) == pytest.approx([5.0 if each == phase else 0.0] * 2, abs=1e-3), each
    assert found.total_ms == pytest.approx([5.0] * 2, abs=1e-3) and found.accounted == pytest.approx(1.0)


def test_a_real_sleep_takes_its_time_in_stage_phase_and_total(around_steps, make_profile):
    @contextmanager
    def slower(step):
        if step == "stage_01":
            time.sleep(0.005)
        yield

    (found,) = make_profile(around_steps(slower), frames=3, buckets=("b40_s1",)).buckets
    for ms in (found.stage("stage_01").ms, found.frames_ms("prefill"), found.total_ms):
        assert min(ms) >= 5.0


def test_every_stage_is_in_the_table_of_the_documentation(tiny_profile, repository):
    rows = {}
    for line in (repository / "docs" / "profiling.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 3 and cells[1] in STAGES:
            rows |= {re.sub(r"\d\d", "00", name): cells[1] for name in re.findall(r"`(\w+)`", cells[0])}
    for bucket in tiny_profile.buckets:
        for stage in bucket.stages:
            assert rows[re.sub(r"\d\d", "00", stage.name)] == stage.phase


def test_answers_of_different_length_count_by_their_own_tokens(planner, small_frames):
    whole = planner.plan_in_bucket(small_frames[0], "full")
    assert whole.answer_tokens == planner.codec.length
    times = dict(whole.timings_ms) | {"decode": 22.0}
    one_token = {name: ms for name, ms in times.items() if not name.startswith("decode")}
    plans = [
        replace(whole, answer_tokens=tokens, timings_ms=ms)
        for tokens, ms in ((1, one_token), (12, times), (12, times), (3, times))
    ]
    found = _bucket_profile(planner, planner.recipe.bucket("full"), plans, ())
    assert found.decode_per_token.count == 3 and found.decode_per_token.max == 11.0
    assert found.decode_per_token.p50 == 2.0
    stage = found.stage("decode_stage_00")
    assert stage.ms[0] == 0 and stage.runs_per_plan == 6  # the median of 0, 2, 11 and 11
    assert stage.work == _work(planner.bundle, planner.recipe.bucket("full"), 6)["decode_stage_00"]


def test_traffic_is_counted_in_the_bundles_precision(planner):
    bundle, bucket = planner.bundle, planner.recipe.bucket("full")
    options = bundle.manifest.options.model_copy(update={"precision": "fp16"})
    half = replace(bundle, manifest=bundle.manifest.model_copy(update={"options": options}))
    whole, halved = (_work(each, bucket, 11) for each in (bundle, half))
    for name in ("head", "decode_head"):
        assert halved[name].bytes == whole[name].bytes / 2 and halved[name].flops == whole[name].flops
    # Hidden states between the graphs stay float32: two times rows of them, not halved.
    rows = 2 * planner.recipe.layout.length * planner.recipe.model.hidden * 4
    assert 2 * halved["stage_00"].bytes - whole["stage_00"].bytes == rows


def test_work_of_the_stages_is_the_recipes(planner, tiny_profile):
    recipe = planner.recipe
    for bucket in recipe.buckets:
        measured = tiny_profile.bucket(bucket.name)
        work = [stage.work for stage in measured.stages if stage.name.startswith("stage_")]
        into = rows_into_layers(recipe, bucket)
        assert sum(each.flops for each in work) == prefill_flops(recipe.model, into)
        assert measured.stage("stage_01").rows == into[recipe.stages[1].start]
        model, layers = recipe.model, len(recipe.stages[1])
        weights, row = 4 * layers * layer_parameters(model), 4 * model.hidden
        cached = 4 * 2 * model.kv_heads * model.head_dim
        rows = into[recipe.stages[1].start]
        least = weights + layers * rows * cached + 2 * rows * row
        assert measured.stage("stage_01").work.bytes == least
        tokens = range(1, planner.codec.length)  # each reads the weights and all keys, its own included
        least = sum(weights + layers * (rows + token) * cached + 2 * row for token in tokens)
        assert measured.stage("decode_stage_01").work.bytes == least
    full, pruned = tiny_profile.bucket("full"), tiny_profile.bucket("b40_s1")
    assert pruned.stage("stage_02").work.flops < full.stage("stage_02").work.flops
    assert pruned.kv_mib < full.kv_mib and pruned.stage("vision").work is None


def test_what_cannot_be_measured_is_said(tiny_profile):
    notes = " ".join(tiny_profile.notes)
    assert "12 frames per bucket are too few: p99 needs 100" in notes
    assert "device time is not measured" in notes
    assert tiny_profile.memory.device_mib is None and "not measured" in tiny_profile.memory.device_source
    assert tiny_profile.memory.peak_host_mib > 20
    assert tiny_profile.buckets[0].total.p99 is None and tiny_profile.buckets[0].total.p90 is not None


def test_synthetic_frames_are_large_and_never_zeros(planner):
    one, two = synthetic_frames(planner, 2)
    for camera in planner.recipe.layout.cameras:
        image = one.images[camera]
        assert image.shape[0] == 900 and image.std() > 20
        assert not np.array_equal(image, two.images[camera])
    assert frames_hash([one]) == frames_hash(synthetic_frames(planner, 1)) != frames_hash([two])


def test_the_file_holds_the_profile_and_others_are_refused(tiny_profile, tmp_path):
    path = tmp_path / "profile.json"
    write_profile(tiny_profile, path)
    assert read_profile(path) == tiny_profile
    newer = tiny_profile.model_dump(mode="json") | {"profile_version": 99, "new": 1}
    with pytest.raises(ValueError, match="profile_version is 99, this library reads 1"):
        Profile.model_validate(newer)
    bucket = tiny_profile.buckets[0]
    with pytest.raises(ValueError, match="full has 11 totals and 12 times of preprocess"):
        BucketProfile.model_validate(bucket.model_dump() | {"total_ms": bucket.total_ms[1:]})
    path.write_text('{"profile_version": 1}')
    with pytest.raises(InputError, match=r"profile.json is not a profile: conditions: Field required"):
        read_profile(path)


def test_frames_and_buckets_that_are_not_there_are_refused(planner, make_profile):
    with pytest.raises(InputError, match="0 plans per bucket"):
        make_profile(planner, frames=0)
    with pytest.raises(RecipeError, match="no bucket 'b99'"):
        make_profile(planner, buckets=("b99",))
