"""Batches of a source, by grain: shuffled and endless for training, in order for evaluation."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from lrjax.app.data.augmentation import Augmentation
from lrjax.app.data.sources import ImageSource

# Added to the seed of the order, so that images are altered independently of their order.
_AUGMENTATION_SEED = 2**20
# More examples than any run takes.
_ENDLESS = 2**53


@dataclass(frozen=True)
class Share:
    """What one of several processes reads of every batch.

    Attributes:
      first, stop: its images, by their places in the batch.
      rows: the first and the end of their rows that it keeps; None for all.
    """

    first: int
    stop: int
    rows: tuple[int, int] | None = None

    def of_example(self, example: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """An example with the share's rows alone, of its image and of the labels of pixels."""
        if self.rows is None:
            return example
        own = slice(*self.rows)
        return {
            name: np.array(array[own]) if np.ndim(array) > 1 else array
            for name, array in example.items()
        }


class Batches:
    """An endless iterator of batches, whose position is the same whatever its process reads."""

    def __init__(self, iterator: grain.DatasetIterator[Any], own: int, batch_size: int) -> None:
        self._iterator, self._own, self._batch_size = iterator, own, batch_size

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position, a value that JSON can hold."""
        state = self._iterator.get_state()
        return {**state, "next_index": state["next_index"] // self._own * self._batch_size}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `get_state` gave, here or in another process."""
        own = state["next_index"] // self._batch_size * self._own
        self._iterator.set_state({**state, "next_index": own})


def batches(
    source: ImageSource,
    batch_size: int,
    *,
    seed: int,
    balanced: bool = False,
    augmentation: Augmentation | None = None,
    share: Share | None = None,
) -> Batches:
    """Endless shuffled batches: every image once per epoch, a new order each epoch.

    The order is a function of `seed` and the source's labels; a batch may span two epochs, so that
    every batch is full. Images are read by one thread, two batches ahead.

    Args:
      source: the images.
      batch_size: images per batch.
      seed: of the order, and of what the augmentation draws.
      balanced: the classes take turns, each with epochs of its own, so that images of a rare class
        come more often. A small batch of one class only pushes the bias to and fro; this avoids it.
      augmentation: alters every image by random numbers of its own, which follow from the seed and
        the image's place in the order alone.
      share: of several processes, what this one reads; the other images are not opened.

    Returns:
      An iterator of `{"image": uint8 [batch_size, H, W, 3], "label": int32 [batch_size, ...],
      "index": int64 [batch_size]}`, or of the share of it; an index is the image's in the source.
      `get_state()` gives the position as a value that JSON can hold, `set_state` goes there.
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
    dataset = grain.MapDataset.mix(shuffled).map(lambda index: _indexed(source, int(index)))
    if augmentation is not None:
        dataset = dataset.random_map(augmentation, seed=seed + _AUGMENTATION_SEED)
    share = share or Share(0, batch_size)
    own = share.stop - share.first
    if share != Share(0, batch_size):
        dataset = _shared(dataset, share, batch_size)
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 * own)
    examples = dataset.to_iter_dataset(read_options=reading)
    return Batches(iter(examples.batch(own)), own, batch_size)


def _shared(dataset: grain.MapDataset[Any], share: Share, batch_size: int) -> grain.MapDataset[Any]:
    """The share's examples of every batch, in order; a dataset reads what is asked for."""
    own = share.stop - share.first

    def example(place: int) -> dict[str, np.ndarray]:
        number, offset = divmod(int(place), own)
        return share.of_example(dataset[number * batch_size + share.first + offset])

    return grain.MapDataset.range(_ENDLESS).map(example)


def in_order(
    source: ImageSource, batch_size: int, share: Share | None = None
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Every image once: batches as `batches` gives them, and how many of each are not padding.

    The last batch repeats its last image until it is full, as a compiled program has one size.
    """
    share = share or Share(0, batch_size)
    for start in range(0, len(source), batch_size):
        count = min(batch_size, len(source) - start)
        places = [start + min(place, count - 1) for place in range(share.first, share.stop)]
        read = {i: share.of_example(_indexed(source, i)) for i in dict.fromkeys(places)}
        yield {name: np.stack([read[i][name] for i in places]) for name in read[places[0]]}, count


def _indexed(source: ImageSource, index: int) -> dict[str, np.ndarray]:
    example = source[index]
    return {"image": example["image"], "label": example["label"], "index": np.asarray(index)}
