from __future__ import annotations

import time
from contextlib import contextmanager

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from vla_autoprune.errors import InputError, RecipeError
from vla_autoprune.profiling.document import Profile, read_profile, write_profile
from vla_autoprune.profiling.measure import ACCOUNTED_TOLERANCE, frames_hash, synthetic_frames
from vla_autoprune.profiling.stage_work import SUMS
from vla_autoprune.pruning.work import prefill_flops
from vla_autoprune.recipe import rows_into_layers


@pytest.fixture(scope="module")
def slowed(planner):
    """A planner whose steps of these names, or all, sleep before they work."""
    from vla_autoprune.runtime.pipeline import Pipeline
    from vla_autoprune.runtime.planner import Planner

    def make(seconds, *names):
        @contextmanager
        def around(step):
            if step in names or (not names and step not in SUMS):
                time.sleep(seconds)
            yield

        pipeline = Pipeline(planner.bundle, planner.backend, around)
        return Planner(planner.bundle, planner.backend, pipeline=pipeline)

    return make


def shares_of(bucket):
    return np.sum([stage.ms for stage in bucket.stages], axis=0) / np.array(bucket.total_ms)


def test_stages_sum_to_the_total(slowed, make_profile):
    # Taking a step's time costs microseconds, which would count in steps as short as those of the tiny model.
    (bucket,) = make_profile(slowed(0.001), buckets=("full",)).buckets
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


def test_an_injected_sleep_shows_where_it_is_and_nowhere_else(planner, slowed, make_profile):
    slept_ms = 60.0

    def least(planner):
        """What others do on the machine can only add: the least of the frames is the stage itself."""
        (bucket,) = make_profile(planner, frames=6, buckets=("b40_s1",)).buckets
        return {stage.name: min(stage.ms) for stage in bucket.stages}

    plain = least(planner)
    for stage in ("stage_01", "select_00", "preprocess"):
        found = least(slowed(slept_ms / 1e3, stage))
        assert slept_ms - 0.1 < found[stage] < plain[stage] + 1.5 * slept_ms
        others = {name: found[name] - plain[name] for name in plain if name != stage}
        assert max(others.values()) < 0.5 * slept_ms, others


def test_work_of_the_stages_is_the_recipes(planner, tiny_profile):
    recipe = planner.recipe
    for bucket in recipe.buckets:
        measured = tiny_profile.bucket(bucket.name)
        work = [stage.work for stage in measured.stages if stage.name.startswith("stage_")]
        into = rows_into_layers(recipe, bucket)
        assert sum(each.flops for each in work) == prefill_flops(recipe.model, into)
        assert measured.stage("stage_01").rows == into[recipe.stages[1].start]
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
    path.write_text('{"profile_version": 1}')
    with pytest.raises(InputError, match=r"profile.json is not a profile: conditions: Field required"):
        read_profile(path)


def test_frames_and_buckets_that_are_not_there_are_refused(planner, make_profile):
    with pytest.raises(InputError, match="0 plans per bucket"):
        make_profile(planner, frames=0)
    with pytest.raises(RecipeError, match="no bucket 'b99'"):
        make_profile(planner, buckets=("b99",))
