"""Random small networks of every shape the engine claims to run: layers, branches, heads, heights.

Everything follows from a seed, so a case that fails is a case that can be run again by its number.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array
Layer = Callable[[Any, Array], Array]

NHWC = ("NHWC", "HWIO", "NHWC")


@dataclasses.dataclass
class Network:
    """Layers under construction; ``shape`` is that of the map so far (NHWC)."""

    random: random.Random
    shape: tuple[int, ...]
    dtype: Any = np.float64
    params: list[np.ndarray] = dataclasses.field(default_factory=list)
    description: list[str] = dataclasses.field(default_factory=list)

    @property
    def channels(self) -> int:
        return self.shape[-1]

    @property
    def height(self) -> int:
        return self.shape[1]

    def parameter(self, *shape: int, scale: float | None = None) -> int:
        """A new parameter; returns its number."""
        generator = np.random.default_rng(self.random.getrandbits(32))
        fan_in = max(int(np.prod(shape[:-1])), 1)
        values = generator.standard_normal(shape) * (scale or 1.5 / np.sqrt(fan_in))
        self.params.append(values.astype(self.dtype))
        return len(self.params) - 1

    def output_shape(self, layer: Layer, shape: tuple[int, ...] | None = None) -> tuple[int, ...]:
        def apply(image: Array) -> Array:
            return layer([jnp.asarray(p) for p in self.params], image)

        return jax.eval_shape(apply, jax.ShapeDtypeStruct(shape or self.shape, self.dtype)).shape

    def fits(self, layer: Layer) -> bool:
        """Whether a layer leaves a map that is not empty."""
        try:
            shape = self.output_shape(layer)
        except (TypeError, ValueError):
            return False
        return min(shape) > 0 and shape[1] <= 40

    def say(self, text: str) -> None:
        self.description.append(text)


def chain(*layers: Layer) -> Layer:
    def apply(params: Any, image: Array) -> Array:
        for layer in layers:
            image = layer(params, image)
        return image

    return apply


# --- Plain layers --------------------------------------------------------------------------------


def random_padding(net: Network, kernel: tuple[int, int]) -> Any:
    choice = net.random.choice(["SAME", "SAME", "VALID", "asymmetric", "negative"])
    if choice in ("SAME", "VALID"):
        return choice
    least = -1 if choice == "negative" else 0
    return tuple(
        (net.random.randint(least, k - 1), net.random.randint(least, k - 1)) for k in kernel
    )


def convolution(net: Network) -> Layer:
    kernel = (net.random.choice([1, 2, 3, 3, 4, 5]), net.random.choice([1, 2, 3]))
    strides = (net.random.choice([1, 1, 1, 2, 2, 3]), net.random.choice([1, 1, 2]))
    dilation = (net.random.choice([1, 1, 1, 2, 3]), 1)
    base = (net.random.choice([1, 1, 1, 1, 2, 3]), 1)
    padding = random_padding(net, kernel)
    if base[0] > 1 and isinstance(padding, str):
        padding = ((net.random.randint(0, 2), net.random.randint(0, 2)), (1, 1))
    groups = net.random.choice([1, 1, net.channels])
    features = groups * net.random.choice([1, 2, 3]) if groups > 1 else net.random.choice([1, 2, 3])
    weights = net.parameter(*kernel, net.channels // groups, features)
    bias = net.parameter(features, scale=0.3)

    def apply(params: Any, image: Array) -> Array:
        out = lax.conv_general_dilated(
            image,
            params[weights],
            strides,
            padding,
            lhs_dilation=base,
            rhs_dilation=dilation,
            dimension_numbers=NHWC,
            feature_group_count=groups,
        )
        return out + params[bias]

    net.say(f"conv{kernel}s{strides}d{dilation}b{base}p{padding}g{groups}")
    return apply


def pooling(net: Network) -> Layer:
    window = (net.random.choice([2, 2, 3]), net.random.choice([1, 2]))
    strides = (net.random.choice([1, 2, 2, 3]), net.random.choice([1, window[1]]))
    padding = net.random.choice(["SAME", "VALID", ((1, 1), (0, 0)), ((0, 1), (0, 0))])
    kind = net.random.choice(["max", "max", "min", "avg"])
    dims, steps = (1, *window, 1), (1, *strides, 1)
    pads = padding if isinstance(padding, str) else ((0, 0), *padding, (0, 0))

    def apply(params: Any, image: Array) -> Array:
        if kind == "max":
            return lax.reduce_window(image, -np.inf, lax.max, dims, steps, pads)
        if kind == "min":
            return lax.reduce_window(image, np.inf, lax.min, dims, steps, pads)
        total = lax.reduce_window(image, 0.0, lax.add, dims, steps, pads)
        return total / (window[0] * window[1])

    net.say(f"{kind}pool{window}s{strides}p{padding}")
    return apply


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "leaky": jax.nn.leaky_relu,
    "maximum": lambda x: jnp.maximum(x, 0),
    "clip": lambda x: jnp.clip(x, -0.7, 0.9),
    "softmax": lambda x: x * jax.nn.softmax(x, axis=(2, 3)),
}


def activation(net: Network) -> Layer:
    name = net.random.choice(list(ACTIVATIONS))
    net.say(name)
    return lambda params, image: ACTIVATIONS[name](image)


def row_slice(net: Network) -> Layer:
    low, high = net.random.randint(0, 2), net.random.randint(0, 2)
    stride = net.random.choice([1, 1, 2])
    net.say(f"rows[{low}:-{high}:{stride}]")
    return lambda params, image: image[:, low : image.shape[1] - high : stride]


def row_pad(net: Network) -> Layer:
    low, high = net.random.randint(-1, 2), net.random.randint(-1, 2)
    interior = net.random.choice([0, 0, 1])
    value = net.random.choice([0.0, 0.5])

    def apply(params: Any, image: Array) -> Array:
        config = ((0, 0, 0), (low, high, interior), (0, 0, 0), (0, 0, 0))
        return lax.pad(image, jnp.asarray(value, image.dtype), config)

    net.say(f"pad({low},{high},{interior})={value}")
    return apply


def scaled_by_row_position(net: Network) -> Layer:
    """Something that depends on the row's number."""

    def apply(params: Any, image: Array) -> Array:
        rows = lax.broadcasted_iota(image.dtype, image.shape, 1)
        return image * (1 + rows / 8)

    net.say("row-position")
    return apply


