"""Image files in memory to RGB arrays, refusing what is not whole. One decoder for data sets and vehicles."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_autoprune.errors import InputError
from vla_autoprune.frame import Image

Reduction = Callable[[int, int], int]
"""From an image's width and height to the divisor that whoever looks at it can do with: 1, 2, 4 or 8."""

_JPEG_START, _JPEG_SCAN, _JPEG_END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_APPLICATION_1 = 0xE1


def decode_image(content: bytes, where: str, reduction: Reduction | None = None) -> Image:
    """Decode a JPEG, PNG or other image file.

    Args:
        content: the file's bytes.
        where: names it in the message.
        reduction: lets JPEGs be decoded at a half, a quarter or an eighth of their size, which leaves out
            most of the work; None decodes every pixel. See `Preprocessing.reduction`.

    Returns:
        [height, width, 3] uint8 RGB; of a reduced image height and width divided and rounded up.

    Raises:
        InputError: it cannot be decoded to its end.
    """
    import cv2

    # The decoder fills what a truncated JPEG lacks with grey. Scan data never holds either marker.
    cut_short = content.startswith(_JPEG_START) and content.rfind(_JPEG_END) < content.rfind(_JPEG_SCAN)
    image: NDArray[Any] | None = None
    size = None if reduction is None else jpeg_size(content)
    flag = cv2.IMREAD_COLOR
    if reduction is not None and size is not None:
        flag = {
            1: cv2.IMREAD_COLOR,
            2: cv2.IMREAD_REDUCED_COLOR_2,
            4: cv2.IMREAD_REDUCED_COLOR_4,
            8: cv2.IMREAD_REDUCED_COLOR_8,
        }[reduction(*size)]
    if content and not cut_short:
        image = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), flag)
    if image is None:
        raise InputError(f"{where} ({len(content)} bytes) cannot be decoded; it is truncated or no image")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)


def jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG in pixels, from its header.

    Returns:
        None where it is no JPEG, or has Exif data, which may turn it on decoding.
    """
    if not content.startswith(_JPEG_START):
        return None
    at = len(_JPEG_START)
    while content[at : at + 1] == b"\xff" and at + 9 <= len(content):
        kind, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        if kind in _FRAME_HEADERS:
            height, width = struct.unpack_from(">HH", content, at + 5)
            return (width, height) if width and height else None
        if kind == _APPLICATION_1 and content[at + 4 : at + 8] == b"Exif":
            return None
        at += 1 if kind == 0xFF else 2 + length  # markers may be preceded by fill bytes
    return None
