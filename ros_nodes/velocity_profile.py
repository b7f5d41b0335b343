"""Speeds, accelerations and heading rates that belong to waypoints. Knows no ROS."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla_autoprune.frame import FloatArray, Plan


@dataclass(frozen=True)
class VelocityProfile:
    """A plan with its first point, and how it is driven.

    Attributes:
        times_s: [T + 1] after the frame; the first is 0.
        poses_in_ego: [T + 1, 3] x, y, heading; the first is the origin.
        speed_mps: [T + 1].
        acceleration_mps2: [T + 1] from each point to the next: speed + acceleration * time gives the next
            speed. The last point's is that of the point before.
        heading_rate_rps: [T + 1] from each point to the next, the last as the one before.
    """

    times_s: FloatArray
    poses_in_ego: FloatArray
    speed_mps: FloatArray
    acceleration_mps2: FloatArray
    heading_rate_rps: FloatArray


def velocity_profile(plan: Plan, speed_mps: float) -> VelocityProfile:
    """Fill in what a trajectory message wants beyond a plan's poses.

    Args:
        plan: [T, 3] waypoints.
        speed_mps: measured speed at the time of the frame; the profile begins with it.
    """
    times = np.array([0.0, *plan.times_s])
    poses = np.vstack([np.zeros(3), plan.waypoints_in_ego.astype(np.float64)])
    turned = np.diff(np.unwrap(poses[:, 2]))
    chords = np.hypot(*np.diff(poses[:, :2], axis=0).T)
    travelled = np.concatenate([[0.0], np.cumsum(chords / np.sinc(turned / (2 * np.pi)))])  # along the arcs
    speeds = np.gradient(travelled, times)
    speeds[0] = speed_mps
    steps = np.diff(times)
    accelerations, rates = np.diff(speeds) / steps, turned / steps
    return VelocityProfile(
        times_s=times,
        poses_in_ego=poses,
        speed_mps=speeds,
        acceleration_mps2=np.append(accelerations, accelerations[-1]),
        heading_rate_rps=np.append(rates, rates[-1]),
    )
