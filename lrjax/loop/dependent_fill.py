"""Arrays that loops start with, made no earlier than the loops can start.

Empty line buffers, outputs and sums depend on nothing. XLA makes the zeros of all loops at the
start of a program (XLA:GPU in one fusion, and it drops ``optimization_barrier`` before it
schedules), so that the outputs of its last loop exist before its first one runs. So what they are
filled with is made to depend on what the loop waits for, in a way that XLA does not see through.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from lrjax.loop.offload import first_element
from lrjax.program.varying import varying_axes, varying_over
from lrjax.rules.base import Array

Full = Callable[[tuple[int, ...], Any, Any], Array]  # shape, fill, dtype


def dependency_on(arrays: Iterable[Any]) -> list[Array]:
    """A number that does not exist before all of these arrays do; nothing where there are none.

    What has no elements to wait for is passed over: symbolic zeros, random keys, empty arrays.
    """
    elements = [
        lax.convert_element_type(jnp.real(first_element(array)), np.float32)
        for array in arrays
        if _has_numbers(array)
    ]
    return [lax.stop_gradient(functools.reduce(lax.min, elements))] if elements else []


def full_depending_on(arrays: Iterable[Any]) -> Full:
    """``jnp.full`` with a data dependency on ``arrays``, so that XLA cannot make it earlier.

    With nothing to wait for (see ``dependency_on``), and of random keys, it is ``jnp.full``.
    """
    latest = dependency_on(arrays)
    if not latest:
        return jnp.full
    # No number lies below minus infinity.
    never = lax.lt(latest[0], np.float32(-np.inf))
    fillings: dict[Any, Array] = {}

    def full(shape: tuple[int, ...], fill: Any, dtype: Any) -> Array:
        if jnp.issubdtype(dtype, jax.dtypes.extended):
            return jnp.full(shape, fill, dtype)
        if (fill, dtype) not in fillings:
            usual = np.asarray(fill).astype(dtype)
            other = np.asarray(usual == 0).astype(dtype)
            fillings[fill, dtype] = lax.select(never, other, usual)
        return lax.broadcast(fillings[fill, dtype], shape)

    return full


def zero_behind(arrays: Any) -> Any:
    """The integer 0, known to XLA only when ``arrays`` are there."""
    latest = dependency_on(jax.tree.leaves(arrays))
    return _zero(latest[0]) if latest else 0


@custom_vmap
def _zero(latest: Array) -> Array:
    return lax.lt(latest, np.float32(-np.inf)).astype(np.int32)


@_zero.def_vmap
def _one_zero_for_all(axis_size: int, in_batched: Any, latest: Array) -> tuple[Array, bool]:
    """An offset of each example's own would make a gather of every slice."""
    del axis_size
    return _zero(latest[0] if in_batched[0] else latest), False


def full_like(
    full: Full, like: Any, fill: Any = 0, *, shape: Sequence[int] | None = None, dtype: Any = None
) -> Array:
    """``full`` for an array or a type: varying over the mesh axes that it varies over, no others.

    Where the arrays that are waited for differ between devices and the result must not, it waits
    for nothing.
    """
    own, kind = tuple(like.shape if shape is None else shape), dtype or like.dtype
    made, axes = full(own, fill, kind), varying_axes(like)
    if not varying_axes(made) <= axes:
        made = jnp.full(own, fill, kind)
    return varying_over(made, axes)


def _has_numbers(array: Any) -> bool:
    if isinstance(array, SymbolicZero) or not array.size:
        return False
    return bool(jnp.issubdtype(array.dtype, np.number)) or array.dtype == np.bool_
