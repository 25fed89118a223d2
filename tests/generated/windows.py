"""Layers that read neighbouring rows, and those that move rows."""

from __future__ import annotations

from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from generated.spec import Map, kind

# --- Convolutions and pools ----------------------------------------------------------------------


def _padding(random: Random, extent: int) -> Any:
    choice = random.choice(["SAME", "SAME", "VALID", "random", "random", "negative"])
    if choice in ("SAME", "VALID"):
        return choice
    least = -1 if choice == "negative" else 0
    return (random.randint(least, extent - 1), random.randint(least, extent - 1))


def draw_conv(random: Random, m: Map) -> dict[str, Any]:
    kernel = random.choice([3, 3, 1, 2, 4, 5, 7])
    groups = random.choice([1, 1, 1, m.size("C")])
    found = {
        "features": groups * random.choice([1, 2, 3]) if groups > 1 else random.choice([1, 2, 3]),
        "kernel": kernel,
        "stride": random.choice([1, 1, 1, 1, 2, 2, 3, 4]),
        "dilation": random.choice([1, 1, 1, 2, 3]),
        "base": random.choice([1] * 8 + [2, 3]),
        "padding": _padding(random, kernel),
        "groups": groups,
        "kernel_width": random.choice([1, 3, 2]),
        "stride_width": random.choice([1, 1, 1, 2]),
        "bias": random.choice([False, True]),
        "standardised": random.choice([False] * 7 + [True]),
    }
    if found["base"] > 1:
        found["stride"] = 1  # XLA's algebraic simplifier aborts on column's gradients of both
    if found["base"] > 1 and isinstance(found["padding"], str):
        found["padding"] = (random.randint(0, 2), random.randint(0, 2))
    return found


@kind("conv", 10, draw_conv)
def conv(
    m: Map,
    features: int = 1,
    kernel: int = 1,
    stride: int = 1,
    dilation: int = 1,
    base: int = 1,
    padding: Any = "SAME",
    groups: int = 1,
    kernel_width: int = 1,
    stride_width: int = 1,
    bias: bool = False,
    standardised: bool = False,
) -> Map:
    rows = m.spatial
    windows = [kernel if letter == "H" else kernel_width for letter in rows]
    channels = m.size("C") // groups
    fan_in = channels * int(np.prod(windows))
    weights = m.parameter("w", *windows, channels, features, scale=1.5 / np.sqrt(fan_in))
    if standardised:
        axes = tuple(range(weights.ndim - 1))
        mean = weights.mean(axes, keepdims=True)
        weights = (weights - mean) * lax.rsqrt(weights.var(axes, keepdims=True) + 0.1)
    strides = [stride if letter == "H" else stride_width for letter in rows]
    pads: Any = padding
    if not isinstance(padding, str):
        sizes = [m.size(letter) for letter in rows]
        same = lax.padtype_to_pads(sizes, windows, strides, "SAME")
        pads = [tuple(padding) if letter == "H" else same[i] for i, letter in enumerate(rows)]
    out = lax.conv_general_dilated(
        m.x,
        weights,
        strides,
        pads,
        lhs_dilation=[base if letter == "H" else 1 for letter in rows],
        rhs_dilation=[dilation if letter == "H" else 1 for letter in rows],
        dimension_numbers=(m.layout, f"{rows}IO", m.layout),
        feature_group_count=groups,
    )
    if bias:
        out = out + m.broadcast(m.parameter("b", features, scale=0.3), "C")
    return m.of(out)


def draw_transposed(random: Random, m: Map) -> dict[str, Any]:
    return {
        "features": random.choice([1, 2]),
        "kernel": random.choice([2, 3, 4, 1]),
        "stride": random.choice([2, 3]),
        "padding": random.choice(["SAME", "VALID"]),
    }


