"""ResNet (He et al., arXiv 1512.03385), version 1.5, in Flax Linen.

Version 1.5 puts a bottleneck's stride into its 3x3 convolution, as torchvision does. Outputs of
blocks are named with `jax.ad_checkpoint.checkpoint_name`, so that `lrjax.rowwise(..., cuts=...)`
can cut there; see `ResNet`.
"""

import functools
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

STEM_CHANNELS = 64
BOTTLENECK_EXPANSION = 4


class ResidualBlock(nn.Module):
    """One residual block: two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1.

    Maps `[B, H, W, C]` to `[B, ceil(H / stride), ceil(W / stride), channels]`, times four channels
    for a bottleneck. The shortcut is a strided 1x1 convolution where the shape changes.

    Attributes:
      channels: of the 3x3 convolutions.
      stride: 1 or 2.
      bottleneck: which of the two.
      norm: see `lrjax.models.layers.normalisation`.
      zero_init_residual: the last normalisation starts with a scale of zero, the block as its
        shortcut (arXiv 1706.02677), which tames the gradients of a new network.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    channels: int
    stride: int = 1
    bottleneck: bool = False
    norm: Norm = "batch"
    zero_init_residual: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        _, conv, norm = layer_makers(self, train)
        strides = (self.stride, self.stride)
        wide = self.channels * (BOTTLENECK_EXPANSION if self.bottleneck else 1)
        layers = [(self.channels, 3, self.stride), (self.channels, 3, 1)]
        if self.bottleneck:
            layers = [(self.channels, 1, 1), (self.channels, 3, self.stride), (wide, 1, 1)]

        y = x
        for number, (channels, size, stride) in enumerate(layers, start=1):
            kernel, padding = (size, size), symmetric(size // 2)
            y = conv(channels, kernel, (stride, stride), padding=padding, name=f"conv{number}")(y)
            is_last = number == len(layers)
            ones, zeros = nn.initializers.ones, nn.initializers.zeros
            scale_init = zeros if is_last and self.zero_init_residual else ones
            y = norm(channels, name=f"norm{number}", scale_init=scale_init)(y)
            if number < len(layers):
                y = nn.relu(y)
        if x.shape[-1] != wide or self.stride != 1:
            x = conv(wide, (1, 1), strides, padding=symmetric(0), name="shortcut_conv")(x)
            x = norm(wide, name="shortcut_norm")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet: `[B, H, W, C]` images to `[B, num_classes]` logits. Use `ResNet18` .. `ResNet101`.

    A 7x7 convolution and a 3x3 max pool, four stages of residual blocks, a global average pool and
    a dense layer. Integer images (uint8) are scaled to [-1, 1].

    Named values, in order: `"stem"` (after the pool), then every block's output, `"stage1_block1"`,
    `"stage1_block2"`, ... .

    Attributes:
      blocks: residual blocks of each stage.
      bottleneck: the kind of block.
      num_classes: logits per image; `None` leaves the head out, the result is the last map.
      width: multiplier of every channel count.
      norm: `"batch"` (the published network), `"frozen"` (BatchNorm by its running statistics),
        `"group"` or `"none"`.
      zero_init_residual: see `ResidualBlock`.
      dtype: of the computation. Logits are float32 at least.
      param_dtype: of the parameters.
    """

    blocks: tuple[int, ...]
    bottleneck: bool
    num_classes: int | None = 1000
    width: float = 1.0
    norm: Norm = "batch"
    zero_init_residual: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        check_settings(norm=self.norm, width=self.width)
        check_images(images, "ResNet", least=1)
        dtypes, conv, norm = layer_makers(self, train)
        stem = scaled(STEM_CHANNELS, self.width)
        x = as_float(images, self.dtype)
        x = conv(stem, (7, 7), (2, 2), padding=symmetric(3), name="conv")(x)
        x = nn.relu(norm(stem, name="norm")(x))
        x = checkpoint_name(nn.max_pool(x, (3, 3), (2, 2), padding=symmetric(1)), "stem")
        for stage, blocks in enumerate(self.blocks, start=1):
            for block in range(1, blocks + 1):
                name = f"stage{stage}_block{block}"
                x = ResidualBlock(
                    channels=scaled(STEM_CHANNELS * 2 ** (stage - 1), self.width),
                    stride=2 if stage > 1 and block == 1 else 1,
                    bottleneck=self.bottleneck,
                    norm=self.norm,
                    zero_init_residual=self.zero_init_residual,
                    name=name,
                    **dtypes,
                )(x, train=train)
                x = checkpoint_name(x, name)
        return class_logits(x, self.num_classes, dtypes)


ResNet18 = functools.partial(ResNet, blocks=(2, 2, 2, 2), bottleneck=False)
ResNet34 = functools.partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=False)
ResNet50 = functools.partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=True)
ResNet101 = functools.partial(ResNet, blocks=(3, 4, 23, 3), bottleneck=True)
