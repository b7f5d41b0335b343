"""The same pixels as transformers' image processors, read off the file that they save."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vla_autoprune.errors import InputError
from vla_autoprune.models.image_processor import FILE, read_image_processor

NORMAL = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
IMAGE = np.random.default_rng(0).integers(0, 256, (90, 161, 3), dtype=np.uint8)
EXACT, GREY_LEVEL = 1e-5, 1.001 / 255 / min(NORMAL["image_std"])
"""Of pixel values. Without torchvision transformers resizes with Pillow, as we do; torchvision rounds some
pixels the other way."""


@pytest.fixture(params=["pil", "torchvision"])
def processors(request):
    """A module of processor classes by their family, and how far pixels may lie from theirs."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    if request.param == "pil":
        return lambda name: getattr(transformers, f"{name}ImageProcessorPil"), EXACT
    pytest.importorskip("torchvision")
    return lambda name: getattr(transformers, f"{name}ImageProcessor"), GREY_LEVEL


def ours(processor, folder, image, size):
    """Pixel values by what the processor writes into its file."""
    processor.save_pretrained(folder)
    return read_image_processor(folder).preprocessing(("CAM_FRONT",), size).apply({"CAM_FRONT": image})


@pytest.mark.parametrize("family", ["CLIP", "Llava"])
@pytest.mark.parametrize("image", [IMAGE, np.ascontiguousarray(IMAGE.swapaxes(0, 1)), IMAGE[:20, :30]])
@pytest.mark.parametrize("side", [24, 33])
def test_shorter_side_and_centre_crop(processors, family, image, side, tmp_path):
    classes, tolerance = processors
    crop = {"height": side, "width": side}
    processor = classes(family)(size={"shortest_edge": side}, crop_size=crop, **NORMAL)
    wanted = processor(image, return_tensors="np")["pixel_values"]
    assert np.abs(ours(processor, tmp_path, image, (side, side)) - wanted).max() < tolerance


@pytest.mark.parametrize("resample", [0, 1, 2, 3, 4, 5])
def test_every_filter(processors, resample, tmp_path):
    classes, tolerance = processors
    if resample in (4, 5) and tolerance == GREY_LEVEL:
        pytest.skip("torchvision has no such filter")
    options = {"size": {"height": 24, "width": 32}, "do_center_crop": False, "resample": resample}
    processor = classes("CLIP")(**options, **NORMAL)
    wanted = processor(IMAGE, return_tensors="np")["pixel_values"]
    assert np.abs(ours(processor, tmp_path, IMAGE, (32, 24)) - wanted).max() < tolerance


@pytest.mark.parametrize("patch", [14, 16])  # of Qwen2.5-VL and of Qwen3-VL, which take the same processor
def test_qwen(processors, patch, tmp_path):
    classes, tolerance = processors
    limits = {"shortest_edge": 4 * patch**2, "longest_edge": 40 * patch**2}
    processor = classes("Qwen2VL")(patch_size=patch, size=limits, **NORMAL)
    found = processor(IMAGE, return_tensors="pt")
    _, rows, columns = found["image_grid_thw"][0].tolist()
    assert (rows, columns) == (4, 8)
    pixels = ours(processor, tmp_path, IMAGE, (columns * patch, rows * patch))
    if tolerance == EXACT:
        patches = processor.patchify(pixels[0], patch, 2, 2)[0]
    else:
        steps = dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), False)
        unchanged = classes("Qwen2VL")(patch_size=patch, **steps)
        patches = unchanged(pixels[0], return_tensors="np", input_data_format="channels_first")
        patches = patches["pixel_values"]
    assert np.abs(patches - found["pixel_values"].numpy()).max() < tolerance


def test_a_file_that_leaves_out_the_filter_means_the_classes_own(tmp_path):
    (tmp_path / FILE).write_text(json.dumps({**NORMAL, "do_pad": None, "resample": None}))
    assert read_image_processor(tmp_path).preprocessing(("A",), (32, 24)).resample == "bicubic"


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"resample": 7}, "preprocessor_config.json: resample: .*0, 1, 2, 3, 4 or 5, got '7'"),
        ({"resample": "bicubic"}, "resample: .*got 'bicubic'"),
        ({"do_pad": True}, "do_pad: .*False, got 'True'"),
        ({"do_resize": False}, "do_resize: .*True, got 'False'"),
        ({"rescale_factor": 1.0}, "rescale_factor: .*got '1.0'"),
        ({"image_mean": None}, "image_mean: Field required"),
        ({"image_std": [0.2, 0.0, 0.2]}, "image_std.1: .*greater than 0, got '0.0'"),
        (
            {"do_center_crop": True, "size": 40, "crop_size": 32},
            r"size \{'shortest_edge': 40\} .* needs size \{'shortest_edge': 32\}",
        ),
        (
            {"do_center_crop": True, "size": {"height": 32, "width": 32}, "crop_size": 32},
            "size {'height': 32, 'width': 32} .* is not supported",
        ),
        (
            {"do_center_crop": True, "size": 32, "crop_size": {"height": 28, "width": 28}},
            "crop_size {'height': 28, 'width': 28} is not supported",
        ),
    ],
)
def test_what_no_bundle_does_is_refused(changes, message, tmp_path):
    (tmp_path / FILE).write_text(json.dumps({**NORMAL, **changes}))
    with pytest.raises(InputError, match=message):
        read_image_processor(tmp_path).preprocessing(("CAM_FRONT",), (32, 32))


def test_no_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"preprocessor_config\.json is missing; it says how images"):
        read_image_processor(tmp_path)
