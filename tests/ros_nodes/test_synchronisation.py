"""Images that belong together, whatever order and time they come in. No ROS."""

from __future__ import annotations

import pytest

from ros_nodes.synchronisation import Synchroniser

MS = 1_000_000


@pytest.fixture
def synchroniser() -> Synchroniser[str]:
    return Synchroniser(("LEFT", "FRONT", "RIGHT"), "FRONT", tolerance_ms=20.0, wait_ms=30.0)


def test_a_set_is_given_out_once_when_it_is_whole(synchroniser):
    assert synchroniser.take(0.0, True) is None
    synchroniser.add("LEFT", 100 * MS, "left", 0.000)
    synchroniser.add("FRONT", 110 * MS, "front", 0.001)
    assert synchroniser.take(0.002, True) is None
    synchroniser.add("RIGHT", 130 * MS, "right", 0.003)
    assert synchroniser.take(0.004, False) is None, "the ego state is still to come"
    frame = synchroniser.take(0.005, True)
    assert (frame.stamp_ns, frame.arrived_s, frame.absent) == (110 * MS, 0.001, {})
    assert {camera: image.content for camera, image in frame.images.items()} == {
        "LEFT": "left",
        "FRONT": "front",
        "RIGHT": "right",
    }
    assert synchroniser.take(0.006, True) is None


def test_of_several_images_the_nearest_in_time_joins(synchroniser):
    for stamp in (85, 95, 105, 115):
        synchroniser.add("LEFT", stamp * MS, str(stamp), 0.0)
        synchroniser.add("RIGHT", stamp * MS, str(stamp), 0.0)
    synchroniser.add("FRONT", 104 * MS, "front", 0.0)
    assert synchroniser.take(0.0, True).images["LEFT"].content == "105"


def run_up(period_ms: int, last_ms: int) -> Synchroniser[str]:
    """Two cameras and a tolerance as long as their period; LEFT has come up to a time."""
    pair = Synchroniser(("LEFT", "FRONT"), "FRONT", tolerance_ms=float(period_ms), wait_ms=30.0)
    for stamp in range(last_ms - 3 * period_ms, last_ms + 1, period_ms):
        pair.add("LEFT", stamp * MS, str(stamp), 0.0)
    return pair


def test_an_image_of_the_frame_before_does_not_pass_for_one_that_is_due():
    pair = run_up(period_ms=50, last_ms=950)
    pair.add("FRONT", 1000 * MS, "front", 10.0)
    assert pair.take(10.0, True) is None
    pair.add("LEFT", 1001 * MS, "1001", 10.02)
    frame = pair.take(10.02, True)
    assert frame.images["LEFT"].content == "1001"
    assert not frame.behind_ms and frame.skew_ms == 1.0


def test_an_image_that_is_due_and_does_not_come_costs_the_wait_and_is_named():
    pair = run_up(period_ms=50, last_ms=950)
    pair.add("FRONT", 1000 * MS, "front", 10.0)
    assert pair.take(10.029, True) is None
    frame = pair.take(10.031, True)
    assert frame.images["LEFT"].content == "950"
    assert frame.behind_ms == {"LEFT": 50.0} and not frame.absent and frame.skew_ms == 50.0


@pytest.mark.parametrize(("last_ms", "why"), [(970, "due 20 ms after"), (1010, "has come"), (1000, "same")])
def test_nobody_waits_for_an_image_that_is_hardly_nearer(last_ms, why):
    pair = run_up(period_ms=50, last_ms=last_ms)
    pair.add("FRONT", 1000 * MS, "front", 10.0)
    assert pair.take(10.0, True).images["LEFT"].content == str(last_ms), why


def test_a_camera_of_half_the_rate_is_not_waited_for():
    pair = run_up(period_ms=100, last_ms=950)
    pair.add("FRONT", 1000 * MS, "front", 10.0)
    assert pair.take(10.0, True).images["LEFT"].content == "950"


def test_one_lost_image_does_not_pass_for_a_longer_period():
    pair = run_up(period_ms=50, last_ms=850)
    pair.add("LEFT", 950 * MS, "950", 0.0)
    pair.add("FRONT", 1000 * MS, "front", 10.0)
    assert pair.take(10.0, True) is None


