"""3-D U-Net (Çiçek et al., arXiv 1606.06650) in Flax Linen, padded so that sizes are kept.

The published network loses a border at every convolution; this one pads, so that the result has a
value for every voxel. Rows are the volume's depth: a row is a slice of height x width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lrjax.models.layers import (
    HE_FAN_OUT,
    Norm,
    as_float,
    at_least_float32,
    check_settings,
    check_volumes,
    normalisation,
    scaled,
)

LEVELS = (64, 128, 256, 512)
SPATIAL = 3
CUBE = ((1, 1),) * SPATIAL


class VolumeConv(nn.Module):
    """3x3x3 convolution, normalisation, ReLU. `[B, D, H, W, C]` to `[B, D, H, W, channels]`."""

    channels: int
    norm: Norm = "batch"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.Conv(
            self.channels,
            (3,) * SPATIAL,
            padding=CUBE,
            kernel_init=HE_FAN_OUT,
            name="conv",
            **dtypes,
        )(x)
        return nn.relu(normalisation(self.norm, train, **dtypes)(self.channels, name="norm")(x))


class UNet3D(nn.Module):
    """3-D U-Net: `[B, D, H, W, C]` volumes to `[B, D, H, W, num_classes]` logits, one a voxel.

    Two convolutions a level; on the way down the first has half of the level's channels. Between
    levels a 2x2x2 max pool on the way down, and on the way up a 2x2x2 transposed convolution that
    keeps the channels, next to the map of the same level on the way down. Sizes need not be
    divisible: an odd slice, row or column that a pool drops is zero after the upsampling. Integer
    volumes (uint8) are scaled to [-1, 1].

    Named values, in order: `"down1"`, `"down2"`, ..., `"bottom"`, then up again, `"up3"` ..
    `"up1"`: the outputs of the levels.

    Attributes:
      num_classes: logits per voxel.
      channels: of the levels from the top; the last is the bottom.
      width: multiplier of every channel count.
      norm: see `lrjax.models.layers.normalisation`; the published network has `"batch"`.
      dtype: of the computation. Logits are float32 at least.
      param_dtype: of the parameters.
    """

    num_classes: int = 2
    channels: tuple[int, ...] = LEVELS
    width: float = 1.0
    norm: Norm = "batch"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, volumes: jax.Array, *, train: bool = False) -> jax.Array:
        check_settings(norm=self.norm, width=self.width)
        check_volumes(volumes, "3-D U-Net", least=2 ** (len(self.channels) - 1))
        *levels, bottom = (scaled(channels, self.width) for channels in self.channels)
        x = as_float(volumes, self.dtype)
        skips = []
        for level, channels in enumerate(levels, start=1):
            x = self._level(x, (channels // 2, channels), f"down{level}", train)
            skips.append(x)
            x = nn.max_pool(x, (2,) * SPATIAL, (2,) * SPATIAL)
        x = self._level(x, (bottom // 2, bottom), "bottom", train)
        for level, (channels, skip) in reversed(
            list(enumerate(zip(levels, skips, strict=True), start=1))
        ):
            x = self._upsampled(x, skip, f"upsample{level}")
            x = self._level(x, (channels, channels), f"up{level}", train)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        logits = nn.Conv(self.num_classes, (1,) * SPATIAL, name="classifier", **dtypes)(x)
        return at_least_float32(logits)

    def _level(self, x: jax.Array, channels: tuple[int, int], name: str, train: bool) -> jax.Array:
        for number, own in enumerate(channels, start=1):
            x = VolumeConv(
                max(1, own), self.norm, self.dtype, self.param_dtype, name=f"{name}_conv{number}"
            )(x, train=train)
        return checkpoint_name(x, name)

    def _upsampled(self, x: jax.Array, skip: jax.Array, name: str) -> jax.Array:
        """`x` at twice the size, zero where a pool had dropped something, next to `skip`."""
        kernel = (2,) * SPATIAL
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        options = {"padding": "VALID", "use_bias": False, "kernel_init": HE_FAN_OUT, **dtypes}
        x = nn.ConvTranspose(x.shape[-1], kernel, kernel, name=name, **options)(x)
        missing = [(0, large - own, 0) for own, large in zip(x.shape, skip.shape, strict=True)]
        missing[-1] = (0, 0, 0)
        if any(high for _, high, _ in missing):
            x = lax.pad(x, jnp.zeros((), x.dtype), missing)
        return jnp.concatenate([skip, x], axis=-1)
