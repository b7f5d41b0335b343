"""What goes into a plan and what comes out: frames and plans, in plain numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]
IntArray = NDArray[np.integer]
Image = NDArray[np.uint8]
"""[height, width, 3] RGB, 0..255."""

CAMERAS: tuple[str, ...] = (
    "CAM_FRONT_LEFT",
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_BACK_LEFT",
    "CAM_BACK",
    "CAM_BACK_RIGHT",
)
"""The nuScenes rig, in the order prompts use."""

WAYPOINT_TIMES_S: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
"""When waypoints are due, in seconds after the frame (the nuScenes open-loop horizon at 2 Hz)."""


class Command(str, Enum):
    """Where the route goes next; the field's three high-level commands."""

    LEFT = "left"
    STRAIGHT = "straight"
    RIGHT = "right"


@dataclass(frozen=True)
class EgoState:
    """Motion of the ego vehicle at the time of the frame, in its own frame (x forward, y left, rear axle)."""

    speed_mps: float
    acceleration_mps2: float = 0.0
    yaw_rate_rps: float = 0.0


@dataclass(frozen=True)
class Frame:
    """One synchronised set of camera images with ego state and command."""

    images: Mapping[str, Image]
    ego: EgoState
    command: Command
    token: str = ""
    stamp_s: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A driving plan with everything that led to it.

    Attributes:
        waypoints_in_ego: [T, 3] x, y in metres and heading in radians, in the ego frame of the input frame.
        times_s: [T] seconds after the frame.
        text: the model's answer, detokenised.
        bucket: name of the retention bucket that ran.
        complexity: the information measure of stage 0 (bits); None where no model planned.
        visual_tokens_into_layers: [L] visual tokens that entered each decoder layer.
        kept_visual: per stage, the original indices (0..V-1) of the visual tokens that entered it.
        work_fraction: prefill work of this plan over the unpruned prefill's, in FLOPs.
        kv_mib: size of the KV caches this plan used.
        timings_ms: milliseconds per step; "total" covers preprocessing to waypoints.
        flags: every deviation from what was asked for (camera filled in, bucket overridden, …).
        answer_tokens: tokens of the model's answer, its end token included; 0 where no model planned.
        visual_tokens_left: per camera, the visual tokens that entered the last stage.
    """

    waypoints_in_ego: FloatArray
    times_s: tuple[float, ...]
    text: str
    bucket: str
    complexity: float | None
    visual_tokens_into_layers: tuple[int, ...]
    kept_visual: tuple[IntArray, ...]
    work_fraction: float
    kv_mib: float
    timings_ms: Mapping[str, float]
    flags: tuple[str, ...] = field(default=())
    answer_tokens: int = 0
    visual_tokens_left: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Rehearsal:
    """What a plan costs when its answer is as long as it may be, whatever it says. There are no waypoints.

    Attributes are those of `Plan`.
    """

    bucket: str
    kept_visual: tuple[IntArray, ...]
    kv_mib: float
    timings_ms: Mapping[str, float]
    answer_tokens: int
