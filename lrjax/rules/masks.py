"""Rows of a block that are outside the map."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from lrjax.rules.base import Array


def keep_rows(block: Array, start: Any, axis: int, low: Any, high: Any, fill: Any) -> Array:
    """Set rows of a block outside ``[low, high)`` to ``fill``; the first row is ``start``."""
    return keep(block, rows_inside(start, block.shape[axis], low, high), axis, fill)


def rows_inside(start: Any, count: int, low: Any, high: Any) -> Array:
    """Which of ``count`` rows from ``start`` on are in ``[low, high)``."""
    # One unsigned comparison: a row before ``low`` wraps round to a large number.
    first = start if isinstance(low, int) and low == 0 else start - low
    inside = lax.iota(np.int32, count) + jnp.asarray(first, np.int32)
    return inside.astype(np.uint32) < jnp.asarray(high - low, np.uint32)


def keep(block: Array, kept: Array, axis: int, fill: Any) -> Array:
    """Set rows of a block that are not ``kept`` to ``fill``."""
    mask = lax.broadcast_in_dim(kept, block.shape, (axis,))
    return lax.select(mask, block, lax.full_like(block, fill))
