"""Open-loop planning metrics on nuScenes, by the name of their protocol, as the original code computes them.

Everything here lives in the 2-D LiDAR frame at t0: x right, y forward, metres, yaw counter-clockwise from +x,
so a car that drives straight ahead has yaw pi/2. Waypoints are where the LiDAR is 0.5, 1.0, … 3.0 s later;
`OpenLoopProtocol.follows` names the one protocol that takes the rear axle instead.

The quirks of each protocol are kept on purpose, since a published number means what its code computed, and
`OpenLoopProtocol.quirks` lists them. docs/open_loop_protocols.md compares the protocols.
"""

from __future__ import annotations

from collections.abc import Mapping

from eval_nuscenes.metrics.bevplanner import BEVPLANNER
from eval_nuscenes.metrics.coarse_grid import (
    AGENTDRIVER_STP3,
    AGENTDRIVER_UNIAD,
    OPENDRIVEVLA_VEHICLE,
    OPENDRIVEVLA_VEHICLE_PED,
    STP3,
    UNIAD,
    VAD,
    VAD_UNFILTERED,
)
from eval_nuscenes.metrics.polygons import SPARSEDRIVE, STANDARD
from eval_nuscenes.metrics.protocol import HORIZONS_S, OpenLoopProtocol, Score
from eval_nuscenes.metrics.truth import (
    PEDESTRIANS,
    STEPS,
    VEHICLES,
    OpenLoopTruth,
    Points,
    TrackedBox,
    Waypoints,
)
from vla_autoprune.errors import InputError

PROTOCOLS: Mapping[str, OpenLoopProtocol] = {
    protocol.name: protocol
    for protocol in (
        UNIAD,
        STP3,
        VAD,
        BEVPLANNER,
        SPARSEDRIVE,
        STANDARD,
        VAD_UNFILTERED,
        AGENTDRIVER_UNIAD,
        AGENTDRIVER_STP3,
        OPENDRIVEVLA_VEHICLE,
        OPENDRIVEVLA_VEHICLE_PED,
    )
}
"""Every protocol by name."""

__all__ = [
    "HORIZONS_S",
    "PEDESTRIANS",
    "PROTOCOLS",
    "STEPS",
    "VEHICLES",
    "OpenLoopProtocol",
    "OpenLoopTruth",
    "Points",
    "Score",
    "TrackedBox",
    "Waypoints",
    "protocol_named",
]


def protocol_named(name: str) -> OpenLoopProtocol:
    """Look a protocol up.

    Raises:
        InputError: there is none of this name; the message lists all.
    """
    if name not in PROTOCOLS:
        raise InputError(f"there is no open-loop protocol {name!r}; use one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
