"""Random changes to training images: flips, shifted crops, colours. Evaluation sees none of them.

Each image is altered by a random generator of its own, which grain derives from the seed and the
image's place in the order: a resumed run alters it as the uninterrupted one did.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from PIL import Image, ImageEnhance

# In torchvision's order of arguments; each factor is drawn from [1 - strength, 1 + strength].
_ENHANCERS: dict[str, Callable[[Image.Image], Any]] = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


@dataclass(frozen=True)
class Augmentation(grain.transforms.RandomMap):
    """Alters one example; a label of pixels is flipped and cropped with its image.

    Attributes:
      flip: mirror left and right in half of the cases.
      flip_rows: mirror top and bottom in half of the cases.
      crop: shift by up to so many pixels each way; what comes in at the edges is reflected.
      brightness, contrast, saturation: strengths in [0, 1]; the factor is drawn uniformly from
        `[1 - strength, 1 + strength]` (Pillow's `ImageEnhance`).

    Raises:
      ValueError: for a negative crop, or a strength outside [0, 1].
    """

    flip: bool = False
    flip_rows: bool = False
    crop: int = 0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __post_init__(self) -> None:
        if self.crop < 0:
            raise ValueError(f"augment.crop: got {self.crop}; use 0 or more pixels")
        for name in _ENHANCERS:
            strength = getattr(self, name)
            if not 0 <= strength <= 1:
                raise ValueError(f"augment.{name}: got {strength}; use a number from 0 to 1")

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raises `ValueError` where images are too small for the crop."""
        smallest = min(image_shape[:2])
        if self.crop >= smallest:
            raise ValueError(
                f"augment.crop: got {self.crop} for images of {image_shape[0]}x{image_shape[1]}; "
                f"use at most {smallest - 1}"
            )

    def random_map(self, element: Any, rng: np.random.Generator) -> Any:
        """The example, altered. Every number is drawn whether or not it is used."""
        flip, flip_rows = rng.random(2) < 0.5
        top, left = rng.integers(0, 2 * self.crop + 1, 2)
        factors = dict(zip(_ENHANCERS, rng.uniform(-1, 1, len(_ENHANCERS)), strict=True))
        image, label = element["image"], element["label"]
        moved = [self._moved(array, flip, flip_rows, top, left) for array in (image, label)]
        return {**element, "image": self._recoloured(moved[0], factors), "label": moved[1]}

    def _moved(
        self, array: np.ndarray, flip: bool, flip_rows: bool, top: int, left: int
    ) -> np.ndarray:
        """Flipped and cropped; a label of the whole image stays as it is."""
        if array.ndim < 2:
            return array
        height, width = array.shape[:2]
        if self.crop:
            around = [(self.crop, self.crop)] * 2 + [(0, 0)] * (array.ndim - 2)
            array = np.pad(array, around, mode="reflect")
            array = array[top : top + height, left : left + width]
        if self.flip and flip:
            array = array[:, ::-1]
        if self.flip_rows and flip_rows:
            array = array[::-1]
        return np.ascontiguousarray(array)

    def _recoloured(self, image: np.ndarray, drawn: dict[str, float]) -> np.ndarray:
        strengths = {name: getattr(self, name) for name in _ENHANCERS}
        if not any(strengths.values()):
            return image
        picture = Image.fromarray(image)
        for name, strength in strengths.items():
            if strength:
                picture = _ENHANCERS[name](picture).enhance(1 + strength * drawn[name])
        return np.asarray(picture)
