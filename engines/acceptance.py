"""Acceptance on a machine that is new: does a backend compute the right thing, how fast, and does it hold?

Needs the bundle's recorded samples and nothing else. What it finds goes into one file, made to be sent back.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np

from engines.verify import (
    GATES,
    Gates,
    Sample,
    VerifyReport,
    agree,
    read_sample,
    run_with_answer,
    sample_paths,
    verify_bundle,
)
from vla_autoprune.bundle import Bundle
from vla_autoprune.errors import BackendError, PlanError
from vla_autoprune.frame import FloatArray
from vla_autoprune.profiling.machine import machine_record
from vla_autoprune.profiling.percentiles import distribution
from vla_autoprune.recipe import Bucket
from vla_autoprune.runtime.backend import Backend
from vla_autoprune.runtime.pipeline import Inspect, Pipeline, Timings

RESULT_VERSION = 1

_PREPARED = "engines, memory and captured programs are made"
_GROWTH_MIB = 8.0
"""Free device memory may move this much by itself: other processes use the GPU too."""

Progress = Callable[[str, int, int], None]
MemoryMib = Callable[[], tuple[int, int]]
"""Free and total device memory."""
Seen = tuple[bool, str]
"""Whether a check holds, and what was seen."""
MedianAndP99 = tuple[float, float | None]


@dataclass(frozen=True)
class Check:
    """One thing that must hold, whether it does, and what was seen."""

    name: str
    passed: bool
    seen: str


@dataclass(frozen=True)
class BucketTimes:
    """Milliseconds of one bucket over its frames: median and 99th percentile, and the median of every step.

    A 99th percentile of too few frames is None (`profiling.percentiles`).

    Attributes:
        frames: how many were measured.
        prefill_ms: from embedding to the logits of the first token.
        decode_ms: per further token.
        frame_ms: vision, prefill and decoding.
        steps_ms: by the backend's own clock, summed over a frame.
        after_other_bucket_ms: median prefill where the frame before ran another bucket.
        after_same_bucket_ms: median prefill where it ran this one.
    """

    frames: int
    prefill_ms: MedianAndP99
    decode_ms: MedianAndP99
    frame_ms: MedianAndP99
    steps_ms: Mapping[str, float]
    after_other_bucket_ms: float
    after_same_bucket_ms: float


@dataclass(frozen=True)
class Acceptance:
    """Everything an acceptance found."""

    result_version: int
    made: str
    machine: Mapping[str, str]
    backend: str
    device: str
    bundle: Mapping[str, Any]
    engines: Sequence[Mapping[str, Any]]
    checks: tuple[Check, ...]
    parity: Sequence[Mapping[str, Any]]
    times: Mapping[str, BucketTimes]
    memory_mib: Mapping[str, float]

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> str:
        """The result file; what is not a number is null."""
        return json.dumps(_finite(asdict(self)), indent=1, allow_nan=False) + "\n"


def accept(
    bundle: Bundle,
    backend: Backend,
    *,
    frames: int = 500,
    engines: Sequence[Mapping[str, Any]] = (),
    memory_mib: MemoryMib | None = None,
    progress: Progress | None = None,
) -> Acceptance:
    """Verify, provoke and measure a backend on a bundle.

    Args:
        bundle: a checked bundle, exported with samples.
        backend: opened for it.
        frames: to measure; the bucket changes with every one or two of them.
        engines: what was built, for the record.
        memory_mib: asks for device memory; None where a backend has none of its own.
        progress: called with what is done, how far, and how far there is to go.

    Returns:
        The result, failed checks included: what the backend refuses is one, and ends the acceptance.

    Raises:
        ParityError: the bundle has no samples.
        BundleError: a sample is not one of this bundle.
    """
    say = progress or (lambda what, done, total: None)
    gates = GATES[bundle.manifest.options.precision]
    sample = read_sample(sample_paths(bundle)[0], bundle)
    before = memory_mib() if memory_mib else (0, 0)
    checks: list[Check] = []
    reports: list[VerifyReport] = []
    times: dict[str, BucketTimes] = {}
    memory = {"total": float(before[1]), "free_before": float(before[0])}
    try:
        pipeline = Pipeline(bundle, backend)
    except BackendError as error:
        checks.append(Check(_PREPARED, False, str(error)))
        return _result(bundle, backend.name, backend.device, engines, checks, memory=memory)
    if memory_mib is not None:
        memory["free_loaded"] = float(memory_mib()[0])

    def parity() -> Seen:
        reports.append(
            verify_bundle(bundle, backend, gates, lambda done, total: say("parity", done, total), pipeline)
        )
        return _seen_in(reports[0])

    def measure() -> Seen:
        measured, growth = _measure(pipeline, sample, frames, memory_mib, say)
        times.update(measured)
        grown = "no device memory to watch" if memory_mib is None else f"{growth:+.0f} MiB"
        return growth <= _GROWTH_MIB, f"{frames} frames, {grown}"

    todo: list[tuple[str, Callable[[], Seen]]] = [
        ("every stage and answer is the original model's", parity),
        ("captured programs give the same answers", lambda: _captured_is_right(pipeline, sample, gates)),
        ("a frame repeats to the bit", lambda: _repeats(pipeline, sample)),
        ("frames change buckets, and device memory does not grow", measure),
        ("a frame of NaN is refused and spoils no other", lambda: _survives_nan(pipeline, sample, gates)),
    ]
    for name, look in todo:
        try:
            passed, seen = look()
        except (BackendError, PlanError) as error:
            checks.append(Check(name, False, str(error)))
            if isinstance(error, BackendError):
                break  # whatever else ran now would fail for the same reason
            continue
        checks.append(Check(name, passed, seen))
    return _result(bundle, backend.name, backend.device, engines, checks, reports, times, memory)


def not_opened(bundle: Bundle, backend: str, error: BackendError) -> Acceptance:
    """The result where engines cannot be built or opened.

    Args:
        bundle: a checked bundle.
        backend: its name.
        error: why.

    Returns:
        A result with one check, which fails.
    """
    return _result(bundle, backend, "not opened", (), [Check(_PREPARED, False, str(error))])


def _result(
    bundle: Bundle,
    backend: str,
    device: str,
    engines: Sequence[Mapping[str, Any]],
    checks: Sequence[Check],
    reports: Sequence[VerifyReport] = (),
    times: Mapping[str, BucketTimes] | None = None,
    memory: Mapping[str, float] | None = None,
) -> Acceptance:
    manifest = bundle.manifest
    return Acceptance(
        result_version=RESULT_VERSION,
        made=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=machine_record(),
        backend=backend,
        device=device,
        bundle={
            "id": manifest.bundle_id,
            "model": bundle.recipe.model.id,
            "opset": manifest.options.opset,
            "precision": manifest.options.precision,
            "versions": dict(manifest.options.versions),
            "buckets": {bucket.name: bucket.work_fraction for bucket in bundle.recipe.buckets},
            "weight_mib": sum(file.bytes for file in manifest.files if file.role == "weights") / 2**20,
        },
        engines=engines,
        checks=tuple(checks),
        parity=[asdict(agreement) for report in reports for agreement in report.worst_of_each()],
        times=times or {},
        memory_mib=memory or {},
    )


def _seen_in(report: VerifyReport) -> Seen:
    worst = report.worst
    return not report.failed, (
        f"{len(report.agreements)} comparisons, {len(report.failed)} fail, runs that kept other "
        f"tokens and end there {report.cut_short}; worst is {worst.tensor} of {worst.graph} in "
        f"{worst.bucket}: 1 - cosine {1 - worst.cosine:.1e}, norm ratio - 1 {worst.norm_ratio - 1:+.1e}"
    )


def _run(
    pipeline: Pipeline, sample: Sample, bucket: Bucket, timings: Timings, inspect: Inspect | None = None
) -> FloatArray:
    """[steps, vocabulary] logits of one frame with the original's tokens fed back."""
    tokens = sample.answers[bucket.name].tokens
    _, logits = run_with_answer(pipeline, sample, bucket, tokens, timings, inspect)
    return logits


