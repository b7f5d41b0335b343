"""The planner: a frame in, a plan out, through a bundle's static stages. No torch here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vla_autoprune import bundle as bundles
from vla_autoprune import contract
from vla_autoprune.bundle import Bundle
from vla_autoprune.errors import BundleError, InputError, PlanError
from vla_autoprune.frame import WAYPOINT_TIMES_S, FloatArray, Frame, IntArray, Plan, Rehearsal
from vla_autoprune.models.answers import read_answer_format
from vla_autoprune.models.preprocess import read_preprocessing
from vla_autoprune.models.prompt_template import read_prompt
from vla_autoprune.pruning.policies import random_scores, uniform_scores
from vla_autoprune.recipe import Bucket, bucket_for
from vla_autoprune.runtime.backend import Backend
from vla_autoprune.runtime.decode import Rule, choose_token, median_token
from vla_autoprune.runtime.pipeline import ChooseBucket, Pipeline, Prefill, Timings

Policy = Literal["autoprune", "fixed", "random", "uniform"]
"""How bucket and tokens are chosen.

autoprune: complexity picks the bucket, attention the tokens. fixed: the budget's default bucket for all
frames. random and uniform: autoprune's buckets, but tokens drawn at random or spread evenly, at the same
cost.
"""

LimitBucket = Callable[[Bucket, float], Bucket]
"""From the bucket the policy asks for and the complexity to the bucket that runs; called once per frame."""

OVERRIDDEN = "bucket overridden"
"""Begins the flag of a plan whose bucket a limit has replaced."""

POLICIES: dict[str, Policy] = {
    "autoprune": "autoprune",
    "fixed": "fixed",
    "random": "random",
    "uniform": "uniform",
}


class Planner:
    """Plans frames with a bundle. Same inputs, same outputs.

    No tensor of the model is allocated per frame: pixels, hidden states, scores, caches and logits live in
    memory made and bound beforehand. What a frame does allocate is small and on the host (resized images,
    token ids, indices of kept tokens, timings, the plan), and what a backend needs inside one graph.

    Args:
        bundle: a checked bundle.
        backend: runs its graphs.
        budget: one of the recipe's budgets; None prunes nothing.
        policy: how bucket and tokens are chosen.
        rule: how an action token is read off its distribution.
        pipeline: shared with another planner of the same bundle and backend, see `variant`.

    Raises:
        RecipeError: the recipe has no such budget.
        InputError: the policy is unknown.
        BundleError: tokenizer, actions or preprocessing are missing, not valid, or do not fit the recipe.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        budget: float | None = None,
        policy: Policy = "autoprune",
        rule: Rule = "median",
        pipeline: Pipeline | None = None,
    ) -> None:
        if policy not in POLICIES:
            raise InputError(f"policy is {policy!r}; allowed: {', '.join(POLICIES)}")
        self.bundle, self.backend = bundle, backend
        self.recipe = bundle.recipe
        self.budget, self.policy, self.rule = budget, policy, rule
        bucket_for(self.recipe, budget)
        self.preprocessing = read_preprocessing(bundle.path / bundles.PREPROCESS)
        self.codec = read_answer_format(bundle.path / bundles.ACTIONS)
        self.prompt = read_prompt(bundle.path, self.recipe.layout)
        self._token_ids: NDArray[np.int64] = np.zeros(self.recipe.layout.length, dtype=np.int64)
        self._camera_of_visual = self.recipe.layout.camera_of_visual
        self._check_fit()
        self.pipeline = pipeline or Pipeline(bundle, backend)

    def variant(self, budget: float | None, policy: Policy = "autoprune") -> Planner:
        """A planner with another budget or policy on the same sessions and memory; use one at a time."""
        return Planner(self.bundle, self.backend, budget, policy, self.rule, self.pipeline)

    def plan(self, frame: Frame, limit: LimitBucket | None = None) -> Plan:
        """Plan one frame.

        Args:
            frame: images of every camera, ego state and command.
            limit: may replace the bucket, as `BucketLatencies.limit` does for a deadline; flagged if it does.

        Returns:
            The plan, with timings of preprocess, vision, prefill and decode and all their steps.

        Raises:
            InputError: a camera is missing, an image is not of the expected kind, or the ego state is not
                finite.
            PlanError: the model's answer is not finite or not a plan.
        """
        flags: list[str] = []

        def choose(complexity: float) -> Bucket:
            wanted = self._choose_bucket(complexity)
            bucket = wanted if limit is None else limit(wanted, complexity)
            if bucket.name != wanted.name:
                flags.append(f"{OVERRIDDEN}: {bucket.name} instead of {wanted.name}")
            return bucket

        plan = self._plan(frame, choose)
        return replace(plan, flags=(*plan.flags, *flags))

    def plan_in_bucket(self, frame: Frame, name: str) -> Plan:
        """Plan one frame in a given bucket, whatever its complexity.

        Raises:
            RecipeError: the recipe has no such bucket.
            InputError: as `plan`.
            PlanError: as `plan`.
        """
        bucket = self.recipe.bucket(name)
        return self._plan(frame, lambda _: bucket)

    def rehearse(self, frame: Frame, name: str) -> Rehearsal:
        """Run a frame in a given bucket up to the longest answer, whatever that says.

        For warming up and timing on frames that no model need have a plan for: grey images, noise. Answers
        of fixed length cost exactly this; of others it is the most they cost.

        Raises:
            RecipeError: the recipe has no such bucket.
            InputError: as `plan`.
            PlanError: values are not finite.
        """
        bucket = self.recipe.bucket(name)
        timings = Timings(self.pipeline.around)
        with timings.of("total"):
            prefill, tokens = self._answer(frame, lambda _: bucket, timings, rehearsed=True)
            with timings.of("detokenise"):
                self.prompt.text(np.array(tokens))
        return Rehearsal(
            bucket=name,
            kept_visual=prefill.kept_visual,
            kv_mib=self.bundle.kv_mib(bucket),
            timings_ms=dict(timings.ms),
            answer_tokens=len(tokens),
        )

    def _plan(self, frame: Frame, choose: ChooseBucket) -> Plan:
        timings = Timings(self.pipeline.around)
        with timings.of("total"):
            prefill, tokens = self._answer(frame, choose, timings)
            if not self.codec.is_complete(tokens):
                raise PlanError(
                    f"the answer has {len(tokens)} tokens and no end: "
                    f"{self.prompt.text(np.array(tokens))[:120]!r}; longer ones need a larger length in "
                    "the answer format (--decoder)"
                )
            with timings.of("detokenise"):
                text = self.prompt.text(np.array(tokens))
                waypoints = self.codec.waypoints(tokens, text)[: len(WAYPOINT_TIMES_S)]
        bucket = prefill.bucket
        return Plan(
            waypoints_in_ego=waypoints,
            times_s=WAYPOINT_TIMES_S,
            text=text,
            bucket=bucket.name,
            complexity=prefill.complexity,
            visual_tokens_into_layers=bucket.visual_tokens_into_layers,
            kept_visual=prefill.kept_visual,
            work_fraction=bucket.work_fraction,
            kv_mib=self.bundle.kv_mib(bucket),
            timings_ms=dict(timings.ms),
            flags=self.prompt.notes(frame.ego),
            answer_tokens=len(tokens),
            visual_tokens_left=self._of_cameras(prefill.kept_visual[-1]),
        )

    def _answer(
        self, frame: Frame, choose: ChooseBucket, timings: Timings, rehearsed: bool = False
    ) -> tuple[Prefill, list[int]]:
        """From images to the tokens of an answer: complete or, always if rehearsed, as long as it may be."""
        with timings.of("preprocess"):
            self.preprocessing.fill(self.pipeline.pixels, frame.images)
        with timings.of("prompt"):
            token_ids = self.prompt.build(frame.ego, frame.command)
            self._token_ids[: len(token_ids)] = token_ids
        self.pipeline.encode(timings)
        prefill = self.pipeline.prefill(
            self._token_ids, len(token_ids), choose, timings, self._ranking(frame.token)
        )
        tokens: list[int] = []
        logits = prefill.logits
        while True:
            position = len(tokens)
            with timings.of("choose"):
                allowed = self.codec.tokens_at(position)
                if allowed is None:
                    tokens.append(int(logits.argmax()))
                elif rehearsed:
                    tokens.append(median_token(logits, allowed))
                else:
                    tokens.append(choose_token(logits, allowed, self.rule, position))
            if len(tokens) == self.codec.length or (self.codec.is_complete(tokens) and not rehearsed):
                return prefill, tokens
            logits = self.pipeline.decode(tokens[-1], timings)

    def _choose_bucket(self, complexity: float) -> Bucket:
        return bucket_for(self.recipe, self.budget, None if self.policy == "fixed" else complexity)

    def _of_cameras(self, visual: IntArray) -> dict[str, int]:
        """How many of some visual tokens each camera has."""
        cameras = self.recipe.layout.cameras
        counts = np.bincount(self._camera_of_visual[visual], minlength=len(cameras))
        return dict(zip(cameras, counts.tolist(), strict=True))

    def _ranking(self, token: str) -> FloatArray | None:
        layout = self.recipe.layout
        if self.policy == "random":
            return random_scores(layout.visual_tokens, token)
        if self.policy == "uniform":
            return uniform_scores([_grid(span[2]) for span in layout.segments if span[0] == "visual"])
        return None

    def _check_fit(self) -> None:
        layout, preprocessing, codec = self.recipe.layout, self.preprocessing, self.codec
        folder, anew = self.bundle.path, "export the bundle anew with vla-autoprune export"
        if preprocessing.cameras != layout.cameras:
            raise BundleError(
                f"{folder / bundles.PREPROCESS}: cameras are {', '.join(preprocessing.cameras)}, "
                f"the recipe has {', '.join(layout.cameras)}; {anew}"
            )
        if (preprocessing.width, preprocessing.height) != layout.image_size:
            raise BundleError(
                f"{folder / bundles.PREPROCESS}: images are {preprocessing.width}x{preprocessing.height}, "
                f"the recipe has {layout.image_size}; {anew}"
            )
        if codec.steps < len(WAYPOINT_TIMES_S):
            raise BundleError(
                f"{folder / bundles.ACTIONS}: steps is {codec.steps}, a plan has {len(WAYPOINT_TIMES_S)}; "
                f"{anew}"
            )
        if codec.length > self.recipe.decode_length:
            raise BundleError(
                f"{folder / bundles.RECIPE}: decode_length is {self.recipe.decode_length}, a plan has "
                f"{codec.length} tokens; make the recipe anew with vla-autoprune calibrate"
            )
        (vocabulary,) = self.bundle.graphs[contract.HEAD].outputs[0].pinned({})[1:]
        largest = {
            bundles.ACTIONS: codec.largest_token,
            bundles.TOKENIZER: max(self.prompt.tokenizer.get_vocab().values()),
        }
        for name, token in largest.items():
            if token >= vocabulary:
                raise BundleError(
                    f"{folder / name}: tokens go up to {token}, the model's vocabulary to {vocabulary - 1}; "
                    f"{anew}"
                )


def _grid(tokens: int) -> tuple[int, int]:
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens else (1, tokens)
