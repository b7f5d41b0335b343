"""Camera images to the vision tower's input, the same in training and in the vehicle. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vla_autoprune.errors import BundleError, InputError
from vla_autoprune.files import first_fault
from vla_autoprune.frame import CAMERAS, Image

ASPECT_TOLERANCE = 0.05

REDUCED_TO = 4.0
"""Times the tower's input that a reduced image still has, in both directions; at 2 plans change."""

_ANEW = "train the model or export the bundle anew with vla-autoprune"

Deviation = Annotated[float, Field(gt=0)]

Resample = Literal["area", "nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
"""How an image gets another size: cv2's means of areas, or Pillow's filter of that name."""


class Preprocessing(BaseModel):
    """What happens to an image before the tower; a JSON file of every bundle.

    The image gets the tower's size, is scaled to 0..1, then normalised per colour channel.

    Attributes:
        cameras: in the order of the prompt.
        width: pixels the tower sees.
        height: pixels the tower sees.
        aspect_ratio: width over height of the images the model knows; others are refused. None takes any.
        mean: per channel (RGB), of values in 0..1.
        std: per channel (RGB), above 0.
        fit: squeeze the whole image (its aspect ratio is not kept, nothing is lost), or crop its middle to
            the tower's aspect ratio first.
        resample: area, every pixel the mean of what it covers, is what our own models were trained with. The
            filters are those of transformers' image processors; with them `crop` is their resize of the
            shorter side and centre crop, to the same pixels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    cameras: Annotated[tuple[str, ...], Field(min_length=1)] = CAMERAS
    width: int = Field(default=96, ge=1)
    height: int = Field(default=96, ge=1)
    aspect_ratio: float | None = Field(default=None, gt=0)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[Deviation, Deviation, Deviation] = (0.25, 0.25, 0.25)
    fit: Literal["squeeze", "crop"] = "squeeze"
    resample: Resample = "area"

    def apply(self, images: Mapping[str, Image]) -> NDArray[np.float32]:
        """Pixel values of a frame's cameras.

        Args:
            images: [height, width, 3] uint8 RGB per camera, of any size.

        Returns:
            [cameras, 3, height, width] in the order of `cameras`.

        Raises:
            InputError: a camera is missing, or an image is not uint8 RGB of the known aspect ratio.
        """
        pixels = np.empty((len(self.cameras), 3, self.height, self.width), dtype=np.float32)
        self.fill(pixels, images)
        return pixels

    def fill(self, pixels: NDArray[np.float32], images: Mapping[str, Image]) -> None:
        """`apply` into memory that is there.

        Args:
            pixels: [cameras, 3, height, width], overwritten.
            images: [height, width, 3] uint8 RGB per camera, of any size.

        Raises:
            InputError: a camera is missing, or an image is not uint8 RGB of the known aspect ratio.
        """
        self._check(images)
        for index, camera in enumerate(self.cameras):
            image = self._resized(images[camera])
            for channel in range(3):
                gain = np.float32(1 / (255 * self.std[channel]))
                np.multiply(image[:, :, channel], gain, out=pixels[index, channel])
                pixels[index, channel] -= np.float32(self.mean[channel] / self.std[channel])

    def reduction(self, width: int, height: int) -> int:
        """By what a JPEG's decoder or a first step may divide an image before it gets the tower's size.

        Means of areas hardly tell whether they were taken in one step or two. Filters are asked for because
        pixels shall be those of training, so images that they resize are decoded whole. So are images that
        `check_image` refuses: its message shall have their own size.

        Args:
            width: of the whole image, pixels.
            height: of the whole image, pixels.

        Returns:
            The largest of 1, 2, 4 and 8 that leaves `REDUCED_TO` times the tower's size.
        """
        if self.resample == "area" and self._knows(width, height):
            for divisor in (8, 4, 2):
                across, down = math.ceil(width / divisor), math.ceil(height / divisor)
                large = across >= REDUCED_TO * self.width and down >= REDUCED_TO * self.height
                if large and self._knows(across, down):
                    return divisor
        return 1

    def _knows(self, width: int, height: int) -> bool:
        squeezed = (width, height) == (self.width, self.height)
        ratio = self.aspect_ratio
        return not ratio or squeezed or abs(width / height / ratio - 1) <= ASPECT_TOLERANCE

    def _resized(self, image: NDArray[Any]) -> NDArray[Any]:
        if self.resample != "area":
            return _filtered(image, self.width, self.height, self.resample, self.fit == "crop")
        import cv2

        height, width = image.shape[:2]
        divisor = self.reduction(width, height)
        if divisor > 1 and width % divisor == height % divisor == 0:
            # Whole pixels first: quicker, and rounds once more.
            reduced = (width // divisor, height // divisor)
            image = cv2.resize(image, reduced, interpolation=cv2.INTER_AREA)
        if self.fit == "crop":
            image = _middle(image, self.width / self.height)
        if image.shape[:2] != (self.height, self.width):
            image = cv2.resize(image, (self.width, self.height), interpolation=cv2.INTER_AREA)
        return image

    def _check(self, images: Mapping[str, Image]) -> None:
        missing = [camera for camera in self.cameras if camera not in images]
        if missing:
            raise InputError(
                f"recipe expects {len(self.cameras)} cameras of {self.width}x{self.height} "
                f"({', '.join(self.cameras)}), the frame has {len(images)}: {', '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} missing; "
                "a plan needs every camera the model was trained with"
            )
        for camera in self.cameras:
            self.check_image(camera, images[camera])

    def check_image(self, camera: str, image: Image) -> None:
        """Refuse an image that the model cannot take.

        Raises:
            InputError: it is not uint8 RGB, or not of the known aspect ratio.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise InputError(
                f"image of {camera} is {image.dtype} {list(image.shape)}, "
                "expected uint8 [height, width, 3] RGB"
            )
        height, width = image.shape[:2]
        if not self._knows(width, height):
            raise InputError(
                f"image of {camera} is {width}x{height}; the model knows images of width / height "
                f"{self.aspect_ratio:.3f} (1600x900 is 1.778), within {ASPECT_TOLERANCE:.0%}: "
                "crop it to that shape"
            )


def _middle(image: NDArray[Any], aspect_ratio: float) -> NDArray[Any]:
    """The largest part of an image around its middle that has an aspect ratio."""
    height, width = image.shape[:2]
    across, down = min(width, round(height * aspect_ratio)), min(height, round(width / aspect_ratio))
    left, top = (width - across) // 2, (height - down) // 2
    return image[top : top + down, left : left + across]


def _filtered(image: NDArray[Any], width: int, height: int, resample: str, crop: bool) -> NDArray[Any]:
    """An image of another size by one of Pillow's filters, which shrink without aliasing.

    Source: `transformers.image_transforms`, `get_resize_output_image_size`, `resize` and `center_crop`.
    """
    import PIL.Image  # no part of start-up: most bundles average areas

    rows, columns = image.shape[:2]
    across, down = width, height
    if crop and columns * height > rows * width:
        across = int(height * columns / rows)
    elif crop:
        down = int(width * rows / columns)
    # The whole image, not a box of it: filters see beyond a crop, and Pillow rounds boxes to float32.
    picture = PIL.Image.fromarray(image).resize((across, down), PIL.Image.Resampling[resample.upper()])
    left, top = (across - width) // 2, (down - height) // 2
    return np.asarray(picture)[top : top + height, left : left + width]


def read_preprocessing(path: Path) -> Preprocessing:
    """Read a `preprocess.json`.

    Raises:
        BundleError: it is missing or not valid; the message names file and field.
    """
    try:
        return Preprocessing.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}); {_ANEW}") from error
    except ValidationError as error:
        raise BundleError(f"{path}: {first_fault(error)}; {_ANEW}") from error
