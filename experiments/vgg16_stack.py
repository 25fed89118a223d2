"""VGG-16's convolutions in plain JAX, and the gradients the experiments compare.

The stack is the one the memory claims are made of: 3x3 SAME convolutions, bias, ReLU, 2x2 max
pooling, no head. It uses no library but JAX, so that what is measured is JAX and lrjax.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import lrjax

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


def structs(
    height: int, width: int, dtype: Any, batch: int = 1, image_dtype: Any = None
) -> tuple[Any, Any]:
    """Shapes and dtypes of ``(params, images)``, images ``[batch, height, width, 3]``."""
    params = jax.eval_shape(lambda key: init(key, dtype), jax.eval_shape(lambda: jax.random.key(0)))
    return params, jax.ShapeDtypeStruct((batch, height, width, 3), image_dtype or dtype)


def convolution(kernel: jax.Array, bias: jax.Array, x: jax.Array) -> jax.Array:
    """One 3x3 SAME convolution with bias and ReLU."""
    y = lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.nn.relu(y + bias)


def max_pool(x: jax.Array) -> jax.Array:
    """2x2 max pooling with stride 2."""
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def stack(params: Params, images: jax.Array, checkpoint: str | None = None) -> jax.Array:
    """The whole stack: ``[N, H, W, 3]`` to ``[N, H//32, W//32, 512]``.

    ``checkpoint`` puts every ``"block"`` or every ``"layer"`` under ``jax.checkpoint``. Integer
    images are scaled from 0 to 255 to -1 to 1, in the parameters' dtype.
    """
    if jnp.issubdtype(images.dtype, jnp.integer):
        images = images.astype(params[0][0].dtype) / 127.5 - 1
    per_layer = jax.checkpoint if checkpoint == "layer" else _unchanged
    per_block = jax.checkpoint if checkpoint == "block" else _unchanged

    def block(block_params: Params, x: jax.Array) -> jax.Array:
        for i, (kernel, bias) in enumerate(block_params, 1):
            with jax.named_scope(f"conv{i}"):
                x = per_layer(convolution)(kernel, bias, x)
        with jax.named_scope("pool"):
            return per_layer(max_pool)(x)

    x, remaining = images, list(params)
    for i, channels in enumerate(BLOCKS, 1):
        own, remaining = remaining[: len(channels)], remaining[len(channels) :]
        with jax.named_scope(f"block{i}"):
            x = checkpoint_name(per_block(block)(own, x), f"block{i}")
    return x


def loss(params: Params, images: jax.Array, checkpoint: str | None = None) -> jax.Array:
    """``mean(y**2)`` of the stack's output, accumulated in float32."""
    y = stack(params, images, checkpoint)
    with jax.named_scope("loss"):
        return jnp.mean(jnp.square(y.astype(jnp.float32)))


@dataclass(frozen=True)
class Method:
    """A way to run the stack.

    Attributes:
      name: ``"column"``, ``"checkpoint-block"``, ``"checkpoint-layer"`` or an lrjax strategy;
        with ``"-h"`` behind it, a segment per block of the network, and with ``"-offload"``, the
        maps between these in the host's memory.
      num_blocks: row blocks, for an lrjax strategy.
    """

    name: str
    num_blocks: int | None = None

    def __str__(self) -> str:
        return self.name if self.num_blocks is None else f"{self.name}/{self.num_blocks}"

    def apply(self, fun: Callable[..., Any]) -> Callable[[Params, jax.Array], Any]:
        """``stack`` or ``loss``, run this way."""
        if self.name == "column":
            return fun
        if self.name.startswith("checkpoint-"):
            return functools.partial(fun, checkpoint=self.name.removeprefix("checkpoint-"))
        strategy, _, suffix = self.name.partition("-")
        return lrjax.rowwise(
            fun,
            in_axes=(None, 1),
            num_blocks=self.num_blocks,
            strategy=strategy,
            cuts=[f"block{i}" for i in range(1, len(BLOCKS))] if suffix else (),
            offload=suffix == "offload",
        )

    def gradient(self) -> Callable[[Params, jax.Array], Params]:
        """The gradient of ``loss`` with respect to the parameters, run this way."""
        return jax.grad(self.apply(loss))


COLUMN = Method("column")


def parse_method(text: str) -> Method:
    """``"column"`` or ``"stream/128"``, as ``str(method)`` writes it."""
    name, _, num_blocks = text.partition("/")
    return Method(name, int(num_blocks) if num_blocks else None)


def _unchanged(fun: Callable[..., Any]) -> Callable[..., Any]:
    return fun
