"""DenseNet-121 (Huang et al., arXiv 1608.06993) in Flax Linen: every layer reads all before it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lrjax.models.layers import (
    Norm,
    as_float,
    check_images,
    check_settings,
    class_logits,
    layer_makers,
    scaled,
    symmetric,
)

BLOCKS = (6, 12, 24, 16)
STEM_CHANNELS = 64
GROWTH = 32
BOTTLENECK_EXPANSION = 4


class DenseLayer(nn.Module):
    """Normalisation, ReLU, 1x1 convolution to four times `growth`; the same with 3x3 to `growth`.

    `[B, H, W, C]` to `[B, H, W, C + growth]`: the input and the new channels.
    """

    growth: int
    norm: Norm = "batch"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        _, conv, norm = layer_makers(self, train)
        hidden = BOTTLENECK_EXPANSION * self.growth
        y = nn.relu(norm(x.shape[-1], name="norm1")(x))
        y = conv(hidden, (1, 1), padding=symmetric(0), name="conv1")(y)
        y = nn.relu(norm(hidden, name="norm2")(y))
        y = conv(self.growth, (3, 3), padding=symmetric(1), name="conv2")(y)
        return jnp.concatenate([x, y], axis=-1)


class DenseNet(nn.Module):
    """DenseNet: `[B, H, W, C]` images to `[B, num_classes]` logits. The defaults are DenseNet-121.

    A 7x7 convolution and a 3x3 max pool, blocks of dense layers with transitions between them (1x1
    convolution to half the channels, 2x2 average pool), global average pool and a dense layer.
    Integer images (uint8) are scaled to [-1, 1].

    Named values, in order: `"stem"` (after the pool), then `"block1"`, `"transition1"`, `"block2"`,
    ... .

    Attributes:
      blocks: dense layers of each block.
      num_classes: logits per image; `None` leaves the head out, the result is the last map.
      width: multiplier of the growth rate (32) and of the first convolution's channels (64).
      norm: `"batch"` (the published network), `"frozen"` (BatchNorm by its running statistics),
        `"group"` or `"none"`.
      dtype: of the computation. Logits are float32 at least.
      param_dtype: of the parameters.
    """

    blocks: tuple[int, ...] = BLOCKS
    num_classes: int | None = 1000
    width: float = 1.0
    norm: Norm = "batch"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        check_settings(norm=self.norm, width=self.width)
        check_images(images, "DenseNet", least=4 * 2 ** (len(self.blocks) - 1))
        dtypes, conv, norm = layer_makers(self, train)
        stem = scaled(STEM_CHANNELS, self.width)
        x = as_float(images, self.dtype)
        x = conv(stem, (7, 7), (2, 2), padding=symmetric(3), name="stem_conv")(x)
        x = nn.relu(norm(stem, name="stem_norm")(x))
        x = checkpoint_name(nn.max_pool(x, (3, 3), (2, 2), padding=symmetric(1)), "stem")
        for block, layers in enumerate(self.blocks, start=1):
            if block > 1:
                name = f"transition{block - 1}"
                x = nn.relu(norm(x.shape[-1], name=f"{name}_norm")(x))
                half = x.shape[-1] // 2
                x = conv(half, (1, 1), padding=symmetric(0), name=f"{name}_conv")(x)
                x = checkpoint_name(nn.avg_pool(x, (2, 2), (2, 2)), name)
            for layer in range(1, layers + 1):
                x = DenseLayer(
                    growth=scaled(GROWTH, self.width),
                    norm=self.norm,
                    name=f"block{block}_layer{layer}",
                    **dtypes,
                )(x, train=train)
            x = checkpoint_name(x, f"block{block}")
        x = nn.relu(norm(x.shape[-1], name="norm")(x))
        return class_logits(x, self.num_classes, dtypes)


DenseNet121 = DenseNet
