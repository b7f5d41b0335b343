"""TensorRT's messages, kept so that an error can say what TensorRT said."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tensorrt as trt


SEE = "see whether nvidia-smi (on a Jetson tegrastats) shows the GPU, and a driver new enough for TensorRT"
"""The way out where TensorRT gives nothing, not even a reason."""


def make_log(problems: deque[str]) -> trt.ILogger:
    """A logger that keeps errors instead of printing them; everything else is dropped.

    Args:
        problems: receives them; give it a length.
    """
    import tensorrt as trt

    serious = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in serious:
                problems.append(" ".join(msg.split()))

    return Log()


def said(problems: deque[str]) -> str:
    """What TensorRT said, on one line."""
    return "; ".join(problems) or "TensorRT gave no reason"
