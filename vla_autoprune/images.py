"""Image files in memory to RGB arrays, refusing what is not whole. One decoder for data sets and vehicles."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_autoprune.errors import InputError
from vla_autoprune.frame import Image

_JPEG_START, _JPEG_SCAN, _JPEG_END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"


def decode_image(content: bytes, where: str) -> Image:
    """Decode a JPEG, PNG or other image file.

    Args:
        content: the file's bytes.
        where: names it in the message.

    Returns:
        [height, width, 3] uint8 RGB.

    Raises:
        InputError: it cannot be decoded to its end.
    """
    import cv2

    # The decoder fills what a truncated JPEG lacks with grey. Scan data never holds either marker.
    cut_short = content.startswith(_JPEG_START) and content.rfind(_JPEG_END) < content.rfind(_JPEG_SCAN)
    image: NDArray[Any] | None = None
    if content and not cut_short:
        image = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise InputError(f"{where} ({len(content)} bytes) cannot be decoded; it is truncated or no image")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)
