"""VGG-16's convolutions in plain JAX, and the gradients the experiments compare.

The stack is the one the memory claims are made of: 3x3 SAME convolutions, bias, ReLU, 2x2 max
pooling, no head. It uses no library but JAX, so that what is measured is JAX and lrjax.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Params = list[tuple[Any, Any]]

# Output channels of the convolutions of each block; a 2x2 max pooling ends every block.
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def init(key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """One ``(kernel HWIO, bias)`` per convolution, He-normal kernels, small biases."""
    params, channels_in = [], 3
    for channels in (channels for block in BLOCKS for channels in block):
        key, kernel_key, bias_key = jax.random.split(key, 3)
        scale = math.sqrt(2 / (9 * channels_in))
        kernel = scale * jax.random.normal(kernel_key, (3, 3, channels_in, channels))
        bias = 0.1 * jax.random.normal(bias_key, (channels,))
        params.append((kernel.astype(dtype), bias.astype(dtype)))
        channels_in = channels
    return params


def structs(height: int, width: int, dtype: Any, batch: int = 1) -> tuple[Any, Any]:
    """Shapes and dtypes of ``(params, images)``, images ``[batch, height, width, 3]``."""
    params = jax.eval_shape(lambda key: init(key, dtype), jax.eval_shape(lambda: jax.random.key(0)))
    return params, jax.ShapeDtypeStruct((batch, height, width, 3), dtype)


def block(params: Params, x: jax.Array) -> jax.Array:
    """The convolutions of one VGG block, and its max pooling."""
    for kernel, bias in params:
        x = lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + bias)
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def stack(params: Params, images: jax.Array, checkpoint_from: int | None = None) -> jax.Array:
    """The whole stack: ``[N, H, W, 3]`` to ``[N, H//32, W//32, 512]``.

    Blocks from number ``checkpoint_from`` on are under ``jax.checkpoint``; ``None``: none are.
    """
    x, remaining = images, list(params)
    for number, channels in enumerate(BLOCKS):
        own, remaining = remaining[: len(channels)], remaining[len(channels) :]
        checkpointed = checkpoint_from is not None and number >= checkpoint_from
        x = (jax.checkpoint(block) if checkpointed else block)(own, x)
    return x


def loss(params: Params, images: jax.Array) -> jax.Array:
    """``mean(y**2)``, accumulated in float32."""
    return jnp.mean(jnp.square(stack(params, images).astype(jnp.float32)))
