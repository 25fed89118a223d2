"""Layers that act on every row alone: functions of elements, channels and widths."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy import special

from generated.spec import Map, kind

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "leaky": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "relu6": jax.nn.relu6,
    "hard_swish": jax.nn.hard_swish,
    "maximum": lambda x: jnp.maximum(x, 0),
    "clip": lambda x: jnp.clip(x, -0.7, 0.9),
    "signs": lambda x: jnp.where(x > 0, 1.0, -1.0) * x,
    "where": lambda x: jnp.where(x > 0.1, x, 0.2 * x),
    "square": lambda x: x**2 / 2,
    "negative": lambda x: -x,
    "literal": lambda x: 0.5 * x + 1.0,
}

# One for each primitive, within its domain.
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "abs": jnp.abs,
    "acos": lambda x: jnp.arccos(0.9 * jnp.tanh(x)),
    "acosh": lambda x: jnp.arccosh(1.1 + x * x),
    "asin": lambda x: jnp.arcsin(0.9 * jnp.tanh(x)),
    "asinh": jnp.arcsinh,
    "atan": jnp.arctan,
    "atan2": lambda x: jnp.arctan2(x, 1 + x * x),
    "atanh": lambda x: jnp.arctanh(0.9 * jnp.tanh(x)),
    "bessel": lambda x: special.i0e(x) + special.i1e(x),
    "cbrt": lambda x: jnp.cbrt(x * x + 0.3),
    "ceil": lambda x: x - jnp.ceil(x),
    "floor": lambda x: x * jnp.floor(x) / 4,
    "round": lambda x: x + jnp.round(x),
    "cos": jnp.cos,
    "cosh": lambda x: jnp.cosh(jnp.tanh(x)),
    "digamma": lambda x: special.digamma(x * x + 1),
    "erf": lambda x: special.erf(x) + special.erfc(x / 2),
    "erf_inv": lambda x: special.erfinv(0.9 * jnp.tanh(x)),
    "exp": lambda x: jnp.exp(-x * x),
    "exp2": lambda x: jnp.exp2(jnp.tanh(x)),
    "expm1": lambda x: jnp.expm1(jnp.tanh(x)),
    "igamma": lambda x: special.gammainc(1.5, x * x + 0.2),
    "integer_pow": lambda x: x**3 / 4,
    "is_finite": lambda x: jnp.where(jnp.isfinite(x), x, 0.0),
    "lgamma": lambda x: special.gammaln(x * x + 1),
    "log1p": lambda x: jnp.log1p(x * x),
    "logistic": lax.logistic,
    "min": lambda x: jnp.minimum(x, 0.5) + lax.min(x, -0.5 * x),
    "nextafter": lambda x: x * lax.nextafter(lax.stop_gradient(x), 9.0),
    "pow": lambda x: (x * x + 0.3) ** 1.5,
    "reduce_precision": lambda x: lax.reduce_precision(x, 11, 52),
    "rem": lambda x: jnp.fmod(x, 0.7) + x,
    "select_n": lambda x: lax.select_n((x > 0.2).astype(np.int32) + (x > 1), x, 2 * x, x * x),
    "clamp": lambda x: lax.clamp(-0.5, x, 0.5) + x,
    "sign": lambda x: jnp.sign(x) * x,
    "sin": jnp.sin,
    "sinh": lambda x: jnp.sinh(jnp.tanh(x)),
    "stop_gradient": lambda x: x * lax.stop_gradient(jnp.cos(x)),
    "tan": lambda x: jnp.tan(0.5 * jnp.tanh(x)),
    "bits": lambda x: x * (((x * 8).astype(np.int32) & 3) ^ 1),
    "shifts": lambda x: x * ((jnp.abs(x) * 8).astype(np.int32) << 1 >> 2) / 4,
    "count": lambda x: x * lax.population_count((jnp.abs(x) * 8).astype(np.uint32)) / 2,
    "copysign": lambda x: jnp.copysign(1.0 + x * x, x),
    "logaddexp": lambda x: jnp.logaddexp(x, 0.3),
    "hypot": lambda x: jnp.hypot(x, 1.0),
    "single": lambda x: x + x.astype(np.float32).astype(np.float64),
    "barrier": lax.optimization_barrier,
    "log_sigmoid": jax.nn.log_sigmoid,
    "polynomial": lambda x: jnp.polyval(jnp.array([0.1, 0.2, 1.0, 0.0]), x),
    "sinc": jnp.sinc,
}

# Finite on the image's rows; something else where rows hold what no layer made.
POLES: dict[str, Callable[[Any, Any], Any]] = {
    "log": lambda x, p: jnp.log(x * x + 0.05) * p,
    "log_abs": lambda x, p: jnp.log(jnp.abs(x) + p * p),
    "reciprocal": lambda x, p: p / (x * x + 0.1),
    "divide": lambda x, p: x / (p * p + jnp.abs(x)),
    "xlogy": lambda x, p: special.xlogy(p, jax.nn.softplus(x)),
    "xlogy_rows": lambda x, p: special.xlogy(x * x + 0.1, p * p + 0.1),
    "rsqrt": lambda x, p: lax.rsqrt(x * x + 0.1 * p * p),
    "sqrt": lambda x, p: jnp.sqrt(x * x * p * p + 0.01),
    "power": lambda x, p: (x * x + 0.1) ** p,
    "log1m": lambda x, p: p * jnp.log(1 - jax.nn.sigmoid(x)),
    "norm": lambda x, p: x / jnp.sqrt(x * x + p * p),
    "entropy": lambda x, p: p * special.entr(jax.nn.sigmoid(x)),
    "double_where": lambda x, p: jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1.0)) * p, x),
}


@kind("act", 6, lambda random, m: {"name": random.choice(list(ACTIVATIONS))})
def act(m: Map, name: str = "relu") -> Map:
    return m.of(ACTIVATIONS[name](m.x))


@kind("function", 3, lambda random, m: {"name": random.choice(list(FUNCTIONS))})
def function(m: Map, name: str = "abs") -> Map:
    return m.of(FUNCTIONS[name](m.x))


@kind("pole", 2, lambda random, m: {"name": random.choice(list(POLES))})
def pole(m: Map, name: str = "log") -> Map:
    return m.of(POLES[name](m.x, m.parameter("p", offset=0.8, scale=0.2)))


BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "mul": jnp.multiply,
    "add": jnp.add,
    "sub": lambda x, p: p - x,
    "max": jnp.maximum,
    "div": lambda x, p: x / (1 + p * p),
    "where": lambda x, p: jnp.where(p > 0, x, 0.5 * p),
    "greater": lambda x, p: jnp.where(x > p, x, p),
    "tanh": lambda x, p: jnp.tanh(x * p),
}
# Axes of the parameter that meets the map; those with rows are read row by row.
LETTERS = ("C", "", "W", "CW", "H", "HC", "HWC", "NHWC")


def draw_scale(random: Random, m: Map) -> dict[str, Any]:
    return {"op": random.choice(list(BINARY)), "letters": random.choice(LETTERS)}


@kind("scale", 4, draw_scale)
def scale(m: Map, op: str = "mul", letters: str = "C") -> Map:
    """With a parameter for some of the axes."""
    letters = "".join(letter for letter in letters if letter in m.layout)
    values = m.parameter("p", *(m.size(letter) for letter in letters), offset=0.5)
    return m.of(BINARY[op](m.x, m.broadcast(values, letters)))


def draw_dense(random: Random, m: Map) -> dict[str, Any]:
    return {
        "features": random.choice([1, 2, 3]),
        "how": random.choice(["tensordot", "einsum", "width"]),
    }


@kind("dense", 3, draw_dense)
def dense(m: Map, features: int = 1, how: str = "tensordot") -> Map:
    """A product with a matrix over channels, or over the width."""
    letter = "W" if how == "width" and "W" in m.layout else "C"
    axis = m.axis(letter)
    weights = m.parameter("w", m.size(letter), features, scale=m.size(letter) ** -0.5)
    if how == "einsum":
        lower = m.layout.lower()
        out = lower.replace("c", "o")
        return m.of(jnp.einsum(f"{lower},co->{out}", m.x, weights))
    x = jnp.tensordot(m.x, weights, [[axis], [0]])
    return m.of(jnp.moveaxis(x, -1, axis))


ROW_NORMS = ("layer", "softmax_channels", "softmax_row", "rms", "unit", "centre", "logsumexp")


@kind("norm", 2, lambda random, m: {"how": random.choice(ROW_NORMS)})
def row_norm(m: Map, how: str = "layer") -> Map:
    """Statistics of a pixel or of a row."""
    pixel, row = m.axes("C"), m.axes("WDC")
    x = m.x
    if how == "layer":
        mean, variance = x.mean(pixel, keepdims=True), x.var(pixel, keepdims=True)
        return m.of((x - mean) * lax.rsqrt(variance + 0.1) * m.parameter("g", offset=1.0))
    if how == "softmax_channels":
        return m.of(jax.nn.softmax(x, axis=pixel) * x)
    if how == "softmax_row":
        return m.of(jax.nn.softmax(x, axis=row) * x)
    if how == "rms":
        return m.of(x / jnp.sqrt((x * x).mean(row, keepdims=True) + 0.1))
    if how == "unit":
        return m.of(x / jnp.sqrt(jnp.sum(x * x, pixel, keepdims=True) + 0.1))
    if how == "centre":
        return m.of(x - x.mean(row, keepdims=True))
    return m.of(x - jax.nn.logsumexp(x, axis=pixel, keepdims=True))


CHANNEL_OPS = (
    "sort", "cumsum", "cumprod", "cummax", "flip", "take", "top", "argmax", "one_hot", "roll",
    "split", "scatter", "along", "max", "prod", "median",
)  # fmt: skip


def draw_channels(random: Random, m: Map) -> dict[str, Any]:
    return {"op": random.choice(CHANNEL_OPS), "letter": random.choice(["C", "W"])}


@kind("index", 3, draw_channels)
def channels(m: Map, op: str = "sort", letter: str = "C") -> Map:
    """Along channels or width: orders, sums, picks."""
    axis = m.axis(letter if letter in m.layout else "C")
    x, size = m.x, m.x.shape[m.axis(letter if letter in m.layout else "C")]
    weights = jnp.arange(1.0, size + 1).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    if op == "sort":
        return m.of(jnp.sort(x, axis) * weights)
    if op == "cumsum":
        return m.of(jnp.cumsum(x, axis) / size)
    if op == "cumprod":
        return m.of(jnp.cumprod(jnp.tanh(x) + 1.1, axis))
    if op == "cummax":
        return m.of(lax.cummax(x, axis))
    if op == "flip":
        return m.of(jnp.flip(x, axis) * weights)
    if op == "take":
        return m.of(jnp.take(x, np.array([size - 1, 0, size // 2]), axis=axis))
    if op == "top":
        values = lax.top_k(jnp.moveaxis(x, axis, -1), 1)[0]
        return m.of(jnp.moveaxis(values, -1, axis) + 0.5 * x)
    if op == "argmax":
        return m.of(x * (1 + jnp.argmax(x, axis, keepdims=True)))
    if op == "one_hot":
        picked = jax.nn.one_hot(jnp.argmin(x, axis), size, axis=axis, dtype=x.dtype)
        return m.of(x * (1 + picked))
    if op == "roll":
        return m.of(jnp.roll(x, 1, axis) + 0.5 * x)
    if op == "split":
        first, second = jnp.split(jnp.concatenate([x, jnp.cos(x)], axis), 2, axis)
        return m.of(first * second)
    if op == "scatter":
        index = (slice(None),) * axis + (np.array([0, size - 1]),)
        return m.of(x.at[index].add(jnp.sin(x[index])))
    if op == "along":
        order = jnp.argsort(lax.stop_gradient(x), axis)
        return m.of(jnp.take_along_axis(x, order, axis) * weights)
    if op == "max":
        return m.of(x - 0.5 * x.max(axis, keepdims=True))
    if op == "prod":
        return m.of(x + jnp.prod(jnp.tanh(x) + 0.5, axis, keepdims=True))
    return m.of(x - jnp.median(x, axis, keepdims=True))


@kind("attention", 1)
def row_attention(m: Map) -> Map:
    """Attention among the pixels of a row."""
    if "W" not in m.layout or "D" in m.layout:
        return m
    x = jnp.transpose(m.x, m.axes("NHWC"))
    scores = jnp.einsum("nhwc,nhvc->nhwv", x * m.parameter("q"), x)
    x = x + jnp.einsum("nhwv,nhvc->nhwc", jax.nn.softmax(scores), x)
    return m.of(jnp.transpose(x, ["NHWC".index(letter) for letter in m.layout]))


@kind("position", 1.5, lambda random, m: {"how": random.choice(["rows", "linspace", "parity"])})
def position(m: Map, how: str = "rows") -> Map:
    """Something that depends on the row's number."""
    axis, height = m.axis("H"), m.size("H")
    if how == "rows":
        return m.of(m.x * (1 + lax.broadcasted_iota(m.x.dtype, m.x.shape, axis) / 8))
    if how == "linspace":
        return m.of(m.x + m.broadcast(jnp.linspace(-1.0, 1.0, height), "H"))
    return m.of(jnp.where(m.broadcast(jnp.arange(height) % 2 == 0, "H"), m.x, jnp.sin(m.x)))


