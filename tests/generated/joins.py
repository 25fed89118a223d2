"""Layers made of layers: branches, checkpoints, conditions, loops; barriers, outputs and heads."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from generated.spec import Layer, Map, apply_layers, fitted, kind, nested

Layers = Sequence[Layer]

# --- Branches ------------------------------------------------------------------------------------


@kind("branch", 2)
def residual(m: Map, body: Layers = (), op: str = "add") -> Map:
    y = fitted(apply_layers(body, m, "body."), m.x.shape, m.layout)
    return m.of(m.x * y if op == "mul" else m.x + y)


@kind("branch", 1)
def shortcut(m: Map, body: Layers = (), other: Layers = ()) -> Map:
    """Two branches of which the second is brought to the shape of the first."""
    first = apply_layers(body, m, "body.")
    second = apply_layers(other, m, "other.")
    return first.of(first.x + fitted(second, first.x.shape, first.layout))


@kind("branch", 1.5)
def inception(m: Map, bodies: Sequence[Layers] = ((), ())) -> Map:
    """Branches side by side; the first says the height."""
    first, *others = (apply_layers(b, m, f"{i}.") for i, b in enumerate(bodies))
    found = [first.x]
    for other in others:
        shape = list(first.x.shape)
        shape[first.axis("C")] = other.size("C")
        found.append(fitted(other, shape, first.layout))
    return first.of(jnp.concatenate(found, first.axis("C")))


@kind("branch", 1)
def dense_block(m: Map, bodies: Sequence[Layers] = ((),)) -> Map:
    """Every branch reads all maps before it."""
    for i, body in enumerate(bodies):
        other = apply_layers(body, m, f"{i}.")
        shape = list(m.x.shape)
        shape[m.axis("C")] = other.size("C")
        m = m.of(jnp.concatenate([m.x, fitted(other, shape, m.layout)], m.axis("C")))
    return m


@kind("branch", 1.5, lambda random, m: {"up": random.choice(["resize", "repeat", "transposed"])})
def u_shape(m: Map, body: Layers = (), up: str = "resize", factor: int = 2) -> Map:
    """Down, through a body, up again, joined to the map that was skipped."""
    axis = m.axis("H")
    window = [factor if letter == "H" else 1 for letter in m.layout]
    low = m.of(lax.reduce_window(m.x, -np.inf, lax.max, window, window, "SAME"))
    low = apply_layers(body, low, "body.")
    if up == "repeat":
        high = low.of(jnp.repeat(low.x, factor, axis=low.axis("H")))
    elif up == "resize":
        shape = [
            factor * s if letter == "H" else s
            for letter, s in zip(low.layout, low.x.shape, strict=True)
        ]
        high = low.of(jax.image.resize(low.x, shape, "linear"))
    else:
        rows = low.spatial
        windows = [factor if letter == "H" else 1 for letter in rows]
        weights = low.parameter("up", *windows, low.size("C"), 2)
        numbers = (low.layout, f"{rows}IO", low.layout)
        high = low.of(
            lax.conv_transpose(low.x, weights, windows, "VALID", dimension_numbers=numbers)
        )
    shape = list(m.x.shape)
    shape[m.axis("C")] = high.size("C")
    assert axis == m.axis("H")
    return m.of(jnp.concatenate([m.x, fitted(high, shape, m.layout)], m.axis("C")))


@kind("branch", 0.7)
def sliced_apart(m: Map, body: Layers = (), other: Layers = ()) -> Map:
    """Even and odd rows through bodies of their own, multiplied by each other."""
    axis, height = m.axis("H"), m.size("H")
    even = m.of(lax.slice_in_dim(m.x, 0, height, 2, axis))
    odd = m.of(lax.slice_in_dim(m.x, min(1, height - 1), height, 2, axis))
    first = apply_layers(body, even, "body.")
    second = apply_layers(other, odd, "other.")
    return first.of(first.x * fitted(second, first.x.shape, first.layout))


# --- Functions of their own ----------------------------------------------------------------------

POLICIES = (None, "dots_saveable", "nothing_saveable", "everything_saveable")


@kind("checkpoint", 1.5, lambda random, m: {"policy": random.choice(POLICIES)})
def checkpoint(m: Map, body: Layers = (), policy: str | None = None) -> Map:
    layout = m.layout

    def function(x: Any) -> Any:
        nonlocal layout
        out = nested(body, m.of(x), "body.")
        layout = out.layout
        return out.x

    chosen = None if policy is None else getattr(jax.checkpoint_policies, policy)
    x = jax.checkpoint(function, policy=chosen)(m.x)
    return m.of(x, layout)


@kind("jit", 1)
def jitted(m: Map, body: Layers = ()) -> Map:
    """A jitted function that is called twice."""
    function = jax.jit(lambda x: fitted(nested(body, m.of(x), "body."), m.x.shape, m.layout))
    return m.of(function(m.x) + 0.5 * function(jnp.sin(m.x)))


PREDICATES = ("parameter", "constant", "rows", "integer", "image")


@kind("cond", 1.5, lambda random, m: {"predicate": random.choice(PREDICATES)})
def cond(m: Map, bodies: Sequence[Layers] = ((), ()), predicate: str = "parameter") -> Map:
    """One of two or three branches, which keep the map's shape."""

    def branch(i: int, body: Layers) -> Any:
        def function(x: Any) -> Any:
            return fitted(nested(body, m.of(x), f"{i}."), m.x.shape, m.layout)

        return function

    branches = [branch(i, body) for i, body in enumerate(bodies)]
    if predicate == "parameter":
        index = (m.parameter("p") > 0).astype(np.int32)
    elif predicate == "constant":
        index = jnp.int32(1)
    elif predicate == "rows":
        index = (m.x.sum() > 0).astype(np.int32)
    elif predicate == "integer":
        index = m.integers("i", len(branches))
    else:
        index = (jnp.abs(m.x).max() > 1).astype(np.int32)
    if len(branches) == 2:
        return m.of(lax.cond(index == 1, branches[1], branches[0], m.x))
    return m.of(lax.switch(index, branches, m.x))


