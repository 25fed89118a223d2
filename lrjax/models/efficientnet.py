"""EfficientNet-B0 (Tan & Le, arXiv 1905.11946) in Flax Linen: squeeze-and-excite in every block."""

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
    drop_path,
    layer_makers,
    symmetric,
)
from lrjax.models.mobilenet import InvertedResidual

# (expansion, channels, blocks, stride of the first, kernel) of each stage: table 1 of the paper.
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
STEM_CHANNELS = 32
SQUEEZE_RATIO = 4


class SqueezeExcite(nn.Module):
    """Scales every channel by what the mean of the whole map says (arXiv 1709.01507).

    `[B, H, W, C]` to the same shape; `squeezed` channels between its two dense layers.
    """

    squeezed: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        mean = x.mean(axis=(1, 2), keepdims=True)
        gate = nn.silu(nn.Dense(self.squeezed, name="squeeze", **dtypes)(mean))
        return x * nn.sigmoid(nn.Dense(x.shape[-1], name="excite", **dtypes)(gate))


class MBConv(InvertedResidual):
    """1x1 expansion, depthwise convolution, squeeze-and-excite, linear 1x1 projection.

    `[B, H, W, C]` to `[B, ceil(H / stride), ceil(W / stride), channels]`, with a shortcut where
    both shapes are the same.

    Attributes:
      drop_path_rate: how often an image's branch is dropped in training.
    """

    drop_path_rate: float = 0.0

    @nn.nowrap
    def expanded(self, channels: int) -> int:
        return divisible(channels * self.expansion)

    @nn.nowrap
    def activation(self, x: jax.Array) -> jax.Array:
        return nn.silu(x)

    @nn.nowrap
    def excited(self, x: jax.Array, channels: int) -> jax.Array:
        squeezed = max(1, channels // SQUEEZE_RATIO)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return SqueezeExcite(squeezed, name="squeeze_excite", **dtypes)(x)

    @nn.nowrap
    def kept(self, branch: jax.Array, train: bool) -> jax.Array:
        return drop_path(self, branch, self.drop_path_rate, train)


class EfficientNet(nn.Module):
    """EfficientNet: `[B, H, W, C]` images to `[B, num_classes]` logits. The defaults are B0.

    Integer images (uint8) are scaled to [-1, 1]. Dropout and stochastic depth take their keys from
    `rngs={"dropout": key}` when training.

    Named values, in order: `"stem"`, every block's output, `"stage1_block1"`, `"stage2_block1"`,
    ..., and `"head"`, the last convolution's.

    Attributes:
      num_classes: logits per image; `None` leaves the head out, the result is the last map.
      width: multiplier of every channel count, rounded to multiples of 8.
      norm: `"batch"` (the published network), `"frozen"` (BatchNorm by its running statistics),
        `"group"` or `"none"`.
      dropout_rate: before the classifier.
      drop_path_rate: it grows linearly with the block, from 0 at the first.
      stages: `(expansion, channels, blocks, stride, kernel)` of each stage.
      dtype: of the computation. Logits are float32 at least.
      param_dtype: of the parameters.
    """

    num_classes: int | None = 1000
    width: float = 1.0
    norm: Norm = "batch"
    dropout_rate: float = 0.2
    drop_path_rate: float = 0.2
    stages: tuple[tuple[int, int, int, int, int], ...] = STAGES
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        check_settings(norm=self.norm, width=self.width)
        check_images(images, "EfficientNet", least=1)
        dtypes, conv, norm = layer_makers(self, train)
        stem = divisible(STEM_CHANNELS * self.width)
        x = as_float(images, self.dtype)
        x = conv(stem, (3, 3), (2, 2), padding=symmetric(1), name="stem_conv")(x)
        x = checkpoint_name(nn.silu(norm(stem, name="stem_norm")(x)), "stem")
        total, before = sum(blocks for _, _, blocks, _, _ in self.stages), 0
        for stage, (expansion, channels, blocks, stride, kernel) in enumerate(self.stages, start=1):
            for block in range(1, blocks + 1):
                name = f"stage{stage}_block{block}"
                x = MBConv(
                    channels=divisible(channels * self.width),
                    expansion=expansion,
                    kernel=kernel,
                    stride=stride if block == 1 else 1,
                    drop_path_rate=self.drop_path_rate * before / total,
                    norm=self.norm,
                    name=name,
                    **dtypes,
                )(x, train=train)
                x = checkpoint_name(x, name)
                before += 1
        last = 4 * x.shape[-1]
        x = conv(last, (1, 1), padding=symmetric(0), name="head_conv")(x)
        x = checkpoint_name(nn.silu(norm(last, name="head_norm")(x)), "head")
        return class_logits(
            x, self.num_classes, dtypes, dropout_rate=self.dropout_rate, train=train
        )


EfficientNetB0 = EfficientNet
