"""Handwritten digits of varied size, scattered over a large canvas and labelled with their sum.

After UltraMNIST (arXiv 2206.12681), from scikit-learn's bundled 8x8 scans. What the digits are can
be read only where they have enough pixels: every digit of a size carries the same ink, so that a
canvas reduced far enough is a few equal dots, whatever its label.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

Split = Literal["train", "held-out"]
HELD_OUT = 0.25  # of the scans of each digit
# Mean pixel value of a digit in its box: the largest (0.19, rounded down) at which no scan of the
# bundled set exceeds 255 when drawn.
INK = 0.19 * 255


class Canvas(NamedTuple):
    """An image, uint8 [side, side], the class of its sum, and where its digits are."""

    image: np.ndarray
    label: int
    boxes: list[tuple[int, int, int]]  # (top, left, size) of each digit, in pixels


class DigitSums:
    """Canvases that each show `count` scans of two kinds of digit; their sum is the label.

    Every sum is as frequent as any other. The scans themselves are divided between the splits: none
    that is drawn in training is ever drawn on a held-out canvas. Canvas `index` depends on the
    arguments and `index` alone, and there is no last one.

    Args:
      side: of the square canvas, in pixels.
      split: which scans are drawn.
      digits: the two digits, the smaller sum first.
      count: digits on each canvas.
      sizes: smallest and largest side of a digit, in pixels; sizes between are drawn uniformly in
        their logarithm, one for each digit.
      seed: of the drawing; the division of the scans does not depend on it.

    Raises:
      ValueError: for an argument out of the ranges above.
    """

    def __init__(
        self,
        side: int,
        split: Split,
        *,
        digits: tuple[int, int] = (0, 8),
        count: int = 2,
        sizes: tuple[int, int] = (8, 13),
        seed: int = 0,
    ) -> None:
        if split not in get_args(Split):
            raise ValueError(f"split: got {split!r}; use one of {', '.join(get_args(Split))}")
        if len(digits) != 2 or not 0 <= digits[0] < digits[1] <= 9:
            raise ValueError(f"digits: got {digits}; use two of 0 to 9, the smaller one first")
        if count < 1:
            raise ValueError(f"count: got {count}; use 1 or more")
        if not 1 <= sizes[0] <= sizes[1]:
            raise ValueError(f"sizes: got {sizes}; use (smallest, largest), 1 or more")
        # A digit that is placed keeps others from at most twice its largest side, and a pixel more,
        # each way. This is twice that area for all: drawing places by trial takes few trials.
        least = math.ceil((2 * sizes[1] + 1) * math.sqrt(2 * count))
        if side < least:
            raise ValueError(
                f"side: got {side}; {count} digits of up to {sizes[1]} pixels need {least} or more"
            )
        self.side = side
        self.sums = tuple(digits[0] * (count - k) + digits[1] * k for k in range(count + 1))
        self._scans = [scans(digit, split) for digit in digits]
        self._count = count
        self.sizes = sizes
        self._seed = (seed, get_args(Split).index(split))

    def __getitem__(self, index: int) -> Canvas:
        random = np.random.default_rng([*self._seed, index])
        label = index % len(self.sums)
        kinds = random.permutation([1] * label + [0] * (self._count - label))
        image = np.zeros((self.side, self.side), np.uint8)
        boxes: list[tuple[int, int, int]] = []
        for kind in kinds:
            own = self._scans[kind]
            size = int(np.exp(random.uniform(np.log(self.sizes[0]), np.log(self.sizes[1] + 1))))
            glyph = enlarged(own[random.integers(len(own))], size)
            top, left = _free_place(random, self.side, size, boxes)
            boxes.append((top, left, size))
            image[top : top + size, left : left + size] = glyph
        return Canvas(image, label, boxes)


@functools.cache
def _bundle() -> Any:
    return load_digits()


def scans(digit: int, split: Split) -> np.ndarray:
    """The scans of a digit that belong to a split: float [n, 8, 8], of 0 to 16."""
    bundle = _bundle()
    own = bundle.images[bundle.target == digit]
    order = np.random.default_rng(digit).permutation(len(own))
    held_out = round(HELD_OUT * len(own))
    return own[order[held_out:] if split == "train" else order[:held_out]]


def enlarged(scan: np.ndarray, size: int) -> np.ndarray:
    """A scan at `size` x `size` pixels (bilinear), uint8, with the mean pixel value `INK`."""
    image = Image.fromarray(scan.astype(np.float32)).resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return np.clip(np.round(pixels * (INK / pixels.mean())), 0, 255).astype(np.uint8)


def shrunk(image: np.ndarray, side: int) -> np.ndarray:
    """An image at `side` x `side` pixels, each the mean of the area it covers; uint8."""
    if side == image.shape[0]:
        return image
    small = Image.fromarray(image.astype(np.float32)).resize((side, side), Image.Resampling.BOX)
    return np.round(np.asarray(small)).astype(np.uint8)


def _free_place(
    random: np.random.Generator, side: int, size: int, taken: Sequence[tuple[int, int, int]]
) -> tuple[int, int]:
    """Top and left of a box that neither meets nor touches those already taken."""
    while True:
        top, left = (int(corner) for corner in random.integers(0, side - size + 1, 2))
        if all(
            top + size < other_top
            or other_top + other < top
            or left + size < other_left
            or other_left + other < left
            for other_top, other_left, other in taken
        ):
            return top, left
