"""Image files: decoded whole or in part, refused when they are not whole."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from vla_autoprune.errors import InputError
from vla_autoprune.images import decode_image, jpeg_size

PROGRESSIVE = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]


def picture(width: int, height: int) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def jpeg(image: np.ndarray, *options: int) -> bytes:
    return cv2.imencode(".jpg", image, list(options))[1].tobytes()


def turned(content: bytes, orientation: int) -> bytes:
    """A JPEG with an Exif segment that says so."""
    tag = b"\x12\x01\x03\x00\x01\x00\x00\x00" + bytes([orientation, 0, 0, 0])
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + tag + bytes(4)
    return content[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + content[2:]


@pytest.mark.parametrize("options", [(), PROGRESSIVE])
@pytest.mark.parametrize("size", [(160, 90), (161, 91), (40, 300)])
def test_a_reduced_jpeg_is_about_the_means_of_the_whole_one(size, options):
    content = jpeg(picture(*size), *options)
    whole = decode_image(content, "it")
    assert whole.shape == (size[1], size[0], 3) and jpeg_size(content) == size
    for divisor in (1, 2, 4, 8):
        reduced = decode_image(content, "it", lambda *of, by={size: divisor}: by[of])
        assert reduced.shape == (-(-size[1] // divisor), -(-size[0] // divisor), 3)
        down, across = size[1] // divisor, size[0] // divisor  # of cells that lie within the image
        cells = whole[: down * divisor, : across * divisor]
        means = cells.reshape(down, divisor, across, divisor, 3).mean(axis=(1, 3))
        assert np.abs(reduced[:down, :across] - means).mean() < 3


def test_grey_jpegs_are_reduced_to_rgb():
    content = jpeg(picture(160, 90)[:, :, 0])
    reduced = decode_image(content, "it", lambda *_: 4)
    assert reduced.shape == (23, 40, 3) and (reduced == reduced[:, :, :1]).all()


def test_what_is_no_plain_jpeg_is_decoded_whole():
    """Other decoders would throw rows away instead of averaging them; Exif data may turn an image."""
    image = picture(160, 90)
    png = cv2.imencode(".png", image)[1].tobytes()
    for content in (png, turned(jpeg(image), 1), turned(jpeg(image), 6)):
        assert jpeg_size(content) is None
        assert np.array_equal(decode_image(content, "it", lambda *_: 4), decode_image(content, "it"))
    assert decode_image(turned(jpeg(image), 6), "it").shape == (160, 90, 3)


def test_what_is_not_whole_is_refused_reduced_or_not():
    content = jpeg(picture(160, 90))
    garbled = content[:2] + b"\xff\xff" * 5 + b"\xff\xc0\x00\x00" + bytes(200)
    for broken in (b"", b"no image", content[:40], content[:-2], content[: len(content) // 2], garbled):
        for reduction in (None, lambda *_: 2):
            with pytest.raises(InputError, match=rf"it \({len(broken)} bytes\) cannot be decoded"):
                decode_image(broken, "it", reduction)


def test_reading_a_size_ends_whatever_comes():
    generator = np.random.default_rng(0)
    content = jpeg(picture(160, 90))
    for _ in range(300):
        cut = content[: generator.integers(2, 700)]
        noise = generator.integers(0, 256, 40, dtype=np.uint8).tobytes()
        for damaged in (cut, cut + noise, content[:2] + noise, content[:2] + b"\xff" * 30 + noise):
            assert jpeg_size(damaged) is None or len(jpeg_size(damaged)) == 2
