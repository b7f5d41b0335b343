"""Tell whether source code changed since something was made with it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def source_hash(paths: Iterable[Path], also: str = "") -> str:
    """Hash of Python sources: what was made by other code can be told apart and made again.

    Args:
        paths: files, and folders whose *.py files all count, those in sub-folders too.
        also: goes into the hash as it is, such as the name of what is called.

    Returns:
        SHA-256; the same in any order of the paths and wherever the code is installed.

    Raises:
        OSError: a source cannot be read.
    """
    files: dict[Path, str] = {}
    for path in paths:
        if path.is_dir():
            files.update((file, file.relative_to(path.parent).as_posix()) for file in path.rglob("*.py"))
        else:
            files[path] = path.name
    digest = hashlib.sha256(also.encode())
    for name, content in sorted((name, file.read_bytes()) for file, name in files.items()):
        digest.update(f"\n{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()
