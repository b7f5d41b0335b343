"""What a plan will cost before anything is exported: work, traffic, KV cache, and a range of latencies."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
from pydantic import Field, ValidationError

from vla_autoprune.errors import InputError
from vla_autoprune.files import first_fault, read_json
from vla_autoprune.profiling.document import PHASES, Ceiling, Phase, Profile, Record, StageProfile, Work
from vla_autoprune.profiling.roofline import least_s
from vla_autoprune.profiling.stage_work import phase_of, stage_work
from vla_autoprune.pruning.work import kv_mib
from vla_autoprune.recipe import Bucket, DecoderSizes, ModelShape, PromptLayout, PruningRecipe
from vla_autoprune.recipe_building import build_recipe

Share = Annotated[float, Field(gt=0, le=1)]
Precision = Literal["fp32", "fp16", "bf16", "fp8", "int8", "fp4", "int4"]

BYTES_PER_WEIGHT: Mapping[Precision, float] = {
    "fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "int8": 1, "fp4": 0.5625, "int4": 0.5625,
}  # fmt: skip
"""4-bit weights with a scale of 8 bits per 16 of them."""

COMPUTE_PRECISION: Mapping[Precision, Precision] = {"int4": "fp16", "bf16": "fp16"}
"""4-bit integer weights are unpacked and multiplied in half precision; bfloat16 is as fast as float16."""

HOST_EFFICIENCY = (0.5, 1.0)

NO_WEIGHTS = "0" * 64
"""Stands for a model that is not there."""


class VisionTower(Record):
    """Sizes of a vision transformer; attention is counted over a whole image, windows save some of it."""

    layers: int = Field(ge=1)
    hidden: int = Field(ge=1)
    ffn: int = Field(ge=1)
    gated: bool
    patches_per_image: int = Field(ge=1)

    def work(self, images: int, bytes_per_weight: float, bytes_per_number: float) -> Work:
        """Operations and least traffic for a frame's images, encoded together."""
        per_layer = 4 * self.hidden**2 + (3 if self.gated else 2) * self.hidden * self.ffn
        rows, patches = images * self.patches_per_image, self.patches_per_image
        flops = self.layers * (2 * rows * per_layer + 4 * images * patches**2 * self.hidden)
        moved = self.layers * per_layer * bytes_per_weight + 2 * rows * self.hidden * bytes_per_number
        return Work(flops=flops, bytes=round(moved))


class FullModel(Record):
    """A full-size model, by the figures of its config.json."""

    decoder: DecoderSizes
    vocabulary: int = Field(ge=1)
    vision: VisionTower
    visual_tokens_per_image: int = Field(ge=1)
    source: str


class Device(Record):
    """What a device can do at best, by its maker, and which share of it stages are known to reach.

    Attributes:
        flops_per_s: dense matrix products, by precision.
        compute_efficiency: lowest and highest share to expect where arithmetic limits.
        memory_efficiency: likewise where memory limits.
    """

    name: str
    flops_per_s: Mapping[Precision, float]
    bytes_per_s: float = Field(gt=0)
    source: str
    compute_efficiency: tuple[Share, Share]
    memory_efficiency: tuple[Share, Share]
    efficiency_source: str

    def ceiling(self, precision: Precision) -> Ceiling:
        """The roofline in a precision.

        Raises:
            InputError: the maker states none for it; the message lists those there are.
        """
        computed = COMPUTE_PRECISION.get(precision, precision)
        rate = self.flops_per_s.get(computed)
        if rate is None:
            offered = sorted(
                {*self.flops_per_s, *(p for p, c in COMPUTE_PRECISION.items() if c in self.flops_per_s)}
            )
            raise InputError(
                f"--precision {precision}: no throughput of {self.name} is published for it; "
                f"known are {', '.join(offered)}"
            )
        return Ceiling(flops_per_s=rate, bytes_per_s=self.bytes_per_s, source=self.source)


Entry = TypeVar("Entry", Device, FullModel)


@cache
def devices() -> Mapping[str, Device]:
    """The devices that can be estimated without being there."""
    return _read("devices.json", Device)


@cache
def models() -> Mapping[str, FullModel]:
    """The full-size models known by name."""
    return _read("models.json", FullModel)


def _read(name: str, kind: type[Entry]) -> dict[str, Entry]:
    content = json.loads((Path(__file__).parent / name).read_text())
    return {key: kind.model_validate(value) for key, value in content.items()}


def host_device(ceiling: Ceiling) -> Device:
    """This machine's CPU, as far as its ceilings tell."""
    assert ceiling.flops_per_s is not None and ceiling.bytes_per_s is not None
    return Device(
        name="this machine's CPU",
        flops_per_s={"fp32": ceiling.flops_per_s},
        bytes_per_s=ceiling.bytes_per_s,
        source=ceiling.source,
        compute_efficiency=HOST_EFFICIENCY,
        memory_efficiency=HOST_EFFICIENCY,
        efficiency_source="an allowance; with --profile of a bundle measured here it is calibrated instead",
    )


