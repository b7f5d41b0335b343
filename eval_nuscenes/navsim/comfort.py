"""Is the drive comfortable? NAVSIM's limits on smoothed accelerations, jerks and yaw.

Every filter is a Savitzky-Golay fit; every result is rounded to 8 decimals before it goes on, as in nuPlan.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eval_nuscenes.navsim.scene import PACIFICA, STEP_S, Devkit, EgoMotion, Flags, Floats
from eval_nuscenes.navsim.simulation import AX, AY, HEADING, YAW_ACCELERATION, YAW_RATE

LIMITS = {
    "lon_accel": (-4.05, 2.40),
    "lat_accel": (-4.89, 4.89),
    "mag_jerk": (-8.37, 8.37),
    "lon_jerk": (-4.13, 4.13),
    "yaw_accel": (-1.93, 1.93),
    "yaw_rate": (-0.95, 0.95),
}
"""Each signal has to stay strictly inside at every sample. m/s², m/s³, rad/s², rad/s."""

EXTENDED_LIMITS = {"acceleration": 0.7, "jerk": 0.5, "yaw_rate": 0.1, "yaw_accel": 0.1}
"""What the drives of two neighbouring frames may differ by, as a root mean square."""

ACCELERATION_WINDOW = 8
JERK_WINDOW = 15
YAW_WINDOW = 5
WHOLE_WINDOW = 41
"""v1 fits one parabola to the whole drive."""


def comfort_signals(states: Floats, devkit: Devkit) -> dict[str, Floats]:
    """The six smoothed signals.

    Args:
        states: [P, n, 11] at 10 Hz.
        devkit: v1 takes accelerations at the rear axle and fits one parabola; v2 takes them at the centre and
            smooths locally.

    Returns:
        [P, n] by the names of `LIMITS`.
    """
    ax, ay = states[..., AX], states[..., AY]
    magnitude = _smooth(np.hypot(ax, ay), ACCELERATION_WINDOW)
    if devkit == "v1":
        acceleration_window = jerk_window = WHOLE_WINDOW
    else:
        acceleration_window, jerk_window = ACCELERATION_WINDOW, JERK_WINDOW
        # Written like the devkit's rigid-body shift; its lateral part is lost there as well.
        ax = ax + PACIFICA.rear_axle_to_centre_m * (
            states[..., YAW_RATE] ** 2 + states[..., YAW_ACCELERATION]
        )
    heading = np.unwrap(states[..., HEADING], axis=-1)
    return {
        "lon_accel": _smooth(ax, acceleration_window),
        "lat_accel": _smooth(ay, acceleration_window),
        "mag_jerk": _smooth(magnitude, jerk_window, derivative=1),
        "lon_jerk": _smooth(_smooth(ax, ACCELERATION_WINDOW), jerk_window, derivative=1),
        "yaw_accel": _smooth(heading, YAW_WINDOW, derivative=2, order=3),
        "yaw_rate": _smooth(heading, YAW_WINDOW, derivative=1),
    }


def within_limits(signals: dict[str, Floats]) -> Flags:
    """[P, 6] whether each signal stays inside its limits, in the order of `LIMITS`."""
    return np.stack(
        [
            ((low < signals[name]) & (signals[name] < high)).all(axis=-1)
            for name, (low, high) in LIMITS.items()
        ],
        axis=-1,
    )


def history_states(past: Sequence[EgoMotion]) -> Floats:
    """Logged ego motion at 10 Hz, to be put in front of a drive.

    Args:
        past: at least two moments, oldest first, the last one is now.

    Returns:
        [n, 11]; 14 rows for the usual 1.5 s.
    """
    stamps = np.array([motion.time_us for motion in past])
    known = np.stack([motion.state() for motion in past])
    known[:, HEADING] = np.unwrap(known[:, HEADING])
    # The devkit drops the last of the stamps before the end; the drive itself starts with now.
    wanted = np.arange(stamps[0], stamps[-1], round(STEP_S * 1e6))[:-1] - stamps[0]
    since = stamps - stamps[0]
    return np.column_stack([np.interp(wanted, since, column) for column in known.T])


def extended_comfort(now: Floats, before: Floats, gap_s: float) -> tuple[bool, dict[str, float]]:
    """Do the drives planned in two neighbouring frames agree?

    Args:
        now: [41, 11] of the later frame.
        before: [41, 11] of the earlier frame.
        gap_s: between the frames.

    Returns:
        Whether all differences are within `EXTENDED_LIMITS`, and the differences by the same names.
    """
    shift = round(gap_s / STEP_S)
    # Cut before smoothing: the ends of the overlap are fitted as ends.
    both = np.stack([before[shift:], now[: len(now) - shift]])
    acceleration = _smooth(np.hypot(both[..., AX], both[..., AY]), ACCELERATION_WINDOW)
    heading = np.unwrap(both[..., HEADING], axis=-1)
    signals = {
        "acceleration": acceleration,
        "jerk": _smooth(acceleration, JERK_WINDOW, derivative=1),
        "yaw_rate": _smooth(heading, YAW_WINDOW, derivative=1),
        "yaw_accel": _smooth(heading, YAW_WINDOW, derivative=2),
    }
    rms = {name: float(np.sqrt(np.mean((signal[0] - signal[1]) ** 2))) for name, signal in signals.items()}
    return all(rms[name] <= limit for name, limit in EXTENDED_LIMITS.items()), rms


def _smooth(signal: Floats, window: int, derivative: int = 0, order: int = 2) -> Floats:
    from scipy.signal import savgol_filter

    window = min(window, signal.shape[-1])
    filtered = savgol_filter(
        signal, polyorder=order, window_length=window, deriv=derivative, delta=STEP_S, axis=-1
    )
    return np.round(filtered, 8)
