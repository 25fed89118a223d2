"""What the models share: channel counts, images to numbers, normalisation, padding."""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

Norm = Literal["batch", "block", "frozen", "group", "none"]
Layer = Callable[..., Any]

# PyTorch's initialisation of convolutions in front of ReLU: normal, scaled by the fan out.
HE_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
GROUPS = 32
STATISTICS_BLOCKS = 4


def scaled(channels: int, width: float) -> int:
    """`channels` times the width multiplier, to the nearest whole channel and at least one."""
    return max(1, round(channels * width))


def divisible(channels: float) -> int:
    """`channels` to the nearest multiple of 8, never more than a tenth below (MobileNet's)."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


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
      kind: `"batch"`: BatchNorm, by the batch's statistics when training; `"block"`: by those of
        each of four blocks of rows, see `BlockBatchNorm`; `"frozen"`: BatchNorm by its running
        statistics always; `"group"`: GroupNorm of 32 groups, or the most that divide the channels;
        `"none"`: nothing.
      train: BatchNorm uses and updates statistics.
      dtype: of the result.
      param_dtype: of scale and bias.
      momentum: of the running statistics; PyTorch counts the other way, its 0.1 is 0.9 here.
      epsilon: added to the variance.
    """
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}

    def make(
        channels: int, *, name: str, scale_init: Any = nn.initializers.ones
    ) -> Callable[[jax.Array], jax.Array]:
        if kind == "none":
            return lambda x: x
        if kind == "group":
            groups = max(n for n in range(1, min(GROUPS, channels) + 1) if channels % n == 0)
            return nn.GroupNorm(groups, epsilon=epsilon, scale_init=scale_init, name=name, **dtypes)
        layer = BlockBatchNorm if kind == "block" else nn.BatchNorm
        return layer(
            use_running_average=kind == "frozen" or not train,
            momentum=momentum,
            epsilon=epsilon,
            scale_init=scale_init,
            name=name,
            **dtypes,
        )

    return make


def layer_makers(module: Any, train: bool) -> tuple[dict[str, Any], Layer, Layer]:
    """Keyword arguments for the dtypes of layers, convolutions without bias, normalisation layers.

    All under a network's settings, its fields `dtype`, `param_dtype` and `norm`.
    """
    dtypes = {"dtype": module.dtype, "param_dtype": module.param_dtype}
    conv = functools.partial(nn.Conv, use_bias=False, kernel_init=HE_FAN_OUT, **dtypes)
    return dtypes, conv, normalisation(module.norm, train, **dtypes)


def class_logits(
    maps: jax.Array,
    num_classes: int | None,
    dtypes: dict[str, Any],
    *,
    dropout_rate: float | None = None,
    train: bool = False,
) -> jax.Array:
    """A dense layer on the mean of maps `[B, H, W, C]`, at least in float32; `None`: the maps."""
    if num_classes is None:
        return maps
    x = maps.mean(axis=(1, 2))
    if dropout_rate is not None:
        x = nn.Dropout(dropout_rate, deterministic=not train)(x)
    return at_least_float32(nn.Dense(num_classes, name="classifier", **dtypes)(x))


class BlockBatchNorm(nn.Module):
    """BatchNorm with statistics of each of four blocks of rows: *not* BatchNorm, for contrast.

    LR-CNN's published code (arXiv 2401.11471) normalises every row block by its own statistics when
    training, and so trains another network. `lrjax` has no need to. The running statistics are the
    means of the blocks'. Not local in rows: under `lrjax.rowwise` it runs column-wise.
    """

    use_running_average: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    scale_init: Any = nn.initializers.ones
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1:]
        scale = self.param("scale", self.scale_init, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        running = [
            self.variable("batch_stats", "mean", jnp.zeros, shape, self.param_dtype),
            self.variable("batch_stats", "var", jnp.ones, shape, self.param_dtype),
        ]
        if self.use_running_average:
            mean, variance = (one.value for one in running)
            return self._normalised(x, mean, variance, scale, bias)
        blocks = jnp.array_split(x, min(STATISTICS_BLOCKS, x.shape[1]), axis=1)
        wide = [jnp.asarray(block, jnp.promote_types(x.dtype, jnp.float32)) for block in blocks]
        axes = tuple(range(x.ndim - 1))
        statistics = [(b.mean(axes), b.var(axes)) for b in wide]
        if not self.is_initializing():
            for one, values in zip(running, zip(*statistics, strict=True), strict=True):
                new = sum(values) / len(values)
                one.value = self.momentum * one.value + (1 - self.momentum) * new
        normalised = [
            self._normalised(block, mean, variance, scale, bias)
            for block, (mean, variance) in zip(blocks, statistics, strict=True)
        ]
        return jnp.concatenate(normalised, axis=1)

    def _normalised(
        self, x: jax.Array, mean: Any, variance: Any, scale: Any, bias: Any
    ) -> jax.Array:
        y = (x - mean) * jax.lax.rsqrt(variance + self.epsilon) * scale + bias
        return y.astype(self.dtype or x.dtype)


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


def check_volumes(volumes: jax.Array, model: str, least: int) -> None:
    """Raises ValueError unless volumes are `[B, D, H, W, C]`, with `least` voxels each way."""
    if volumes.ndim != 5:
        raise ValueError(
            f"volumes: got shape {volumes.shape}; {model} takes "
            "[batch, depth, height, width, channels]"
        )
    if min(volumes.shape[1:4]) < least:
        size = "x".join(map(str, volumes.shape[1:4]))
        raise ValueError(
            f"volumes: got {size}; {model} needs depth, height and width of at least {least}"
        )
