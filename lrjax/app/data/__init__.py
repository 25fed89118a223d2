"""Labelled images at full resolution: folders of them, or scattered handwritten digits.

A source is an indexable collection of `{"image": uint8 [H, W, 3], "label": int32}`, all of one
size; `batches` shuffles, augments and stacks one with grain, in an order that depends on the seed
alone. Images stay uint8 until the model converts them: a float32 copy is four times the size.
"""

from lrjax.app.data.augmentation import Augmentation
from lrjax.app.data.batching import batches, in_order
from lrjax.app.data.decoding import (
    DEFAULT_MAX_PIXELS,
    Fit,
    SkippedFile,
    UnreadableImageError,
)
from lrjax.app.data.digits import DIGIT_SIZE, DigitPixels, ScatteredDigits
from lrjax.app.data.folder import ImageFolder
from lrjax.app.data.masks import SegmentationFolder
from lrjax.app.data.sources import CHANNELS, Example, ImageSource, Subset
from lrjax.app.data.splits import check_validation, split

__all__ = [
    "CHANNELS",
    "DEFAULT_MAX_PIXELS",
    "DIGIT_SIZE",
    "Augmentation",
    "DigitPixels",
    "Example",
    "Fit",
    "ImageFolder",
    "ImageSource",
    "ScatteredDigits",
    "SegmentationFolder",
    "SkippedFile",
    "Subset",
    "UnreadableImageError",
    "batches",
    "check_validation",
    "in_order",
    "split",
]
