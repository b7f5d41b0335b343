from __future__ import annotations

import cv2
import numpy as np
import pytest

from vla_autoprune.errors import BundleError
from vla_autoprune.models.preprocess import Preprocessing, read_preprocessing

PLAIN = {"cameras": ("CAM_FRONT",), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def columns(height: int, width: int) -> np.ndarray:
    """Every pixel says in which column it lies."""
    return np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None], (height, width, 3)).copy()


@pytest.mark.parametrize("fit,first,last", [("squeeze", 3.5, 155.5), ("crop", 36.5, 122.5)])
def test_an_image_is_squeezed_or_its_middle_cropped(fit, first, last):
    """Of 160 columns the squeeze keeps all, the crop the middle 90."""
    steps = Preprocessing(**PLAIN, width=16 if fit == "crop" else 20, height=16, fit=fit)
    row = 255 * steps.apply({"CAM_FRONT": columns(90, 160)})[0, 0, 8]
    assert row[0] == pytest.approx(first, abs=1.5) and row[-1] == pytest.approx(last, abs=1.5)


def test_the_crop_is_clips_centre_crop():
    """The same pixels as resizing the shorter side and cropping the middle, where nothing is interpolated."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(0).integers(0, 255, (32, 56, 3), dtype=np.uint8)
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    wanted = processor(image, return_tensors="pt")["pixel_values"]
    steps = Preprocessing(
        cameras=("CAM_FRONT",),
        width=32,
        height=32,
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        fit="crop",
    )
    assert (torch.from_numpy(steps.apply({"CAM_FRONT": image})) - wanted).abs().max() < 1e-5


def test_a_filter_sees_beyond_the_crop():
    """White beside a black middle reaches its edge, as where the whole is resized first; areas end at it."""
    image = np.full((60, 120, 3), 255, dtype=np.uint8)
    image[:, 30:90] = 0
    steps = Preprocessing(**PLAIN, width=20, height=20, fit="crop")
    assert not steps.apply({"CAM_FRONT": image}).any()
    row = steps.model_copy(update={"resample": "bilinear"}).apply({"CAM_FRONT": image})[0, 0, 8]
    assert row[0] > 0.05 and row[-1] > 0.05 and not row[2:-2].any()


def test_filters_shrink_without_aliasing():
    board = (np.indices((90, 160)).sum(axis=0) % 2 * 255).astype(np.uint8)
    image = {"CAM_FRONT": np.repeat(board[:, :, None], 3, axis=2)}
    for resample in ("area", "bilinear", "bicubic", "lanczos", "box", "hamming"):
        pixels = Preprocessing(**PLAIN, width=16, height=9, resample=resample).apply(image)
        assert pixels.shape == (1, 3, 9, 16) and np.abs(pixels - 0.5).max() < 0.05, resample


def test_a_file_without_a_method_averages_areas_and_one_with_an_unknown_one_is_refused(tmp_path):
    file = tmp_path / "preprocess.json"
    before = Preprocessing(**PLAIN, width=16, height=9)
    file.write_text(before.model_dump_json(exclude={"resample"}))
    assert read_preprocessing(file) == before and before.resample == "area"
    file.write_text(before.model_dump_json().replace('"area"', '"cubic"'))
    with pytest.raises(BundleError, match=r"preprocess\.json: resample: .*'area', .*'hamming', got 'cubic'"):
        read_preprocessing(file)


def test_images_are_decoded_to_four_times_the_towers_size_where_areas_are_averaged():
    steps = Preprocessing(cameras=("CAM_FRONT",), aspect_ratio=16 / 9)
    sizes = {(1600, 900): 2, (800, 450): 1, (1366, 768): 2, (1362, 766): 1, (2731, 1536): 4, (7680, 4320): 8}
    for size, divisor in sizes.items():
        assert steps.reduction(*size) == divisor, size
    assert steps.reduction(900, 1600) == steps.reduction(1600, 1200) == 1  # refused, by their own size
    assert steps.model_copy(update={"aspect_ratio": None}).reduction(900, 1600) == 2
    assert steps.model_copy(update={"resample": "bicubic"}).reduction(1600, 900) == 1


@pytest.mark.parametrize("size", [(1600, 900), (1599, 901), (7680, 4320)])
def test_areas_of_large_images_are_averaged_in_two_steps_to_almost_the_same_grey_level(size):
    steps = Preprocessing(**PLAIN, width=96, height=96)
    width, height = size
    image = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    image = image.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    at_once = cv2.resize(image, (96, 96), interpolation=cv2.INTER_AREA).transpose(2, 0, 1) / 255
    assert steps.reduction(*size) > 1
    assert np.abs(steps.apply({"CAM_FRONT": image})[0] - at_once).max() <= 1.01 / 255


def test_rounding_up_makes_no_image_one_that_is_refused():
    steps = Preprocessing(cameras=("CAM_FRONT",), width=4, height=2, aspect_ratio=2.0)
    for height in range(16, 90):
        for width in range(round(1.9 * height), round(2.1 * height) + 2):
            divisor = steps.reduction(width, height)
            if divisor > 1:
                reduced = np.zeros((-(-height // divisor), -(-width // divisor), 3), dtype=np.uint8)
                steps.check_image("CAM_FRONT", reduced)
