"""What kind of driving a sample shows, so that a mean can be looked at in parts."""

from __future__ import annotations

import math
import re

import numpy as np

from eval_nuscenes.nuscenes_reader import Sample

TURNING_RAD = math.radians(15)
MOVING_MPS = 1.0
STANDING_MPS = 0.5
DIM_DAYLIGHT = 0.7
"""Below this share of full daylight, the synthetic world's scenes are called dusk."""

MANOEUVRES = {
    "standing": f"below {STANDING_MPS} m/s at first and after 3 s",
    "stopping": f"above {MOVING_MPS:g} m/s at first, below {STANDING_MPS} m/s after 3 s",
    "turning": f"the heading changes by {math.degrees(TURNING_RAD):.0f}° or more within 3 s",
    "straight": "everything else with a whole future",
}

_SYNTHETIC = re.compile(r"Synthetic, (?P<kind>[\w ]+), daylight (?P<daylight>[\d.]+)")


def traits_of(sample: Sample, description: str = "") -> dict[str, str]:
    """Sort a sample by what really happened.

    Args:
        sample: with its true future.
        description: of its scene, as the data set has it.

    Returns:
        Aspect to value: "manoeuvre" where all of the 3 s after the sample are known; "time of day",
        "weather" and "kind of drive" where the description tells.
    """
    traits = {}
    if sample.future_exists.all():
        traits["manoeuvre"] = _manoeuvre(sample)
    synthetic = _SYNTHETIC.match(description)
    if synthetic is not None:
        traits["kind of drive"] = synthetic["kind"]
        traits["time of day"] = "dusk" if float(synthetic["daylight"]) < DIM_DAYLIGHT else "day"
    elif description:
        # nuScenes' own descriptions name night and rain wherever there is any.
        words = description.lower()
        traits["time of day"] = "night" if "night" in words else "day"
        traits["weather"] = "rain" if "rain" in words else "dry"
    return traits


def _manoeuvre(sample: Sample) -> str:
    first = abs(sample.ego.speed_mps)
    path = sample.future_in_ego
    last = float(np.hypot(*(path[-1, :2] - path[-2, :2]))) / 0.5
    if last < STANDING_MPS and first < STANDING_MPS:
        return "standing"
    if last < STANDING_MPS and first > MOVING_MPS:
        return "stopping"
    return "turning" if abs(np.unwrap(np.append(0.0, path[:, 2]))[-1]) >= TURNING_RAD else "straight"
