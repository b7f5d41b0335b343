"""Files that appear when they are whole, and one line on what is wrong with one that was read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError

from vla_autoprune.errors import InputError


def write_whole(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file, or leave what was there: readers never meet half of it.

    Args:
        path: the file; its folder exists.
        content: all of it, or what writes it into an open file.

    Raises:
        OSError: it cannot be written; it names the file, and nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
        temporary.replace(path)
    except OSError as error:
        if error.filename is None or str(error.filename) == str(temporary):  # a full disk has no name
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        InputError: it is not JSON; the message names the file and the place.
        OSError: it cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); it is truncated or edited") from error


def first_fault(error: ValidationError) -> str:
    """The first thing wrong with a file's contents, on one line: field, what is allowed, what was given."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "the file"
    given = f", got {str(first['input'])[:60]!r}" if first["type"] not in ("missing", "json_invalid") else ""
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{field}: {first['msg']}{given}{more}"