@kind("conv", 1, draw_transposed)
def conv_transpose(
    m: Map, features: int = 1, kernel: int = 2, stride: int = 2, padding: str = "SAME"
) -> Map:
    windows = [kernel if letter == "H" else 1 for letter in m.spatial]
    weights = m.parameter("w", *windows, m.size("C"), features)
    strides = [stride if letter == "H" else 1 for letter in m.spatial]
    numbers = (m.layout, f"{m.spatial}IO", m.layout)
    return m.of(lax.conv_transpose(m.x, weights, strides, padding, dimension_numbers=numbers))


def draw_pool(random: Random, m: Map) -> dict[str, Any]:
    window = random.choice([2, 2, 3, 4])
    wide = random.choice([1, 1, 2])
    op = random.choice(["max", "max", "max", "min", "avg", "avg_inside"])
    padding = random.choice(["VALID", "VALID", "SAME", (1, 1), (0, 1), (1, 0)])
    # JAX has no gradient of a dilated maximum; of a dilated sum whose windows hold nothing but
    # padding XLA:CPU makes one that is not zero.
    is_dilated = op.startswith("avg") and padding == "VALID"
    return {
        "op": op,
        "window": window,
        "stride": random.choice([2, 2, 1, 3]),
        "padding": padding,
        "dilation": random.choice([1, 1, 2]) if is_dilated else 1,
        "width": wide,
        "stride_width": random.choice([1, wide]),
    }


@kind("pool", 4, draw_pool)
def pool(
    m: Map,
    op: str = "max",
    window: int = 2,
    stride: int = 2,
    padding: Any = "VALID",
    dilation: int = 1,
    width: int = 1,
    stride_width: int = 1,
) -> Map:
    def of_axes(rows: int, others: int) -> tuple[int, ...]:
        return tuple(
            rows if letter == "H" else others if letter in "WD" else 1 for letter in m.layout
        )

    windows, strides = of_axes(window, width), of_axes(stride, stride_width)
    dilations = of_axes(dilation, 1)
    pads: Any = padding
    if not isinstance(padding, str):
        pads = tuple(tuple(padding) if letter == "H" else (0, 0) for letter in m.layout)

    def reduced(x: Any, start: float, combine: Any) -> Any:
        return lax.reduce_window(
            x, start, combine, windows, strides, pads, window_dilation=dilations
        )

    if op == "max":
        return m.of(reduced(m.x, -np.inf, lax.max))
    if op == "min":
        return m.of(reduced(m.x, np.inf, lax.min))
    total = reduced(m.x, 0.0, lax.add)
    if op == "avg":
        return m.of(total / (window * width))
    return m.of(total / reduced(jnp.ones_like(m.x), 0.0, lax.add))


# --- Rows moved, added and left out --------------------------------------------------------------


def draw_rows(random: Random, m: Map) -> dict[str, Any]:
    return {
        "low": random.randint(0, 2),
        "high": random.randint(0, 2),
        "stride": random.choice([1, 1, 2, 3]),
    }


@kind("rows", 1.5, draw_rows)
def rows(m: Map, low: int = 0, high: int = 0, stride: int = 1) -> Map:
    axis = m.axis("H")
    return m.of(lax.slice_in_dim(m.x, low, m.size("H") - high, stride, axis))


def draw_pad(random: Random, m: Map) -> dict[str, Any]:
    return {
        "low": random.randint(-1, 3),
        "high": random.randint(-1, 3),
        "interior": random.choice([0, 0, 0, 1]),
        "value": random.choice([0.0, 0.0, 0.5, "parameter", "array"]),
    }


@kind("rows", 2, draw_pad)
def pad(m: Map, low: int = 1, high: int = 0, interior: int = 0, value: Any = 0.0) -> Map:
    fill = jnp.asarray(0.25 if isinstance(value, str) else value, m.x.dtype)
    if value == "parameter":
        fill = m.parameter("v")
    elif value == "array":
        fill = jnp.zeros((2,), m.x.dtype)[1]
    config = [(low, high, interior) if letter == "H" else (0, 0, 0) for letter in m.layout]
    return m.of(lax.pad(m.x, fill, config))


