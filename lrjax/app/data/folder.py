"""A folder of images, one directory per class."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lrjax.app.data import decoding, finding
from lrjax.app.data.decoding import Fit, SkippedFile, UnreadableImageError
from lrjax.app.data.finding import Found
from lrjax.app.data.sources import CHANNELS, Example

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


class ImageFolder:
    """Images in class-per-directory layout: `directory/<class name>/**/<any name>.<image suffix>`.

    Labels are the positions of the class names in sorted order. Every file is decoded once, when
    the folder is opened, so that what is wrong with it is known before training:

    * a missing directory, one without class directories, one that holds splits such as `train/` and
      `val/` instead of classes, and a class directory with no readable image raise `ValueError`;
    * an unreadable or truncated image, and one whose header claims more than `max_pixels`, is left
      out and listed in `skipped`, with the reason, as is a directory that cannot be read;
    * hidden files and hidden directories are not looked at; files without an image suffix are not
      either, but `notes` counts them;
    * a file that breaks *after* the check is replaced by the next readable image, under that
      image's own label, with a warning that names it: training goes on and no label is wrong.

    Greyscale, palette, 16-bit greyscale and CMYK images become 8-bit RGB, transparency is dropped,
    EXIF orientation is applied, and of several frames the first is taken. Pillow's limit on the
    number of pixels is lifted for the process: images here are meant to be large. 16-bit values are
    divided by 256; where that leaves all of them dark, `notes` says so.

    Args:
      directory: the folder.
      image_size: `(height, width)` of the images given out. Default: the size all images share.
      fit: how an image of another size gets there. `"native"`: no resampling; centred, cropped
        where larger and padded with black where smaller. `"resize"`: scaled (bilinear,
        antialiased) until it covers the size, then cropped centrally.
      max_pixels: an image with more is not decoded; read from its header.

    Raises:
      ValueError: see above; also where `image_size` is not given and sizes differ.
    """

    label_shape: tuple[int, ...] = ()

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        image_size: tuple[int, int] | None = None,
        fit: Fit = "native",
        max_pixels: int = decoding.DEFAULT_MAX_PIXELS,
    ) -> None:
        decoding.check_fit(fit)
        decoding.lift_pillows_limit()
        self.directory = Path(directory)
        self.class_names: tuple[str, ...] = _class_names(self.directory)
        self._fit = fit
        self._max_pixels = max_pixels
        found = [finding.images_below(self.directory / name) for name in self.class_names]
        files, self.skipped = _readable_files(self.directory, self.class_names, found, max_pixels)
        self.notes = finding.notes_on(found, [file.largest for file in files])
        self._paths = [file.path for file in files]
        self._bytes = [file.bytes for file in files]
        self.labels = np.array([file.label for file in files], np.int32)
        size = decoding.checked_size(image_size or decoding.shared_size(files))
        self.image_shape: tuple[int, int, int] = (*size, CHANNELS)

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        """The file of an image."""
        return str(self._paths[index])

    def files_of(self, index: int) -> str:
        """The file of an image below the folder, and its bytes; see `sources.files_of`."""
        return f"{self._paths[index].relative_to(self.directory).as_posix()}\t{self._bytes[index]}"

    def __getitem__(self, index: int) -> Example:
        for candidate in range(index, index + len(self)):
            position = candidate % len(self)
            try:
                pixels = decoding.decoded(self._paths[position], self._max_pixels)
            except UnreadableImageError as error:
                warnings.warn(
                    f"{self._paths[position]} was readable when the folder was checked and is not "
                    f"any more ({error}); the next image takes its place",
                    stacklevel=2,
                )
                continue
            image = decoding.fitted(pixels, self.image_shape[:2], self._fit)
            return Example(
                image=np.asarray(image), label=self.labels[position : position + 1].reshape(())
            )
        raise UnreadableImageError(f"no image in {self.directory} is readable any more")


@dataclass(frozen=True)
class _CheckedFile:
    path: Path
    label: int
    size: tuple[int, int]  # (height, width)
    largest: int | None  # value, of a 16-bit image
    bytes: int


def _class_names(directory: Path) -> tuple[str, ...]:
    if not directory.is_dir():
        raise ValueError(
            f"data: {directory} is not a directory; give a folder of class directories"
        )
    names = sorted(p.name for p in directory.iterdir() if p.is_dir() and p.name[0] != ".")
    if len(names) < 2:
        raise ValueError(
            f"data: {directory} has {len(names)} class directories; at least two are needed, each "
            "named for its class and holding that class's images"
        )
    if all(name.lower() in _SPLIT_NAMES for name in names):
        raise ValueError(
            f"data: {directory} holds splits ({', '.join(names)}), not classes; "
            f"give one of them, such as {directory / names[0]}"
        )
    if names == ["images", "masks"]:
        raise ValueError(
            f"data: {directory} holds images and masks, not classes; train a network that labels "
            "every pixel, such as unet"
        )
    return tuple(names)


def _readable_files(
    directory: Path, class_names: Sequence[str], found: Sequence[Found], max_pixels: int
) -> tuple[list[_CheckedFile], tuple[SkippedFile, ...]]:
    """Decodes every image file of every class; gives the good ones, and the others with reasons."""

    def check(entry: tuple[Path, int]) -> _CheckedFile | SkippedFile:
        path, label = entry
        try:
            image = decoding.inspected(path, max_pixels)
        except UnreadableImageError as error:
            return SkippedFile(path, str(error))
        return _CheckedFile(path, label, image.size, image.largest, image.bytes)

    entries = [(path, label) for label, one in enumerate(found) for path in one.files]
    checked = decoding.checked_in_parallel(check, entries)
    readable = [result for result in checked if isinstance(result, _CheckedFile)]
    skipped = (
        *(directory for one in found for directory in one.unreadable),
        *(result for result in checked if isinstance(result, SkippedFile)),
    )
    empty = sorted(set(range(len(class_names))) - {file.label for file in readable})
    if empty:
        listed = ", ".join(str(directory / class_names[label]) for label in empty)
        reasons = "".join(f"\n  {file}" for file in skipped)
        raise ValueError(
            f"data: no readable image in {listed}; add images or remove the directory{reasons}"
        )
    return readable, skipped
