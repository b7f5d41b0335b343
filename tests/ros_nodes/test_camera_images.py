"""Which camera messages become images, and what stands in for those that do not. No ROS."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from ros_nodes.camera_images import CameraImages, ImageData, image_of
from ros_nodes.synchronisation import FrameSet, Stamped
from vla_autoprune.errors import InputError
from vla_autoprune.images import decode_image
from vla_autoprune.models.preprocess import Preprocessing

PREPROCESSING = Preprocessing(cameras=("FRONT", "BACK"), width=16, height=16, aspect_ratio=16 / 9)
PIXELS = np.random.default_rng(0).integers(0, 255, (9, 16, 3), dtype=np.uint8)
SECOND = 1_000_000_000


def message(pixels=PIXELS) -> ImageData:
    return ImageData(cv2.imencode(".png", pixels[:, :, ::-1])[1].tobytes())


def frame(second: float, **contents: ImageData | None) -> FrameSet[ImageData]:
    stamp_ns = round(second * SECOND)
    return FrameSet(
        stamp_ns,
        0.0,
        {camera: Stamped(stamp_ns, 0.0, data) for camera, data in contents.items() if data is not None},
        {camera: "never arrived" for camera, data in contents.items() if data is None},
    )


@pytest.mark.parametrize(
    "encoding,pixels",
    [
        ("rgb8", PIXELS),
        ("bgr8", PIXELS[:, :, ::-1]),
        ("rgba8", np.dstack([PIXELS, PIXELS[:, :, :1]])),
        ("bgra8", np.dstack([PIXELS[:, :, ::-1], PIXELS[:, :, :1]])),
    ],
)
def test_raw_images_of_every_layout(encoding, pixels):
    padded = np.zeros((9, 80), np.uint8)
    row = pixels.shape[1] * pixels.shape[2]
    padded[:, :row] = pixels.reshape(9, row)
    assert np.array_equal(image_of("FRONT", ImageData(padded.tobytes(), encoding, 16, 9, 80)), PIXELS)
    exact = np.ascontiguousarray(pixels).tobytes()
    assert np.array_equal(image_of("FRONT", ImageData(exact, encoding, 16, 9, row)), PIXELS)


@pytest.mark.parametrize(
    "data,fault",
    [
        (ImageData(bytes(10), "rgb8", 16, 9, 48), "has 10 bytes"),
        (ImageData(bytes(9 * 40), "rgb8", 16, 9, 40), "rows of 40"),
        (ImageData(bytes(0), "rgb8", 0, 0, 0), "has 0 bytes"),
        (ImageData(bytes(9 * 16), "bayer_rggb8", 16, 9, 16), "'bayer_rggb8'; allowed: rgb8, bgr8"),
        (ImageData(b"no image"), "cannot be decoded"),
    ],
)
def test_raw_images_that_do_not_add_up(data, fault):
    with pytest.raises(InputError, match=fault):
        image_of("FRONT", data)


def test_refusing_names_camera_fault_and_way_out():
    images = CameraImages(PREPROCESSING, "FRONT")
    with pytest.raises(InputError, match="BACK never arrived; set missing_camera to last_frame or black"):
        images.of(frame(1, FRONT=message(), BACK=None), 0.0)


def test_black_stands_in_for_side_cameras_only():
    images = CameraImages(PREPROCESSING, "FRONT", "black")
    got = images.of(frame(1, FRONT=message(), BACK=None), 0.0)
    assert got.images["BACK"].shape == (16, 16, 3) and not got.images["BACK"].any()
    assert got.filled == {"BACK": "black: BACK never arrived"}
    assert np.array_equal(got.images["FRONT"], PIXELS)
    with pytest.raises(InputError, match="no plan without this camera"):
        images.of(frame(2, FRONT=None, BACK=message()), 0.0)


def test_the_last_frame_stands_in_while_it_is_young():
    images = CameraImages(PREPROCESSING, "FRONT", "last_frame", last_frame_max_age_ms=500.0)
    with pytest.raises(InputError, match="there is none"):
        images.of(frame(0.5, FRONT=message(), BACK=None), 0.0)
    images.of(frame(1, FRONT=message(), BACK=message(PIXELS[::-1])), 0.0)
    got = images.of(frame(1.4, FRONT=message(), BACK=None), 0.0)
    assert np.array_equal(got.images["BACK"], PIXELS[::-1])
    assert got.filled["BACK"].startswith("last_frame of 400 ms ago")
    with pytest.raises(InputError, match="it is 600 ms old, last_frame_max_age_ms is 500"):
        images.of(frame(1.6, FRONT=message(), BACK=None), 0.0)
    with pytest.raises(InputError, match="cannot stand in"):
        images.of(frame(0.1, FRONT=message(), BACK=None), 0.0)


def test_a_standing_vehicle_may_see_the_same_again():
    images = CameraImages(PREPROCESSING, "FRONT")
    for second in range(5):
        images.of(frame(second, FRONT=message(), BACK=message()), 7.0)
    with pytest.raises(InputError, match=r"FRONT is frozen: the same image for 1\.5 m"):
        images.of(frame(6, FRONT=message(), BACK=message()), 8.5)
    images.of(frame(7, FRONT=message(PIXELS[::-1]), BACK=message(PIXELS[::-1])), 20.0)


def test_darkness_may_be_allowed():
    black = message(np.zeros_like(PIXELS))
    with pytest.raises(InputError, match="FRONT is black"):
        CameraImages(PREPROCESSING, "FRONT").of(frame(1, FRONT=black, BACK=message()), 0.0)
    allowed = CameraImages(PREPROCESSING, "FRONT", black_level=0.0)
    assert not allowed.of(frame(1, FRONT=black, BACK=message()), 0.0).filled


def large(width: int, height: int) -> ImageData:
    shades = np.linspace(60, 200, height, dtype=np.uint8)[:, None, None]
    return ImageData(cv2.imencode(".jpg", np.broadcast_to(shades, (height, width, 3)))[1].tobytes())


def test_large_jpegs_are_decoded_in_part_and_notes_have_the_cameras_size():
    images = CameraImages(PREPROCESSING, "FRONT")
    got = images.of(frame(1, FRONT=large(640, 360), BACK=large(160, 90)), 0.0)
    assert got.images["FRONT"].shape == (90, 160, 3) and got.images["BACK"].shape == (90, 160, 3)
    offline = decode_image(large(640, 360).data, "it", PREPROCESSING.reduction)
    assert np.array_equal(got.images["FRONT"], offline) and not got.notes
    got = images.of(frame(2, FRONT=large(320, 180), BACK=large(160, 90)), 1.0)
    assert got.notes == ("FRONT changed from 640x360 to 320x180",)
    with pytest.raises(InputError, match="image of FRONT is 640x480; the model knows"):
        images.of(frame(3, FRONT=large(640, 480), BACK=large(160, 90)), 1.0)
