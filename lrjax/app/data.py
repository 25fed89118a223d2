"""Labelled images at full resolution: a folder of them, or scattered handwritten digits.

A source is an indexable collection of `{"image": uint8 [H, W, 3], "label": int32}`, all of one
size; `batches` shuffles and stacks one with grain, in an order that depends on the seed alone.
Images stay uint8 until the model converts them: a float32 copy is four times the size.
"""

import concurrent.futures
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict, get_args

import grain
import numpy as np
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

CHANNELS = 3
Fit = Literal["native", "resize"]


class Example(TypedDict):
    """One labelled image, or a batch of them (then each array has a leading batch axis).

    A label is one class, or a class for every pixel, `[H, W]`.
    """

    image: np.ndarray
    label: np.ndarray


class ImageSource(Protocol):
    """What `batches` and `lrjax.app.training` need of a data set.

    Attributes:
      image_shape: `(height, width, channels)` of every image.
      label_shape: `()` for one label per image, `(height, width)` for one per pixel.
      class_names: name of each label.
      labels: class of each image, int32 `[len(source)]`; what `batches` balances by.
    """

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    @property
    def label_shape(self) -> tuple[int, ...]: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def labels(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def batches(
    source: ImageSource, batch_size: int, *, seed: int, balanced: bool = False
) -> Iterator[Example]:
    """Endless shuffled batches: every image once per epoch, a new order each epoch.

    The order is a function of `seed` and the source's labels; a batch may span two epochs, so that
    every batch is full. Images are read by one thread, two batches ahead.

    Args:
      source: the images.
      batch_size: images per batch.
      seed: of the order.
      balanced: the classes take turns, each with epochs of its own, so that images of a rare class
        come more often. A small batch of one class only pushes the bias to and fro; this avoids it.

    Returns:
      An iterator of `{"image": uint8 [batch_size, H, W, 3], "label": int32 [batch_size, ...]}`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}; use 1 or more")
    classes = np.unique(source.labels) if balanced else [None]
    groups = [
        np.arange(len(source)) if label is None else np.flatnonzero(source.labels == label)
        for label in classes
    ]
    shuffled = [
        grain.MapDataset.source(indices).seed(seed + group).shuffle().repeat()
        for group, indices in enumerate(groups)
    ]
    dataset = grain.MapDataset.mix(shuffled).map(lambda index: source[int(index)])
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 * batch_size)
    return iter(dataset.to_iter_dataset(read_options=reading).batch(batch_size))


# --- A folder of images, one directory per class ------------------------------------------------


@dataclass(frozen=True)
class SkippedFile:
    """An image file that will not be trained on, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class UnreadableImageError(Exception):
    """A file does not hold an image that can be decoded in full."""


class ImageFolder:
    """Images in class-per-directory layout: `directory/<class name>/**/<any name>.<image suffix>`.

    Labels are the positions of the class names in sorted order. Every file is decoded once, when
    the folder is opened, so that what is wrong with it is known before training:

    * a missing directory, one without class directories, one that holds splits such as `train/` and
      `val/` instead of classes, and a class directory with no readable image raise `ValueError`;
    * an unreadable or truncated image is left out and listed in `skipped`, with the reason;
    * files without an image suffix, hidden files and hidden directories are not looked at;
    * a file that breaks *after* the check is replaced by the next readable image, under that
      image's own label, with a warning that names it: training goes on and no label is wrong.

    Greyscale, palette, 16-bit greyscale and CMYK images become 8-bit RGB, transparency is dropped,
    EXIF orientation is applied, and of several frames the first is taken. Pillow's limit on the
    number of pixels is lifted for the process: images here are meant to be large.

    Args:
      directory: the folder.
      image_size: `(height, width)` of the images given out. Default: the size all images share.
      fit: how an image of another size gets there. `"native"`: no resampling; centred, cropped
        where larger and padded with black where smaller. `"resize"`: scaled (bilinear,
        antialiased) until it covers the size, then cropped centrally.

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
    ) -> None:
        if fit not in get_args(Fit):
            raise ValueError(f"fit: got {fit!r}; use one of {', '.join(get_args(Fit))}")
        Image.MAX_IMAGE_PIXELS = None
        self.directory = Path(directory)
        self.class_names: tuple[str, ...] = _class_names(self.directory)
        self._fit = fit
        files, self.skipped = _readable_files(self.directory, self.class_names)
        self._paths = [file.path for file in files]
        self.labels = np.array([file.label for file in files], np.int32)
        height, width = image_size or _shared_size(files)
        if min(height, width) < 1:
            raise ValueError(
                f"image_size: got {height}x{width}; height and width must be at least 1"
            )
        self.image_shape: tuple[int, int, int] = (height, width, CHANNELS)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Example:
        for candidate in range(index, index + len(self)):
            position = candidate % len(self)
            try:
                pixels = _decoded(self._paths[position])
            except UnreadableImageError as error:
                warnings.warn(
                    f"{self._paths[position]} was readable when the folder was checked and is not "
                    f"any more ({error}); the next image takes its place",
                    stacklevel=2,
                )
                continue
            image = _fitted(pixels, self.image_shape[:2], self._fit)
            return Example(
                image=np.asarray(image), label=self.labels[position : position + 1].reshape(())
            )
        raise UnreadableImageError(f"no image in {self.directory} is readable any more")


@dataclass(frozen=True)
class _CheckedFile:
    path: Path
    label: int
    size: tuple[int, int]  # (height, width)


_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


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
    return tuple(names)


def _readable_files(
    directory: Path, class_names: Sequence[str]
) -> tuple[list[_CheckedFile], tuple[SkippedFile, ...]]:
    """Decodes every image file of every class; gives the good ones, and the others with reasons."""
    found = [
        (path, label)
        for label, name in enumerate(class_names)
        for path in _image_files(directory / name)
    ]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        checked = list(pool.map(lambda entry: _check(*entry), found))
    readable = [result for result in checked if isinstance(result, _CheckedFile)]
    skipped = tuple(result for result in checked if isinstance(result, SkippedFile))
    empty = sorted(set(range(len(class_names))) - {file.label for file in readable})
    if empty:
        listed = ", ".join(str(directory / class_names[label]) for label in empty)
        reasons = "".join(f"\n  {file}" for file in skipped)
        raise ValueError(
            f"data: no readable image in {listed}; add images or remove the directory{reasons}"
        )
    return readable, skipped


def _image_files(directory: Path) -> list[Path]:
    suffixes = Image.registered_extensions()
    found = []
    for parent, subdirectories, names in os.walk(directory):
        subdirectories[:] = [name for name in subdirectories if name[0] != "."]
        found += [
            Path(parent, name)
            for name in names
            if name[0] != "." and Path(name).suffix.lower() in suffixes
        ]
    return sorted(found)


def _check(path: Path, label: int) -> _CheckedFile | SkippedFile:
    try:
        image = _decoded(path)
    except UnreadableImageError as error:
        return SkippedFile(path, str(error))
    return _CheckedFile(path, label, (image.height, image.width))


def _decoded(path: Path) -> Image.Image:
    """The whole image as upright 8-bit RGB."""
    # Decoders raise more than OSError on malformed files (SyntaxError, ValueError, struct.error,
    # EOFError, ...), so anything that goes wrong here means an unreadable file.
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            # Pillow's own conversion clips at 255 instead of scaling.
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        elif upright.mode in ("I", "F"):
            raise UnreadableImageError(
                f"32-bit pixels (Pillow mode {upright.mode}) have no set range; save as 8 or 16 bit"
            )
        return upright.convert("RGB")
    except UnreadableImageError:
        raise
    except Exception as error:
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error


def _shared_size(files: Sequence[_CheckedFile]) -> tuple[int, int]:
    first = files[0]
    for file in files:
        if file.size != first.size:
            raise ValueError(
                f"image_size: images differ in size ({first.path} is {first.size[0]}x"
                f"{first.size[1]}, {file.path} is {file.size[0]}x{file.size[1]}, height x width); "
                'give the size to train at, and fit="native" (crop and pad) or "resize"'
            )
    return first.size


def _fitted(image: Image.Image, size: tuple[int, int], fit: Fit) -> Image.Image:
    height, width = size
    if (image.height, image.width) == size:
        return image
    if fit == "resize":
        return ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    left = (image.width - width) // 2
    top = (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


# --- Handwritten digits on a large canvas -------------------------------------------------------

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
