"""What the golden cases of the protocols on half-metre cells leave open."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from eval_nuscenes.metrics import PROTOCOLS, OpenLoopTruth, TrackedBox

AWAY = np.full((6, 2), -45.0, dtype=np.float32)


def car(x: float, y: float, length: float = 4.0) -> TrackedBox:
    return TrackedBox(x, y, length, 2.0, np.pi / 2, "vehicle.car", "other")


def hits(protocol: str, at: tuple[float, float], now: TrackedBox, later: TrackedBox) -> bool:
    """Whether a plan that stays at a place collides with a car that is at another place from 0.5 s on."""
    truth = OpenLoopTruth(AWAY, (True,) * 7, ((now,), *((later,),) * 6))
    return any(PROTOCOLS[protocol].scorer(truth)(np.full((6, 2), at, dtype=np.float32)).hits)


@pytest.mark.parametrize(
    ("x", "y", "near"),
    [(14.9, 0.0, True), (-15.1, 0.0, False), (0.0, -29.9, True), (0.0, 30.1, False)],
)
def test_vad_sees_15_m_to_the_sides_and_30_m_along(x: float, y: float, near: bool) -> None:
    assert hits("vad", (x, y), car(x, y), car(x, y)) == near
    assert hits("vad_unfiltered", (x, y), car(x, y), car(x, y))


def test_road_users_of_vad_move_but_keep_the_size_they_had() -> None:
    now, grown = car(5.0, 0.0), car(5.0, 10.0, length=14.0)
    assert hits("vad", (5.0, 8.0), now, grown)
    assert not hits("vad", (5.0, 2.0), now, grown)
    assert hits("uniad", (5.0, 2.0), now, grown)


def test_stp3_leaves_out_scenes_without_a_usable_can_bus() -> None:
    truth = OpenLoopTruth(AWAY, (True,) * 7, ((),) * 7)
    listed = replace(truth, can_bus_blacklisted=True)
    assert PROTOCOLS["stp3"].scorer(truth)(AWAY).counted
    assert not PROTOCOLS["stp3"].scorer(listed)(AWAY).counted
    assert PROTOCOLS["vad"].scorer(listed)(AWAY).counted
