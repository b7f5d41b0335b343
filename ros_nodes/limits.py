"""The limits of the trajectory guard, and which of them a trajectory breaks. Pure numpy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ros_nodes.motion import STEP_S, Trajectory
from vla_autoprune.errors import InputError

HEADING_NOISE_RAD = 0.03
"""Allowed on top of the curvature, so that a step of centimetres may round its heading."""
BACKWARDS_NOISE_M = 0.1
SIDEWAYS_NOISE_M = 0.1
SIDEWAYS_SHARE = 0.15
"""A car moves where it points: this share of a step, and some noise, may go sideways."""
FURTHEST_M = 1e4


def _setting(default: float | bool | str, description: str, low: float = 0.0, high: float = math.inf) -> Any:
    return field(default=default, metadata={"description": description, "low": low, "high": high})


@dataclass(frozen=True)
class GuardSettings:
    """What the guard lets pass, and its patience; docs/ros.md says where the defaults come from.

    Each field is a parameter of the node, with its description and range.
    """

    base_frame: str = _setting("base_link", "Frame that plans must be in: the rear axle.")
    max_age_ms: float = _setting(500.0, "Oldest input of a plan, in ROS time.", 1, 10_000)
    max_ahead_ms: float = _setting(50.0, "How far a plan's input may lie in the future.", 0, 10_000)
    max_poses: int = _setting(100, "Most poses of a plan.", 2, 1000)
    min_spacing_s: float = _setting(0.05, "Shortest time between poses.", 0.01, 10)
    max_spacing_s: float = _setting(1.0, "Longest time between poses.", 0.01, 10)
    min_horizon_s: float = _setting(2.0, "A plan reaches at least so far.", 0.1, 30)
    max_speed_mps: float = _setting(36.2, "Fastest step of a plan.", 0.1, 100)
    max_curvature_per_m: float = _setting(0.22, "Tightest bend: heading change per metre, rad/m.", 0.001, 2)
    max_acceleration_mps2: float = _setting(4.5, "Strongest acceleration.", 0.1, 20)
    max_braking_mps2: float = _setting(8.0, "Hardest braking.", 0.1, 20)
    max_lateral_acceleration_mps2: float = _setting(5.0, "Speed times yaw rate.", 0.1, 20)
    max_jerk_mps3: float = _setting(15.0, "Fastest change of longitudinal acceleration.", 0.1, 200)
    continuity_horizon_s: float = _setting(1.0, "Compare with the last good plan up to here.", 0.5, 10)
    max_advance_m: float = _setting(3.0, "Furthest a plan may want to be ahead of the last good one.", 0, 100)
    max_lateral_jump_m: float = _setting(1.0, "Furthest a plan may lie beside the last good one.", 0, 100)
    max_distance_m: float = _setting(2.0, "Furthest a plan's present pose may lie from the vehicle.", 0, 100)
    require_odometry: bool = _setting(True, "Refuse plans while odometry does not cover them.")
    odometry_timeout_ms: float = _setting(600.0, "Longest gap between odometry messages.", 1, 10_000)
    max_odometry_jump_m: float = _setting(2.0, "Odometry this far off has jumped.", 0, 100)
    plan_timeout_ms: float = _setting(700.0, "Holds after so long without a plan, steady time.", 1, 10_000)
    hold_ms: float = _setting(1200.0, "Stops so long after the last good plan, steady time.", 1, 10_000)
    comfort_braking_mps2: float = _setting(2.0, "Of the fallback's stop, where there is room.", 0.1, 10)
    plans_to_recover: int = _setting(2, "Good plans in a row that end a stop.", 1, 100)

    def __post_init__(self) -> None:
        for low, high in (
            ("min_spacing_s", "max_spacing_s"),
            ("plan_timeout_ms", "hold_ms"),
            ("comfort_braking_mps2", "max_braking_mps2"),
        ):
            if getattr(self, low) > getattr(self, high):
                raise InputError(
                    f"{low} is {getattr(self, low)}; allowed: at most {high}, which is {getattr(self, high)}"
                )
        if not self.min_spacing_s <= STEP_S <= self.max_spacing_s:
            raise InputError(
                f"min_spacing_s and max_spacing_s are {self.min_spacing_s} and {self.max_spacing_s}; the "
                f"guard's own stops have {STEP_S} s, which must lie between"
            )


class Fault(NamedTuple):
    """Why something was refused: the check, and value and limit in words."""

    check: str
    detail: str


def faults_of(
    trajectory: Trajectory, limits: GuardSettings, speed_mps: float | None = None
) -> Iterator[Fault]:
    """The limits that a trajectory breaks, taken by itself.

    Speeds are chords over times, which are exact in the middle of a step; accelerations and jerks are
    differences of these over the times between.

    Args:
        trajectory: of any content, also garbage.
        limits: what is allowed.
        speed_mps: of the vehicle at the trajectory's stamp; the start is not compared with it when None.
    """
    if trajectory.frame_id != limits.base_frame:
        yield Fault("frame", f"{trajectory.frame_id!r}, not {limits.base_frame!r}")
    count = len(trajectory.due_ns)
    if not 2 <= count <= limits.max_poses:
        yield Fault("spacing", f"{count} poses; allowed 2 to {limits.max_poses}")
        return
    sound = (np.abs(trajectory.poses) <= FURTHEST_M).all(axis=1)
    if not sound.all():
        first = int(np.argmin(sound))
        yield Fault("finite", f"pose {first} is {trajectory.poses[first].tolist()}; allowed ±{FURTHEST_M:g}")
        return
    times = trajectory.times_s
    spacing = np.diff(times)
    if spacing.min() < limits.min_spacing_s or spacing.max() > limits.max_spacing_s:
        worst = spacing.min() if spacing.min() < limits.min_spacing_s else spacing.max()
        yield Fault("spacing", f"{worst:.3f} s; allowed {limits.min_spacing_s} to {limits.max_spacing_s} s")
        return
    if times[-1] < limits.min_horizon_s:
        yield Fault("horizon", f"{times[-1]:.2f} s; at least {limits.min_horizon_s} s")

    points = trajectory.points
    step, turn = np.diff(points[:, :2], axis=0), np.diff(points[:, 2])
    middle = points[:-1, 2] + turn / 2
    ahead = step[:, 0] * np.cos(middle) + step[:, 1] * np.sin(middle)
    aside = step[:, 1] * np.cos(middle) - step[:, 0] * np.sin(middle)
    metres = np.hypot(*step.T)
    speed = metres / spacing
    between = (spacing[1:] + spacing[:-1]) / 2
    acceleration = np.diff(speed) / between
    jerk = np.diff(acceleration) / ((between[1:] + between[:-1]) / 2)
    start = np.zeros(0) if speed_mps is None else (speed[:1] - speed_mps) / (spacing[:1] / 2)
    along = np.concatenate([start, acceleration])

    sideways = np.abs(aside) - SIDEWAYS_NOISE_M - SIDEWAYS_SHARE * metres
    bend = (np.abs(turn) - HEADING_NOISE_RAD) / np.maximum(metres, 1e-6)
    for check, value, allowed, unit in (
        ("direction", -ahead.min(), BACKWARDS_NOISE_M, "m backwards in a step"),
        ("direction", sideways.max(), 0.0, "m sideways beyond what headings explain"),
        ("speed", speed.max(), limits.max_speed_mps, "m/s"),
        ("curvature", bend.max(), limits.max_curvature_per_m, "1/m"),
        ("lateral", (speed * np.abs(turn) / spacing).max(), limits.max_lateral_acceleration_mps2, "m/s²"),
        ("acceleration", along.max(initial=0.0), limits.max_acceleration_mps2, "m/s²"),
        ("braking", -along.min(initial=0.0), limits.max_braking_mps2, "m/s²"),
        ("jerk", np.abs(jerk).max(initial=0.0), limits.max_jerk_mps3, "m/s³"),
    ):
        if not value <= allowed + 1e-6:
            yield Fault(check, f"{value:.3g} {unit}; allowed {allowed:g}")
