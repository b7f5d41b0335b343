"""Does a backend compute what the original model computed when the bundle was exported? No torch is needed.

The export records inputs and what the original model made of them. Here a backend runs the same inputs, and
every tensor passes two gates: its direction (cosine) and its length (norm ratio). One without the other is
blind: a tensor scaled by half has the right direction, a shuffled one the right length.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_autoprune import contract
from vla_autoprune.bundle import Bundle
from vla_autoprune.contract import Precision
from vla_autoprune.errors import BundleError, ParityError
from vla_autoprune.files import write_whole
from vla_autoprune.frame import FloatArray, IntArray
from vla_autoprune.recipe import Bucket, PromptLayout
from vla_autoprune.runtime.backend import Backend
from vla_autoprune.runtime.pipeline import Inspect, Pipeline, Prefill, Timings

KEPT = "kept"
"""The tensor of the tokens kept at a pruning point."""

RECORDED_ROWS = 16
"""Rows kept of each stage's hidden states, so that samples of large models stay small."""

_ANEW = "export the bundle anew with vla-autoprune export"


@dataclass(frozen=True)
class Answer:
    """What the original model made of a sample in one bucket.

    Attributes:
        tokens: [steps] as they were fed back.
        logits: [steps, vocabulary].
        kept: per stage, indices (0..V-1) of the visual tokens that entered it.
        scores: per pruning point, the score of every visual token that was left.
        hidden: per stage, [rows, d] hidden states of the text rows `text_rows` names.
    """

    tokens: IntArray
    logits: FloatArray
    kept: tuple[IntArray, ...]
    scores: tuple[FloatArray, ...]
    hidden: tuple[FloatArray, ...]


@dataclass(frozen=True)
class ModelInput:
    """One prompt with images, as a model takes them.

    Attributes:
        pixel_values: [c, 3, h, w] normalised.
        token_ids: [N] prompt, padded to the layout's length.
        length: tokens before the padding.
    """

    pixel_values: FloatArray
    token_ids: IntArray
    length: int


@dataclass(frozen=True)
class Sample(ModelInput):
    """One recorded input with the original model's answers.

    Attributes:
        complexity: bits.
        features: [rows, d] projected visual features, of every n-th token.
        answers: by bucket.
    """

    complexity: float
    features: FloatArray
    answers: Mapping[str, Answer]


@dataclass(frozen=True)
class Gates:
    """What two tensors may differ by.

    Attributes:
        min_cosine: least cosine of a row with the original's.
        max_norm_error: largest difference of their norms' ratio from 1.
        tie: scores that differ by at most this share of the largest rank as equal; either token may be kept.
    """

    min_cosine: float = 0.9999
    max_norm_error: float = 0.01
    tie: float = 1e-4

    def allow(self, tensor: str, cosine: float, norm_ratio: float) -> bool:
        """Whether a tensor is close enough; of the tokens kept, the cosine tells how far from a tie."""
        least = 1 - self.tie if tensor == KEPT else self.min_cosine
        return bool(cosine >= least and abs(norm_ratio - 1) <= self.max_norm_error)


GATES: Mapping[Precision, Gates] = {
    "fp32": Gates(),
    "fp16": Gates(min_cosine=0.999, max_norm_error=0.02, tie=1e-2),
    "bf16": Gates(min_cosine=0.98, max_norm_error=0.1, tie=1e-1),
}
"""By the bundle's precision: the recorded answers are those of the model in float32."""


@dataclass(frozen=True)
class Agreement:
    """How close one tensor is to the original's.

    Attributes:
        sample: file name.
        bucket: which; "all" for what does not depend on it.
        graph: whose output it is.
        tensor: features, hidden, score, complexity, kept or logits.
        cosine: of the worst row.
        norm_ratio: of the row furthest from 1.
        passed: both gates.
    """

    sample: str
    bucket: str
    graph: str
    tensor: str
    cosine: float
    norm_ratio: float
    passed: bool

    @property
    def distance(self) -> float:
        """How far off, to find the worst: infinite if not a number."""
        off = max(1 - self.cosine, abs(self.norm_ratio - 1))
        return off if math.isfinite(off) else math.inf


