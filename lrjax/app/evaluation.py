"""How well a network does on images it has not learnt from, and what it says of single ones."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lrjax.app.data import ImageSource, in_order
from lrjax.app.placement import ONE_DEVICE, Placement
from lrjax.app.step import batch_structs
from lrjax.app.strategy import Execution


@dataclass(frozen=True)
class Evaluation:
    """Sums over all images, or all their pixels where these have labels, made into means.

    Attributes:
      loss: mean cross-entropy.
      accuracy: part that is classified rightly.
      accuracy_by_class: the same of each class; NaN for one that does not occur.
      mean_iou: intersection over union, mean over the classes that occur or are predicted.
      count: images, or pixels.
    """

    loss: float
    accuracy: float
    accuracy_by_class: tuple[float, ...]
    mean_iou: float
    count: int


class _Sums(NamedTuple):
    """Of each image: the loss, `[B]`, and counts per class, `[B, num_classes]`."""

    loss: Any
    right: Any
    labelled: Any
    predicted: Any


class Evaluator:
    """The forward pass without dropout, with running statistics, compiled for one batch size.

    Args:
      model: the network.
      source: images of the shape, and with the classes, that are evaluated.
      execution: how the rows run.
      batch_size: images at a time.
      placement: the devices; those of the execution.
    """

    def __init__(
        self,
        model: nn.Module,
        source: ImageSource,
        execution: Execution,
        *,
        batch_size: int,
        placement: Placement = ONE_DEVICE,
    ) -> None:
        self._batch_size, self._placement = batch_size, placement
        self._call = jax.jit(
            _sums_function(model, source, execution), out_shardings=placement.replicated
        )

    def __call__(self, params: Any, statistics: Any, source: ImageSource) -> Evaluation:
        """Evaluates every image of a source once."""
        total: _Sums | None = None
        size, shape, placement = self._batch_size, source.image_shape, self._placement
        params, statistics = (placement.everywhere(tree) for tree in (params, statistics))
        for batch, count in in_order(source, size, placement.share(size, shape)):
            images, labels = placement.batch(batch, size, shape)
            sums = self._call(params, images, labels, statistics)
            found = _Sums(*(np.asarray(part, np.float64)[:count].sum(axis=0) for part in sums))
            total = found if total is None else _Sums(*map(np.add, total, found))
        if total is None:
            raise ValueError("data: there is no image to evaluate")
        return _evaluation(total)


def _sums_function(model: nn.Module, source: ImageSource, execution: Execution) -> Any:
    classes = len(source.class_names)
    pixels = bool(source.label_shape)
    strategy = execution.without_plan

    # Images stay apart, so that parts of the batch may run one after the other.
    def sums_of(logits: jax.Array, labels: jax.Array) -> _Sums:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        label, chosen = (
            jax.nn.one_hot(one, classes, dtype=jnp.float32)
            for one in (labels, jnp.argmax(logits, axis=-1))
        )
        axes = tuple(range(1, labels.ndim))
        parts = (losses, label * chosen, label, chosen)
        return _Sums(*(part.sum(axes) for part in parts))

    def of_pixels(params: Any, images: jax.Array, labels: jax.Array, statistics: Any) -> _Sums:
        return sums_of(_logits(model, params, images, statistics), labels)

    if pixels:
        return strategy.by_rows(of_pixels, in_axes=(None, 1, 1, None))
    by_rows = strategy.model_by_rows(model)

    def of_images(params: Any, images: jax.Array, labels: jax.Array, statistics: Any) -> _Sums:
        return sums_of(_logits(by_rows, params, images, statistics), labels)

    return of_images


def _logits(model: nn.Module, params: Any, images: jax.Array, statistics: Any) -> Any:
    return model.apply({"params": params, **statistics}, images, train=False)


def _evaluation(sums: _Sums) -> Evaluation:
    count = sums.labelled.sum()
    union = sums.labelled + sums.predicted - sums.right
    with np.errstate(invalid="ignore"):
        by_class = sums.right / sums.labelled
        iou = sums.right / union
    return Evaluation(
        loss=float(sums.loss / count),
        accuracy=float(sums.right.sum() / count),
        accuracy_by_class=tuple(map(float, by_class)),
        mean_iou=float(np.nanmean(iou)),
        count=int(count),
    )


class Predictor:
    """Classes of images, or of their pixels; arguments as for `Evaluator`."""

    def __init__(
        self,
        model: nn.Module,
        source: ImageSource,
        execution: Execution,
        *,
        batch_size: int,
        placement: Placement = ONE_DEVICE,
    ) -> None:
        self._structs, self._placement = batch_structs(source, batch_size), placement
        strategy = execution.without_plan
        if source.label_shape:

            def classes(params: Any, images: jax.Array, statistics: Any) -> jax.Array:
                logits = _logits(model, params, images, statistics)
                return jnp.argmax(logits, axis=-1).astype(jnp.uint8)

            self._call = jax.jit(strategy.by_rows(classes, in_axes=(None, 1, None)))
            return
        by_rows = strategy.model_by_rows(model)

        def probabilities(params: Any, images: jax.Array, statistics: Any) -> jax.Array:
            logits = _logits(by_rows, params, images, statistics)
            return jax.nn.softmax(logits.astype(jnp.float32))

        self._call = jax.jit(probabilities)

    def __call__(
        self, params: Any, statistics: Any, images: Iterator[np.ndarray]
    ) -> Iterator[np.ndarray]:
        """For each image `[H, W, 3]`: probabilities `[classes]`, or classes uint8 `[H, W]`."""
        batch: list[np.ndarray] = []
        for image in images:
            batch.append(image)
            if len(batch) == self._structs[0].shape[0]:
                yield from self._predicted(params, statistics, batch)
                batch = []
        if batch:
            yield from self._predicted(params, statistics, batch)

    def _predicted(self, params: Any, statistics: Any, batch: list[np.ndarray]) -> Any:
        size = self._structs[0].shape[0]
        full: Any = np.stack(batch + [batch[-1]] * (size - len(batch)))
        divided = self._placement.of_batch(full.shape)
        if divided is not None:
            full = jax.device_put(full, divided)
        return np.asarray(self._call(params, full, statistics))[: len(batch)]
