"""Online scores: what is matched, missed, late, and how far apart."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ros_nodes.motion import Trajectory
from ros_nodes.open_loop import OnlineScores

SECOND_NS = 1_000_000_000


def path(stamp_ns: int, y: float = 0.0, heading: float = 0.0, steps: int = 6) -> Trajectory:
    times = np.arange(1, steps + 1) * 0.5
    poses = np.column_stack([4.0 * times, np.full(steps, y), np.full(steps, heading)])
    return Trajectory(stamp_ns, "base_link", stamp_ns + np.rint(times * 1e9).astype(np.int64), poses)


def test_plans_are_matched_by_stamp_and_counted() -> None:
    scores = OnlineScores()
    for second in range(4):
        scores.add_truth(path(second * SECOND_NS), float(second))
    scores.add_plan(path(0, y=1.0), 100_000_000, 0.1)
    scores.add_plan(path(0, y=9.0), 200_000_000, 0.2)  # the second one for a frame does not count
    scores.add_plan(path(SECOND_NS, y=2.0), 1_700_000_000, 1.7)
    scores.add_plan(path(77), 0, 2.0)
    summary = scores.summary(deadline_ms=500.0)
    assert (summary.frames, summary.planned, summary.missed, summary.late) == (4, 2, 2, 1)
    assert summary.unmatched == 1
    assert summary.l2_at_m == pytest.approx((1.5, 1.5, 1.5))
    assert summary.latency_ms == pytest.approx((400.0, 670.0, 700.0))
    assert summary.age_ms == pytest.approx((400.0, 670.0, 700.0))
    assert json.loads(summary.as_json())["distances_m"]["0"] == pytest.approx([1.0] * 6)
    assert "missed 2" in summary.lines()[0]


def test_a_frame_at_the_end_of_a_scene_counts_only_where_there_is_truth() -> None:
    scores = OnlineScores()
    scores.add_truth(path(0, steps=2), 0.0)
    scores.add_plan(path(0, y=1.0), 0, 0.0)
    summary = scores.summary(500.0)
    assert summary.complete == 0 and summary.l2_at_m is None
    assert summary.distances_m[0] == [1.0, 1.0, None, None, None, None]


def test_a_stamp_that_comes_again_begins_another_frame() -> None:
    scores = OnlineScores()
    for lap in range(2):
        scores.add_truth(path(0), float(lap))
        scores.add_plan(path(0, y=1.0 + lap), 0, float(lap))
    assert scores.summary(500.0).l2_at_m == pytest.approx((1.5, 1.5, 1.5))


def test_a_clock_that_jumps_to_another_drive_makes_no_plan_old() -> None:
    scores = OnlineScores()
    for second in (0, 1):
        scores.add_truth(path(second * SECOND_NS), float(second))
    scores.add_plan(path(0), 300_000_000, 0.3)
    scores.add_plan(path(SECOND_NS), 3600 * SECOND_NS, 1.2)
    summary = scores.summary(500.0)
    assert summary.planned == 2
    assert summary.age_ms == pytest.approx((300.0, 300.0, 300.0))


def test_the_scored_point_turns_with_the_vehicle() -> None:
    scores = OnlineScores((1.0, 0.0))
    scores.add_truth(path(0), 0.0)
    scores.add_plan(path(0, heading=np.pi), 0, 0.0)
    assert scores.summary(500.0).l2_at_m == pytest.approx((2.0, 2.0, 2.0))
