"""Image files to upright 8-bit RGB of one size, and what is wrong with those that cannot be read.

What an image needs is known from its header, so that an absurd one is refused before it is decoded.
"""

import concurrent.futures
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from PIL import ExifTags, Image, ImageOps

Fit = Literal["native", "resize"]
# A square image of 46,340 pixels a side, which takes 6 GiB as RGB.
DEFAULT_MAX_PIXELS = 2**31
# From 16-bit values to 8-bit ones.
SIXTEEN_BIT_DIVISOR = 256
# EXIF orientations that are not upright.
_TURNED = range(2, 9)

T = TypeVar("T")
S = TypeVar("S")


@dataclass(frozen=True)
class SkippedFile:
    """An image file that will not be trained on, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class UnreadableImageError(Exception):
    """A file does not hold an image that can be decoded in full."""


def check_fit(fit: str) -> None:
    """Raises `ValueError` for a fit that does not exist."""
    if fit not in get_args(Fit):
        raise ValueError(f"fit: got {fit!r}; use one of {', '.join(get_args(Fit))}")


@dataclass(frozen=True)
class Inspected:
    """What is known of an image file that was decoded in full.

    Attributes:
      size: (height, width), upright.
      stored_size: the same before its EXIF orientation is applied.
      is_turned: its EXIF orientation is another than upright.
      largest: the largest value of a 16-bit image, None of another.
      bytes: of the file.
    """

    size: tuple[int, int]
    stored_size: tuple[int, int]
    is_turned: bool
    largest: int | None
    bytes: int


def inspected(path: Path, max_pixels: int) -> Inspected:
    """Decodes an image to see whether it can be, and what it is.

    Raises:
      UnreadableImageError: as for `decoded`.
    """

    def inspect(image: Image.Image) -> Inspected:
        upright = _to_rgb(ImageOps.exif_transpose(image))
        return Inspected(
            size=(upright.height, upright.width),
            stored_size=(image.height, image.width),
            is_turned=_orientation(image) in _TURNED,
            largest=_largest_of_16_bits(image, path),
            bytes=path.stat().st_size,
        )

    return _read(path, max_pixels, inspect)


def _largest_of_16_bits(image: Image.Image, path: Path) -> int | None:
    if image.mode.startswith("I;16"):
        return int(np.asarray(image).max())
    with Image.open(path) as header:  # a loaded image no longer knows
        is_wide = re.search(";16[BLN]", str(header.tile)) is not None
    # Colours of 16 bits are 8-bit ones as soon as Pillow has read them.
    return (int(np.asarray(image).max()) + 1) * SIXTEEN_BIT_DIVISOR - 1 if is_wide else None


def has_orientation(path: Path, max_pixels: int) -> bool:
    """Whether a file says how its image is turned.

    Raises:
      UnreadableImageError: as for `decoded`.
    """
    return _read(path, max_pixels, lambda image: _orientation(image) is not None)


def _orientation(image: Image.Image) -> int | None:
    return image.getexif().get(ExifTags.Base.Orientation)


def decoded(path: Path, max_pixels: int) -> Image.Image:
    """The whole image as upright 8-bit RGB.

    Raises:
      UnreadableImageError: the file is no image, is not whole, or has more than `max_pixels`.
    """
    return _read(path, max_pixels, lambda image: _to_rgb(ImageOps.exif_transpose(image)))


def decoded_mask(path: Path, max_pixels: int) -> np.ndarray:
    """The whole upright mask, `[H, W]`, its values as they are in the file (a palette's indices).

    Raises:
      UnreadableImageError: as for `decoded`; also where pixels are colours and no classes.
    """
    return _read(path, max_pixels, lambda image: _to_classes(ImageOps.exif_transpose(image)))


def _read(path: Path, max_pixels: int, converted: Callable[[Image.Image], T]) -> T:
    # Decoders raise more than OSError on malformed files (SyntaxError, ValueError, struct.error,
    # EOFError, ...), so anything that goes wrong here means an unreadable file.
    try:
        with Image.open(path) as image:
            check_pixels(image.size, max_pixels)
            image.load()
            return converted(image)
    except UnreadableImageError:
        raise
    except Exception as error:
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error


def check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    """Raises `UnreadableImageError` for an image whose header claims too many pixels."""
    width, height = size
    if width * height > max_pixels:
        raise UnreadableImageError(
            f"its header says {height}x{width}, {width * height:,} pixels, more than max_pixels "
            f"({max_pixels:,}) allows; raise max_pixels if the image is really that large"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255 instead of scaling.
        image = Image.fromarray((np.asarray(image) // SIXTEEN_BIT_DIVISOR).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UnreadableImageError(
            f"32-bit pixels (Pillow mode {image.mode}) have no set range; save as 8 or 16 bit"
        )
    return image.convert("RGB")


def _to_classes(image: Image.Image) -> np.ndarray:
    if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
        raise UnreadableImageError(
            f"a mask has one class number per pixel, and this file has colours (Pillow mode "
            f"{image.mode}); save it as greyscale or palette"
        )
    return np.asarray(image).astype(np.int32)


def fitted(image: Image.Image, size: tuple[int, int], fit: Fit) -> Image.Image:
    """The image at `size` (height, width).

    `"native"`: no resampling; centred, cropped where larger and padded with black where smaller.
    `"resize"`: scaled (bilinear, antialiased) until it covers the size, then cropped centrally.
    """
    return _fitted(image, size, fit, Image.Resampling.BILINEAR)


def fitted_mask(mask: np.ndarray, size: tuple[int, int], fit: Fit) -> np.ndarray:
    """The mask at `size`, as `fitted` brings its image there; classes are never mixed."""
    # Pillow resamples no 16-bit images by nearest neighbours on all versions, but 32-bit ones.
    image = Image.fromarray(mask.astype(np.int32))
    return np.asarray(_fitted(image, size, fit, Image.Resampling.NEAREST)).astype(np.int32)


def _fitted(
    image: Image.Image, size: tuple[int, int], fit: Fit, method: Image.Resampling
) -> Image.Image:
    height, width = size
    if (image.height, image.width) == size:
        return image
    if fit == "resize":
        return ImageOps.fit(image, (width, height), method)
    left = (image.width - width) // 2
    top = (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


@dataclass(frozen=True)
class Window:
    """Where what `fitted` gives lies in its image.

    Row `r` of it begins at row `offset[0] + scale[0] * r` of the upright image, and so for columns;
    an offset below 0 is padding.

    Attributes:
      offset: of the first row and column, in pixels of the image.
      scale: pixels of the image for one, by rows and by columns.
    """

    offset: tuple[float, float]
    scale: tuple[float, float]


def window(image_size: tuple[int, int], size: tuple[int, int], fit: Fit) -> Window:
    """Of an image of `image_size` (height, width) that `fitted` brings to `size`."""
    (height, width), (rows, columns) = image_size, size
    if fit == "native":
        return Window(((height - rows) // 2, (width - columns) // 2), (1, 1))
    # As Pillow's ImageOps.fit: the largest part of these proportions, from the middle.
    scale = min(height / rows, width / columns)
    return Window(((height - scale * rows) / 2, (width - scale * columns) / 2), (scale, scale))


def checked_in_parallel(check: Callable[[T], S], entries: Iterable[T]) -> list[S]:
    """`check` of every entry, by as many threads as there are CPUs."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(check, entries))


def shared_size(files: Sequence[Any]) -> tuple[int, int]:
    """The size, (height, width), of files with a `path` and a `size`.

    Raises:
      ValueError: they differ.
    """
    first = files[0]
    for file in files:
        if file.size != first.size:
            raise ValueError(
                f"image_size: images differ in size ({first.path} is {first.size[0]}x"
                f"{first.size[1]}, {file.path} is {file.size[0]}x{file.size[1]}, height x width); "
                'give the size to train at, and fit="native" (crop and pad) or "resize"'
            )
    return first.size


def checked_size(size: tuple[int, int]) -> tuple[int, int]:
    """Raises `ValueError` for a size without pixels."""
    height, width = size
    if min(height, width) < 1:
        raise ValueError(f"image_size: got {height}x{width}; height and width must be at least 1")
    return size


def lift_pillows_limit() -> None:
    """Pillow warns of images over 89 megapixels; here `max_pixels` is the limit."""
    Image.MAX_IMAGE_PIXELS = None
