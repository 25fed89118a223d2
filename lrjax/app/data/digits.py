"""Handwritten digits scattered over a large canvas: data that needs full resolution."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from lrjax.app.data.sources import CHANNELS, Example

DIGIT_SIZE = 8  # pixels, of scikit-learn's bundled digits
_CELL = 2 * DIGIT_SIZE
# Every digit is scaled to about this sum of pixel values, so that the brightness of a canvas says
# nothing of its label. It is the largest (3,145, rounded down) at which none exceeds 255.
_INK = 3100


class ScatteredDigits:
    """Real handwritten digits of one class, scattered at native size over a large black canvas.

    The digits are scikit-learn's bundled set: 1,797 scans of 8x8 pixels. Each canvas shows `count`
    different ones of a single class, upright, unresampled and not overlapping; that class is the
    label. All digits carry the same ink, so a canvas reduced eightfold is a pattern of equal dots:
    the label can be read only at full resolution.

    Canvas `index` depends on `seed` and `index` alone and is drawn when asked for. Labels take
    turns, so classes are balanced.

    Args:
      image_size: `(height, width)` of the canvas, at least 16 each way.
      num_images: number of canvases.
      seed: of the drawing.
      classes: which digits take part, two or more of 0 to 9.
      count: digits per canvas; default: half of the 16x16 cells, at most 150.

    Raises:
      ValueError: for an argument out of the ranges above.
    """

    label_shape: tuple[int, ...] = ()

    def __init__(
        self,
        image_size: tuple[int, int],
        *,
        num_images: int = 1024,
        seed: int = 0,
        classes: Sequence[int] = tuple(range(10)),
        count: int | None = None,
    ) -> None:
        height, width = image_size
        cells = (height // _CELL) * (width // _CELL)
        if cells < 1:
            raise ValueError(f"image_size: got {height}x{width}; use at least {_CELL}x{_CELL}")
        if num_images < 1:
            raise ValueError(f"num_images: got {num_images}; use 1 or more")
        if len(set(classes)) < 2 or len(set(classes)) < len(classes):
            raise ValueError(f"classes: got {list(classes)}; use two or more different digits")
        if not set(classes) <= set(range(10)):
            raise ValueError(f"classes: got {list(classes)}; digits are 0 to 9")
        if count is None:
            count = min(150, max(1, cells // 2))
        digits = _digits_by_class()
        most = min(cells, *(len(digits[digit]) for digit in classes))
        if not 1 <= count <= most:
            raise ValueError(
                f"count: got {count}; a {height}x{width} canvas takes 1 to {most} digits"
            )
        self.image_shape: tuple[int, int, int] = (height, width, CHANNELS)
        self.class_names: tuple[str, ...] = tuple(str(digit) for digit in classes)
        self._digits = [digits[digit] for digit in classes]
        self.labels = np.arange(num_images, dtype=np.int32) % len(classes)
        self._seed = seed
        self._count = count

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        label = self.labels[index]
        random = np.random.default_rng([self._seed, index])
        chosen = random.permutation(self._digits[label])[: self._count]
        height, width, _ = self.image_shape
        columns = width // _CELL
        cells = random.permutation((height // _CELL) * columns)[: self._count]
        corners = np.stack(np.divmod(cells, columns), axis=1) * _CELL
        corners += random.integers(0, _CELL - DIGIT_SIZE + 1, corners.shape)
        canvas = np.zeros((height, width), np.uint8)
        for digit, (top, left) in zip(chosen, corners, strict=True):
            canvas[top : top + DIGIT_SIZE, left : left + DIGIT_SIZE] = digit
        return Example(
            image=np.repeat(canvas[..., None], CHANNELS, -1), label=np.asarray(label, np.int32)
        )


class DigitPixels:
    """Scattered digits with a label for every pixel: which digit its ink belongs to, or background.

    The same canvases as `ScatteredDigits`; the ink is easily found, but which digit it is must be
    read from the shape.

    Args:
      canvases: the digits. Class 0 is the background, class `k + 1` is the canvases' class `k`.
    """

    def __init__(self, canvases: ScatteredDigits) -> None:
        self._canvases = canvases
        self.image_shape = canvases.image_shape
        self.label_shape: tuple[int, ...] = canvases.image_shape[:2]
        self.class_names: tuple[str, ...] = ("background", *canvases.class_names)
        self.labels = canvases.labels

    def __len__(self) -> int:
        return len(self._canvases)

    def __getitem__(self, index: int) -> Example:
        canvas = self._canvases[index]
        is_ink = canvas["image"][..., 0] > 0
        label = np.where(is_ink, canvas["label"] + 1, 0).astype(np.int32)
        return Example(image=canvas["image"], label=label)


def _digits_by_class() -> list[np.ndarray]:
    """For each of the ten digits, its scans as uint8 `[n, 8, 8]`, all with equal ink."""
    bundle: Any = load_digits()
    ink = bundle.images.sum(axis=(1, 2), keepdims=True)
    pixels = np.rint(bundle.images * (_INK / ink))
    return [pixels[bundle.target == digit].astype(np.uint8) for digit in range(10)]
