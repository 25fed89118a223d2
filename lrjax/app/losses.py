"""The loss of classifying images or pixels, and the shapes of its arguments."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

LossFunction = Callable[..., tuple[jax.Array, Any]]


def classification_loss(model: nn.Module) -> LossFunction:
    """Mean softmax cross-entropy of images or of pixels, as `labels` has one class for either.

    A function `loss(params, images, labels, statistics, dropout_key)` that gives the loss and the
    updated `statistics`: every collection of the model but its parameters.
    """

    def loss(
        params: Any, images: jax.Array, labels: jax.Array, statistics: Any, dropout_key: jax.Array
    ) -> tuple[jax.Array, Any]:
        logits, updated = model.apply(
            {"params": params, **statistics},
            images,
            train=True,
            mutable=list(statistics),
            rngs={"dropout": dropout_key},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updated

    return loss


def loss_in_axes(*, labels_pixels: bool) -> tuple[int | None, ...]:
    """Row axes of the loss's arguments: images carry rows, and so do labels of pixels."""
    return None, 1, 1 if labels_pixels else None, None, None


def loss_structs(
    model: nn.Module, images: jax.ShapeDtypeStruct, *, labels_pixels: bool
) -> tuple[Any, ...]:
    """Shapes of all arguments of the loss, for images ``[B, H, W, C]``; nothing is computed."""
    batch, height, width, _ = images.shape
    shape = (batch, height, width) if labels_pixels else (batch,)
    key = jax.eval_shape(lambda: jax.random.key(0))
    statistics = dict(jax.eval_shape(model.init, key, images))
    params = statistics.pop("params")
    return params, images, jax.ShapeDtypeStruct(shape, jnp.int32), statistics, key
