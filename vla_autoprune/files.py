"""Files that appear when they are whole, and one line on what is wrong with one that was read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError


def write_whole(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file, or leave what was there: readers never meet half of it.

    Args:
        path: the file; its folder exists.
        content: all of it, or what writes it into an open file.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def first_fault(error: ValidationError) -> str:
    """The first thing wrong with a file's contents, on one line: field, what is allowed, what was given."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "the file"
    given = f", got {str(first['input'])[:60]!r}" if first["type"] not in ("missing", "json_invalid") else ""
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{field}: {first['msg']}{given}{more}"
