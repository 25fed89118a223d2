"""Maxima and minima whose derivatives say which operand was chosen without looking at the result.

JAX's derivative of ``z = max(x, y)`` gives the cotangent to ``x`` where ``x == z``, and that of
``reduce_max`` to the elements that equal it. Row loops compute ``x`` again in another program than
``z``, perhaps an ulp off, and the cotangent would go nowhere. The derivatives here are equal to
JAX's, NaN and ties included, but compare operands, or a result that is computed again from what it
is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from lrjax.program.compatibility import bind

Array = jax.Array


def evaluate_differentiably(
    primitive: Any, params: dict[str, Any], values: Sequence[Any]
) -> list[Any] | None:
    """An equation's results, with such a derivative; None for an equation that needs none."""
    if not values or not jnp.issubdtype(jnp.result_type(values[0]), jnp.inexact):
        return None
    is_ordered = not jnp.issubdtype(jnp.result_type(values[0]), jnp.complexfloating)
    if primitive in (lax.max_p, lax.min_p) and is_ordered:
        wins = lax.ge if primitive is lax.max_p else lax.le
        return [_of_two(lambda *xs: bind(primitive, xs, params)[0], wins)(*values)]
    if primitive in (lax.reduce_max_p, lax.reduce_min_p):
        reduce = _of_axes(lambda x: bind(primitive, (x,), params)[0], tuple(params["axes"]))
        return [reduce(*values)]
    return None


def _of_two(
    function: Callable[[Array, Array], Array], wins: Callable[[Array, Array], Array]
) -> Callable[[Array, Array], Array]:
    call = jax.custom_jvp(function)

    def rule(primals: Sequence[Array], tangents: Sequence[Any]) -> tuple[Array, Any]:
        out = call(*primals)
        terms = [
            jnp.broadcast_to(dot, out.shape) * _share(wins, one, other, out.dtype)
            for dot, one, other in zip(tangents, primals, reversed(primals), strict=True)
            if not isinstance(dot, SymbolicZero)
        ]
        return out, sum(terms[1:], start=terms[0])

    call.defjvp(rule, symbolic_zeros=True)
    return call


def _share(wins: Callable[[Array, Array], Array], one: Array, other: Array, dtype: Any) -> Array:
    """1 where ``one`` is chosen, 1/2 where it equals ``other``, else 0."""
    chosen = wins(one, other).astype(dtype)
    return chosen / jnp.where(wins(other, one), jnp.asarray(2, dtype), jnp.asarray(1, dtype))


def _of_axes(function: Callable[[Array], Array], axes: Sequence[int]) -> Callable[[Array], Array]:
    call = jax.custom_jvp(function)

    @call.defjvp
    def rule(primals: Sequence[Array], tangents: Sequence[Array]) -> tuple[Array, Array]:
        (x,), (dot,) = primals, tangents
        # Not the result above: that may be what another program made of another ``x``.
        chosen = lax.eq(x, lax.broadcast_in_dim(function(x), x.shape, _others(x.ndim, axes)))
        location = chosen.astype(x.dtype)
        return call(x), lax.reduce_sum(dot * location, axes) / lax.reduce_sum(location, axes)

    return call


def _others(rank: int, axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(axis for axis in range(rank) if axis not in axes)
