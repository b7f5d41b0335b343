"""`python -m ros_nodes.start MODULE`: a node that a signal ends in order while its imports still run.

They take seconds, and until they are done a node has no handlers of its own; it also has nothing to finish.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module


def start(module: str) -> int:
    """Import a node's module and run its `main`; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: os._exit(0))
    return import_module(module).main()


if __name__ == "__main__":
    sys.exit(start(sys.argv.pop(1)))
