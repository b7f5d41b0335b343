"""The one progress bar: everything that takes more than two seconds shows it."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def progress_bar(console: Console | None = None) -> Progress:
    """A line per task with its name, counts, the time it took and the time left.

    Args:
        console: where it is drawn; None is standard error, so that what a command prints can be piped.

    Returns:
        The bar, to be entered with `with`.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
        # What is printed meanwhile goes above the bar; not where it is sent to a file.
        redirect_stdout=sys.stdout.isatty(),
    )