def channel_norm(net: Network) -> Layer:
    scale = net.parameter(net.channels, scale=1.0)

    def apply(params: Any, image: Array) -> Array:
        mean = jnp.mean(image, axis=(2, 3), keepdims=True)
        return (image - mean) * params[scale]

    net.say("row-norm")
    return apply


PLAIN = (
    convolution,
    convolution,
    convolution,
    pooling,
    activation,
    activation,
    row_slice,
    row_pad,
    scaled_by_row_position,
    channel_norm,
)


def plain(net: Network) -> Layer:
    """One layer that leaves something of the map; the identity if none was found."""
    for _ in range(8):
        count, said = len(net.params), len(net.description)
        layer = net.random.choice(PLAIN)(net)
        if net.fits(layer):
            net.shape = net.output_shape(layer)
            return layer
        del net.params[count:], net.description[said:]
    return lambda params, image: image


# --- Branches and joins --------------------------------------------------------------------------


def same_convolution(net: Network, features: int, *, channels: int | None = None) -> Layer:
    """Keeps the height; the kernels' heights differ, and with them the branches' lags."""
    kernel = (net.random.choice([1, 2, 3, 5, 7]), net.random.choice([1, 3]))
    dilation = net.random.choice([1, 1, 2])
    weights = net.parameter(*kernel, channels or net.channels, features)
    net.say(f"same{kernel}d{dilation}")
    return lambda params, image: lax.conv_general_dilated(
        image,
        params[weights],
        (1, 1),
        "SAME",
        rhs_dilation=(dilation, 1),
        dimension_numbers=NHWC,
    )


def residual(net: Network) -> Layer:
    net.say("residual(")
    inner = chain(
        same_convolution(net, 3), activation(net), same_convolution(net, net.channels, channels=3)
    )
    net.say(")")
    return lambda params, image: image + inner(params, image)


def inception(net: Network) -> Layer:
    net.say("inception(")
    branches = [same_convolution(net, net.random.choice([1, 2])) for _ in range(3)]
    net.say(")")
    return lambda params, image: jnp.concatenate([b(params, image) for b in branches], axis=-1)


def dense(net: Network) -> Layer:
    net.say("dense(")
    first = same_convolution(net, 2)
    second = same_convolution(net, 1, channels=net.channels + 2)
    net.say(")")

    def apply(params: Any, image: Array) -> Array:
        image = jnp.concatenate([image, jnp.tanh(first(params, image))], axis=-1)
        return jnp.concatenate([image, second(params, image)], axis=-1)

    return apply


def u_shape(net: Network) -> Layer:
    """Down by a strided convolution or pooling, up by a dilated one, joined to the skipped map."""
    factor = net.random.choice([2, 2, 3])
    up_kernel = net.random.choice([factor, factor + 1])
    down = net.parameter(3, 1, net.channels, 2)
    up = net.parameter(up_kernel, 1, 2, 2)
    is_convolution = net.random.random() < 0.5
    net.say(f"u{factor}(")
    middle = same_convolution(net, 2, channels=2 if is_convolution else net.channels)
    net.say(")")

    def apply(params: Any, image: Array) -> Array:
        if is_convolution:
            low = lax.conv_general_dilated(
                image, params[down], (factor, 1), "SAME", dimension_numbers=NHWC
            )
        else:
            window = (1, factor, 1, 1)
            low = lax.reduce_window(image, -jnp.inf, lax.max, window, window, "SAME")
        low = jax.nn.relu(middle(params, low))
        high = factor * low.shape[1]
        total = up_kernel - 1 + up_kernel - factor
        back = lax.conv_general_dilated(
            low,
            params[up],
            (1, 1),
            ((up_kernel - 1, total - up_kernel + 1), (0, 0)),
            lhs_dilation=(factor, 1),
            dimension_numbers=NHWC,
        )
        back = back[:, : image.shape[1]] if high >= image.shape[1] else back
        return jnp.concatenate([image, back], axis=-1)

    return apply


