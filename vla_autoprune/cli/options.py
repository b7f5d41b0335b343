"""What the options of several commands share: choices, lists with commas, and places to write to."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TypeVar

import typer

from vla_autoprune.errors import InputError

Item = TypeVar("Item")

THREADS = typer.Option(None, "--threads", min=1, help="CPU threads; all cores unless given.")


class CommandSource(str, Enum):
    """Where the driving command of a sample comes from."""

    ROUTE = "route"
    FUTURE = "future"


class PolicyName(str, Enum):
    """The policies of `runtime.planner`, named here so that --help needs no runtime."""

    AUTOPRUNE = "autoprune"
    FIXED = "fixed"
    RANDOM = "random"
    UNIFORM = "uniform"


def comma_list(option: str, text: str, kind: Callable[[str], Item], example: str) -> list[Item]:
    """Read an option that is a list with commas.

    Args:
        option: its name, for the message.
        text: what was given.
        kind: from an entry to its value; raises ValueError for what is none.
        example: a good list, for the message.

    Returns:
        The values in the order given, at least one.

    Raises:
        InputError: an entry is empty or is none of its kind.
    """
    parts = [part.strip() for part in text.split(",")]
    try:
        if all(parts):
            return [kind(part) for part in parts]
    except ValueError:
        pass
    raise InputError(f"{option} is {text!r}; expected values separated by commas, like {example}")


def finite(text: str) -> float:
    """A number, neither infinite nor NaN; raises ValueError for anything else."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def require_directory(option: str, path: Path) -> None:
    """Refuse a place where no directory can be made or written to, before any work starts.

    Raises:
        InputError: it or something above it is a file, or may not be written to.
    """
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise InputError(f"{option} {path}: {there} is a file; give a directory, new or existing")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{option} {path}: {there} may not be written to; give another directory")


def require_file(option: str, path: Path) -> None:
    """Refuse a place where no file can be written, before any work starts.

    Raises:
        InputError: it is a directory, or its directory cannot be made or written to.
    """
    if path.is_dir():
        raise InputError(f"{option} {path} is a directory; give the name of a file")
    require_directory(option, path.parent)
