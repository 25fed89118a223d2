"""Rows of a block that are outside the map."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from lrjax.rules.base import Array


def keep_rows(block: Array, start: Any, axis: int, low: Any, high: Any, fill: Any) -> Array:
    """Set rows of a block outside ``[low, high)`` to ``fill``; the first row is ``start``."""
    # One unsigned comparison: a row before ``low`` wraps round to a large number.
    inside = lax.iota(np.int32, block.shape[axis]) + jnp.asarray(start - low, np.int32)
    kept = inside.astype(np.uint32) < jnp.asarray(high - low, np.uint32)
    mask = lax.broadcast_in_dim(kept, block.shape, (axis,))
    return lax.select(mask, block, lax.full_like(block, fill))
