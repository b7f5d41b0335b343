"""Camera images to the vision tower's input, the same in training and in the vehicle. No torch here."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from vla_autoprune.errors import InputError
from vla_autoprune.frame import CAMERAS, Image


class Preprocessing(BaseModel):
    """What happens to an image before the tower; as JSON it is part of every bundle.

    The whole image is squeezed to a square (its aspect ratio is not kept, nothing is cropped), scaled to 0..1,
    then normalised per colour channel.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cameras: tuple[str, ...] = CAMERAS
    width: int = Field(default=96, ge=16)
    height: int = Field(default=96, ge=16)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)

    def apply(self, images: Mapping[str, Image]) -> NDArray[np.float32]:
        """Pixel values of a frame's cameras.

        Args:
            images: [height, width, 3] uint8 RGB per camera, of any size.

        Returns:
            [cameras, 3, height, width] in the order of `cameras`.

        Raises:
            InputError: a camera is missing, or an image is not uint8 RGB.
        """
        import cv2

        pixels = np.empty((len(self.cameras), self.height, self.width, 3), dtype=np.float32)
        for index, camera in enumerate(self.cameras):
            if camera not in images:
                raise InputError(
                    f"the frame has no image of {camera}; the model needs {len(self.cameras)} cameras: "
                    f"{', '.join(self.cameras)}"
                )
            image = images[camera]
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise InputError(
                    f"image of {camera} is {image.dtype} {list(image.shape)}, expected uint8 [height, width, 3] RGB"
                )
            if image.shape[:2] != (self.height, self.width):
                image = cv2.resize(image, (self.width, self.height), interpolation=cv2.INTER_AREA)
            pixels[index] = image
        pixels /= 255.0
        pixels -= np.array(self.mean, dtype=np.float32)
        pixels /= np.array(self.std, dtype=np.float32)
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