def draw_scan(random: Random, m: Map) -> dict[str, Any]:
    return {
        "length": random.choice([2, 3, 1]),
        "kernel": random.choice([3, 1, 2]),
        "reverse": random.choice([False, False, True]),
        "emits": random.choice([False, False, True]),
        "normed": random.choice([False, False, True]),
    }


@kind("scan", 1.5, draw_scan)
def scan_layers(
    m: Map,
    length: int = 2,
    kernel: int = 1,
    reverse: bool = False,
    emits: bool = False,
    normed: bool = False,
) -> Map:
    """The same layer several times, with stacked parameters (as ``nn.scan``)."""
    c, rows = m.size("C"), m.spatial
    windows = [kernel if letter == "H" else 1 for letter in rows]
    weights = m.parameter("w", length, *windows, c, c, scale=(kernel * c) ** -0.5)
    bias = m.parameter("b", length, c)
    numbers = (m.layout, f"{rows}IO", m.layout)

    def step(x: Any, layer: Any) -> Any:
        w, b = layer
        strides = (1,) * len(rows)
        y = lax.conv_general_dilated(x, w, strides, "SAME", dimension_numbers=numbers)
        y = jnp.tanh(y + m.broadcast(b, "C"))
        if normed:
            y = y - y.mean(m.axes("NHWD"), keepdims=True)
        return x + y, (y if emits else None)

    x, every = lax.scan(step, m.x, (weights, bias), reverse=reverse)
    return m.of(x + every.sum(0) if emits else x)


@kind("scan_rows", 0.8, lambda random, m: {"reverse": random.choice([False, True])})
def scan_along_rows(m: Map, reverse: bool = False) -> Map:
    """A recurrence down (or up) the rows."""
    rows = jnp.moveaxis(m.x, m.axis("H"), 0)
    p = m.parameter("p", scale=0.5)

    def step(state: Any, row: Any) -> Any:
        state = jnp.tanh(p * state + row)
        return state, state

    _, out = lax.scan(step, jnp.zeros_like(rows[0]), rows, reverse=reverse)
    return m.of(jnp.moveaxis(out, 0, m.axis("H")))