def model_named(name: str) -> FullModel:
    """A model by name, or from a JSON file with the fields of `FullModel`.

    Raises:
        InputError: it is neither.
    """
    if name in models():
        return models()[name]
    path = Path(name)
    if not path.is_file():
        raise InputError(
            f"--model is {name!r}; known are {', '.join(models())}, or give a JSON file like "
            "vla_autoprune/profiling/models.json has per model"
        )
    try:
        return FullModel.model_validate(read_json(path))
    except ValidationError as error:
        raise InputError(f"--model {path}: {first_fault(error)}") from error


def recipe_for(
    model: FullModel,
    name: str,
    like: PruningRecipe | None,
    cameras: int,
    text_tokens: int,
    decode_length: int,
    budgets: Sequence[float],
) -> PruningRecipe:
    """A recipe of a full-size model.

    Args:
        model: its sizes.
        name: for people.
        like: gives budgets, form and its pruning points where these fit; None takes the rest.
        cameras: images of a frame.
        text_tokens: prompt tokens beside them, at least 2; half of them after the last image.
        decode_length: tokens of an answer.
        budgets: mean share of visual tokens; without effect where there is `like`.

    Returns:
        The recipe, one slope per budget.

    Raises:
        RecipeError: a budget is out of reach.
    """
    before = text_tokens // 2
    spans: list[tuple[object, ...]] = [("text", before)] if before else []
    spans += [("visual", f"CAM_{index}", model.visual_tokens_per_image) for index in range(cameras)]
    layout = PromptLayout.model_validate({"segments": (*spans, ("text", text_tokens - before))})
    shape = ModelShape(id=name, weights_sha256=NO_WEIGHTS, **model.decoder.model_dump())
    points = None
    if like is not None:
        budgets = like.budgets
        if like.model.layers == model.decoder.layers:
            points = like.pruning_points
    return build_recipe(
        shape, layout, decode_length=decode_length, budgets=budgets, slopes=(0.2,), pruning_points=points
    )


@dataclass(frozen=True)
class Calibration:
    """How long stages take over the least time of the roofline: milliseconds = overhead + least / efficiency.

    Attributes:
        fits: (overhead in seconds per run, efficiency) by phase.
        largest: least seconds of the largest run that was fitted, by phase.
        error: largest relative error of a bucket's prefill and decode, of buckets whose budget took no part
            in the fit.
        source: the measurement.
    """

    fits: Mapping[Phase, tuple[float, float]]
    largest: Mapping[Phase, float]
    error: float
    source: str

    def seconds(self, phase: Phase, least: float, runs: int) -> float:
        """Of a stage that runs so often, whose work takes at least so long."""
        overhead, efficiency = self.fits[phase]
        return runs * overhead + least / efficiency


def calibrate(profile: Profile) -> Calibration:
    """Fit overhead and efficiency to a profile, and say how well that predicts buckets it has not seen.

    Args:
        profile: of at least two budgets (no pruning counts as one), with both ceilings.

    Returns:
        The calibration; its error is by leaving out one budget at a time, as buckets of one cost almost the
        same and would tell on each other.

    Raises:
        InputError: the profile has too few budgets or no ceilings.
    """
    budgets = {bucket.budget for bucket in profile.buckets}
    if len(budgets) < 2 or None in (profile.ceiling.flops_per_s, profile.ceiling.bytes_per_s):
        raise InputError(
            f"a profile of {len(budgets)} budgets with ceilings {profile.ceiling.source!r} cannot calibrate; "
            "it needs two (no pruning is one) and both ceilings: vla-autoprune profile BUNDLE --json"
        )
    counted = [(bucket, stage) for bucket in profile.buckets for stage in bucket.stages if _fits(stage)]
    errors = []
    for bucket in profile.buckets:
        rest = [stage for each, stage in counted if each.budget != bucket.budget]
        own = [stage for each, stage in counted if each is bucket]
        fitted = Calibration(_fit(rest, profile.ceiling), {}, 0.0, "")
        predicted = sum(
            fitted.seconds(stage.phase, _least(stage, profile.ceiling), stage.runs_per_plan) for stage in own
        )
        errors.append(abs(predicted / (sum(stage.time.p50 for stage in own) / 1e3) - 1))
    conditions = profile.conditions
    largest: dict[Phase, float] = {}
    for _, stage in counted:
        least = _least(stage, profile.ceiling) / stage.runs_per_plan
        largest[stage.phase] = max(largest.get(stage.phase, 0.0), least)
    return Calibration(
        fits=_fit([stage for _, stage in counted], profile.ceiling),
        largest=largest,
        error=max(errors),
        source=f"{conditions.model} on {conditions.device}, {conditions.frames} frames, {conditions.made}",
    )


def _fits(stage: StageProfile) -> bool:
    return stage.phase in ("prefill", "decode") and stage.work is not None and stage.work.flops > 0


def _least(stage: StageProfile, ceiling: Ceiling) -> float:
    assert stage.work is not None
    found = least_s(stage.work, ceiling)
    assert found is not None
    return found[0]