def draw_edge(random: Random, m: Map) -> dict[str, Any]:
    return {
        "mode": random.choice(["reflect", "edge", "wrap", "symmetric", "constant"]),
        "low": random.randint(0, 3),
        "high": random.randint(0, 3),
        "width": random.choice([0, 0, 1]),
    }


@kind("rows", 2, draw_edge)
def edge_pad(m: Map, mode: str = "edge", low: int = 1, high: int = 0, width: int = 0) -> Map:
    pads = [
        (low, high) if letter == "H" else (width, width) if letter in "WD" else (0, 0)
        for letter in m.layout
    ]
    if mode == "reflect":  # numpy's reflection of more rows than there are repeats itself
        pads = [(min(a, s - 1), min(b, s - 1)) for (a, b), s in zip(pads, m.x.shape, strict=True)]
    return m.of(jnp.pad(m.x, pads, mode=mode))


def draw_resize(random: Random, m: Map) -> dict[str, Any]:
    return {
        "height": random.choice([2 * m.size("H"), -(-m.size("H") // 2), random.randint(1, 20)]),
        "method": random.choice(["nearest", "linear", "cubic", "lanczos3"]),
        "antialias": random.choice([True, False]),
        "width": random.choice([0, 0, 3]),
    }


@kind("resize", 1.5, draw_resize)
def resize(
    m: Map, height: int = 2, method: str = "nearest", antialias: bool = True, width: int = 0
) -> Map:
    shape = [
        height if letter == "H" else width if letter == "W" and width else size
        for letter, size in zip(m.layout, m.x.shape, strict=True)
    ]
    return m.of(jax.image.resize(m.x, shape, method, antialias=antialias))


@kind("rows", 1, lambda random, m: {"factor": random.choice([2, 3])})
def repeat(m: Map, factor: int = 2) -> Map:
    return m.of(jnp.repeat(m.x, factor, axis=m.axis("H")))


def _channels_last(m: Map) -> tuple[Any, str]:
    """The map with rows before all other spatial axes and channels last."""
    order = "NH" + "".join(letter for letter in m.spatial if letter != "H") + "C"
    return jnp.transpose(m.x, m.axes(order)), order


def _back(m: Map, x: Any, order: str) -> Map:
    return m.of(jnp.transpose(x, [order.index(letter) for letter in m.layout]))


@kind("reshape", 1.5, lambda random, m: {"factor": random.choice([2, 3])})
def space_to_depth(m: Map, factor: int = 2) -> Map:
    """Every ``factor`` rows become channels of one; a rest is left out."""
    x, order = _channels_last(m)
    n, h, *others, c = x.shape
    whole = h // factor
    x = x[:, : whole * factor].reshape(n, whole, factor, *others, c)
    x = jnp.moveaxis(x, 2, -2)
    return _back(m, x.reshape(n, whole, *others, factor * c), order)


@kind("reshape", 1.5, lambda random, m: {"factor": random.choice([2, 3])})
def pixel_shuffle(m: Map, factor: int = 2) -> Map:
    """Channels become rows, after a matrix that makes enough of them."""
    x, order = _channels_last(m)
    n, h, *others, c = x.shape
    x = x @ m.parameter("w", c, factor * c)
    x = x.reshape(n, h, *others, factor, c)
    x = jnp.moveaxis(x, -2, 2)
    return _back(m, x.reshape(n, h * factor, *others, c), order)


@kind("reshape", 0.7)
def upsample_by_broadcast(m: Map) -> Map:
    x, order = _channels_last(m)
    n, h, *rest = x.shape
    x = jnp.broadcast_to(x[:, :, None], (n, h, 2, *rest)).reshape(n, 2 * h, *rest)
    return _back(m, x, order)


def draw_picked(random: Random, m: Map) -> dict[str, Any]:
    return {"order": random.choice(["local", "reversed", "random"])}


@kind("gather", 0.7, draw_picked)
def picked_rows(m: Map, order: str = "local") -> Map:
    """Rows picked by constant numbers."""
    height = m.size("H")
    if order == "reversed":
        numbers = np.arange(height)[::-1]
    elif order == "local":
        numbers = np.clip(np.arange(height) + np.arange(height) % 3 - 1, 0, height - 1)
    else:
        numbers = np.random.default_rng(height).integers(0, height, height)
    return m.of(jnp.take(m.x, np.ascontiguousarray(numbers), axis=m.axis("H")))


def draw_joined(random: Random, m: Map) -> dict[str, Any]:
    return {"how": random.choice(["halves", "twice", "first_last", "rolled", "zeros", "mirrored"])}


@kind("rows", 1, draw_joined)
def joined_rows(m: Map, how: str = "halves") -> Map:
    """Pieces of rows joined again."""
    axis, height, x = m.axis("H"), m.size("H"), m.x

    def part(low: int, high: int) -> Any:
        return lax.slice_in_dim(x, low, high, 1, axis)

    half = height // 2
    pieces = {
        "halves": lambda: [part(0, half) * m.parameter("p"), part(half, height)],
        "twice": lambda: [x, x],
        "first_last": lambda: [part(height - 1, height), x, part(0, 1)],
        "rolled": lambda: [part(half, height), part(0, half)],
        "zeros": lambda: [jnp.zeros_like(part(0, min(2, height))), x],
        "mirrored": lambda: [jnp.flip(part(0, min(2, height)), axis), x],
    }[how]()
    return m.of(jnp.concatenate(pieces, axis))


def draw_updated(random: Random, m: Map) -> dict[str, Any]:
    return {"letter": random.choice(["C", "W", "H"]), "start": random.randint(0, 2)}


@kind("gather", 0.7, draw_updated)
def updated_slice(m: Map, letter: str = "C", start: int = 0) -> Map:
    """``dynamic_update_slice`` of one element of an axis, from ``dynamic_slice`` of another."""
    axis = m.axis(letter) if letter in m.layout else m.axis("C")
    one = lax.dynamic_slice_in_dim(m.x, m.x.shape[axis] - 1, 1, axis)
    return m.of(lax.dynamic_update_slice_in_dim(m.x, jnp.sin(one), start, axis))


@kind("reshape", 1)
def swapped_axes(m: Map) -> Map:
    """Another layout from here on."""
    layout = m.layout[1:] + m.layout[:1]
    return m.of(jnp.transpose(m.x, [m.layout.index(letter) for letter in layout]), layout)


@kind("reshape", 0.7)
def one_axis_more(m: Map) -> Map:
    """An axis is added, something stacked along it, and it is taken away again."""
    x = jnp.stack([m.x, jnp.sin(m.x)], axis=m.axis("H"))
    x = jnp.squeeze(x[None], 0)
    first, second = (jnp.squeeze(piece, m.axis("H")) for piece in jnp.split(x, 2, m.axis("H")))
    return m.of(first * m.parameter("p") + second)


MERGED = ("width", "pixels", "rows", "classes", "all")


@kind("reshape", 1.5, lambda random, m: {"how": random.choice(MERGED)})
def merged_axes(m: Map, how: str = "width") -> Map:
    """Axes as one, rows and batch among them, and apart again."""
    x, order = _channels_last(m)
    n, h, *others, c = x.shape
    if how == "width":
        y = jnp.tanh(x.reshape(n, h, -1))
    elif how == "pixels":
        y = jax.nn.relu(x.reshape(-1, c) @ m.parameter("w", c, c)) - x.reshape(-1, c)
    elif how == "rows":
        y = jnp.cumsum(x.reshape(n * h, *others, c), 1)
    elif how == "classes":
        y = jax.nn.softmax(x.reshape(-1, c), -1) * jnp.max(x.reshape(-1, c), -1, keepdims=True)
    else:
        y = jax.nn.softplus(x.ravel()) * m.parameter("p")
    return _back(m, y.reshape(x.shape), order)


@kind("reshape", 0.5)
def tiled(m: Map) -> Map:
    """``jnp.tile`` along channels."""
    times = [2 if letter == "C" else 1 for letter in m.layout]
    return m.of(jnp.tile(m.x, times))
