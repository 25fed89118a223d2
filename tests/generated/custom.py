"""Layers with derivatives of their own."""

from __future__ import annotations

from random import Random
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from generated.spec import Map, kind

# --- custom_vjp ----------------------------------------------------------------------------------


def _with_vjp(function: Any, forward: Any, backward: Any) -> Any:
    wrapped = jax.custom_vjp(function)
    wrapped.defvjp(forward, backward)
    return wrapped


ELEMENTWISE = ("surrogate", "scaled", "two", "parameter", "signed", "unused", "relu", "pole")


@kind("custom", 2, lambda random, m: {"how": random.choice(ELEMENTWISE)})
def custom_elementwise(m: Map, how: str = "surrogate") -> Map:
    """Each row of the gradient comes from the same row alone."""
    if how == "surrogate":
        f = _with_vjp(
            lambda x: jnp.where(x > 0, 1.0, 0.0) + x,
            lambda x: (jnp.where(x > 0, 1.0, 0.0) + x, x),
            lambda x, g: (g / (1 + x * x),),
        )
        return m.of(f(m.x))
    if how == "scaled":
        f = _with_vjp(lambda x: x, lambda x: (x, None), lambda _, g: (0.3 * g,))
        return m.of(f(m.x))
    if how == "relu":
        f = _with_vjp(
            lambda x: jnp.maximum(x, 0), lambda x: (jnp.maximum(x, 0), x > 0),
            lambda mask, g: (jnp.where(mask, g, 0.1 * g),),
        )  # fmt: skip
        return m.of(f(m.x))
    if how == "signed":
        f = _with_vjp(jnp.sign, lambda x: (jnp.sign(x), x), lambda x, g: (g * jnp.cos(x),))
        return m.of(f(m.x) + m.x)
    if how == "pole":
        f = _with_vjp(
            lambda x: jnp.log(jnp.abs(x) + 0.0), lambda x: (jnp.log(jnp.abs(x)), x),
            lambda x, g: (g / x,),
        )  # fmt: skip
        return m.of(f(m.x * m.x + 0.2))
    if how == "two":
        f = _with_vjp(
            lambda x, y: x * y,
            lambda x, y: (x * y, (x, y)),
            lambda xy, g: (g * xy[1], 2 * g * xy[0]),
        )
        return m.of(f(m.x, jnp.sin(m.x)))
    if how == "unused":
        f = _with_vjp(
            lambda x, p: x + 1, lambda x, p: (x + 1, p), lambda p, g: (g, jnp.zeros_like(p))
        )
        return m.of(f(m.x, m.parameter("p")) * m.parameter("q"))
    f = _with_vjp(
        lambda x, p: jnp.tanh(x * p),
        lambda x, p: (jnp.tanh(x * p), (x, p)),
        lambda xp, g: (g * xp[1], (g * xp[0]).sum()),
    )
    return m.of(f(m.x, m.parameter("p", offset=0.5)))


REDUCING = ("inorm", "rows", "mean_gradient", "bn", "max", "position", "normed_parameter")


@kind("custom_reducing", 1.5, lambda random, m: {"how": random.choice(REDUCING)})
def custom_reducing(m: Map, how: str = "inorm") -> Map:
    """Sums over rows inside, forward or backward, that go back to rows."""
    over = m.axes("HWD")

    def centred(x: Any) -> Any:
        return x - x.mean(over, keepdims=True)

    if how == "inorm":
        f = _with_vjp(centred, lambda x: (centred(x), None), lambda _, g: (centred(g),))
        return m.of(f(m.x))
    if how == "rows":
        axis = m.axis("H")
        g = _with_vjp(
            lambda x: jnp.cumsum(x, axis), lambda x: (jnp.cumsum(x, axis), None),
            lambda _, g: (jnp.flip(jnp.cumsum(jnp.flip(g, axis), axis), axis),),
        )  # fmt: skip
        return m.of(g(m.x) / m.size("H"))
    if how == "mean_gradient":
        f = _with_vjp(jnp.sin, lambda x: (jnp.sin(x), x), lambda x, g: (centred(g * jnp.cos(x)),))
        return m.of(f(m.x))
    if how == "max":
        f = _with_vjp(
            lambda x: x / (1 + jnp.abs(x).max()), lambda x: (x / (1 + jnp.abs(x).max()), x),
            lambda x, g: (g / (1 + jnp.abs(x).max()),),
        )  # fmt: skip
        return m.of(f(m.x))
    if how == "position":
        axis = m.axis("H")

        def ramp(x: Any) -> Any:
            return x * (1 + lax.broadcasted_iota(x.dtype, x.shape, axis))

        f = _with_vjp(ramp, lambda x: (ramp(x), None), lambda _, g: (ramp(g) / 2,))
        return m.of(f(m.x))
    p = m.parameter("p", m.size("C"), offset=1.0)
    if how == "bn":

        def normed(x: Any, p: Any) -> Any:
            mean, variance = (
                x.mean(m.axes("NHWD"), keepdims=True),
                x.var(m.axes("NHWD"), keepdims=True),
            )
            return (x - mean) * lax.rsqrt(variance + 0.1) * m.broadcast(p, "C")

        def backward(saved: Any, g: Any) -> Any:
            return jax.vjp(normed, *saved)[1](g)

        f = _with_vjp(normed, lambda x, p: (normed(x, p), (x, p)), backward)
        return m.of(f(m.x, p))
    f = _with_vjp(
        lambda x, p: x * m.broadcast(p / jnp.sqrt((p * p).sum() + 0.1), "C"),
        lambda x, p: (x * m.broadcast(p / jnp.sqrt((p * p).sum() + 0.1), "C"), (x, p)),
        lambda xp, g: (g * m.broadcast(xp[1], "C"), (g * xp[0]).sum(m.axes("NHWD"))),
    )
    return m.of(f(m.x, p))


