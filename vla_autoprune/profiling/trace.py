"""A plan as a timeline: a file for chrome://tracing and Perfetto, NVTX ranges of its names for Nsight."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_autoprune.files import write_whole
from vla_autoprune.frame import Plan, Rehearsal
from vla_autoprune.profiling.stage_work import ON_HOST, SUMS, phase_of

NVTX_DOMAIN = "vla_autoprune"
HOST_LANE, DEVICE_LANE = 1, 2


@dataclass(frozen=True)
class Span:
    """One step as the host saw it, in seconds of `time.perf_counter`."""

    name: str
    begin_s: float
    end_s: float


class Tracer:
    """An `Around` that notes when each step began and ended, and marks it with NVTX where that is there."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._nvtx = _nvtx_domain()

    @property
    def marks_nvtx(self) -> bool:
        """Whether Nsight will see the steps."""
        return self._nvtx is not None

    def __call__(self, step: str) -> AbstractContextManager[None]:
        """Entered around a step."""
        return self._span(step)

    @contextmanager
    def _span(self, step: str) -> Iterator[None]:
        if self._nvtx is not None:
            self._nvtx.push_range(self._nvtx.get_event_attributes(message=step))
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.spans.append(Span(step, begin, time.perf_counter()))
            if self._nvtx is not None:
                self._nvtx.pop_range()

    def take(self) -> list[Span]:
        """The spans so far, which are then forgotten."""
        spans, self.spans = self.spans, []
        return spans


def _nvtx_domain() -> Any:
    try:
        import nvtx
    except ModuleNotFoundError:
        return None
    return nvtx.get_domain(NVTX_DOMAIN)


def trace_events(
    plans: Sequence[tuple[Plan | Rehearsal, Sequence[Span]]], device_clock: bool
) -> dict[str, Any]:
    """Chrome's trace format: complete events in microseconds, one lane for the host, one for a device.

    A device's steps have durations but no times of the host's clock: they are drawn one after the other from
    the moment their plan began.

    Args:
        plans: with the spans taken while each was made.
        device_clock: whether the backend's programs are timed by a device.

    Returns:
        The document that chrome://tracing and ui.perfetto.dev open.
    """
    process = os.getpid()

    origin = min((span.begin_s for _, spans in plans for span in spans), default=0.0)

    def event(name: str, lane: int, begin_s: float, end_s: float, **more: Any) -> dict[str, Any]:
        begin, end = _microseconds(begin_s - origin), _microseconds(end_s - origin)
        place = {"pid": process, "tid": lane, "ts": begin, "dur": end - begin}
        return {"name": name, "cat": more.pop("cat", phase_of(name)), "ph": "X", **place, "args": more}

    def named(what: str, lane: int, name: str) -> dict[str, Any]:
        return {"name": what, "ph": "M", "pid": process, "tid": lane, "args": {"name": name}}

    events = [named("process_name", HOST_LANE, "vla_autoprune"), named("thread_name", HOST_LANE, "host")]
    if device_clock:
        events.append(named("thread_name", DEVICE_LANE, "device (in order, from the plan's begin)"))
    for plan, spans in plans:
        for span in sorted(spans, key=lambda each: each.begin_s):
            if span.name == "total":
                tokens = [len(kept) for kept in plan.kept_visual]
                about = {"bucket": plan.bucket, "visual_tokens_into_stages": tokens, "kv_mib": plan.kv_mib}
                events.append(event("plan", HOST_LANE, span.begin_s, span.end_s, cat="plan", **about))
            else:
                events.append(event(span.name, HOST_LANE, span.begin_s, span.end_s))
        if device_clock:
            begin_s = min(span.begin_s for span in spans)
            for name, ms in plan.timings_ms.items():
                if name not in (*SUMS, *ON_HOST):
                    end_s = begin_s + ms / 1e3
                    events.append(event(name, DEVICE_LANE, begin_s, end_s))
                    begin_s = end_s
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"plans": len(plans)}}


def _microseconds(seconds: float) -> float:
    """In eighths, which neither binary nor decimal fractions round.

    Perfetto drops an event that ends a nanosecond after the next begins, or after the one it lies in.
    """
    return round(8e6 * seconds) / 8


def write_trace(trace: dict[str, Any], path: Path) -> None:
    """Write a trace as one JSON file.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(trace).encode())
