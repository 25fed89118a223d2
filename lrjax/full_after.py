"""Arrays that loops start with, made no earlier than the loops can start.

Empty line buffers, outputs and sums depend on nothing. XLA:GPU makes one fusion of the zeros of all
loops of a program, so that the outputs of its last loop exist before its first one runs; and it
drops ``optimization_barrier`` before it schedules. So what they are filled with is made to depend
on what the loop reads, in a way that XLA does not see through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lrjax.offload import first_element
from lrjax.rules.base import Array

Full = Callable[[tuple[int, ...], Any, Any], Array]  # shape, fill, dtype


def full_after(arrays: Iterable[Array]) -> Full:
    """``jnp.full``, of arrays that do not exist before all of these do."""
    elements = [
        jnp.real(first_element(lax.stop_gradient(array))).astype(np.float32)
        for array in arrays
        if array.size and not jnp.issubdtype(array.dtype, jax.dtypes.extended)
    ]
    if not elements:
        return jnp.full
    # No number lies below minus infinity.
    never = jnp.stack(elements).min() < -np.inf

    def full(shape: tuple[int, ...], fill: Any, dtype: Any) -> Array:
        usual = jnp.asarray(fill, dtype)
        other = jnp.asarray(usual == 0, dtype)
        return jnp.full(shape, jnp.where(never, other, usual))

    return full