@kind("random", 1.5, lambda random, m: {"how": random.choice(["dropout", "normal", "key", "bits"])})
def noise(m: Map, how: str = "dropout") -> Map:
    """Random numbers of the map's shape; the key is a constant, or an argument."""
    key = jax.random.key(3)
    shape = m.x.shape
    if how == "key":
        key = jax.random.wrap_key_data(m.integers("key", 2**31 - 1, 2).astype(np.uint32))
    if how == "normal":
        return m.of(m.x + jax.random.normal(key, shape, m.x.dtype))
    if how == "bits":
        return m.of(m.x * (jax.random.bits(key, shape, np.uint32) & 3))
    keep = jax.random.bernoulli(key, 0.7, shape)
    return m.of(jnp.where(keep, m.x / 0.7, 0.0))


@kind("complex", 1.5, lambda random, m: {"how": random.choice(["fft", "rfft", "mul", "abs"])})
def complex_(m: Map, how: str = "mul") -> Map:
    """Complex values within a row."""
    axis = m.axis("W" if "W" in m.layout else "C")
    x, size = m.x, m.x.shape[axis]

    def factor(count: int) -> Any:
        p = m.parameter("p", 2, count)
        shape = [-1 if a == axis else 1 for a in range(x.ndim)]
        return lax.complex(p[0], p[1]).reshape(shape)

    if how == "fft":
        return m.of(jnp.fft.ifft(jnp.fft.fft(x, axis=axis) * factor(size), axis=axis).real)
    if how == "rfft":
        spectrum = jnp.fft.rfft(x, axis=axis) * factor(size // 2 + 1)
        return m.of(jnp.fft.irfft(spectrum, size, axis=axis))
    made = lax.complex(x, jnp.sin(x)) * factor(size)
    if how == "abs":
        return m.of(jnp.abs(made + 0.1) + jnp.conj(made).imag)
    return m.of(made.real + made.imag)


# --- Images that come in later -------------------------------------------------------------------

IMAGES = ("mask", "labels", "bool", "one_hot", "rows", "frozen", "concatenate")


@kind("image", 2, lambda random, m: {"how": random.choice(IMAGES)})
def second_image(m: Map, how: str = "mask") -> Map:
    """Another argument that carries rows, at this map's height."""
    shape, axis = m.x.shape, m.axis("H")

    def normal(generator: Any) -> Any:
        return generator.standard_normal(shape)

    if how == "mask":
        return m.of(m.x * m.image("y", normal, axis))
    if how == "concatenate":
        return m.of(jnp.concatenate([m.x, m.image("y", normal, axis)], m.axis("C")))
    if how == "bool":
        mask = m.image("y", lambda generator: generator.random(shape) < 0.6, axis)
        return m.of(jnp.where(mask, m.x, 0.0))
    if how == "rows":
        column = m.image("y", lambda generator: generator.standard_normal(shape[axis]), 0)
        return m.of(m.x * m.broadcast(column, "H"))
    if how == "frozen":
        table = m.net.generator("frozen").standard_normal(shape)
        return m.of(m.x + table)
    c = m.axis("C")
    without = shape[:c] + shape[c + 1 :]
    row_axis = axis - (c < axis)
    labels = m.image(
        "y", lambda generator: generator.integers(0, shape[c], without, dtype=np.int32), row_axis
    )
    if how == "one_hot":
        return m.of(m.x * (1 + jax.nn.one_hot(labels, shape[c], axis=c, dtype=m.x.dtype)))
    chosen = jnp.take_along_axis(m.x, jnp.expand_dims(labels, c), c)
    return m.of(m.x - 0.5 * chosen)