@kind("loop", 1, lambda random, m: {"how": random.choice(["fori", "while", "map", "vmap"])})
def loop(m: Map, how: str = "fori") -> Map:
    if how == "fori":
        return m.of(lax.fori_loop(0, 3, lambda i, x: jnp.sin(x) + 0.1 * i, m.x))
    if how == "while":
        start = jnp.abs(lax.stop_gradient(m.parameter("p"))) + 0.5
        found = lax.while_loop(lambda v: v < 2, lambda v: v * 1.5, start)
        return m.of(m.x * found)
    each = functools.partial(jnp.moveaxis, destination=m.axis("N"))
    images = jnp.moveaxis(m.x, m.axis("N"), 0)
    p = m.parameter("p")
    mapped = lax.map if how == "map" else lambda f, xs: jax.vmap(f)(xs)
    return m.of(each(mapped(lambda image: jnp.tanh(image * p), images), 0))


@kind(
    "debug", 1, lambda random, m: {"how": random.choice(["callback", "print", "rows", "ordered"])}
)
def debug(m: Map, how: str = "callback") -> Map:
    """Callbacks that give nothing back."""
    if how == "print":
        jax.debug.print("", m.x.mean())
    elif how == "rows":
        jax.debug.callback(lambda x: None, m.x)
    else:
        jax.debug.callback(lambda v: None, m.x.mean(), ordered=how == "ordered")
    return m


@kind("name", 3, lambda random, m: {"name": random.choice("abc")})
def name(m: Map, name: str = "a") -> Map:
    return m.of(checkpoint_name(m.x, name))


# --- Barriers ------------------------------------------------------------------------------------


@kind("barrier", 2)
def batch_norm(m: Map) -> Map:
    axes = m.axes("NHWD")
    mean = m.x.mean(axes, keepdims=True)
    variance = ((m.x - mean) ** 2).mean(axes, keepdims=True)
    normed = (m.x - mean) * lax.rsqrt(variance + 0.1)
    c = m.size("C")
    gain, bias = m.parameter("g", c, offset=1.0), m.parameter("b", c)
    return m.of(normed * m.broadcast(gain, "C") + m.broadcast(bias, "C"))


def draw_norm(random: Random, m: Map) -> dict[str, Any]:
    return {"axes": random.choice(["HWD", "HWDC", "H", "NHWDC"]), "fast": random.choice([0, 1])}


@kind("barrier", 2, draw_norm)
def norm(m: Map, axes: str = "HWD", fast: int = 0) -> Map:
    """Instance, layer and other norms; fast: the variance from the mean of squares."""
    over = m.axes(axes)
    mean = m.x.mean(over, keepdims=True)
    if fast:
        variance = (m.x * m.x).mean(over, keepdims=True) - mean * mean
    else:
        variance = jnp.var(m.x, over, keepdims=True)
    return m.of((m.x - mean) / jnp.sqrt(variance + 0.1) * m.parameter("g", offset=1.0))