@dataclass(frozen=True)
class VerifyReport:
    """All comparisons of a bundle on a backend."""

    bundle_id: str
    backend: str
    device: str
    gates: Gates
    agreements: tuple[Agreement, ...]

    @property
    def failed(self) -> tuple[Agreement, ...]:
        """Those that did not pass a gate."""
        return tuple(agreement for agreement in self.agreements if not agreement.passed)

    @property
    def cut_short(self) -> int:
        """Runs of a sample in a bucket that kept other tokens, and were compared up to there."""
        runs = {(row.sample, row.bucket) for row in self.agreements if row.tensor == "hidden"}
        return len(runs - {(row.sample, row.bucket) for row in self.agreements if row.tensor == "logits"})

    @property
    def worst(self) -> Agreement:
        """The one furthest off."""
        return max(self.agreements, key=lambda agreement: agreement.distance)

    def worst_of_each(self) -> tuple[Agreement, ...]:
        """Per graph and tensor the one furthest off, in the order they were computed."""
        worst: dict[tuple[str, str], Agreement] = {}
        for agreement in self.agreements:
            key = (agreement.graph, agreement.tensor)
            if key not in worst or agreement.distance > worst[key].distance:
                worst[key] = agreement
        return tuple(worst.values())

    def to_json(self) -> str:
        """The report as text; what is not a number is null."""
        content = asdict(self)
        for row in content["agreements"]:
            row.update({key: value if math.isfinite(value) else None for key, value in _figures(row)})
        return json.dumps(content, indent=1, allow_nan=False) + "\n"


def verify_bundle(
    bundle: Bundle,
    backend: Backend,
    gates: Gates | None = None,
    progress: Callable[[int, int], None] | None = None,
    pipeline: Pipeline | None = None,
) -> VerifyReport:
    """Run every recorded sample in every bucket, with the original's tokens fed back.

    Args:
        bundle: a checked bundle, exported with samples.
        backend: runs it.
        gates: what may differ; None takes those of the bundle's precision, see `GATES`.
        progress: called with runs done and to do.
        pipeline: of this bundle and backend, if there is one already; memory for a second may be lacking.

    Returns:
        The comparisons; none failed if the backend computes what the original computed.

    Raises:
        ParityError: the bundle has no samples.
        BundleError: a sample is not one of this bundle.
        PlanError: a stage gave values that are not finite.
    """
    gates = gates or GATES[bundle.manifest.options.precision]
    samples = {path.name: read_sample(path, bundle) for path in sample_paths(bundle)}
    pipeline = pipeline or Pipeline(bundle, backend)
    agreements: list[Agreement] = []
    total = len(samples) * len(bundle.recipe.buckets)
    for number, (name, sample) in enumerate(samples.items()):
        for index, bucket in enumerate(bundle.recipe.buckets):
            if progress is not None:
                progress(number * len(bundle.recipe.buckets) + index, total)
            for where, graph, tensor, cosine, ratio in _compare(pipeline, sample, bucket, first=index == 0):
                passed = gates.allow(tensor, cosine, ratio)
                agreements.append(Agreement(name, where, graph, tensor, cosine, ratio, passed))
    if progress is not None:
        progress(total, total)
    return VerifyReport(bundle.manifest.bundle_id, backend.name, backend.device, gates, tuple(agreements))


def sample_paths(bundle: Bundle) -> list[Path]:
    """The files of a bundle's recorded samples, at least one.

    Raises:
        ParityError: it has none.
    """
    paths = [bundle.path / entry.path for entry in bundle.manifest.files if entry.role == "sample"]
    if not paths:
        raise ParityError(
            f"{bundle.path} has no recorded samples to compare with; an export that streams its weights "
            "records none: export with vla-autoprune export --weights memory --overwrite"
        )
    return paths


