"""The ego state at a frame's time. No ROS."""

from __future__ import annotations

import math

import pytest

from ros_nodes.ego_motion import EgoMotion, OdometrySample
from vla_autoprune.errors import InputError
from vla_autoprune.frame import EgoState

MS = 1_000_000


def sample(ms: int, speed: float = 5.0, x: float | None = None, yaw_rate: float = 0.1) -> OdometrySample:
    return OdometrySample(ms * MS, speed, yaw_rate, x=speed * ms / 1e3 if x is None else x)


def test_the_newest_sample_up_to_the_frame_counts():
    ego = EgoMotion(max_age_ms=200.0)
    for ms in range(1_000, 2_000, 100):
        ego.add(sample(ms, speed=ms / 1e3 * 2.0, x=(ms / 1e3) ** 2))
    assert ego.at(1_550 * MS) == EgoState(3.0, pytest.approx(2.0), 0.1)
    assert ego.pose_at(1_550 * MS).x == pytest.approx(2.25)
    assert ego.reached(1_900 * MS) and not ego.reached(1_901 * MS)
    assert ego.travelled_m == pytest.approx(0.1 * 2.0 * sum(ms / 1e3 for ms in range(1_100, 2_000, 100)))


def test_acceleration_may_have_a_topic_of_its_own():
    ego = EgoMotion(200.0, acceleration_source="topic")
    ego.add(sample(1_000))
    assert not ego.reached(1_000 * MS)
    with pytest.raises(InputError, match="no acceleration has arrived"):
        ego.at(1_000 * MS)
    ego.add_acceleration(950 * MS, -1.5)
    ego.add_acceleration(1_000 * MS, -2.5)
    assert ego.reached(1_000 * MS)
    assert ego.at(1_000 * MS).acceleration_mps2 == -2.5
    assert ego.add_acceleration(1_010 * MS, math.nan) == "not finite"
    assert ego.add_acceleration(990 * MS, 0.0) == "out of order"
    ego.add(sample(1_300))
    with pytest.raises(InputError, match="acceleration is 300 ms older than the image, allowed 200"):
        ego.at(1_300 * MS)


@pytest.mark.parametrize("odometry_first", [True, False])
def test_topics_may_learn_in_any_order_that_the_clock_went_back(odometry_first):
    ego = EgoMotion(200.0, acceleration_source="topic")
    ego.add(sample(10_000))
    ego.add_acceleration(10_000 * MS, -1.5)
    takes = [lambda: ego.add(sample(5_000)), lambda: ego.add_acceleration(5_000 * MS, -2.5)]
    for take in takes if odometry_first else reversed(takes):
        assert not ego.reached(5_000 * MS)
        take()
    assert ego.reached(5_000 * MS)
    assert ego.at(5_000 * MS).acceleration_mps2 == -2.5


def test_what_stops_is_named():
    ego = EgoMotion(200.0)
    with pytest.raises(InputError, match="no odometry has arrived"):
        ego.at(0)
    ego.add(sample(1_000))
    with pytest.raises(InputError, match="odometry is 201 ms older than the image"):
        ego.at(1_201 * MS)
    with pytest.raises(InputError, match="odometry is 500 ms newer"):
        ego.at(500 * MS)


@pytest.mark.parametrize("field", ["speed_mps", "yaw_rate_rps", "x", "y", "heading"])
def test_nothing_that_is_not_finite_gets_in(field):
    ego = EgoMotion(200.0)
    values = {"stamp_ns": 1, "speed_mps": 1.0, "yaw_rate_rps": 0.0, "x": 0.0, "y": 0.0, "heading": 0.0}
    assert ego.add(OdometrySample(**{**values, field: math.nan})) == "not finite"
    assert ego.newest is None


@pytest.mark.parametrize("jumped", [sample(1_100, x=30.0), sample(1_100, speed=12.0, x=5.5)])
def test_acceleration_does_not_reach_across_a_jump(jumped):
    ego = EgoMotion(200.0)
    ego.add(sample(900, 4.8, x=4.5))
    ego.add(sample(1_000, 5.0, x=5.0))
    assert ego.at(1_000 * MS).acceleration_mps2 == pytest.approx(2.0)
    assert ego.add(jumped) == "jump"
    assert ego.at(1_100 * MS) == EgoState(jumped.speed_mps, 0.0, 0.1)
    after = sample(1_200, jumped.speed_mps + 0.1, x=jumped.x + 0.1 * jumped.speed_mps)
    assert ego.add(after) is None
    assert ego.at(1_200 * MS).acceleration_mps2 == pytest.approx(1.0)
    assert ego.counts == {"odometry jump": 1}


def test_a_clock_that_goes_back_begins_a_new_history():
    ego = EgoMotion(200.0)
    ego.add(sample(10_000))
    assert not ego.reached(5_000 * MS), "what is there is of the time before"
    assert ego.add(sample(9_900)) == "out of order"
    assert ego.add(sample(5_000)) == "clock went back"
    assert ego.newest.stamp_ns == 5_000 * MS
    assert ego.at(5_000 * MS).acceleration_mps2 == 0.0
