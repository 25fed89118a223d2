"""What the models share: channel counts, images to numbers, normalisation, padding."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

Norm = Literal["batch", "frozen", "group", "none"]
Layer = Callable[..., Any]

# PyTorch's initialisation of convolutions in front of ReLU: normal, scaled by the fan out.
HE_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
GROUPS = 32


def scaled(channels: int, width: float) -> int:
    """`channels` times the width multiplier, to the nearest whole channel and at least one."""
    return max(1, round(channels * width))


def divisible(channels: float, by: int = 8) -> int:
    """`channels` to the nearest multiple of `by`, never more than a tenth below (MobileNet's)."""
    rounded = max(by, int(channels + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * channels else rounded


def as_float(images: jax.Array, dtype: Any) -> jax.Array:
    """Integer images scaled to [-1, 1]; floating-point ones as they are, in `dtype`."""
    if jnp.issubdtype(images.dtype, jnp.integer):
        half = jnp.asarray(jnp.iinfo(images.dtype).max / 2, dtype)
        return images.astype(dtype) / half - 1
    return images.astype(dtype)


def at_least_float32(logits: jax.Array) -> jax.Array:
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def symmetric(padding: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The same padding above, below, left and right, whatever the stride (PyTorch's)."""
    return ((padding, padding), (padding, padding))


def normalisation(
    kind: Norm,
    train: bool,
    *,
    dtype: Any,
    param_dtype: Any,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
) -> Layer:
    """A maker of normalisation layers, `make(channels, name=...)`, all under one setting.

    Args:
      kind: `"batch"`: BatchNorm, by the batch's statistics when training; `"frozen"`: BatchNorm by
        its running statistics always; `"group"`: GroupNorm of 32 groups, or the most that divide
        the channels; `"none"`: nothing.
      train: BatchNorm uses and updates statistics.
      dtype: of the result.
      param_dtype: of scale and bias.
      momentum: of the running statistics; PyTorch counts the other way, its 0.1 is 0.9 here.
      epsilon: added to the variance.
    """
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}

    def make(channels: int, *, name: str) -> Callable[[jax.Array], jax.Array]:
        if kind == "none":
            return lambda x: x
        if kind == "group":
            groups = max(n for n in range(1, min(GROUPS, channels) + 1) if channels % n == 0)
            return nn.GroupNorm(groups, epsilon=epsilon, name=name, **dtypes)
        return nn.BatchNorm(
            use_running_average=kind == "frozen" or not train,
            momentum=momentum,
            epsilon=epsilon,
            name=name,
            **dtypes,
        )

    return make


def drop_path(module: nn.Module, x: jax.Array, rate: float, train: bool) -> jax.Array:
    """Stochastic depth (arXiv 1603.09382): all of an image's `x` is dropped, with `rate`."""
    if rate == 0 or not train:
        return x
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, (x.shape[0], 1, 1, 1))
    return jnp.where(keep, x / (1 - rate), 0)


def check_settings(*, norm: str | None = None, width: float = 1.0) -> None:
    """Raises ValueError for what no model takes."""
    if norm is not None and norm not in get_args(Norm):
        raise ValueError(f"norm: got {norm!r}; use one of {', '.join(get_args(Norm))}")
    if not width > 0:
        raise ValueError(f"width: got {width}; use a positive multiplier, such as 1.0")


def check_images(images: jax.Array, model: str, least: int) -> None:
    """Raises ValueError unless images are `[B, H, W, C]`, with `least` pixels each way."""
    if images.ndim != 4:
        raise ValueError(
            f"images: got shape {images.shape}; {model} takes [batch, height, width, channels]"
        )
    height, width = images.shape[1:3]
    if min(height, width) < least:
        raise ValueError(
            f"images: got {height}x{width}; {model} needs height and width of at least {least}"
        )
