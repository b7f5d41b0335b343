"""What a checkpoint's `preprocessor_config.json` says about images, for bundles that know no transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

from vla_autoprune.errors import InputError
from vla_autoprune.files import first_fault, read_json
from vla_autoprune.models.preprocess import Deviation, Preprocessing, Resample

FILE = "preprocessor_config.json"
WHOLE = "processor_config.json"
"""Where processors that transformers 5 saved have it, under "image_processor"."""

FILTERS: dict[int, Resample] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "box",
    5: "hamming",
}
"""What `resample` stands for: Pillow's numbers."""


class ImageProcessor(BaseModel):
    """Fields that decide about pixels, with the values a bundle can do. All others are passed over.

    Defaults are those of the processors that the supported families have.
    """

    image_mean: tuple[float, float, float]
    image_std: tuple[Deviation, Deviation, Deviation]
    resample: Literal[0, 1, 2, 3, 4, 5] = 3
    size: int | dict[str, int] = Field(default={}, union_mode="left_to_right")
    do_center_crop: bool = False
    crop_size: int | dict[str, int] = Field(default={}, union_mode="left_to_right")
    do_resize: Literal[True] = True
    do_rescale: Literal[True] = True
    rescale_factor: float = Field(default=1 / 255, gt=0.999 / 255, lt=1.001 / 255)
    do_normalize: Literal[True] = True
    do_pad: Literal[False] = False

    def preprocessing(self, cameras: tuple[str, ...], image_size: tuple[int, int]) -> Preprocessing:
        """The same steps for a rig.

        Args:
            cameras: in the order of the prompt.
            image_size: (width, height) in pixels of what the tower sees.

        Raises:
            InputError: the middle is cropped, but not to the tower's size from a shorter side of that size.
        """
        width, height = image_size
        if self.do_center_crop:
            size = {"shortest_edge": self.size} if isinstance(self.size, int) else self.size
            crop = self.crop_size
            if isinstance(crop, int):
                crop = {"height": crop, "width": crop}
            wanted_size, wanted_crop = {"shortest_edge": min(image_size)}, {"height": height, "width": width}
            if size not in ({}, wanted_size) or crop not in ({}, wanted_crop):
                raise InputError(
                    f"{FILE}: do_center_crop with size {size} and crop_size {crop} is not supported; "
                    f"the model's tower needs size {wanted_size} and crop_size {wanted_crop}"
                )
        return Preprocessing(
            cameras=cameras,
            width=width,
            height=height,
            mean=self.image_mean,
            std=self.image_std,
            fit="crop" if self.do_center_crop else "squeeze",
            resample=FILTERS[self.resample],
        )


def read_image_processor(folder: Path) -> ImageProcessor:
    """Read the `preprocessor_config.json` of a checkpoint, or what its `processor_config.json` has of it.

    Raises:
        InputError: it is missing, not valid, or asks for what no bundle does; the message names the field.
    """
    path = folder / FILE
    if path.is_file():
        values = read_json(path)
    elif (folder / WHOLE).is_file():
        path = folder / WHOLE
        whole = read_json(path)
        values = whole.get("image_processor") if isinstance(whole, dict) else None
    else:
        raise InputError(
            f"{path} is missing; it says how images are resized and normalised, and save_pretrained of the "
            "model's processor writes it"
        )
    if isinstance(values, dict):  # null stands for the default
        values = {key: value for key, value in values.items() if value is not None}
    try:
        return ImageProcessor.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {first_fault(error)}") from error
