"""What a data set is to the trainer: an indexable collection of labelled images of one size."""

import zlib
from collections.abc import Sequence
from typing import Protocol, TypedDict

import numpy as np

CHANNELS = 3


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


class Subset:
    """Some images of a source, in a given order.

    Args:
      source: the images.
      indices: which of them.
    """

    def __init__(self, source: ImageSource, indices: Sequence[int] | np.ndarray) -> None:
        self.source = source
        self.indices = np.asarray(indices)
        self.image_shape = source.image_shape
        self.label_shape = source.label_shape
        self.class_names = source.class_names
        self.labels = source.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.indices[index])]

    def name(self, index: int) -> str:
        return name_of(self.source, int(self.indices[index]))

    def files_of(self, index: int) -> str | None:
        return files_of(self.source, int(self.indices[index]))

    def classes_of(self, index: int) -> frozenset[int]:
        return classes_of(self.source, int(self.indices[index]))


def name_of(source: ImageSource, index: int) -> str:
    """What a person calls an image of the source: its file where it has one, else its number."""
    name = getattr(source, "name", None)
    return name(index) if name is not None else f"image {index}"


def files_of(source: ImageSource, index: int) -> str | None:
    """An image's files, where it has any: names below the source's folder, and sizes in bytes."""
    known = getattr(source, "files_of", None)
    return known(index) if known is not None else None


def checksum_of_files(source: ImageSource) -> int | None:
    """CRC-32 over the names and sizes of all files; None for a source without files."""
    texts = [files_of(source, index) for index in range(len(source))]
    if None in texts:
        return None
    return zlib.crc32("\n".join(filter(None, texts)).encode("utf-8", "surrogateescape"))


def classes_of(source: ImageSource, index: int) -> frozenset[int]:
    """The classes that an image shows: its label, or those of its mask where that is known."""
    known = getattr(source, "classes_of", None)
    return known(index) if known is not None else frozenset([int(source.labels[index])])
