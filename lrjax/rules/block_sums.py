"""Sums over the rows of a block that round little: of rows, and of cotangents.

They are given in float32 or wider, as they are added up over blocks: rounded to bfloat16 block by
block, the gradients of a last layer were 1.45 times as far from float64 as column's.

XLA:CPU adds up a small array in one accumulator: 900 elements are off by five roundings, where a
large array, which it adds up in parts, is off by half of one (jax 0.10 and 0.12). BatchNorm's sums
must be better than that: an error of the cotangents' mean is the same in every element, and where
the true gradient nearly cancels (a bias in front of a normalisation) it is all that is left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lrjax.program.platforms import per_platform

Array = jax.Array

# Elements from which on XLA:CPU adds up an array in parts.
_LARGE = 4096


def is_small(shape: Sequence[int]) -> bool:
    """XLA:CPU would add up such an array in one accumulator."""
    return math.prod(shape) < _LARGE


def accumulator_dtype(dtype: Any) -> Any:
    """Reductions over rows are accumulated in float32 or wider."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.inexact) else dtype


def block_sum(block: Array, axes: Sequence[int]) -> Array:
    """The sum over ``axes``; of a small block on CPU in two sums, either as short as can be."""
    block = block.astype(accumulator_dtype(block.dtype))
    first = _shorter_sums(block.shape, axes) if is_small(block.shape) else ()

    if not first:
        return lax.reduce_sum(block, axes)
    return per_platform(_sum_for, block, first=first, axes=tuple(axes))


def _sum_for(
    block: Array, *, platform: str | None, first: tuple[int, ...], axes: tuple[int, ...]
) -> Array:
    if platform != "cpu":
        return lax.reduce_sum(block, axes)
    inner = jnp.expand_dims(lax.reduce_sum(block, first), first)
    # Without the barrier XLA would make one reduction of the two.
    return lax.reduce_sum(lax.optimization_barrier(inner), axes)


def _shorter_sums(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    """The last of the axes, to sum over first; empty where one sum is no longer than two."""
    ordered = sorted(axes)

    def length(split: int) -> int:
        inner = math.prod(shape[axis] for axis in ordered[split:])
        return inner + math.prod(shape[axis] for axis in ordered[:split])

    split = min(range(len(ordered)), key=length)
    return tuple(ordered[split:]) if split else ()


def spread(value: Array, shape: Sequence[int], dimensions: Sequence[int]) -> Array:
    """``lax.broadcast_in_dim`` whose cotangent is a ``block_sum``."""
    shape, dimensions = tuple(shape), tuple(dimensions)
    kept = [a for size, a in zip(value.shape, dimensions, strict=True) if size == shape[a]]
    summed = tuple(axis for axis in range(len(shape)) if axis not in kept)
    if not is_small(shape) or not summed or not jnp.issubdtype(value.dtype, jnp.inexact):
        return lax.broadcast_in_dim(value, shape, dimensions)

    own = value.shape

    @jax.custom_vjp
    def spread_out(value: Array) -> Array:
        return lax.broadcast_in_dim(value, shape, dimensions)

    def forward(value: Array) -> tuple[Array, None]:
        return spread_out(value), None

    def backward(_: None, cotangent: Array) -> tuple[Array]:
        return (block_sum(cotangent, summed).reshape(own).astype(cotangent.dtype),)

    spread_out.defvjp(forward, backward)
    return spread_out(value)
