"""MobileNetV2 (Sandler et al., arXiv 1801.04381) in Flax Linen: depthwise convolutions."""

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
    divisible,
    layer_makers,
    symmetric,
)

# (expansion, channels, blocks, stride of the first) of each stage: table 2 of the paper.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM_CHANNELS = 32
LAST_CHANNELS = 1280


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution, linear 1x1 projection; a shortcut if shapes allow.

    `[B, H, W, C]` to `[B, ceil(H / stride), ceil(W / stride), channels]`.

    Attributes:
      channels: of the result.
      expansion: channels of the depthwise convolution, as a multiple of the input's; 1 leaves the
        expansion out.
      kernel: of the depthwise convolution, odd.
      stride: of the depthwise convolution.
      norm: see `lrjax.models.layers.normalisation`.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    channels: int
    expansion: int
    kernel: int = 3
    stride: int = 1
    norm: Norm = "batch"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        _, conv, norm = layer_makers(self, train)
        hidden = self.expanded(x.shape[-1])
        y = x
        if self.expansion != 1:
            y = conv(hidden, (1, 1), padding=symmetric(0), name="expand")(y)
            y = self.activation(norm(hidden, name="expand_norm")(y))
        y = conv(
            hidden,
            (self.kernel, self.kernel),
            (self.stride, self.stride),
            padding=symmetric(self.kernel // 2),
            feature_group_count=hidden,
            name="depthwise",
        )(y)
        y = self.excited(self.activation(norm(hidden, name="depthwise_norm")(y)), x.shape[-1])
        y = conv(self.channels, (1, 1), padding=symmetric(0), name="project")(y)
        y = norm(self.channels, name="project_norm")(y)
        return x + self.kept(y, train) if x.shape == y.shape else y

    @nn.nowrap
    def expanded(self, channels: int) -> int:
        """Channels of the depthwise convolution."""
        return channels * self.expansion

    @nn.nowrap
    def activation(self, x: jax.Array) -> jax.Array:
        """Behind the expansion and the depthwise convolution."""
        return nn.relu6(x)

    @nn.nowrap
    def excited(self, x: jax.Array, channels: int) -> jax.Array:
        """What is projected, of a block whose input has so many channels."""
        del channels
        return x

    @nn.nowrap
    def kept(self, branch: jax.Array, train: bool) -> jax.Array:
        """What is added to the shortcut."""
        del train
        return branch


class MobileNetV2(nn.Module):
    """MobileNetV2: `[B, H, W, C]` images to `[B, num_classes]` logits.

    Integer images (uint8) are scaled to [-1, 1]. Dropout before the classifier takes its key from
    `rngs={"dropout": key}` when training.

    Named values, in order: `"stem"`, every block's output, `"stage1_block1"`, `"stage2_block1"`,
    ..., and `"head"`, the last convolution's.

    Attributes:
      num_classes: logits per image; `None` leaves the head out, the result is the last map.
      width: multiplier of every channel count, rounded to multiples of 8.
      norm: `"batch"` (the published network), `"frozen"` (BatchNorm by its running statistics),
        `"group"` or `"none"`.
      dropout_rate: before the classifier.
      stages: `(expansion, channels, blocks, stride)` of each stage.
      dtype: of the computation. Logits are float32 at least.
      param_dtype: of the parameters.
    """

    num_classes: int | None = 1000
    width: float = 1.0
    norm: Norm = "batch"
    dropout_rate: float = 0.2
    stages: tuple[tuple[int, int, int, int], ...] = STAGES
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        check_settings(norm=self.norm, width=self.width)
        check_images(images, "MobileNetV2", least=1)
        dtypes, conv, norm = layer_makers(self, train)
        stem = divisible(STEM_CHANNELS * self.width)
        x = as_float(images, self.dtype)
        x = conv(stem, (3, 3), (2, 2), padding=symmetric(1), name="stem_conv")(x)
        x = checkpoint_name(nn.relu6(norm(stem, name="stem_norm")(x)), "stem")
        for stage, (expansion, channels, blocks, stride) in enumerate(self.stages, start=1):
            for block in range(1, blocks + 1):
                name = f"stage{stage}_block{block}"
                x = InvertedResidual(
                    channels=divisible(channels * self.width),
                    expansion=expansion,
                    stride=stride if block == 1 else 1,
                    norm=self.norm,
                    name=name,
                    **dtypes,
                )(x, train=train)
                x = checkpoint_name(x, name)
        last = divisible(LAST_CHANNELS * max(1.0, self.width))
        x = conv(last, (1, 1), padding=symmetric(0), name="head_conv")(x)
        x = checkpoint_name(nn.relu6(norm(last, name="head_norm")(x)), "head")
        return class_logits(
            x, self.num_classes, dtypes, dropout_rate=self.dropout_rate, train=train
        )
