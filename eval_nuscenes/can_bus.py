"""A drive as nuScenes CAN bus messages: the files that NuScenesCanBus reads, with its units and signs.

Two signs differ between messages: `rotation_rate` and `yaw_rate` are positive to the left, as is `steering`;
`steeranglefeedback` is positive to the right, as the expansion's documentation has it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval_nuscenes.world.scene import Scene

Series = NDArray[np.float64]

WHEELBASE_M = 2.588
STEERING_RATIO = 15.2
"""Turns of the steering wheel per turn of the front wheels."""

_GRAVITY = 9.81
_WHEEL_CIRCUMFERENCE_M = 1.94
_TRACK_M = 1.5
_ROUTE_STEP_M = 0.5
_ROUTE_MARGIN_M = 50.0
_RATES_HZ = {
    "pose": 50,
    "ms_imu": 100,
    "steeranglefeedback": 100,
    "vehicle_monitor": 2,
    "zoesensors": 100,
    "zoe_veh_info": 100,
}


def can_bus_messages(scene: Scene, start_utime: int, keyframes: tuple[int, ...]) -> dict[str, Any]:
    """Everything the CAN bus says during a drive.

    States are 0.1 s apart; faster messages interpolate linearly between them.

    Args:
        scene: the drive, in the coordinates of its location's map.
        start_utime: time of the first state, microseconds.
        keyframes: state indices that are samples of the data set.

    Returns:
        Content of can_bus/<scene>_<key>.json by key: the six recorded messages, the derived `meta` and
        `route`, and `command`, which nuScenes lacks: left, straight or right with its utime, per keyframe.
    """
    known = _Drive(scene)
    messages: dict[str, Any] = {}
    for name, rate in _RATES_HZ.items():
        count = int(np.floor(known.duration_s * rate + 1e-6)) + 1
        times = np.arange(count) / rate
        fields = _FIELDS[name](known, times)
        utimes = [start_utime + round(time * 1e6) for time in times.tolist()]
        rows = [
            dict(zip(fields, row, strict=True)) for row in zip(*map(_rounded, fields.values()), strict=True)
        ]
        messages[name] = [{"utime": utime, **row} for utime, row in zip(utimes, rows, strict=True)]
    messages["meta"] = {name: _statistics(rows) for name, rows in messages.items()}
    messages["route"] = _route(scene)
    messages["command"] = [
        {
            "utime": start_utime + round(scene.states[index].time_s * 1e6),
            "command": scene.states[index].command.value,
        }
        for index in keyframes
    ]
    return messages


class _Drive:
    """The ego's motion as functions of time, with what a bicycle model adds."""

    def __init__(self, scene: Scene) -> None:
        states = scene.states
        start = states[0].time_s
        self._times = np.array([state.time_s - start for state in states])
        ego = np.array(
            [
                (
                    s.ego.x,
                    s.ego.y,
                    s.ego.heading,
                    s.ego.speed_mps,
                    s.ego.acceleration_mps2,
                    s.ego.yaw_rate_rps,
                )
                for s in states
            ]
        )
        ego[:, 2] = np.unwrap(ego[:, 2])
        self._ego = ego
        self._signals = [state.command.value for state in states]

    @property
    def duration_s(self) -> float:
        return float(self._times[-1])

    def at(self, times: Series) -> tuple[Series, ...]:
        """x, y, heading, speed, acceleration, yaw rate at these times, [n] each."""
        return tuple(np.interp(times, self._times, column) for column in self._ego.T)

    def steering(self, times: Series) -> Series:
        """Angle of the steering wheel, radians, left positive."""
        *_, speed, _, yaw_rate = self.at(times)
        return STEERING_RATIO * np.arctan(WHEELBASE_M * yaw_rate / np.maximum(speed, 1.0))

    def odometer(self, times: Series) -> Series:
        """Distance driven, metres."""
        steps = np.diff(self._times) * (self._ego[1:, 3] + self._ego[:-1, 3]) / 2
        return np.interp(times, self._times, np.concatenate([[0.0], np.cumsum(steps)]))

    def pedals(self, times: Series) -> tuple[Series, Series]:
        """Throttle and brake, each 0..1."""
        acceleration = self.at(times)[4]
        return np.clip(acceleration / 4 + 0.05, 0, 1), np.clip(-acceleration / 8, 0, 1)

    def signals(self, times: Series) -> tuple[Series, Series]:
        """Left and right turning signal, 0 or 1."""
        index = np.clip(np.searchsorted(self._times, times, side="right") - 1, 0, len(self._signals) - 1)
        command = np.array(self._signals)[index]
        return (command == "left").astype(np.float64), (command == "right").astype(np.float64)


