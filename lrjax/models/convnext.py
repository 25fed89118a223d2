"""ConvNeXt-T (Liu et al., arXiv 2201.03545) in Flax Linen.

Its LayerNorm is over the channels of each pixel, so nothing in the stack needs all rows: one row
loop goes through the whole network, however large the image.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lrjax.models.layers import (
    Layer,
    as_float,
    at_least_float32,
    check_images,
    check_settings,
    drop_path,
    scaled,
    symmetric,
)

BLOCKS = (3, 3, 9, 3)
CHANNELS = (96, 192, 384, 768)
EPSILON = 1e-6
INIT = nn.initializers.truncated_normal(0.02)


class ConvNeXtBlock(nn.Module):
    """7x7 depthwise convolution, LayerNorm, a two-layer perceptron per pixel, layer scale.

    `[B, H, W, C]` to the same shape.

    Attributes:
      layer_scale: what the residual branch is multiplied with at the start, per channel.
      drop_path_rate: how often an image's branch is dropped in training.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    layer_scale: float = 1e-6
    drop_path_rate: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        channels = x.shape[-1]
        dense: Layer = functools.partial(nn.Dense, kernel_init=INIT, **dtypes)
        y = nn.Conv(
            channels,
            (7, 7),
            padding=symmetric(3),
            feature_group_count=channels,
            kernel_init=INIT,
            name="depthwise",
            **dtypes,
        )(x)
        y = nn.LayerNorm(epsilon=EPSILON, name="norm", **dtypes)(y)
        y = nn.gelu(dense(4 * channels, name="expand")(y), approximate=False)
        y = dense(channels, name="contract")(y)
        scale = self.param(
            "layer_scale",
            nn.initializers.constant(self.layer_scale),
            (channels,),
            self.param_dtype,
        )
        return x + drop_path(self, y * scale.astype(y.dtype), self.drop_path_rate, train)


class ConvNeXt(nn.Module):
    """ConvNeXt: `[B, H, W, C]` images to `[B, num_classes]` logits. The defaults are ConvNeXt-T.

    A 4x4 convolution of stride 4, four stages of blocks with a 2x2 convolution of stride 2 between
    them, global average pool, LayerNorm and a dense layer. Integer images (uint8) are scaled to
    [-1, 1]. Stochastic depth takes its key from `rngs={"dropout": key}` when training.

    Named values, in order: `"stem"`, then every block's output, `"stage1_block1"`, ... .

    Attributes:
      blocks: of each stage.
      channels: of each stage.
      num_classes: logits per image; `None` leaves the head out, the result is the last map.
      width: multiplier of every channel count.
      layer_scale: of every block at the start.
      drop_path_rate: of the last block; it grows linearly from 0 at the first.
      dtype: of the computation. Logits are float32 at least.
      param_dtype: of the parameters.
    """

    blocks: tuple[int, ...] = BLOCKS
    channels: tuple[int, ...] = CHANNELS
    num_classes: int | None = 1000
    width: float = 1.0
    layer_scale: float = 1e-6
    drop_path_rate: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        check_settings(width=self.width)
        check_images(images, "ConvNeXt", least=4 * 2 ** (len(self.blocks) - 1))
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm: Layer = functools.partial(nn.LayerNorm, epsilon=EPSILON, **dtypes)
        conv: Layer = functools.partial(nn.Conv, padding=symmetric(0), kernel_init=INIT, **dtypes)
        channels = [scaled(count, self.width) for count in self.channels]
        x = as_float(images, self.dtype)
        x = conv(channels[0], (4, 4), (4, 4), name="stem_conv")(x)
        x = checkpoint_name(norm(name="stem_norm")(x), "stem")
        before = 0
        for stage, blocks in enumerate(self.blocks, start=1):
            if stage > 1:
                x = norm(name=f"downsample{stage}_norm")(x)
                x = conv(channels[stage - 1], (2, 2), (2, 2), name=f"downsample{stage}_conv")(x)
            for block in range(1, blocks + 1):
                name = f"stage{stage}_block{block}"
                x = ConvNeXtBlock(
                    layer_scale=self.layer_scale,
                    drop_path_rate=self.drop_path_rate * before / max(1, sum(self.blocks) - 1),
                    name=name,
                    **dtypes,
                )(x, train=train)
                x = checkpoint_name(x, name)
                before += 1
        if self.num_classes is None:
            return x
        x = norm(name="norm")(x.mean(axis=(1, 2)))
        x = nn.Dense(self.num_classes, kernel_init=INIT, name="classifier", **dtypes)(x)
        return at_least_float32(x)


ConvNeXtT = ConvNeXt