@kind("barrier", 1, lambda random, m: {"groups": random.choice([1, 2])})
def group_norm(m: Map, groups: int = 1) -> Map:
    c = m.axis("C")
    groups = groups if m.size("C") % groups == 0 else 1
    shape = (*m.x.shape[:c], groups, m.size("C") // groups, *m.x.shape[c + 1 :])
    x = m.x.reshape(shape)
    over = tuple(a for a in range(x.ndim) if a not in (c, m.axis("N") + (m.axis("N") > c)))
    mean, variance = x.mean(over, keepdims=True), x.var(over, keepdims=True)
    return m.of(((x - mean) * lax.rsqrt(variance + 0.1)).reshape(m.x.shape))


def draw_excite(random: Random, m: Map) -> dict[str, Any]:
    return {"pooled": random.choice(["mean", "max", "sum", "min"]), "hidden": random.choice([0, 2])}


@kind("barrier", 2, draw_excite)
def squeeze_excite(m: Map, pooled: str = "mean", hidden: int = 0) -> Map:
    c, over = m.size("C"), m.axes("HWD")
    x = {"mean": jnp.mean, "max": jnp.max, "sum": jnp.sum, "min": jnp.min}[pooled](m.x, axis=over)
    batch_first = "".join(letter for letter in m.layout if letter in "NC") == "NC"
    x = x if batch_first else x.T
    if hidden:
        x = jax.nn.relu(x @ m.parameter("v", c, hidden) + 0.5) @ m.parameter("w", hidden, c)
    else:
        x = x @ m.parameter("w", c, c)
    return m.of(m.x * m.broadcast(jax.nn.sigmoid(x), "NC"))


OVER_ROWS = (
    "flip", "cumsum", "cummax", "softmax", "logsumexp", "gate", "sort", "argmax", "max", "prod",
    "attention", "rows_matrix", "rolled_mean", "fft", "std", "cumprod", "any", "median",
)  # fmt: skip


@kind("barrier", 4, lambda random, m: {"how": random.choice(OVER_ROWS)})
def over_rows(m: Map, how: str = "flip") -> Map:
    """What needs all rows, or a great many."""
    x, axis, height = m.x, m.axis("H"), m.size("H")
    if how == "flip":
        return m.of(jnp.flip(x, axis))
    if how == "cumsum":
        return m.of(jnp.cumsum(x, axis) / height)
    if how == "cummax":
        return m.of(lax.cummax(x, axis))
    if how == "cumprod":
        return m.of(jnp.cumprod(1 + 0.1 * jnp.tanh(x), axis))
    if how == "softmax":
        return m.of(x * jax.nn.softmax(x, axis) * height)
    if how == "logsumexp":
        return m.of(x - jax.nn.logsumexp(x, m.axes("HWD"), keepdims=True))
    if how == "gate":
        weights = jax.nn.softmax(
            jnp.tensordot(x, m.parameter("q", m.size("C")), [[m.axis("C")], [0]])
        )
        return m.of(
            x + (x * jnp.expand_dims(weights, m.axis("C"))).sum(m.axes("HWD"), keepdims=True)
        )
    if how == "sort":
        return m.of(jnp.sort(x, axis) + 0.3 * x)
    if how == "argmax":
        return m.of(x * (1 + jnp.argmax(x, axis, keepdims=True) / height))
    if how == "max":
        return m.of(x - 0.5 * x.max(m.axes("HWD"), keepdims=True))
    if how == "prod":
        return m.of(x * jnp.prod(1 + 0.1 * jnp.tanh(x), axis, keepdims=True))
    if how == "attention":
        rows = jnp.moveaxis(x, axis, -1)
        weights = jax.nn.softmax(jnp.expand_dims(rows, -1) * jnp.expand_dims(rows, -2))
        return m.of(x + jnp.moveaxis((weights * jnp.expand_dims(rows, -2)).sum(-1), -1, axis))
    if how == "rows_matrix":
        matrix = m.parameter("w", height, height, scale=height**-0.5)
        return m.of(jnp.moveaxis(jnp.tensordot(x, matrix, [[axis], [0]]), -1, axis))
    if how == "rolled_mean":
        return m.of(0.5 * (x + jnp.roll(x, 1, axis)))
    if how == "fft":
        return m.of(jnp.fft.fft(x, axis=axis).real / height**0.5 + x)
    if how == "std":
        # A square root has no derivative at 0, which the variance of equal elements is, or is not
        # by a rounding.
        variance = jnp.var(x, m.axes("HWD"), keepdims=True)
        return m.of(x / (jnp.sqrt(variance + 1e-6) + 0.2))
    if how == "any":
        return m.of(jnp.where((x > 1).any(axis, keepdims=True), x, 0.5 * x))
    return m.of(x - jnp.median(x, axis, keepdims=True))


OTHER_HEIGHTS = ("wrap", "crop", "crop_each", "picked", "doubled", "sorted", "rolled")


@kind("barrier", 2.5, lambda random, m: {"how": random.choice(OTHER_HEIGHTS)})
def other_height(m: Map, how: str = "wrap") -> Map:
    """What needs all rows and makes a map of another height, by whose rows all goes on."""
    x, axis, height = m.x, m.axis("H"), m.size("H")
    first = lax.slice_in_dim(x, 0, 1, axis=axis)
    if how == "wrap":
        last = lax.slice_in_dim(x, max(height - 2, 0), None, axis=axis)
        return m.of(jnp.concatenate([last, x, first], axis))
    if how == "doubled":
        return m.of(jnp.concatenate([x, jnp.sin(x)], axis))
    if how == "sorted":
        return m.of(lax.slice_in_dim(jnp.sort(x, axis), height // 3, None, axis=axis))
    if how == "rolled":
        return m.of(jnp.roll(x, m.integers("shift", height), axis))
    kept = max(height - 3, 1)
    start = m.integers("start", height - kept + 1)
    if how == "crop":
        return m.of(lax.dynamic_slice_in_dim(x, start, kept, axis))
    if how == "picked":
        return m.of(jnp.take(x, m.integers("rows", height, kept), axis=axis))
    images = m.axis("N")
    each = jnp.stack([start, 0 * start, *[start] * m.size("N")])[: m.size("N")]
    inner = axis - (images < axis)

    def cut(image: Any, start: Any) -> Any:
        return lax.dynamic_slice_in_dim(image, start, kept, inner)

    return m.of(jax.vmap(cut, (images, 0), images)(x, each))


# --- Outputs -------------------------------------------------------------------------------------

OUTPUTS = ("map", "sum", "mean", "max", "rows", "argmax", "count", "half")


@kind("output", 2, lambda random, m: {"how": random.choice(OUTPUTS)})
def output(m: Map, how: str = "map") -> Map:
    """Something that the network gives besides its last map."""
    x, axis = m.x, m.axis("H")
    made = {
        "map": lambda: x,
        "sum": lambda: jnp.sin(x).sum(),
        "mean": lambda: (x * x).mean(m.axes("HWD")),
        "max": lambda: x.max(),
        "rows": lambda: x.sum(m.axes("WDC")),
        "argmax": lambda: jnp.argmax(x, m.axis("C")),
        "count": lambda: (x > 0.2).sum(),
        "half": lambda: lax.slice_in_dim(x, 0, x.shape[axis], 2, axis) * 2,
    }[how]()
    m.output(made)
    return m


HEADS = ("map", "map", "square", "pool", "flatten", "sum", "max", "loss", "rows", "several")


@kind("head", 0, lambda random, m: {"how": random.choice(HEADS)})
def head(m: Map, how: str = "map") -> Any:
    x = m.x
    if how == "map":
        return x
    if how == "square":
        return (x * x).mean()
    if how == "sum":
        return jnp.sin(x).sum(m.axes("HWDC"))
    if how == "max":
        return x.max(m.axes("HWD"))
    if how == "rows":
        return (x * x).sum(m.axes("WDC"))
    if how == "flatten":
        flat = jnp.moveaxis(x, m.axis("N"), 0).reshape(m.size("N"), -1)
        return flat @ m.parameter("w", flat.shape[1], 2)
    pooled = x.mean(m.axes("HWD"))
    if pooled.shape != (m.size("N"), m.size("C")) or m.axis("N") > m.axis("C"):
        pooled = pooled.T
    logits = pooled @ m.parameter("w", m.size("C"), 2)
    if how == "pool":
        return logits
    if how == "loss":
        labels = m.integers("labels", 2, m.size("N"))
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()
    return {"map": x, "pooled": pooled, "sum": jnp.sin(x).sum(), "max": x.max()}