def test_it_waits_only_so_long(synchroniser):
    synchroniser.add("FRONT", 100 * MS, "front", 10.0)
    synchroniser.add("LEFT", 60 * MS, "left", 10.0)
    assert synchroniser.take(10.029, True) is None
    frame = synchroniser.take(10.031, True)
    assert frame.absent == {"LEFT": "is 40 ms from FRONT, allowed 20", "RIGHT": "never arrived"}


def test_a_dead_camera_costs_no_time_until_it_is_back(synchroniser):
    def front(stamp_ms: int, now_s: float, **others: int):
        for camera, other_ms in others.items():
            synchroniser.add(camera, other_ms * MS, camera, now_s)
        synchroniser.add("FRONT", stamp_ms * MS, "front", now_s)
        return synchroniser.take(now_s, True)

    for step in range(1, 4):
        assert front(100 * step, float(step), LEFT=100 * step) is None
        assert synchroniser.take(step + 0.5, True).absent == {"RIGHT": "never arrived"}
    assert front(400, 4.0, LEFT=400).absent == {"RIGHT": "never arrived"}
    assert front(500, 5.0, LEFT=500, RIGHT=400) is None, "it is heard again"
    synchroniser.add("RIGHT", 500 * MS, "right", 5.01)
    assert synchroniser.take(5.02, True).absent == {}


def test_front_images_that_come_faster_than_the_wait_do_not_starve(synchroniser):
    given = []
    for step in range(60):
        now_s = step * 0.02  # the wait is 30 ms
        synchroniser.add("LEFT", step * 20 * MS, "left", now_s)
        synchroniser.add("FRONT", step * 20 * MS, "front", now_s)
        for later_s in (0.0, 0.005, 0.015):
            if frame := synchroniser.take(now_s + later_s, True):
                given.append((step, frame))
    assert [frame.absent for _, frame in given] == [{"RIGHT": "never arrived"}] * len(given)
    assert given[0][0] <= 5, "the first frame waits for no more than a few others"
    assert given[-1][0] == 59 and len(given) >= 45, "then nobody waits for the dead camera"
    assert synchroniser.superseded == 60 - len(given)


def test_front_images_that_come_too_fast_do_not_hide_that_there_is_no_odometry(synchroniser):
    given = 0
    for step in range(60):
        for camera in ("LEFT", "RIGHT", "FRONT"):
            synchroniser.add(camera, step * 20 * MS, "", step * 0.02)
        given += synchroniser.take(step * 0.02, False) is not None
    assert given >= 10


def test_the_newest_front_image_wins(synchroniser):
    for stamp in (100, 200, 300):
        synchroniser.add("FRONT", stamp * MS, str(stamp), 0.0)
    assert synchroniser.pending_stamp_ns == 300 * MS and synchroniser.superseded == 2
    assert synchroniser.take(1.0, False).images["FRONT"].content == "300"


def test_stamps_that_do_not_rise(synchroniser):
    assert synchroniser.add("FRONT", 5_000 * MS, "a", 0.0) == "kept"
    assert synchroniser.add("FRONT", 5_000 * MS, "b", 0.1) == "repeated"
    assert synchroniser.add("FRONT", 4_500 * MS, "c", 0.2) == "out of order"
    assert synchroniser.pending_stamp_ns == 5_000 * MS
    synchroniser.add("LEFT", 5_000 * MS, "old", 0.2)
    assert synchroniser.add("FRONT", 3_000 * MS, "d", 0.3) == "clock went back"
    assert synchroniser.add("LEFT", 3_000 * MS, "new", 0.3) == "clock went back"
    frame = synchroniser.take(1.0, True)
    assert (frame.stamp_ns, frame.images["LEFT"].content) == (3_000 * MS, "new")


def test_silence_is_counted_from_the_last_image(synchroniser):
    assert synchroniser.silent_s("LEFT", 5.0) is None
    synchroniser.add("LEFT", 1, "left", 2.0)
    assert synchroniser.silent_s("LEFT", 5.0) == 3.0
