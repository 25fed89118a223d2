"""Pooling windows and their gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lrjax.rules.base import (
    Array,
    Equation,
    NotRowLocal,
    RowOp,
    RowRead,
    Rows,
    Rule,
    highest,
    lowest,
    with_at,
)
from lrjax.rules.geometry import RowMap
from lrjax.rules.linearity import additive_in
from lrjax.rules.pool_gradients import Pooling
from lrjax.rules.traits import Kind, Traits


def reduce_window(equation: Equation) -> RowOp:
    params, axis = equation.params, equation.row_axis
    row_map = _window_map(equation)

    def evaluate(windows: Sequence[Array], rows: Rows) -> Sequence[Array]:
        padding = with_at(
            params["padding"], axis, row_map.block_padding(windows[0].shape[axis], rows.count)
        )
        if rows.is_differentiated and (pooling := _pooling(equation, padding)):
            return [_differentiable(equation, pooling)(*windows)]
        return equation.bind(*windows, padding=padding)

    height = equation.outputs[0].shape[axis]
    return RowOp(
        reads=(RowRead(row_map, axis, fill=_identity(equation)),),
        out_axes=(axis,),
        height=height,
        evaluate=evaluate,
        flops=operations(equation) / max(height, 1),
    )


def _window_map(equation: Equation) -> RowMap:
    params, axis = equation.params, equation.row_axis
    return RowMap(
        stride=params["window_strides"][axis],
        extent=(params["window_dimensions"][axis] - 1) * params["window_dilation"][axis] + 1,
        pad=params["padding"][axis][0],
        base=params["base_dilation"][axis],
    )


def select_and_scatter_add(equation: Equation) -> RowOp:
    """Max-pool gradient: a row needs, whole, every window that touches it."""
    params = equation.params
    source, operand = equation.operands
    axis = equation.row_axis
    if {source.row_axis, operand.row_axis} - {None, axis}:
        raise NotRowLocal("rows of a pooling gradient on different axes")
    stride, low = params["window_strides"][axis], params["padding"][axis][0]
    size = params["window_dimensions"][axis]
    windows_of = RowMap(stride=1, extent=size, pad=size - 1 - low, base=stride)
    rows_of = RowMap(stride=stride, extent=size, pad=low)
    operand_map = windows_of.then(rows_of)

    def evaluate(windows: Sequence[Array], rows: Rows) -> Sequence[Array]:
        source_rows, operand_rows = windows
        padding = with_at(params["padding"], axis, (0, 0))
        pooling = _gradient_of(equation, padding)
        if pooling.is_small:
            scattered = pooling.gradient(source_rows, operand_rows)
        else:
            scattered = equation.bind(source_rows, operand_rows, padding=padding)[0]
        # Cropped to the block; rows that windows skip (stride above size) are added at its edges.
        low, high = operand_map.first(0), rows.count - operand_map.end(rows.count)
        edges = [(low, high, 0) if a == axis else (0, 0, 0) for a in range(scattered.ndim)]
        return [lax.pad(scattered, jnp.zeros((), scattered.dtype), edges)]

    height = operand.shape[axis]
    fill = _never_chosen(equation)
    return RowOp(
        reads=(RowRead(windows_of, axis, fill=0), RowRead(operand_map, axis, fill=fill)),
        out_axes=(axis,),
        height=height,
        evaluate=evaluate,
        flops=operations(equation) / max(height, 1),
    )


def select_and_gather_add(equation: Equation) -> RowOp:
    """Max-pool tangent: the tangent at every window's chosen element."""
    params, axis = equation.params, equation.row_axis
    tangent, operand = equation.operands
    if {tangent.row_axis, operand.row_axis} - {None, axis}:
        raise NotRowLocal("rows of a pooling tangent on different axes")
    if params["base_dilation"][axis] != 1:
        raise NotRowLocal("a pooling tangent with base dilation")
    row_map = _window_map(equation)

    def evaluate(windows: Sequence[Array], rows: Rows) -> Sequence[Array]:
        return equation.bind(*windows, padding=with_at(params["padding"], axis, (0, 0)))

    fill = _never_chosen(equation)
    height = equation.outputs[0].shape[axis]
    return RowOp(
        reads=(RowRead(row_map, axis, fill=0), RowRead(row_map, axis, fill=fill)),
        out_axes=(axis,),
        height=height,
        evaluate=evaluate,
        flops=operations(equation) / max(height, 1),
    )


