"""Tables of figures: a name, then numbers, none of them cut short however narrow the terminal is."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

_WIDEST = 1000


def figure_table(title: str, columns: Sequence[str], name: str = "") -> Table:
    """A table without rows yet.

    Args:
        title: above it.
        columns: headings of the figures.
        name: heading of the first column.
    """
    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0), title=title)
    table.add_column(name, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def print_whole(table: Table, console: Console) -> None:
    """Print a table as wide as it is: where the console is narrower, lines run over."""
    width = console.width
    console.width = max(width, Measurement.get(console, console.options.update(width=_WIDEST), table).maximum)
    console.print(table)
    console.width = width