def _pose(drive: _Drive, times: Series) -> dict[str, Series]:
    x, y, heading, speed, acceleration, yaw_rate = drive.at(times)
    zero = np.zeros_like(x)
    return {
        "accel": np.stack([acceleration, speed * yaw_rate, zero + _GRAVITY], axis=1),
        "orientation": np.stack([np.cos(heading / 2), zero, zero, np.sin(heading / 2)], axis=1),
        "pos": np.stack([x, y, zero], axis=1),
        "rotation_rate": np.stack([zero, zero, yaw_rate], axis=1),
        "vel": np.stack([speed, zero, zero], axis=1),
    }


def _ms_imu(drive: _Drive, times: Series) -> dict[str, Series]:
    pose = _pose(drive, times)
    return {"linear_accel": pose["accel"], "q": pose["orientation"], "rotation_rate": pose["rotation_rate"]}


def _steeranglefeedback(drive: _Drive, times: Series) -> dict[str, Series]:
    return {"value": -drive.steering(times)}


def _vehicle_monitor(drive: _Drive, times: Series) -> dict[str, Series]:
    speed, yaw_rate = drive.at(times)[3], drive.at(times)[5]
    throttle, brake = drive.pedals(times)
    left, right = drive.signals(times)
    steering = np.degrees(drive.steering(times))
    later = np.degrees(drive.steering(times + 0.1))
    constant = np.ones_like(speed)
    return {
        "available_distance": 120 - np.floor(drive.odometer(times) / 1000),
        "battery_level": 80 * constant,
        "brake": np.round(brake * 126),
        "brake_switch": 1 + 2.0 * (brake > 0),
        "gear_position": 7 * constant,
        "left_signal": left,
        "rear_left_rpm": 60 * (speed - yaw_rate * _TRACK_M / 2) / _WHEEL_CIRCUMFERENCE_M,
        "rear_right_rpm": 60 * (speed + yaw_rate * _TRACK_M / 2) / _WHEEL_CIRCUMFERENCE_M,
        "right_signal": right,
        "steering": np.round(steering, 1),
        "steering_speed": np.round((later - steering) / 0.1, 1),
        "throttle": np.round(throttle * 1000),
        "vehicle_speed": np.round(speed * 3.6, 2),
        "yaw_rate": np.round(np.degrees(yaw_rate), 1),
    }


def _zoesensors(drive: _Drive, times: Series) -> dict[str, Series]:
    throttle, brake = drive.pedals(times)
    return {
        "brake_sensor": 0.375 + 0.036 * brake,
        "steering_sensor": np.round(np.degrees(drive.steering(times)), 1),
        "throttle_sensor": np.round(throttle * 1000),
    }


