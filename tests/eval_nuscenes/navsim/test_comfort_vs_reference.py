"""Comfort signals against NAVSIM's, on random signals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from eval_nuscenes.navsim.comfort import (
    LIMITS,
    comfort_signals,
    extended_comfort,
    history_states,
    within_limits,
)
from eval_nuscenes.navsim.scene import Floats
from eval_nuscenes.navsim.simulation import AX, AY, HEADING, STATE, YAW_ACCELERATION, YAW_RATE

TOLERANCE = 3e-7


def states_of(signals: dict[str, list[float]]) -> Floats:
    states = np.zeros((len(signals["heading"]), len(STATE)))
    columns = {
        "heading": HEADING,
        "accel_x": AX,
        "accel_y": AY,
        "yaw_rate": YAW_RATE,
        "yaw_accel": YAW_ACCELERATION,
    }
    for name, column in columns.items():
        states[:, column] = signals[name]
    return states


@pytest.mark.parametrize("devkit", ["v1", "v2"])
def test_signals_and_verdicts(golden: Any, differences: Callable[..., str], devkit: Any) -> None:
    wrong, verdicts = "", set()
    for number, unit in enumerate(golden.files[f"units_{devkit}.json"]["comfort"]):
        signals = comfort_signals(states_of(unit)[None], devkit)
        for name, expected in unit["features"].items():
            wrong += differences(f"{number} {name}", signals[name][0], expected, TOLERANCE)
        verdict = within_limits(signals)[0].astype(int).tolist()
        verdicts.add(tuple(verdict))
        if verdict != unit["flags"]:
            wrong += f"{number} verdict {verdict} instead of {unit['flags']} for {list(LIMITS)}\n"
    assert not wrong, wrong
    assert len(verdicts) > 5


def test_extended_comfort_of_signal_pairs(golden: Any, differences: Callable[..., str]) -> None:
    wrong, verdicts = "", set()
    for number, unit in enumerate(golden.files["units_v2.json"]["comfort"]):
        # The second of a pair only differs in some signals; the pairs already overlap, hence no gap.
        agrees, rms = extended_comfort(states_of(unit), states_of(unit | unit["second"]), gap_s=0.0)
        for name, expected in unit["extended_rms"].items():
            wrong += differences(f"{number} {name}", rms[name], expected, TOLERANCE)
        assert agrees == unit["extended_comfort"], number
        verdicts.add(agrees)
    assert not wrong, wrong
    assert verdicts == {True, False}


def test_history_and_drive_of_every_case(golden: Any, differences: Callable[..., str]) -> None:
    wrong = ""
    for case in golden.cases:
        past = golden.scene(case["scene"], "v2").past
        driven = np.array(case["steps"]["simulated"])
        history = history_states(past)
        assert len(history) == case["v2"]["history_samples"], case["name"]
        expected = {
            "v1": (driven, case["v1"]["comfort_features"], case["v1"]["comfort_flags"]),
            "v2": (
                np.concatenate([history, driven]),
                case["v2"]["history_comfort_features"],
                case["v2"]["history_comfort_flags"],
            ),
        }
        for devkit, (states, features, flags) in expected.items():
            signals = comfort_signals(states[None], devkit)
            for name, values in features.items():
                wrong += differences(f"{case['name']} {devkit} {name}", signals[name][0], values, TOLERANCE)
            assert within_limits(signals)[0].astype(int).tolist() == flags, (case["name"], devkit)
    assert not wrong, wrong
