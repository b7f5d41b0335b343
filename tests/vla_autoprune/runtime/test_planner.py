from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from engines.onnxruntime import OnnxRuntimeBackend
from vla_autoprune.errors import BundleError, InputError, PlanError, RecipeError
from vla_autoprune.frame import CAMERAS, Command, EgoState, Frame
from vla_autoprune.recipe import bucket_for
from vla_autoprune.runtime.planner import Planner


@pytest.fixture(scope="module")
def planner(stored_bundle):
    bundle = stored_bundle
    return Planner(bundle, OnnxRuntimeBackend(bundle, threads=1), budget=0.4)


@pytest.fixture
def frame() -> Frame:
    generator = np.random.default_rng(7)
    images = {name: generator.integers(0, 255, (90, 160, 3), dtype=np.uint8) for name in CAMERAS}
    return Frame(images, EgoState(7.0, -0.4, 0.02), Command.STRAIGHT, token="frame-7")


def test_a_plan_says_everything_that_led_to_it(planner, frame):
    plan = planner.plan(frame)
    bucket = planner.recipe.bucket(plan.bucket)
    assert plan.waypoints_in_ego.shape == (6, 3) and np.isfinite(plan.waypoints_in_ego).all()
    assert bucket == bucket_for(planner.recipe, 0.4, plan.complexity)
    assert plan.visual_tokens_into_layers == bucket.visual_tokens_into_layers
    stages = planner.recipe.stages
    assert [len(kept) for kept in plan.kept_visual] == [
        bucket.visual_tokens_into_layers[layers.start] for layers in stages
    ]
    assert all(
        np.isin(after, before).all()
        for before, after in zip(plan.kept_visual, plan.kept_visual[1:], strict=False)
    )
    model = planner.recipe.model
    assert plan.kv_mib * 2**20 == sum(bucket.kv_tokens_per_layer) * 2 * model.kv_heads * model.head_dim * 4
    assert len(plan.text.split()) == 12
    steps = {
        "preprocess",
        "vision",
        "embed",
        "stage_00",
        "stage_01",
        "stage_02",
        "head",
        "prefill",
        "decode",
        "total",
    }
    assert steps <= set(plan.timings_ms)
    assert plan.timings_ms["total"] >= plan.timings_ms["prefill"] + plan.timings_ms["decode"]


def test_same_frame_same_plan_whatever_came_before(planner, frame):
    first = planner.plan(frame)
    other = planner.variant(None)
    other.plan(dataclasses.replace(frame, images={name: image[::-1] for name, image in frame.images.items()}))
    again = planner.plan(frame)
    assert np.array_equal(first.waypoints_in_ego, again.waypoints_in_ego)
    assert first.complexity == again.complexity
    assert all(np.array_equal(a, b) for a, b in zip(first.kept_visual, again.kept_visual, strict=True))


def test_policies_change_the_tokens_and_not_the_cost(planner, frame):
    plans = {
        policy: planner.variant(0.4, policy).plan(frame) for policy in ("autoprune", "random", "uniform")
    }
    assert len({plan.bucket for plan in plans.values()}) == 1
    kept = {policy: tuple(plan.kept_visual[-1].tolist()) for policy, plan in plans.items()}
    assert len(set(kept.values())) == 3
    again = planner.variant(0.4, "random").plan(frame)
    elsewhere = planner.variant(0.4, "random").plan(dataclasses.replace(frame, token="frame-8"))
    assert tuple(again.kept_visual[-1].tolist()) == kept["random"]
    assert tuple(elsewhere.kept_visual[-1].tolist()) != kept["random"]


def test_fixed_takes_the_default_bucket(planner, frame):
    plan = planner.variant(0.4, "fixed").plan(frame)
    assert planner.recipe.bucket(plan.bucket).default


def test_unpruned_keeps_all(planner, frame):
    plan = planner.variant(None).plan(frame)
    assert plan.bucket == "full" and len(plan.kept_visual[-1]) == planner.recipe.layout.visual_tokens


