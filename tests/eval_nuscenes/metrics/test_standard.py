"""Our own protocol: exact boxes that turn, steps by themselves, existing keyframes only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from eval_nuscenes.metrics import PROTOCOLS, OpenLoopTruth, Score, TrackedBox
from eval_nuscenes.metrics.polygons import driven_headings

FORWARD = np.stack([np.zeros(6), np.arange(1, 7) * 2.0], axis=1).astype(np.float32)
HALF_WIDTH_M, HALF_LENGTH_M = 1.85 / 2, 4.084 / 2


def car(x: float, y: float, yaw: float = np.pi / 2, category: str = "vehicle.car") -> TrackedBox:
    return TrackedBox(x, y, 4.0, 2.0, yaw, category, "other")


def truth_with(*boxes: TrackedBox, existing: int = 6, past: int = 2, waypoints=FORWARD) -> OpenLoopTruth:
    exists = (True,) * (existing + 1) + (False,) * (6 - existing)
    steps = tuple(boxes if there else () for there in exists)
    truth = np.where(np.arange(6)[:, None] < existing, waypoints, 0).astype(np.float32)
    return OpenLoopTruth(truth, exists, steps, past_keyframes=past)


def standard(truth: OpenLoopTruth, plan: np.ndarray) -> Score:
    return PROTOCOLS["standard"].scorer(truth)(plan)


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize(("gap_m", "touches"), [(0.05, False), (-0.05, True)])
def test_centimetres_count_alike_on_both_sides(side: int, gap_m: float, touches: bool) -> None:
    away = FORWARD + np.float32([10.0, 0.0])
    beside = car(10.0 + side * (HALF_WIDTH_M + 1.0 + gap_m), 6.0)
    assert any(standard(truth_with(beside), away).hits) == touches


@pytest.mark.parametrize(("gap_m", "touches"), [(0.05, False), (-0.05, True)])
def test_the_box_reaches_half_a_metre_farther_ahead_than_behind(gap_m: float, touches: bool) -> None:
    stop = np.zeros((6, 2), dtype=np.float32)
    driven = FORWARD + np.float32([30.0, 0.0])
    ahead = car(0.0, HALF_LENGTH_M + 0.5 + 2.0 + gap_m)
    behind = car(0.0, -(HALF_LENGTH_M - 0.5 + 2.0 + gap_m))
    for box in (ahead, behind):
        assert any(standard(truth_with(box, waypoints=driven), stop).hits) == touches


def test_the_box_turns_with_the_path() -> None:
    angles = np.pi / 12 * np.arange(1, 7)
    left_turn = (8 * np.stack([np.cos(angles) - 1, np.sin(angles)], axis=1)).astype(np.float32)
    x, y = left_turn[-1]
    nose = car(x - HALF_LENGTH_M - 0.5 - 0.5, y, yaw=np.pi)
    beside = car(x, y + HALF_WIDTH_M + 1.3, yaw=np.pi)  # clear of the turned box, not of one that looks ahead
    assert standard(truth_with(nose), left_turn).hits[-1]
    assert not standard(truth_with(beside), left_turn).hits[-1]
    assert PROTOCOLS["uniad"].scorer(truth_with(beside))(left_turn).hits[-1]


def test_people_count_and_barriers_do_not() -> None:
    away = FORWARD + np.float32([10.0, 0.0])
    for category, counts in (
        ("human.pedestrian.child", True),
        ("vehicle.bicycle", True),
        ("movable_object.barrier", False),
        ("animal", False),
    ):
        assert any(standard(truth_with(car(10.0, 6.0, category=category)), away).hits) == counts, category


def test_every_step_stands_for_itself() -> None:
    plan = FORWARD + np.array([[0, 1, 0, 2, 0, 5]], dtype=np.float32).T * np.float32([1, 0])
    score = standard(truth_with(car(5.0, 12.0)), plan)
    assert score.l2_m == pytest.approx((1.0, 2.0, 5.0))
    assert score.distance_m == pytest.approx((0, 1, 0, 2, 0, 5))
    assert score.hits == (False,) * 5 + (True,)
    assert score.collision == (0.0, 0.0, 1.0)


def test_only_existing_keyframes_after_two_past_ones_count() -> None:
    plan = FORWARD + np.float32([1.0, 0.0])
    cut = standard(truth_with(car(1.0, 4.0), existing=4), plan)
    assert cut.counted
    assert cut.counted_at == (True, True, False)
    assert cut.steps_counted == (True,) * 4 + (False,) * 2
    assert cut.l2_m == pytest.approx((1.0, 1.0, 0.0))
    assert not standard(truth_with(existing=0), plan).counted
    assert not standard(truth_with(past=1), plan).counted
    assert PROTOCOLS["uniad"].scorer(truth_with(existing=4))(plan).counted_at == (True, True, True)


def test_a_road_user_inside_the_true_car_is_left_out_and_others_are_not() -> None:
    wrong = car(0.0, 12.0)
    assert not any(standard(truth_with(wrong), FORWARD).hits)
    right = replace(car(0.0, 0.0), x=3.0, y=12.0, track="right")
    swerve = FORWARD + np.float32([2.5, 0.0])
    assert standard(truth_with(wrong, right), swerve).hits[-1]
    # The protocols that follow UniAD drop the whole step instead.
    assert not PROTOCOLS["uniad"].scorer(truth_with(wrong, right))(swerve).hits[-1]


def test_the_heading_holds_while_standing_and_when_reversing() -> None:
    standing = np.full((6, 2), 0.05)
    np.testing.assert_allclose(driven_headings(standing), np.pi / 2)
    back = np.stack([np.zeros(6), -np.arange(1, 7.0)], axis=1)
    np.testing.assert_allclose(driven_headings(back), np.pi / 2, atol=1e-12)
    right = np.array([[0, 2], [0, 4], [0, 6], [2, 6], [4, 6], [4.1, 6.0]])
    headings = driven_headings(right)
    np.testing.assert_allclose(headings[[0, 1]], np.pi / 2)
    assert headings[3] == pytest.approx(0.0)
    assert headings[5] == headings[4]  # the last move is too short to tell


def test_a_road_user_comes_back_once_the_true_car_has_passed_it() -> None:
    stop = np.zeros((6, 2), dtype=np.float32)
    assert standard(truth_with(car(0.0, 3.0)), stop).hits == (False,) * 3 + (True,) * 3
    elsewhere = truth_with(car(0.0, 3.0), waypoints=FORWARD + np.float32([30.0, 0.0]))
    assert all(standard(elsewhere, stop).hits)


def test_the_true_heading_does_not_turn_back_where_the_scene_ends() -> None:
    angles = np.pi / 12 * np.arange(1, 7)
    left_turn = (8 * np.stack([np.cos(angles) - 1, np.sin(angles)], axis=1)).astype(np.float32)
    last = left_turn[3] - left_turn[2]
    x, y = left_turn[3] + 2.3 * last / np.linalg.norm(last)  # beside a nose that turns back
    person = TrackedBox(float(x), float(y), 0.3, 0.3, 0.0, "human.pedestrian.adult", "person")
    assert not any(standard(truth_with(person, existing=4, waypoints=left_turn), left_turn).hits)
    elsewhere = truth_with(person, existing=4, waypoints=left_turn + np.float32([30.0, 0.0]))
    assert standard(elsewhere, left_turn).hits[3]
