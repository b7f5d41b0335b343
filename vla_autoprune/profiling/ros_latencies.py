"""Latencies along the ROS nodes, read off the status messages of a recording."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vla_autoprune.errors import InputError
from vla_autoprune.profiling.document import RosLatencies
from vla_autoprune.profiling.percentiles import distribution

_SUFFIX = "_ms"
_NO_LATENCIES = ("remaining_ms",)
"""What is left until the deadline, which may be negative."""


def ros_latencies(
    messages: Iterable[tuple[str, Any]], recording: Path, topics: Sequence[str]
) -> RosLatencies:
    """Distributions of everything in milliseconds that status messages state.

    Args:
        messages: topic and diagnostic_msgs/DiagnosticArray, or any other message, in the order they came.
        recording: where they are from, for the record.
        topics: of the status messages, without namespace; the first is the planner's.

    Returns:
        Latencies by topic and key, such as `planner/status stamp_to_publish`.

    Raises:
        InputError: no status message states a latency.
    """
    samples: dict[str, list[float]] = {}
    plans = refused = 0
    for name, message in messages:
        topic = next((known for known in topics if name.strip("/").endswith(known)), None)
        if topic is None:
            continue
        values = {item.key: item.value for status in message.status for item in status.values}
        if topic == topics[0]:
            planned = bool(values.get("bucket"))
            plans, refused = plans + planned, refused + (not planned)
        for key, text in values.items():
            if key.endswith(_SUFFIX) and key not in _NO_LATENCIES:
                milliseconds = _number(text)
                if milliseconds is not None:
                    samples.setdefault(f"{topic} {key.removesuffix(_SUFFIX)}", []).append(milliseconds)
    if not samples:
        raise InputError(
            f"--ros {recording} has no status message with latencies; record {' and '.join(topics)}"
        )
    return RosLatencies(
        recording=str(recording),
        plans=plans,
        refused=refused,
        latencies_ms={name: distribution(values) for name, values in samples.items()},
    )


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
