"""From a set of camera messages to the images of a frame, and what is done about those that are no use.

Knows no ROS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ros_nodes.synchronisation import FrameSet, Stamped
from vla_autoprune.errors import InputError
from vla_autoprune.frame import Image
from vla_autoprune.images import Reduction, decode_image, jpeg_size
from vla_autoprune.models.preprocess import Preprocessing

MissingCamera = Literal["refuse", "last_frame", "black"]
"""What is done without an image of a side camera. Without one of the anchor there is no plan."""

FROZEN_M = 1.0
"""An image that is the same, byte for byte, after the ego vehicle has moved this far is not live."""

_CHANNELS = {"rgb8": (0, 1, 2), "bgr8": (2, 1, 0), "rgba8": (0, 1, 2), "bgra8": (2, 1, 0), "mono8": (0, 0, 0)}
_STRIDE = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "mono8": 1}


@dataclass(frozen=True)
class ImageData:
    """What a camera message holds.

    Attributes:
        data: the bytes of an image file, or of pixels.
        encoding: how pixels are laid out, as sensor_msgs names it; empty for an image file.
        width: pixels, where they are not in a file.
        height: pixels, where they are not in a file.
        step: bytes per row of pixels.
    """

    data: Any
    encoding: str = ""
    width: int = 0
    height: int = 0
    step: int = 0


@dataclass(frozen=True)
class FrameImages:
    """Images for every camera, and which of them are not what the camera saw.

    Attributes:
        filled: by camera, what was filled in and why.
        notes: what is odd about images that were used all the same.
    """

    images: Mapping[str, Image]
    filled: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass
class _Seen:
    """What is remembered of a camera."""

    data: NDArray[np.uint8]
    at_m: float
    """Distance travelled when these bytes first came."""


def image_of(camera: str, message: ImageData, reduction: Reduction | None = None) -> Image:
    """Decode a camera message to [height, width, 3] RGB.

    Args:
        camera: names it in messages.
        message: what came.
        reduction: the planner's, `Preprocessing.reduction`, for image files; None decodes every pixel.

    Raises:
        InputError: the file is garbage or truncated, or the pixels are not of a known layout.
    """
    if not message.encoding:
        return decode_image(bytes(message.data), f"image of {camera}", reduction)
    if message.encoding not in _CHANNELS:
        raise InputError(
            f"image of {camera} is encoded as {message.encoding!r}; allowed: {', '.join(_CHANNELS)}"
        )
    bytes_per_pixel = _STRIDE[message.encoding]
    row, size = message.width * bytes_per_pixel, message.step * message.height
    pixels = np.frombuffer(message.data, dtype=np.uint8)
    if message.step < row or len(pixels) != size or not size:
        raise InputError(
            f"image of {camera} has {len(pixels)} bytes and rows of {message.step}; {message.width}x"
            f"{message.height} pixels of {message.encoding} need {size} and at least {row}"
        )
    rows = pixels.reshape(message.height, message.step)[:, :row]
    image = rows.reshape(message.height, message.width, bytes_per_pixel)
    if message.encoding == "rgb8":
        return image
    return np.ascontiguousarray(image[:, :, list(_CHANNELS[message.encoding])])


def _sent_size(message: ImageData, image: Image) -> tuple[int, int]:
    """Width and height of what the camera sent; its image may have been decoded in part."""
    height, width = image.shape[:2]
    return (None if message.encoding else jpeg_size(bytes(message.data))) or (width, height)


class CameraImages:
    """Decodes the images of a frame and replaces those that are missing or no use, as allowed.

    Args:
        preprocessing: which images the model takes.
        anchor: the camera without which there is no plan.
        missing: what is done without another camera.
        last_frame_max_age_ms: how much older than the frame a last image may be.
        black_level: an image whose mean is below it (0..255) is of no use; 0 takes every image.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        anchor: str,
        missing: MissingCamera = "refuse",
        last_frame_max_age_ms: float = 500.0,
        black_level: float = 2.0,
    ) -> None:
        self.preprocessing = preprocessing
        self.anchor = anchor
        self.missing = missing
        self.last_frame_max_age_ns = round(last_frame_max_age_ms * 1e6)
        self.black_level = black_level
        self._seen: dict[str, _Seen] = {}
        self._sizes: dict[str, tuple[int, int]] = {}
        self._last: dict[str, tuple[int, Image]] = {}
        self._black = np.zeros((preprocessing.height, preprocessing.width, 3), dtype=np.uint8)

    def of(self, frame: FrameSet[ImageData], travelled_m: float) -> FrameImages:
        """The images of a set.

        Args:
            frame: messages that belong together.
            travelled_m: distance the ego vehicle has come, to tell a frozen camera from a standing vehicle.

        Raises:
            InputError: the anchor's image is no use, or another's is and may not be replaced; the message
                names the camera and what is wrong.
        """
        images: dict[str, Image] = {}
        filled: dict[str, str] = {}
        notes: list[str] = []
        for camera in self.preprocessing.cameras:
            try:
                if camera in frame.absent:
                    raise InputError(f"{camera} {frame.absent[camera]}")
                images[camera] = self._usable(camera, frame.images[camera], travelled_m, notes)
            except InputError as error:
                images[camera], how = self._replacement(camera, frame.stamp_ns, error)
                filled[camera] = f"{how}: {error}"
        return FrameImages(images, filled, tuple(notes))

    def _usable(
        self, camera: str, stamped: Stamped[ImageData], travelled_m: float, notes: list[str]
    ) -> Image:
        data = np.frombuffer(stamped.content.data, dtype=np.uint8)
        seen = self._seen.get(camera)
        if seen is None or not np.array_equal(seen.data, data):
            self._seen[camera] = seen = _Seen(data, travelled_m)
        if travelled_m - seen.at_m > FROZEN_M:
            raise InputError(
                f"{camera} is frozen: the same image for {travelled_m - seen.at_m:.1f} m of driving"
            )
        image = image_of(camera, stamped.content, self.preprocessing.reduction)
        self.preprocessing.check_image(camera, image)
        if self.black_level and image[::8, ::8].mean() < self.black_level:
            raise InputError(f"{camera} is black: its mean is below {self.black_level:g} of 255")
        width, height = _sent_size(stamped.content, image)
        before = self._sizes.setdefault(camera, (width, height))
        if before != (width, height):
            notes.append(f"{camera} changed from {before[0]}x{before[1]} to {width}x{height}")
            self._sizes[camera] = (width, height)
        if self.missing == "last_frame":
            self._last[camera] = (stamped.stamp_ns, image)
        return image

    def _replacement(self, camera: str, stamp_ns: int, error: InputError) -> tuple[Image, str]:
        if camera == self.anchor or self.missing == "refuse":
            raise InputError(f"{error}; {self._way_out(camera)}") from error
        if self.missing == "black":
            return self._black, "black"
        last = self._last.get(camera)
        if last is None or abs(stamp_ns - last[0]) > self.last_frame_max_age_ns:
            age = "there is none" if last is None else f"it is {(stamp_ns - last[0]) / 1e6:.0f} ms old"
            raise InputError(
                f"{error}; its last frame cannot stand in: {age}, "
                f"last_frame_max_age_ms is {self.last_frame_max_age_ns / 1e6:g}"
            ) from error
        return last[1], f"last_frame of {(stamp_ns - last[0]) / 1e6:.0f} ms ago"

    def _way_out(self, camera: str) -> str:
        if camera == self.anchor:
            return "there is no plan without this camera"
        return "set missing_camera to last_frame or black to plan without it"
