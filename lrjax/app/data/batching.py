"""Batches of a source, by grain: shuffled and endless for training, in order for evaluation."""

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from lrjax.app.data.augmentation import Augmentation
from lrjax.app.data.sources import ImageSource

# Added to the seed of the order, so that images are altered independently of their order.
_AUGMENTATION_SEED = 2**20


def batches(
    source: ImageSource,
    batch_size: int,
    *,
    seed: int,
    balanced: bool = False,
    augmentation: Augmentation | None = None,
) -> grain.DatasetIterator[Any]:
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

    Returns:
      An iterator of `{"image": uint8 [batch_size, H, W, 3], "label": int32 [batch_size, ...],
      "index": int64 [batch_size]}`; an index is the image's in the source. `get_state()` gives the
      position as a value that JSON can hold, `set_state` goes there.
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
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 * batch_size)
    return iter(dataset.to_iter_dataset(read_options=reading).batch(batch_size))


def in_order(source: ImageSource, batch_size: int) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Every image once: batches as `batches` gives them, and how many of each are not padding.

    The last batch repeats its last image until it is full, as a compiled program has one size.
    """
    for start in range(0, len(source), batch_size):
        own = range(start, min(start + batch_size, len(source)))
        examples = [_indexed(source, index) for index in own]
        padded = examples + [examples[-1]] * (batch_size - len(own))
        yield {name: np.stack([e[name] for e in padded]) for name in padded[0]}, len(own)


def _indexed(source: ImageSource, index: int) -> dict[str, np.ndarray]:
    example = source[index]
    return {"image": example["image"], "label": example["label"], "index": np.asarray(index)}