def _captured_is_right(pipeline: Pipeline, sample: Sample, gates: Gates) -> Seen:
    """Parity looks between stages, which runs them one by one; vehicles run captured programs.

    The two are compared with each other: at a tie of scores both may keep other tokens than the original.
    """
    close: list[bool] = []
    off: dict[str, tuple[float, float]] = {}
    for bucket in pipeline.recipe.buckets:
        one_by_one = _run(pipeline, sample, bucket, Timings(), inspect=lambda stage, read: None)
        cosine, ratio = agree(_run(pipeline, sample, bucket, Timings()), one_by_one)
        close.append(gates.allow("logits", cosine, ratio))
        off[bucket.name] = (1 - cosine, abs(ratio - 1))
    name, (angle, norm) = max(off.items(), key=lambda item: max(item[1]))
    return all(close), f"worst bucket {name}: 1 - cosine {angle:.1e}, norm ratio off by {norm:.1e}"


def _repeats(pipeline: Pipeline, sample: Sample) -> Seen:
    """Same input, same output, whatever ran in between."""
    buckets = pipeline.recipe.buckets
    first = _run(pipeline, sample, buckets[-1], Timings())
    _run(pipeline, sample, buckets[0], Timings())
    difference = float(np.abs(_run(pipeline, sample, buckets[-1], Timings()) - first).max())
    return difference == 0.0, f"logits differ by {difference:.1e}"


