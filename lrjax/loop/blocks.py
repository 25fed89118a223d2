"""Blocks of rows of arrays that exist whole, on the device or the host: read, write, mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from lrjax.loop.offload import beside, on_device
from lrjax.rules.base import Array


def slice_rows(array: Array, start: Any, size: int, axis: int) -> Array:
    """``size`` rows of an array that holds all of them, static where the start is."""
    if isinstance(start, int | np.integer):
        return on_device(lax.slice_in_dim(array, int(start), int(start) + size, axis=axis))
    return on_device(lax.dynamic_slice_in_dim(array, start, size, axis=axis))


def _shifted(rows: Array, start: Any, size: int, axis: int, fill: Any) -> Array:
    """``size`` rows from ``start`` on, where rows outside are ``fill``; any start is allowed."""
    count = rows.shape[axis]
    shape = list(rows.shape)
    shape[axis] = size
    edge = jnp.full(shape, fill, rows.dtype)
    padded = lax.concatenate([edge, rows, edge], axis)
    return slice_rows(padded, jnp.clip(start + size, 0, count + size), size, axis)


def read_rows(
    array: Array, start: Any, size: int, axis: int, fill: Any, bounds: tuple[int, int]
) -> Array:
    """Rows of a whole array, those outside it ``fill``; ``bounds`` are the extremes of start."""
    height = array.shape[axis]
    if bounds[0] >= 0 and bounds[1] + size <= height:
        return slice_rows(array, start, size, axis)
    count = min(size, height)
    inside = jnp.clip(start, 0, height - count)
    rows = on_device(lax.dynamic_slice_in_dim(array, inside, count, axis=axis))
    return _shifted(rows, start - inside, size, axis, fill)


def write_rows(
    array: Array,
    rows: Array,
    start: Any,
    axis: int,
    bounds: tuple[int, int],
    combine: Callable[[Array, Array], Array] = lambda old, new: new,
) -> Array:
    """Put rows into a whole array in place; rows outside it are dropped."""
    height, size = array.shape[axis], rows.shape[axis]
    rows = rows.astype(array.dtype)
    if bounds[0] >= 0 and bounds[1] + size <= height:
        old = slice_rows(array, start, size, axis)
        new = beside(combine(old, rows), array)
        return lax.dynamic_update_slice_in_dim(array, new, start, axis)
    count = min(size, height)
    inside = jnp.clip(start, 0, height - count)
    old = on_device(lax.dynamic_slice_in_dim(array, inside, count, axis=axis))
    new = _shifted(rows, inside - start, count, axis, 0)
    position = inside + jnp.arange(count)
    kept = _along(axis, array.ndim, (position >= start) & (position < start + size))
    new = beside(jnp.where(kept, combine(old, new), old), array)
    return lax.dynamic_update_slice_in_dim(array, new, inside, axis)


def _along(axis: int, ndim: int, mask: Array) -> Array:
    return mask.reshape([-1 if a == axis else 1 for a in range(ndim)])
