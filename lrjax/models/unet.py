"""U-Net (Ronneberger et al., arXiv 1505.04597) in Flax Linen, padded so that sizes are kept.

The published network loses a border at every convolution; this one pads, as most implementations
do, so that the result has a value for every pixel of the image.
"""

import functools
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lrjax.models.layers import (
    Layer,
    Norm,
    as_float,
    at_least_float32,
    check_images,
    check_settings,
    layer_makers,
    scaled,
    symmetric,
)

Upsampling = Literal["transpose", "nearest"]
CHANNELS = (64, 128, 256, 512, 1024)


class DoubleConv(nn.Module):
    """Twice: 3x3 convolution, normalisation, ReLU. `[B, H, W, C]` to `[B, H, W, channels]`."""

    channels: int
    norm: Norm = "batch"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        _, conv, norm = layer_makers(self, train)
        own = {"padding": symmetric(1), "use_bias": self.norm == "none"}
        for number in (1, 2):
            x = conv(self.channels, (3, 3), name=f"conv{number}", **own)(x)
            x = nn.relu(norm(self.channels, name=f"norm{number}")(x))
        return x


class UNet(nn.Module):
    """U-Net: `[B, H, W, C]` images to `[B, H, W, num_classes]` logits, one for every pixel.

    A level is a `DoubleConv`; between levels a 2x2 max pool on the way down, and on the way up an
    upsampling that halves the channels, next to the map of the same level on the way down. Sizes
    need not be divisible: an odd row or column that a pool drops is zero after the upsampling.
    Integer images (uint8) are scaled to [-1, 1].

    Named values, in order: `"down1"`, `"down2"`, ..., `"bottom"`, then up again, `"up4"` ..
    `"up1"`: the outputs of the levels.

    Attributes:
      num_classes: logits per pixel.
      channels: of the levels, from the image's resolution down.
      width: multiplier of every channel count.
      norm: `"batch"`, `"frozen"` (BatchNorm by its running statistics), `"group"` or `"none"` (the
        published network; convolutions have biases then).
      upsampling: `"transpose"`: a 2x2 transposed convolution of stride 2; `"nearest"`: every pixel
        twice each way, and a 3x3 convolution.
      dtype: of the computation. Logits are float32 at least.
      param_dtype: of the parameters.
    """

    num_classes: int = 2
    channels: tuple[int, ...] = CHANNELS
    width: float = 1.0
    norm: Norm = "batch"
    upsampling: Upsampling = "transpose"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        check_settings(norm=self.norm, width=self.width)
        if self.upsampling not in get_args(Upsampling):
            raise ValueError(
                f"upsampling: got {self.upsampling!r}; use one of {', '.join(get_args(Upsampling))}"
            )
        check_images(images, "U-Net", least=2 ** (len(self.channels) - 1))
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        double: Layer = functools.partial(DoubleConv, norm=self.norm, **dtypes)
        *levels, bottom = (scaled(channels, self.width) for channels in self.channels)
        x = as_float(images, self.dtype)
        skips = []
        for level, channels in enumerate(levels, start=1):
            x = double(channels, name=f"down{level}")(x, train=train)
            skips.append(checkpoint_name(x, f"down{level}"))
            x = nn.max_pool(skips[-1], (2, 2), (2, 2))
        x = checkpoint_name(double(bottom, name="bottom")(x, train=train), "bottom")
        for level, (channels, skip) in reversed(
            list(enumerate(zip(levels, skips, strict=True), start=1))
        ):
            x = self._upsampled(x, channels, f"upsample{level}")
            x = jnp.concatenate([skip, _padded_to(x, skip.shape)], axis=-1)
            x = checkpoint_name(double(channels, name=f"up{level}")(x, train=train), f"up{level}")
        return at_least_float32(nn.Conv(self.num_classes, (1, 1), name="classifier", **dtypes)(x))

    def _upsampled(self, x: jax.Array, channels: int, name: str) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.upsampling == "transpose":
            return nn.ConvTranspose(channels, (2, 2), (2, 2), padding="VALID", name=name, **dtypes)(
                x
            )
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return nn.Conv(channels, (3, 3), padding=symmetric(1), name=name, **dtypes)(x)


def _padded_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Zeros below and to the right, up to a height and width."""
    missing = [(0, 0, 0), (0, shape[1] - x.shape[1], 0), (0, shape[2] - x.shape[2], 0), (0, 0, 0)]
    return lax.pad(x, jnp.zeros((), x.dtype), missing) if any(high for _, high, _ in missing) else x