def test_a_missing_camera_is_named(planner, frame):
    images = {name: image for name, image in frame.images.items() if name != "CAM_BACK"}
    with pytest.raises(
        InputError, match=r"expects 6 cameras of 64x64 .* the frame has 5: CAM_BACK is missing"
    ):
        planner.plan(dataclasses.replace(frame, images=images))


@pytest.mark.parametrize(
    "image,message",
    [
        (np.zeros((90, 160), np.uint8), r"CAM_FRONT is uint8 \[90, 160\]"),
        (np.zeros((90, 160, 3), np.float32), "CAM_FRONT is float32"),
        (
            np.zeros((160, 90, 3), np.uint8),
            "CAM_FRONT is 90x160; the model knows images of width / height 1.778",
        ),
    ],
)
def test_images_of_another_kind_are_named(planner, frame, image, message):
    with pytest.raises(InputError, match=message):
        planner.plan(dataclasses.replace(frame, images={**frame.images, "CAM_FRONT": image}))


def test_numbers_beyond_the_prompts_bins_are_flagged(planner, frame):
    plan = planner.plan(dataclasses.replace(frame, ego=EgoState(60.0)))
    assert plan.flags == ("clipped: speed_mps is 60, outside 0 to 24; 24 was used",)
    with pytest.raises(InputError, match="not finite"):
        planner.plan(dataclasses.replace(frame, ego=EgoState(float("nan"))))


def test_unknown_budgets_and_policies_are_refused(planner):
    with pytest.raises(RecipeError, match=r"it offers 0\.6, 0\.4"):
        planner.variant(0.33)
    with pytest.raises(InputError, match="allowed: autoprune, fixed, random, uniform"):
        planner.variant(0.4, "best")


def test_non_finite_pixels_give_an_error_and_no_harm(planner, frame):
    from vla_autoprune.runtime.pipeline import Timings

    good = planner.plan(frame)
    pipeline = planner.pipeline
    pipeline.pixels[:] = np.nan
    pipeline.encode(Timings())
    ids = planner.prompt.build(frame.ego, frame.command)
    with pytest.raises(PlanError, match="not finite"):
        pipeline.prefill(ids, len(ids), lambda _: planner.recipe.buckets[0], Timings())
    with pytest.raises(PlanError, match="run a prefill first"):
        pipeline.decode(0, Timings())
    assert np.array_equal(planner.plan(frame).waypoints_in_ego, good.waypoints_in_ego)


def test_scores_that_are_not_finite_choose_no_tokens(planner, frame):
    from vla_autoprune.runtime.pipeline import Timings

    ids = planner.prompt.build(frame.ego, frame.command)
    planner.preprocessing.fill(planner.pipeline.pixels, frame.images)
    planner.pipeline.encode(Timings())

    def spoil(stage, read):
        if stage == 0:
            read("score")[3] = np.nan  # on the host, reading gives the memory itself

    bucket = planner.recipe.buckets_of(0.4)[0]
    with pytest.raises(PlanError, match=r"scores of stage_00 are not finite"):
        planner.pipeline.prefill(ids, len(ids), lambda _: bucket, Timings(), inspect=spoil)


@pytest.mark.parametrize(
    "name,change,message",
    [
        ("actions.json", {"steps": 5}, "steps is 5, a plan has 6"),
        (
            "actions.json",
            {"first_curvature_token": 450},
            "tokens go up to 530, the model's vocabulary to 511",
        ),
        ("actions.json", {"steps": "six", "more": 1}, "steps: .* got 'six' .and 1 more"),
        ("preprocess.json", {"std": [0.25, 0.0, 0.25]}, r"std\.1: .* greater than 0, got '0\.0'"),
        ("preprocess.json", {"width": 32}, r"images are 32x64, the recipe has \(64, 64\)"),
        (
            "preprocess.json",
            {"cameras": ["CAM_FRONT"]},
            "cameras are CAM_FRONT, the recipe has CAM_FRONT_LEFT,",
        ),
    ],
)
def test_texts_that_do_not_fit_the_bundle_are_named(stored_bundle, tmp_path, name, change, message):
    folder = shutil.copytree(stored_bundle.path, tmp_path / "bundle")
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**values, **change}))
    bundle = dataclasses.replace(stored_bundle, path=folder)
    with pytest.raises(BundleError, match=message) as caught:
        Planner(bundle, OnnxRuntimeBackend(bundle, threads=1))
    text = str(caught.value)
    assert text.startswith(str(folder / name)) and "anew" in text and "\n" not in text


