"""Maps that wait in the host's memory, written and read there by blocks of rows.

Whether an array is in the host's memory is part of its type in JAX, so whatever reads rows asks the
array. Whole maps come and go by loops over slabs of rows too. XLA:GPU starts a copy of a whole map
as early as its source exists, and drops ``optimization_barrier`` before it schedules, so that
every map would be back on the device long before it is used; a slab that a loop reads comes in
the step that reads it.

On a CPU the host's memory is the device's: everything runs, nothing moves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from lrjax.program.compatibility import checkpoint, from_real_parts, real_parts
from lrjax.program.inline import replaced_at
from lrjax.program.varying import is_inexact, varying_axes, varying_over
from lrjax.rules.base import Array

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
SLAB_ROWS = 64


def is_on_host(array: Any) -> bool:
    """Whether an array, or a tracer of one, is in the host's memory."""
    return jax.typeof(array).memory_space == HOST


def on_device(rows: Array) -> Array:
    """Rows that were sliced from an array, wherever that is, in the device's memory."""
    return jax.device_put(rows, DEVICE) if is_on_host(rows) else rows


def beside(rows: Array, array: Array) -> Array:
    """Rows in the memory of the array that they will be put in."""
    return jax.device_put(rows, HOST) if is_on_host(array) else rows


def empty_on_host(shape: tuple[int, ...], dtype: Any) -> Array:
    """An array in the host's memory, of which every element will be written."""
    # Of zeros, XLA under jax 0.10.2 would make a whole array on the device first.
    return jax.device_put(lax.empty(shape, dtype), HOST)


def first_element(array: Array) -> Array:
    """A scalar that does not exist before the array does."""
    corner = lax.slice(array, (0,) * array.ndim, (1,) * array.ndim)
    return on_device(corner).reshape(())


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def to_host(array: Array, axis: int) -> Array:
    """A whole map, copied to the host's memory by slabs of rows."""
    return _copied(array, empty_on_host(array.shape, array.dtype), axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def from_host(array: Array, axis: int) -> Array:
    """A whole map, copied from the host's memory by slabs of rows."""
    return from_host_after(array, array, axis)


def from_host_after(array: Array, made: Array, axis: int) -> Array:
    """The same, beginning no earlier than ``made`` exists."""
    filling = first_element(made).astype(array.dtype)
    return _copied(array, jnp.full(array.shape, filling), axis)


to_host.defvjp(
    lambda array, axis: (to_host(array, axis), None),
    lambda axis, _, cotangent: (from_host(cotangent, axis),),
)
from_host.defvjp(
    lambda array, axis: (from_host(array, axis), None),
    lambda axis, _, cotangent: (to_host(cotangent, axis),),
)


def scaled(array: Array, factor: Array, axis: int) -> Array:
    """A map in the host's memory times a number, there."""
    target = empty_on_host(array.shape, array.dtype)
    return _copied(array, target, axis, lambda rows: (rows * factor).astype(rows.dtype))


def _copied(source: Array, target: Array, axis: int, change: Any = lambda rows: rows) -> Array:
    height = source.shape[axis]
    size = min(SLAB_ROWS, height)

    def step(target: Array, i: Array) -> tuple[Array, None]:
        # The last slab begins earlier, so as to end with the map; its first rows stay as they are.
        start = jnp.minimum(i * size, height - size)
        rows = on_device(lax.dynamic_slice_in_dim(source, start, size, axis))
        rows = beside(change(rows), target)
        return lax.dynamic_update_slice_in_dim(target, rows, start, axis), None

    return lax.scan(step, target, jnp.arange(-(-height // size)))[0]


# --- Segments that run by whole maps --------------------------------------------------------------

Function = Callable[..., Sequence[Any]]


def with_hosted_outputs(function: Function, hosted: Mapping[int, int]) -> Function:
    """The function, with outputs of some numbers (and row axes) in the host's memory."""

    def call(*inputs: Array) -> list[Array]:
        outputs = enumerate(function(*inputs))
        return [to_host(y, hosted[i]) if i in hosted else y for i, y in outputs]

    return call


def with_hosted_inputs(function: Function, hosted: Mapping[int, int]) -> Function:
    """The function of whole maps, some of which come in the host's memory."""

    def call(*inputs: Array) -> Sequence[Array]:
        return function(
            *(from_host(x, hosted[i]) if i in hosted else x for i, x in enumerate(inputs))
        )

    return call


def checkpointed(function: Function, hosted: Mapping[int, int]) -> Function:
    """``jax.checkpoint`` of a function of whole maps, some of which come in the host's memory.

    They come to the device before its forward pass and again before its backward pass.

    Args:
      function: of arrays on the device.
      hosted: numbers of the inputs that come in the host's memory, with their row axes.
    """
    forward_pass = with_hosted_inputs(function, hosted)

    @jax.custom_vjp
    def call(*inputs: Array) -> Sequence[Array]:
        return forward_pass(*inputs)

    def forward(*inputs: Any) -> Any:
        plain = [x.value for x in inputs]
        moving = {i: None for i, x in enumerate(inputs) if x.perturbed and is_inexact(x.value)}
        return forward_pass(*plain), (plain, moving)

    def backward(residuals: Any, cotangents: Sequence[Any]) -> tuple[Any, ...]:
        inputs, moving = residuals
        given = {
            k: instantiated(ct) for k, ct in enumerate(cotangents) if ct.dtype != jax.dtypes.float0
        }
        made = next(iter(given.values()))
        arrived = [
            from_host_after(x, made, hosted[i]) if i in hosted else x for i, x in enumerate(inputs)
        ]

        held = list(map(real_parts, arrived))

        def of_moving(*values: Array) -> list[Array]:
            outputs = function(*replaced_at(list(map(from_real_parts, held)), [*moving], values))
            return [outputs[k] for k in given]

        _, pull = jax.vjp(checkpoint(of_moving), *(arrived[i] for i in moving))
        found = pull([*given.values()])
        bars = dict(zip(moving, found, strict=True))
        bars |= {i: to_host(bar, hosted[i]) for i, bar in bars.items() if i in hosted}
        return tuple(bars.get(i) for i in range(len(inputs)))

    call.defvjp(forward, backward, symbolic_zeros=True)
    return call


def instantiated(cotangent: Any) -> Array:
    """A cotangent as an array, zeros too."""
    if isinstance(cotangent, SymbolicZero):
        zeros = jnp.zeros(cotangent.shape, cotangent.dtype)
        return varying_over(zeros, varying_axes(cotangent.aval))
    return cotangent