def write_sample(path: Path, sample: Sample) -> None:
    """Write a sample for `read_sample`; arrays only, no pickles.

    Args:
        path: an npz file; its folder exists.
        sample: what to write.
    """
    arrays: dict[str, NDArray] = {
        "pixel_values": sample.pixel_values,
        "token_ids": sample.token_ids,
        "length": np.array(sample.length),
        "complexity": np.array(sample.complexity),
        "features": sample.features,
    }
    for name, answer in sample.answers.items():
        arrays[f"{name}/tokens"] = answer.tokens
        arrays[f"{name}/logits"] = answer.logits
        for kind, values in (("kept", answer.kept), ("score", answer.scores), ("hidden", answer.hidden)):
            arrays |= {f"{name}/{kind}_{number:02d}": value for number, value in enumerate(values)}
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_whole(path, content.getvalue())


def read_sample(path: Path, bundle: Bundle) -> Sample:
    """Read a sample of a bundle.

    Raises:
        BundleError: it is no sample, or one of another bundle or version; the message says what is missing.
    """
    recipe = bundle.recipe
    pixels = bundle.graphs[contract.VISION].inputs[0].pinned({})
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        points, stages = range(len(recipe.pruning_points)), range(len(recipe.stages))
        sample = Sample(
            pixel_values=arrays["pixel_values"],
            token_ids=arrays["token_ids"],
            length=int(arrays["length"]),
            complexity=float(arrays["complexity"]),
            features=arrays["features"],
            answers={
                bucket.name: Answer(
                    tokens=arrays[f"{bucket.name}/tokens"],
                    logits=arrays[f"{bucket.name}/logits"],
                    kept=tuple(arrays[f"{bucket.name}/kept_{stage:02d}"] for stage in stages),
                    scores=tuple(arrays[f"{bucket.name}/score_{point:02d}"] for point in points),
                    hidden=tuple(arrays[f"{bucket.name}/hidden_{stage:02d}"] for stage in stages),
                )
                for bucket in recipe.buckets
            },
        )
    except KeyError as error:
        raise BundleError(f"{path} has no array {error.args[0]}; {_ANEW}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path} is not a recorded sample ({error}); {_ANEW}") from error
    if sample.pixel_values.shape != pixels or sample.token_ids.shape != (recipe.layout.length,):
        raise BundleError(
            f"{path} has images {list(sample.pixel_values.shape)} and {list(sample.token_ids.shape)} tokens, "
            f"the recipe asks for {list(pixels)} and {recipe.layout.length}; {_ANEW}"
        )
    return sample


def run_with_answer(
    pipeline: Pipeline,
    given: ModelInput,
    bucket: Bucket,
    tokens: IntArray,
    timings: Timings,
    inspect: Inspect | None = None,
) -> tuple[Prefill, FloatArray]:
    """Run an input in a bucket with the original's tokens fed back.

    A bundle's own tokens would let one that is different hide how close the rest is.

    Args:
        pipeline: of the bundle.
        given: the input.
        bucket: whatever its complexity.
        tokens: [steps] of the original's answer.
        timings: receives every step.
        inspect: shown the outputs of every stage; without it captured programs run, as in a vehicle.

    Returns:
        The prefill, and [steps, vocabulary] logits of the whole answer.
    """
    pipeline.pixels[:] = given.pixel_values
    pipeline.encode(timings)
    prefill = pipeline.prefill(given.token_ids, given.length, lambda _: bucket, timings, inspect=inspect)
    logits = [prefill.logits.copy()]
    for token in tokens[:-1]:
        logits.append(pipeline.decode(int(token), timings).copy())
    return prefill, np.stack(logits)


def text_rows(layout: PromptLayout, kept: IntArray, length: int) -> IntArray:
    """Rows of a stage that a sample records: text tokens, which every bucket keeps, so that rows correspond.

    Args:
        layout: of the prompt.
        kept: indices of the visual tokens that are in the stage.
        length: tokens before the padding.

    Returns:
        At most `RECORDED_ROWS` rows, spread over the text; the last is the prompt's last token.
    """
    present = np.sort(np.concatenate([layout.text_positions, layout.visual_positions[kept]]))
    text = layout.text_positions[layout.text_positions < length]
    return np.searchsorted(present, text[_spread(len(text))])


