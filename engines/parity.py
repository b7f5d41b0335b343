"""Does a bundle compute what the original model computes? Stage by stage, and from images to answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from engines.lint import TARGETS, LintReport, TargetName, lint_bundle
from engines.onnxruntime import OnnxRuntimeBackend
from engines.stage_parity import StageParityReport, check_stages
from engines.torch_graphs import TorchBackend
from engines.verify import (
    Answer,
    ModelInput,
    Sample,
    feature_rows,
    run_with_answer,
    text_rows,
    write_sample,
)
from vla_autoprune import contract
from vla_autoprune.bundle import LINT, SAMPLES, Bundle, load_bundle
from vla_autoprune.contract import Precision
from vla_autoprune.errors import BundleError, ParityError
from vla_autoprune.export.eager import EagerRun, encode_eager, run_eager
from vla_autoprune.export.export import export_bundle, text_files
from vla_autoprune.files import write_whole
from vla_autoprune.frame import Command, EgoState, FloatArray, IntArray
from vla_autoprune.models.adapter import StageModel
from vla_autoprune.models.checkpoint import Vla
from vla_autoprune.recipe import Bucket, PromptLayout, PruningRecipe
from vla_autoprune.runtime.backend import Backend
from vla_autoprune.runtime.pipeline import Pipeline, Prefill, Timings

TOLERANCES: Mapping[Precision, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1.5e-1}
"""Largest difference of a logit, of the complexity in bits, and of a hidden state over its largest value. In
half precision the original is the model in float32, and logits and bits count over their largest value."""

TIES: Mapping[Precision, float] = {"fp32": 1e-6, "fp16": 1e-2, "bf16": 1e-1}
"""Scores that differ by less than this share of the largest rank as equal; either token may be kept."""

TIED_SHARE: Mapping[Precision, float] = {"fp32": 0.25, "fp16": 0.75, "bf16": 0.75}
"""Largest share of comparisons that may end at a tie. The unpruned bucket has none, so half precision is
always compared to the end there."""


@dataclass(frozen=True)
class ParityReport:
    """What was compared, and the largest differences.

    Attributes:
        comparisons: prompts times buckets.
        ties: comparisons left out because two tokens scored equally at the cut.
        stage_error: largest relative difference of hidden states, by stage.
        logit_error: largest difference of a logit, over all answers.
        generate_error: the same between the unpruned bundle and transformers' own `generate`.
    """

    comparisons: int
    ties: int
    stage_error: tuple[float, ...]
    logit_error: float
    generate_error: float


def parity_inputs(
    bundle: Bundle, prompts: Sequence[IntArray], mean: Sequence[float], std: Sequence[float], seed: int = 0
) -> list[ModelInput]:
    """Smooth random images for prompts: nothing to download, yet not noise.

    Args:
        bundle: gives the image shape.
        prompts: token ids of each, without padding.
        mean: per channel, as in preprocessing.
        std: per channel.
        seed: of the images.

    Returns:
        One input per prompt.
    """
    cameras, _, height, width = bundle.graphs[contract.VISION].inputs[0].pinned({})
    generator = np.random.default_rng(seed)
    shift, scale = (np.asarray(values, dtype=np.float32)[:, None, None] for values in (mean, std))
    inputs = []
    for token_ids in prompts:
        coarse = generator.uniform(0, 1, size=(cameras, 5, 8, 3)).astype(np.float32)
        images = np.stack([cv2.resize(image, (width, height)) for image in coarse])
        pixels = (images.transpose(0, 3, 1, 2) - shift) / scale
        padded = np.zeros(bundle.recipe.layout.length, dtype=np.int64)
        padded[: len(token_ids)] = token_ids
        inputs.append(ModelInput(np.ascontiguousarray(pixels), padded, len(token_ids)))
    return inputs


def check_parity(
    bundle: Bundle,
    backend: Backend,
    model: StageModel,
    inputs: Sequence[ModelInput],
    *,
    tolerance: float | None = None,
    record: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ParityReport:
    """Compare every bucket on every input with the eager pruned model, and the full one with `generate`.

    Args:
        bundle: the bundle.
        backend: runs it.
        model: the original.
        inputs: prompts with images.
        tolerance: None takes that of the bundle's precision, see `TOLERANCES`.
        record: folder to write the inputs and the original's answers to, for checks where torch is absent.
        progress: called with comparisons done and to do.

    Returns:
        The differences.

    Raises:
        ParityError: a difference is too large, other tokens are kept or generated; the message says where.
    """
    pipeline = Pipeline(bundle, backend)
    buckets = bundle.recipe.buckets
    precision = bundle.manifest.options.precision
    tie, relative = TIES[precision], precision != "fp32"
    tolerance = TOLERANCES[precision] if tolerance is None else tolerance
    stage_error = np.zeros(len(bundle.recipe.stages))
    logit_error, generate_error, ties = 0.0, 0.0, 0
    for number, given in enumerate(inputs):
        answers: dict[str, EagerRun] = {}
        features, encoder, deepstack = encode_eager(model, bundle.recipe, given.pixel_values)
        for index, bucket in enumerate(buckets):
            if progress is not None:
                progress(number * len(buckets) + index, len(inputs) * len(buckets))
            eager = run_eager(
                model,
                bundle.recipe,
                bucket,
                given.token_ids,
                given.length,
                features,
                encoder,
                deepstack=deepstack,
            )
            answers[bucket.name] = eager
            staged = _run_staged(pipeline, bucket, given, eager.tokens, eager.hidden)
            where = f"bucket {bucket.name}, input {number}"
            bits = tolerance * max(1.0, eager.complexity) if relative else tolerance
            if not abs(staged.prefill.complexity - eager.complexity) <= bits:
                raise ParityError(
                    f"complexity ({where}) is {staged.prefill.complexity:.6f} bits, the original's is "
                    f"{eager.complexity:.6f}, allowed is {bits:.0e} off; buckets would be chosen wrongly"
                )
            if not _same_tokens(staged.prefill, eager, tie, where):
                ties += 1
                continue
            errors = staged.stage_errors
            stage_error = np.maximum(stage_error, errors)
            if not errors.max() <= tolerance:
                first = int(np.flatnonzero(~(errors <= tolerance))[0])
                raise ParityError(
                    f"{contract.stage_name(first)} ({where}): hidden states differ by {errors[first]:.2e} of "
                    f"their largest value, allowed is {tolerance:.0e}; "
                    "the export does not compute what the model computes"
                )
            difference = _compare_answers(staged, eager.tokens, eager.logits, tolerance, where, relative)
            logit_error = max(logit_error, difference)
            if bucket is buckets[0]:
                tokens, logits = model.generate(
                    given.token_ids[: given.length],
                    torch.from_numpy(given.pixel_values),
                    bundle.recipe.decode_length,
                )
                fed = tokens.numpy()
                # They part where two words almost tie, or where `generate` may not end yet.
                if not np.array_equal(fed, eager.tokens):
                    staged = _run_staged(pipeline, bucket, given, fed, eager.hidden)
                where = f"unpruned bundle against transformers' generate, input {number}"
                difference = _compare_answers(staged, fed, logits.numpy(), tolerance, where, relative)
                generate_error = max(generate_error, difference)
        if record is not None:
            record.mkdir(exist_ok=True)
            sample = Sample(
                pixel_values=given.pixel_values,
                token_ids=given.token_ids,
                length=given.length,
                complexity=answers[buckets[0].name].complexity,
                features=feature_rows(features),
                answers={
                    name: _answer(run, bundle.recipe.layout, given.length) for name, run in answers.items()
                },
            )
            write_sample(record / f"sample_{number:02d}.npz", sample)
    if ties > len(inputs) * len(buckets) * TIED_SHARE[precision]:
        raise ParityError(
            f"{ties} of {len(inputs) * len(buckets)} comparisons met tied scores; "
            "the scores of this model do not rank its visual tokens"
        )
    return ParityReport(
        comparisons=len(inputs) * len(buckets),
        ties=ties,
        stage_error=tuple(stage_error.tolist()),
        logit_error=logit_error,
        generate_error=generate_error,
    )


def export_checked(
    model: StageModel,
    vla: Vla,
    recipe: PruningRecipe,
    out: Path,
    *,
    opset: int = 23,
    precision: Precision = "fp32",
    target: TargetName | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Bundle, ParityReport | StageParityReport, LintReport]:
    """Export a driving VLA, lint and check the bundle and record samples before it gets its name.

    What onnxruntime does not run (bf16) is checked on the torch backend. A model whose weights stay in files
    is checked stage by stage, without samples: they hold whole answers, and those need the whole model.

    Args:
        model: `vla`, taken apart.
        vla: the model with prompt, actions and preprocessing.
        recipe: made for it.
        out: the bundle's directory.
        opset: 18 or 23.
        precision: what weights are stored and layers computed in.
        target: where engines are to be built; the linter must find nothing for it. None asks for all
            targets, and what it finds is only written down.
        progress: called with what is done next, and how far along that is.

    Returns:
        The bundle, what the check found, and what the linter found.

    Raises:
        BundleError: TensorRT's parser on the target would refuse a graph; nothing is left of the bundle then.
        ParityError: the bundle does not compute what the model computes; nothing is left of it then.
    """
    reports: list[ParityReport | StageParityReport] = []
    lints: list[LintReport] = []

    def check(folder: Path) -> None:
        bundle = load_bundle(folder)
        targets = list(TARGETS) if target is None else [target]
        lints.append(lint_bundle(bundle, targets, None if progress is None else partial(progress, "lint")))
        if target is not None and lints[0].findings:
            first, more = lints[0].findings[0], len(lints[0].findings) - 1
            raise BundleError(
                f"the bundle is not for {target}: {first.graph}, {first.message} (and {more} more findings)"
            )
        write_whole(folder / LINT, lints[0].to_json().encode())
        prompts = [
            vla.prompt.build(EgoState(8.0, 0.0, 0.0), Command.STRAIGHT),
            vla.prompt.build(EgoState(4.2, -1.0, 0.2), Command.LEFT),
        ]
        inputs = parity_inputs(bundle, prompts, vla.preprocessing.mean, vla.preprocessing.std)
        if model.streams:
            given = inputs[0]
            report = check_stages(
                bundle,
                model,
                given.pixel_values,
                given.token_ids,
                given.length,
                tolerance=TOLERANCES[precision],
                progress=None if progress is None else partial(progress, "parity, stage by stage"),
            )
            reports.append(report)
            return
        backend: Backend = TorchBackend(bundle) if precision == "bf16" else OnnxRuntimeBackend(bundle)
        try:
            reports.append(
                check_parity(
                    bundle,
                    backend,
                    model,
                    inputs,
                    record=folder / SAMPLES,
                    progress=None if progress is None else partial(progress, "parity"),
                )
            )
        finally:
            backend.close()

    bundle = export_bundle(
        model, recipe, out, text_files(vla), opset=opset, precision=precision, check=check, progress=progress
    )
    return bundle, reports[0], lints[0]


@dataclass(frozen=True)
class _Staged:
    prefill: Prefill
    stage_errors: NDArray[np.float64]
    logits: FloatArray
    tokens: NDArray[np.int64]


def _run_staged(
    pipeline: Pipeline, bucket: Bucket, given: ModelInput, tokens: IntArray, hidden: Sequence[FloatArray]
) -> _Staged:
    """The bundle's answer to the original's tokens, and how far its stages are from `hidden`."""
    errors = np.full(len(pipeline.stages), np.inf)  # of a stage that does not run, or gives another shape

    def inspect(stage: int, read: Callable[[str], NDArray[np.floating]]) -> None:
        found, wanted = read("hidden_out")[0], hidden[stage]
        if found.shape == wanted.shape:
            errors[stage] = np.abs(found - wanted).max() / np.abs(wanted).max()

    prefill, logits = run_with_answer(pipeline, given, bucket, tokens, Timings(), inspect)
    return _Staged(prefill, errors, logits, logits.argmax(axis=1))


def _same_tokens(staged: Prefill, eager: EagerRun, tie: float, where: str) -> bool:
    """Whether the same visual tokens were kept; False if only tied scores made the difference."""
    for point, score in enumerate(eager.scores):
        found, wanted = staged.kept_visual[point + 1], eager.kept_visual[point + 1]
        if np.array_equal(found, wanted):
            continue
        slots = eager.kept_visual[point]
        score_of = dict(zip(slots.tolist(), score.tolist(), strict=True))
        swapped = [score_of[token] for token in np.setxor1d(found, wanted).tolist() if token in score_of]
        if swapped and max(swapped) - min(swapped) <= tie * float(np.abs(score).max()):
            return False
        raise ParityError(
            f"pruning point {point} ({where}): keeps other visual tokens than the original, "
            f"{np.setdiff1d(found, wanted)[:5].tolist()} instead of "
            f"{np.setdiff1d(wanted, found)[:5].tolist()}"
        )
    return True


def _compare_answers(
    staged: _Staged, tokens: IntArray, logits: FloatArray, tolerance: float, where: str, relative: bool
) -> float:
    """Largest difference of a logit, over the largest logit where `relative`."""
    scale = float(np.abs(logits).max()) if relative else 1.0
    difference = float(np.abs(staged.logits - logits).max())
    if not difference <= tolerance * scale:
        step = int(np.abs(staged.logits - logits).max(axis=1).argmax())
        raise ParityError(
            f"{where}: logits of answer token {step} differ by {difference:.2e}, allowed is "
            f"{tolerance * scale:.0e}"
        )
    steps = np.arange(len(tokens))
    # Two words whose logits are closer than the difference may change places, and an original that may not
    # end yet takes a word that is not its likeliest.
    lead = logits[steps, tokens] - logits[steps, staged.tokens]
    changed = np.flatnonzero(lead > 2 * difference)
    if len(changed):
        step = int(changed[0])
        raise ParityError(
            f"{where}: answer token {step} is {staged.tokens[step]}, the original says {tokens[step]}"
        )
    return difference / scale


def _answer(run: EagerRun, layout: PromptLayout, length: int) -> Answer:
    """What a sample keeps of the original's run."""
    return Answer(
        tokens=run.tokens,
        logits=run.logits,
        kept=tuple(kept.astype(np.int32) for kept in run.kept_visual),
        scores=run.scores,
        hidden=tuple(
            hidden[text_rows(layout, kept, length)]
            for hidden, kept in zip(run.hidden, run.kept_visual, strict=True)
        ),
    )
