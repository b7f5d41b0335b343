"""Boxes on grids of cells, as the originals draw them with OpenCV."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eval_nuscenes.metrics.truth import STEPS

Maps = NDArray[np.uint8]


def draw(polygons: NDArray[np.int32], steps: NDArray[np.intp], size: int) -> Maps:
    """Fill polygons, outline cells included.

    Args:
        polygons: [n, corners, 2] column and row of each corner's cell.
        steps: [n] the map each belongs on.
        size: cells along a side of a map.

    Returns:
        [6, size, size] of 0 and 1.
    """
    import cv2

    maps = np.zeros((STEPS, size, size), dtype=np.uint8)
    inside = ((polygons.max(axis=1) >= 0) & (polygons.min(axis=1) < size)).all(axis=1)
    for polygon, step in zip(polygons[inside], steps[inside].tolist(), strict=True):
        cv2.fillPoly(maps[step], [polygon], (1,))
    return maps