def feature_rows(features: FloatArray) -> FloatArray:
    """The rows of [V, d] visual features that a sample records."""
    return features[_spread(len(features))]


def _figures(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    return ((key, value) for key, value in row.items() if isinstance(value, float))


def _spread(count: int) -> IntArray:
    return np.unique(np.linspace(0, count - 1, min(count, RECORDED_ROWS)).round().astype(np.int64))


def _compare(
    pipeline: Pipeline, sample: Sample, bucket: Bucket, *, first: bool
) -> Iterator[tuple[str, str, str, float, float]]:
    """Bucket, graph, tensor, cosine and norm ratio of everything a sample records for a bucket."""
    answer, layout = sample.answers[bucket.name], pipeline.recipe.layout
    hidden: dict[int, FloatArray] = {}
    scores: dict[int, FloatArray] = {}

    def inspect(stage: int, read: Callable[[str], NDArray]) -> None:
        hidden[stage] = read("hidden_out")[0].copy()
        if stage < len(answer.scores):
            scores[stage] = read("score").copy()

    prefill, logits = run_with_answer(pipeline, sample, bucket, answer.tokens, Timings(), inspect)
    if first:
        features = pipeline.features()
        yield ("all", contract.VISION, "features", *agree(feature_rows(features[0]), sample.features))
        found, wanted = np.array([[prefill.complexity]]), np.array([[sample.complexity]])
        yield ("all", contract.stage_name(0), "complexity", *agree(found, wanted))
    for stage, wanted in enumerate(answer.hidden):
        name = contract.stage_name(stage)
        rows = text_rows(layout, prefill.kept_visual[stage], sample.length)
        yield (bucket.name, name, "hidden", *agree(hidden[stage][rows], wanted))
        if stage == len(answer.scores):
            continue
        yield (bucket.name, name, "score", *agree(scores[stage][None], answer.scores[stage][None]))
        yield (bucket.name, name, KEPT, *_same_kept(prefill, answer, stage))
        if not np.array_equal(prefill.kept_visual[stage + 1], answer.kept[stage + 1]):
            return  # what follows belongs to other tokens; the unpruned bucket always gets to the end
    yield (bucket.name, contract.HEAD, "logits", *agree(logits, answer.logits))


def agree(found: NDArray, wanted: NDArray) -> tuple[float, float]:
    """Compare two tensors of rows.

    Args:
        found: [rows, width].
        wanted: [rows, width].

    Returns:
        Cosine of the worst row, and the norm ratio furthest from 1; not numbers if shapes differ.
    """
    if found.shape != wanted.shape:
        return math.nan, math.nan
    left, right = found.astype(np.float64), wanted.astype(np.float64)
    norms = np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = (left * right).sum(axis=1) / (norms[0] * norms[1])
        ratios = norms[0] / norms[1]
    both_zero = (norms[0] == 0) & (norms[1] == 0)
    cosines[both_zero] = ratios[both_zero] = 1
    worst = int(np.abs(ratios - 1).argmax())  # argmax takes what is not a number for the largest
    return float(min(cosines.min(), 1.0)), float(ratios[worst])


def _same_kept(prefill: Prefill, answer: Answer, point: int) -> tuple[float, float]:
    """Agreement of the tokens kept at a pruning point.

    Tokens that changed places count by how far their scores lie apart: at a tie, either may be kept.
    """
    found, wanted = prefill.kept_visual[point + 1], answer.kept[point + 1]
    score = answer.scores[point]
    slot_of = {int(token): slot for slot, token in enumerate(answer.kept[point])}
    swapped = [float(score[slot_of[int(token)]]) for token in np.setxor1d(found, wanted)]
    spread = (max(swapped) - min(swapped)) / float(np.abs(score).max()) if swapped else 0.0
    return 1 - spread, len(found) / len(wanted)