def _zoe_veh_info(drive: _Drive, times: Series) -> dict[str, Series]:
    *_, speed, acceleration, yaw_rate = drive.at(times)
    throttle, _ = drive.pedals(times)
    steering = np.degrees(drive.steering(times))
    constant = np.ones_like(speed)
    left = 60 * (speed - yaw_rate * _TRACK_M / 2) / _WHEEL_CIRCUMFERENCE_M
    right = 60 * (speed + yaw_rate * _TRACK_M / 2) / _WHEEL_CIRCUMFERENCE_M
    front = 1 / np.cos(np.radians(steering) / STEERING_RATIO)
    torque = np.round(2 * np.clip(400 + 120 * acceleration, 0, 1647)) / 2
    return {
        "FL_wheel_speed": left * front,
        "FR_wheel_speed": right * front,
        "RL_wheel_speed": left,
        "RR_wheel_speed": right,
        "left_solar": 40 * constant,
        "longitudinal_accel": np.round(acceleration / 0.05) * 0.05,
        "meanEffTorque": torque,
        "odom": np.floor(drive.odometer(times) * 100) % 124,
        "odom_speed": np.round(speed * 3.6),
        "pedal_cc": np.round(throttle * 1000),
        "regen": np.round(np.clip(-acceleration * 25, 0, 100)),
        "requestedTorqueAfterProc": torque,
        "right_solar": 40 * constant,
        "steer_corrected": np.round(steering, 1),
        "steer_offset_can": -12.6 * constant,
        "steer_raw": np.round(steering + 12.6, 1),
        "transversal_accel": np.round(speed * yaw_rate / _GRAVITY / 0.004) * 0.004,
    }


_FIELDS = {
    "pose": _pose,
    "ms_imu": _ms_imu,
    "steeranglefeedback": _steeranglefeedback,
    "vehicle_monitor": _vehicle_monitor,
    "zoesensors": _zoesensors,
    "zoe_veh_info": _zoe_veh_info,
}


def _rounded(values: Series) -> list[Any]:
    """Plain numbers without a tail of meaningless digits; whole series of integers become integers."""
    if values.ndim == 1 and np.array_equal(values, np.round(values)):
        return values.astype(np.int64).tolist()
    return (np.round(values, 6) + 0.0).tolist()


def _statistics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the meta file says about one message: count, rate, and spread of values and differences."""
    utimes = np.array([row["utime"] for row in rows], dtype=np.float64)
    timespan = float(utimes[-1] - utimes[0]) / 1e6
    spread = {}
    for key in rows[0]:
        values = np.array([row[key] for row in rows], dtype=np.float64)
        spread[key] = _spread(values)
        spread[f"{key}_diff"] = _spread(np.diff(values, axis=0)) if len(values) > 1 else _spread(values * 0)
    return {
        "message_count": len(rows),
        "message_freq": round((len(rows) - 1) / timespan, 6) if timespan > 0 else 0.0,
        "timespan": timespan,
        "var_stats": spread,
    }


def _spread(values: Series) -> dict[str, Any]:
    summaries = {"max": values.max(0), "mean": values.mean(0), "min": values.min(0), "std": values.std(0)}
    return {name: np.round(summary, 6).tolist() for name, summary in summaries.items()}


def _route(scene: Scene) -> list[list[float]]:
    """The centrelines the ego was to follow, evenly spaced, from 50 m before the drive to 50 m after it."""
    lanes = {lane.name: lane.centreline for lane in scene.map.lanes}
    points = np.concatenate([lanes[name] for name in scene.route])
    points = points[np.concatenate([[True], np.linalg.norm(np.diff(points, axis=0), axis=1) > 1e-6])]
    along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    evenly = np.arange(0.0, along[-1], _ROUTE_STEP_M)
    route = np.stack([np.interp(evenly, along, points[:, 0]), np.interp(evenly, along, points[:, 1])], axis=1)

    def nearest(x: float, y: float) -> float:
        return float(evenly[np.argmin(np.hypot(route[:, 0] - x, route[:, 1] - y))])

    first, last = scene.states[0].ego, scene.states[-1].ego
    near = evenly >= nearest(first.x, first.y) - _ROUTE_MARGIN_M
    near &= evenly <= nearest(last.x, last.y) + _ROUTE_MARGIN_M
    return [[float(x), float(y)] for x, y in np.round(route[near], 3)]