NONLINEAR = ("clip", "sign", "normalised", "tanh_sum", "square_sum", "tanh", "constant", "count")


@kind("custom_nonlinear", 1.5, lambda random, m: {"how": random.choice(NONLINEAR)})
def custom_nonlinear(m: Map, how: str = "clip") -> Map:
    """Backward passes that are not linear in the cotangent."""
    p = m.parameter("p", offset=1.0)

    def of_rows(backward: Any) -> Map:
        f = _with_vjp(lambda x: jnp.sin(x) + x, lambda x: (jnp.sin(x) + x, x), backward)
        return m.of(f(m.x))

    def of_parameter(backward: Any) -> Map:
        f = _with_vjp(
            lambda x, p: x * p,
            lambda x, p: (x * p, (x, p)),
            lambda xp, g: (g * xp[1], backward(xp[0], g)),
        )
        return m.of(f(m.x, p))

    if how == "clip":
        return of_rows(lambda x, g: (jnp.clip(g, -0.3, 0.3),))
    if how == "sign":
        return of_rows(lambda x, g: (jnp.sign(g) * jnp.cos(x),))
    if how == "tanh":
        return of_rows(lambda x, g: (jnp.tanh(g),))
    if how == "normalised":
        return of_rows(lambda x, g: (g / jnp.sqrt((g * g).sum() + 0.1),))
    if how == "tanh_sum":
        return of_parameter(lambda x, g: jnp.tanh((g * x).sum()))
    if how == "square_sum":
        return of_parameter(lambda x, g: (g * x).sum() ** 2)
    if how == "constant":
        return of_parameter(lambda x, g: jnp.ones(()))
    return of_parameter(lambda x, g: (g != 0).sum().astype(g.dtype))


# --- custom_jvp ----------------------------------------------------------------------------------

JVP = ("elementwise", "parameter", "inorm", "zero", "relu_like", "two_outputs", "row_mean")


def draw_jvp(random: Random, m: Map) -> dict[str, Any]:
    return {"how": random.choice(JVP)}


@kind("custom_jvp", 2, draw_jvp)
def custom_jvp(m: Map, how: str = "elementwise") -> Map:
    over = m.axes("HWD")
    if how == "parameter":
        f = jax.custom_jvp(lambda x, p: jnp.sin(x * p))
        f.defjvps(
            lambda t, out, x, p: t * p * jnp.cos(x * p),
            lambda t, out, x, p: 0.5 * t * x * jnp.cos(x * p),
        )
        return m.of(f(m.x, m.parameter("p", offset=0.5)))
    if how == "two_outputs":
        pair = jax.custom_jvp(lambda x: (jnp.sin(x), x * x))

        @pair.defjvp
        def pair_jvp(primals: Any, tangents: Any) -> Any:
            (x,), (t,) = primals, tangents
            return pair(x), (t * jnp.cos(x), t * x)

        first, second = pair(m.x)
        return m.of(first + second)
    bodies: dict[str, tuple[Any, Any]] = {
        "elementwise": (jnp.tanh, lambda t, out, x: t * (1 - out * out) * 0.7),
        "zero": (lambda x: x + jnp.round(x), lambda t, out, x: t),
        "relu_like": (
            lambda x: jnp.maximum(x, 0.1),
            lambda t, out, x: jnp.where(x > 0, t, 0.2 * t),
        ),
        "inorm": (
            lambda x: x - x.mean(over, keepdims=True),
            lambda t, out, x: t - t.mean(over, keepdims=True),
        ),
        "row_mean": (
            lambda x: x - x.mean(m.axes("WC"), keepdims=True),
            lambda t, out, x: t - 0.5 * t.mean(m.axes("WC"), keepdims=True),
        ),
    }
    function, tangent = bodies[how]
    f = jax.custom_jvp(function)
    f.defjvps(tangent)
    return m.of(f(m.x))
