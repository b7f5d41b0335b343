from __future__ import annotations

import itertools
import json
import sys
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from vla_autoprune.profiling.trace import Span, Tracer, trace_events, write_trace
from vla_autoprune.runtime.pipeline import Pipeline
from vla_autoprune.runtime.planner import Planner


def traced(planner, frame, tracer):
    bundle, backend = planner.bundle, planner.backend
    marked = Planner(bundle, backend, pipeline=Pipeline(bundle, backend, tracer))
    tracer.take()
    return marked.plan_in_bucket(frame, "b40_s1"), tracer.take()


def test_a_trace_holds_every_stage_within_its_plan(planner, small_frames, tmp_path):
    plan, spans = traced(planner, small_frames[0], Tracer())
    path = tmp_path / "trace.json"
    write_trace(trace_events([(plan, spans)], device_clock=False), path)
    events = json.loads(path.read_text())["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    for event in complete:
        assert {"name", "cat", "pid", "tid", "ts", "dur"} <= set(event) and event["dur"] >= 0
    whole = next(event for event in complete if event["name"] == "plan")
    stages = [event for event in complete if event is not whole]
    assert {stage["name"] for stage in stages} == set(plan.timings_ms) - {"total", "prefill", "decode"}
    begin, end = whole["ts"], whole["ts"] + whole["dur"]
    assert all(begin <= s["ts"] and s["ts"] + s["dur"] <= end for s in stages)
    # One lane is one thread: what lies in it may follow or contain, not overlap.
    ordered = sorted(stages, key=lambda stage: stage["ts"])
    assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in itertools.pairwise(ordered))
    assert whole["args"]["bucket"] == "b40_s1"
    named = {event["name"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert named == {"process_name": "vla_autoprune", "thread_name": "host"}


def test_spans_are_as_long_as_the_stages(planner, small_frames):
    less_ms = []
    for _ in range(8):
        plan, spans = traced(planner, small_frames[0], Tracer())
        drawn_ms = Counter()
        for span in spans:
            drawn_ms[span.name] += 1e3 * (span.end_s - span.begin_s)
        stages = [name for name in plan.timings_ms if name.startswith("stage_")]
        less_ms.append([plan.timings_ms[name] - drawn_ms[name] for name in stages])
    # Spans lie within their stages. Where another process runs in between, that is no fault of the trace.
    assert stages and np.min(less_ms) >= 0
    assert np.min(less_ms, axis=0).max() < 0.2


def test_a_devices_steps_are_drawn_in_order_in_their_own_lane(planner, small_frames):
    plan = planner.plan_in_bucket(small_frames[0], "full")
    queued = [Span("preprocess", 1.0, 1.001), Span("vision", 1.001, 1.002), Span("total", 1.0, 1.1)]
    events = trace_events([(plan, queued)], device_clock=True)["traceEvents"]
    device = [event for event in events if event["ph"] == "X" and event["tid"] == 2]
    names = {event["name"] for event in device}
    assert {"vision", "stage_00", "head", "decode_head"} <= names and not names & {"preprocess", "total"}
    # A viewer drops what overlaps by a nanosecond: they touch, in numbers that no conversion rounds.
    assert all(a["ts"] + a["dur"] == b["ts"] for a, b in itertools.pairwise(device))
    assert all((8 * event[key]).is_integer() for event in device for key in ("ts", "dur"))
    for event in device:
        assert event["dur"] == pytest.approx(1e3 * plan.timings_ms[event["name"]], abs=0.13)


def test_nvtx_ranges_have_the_names_of_the_stages(planner, small_frames, monkeypatch):
    pytest.importorskip("nvtx")
    pushed, open_now = [], []

    class Domain:
        def get_event_attributes(self, message):
            return message

        def push_range(self, message):
            pushed.append(message)
            open_now.append(message)

        def pop_range(self):
            open_now.pop()

    monkeypatch.setattr("nvtx.get_domain", lambda name: Domain())
    plan, spans = traced(planner, small_frames[0], Tracer())
    assert {span.name for span in spans} <= set(pushed) and not open_now
    assert set(plan.timings_ms) - {"prefill", "decode"} <= set(pushed)


def test_without_nvtx_steps_are_traced_all_the_same(planner, small_frames, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    tracer = Tracer()
    assert not tracer.marks_nvtx
    assert traced(planner, small_frames[0], tracer)[1]