JOINS = (residual, inception, dense, u_shape)


def join(net: Network) -> Layer:
    count, said = len(net.params), len(net.description)
    layer = net.random.choice(JOINS)(net)
    if net.fits(layer):
        net.shape = net.output_shape(layer)
        return layer
    del net.params[count:], net.description[said:]
    return lambda params, image: image


# --- Barriers and heads --------------------------------------------------------------------------


def batch_norm(net: Network) -> Layer:
    scale = net.parameter(net.channels, scale=1.0)
    net.say("batchnorm")

    def apply(params: Any, image: Array) -> Array:
        mean = image.mean((0, 1, 2))
        variance = ((image - mean) ** 2).mean((0, 1, 2))
        normed = (image - mean) * lax.rsqrt(variance + 0.1)
        return (normed + normed**2 / 4) * params[scale]

    return apply


def squeeze_and_excite(net: Network) -> Layer:
    weights = net.parameter(net.channels, net.channels)
    net.say("squeeze-excite")

    def apply(params: Any, image: Array) -> Array:
        gate = jax.nn.sigmoid(image.mean((1, 2)) @ params[weights])
        return image * gate[:, None, None, :]

    return apply


def not_row_local(net: Network) -> Layer:
    kind = net.random.choice(["cumsum", "flip"])
    net.say(kind)
    if kind == "cumsum":
        return lambda params, image: jnp.cumsum(image, axis=1) / image.shape[1]
    return lambda params, image: jnp.flip(image, 1)


BARRIERS = (batch_norm, squeeze_and_excite, not_row_local)


def head(net: Network) -> Layer:
    kind = net.random.choice(["map", "map", "square", "pool", "flatten", "several"])
    size = int(np.prod(net.shape[1:]))
    weights = net.parameter(size if kind == "flatten" else net.channels, 2)
    net.say(f"-> {kind}")

    def apply(params: Any, image: Array) -> Any:
        if kind == "map":
            return image
        if kind == "square":
            return (image**2).mean()
        if kind == "flatten":
            return image.reshape(image.shape[0], -1) @ params[weights]
        pooled = image.mean((1, 2)) @ params[weights]
        if kind == "pool":
            return pooled
        return {"map": image, "pooled": pooled, "sum": jnp.sin(image).sum(), "max": image.max()}

    return apply


# --- Cases ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A function with its arguments; ``fun(params, images, ...)``."""

    fun: Callable[..., Any]
    args: tuple[Any, ...]
    in_axes: Any
    num_blocks: int
    description: str


def case(
    seed: int,
    *,
    layers: int = 4,
    barriers: bool = False,
    dtype: Any = np.float64,
    max_height: int = 24,
) -> Case:
    """The case of a seed.

    Args:
      seed: the seed.
      layers: layers and joins, at most.
      barriers: whether there is a layer that needs all rows.
      dtype: of images and parameters.
      max_height: of the images.
    """
    choose = random.Random(seed)
    height = choose.randint(1, max_height)
    shape = (choose.choice([1, 1, 2]), height, choose.choice([3, 4, 5]), choose.choice([1, 2]))
    net = Network(choose, shape, dtype)
    parts: list[Layer] = []
    barrier_at = choose.randrange(layers) if barriers else -1
    for position in range(choose.randint(max(2, barrier_at + 1), layers)):
        parts.append(join(net) if choose.random() < 0.3 else plain(net))
        if position == barrier_at:
            parts.append(choose.choice(BARRIERS)(net))
    parts.append(head(net))
    network = chain(*parts)
    # The row axis may stand anywhere.
    order = choose.choice([(0, 1, 2, 3), (0, 1, 2, 3), (0, 3, 1, 2), (1, 0, 2, 3), (0, 2, 3, 1)])
    axis = order.index(1) - choose.choice([0, 0, 4])
    generator = np.random.default_rng(seed)
    images = generator.standard_normal(shape).astype(dtype).transpose(order)
    back = tuple(int(i) for i in np.argsort(order))

    def fun(params: Any, images: Array) -> Any:
        return network(params, images.transpose(back))

    return Case(
        fun,
        (net.params, images),
        (None, axis),
        choose.choice([1, 2, 3, height // 2, height - 1, height, choose.randint(1, height)]),
        f"{seed}: {shape}{order} {' '.join(net.description)}",
    )