def test_frames_allocate_next_to_nothing(planner, frame):
    import tracemalloc

    planner.plan(frame)
    tracemalloc.start()
    planner.plan(frame)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    hidden = planner.recipe.layout.length * planner.recipe.model.hidden * 4
    images = sum(image.nbytes for image in frame.images.values())
    assert peak < min(hidden * len(planner.recipe.stages) + 200_000, images)


def test_slopes_are_measured_on_known_drives(planner, frame):
    from vla_autoprune.runtime.slope_losses import KnownDrive, measure_slopes

    future = np.column_stack([np.arange(1, 7) * 3.0, np.zeros(6)])
    exists = np.array([True, True, True, False, False, False])
    drives = [
        KnownDrive(frame, "scene-0001", future, exists),
        KnownDrive(frame, "scene-0001", future, np.zeros(6, dtype=bool)),
    ]
    measured = measure_slopes(planner, drives)
    assert measured.without_future == 1 and measured.tokens == ("frame-7",)
    assert measured.left_out == "1 left out"
    assert {budget: losses.shape for budget, losses in measured.losses.items()} == {0.6: (1, 2), 0.4: (1, 2)}
    plan = planner.plan_in_bucket(frame, "full")
    expected = np.linalg.norm(plan.waypoints_in_ego[:3, :2] - future[:3], axis=1).mean()
    assert measured.unpruned[0] == pytest.approx(expected)


def test_frames_without_a_plan_are_counted_by_bucket_and_many_end_the_measurement(planner, frame):
    from vla_autoprune.runtime.slope_losses import HOPELESS, KnownDrive, measure_slopes

    known = KnownDrive(frame, "scene-0001", np.zeros((6, 3)), np.ones(6, dtype=bool))
    fails_in = {"full"}

    class Poet(Planner):
        def plan_in_bucket(self, given: Frame, name: str):
            if name in fails_in:
                raise PlanError("the answer is a poem")
            return super().plan_in_bucket(given, name)

    poet = Poet(planner.bundle, planner.backend, pipeline=planner.pipeline)
    measured = measure_slopes(poet, [known] * 2)
    assert not measured.tokens and measured.no_plan_in == {"full": 2}
    told = "2 left out, 2 of them without a plan (full 2); the first: the answer is a poem"
    assert measured.left_out == told
    fails_in.update(bucket.name for bucket in planner.recipe.buckets)
    with pytest.raises(PlanError, match=r"none of the first 10 frames has a plan in any of 5 .* a poem"):
        measure_slopes(poet, [known] * (HOPELESS + 1))


def test_a_rehearsal_runs_any_frame_to_the_longest_answer(planner, frame):
    plan, rehearsal = planner.plan_in_bucket(frame, "full"), planner.rehearse(frame, "full")
    assert rehearsal.answer_tokens == plan.answer_tokens == planner.codec.length
    assert list(rehearsal.timings_ms) == list(plan.timings_ms) and rehearsal.kv_mib == plan.kv_mib
    other = planner.variant(None)
    other.codec = planner.codec.model_copy(update={"first_distance_token": 0})
    with pytest.raises(PlanError, match="answer token 0"):
        other.plan_in_bucket(frame, "full")
    assert other.rehearse(frame, "full").answer_tokens == planner.codec.length