def _fit(stages: Sequence[StageProfile], ceiling: Ceiling) -> dict[Phase, tuple[float, float]]:
    """By phase, with relative errors weighted alike; neither overhead nor slope below zero."""
    fits: dict[Phase, tuple[float, float]] = {}
    phases: tuple[Phase, ...] = ("prefill", "decode")
    for phase in phases:
        of_phase = [stage for stage in stages if stage.phase == phase]
        if not of_phase:
            continue
        least = np.array([_least(stage, ceiling) / stage.runs_per_plan for stage in of_phase])
        seen = np.array([stage.time.p50 / 1e3 / stage.runs_per_plan for stage in of_phase])
        columns = np.stack([np.ones_like(least), least], axis=1) / seen[:, None]
        (overhead, slope), *_ = np.linalg.lstsq(columns, np.ones_like(seen), rcond=None)
        if overhead < 0 or slope <= 0:
            overhead, slope = 0.0, float(np.median(seen / least))
        fits[phase] = (float(overhead), 1 / float(slope))
    return fits


@dataclass(frozen=True)
class StageEstimate:
    """One stage of a plan: work, least traffic, KV cache, and milliseconds from optimistic to pessimistic."""

    name: str
    phase: Phase
    work: Work
    kv_mib: float
    ms: tuple[float, float]


@dataclass(frozen=True)
class BucketEstimate:
    """A plan in one bucket, without preprocessing and reading the answer."""

    bucket: Bucket
    stages: tuple[StageEstimate, ...]
    kv_mib: float

    def ms(self, phase: Phase | None = None) -> tuple[float, float]:
        """Range of a phase, or of the whole."""
        rows = [stage.ms for stage in self.stages if phase in (None, stage.phase)]
        return sum(low for low, _ in rows), sum(high for _, high in rows)


Range = Callable[[Phase, Work, int], tuple[float, float]]
"""From a phase, work and runs to seconds, optimistic and pessimistic."""


def published_range(device: Device, precision: Precision) -> Range:
    """From a maker's figures and the efficiencies to expect."""
    ceiling = device.ceiling(precision)

    def seconds(phase: Phase, work: Work, runs: int) -> tuple[float, float]:
        found = least_s(work, ceiling)
        assert found is not None
        least, bound = found
        low, high = device.compute_efficiency if bound == "compute" else device.memory_efficiency
        return least / high, least / low

    return seconds


def measured_range(calibration: Calibration, ceiling: Ceiling) -> Range:
    """From a calibration, with its own error either way; the vision tower as efficient as the prefill.

    Larger products run more efficiently, by how much the profile cannot tell: for work beyond all that was
    fitted the range begins at the ceilings.
    """

    def seconds(phase: Phase, work: Work, runs: int) -> tuple[float, float]:
        found = least_s(work, ceiling)
        assert found is not None
        fitted: Phase = phase if phase in calibration.fits else "prefill"
        middle = calibration.seconds(fitted, found[0], runs)
        low, high = middle * (1 - min(calibration.error, 1.0)), middle * (1 + calibration.error)
        if found[0] / runs > calibration.largest[fitted]:
            low = min(low, found[0])
        return low, high

    return seconds


def estimate(
    recipe: PruningRecipe, model: FullModel, cameras: int, precision: Precision, seconds: Range
) -> tuple[BucketEstimate, ...]:
    """Every bucket of a recipe on a device.

    Args:
        recipe: of the model.
        model: its sizes.
        cameras: images of a frame.
        precision: of the weights; hidden states, keys and values have 2 bytes, 4 with fp32.
        seconds: the device's range for work.

    Returns:
        An estimate per bucket, the unpruned one first.
    """
    weight, number = BYTES_PER_WEIGHT[precision], 4.0 if precision == "fp32" else 2.0
    decoded = recipe.decode_length - 1
    vision = model.vision.work(cameras, weight, number)
    result = []
    for bucket in recipe.buckets:
        rows: list[StageEstimate] = []
        works = {
            "vision": vision,
            **stage_work(recipe, bucket, model.vocabulary, decoded, weight, number, number),
        }
        caches = _caches(recipe, bucket, number)
        for name, work in sorted(works.items(), key=lambda item: PHASES.index(phase_of(item[0]))):
            phase = phase_of(name)
            runs = max(decoded, 1) if phase == "decode" else 1
            low, high = seconds(phase, work, runs)
            rows.append(StageEstimate(name, phase, work, caches.get(name, 0.0), (1e3 * low, 1e3 * high)))
        total = kv_mib(recipe.model, bucket.kv_tokens_per_layer, round(number))
        result.append(BucketEstimate(bucket, tuple(rows), total))
    return tuple(result)


def _caches(recipe: PruningRecipe, bucket: Bucket, bytes_per_number: float) -> dict[str, float]:
    return {
        f"stage_{index:02d}": kv_mib(
            recipe.model, [bucket.kv_tokens_per_layer[layer] for layer in layers], round(bytes_per_number)
        )
        for index, layers in enumerate(recipe.stages)
    }
