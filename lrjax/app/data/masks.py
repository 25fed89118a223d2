"""A folder of images with a mask each, which has a class for every pixel."""

import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lrjax.app.data import decoding, finding
from lrjax.app.data.decoding import Fit, SkippedFile, UnreadableImageError
from lrjax.app.data.finding import Found
from lrjax.app.data.sources import CHANNELS, Example
from lrjax.text import listed

IMAGES = "images"
MASKS = "masks"
_IS_TURNED = "it is turned by an EXIF orientation"
_WHAT_TO_DO = "save the image upright without it"


class SegmentationFolder:
    """Images in `directory/images/`, and masks of the same names, suffix aside, in its `masks/`.

    A mask is a greyscale or palette image of its image's size; its values are the classes, 0 to
    one less than their number. Every pair is decoded once, when the folder is opened:

    * a missing directory, an image without a mask or a mask without an image, two files of one
      name, a mask of another size than its image, and classes with gaps raise `ValueError`;
    * an unreadable image or mask is left out with its partner and listed in `skipped`, as are an
      image that is turned by its EXIF orientation and a mask that may be turned or not, and a
      directory that cannot be read;
    * a pair that breaks *after* the check is replaced by the next readable one, with a warning.

    Args:
      directory: the folder; images and masks may lie in subdirectories, in the same for both.
      image_size: `(height, width)` of what is given out. Default: the size all images share.
      fit: as for `ImageFolder`; masks are scaled by nearest neighbours, and padded with class 0.
      max_pixels: an image with more is not decoded; read from its header.
      num_classes: default: one more than the largest value of any mask.

    Raises:
      ValueError: see above.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        image_size: tuple[int, int] | None = None,
        fit: Fit = "native",
        max_pixels: int = decoding.DEFAULT_MAX_PIXELS,
        num_classes: int | None = None,
    ) -> None:
        decoding.check_fit(fit)
        decoding.lift_pillows_limit()
        self.directory = Path(directory)
        self._fit = fit
        self._max_pixels = max_pixels
        found = _found(self.directory)
        checked = decoding.checked_in_parallel(
            lambda pair: _check(*pair, max_pixels), _pairs(self.directory, found)
        )
        self._pairs = [pair for pair in checked if isinstance(pair, _Pair)]
        self.skipped: tuple[SkippedFile, ...] = (
            *(directory for one in found.values() for directory in one.unreadable),
            *(file for file in checked if isinstance(file, SkippedFile)),
        )
        self.notes = finding.notes_on(found.values(), [pair.largest for pair in self._pairs])
        if not self._pairs:
            reasons = "".join(f"\n  {file}" for file in self.skipped)
            raise ValueError(f"data: no readable image with a mask in {self.directory}{reasons}")
        _check_sizes(self._pairs)
        self.class_names: tuple[str, ...] = _class_names(self._pairs, num_classes)
        size = decoding.checked_size(image_size or decoding.shared_size(self._pairs))
        self.image_shape: tuple[int, int, int] = (*size, CHANNELS)
        self.label_shape: tuple[int, ...] = size
        self.labels = np.zeros(len(self._pairs), np.int32)

    def __len__(self) -> int:
        return len(self._pairs)

    def name(self, index: int) -> str:
        """The image file of a pair."""
        return str(self._pairs[index].path)

    def files_of(self, index: int) -> str:
        """Image and mask below the folder, and their bytes; see `sources.files_of`."""
        pair = self._pairs[index]
        files = zip((pair.path, pair.mask), pair.bytes, strict=True)
        return "\t".join(
            f"{path.relative_to(self.directory).as_posix()}\t{size}" for path, size in files
        )

    def classes_of(self, index: int) -> frozenset[int]:
        """The classes that a mask shows."""
        return self._pairs[index].classes

    def __getitem__(self, index: int) -> Example:
        for candidate in range(index, index + len(self)):
            pair = self._pairs[candidate % len(self)]
            try:
                image = decoding.decoded(pair.path, self._max_pixels)
                mask = decoding.decoded_mask(pair.mask, self._max_pixels)
                if mask.shape != (image.height, image.width) or mask.max() >= len(self.class_names):
                    raise UnreadableImageError("its mask was changed")
            except UnreadableImageError as error:
                warnings.warn(
                    f"{pair.path} or its mask was readable when the folder was checked and is not "
                    f"any more ({error}); the next image takes its place",
                    stacklevel=2,
                )
                continue
            size = self.image_shape[:2]
            return Example(
                image=np.asarray(decoding.fitted(image, size, self._fit)),
                label=decoding.fitted_mask(mask, size, self._fit),
            )
        raise UnreadableImageError(f"no image in {self.directory} is readable any more")


@dataclass(frozen=True)
class _Pair:
    path: Path
    mask: Path
    size: tuple[int, int]  # (height, width), of the image
    mask_size: tuple[int, int]
    classes: frozenset[int]
    largest: int | None  # value, of a 16-bit image
    bytes: tuple[int, int]  # of image and mask
    is_turned: bool  # by its EXIF orientation, and its mask has none


def _found(directory: Path) -> dict[str, Found]:
    """What lies in the directories of images and masks.

    Raises:
      ValueError: one is missing.
    """
    for name in (IMAGES, MASKS):
        if not (directory / name).is_dir():
            raise ValueError(
                f"data: {directory} has no directory {name}; a network that labels every pixel "
                f"learns from {IMAGES}/ and, under the same names, {MASKS}/"
            )
    return {name: finding.images_below(directory / name) for name in (IMAGES, MASKS)}


def _pairs(directory: Path, found: Mapping[str, Found]) -> list[tuple[Path, Path]]:
    """Every image with its mask.

    Raises:
      ValueError: there is no image, or a file has no partner.
    """
    images, masks = (_by_stem(directory / name, found[name].files) for name in (IMAGES, MASKS))
    if not images:
        raise ValueError(f"data: no image in {directory / IMAGES}; add images")
    without = [images[stem] for stem in sorted(images.keys() - masks.keys())]
    if without:
        raise ValueError(f"data: no mask for {listed(without)}; add masks or remove the images")
    alone = [masks[stem] for stem in sorted(masks.keys() - images.keys())]
    if alone:
        raise ValueError(f"data: no image for {listed(alone)}; add images or remove the masks")
    return [(images[stem], masks[stem]) for stem in sorted(images)]


def _by_stem(directory: Path, files: Sequence[Path]) -> dict[str, Path]:
    stems = [str(file.relative_to(directory).with_suffix("")) for file in files]
    twice = {stem for stem, count in Counter(stems).items() if count > 1}
    if twice:
        same = [file for stem, file in zip(stems, files, strict=True) if stem in twice]
        raise ValueError(f"data: files share a name: {listed(same)}; keep one of each name")
    return dict(zip(stems, files, strict=True))


def _check(path: Path, mask: Path, max_pixels: int) -> _Pair | SkippedFile:
    try:
        image = decoding.inspected(path, max_pixels)
    except UnreadableImageError as error:
        return SkippedFile(path, str(error))
    try:
        classes, mask_bytes = decoding.decoded_mask(mask, max_pixels), mask.stat().st_size
        is_turned = image.is_turned and not decoding.has_orientation(mask, max_pixels)
    except (UnreadableImageError, OSError) as error:
        return SkippedFile(mask, str(error))
    height, width = classes.shape
    # A mask of the upright size is upright, unless that size is the stored one's too.
    if is_turned and (height, width) == image.size == image.stored_size:
        return SkippedFile(path, f"{_IS_TURNED}, and {mask} may be turned or not; {_WHAT_TO_DO}")
    shown = frozenset(int(value) for value in np.unique(classes))
    sizes = image.bytes, mask_bytes
    return _Pair(path, mask, image.size, (height, width), shown, image.largest, sizes, is_turned)


def _check_sizes(pairs: Sequence[_Pair]) -> None:
    for pair in pairs:
        if pair.size != pair.mask_size:
            why = f". {pair.path}: {_IS_TURNED}, and its mask has none; {_WHAT_TO_DO}"
            raise ValueError(
                f"data: {pair.mask} is {pair.mask_size[0]}x{pair.mask_size[1]} and {pair.path} "
                f"{pair.size[0]}x{pair.size[1]} (height x width); a mask has its image's size"
                + (why if pair.is_turned else "")
            )


def _class_names(pairs: Sequence[_Pair], num_classes: int | None) -> tuple[str, ...]:
    """A name for every class, its number.

    Raises:
      ValueError: a mask has a value that is no class, or no mask has some class.
    """
    found = frozenset[int]().union(*(pair.classes for pair in pairs))
    count = max(found) + 1 if num_classes is None else num_classes
    allowed = f"values must be classes, 0 to {count - 1}"
    beyond = sorted(value for value in found if not 0 <= value < count)
    if beyond:
        mask = next(pair.mask for pair in pairs if beyond[0] in pair.classes)
        raise ValueError(f"data: {mask} has the value {beyond[0]}; {allowed}")
    missing = sorted(set(range(count)) - found)
    if num_classes is None and missing:
        largest = next(pair.mask for pair in pairs if count - 1 in pair.classes)
        raise ValueError(
            f"data: {largest} has the value {count - 1}, but no mask has {listed(missing)}; "
            "number the classes 0, 1, 2 and so on without gaps"
        )
    if count < 2:
        raise ValueError(f"data: all masks in {pairs[0].mask.parent} are 0; at least two classes")
    return tuple(map(str, range(count)))