def _gradient_of(equation: Equation, padding: Any) -> Pooling:
    """The pooling whose gradient a ``select_and_scatter_add`` is."""
    params = equation.params
    return Pooling(
        params["window_dimensions"],
        params["window_strides"],
        padding,
        params["select_prim"] is lax.ge_p,
    )


def _pooling(equation: Equation, padding: Any) -> Pooling | None:
    """A maximum or minimum over windows whose gradient is element by element, or None."""
    params, dtype = equation.params, equation.operands[0].dtype
    dilations = (*params["base_dilation"], *params["window_dilation"])
    extremes = (lax.reduce_window_max_p, lax.reduce_window_min_p)
    is_extreme = equation.primitive in extremes and jnp.issubdtype(dtype, np.floating)
    if not is_extreme or any(dilation != 1 for dilation in dilations):
        return None
    found = Pooling(
        params["window_dimensions"],
        params["window_strides"],
        padding,
        equation.primitive is lax.reduce_window_max_p,
    )
    return found if found.is_small else None


def _differentiable(equation: Equation, pooling: Pooling) -> Callable[[Array], Array]:
    """The pooling of a block of rows, with the gradient of ``pooling``."""

    @jax.custom_vjp
    def pool(x: Array) -> Array:
        return equation.bind(x, padding=pooling.padding)[0]

    def forward(x: Array) -> tuple[Array, Array]:
        return pool(x), x

    def backward(x: Array, cotangents: Array) -> tuple[Array]:
        return (pooling.gradient(cotangents, x),)

    pool.defvjp(forward, backward)
    return pool


def _never_chosen(equation: Equation) -> Any:
    """What the operand of a pooling gradient or tangent must hold outside the image."""
    return _extreme(equation.operands[1].dtype, equation.params["select_prim"] is lax.ge_p)


def _identity(equation: Equation) -> Any:
    if equation.primitive is lax.reduce_window_sum_p:
        return 0
    return _extreme(equation.operands[0].dtype, equation.primitive is lax.reduce_window_max_p)


def _extreme(dtype: Any, is_maximum: bool) -> Any:
    return lowest(dtype) if is_maximum else highest(dtype)


def operations(equation: Equation) -> float:
    """One for every element of every window."""
    window = float(np.prod(equation.params["window_dimensions"]))
    return window * float(np.prod(equation.outputs[0].shape))


# Operations that reduce the elements of every window.
POOLINGS = (
    lax.reduce_window_p,
    lax.reduce_window_max_p,
    lax.reduce_window_min_p,
    lax.reduce_window_sum_p,
)
_POOLING = Traits(preserves_finiteness=True, operations=operations)
_ADDITIVE = additive_in(0)

RULES = (
    Rule((lax.reduce_window_max_p, lax.reduce_window_min_p), reduce_window, _POOLING),
    Rule(
        (lax.reduce_window_sum_p,),
        reduce_window,
        dataclasses.replace(_POOLING, linearity=_ADDITIVE, reverse_reads_operands=False),
    ),
    Rule((lax.reduce_window_p,), None, Traits(operations=operations)),
    Rule(
        (lax.select_and_scatter_add_p,),
        select_and_scatter_add,
        dataclasses.replace(_POOLING, linearity=_ADDITIVE),
    ),
    Rule(
        (lax.select_and_gather_add_p,),
        select_and_gather_add,
        Traits(Kind.FUSED, preserves_finiteness=True, linearity=_ADDITIVE),
    ),
)
