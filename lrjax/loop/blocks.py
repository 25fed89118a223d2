"""Blocks of rows of arrays that exist whole, on the device or the host: read, write, mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from lrjax.loop.offload import beside, on_device
from lrjax.program.varying import varying_axes
from lrjax.rules.base import Array, with_at


def slice_rows(array: Array, start: Any, size: int, axis: int, zero: Any = 0) -> Array:
    """``size`` rows of an array that holds all of them, static where the start is.

    They are not read before ``zero`` is there, unless rows that are the same on all devices of a
    mesh would then differ.
    """
    if not isinstance(zero, int) and varying_axes(zero) <= varying_axes(array):
        start = start + zero
    if isinstance(start, int | np.integer):
        return on_device(lax.slice_in_dim(array, int(start), int(start) + size, axis=axis))
    # The start is never negative; Python's indices, which may be, would be shifted.
    rows = lax.dynamic_slice_in_dim(array, start, size, axis, allow_negative_indices=False)
    return on_device(rows)


def _clamped(start: Any, most: int) -> Any:
    """A start within ``0`` and ``most``."""
    if isinstance(start, int | np.integer):
        return min(max(int(start), 0), most)
    return lax.clamp(start.dtype.type(0), start, start.dtype.type(most))


def _shifted(rows: Array, start: Any, size: int, axis: int, fill: Any) -> Array:
    """``size`` rows from ``start`` on, where rows outside are ``fill``; any start is allowed.

    Filling no more rows than the starts ask for takes XLA:GPU no less memory, and once took more
    (U-Net with batch statistics, 2 x 512 x 512, 16 blocks: 635 MiB against 627).
    """
    count = rows.shape[axis]
    edge = jnp.full(with_at(rows.shape, axis, size), fill, rows.dtype)
    padded = lax.concatenate([edge, rows, edge], axis)
    return slice_rows(padded, _clamped(start + size, count + size), size, axis)


def read_rows(
    array: Array,
    start: Any,
    size: int,
    axis: int,
    fill: Any,
    bounds: tuple[int, int],
    zero: Any = 0,
) -> Array:
    """Rows of a whole array, those outside it ``fill``; ``bounds`` are the extremes of start.

    Nothing is read before ``zero`` is there.
    """
    height = array.shape[axis]
    if isinstance(start, int):
        low, stop = _clamped(start, height), _clamped(start + size, height)
        rows, before = slice_rows(array, low, stop - low, axis, zero), min(max(-start, 0), size)
        return padded_rows(rows, before, size - before - (stop - low), axis, fill)
    if bounds[0] >= 0 and bounds[1] + size <= height:
        return slice_rows(array, start, size, axis, zero)
    count = min(size, height)
    inside = _clamped(start, height - count)
    rows = slice_rows(array, inside, count, axis, zero)
    return _shifted(rows, start - inside, size, axis, fill)


def padded_rows(rows: Array, before: int, behind: int, axis: int, fill: Any) -> Array:
    """Rows with others around them, which hold ``fill``."""
    if before == behind == 0:
        return rows
    edges = with_at([(0, 0, 0)] * rows.ndim, axis, (before, behind, 0))
    return lax.pad(rows, jnp.asarray(fill, rows.dtype), edges)


def write_rows(
    array: Array,
    rows: Array,
    start: Any,
    axis: int,
    bounds: tuple[int, int],
    combine: Callable[[Array, Array], Array] | None = None,
) -> Array:
    """Put rows into a whole array in place, or combine them with those there; rows outside it
    are dropped."""
    height, size = array.shape[axis], rows.shape[axis]
    rows = rows.astype(array.dtype)
    if isinstance(start, int):
        low, stop = _clamped(start, height), _clamped(start + size, height)
        if stop == low:
            return array
        rows = slice_rows(rows, low - start, stop - low, axis)
        start, size, bounds = low, stop - low, (low, low)
    if bounds[0] >= 0 and bounds[1] + size <= height:
        if combine is not None:
            rows = combine(slice_rows(array, start, size, axis), rows)
        return put_rows(array, beside(rows, array), start, axis)
    count = min(size, height)
    inside = _clamped(start, height - count)
    old = slice_rows(array, inside, count, axis)
    new = _shifted(rows, inside - start, count, axis, 0)
    position = lax.iota(np.int32, count) + inside
    kept = (position >= start) & (position < start + size)
    mask = lax.broadcast_in_dim(kept, new.shape, (axis,))
    new = new if combine is None else combine(old, new)
    return put_rows(array, beside(lax.select(mask, new, old), array), inside, axis)


def put_rows(array: Array, rows: Array, start: Any, axis: int) -> Array:
    """The array with rows from ``start`` on replaced, all of them inside."""
    return lax.dynamic_update_slice_in_dim(array, rows, start, axis, allow_negative_indices=False)