def _survives_nan(pipeline: Pipeline, sample: Sample, gates: Gates) -> Seen:
    """A frame that is not finite is an error, and spoils no other."""
    bucket = pipeline.recipe.buckets[-1]
    before = _run(pipeline, sample, bucket, Timings())
    pipeline.pixels[:] = np.nan
    pipeline.encode(Timings())
    try:
        pipeline.prefill(sample.token_ids, sample.length, lambda _: bucket, Timings())
    except PlanError as error:
        after = agree(_run(pipeline, sample, bucket, Timings()), before)
        return gates.allow("logits", *after), str(error)
    return False, "it gave an answer"


def _measure(
    pipeline: Pipeline, sample: Sample, frames: int, memory_mib: MemoryMib | None, say: Progress
) -> tuple[dict[str, BucketTimes], float]:
    """Frames in buckets that alternate in pairs, so that each is measured after itself and after another."""
    buckets = pipeline.recipe.buckets
    order = [bucket for bucket in buckets for _ in range(2)]
    for bucket in order:  # warm up
        _run(pipeline, sample, bucket, Timings())
    free = memory_mib()[0] if memory_mib else 0
    rows: dict[str, list[tuple[dict[str, float], float, bool]]] = {bucket.name: [] for bucket in buckets}
    for index in range(max(frames, len(order))):
        say("frames", index, frames)
        bucket, timings = order[index % len(order)], Timings()
        begin = time.perf_counter()
        _run(pipeline, sample, bucket, timings)
        frame_ms = 1e3 * (time.perf_counter() - begin)
        rows[bucket.name].append((timings.ms, frame_ms, index % 2 == 1))
    growth = float(free - memory_mib()[0]) if memory_mib else 0.0
    return {name: _times(measured, sample, name) for name, measured in rows.items()}, growth


def _times(rows: list[tuple[dict[str, float], float, bool]], sample: Sample, name: str) -> BucketTimes:
    further = max(len(sample.answers[name].tokens) - 1, 1)

    def spread(values: list[float]) -> MedianAndP99:
        found = distribution(values)
        return found.p50, found.p99

    def median(values: list[float]) -> float:
        return float(np.median(values)) if values else float("nan")

    prefill = [ms["prefill"] for ms, _, _ in rows]
    whole = ("prefill", "decode")
    return BucketTimes(
        frames=len(rows),
        prefill_ms=spread(prefill),
        decode_ms=spread([ms.get("decode", 0.0) / further for ms, _, _ in rows]),
        frame_ms=spread([frame for _, frame, _ in rows]),
        steps_ms={step: median([ms[step] for ms, _, _ in rows]) for step in rows[0][0] if step not in whole},
        after_other_bucket_ms=median([ms["prefill"] for ms, _, same in rows if not same]),
        after_same_bucket_ms=median([ms["prefill"] for ms, _, same in rows if same]),
    )


def _finite(value: Any) -> Any:
    """The same with None where a number is not finite: JSON has no such numbers."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
