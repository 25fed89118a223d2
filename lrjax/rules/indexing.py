"""Gathers, their gradients (``scatter-add``) and updates at positions along other axes than rows.

Rows take part in three ways: every row picks with its own indices (``take_along_axis``, a batching
dimension), one set of indices picks from all rows alike (``x[..., indices]``, a full slice), or
rows of indices pick from a table that has no rows (``table[labels]``, an embedding).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax import lax

from lrjax.program.inline import FlatEquation
from lrjax.rules import banded
from lrjax.rules.banded import Taps, constant_rows
from lrjax.rules.base import (
    Array,
    Equation,
    NotRowLocal,
    Operand,
    RowOp,
    RowRead,
    Rows,
    Rule,
    reads_along,
    row_for_row,
    with_at,
)
from lrjax.rules.block_sums import accumulator_dtype
from lrjax.rules.geometry import IDENTITY
from lrjax.rules.linearity import Dependence, additive_in, not_additive
from lrjax.rules.traits import Kind, Traits

# Every step adds all of a table to what the steps before it gave, so it must be small: no larger
# than so many rows of what is added to it.
MOST_ROWS_PER_TABLE = 16


def gather(equation: Equation) -> RowOp:
    operand, indices = equation.operands
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    pair = _batched_axes(
        operand, indices, numbers.operand_batching_dims, numbers.start_indices_batching_dims
    )
    batch_dims = _dimensions_without(numbers.offset_dims, len(equation.outputs[0].shape))
    if pair is not None:
        # JAX keeps coordinates last, so axes of the indices and batch dimensions go in step.
        # An index outside the map gives NaN; those of rows outside the image may be anything.
        preserves_finiteness = equation.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP
        return row_for_row(
            equation, pair, batch_dims[pair[1]], preserves_finiteness=preserves_finiteness
        )
    if indices.row_axis is not None:
        return _looked_up(equation, batch_dims)
    window_dims = _dimensions_without(
        (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims), len(operand.shape)
    )
    axis = equation.row_axis
    if axis in numbers.collapsed_slice_dims:
        return _picked_rows(equation, batch_dims)
    if axis not in window_dims:
        raise NotRowLocal("rows are picked by indices")
    out_axis = numbers.offset_dims[window_dims.index(axis)]
    if sizes[axis] != operand.height:
        raise NotRowLocal("rows are picked by indices", (out_axis,))

    def evaluate(windows: Sequence[Array], rows: Rows) -> Sequence[Array]:
        return equation.bind(*windows, slice_sizes=with_at(sizes, axis, rows.count))

    return RowOp(
        reads=(RowRead(IDENTITY, axis), None),
        out_axes=(out_axis,),
        height=operand.height,
        evaluate=evaluate,
    )


def scatter(equation: Equation) -> RowOp:
    operand, _, updates = equation.operands
    numbers = equation.params["dimension_numbers"]
    rank = len(operand.shape)
    batch_dims = _dimensions_without(numbers.update_window_dims, len(updates.shape))
    window_dims = _dimensions_without(
        (*numbers.inserted_window_dims, *numbers.operand_batching_dims), rank
    )
    for axis in range(rank):
        if axis in numbers.operand_batching_dims:
            position = numbers.operand_batching_dims.index(axis)
            of_indices = numbers.scatter_indices_batching_dims[position]
            axes = (axis, of_indices, batch_dims[of_indices])
        elif axis in window_dims:
            axes = (axis, None, numbers.update_window_dims[window_dims.index(axis)])
            if updates.shape[axes[2]] != operand.shape[axis]:
                continue
        else:
            continue
        found = [o.row_axis for o in equation.operands]
        matches = [f in (None, a) for f, a in zip(found, axes, strict=True)]
        if all(matches) and any(f is not None for f in found):
            return row_for_row(equation, axes, axis)
    if updates.row_axis in numbers.update_window_dims:
        written = window_dims[numbers.update_window_dims.index(updates.row_axis)]
        raise NotRowLocal("rows are scattered by indices", (written,))
    if equation.operands[1].constant is None:
        return _counted_up(equation, batch_dims)
    return _scattered_rows(equation, batch_dims)


def _looked_up(equation: Equation, batch_dims: Sequence[int]) -> RowOp:
    """``table[labels]``: rows of indices pick from a table without rows."""
    operand, indices = equation.operands
    axis = indices.row_axis
    if operand.row_axis is not None or axis is None or axis >= len(batch_dims):
        raise NotRowLocal("rows of indices pick from other rows")
    fills = equation.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    return row_for_row(equation, (None, axis), batch_dims[axis], preserves_finiteness=not fills)


def _counted_up(equation: Equation, batch_dims: Sequence[int]) -> RowOp:
    """What rows add to a table that has none: the gradient of ``table[labels]``, a histogram."""
    operand, indices, updates = equation.operands
    numbers = equation.params["dimension_numbers"]
    axis = indices.row_axis
    if axis is None and updates.row_axis in batch_dims:
        axis = batch_dims.index(updates.row_axis)
    is_sum = equation.primitive is lax.scatter_add_p and operand.row_axis is None
    if not is_sum or axis is None or axis >= len(batch_dims):
        raise NotRowLocal("rows are scattered by indices")
    if axis in numbers.scatter_indices_batching_dims:
        raise NotRowLocal("rows are scattered by indices")
    if updates.row_axis not in (None, batch_dims[axis]):
        raise NotRowLocal("rows are scattered by indices")
    height = updates.shape[batch_dims[axis]]
    if math.prod(operand.shape) * height > math.prod(updates.shape) * MOST_ROWS_PER_TABLE:
        raise NotRowLocal("rows are scattered into a map")
    if operand.constant is None or np.any(operand.constant.value()):
        raise NotRowLocal("rows are added to a table that is not zero")

    def evaluate(windows: Sequence[Array], rows: Rows) -> Sequence[Array]:
        dtype, params = accumulator_dtype(operand.dtype), equation.params
        table, added = windows[0].astype(dtype), windows[2].astype(dtype)
        kept = ("indices_are_sorted", "unique_indices", "mode")
        return [lax.scatter_add(table, windows[1], added, numbers, **{k: params[k] for k in kept})]

    axes = (None, axis, batch_dims[axis])
    return RowOp(
        reads=reads_along(axes, fill=0),
        out_axes=(None,),
        height=height,
        evaluate=evaluate,
        reduction="sum",
        drivers=(1, 2),
    )


def _picked_rows(equation: Equation, batch_dims: Sequence[int]) -> RowOp:
    """``x[:, rows]`` with constant rows."""
    operand, axis, height = equation.operands[0], equation.row_axis, equation.height
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    others_whole = with_at(sizes, axis, height) == operand.shape
    is_of_rows = tuple(numbers.start_index_map) == (axis,) and len(batch_dims) == 1 and others_whole
    if not is_of_rows or equation.operands[1].constant is None:
        raise NotRowLocal("rows are picked by indices", tuple(batch_dims[:1]))

    def make() -> Taps:
        rows = constant_rows(equation, 1, height)
        return banded.taps(np.arange(len(rows)), rows, None, len(rows), height)

    found = _remembered(equation, 1, axis, make)
    out_axis = batch_dims[0]

    def arrange(picked: Array) -> Array:
        return jax.numpy.moveaxis(picked, axis, out_axis)

    return banded.sum_of_taps(equation, found, axis, out_axis, arrange)


def _scattered_rows(equation: Equation, batch_dims: Sequence[int]) -> RowOp:
    """The gradient of ``x[:, rows]``: every row is the sum of those that were picked from it."""
    operand, _, updates = equation.operands
    numbers = equation.params["dimension_numbers"]
    picked = tuple(numbers.scatter_dims_to_operand_dims)
    is_sum = equation.primitive is lax.scatter_add_p and len(picked) == 1
    if not is_sum or tuple(numbers.inserted_window_dims) != picked or len(batch_dims) != 1:
        raise NotRowLocal("rows are scattered by indices")
    (axis,), (source,) = picked, batch_dims
    height = operand.shape[axis]
    window = [s for a, s in enumerate(updates.shape) if a != source]
    is_whole = window == [s for a, s in enumerate(operand.shape) if a != axis]
    if updates.row_axis != source or operand.row_axis not in (None, axis) or not is_whole:
        raise NotRowLocal("rows are scattered by indices")

    def make() -> Taps:
        rows = constant_rows(equation, 1, height)
        return banded.taps(rows, np.arange(len(rows)), None, height, len(rows))

    found = _remembered(equation, 1, axis, make)

    def evaluate(windows: Sequence[Array], rows: Rows) -> Sequence[Array]:
        total = found.sum(windows[2], rows, source, operand.dtype)
        return [windows[0] + jax.numpy.moveaxis(total, source, axis)]

    summed = banded.sum_of_taps(equation, found, source, axis, operand=2)
    reads = (RowRead(IDENTITY, axis), None, summed.reads[2])
    return dataclasses.replace(summed, reads=reads, evaluate=evaluate)


def _remembered(equation: Equation, indices: int, axis: int, make: Callable[[], Taps]) -> Taps:
    constant = equation.operands[indices].constant
    if constant is None:
        raise NotRowLocal("rows are picked by indices")
    shapes = [operand.shape for operand in equation.operands]
    name = f"{equation.primitive.name} {axis} {shapes} {equation.params['mode']}"
    return banded.remembered(constant.key + name.encode(), make)


def dynamic_update_slice(equation: Equation) -> RowOp:
    operand, update = equation.operands[:2]
    axis = equation.row_axis
    if any(start.row_axis is not None for start in equation.operands[2:]):
        raise NotRowLocal("positions that carry rows")
    if {operand.row_axis, update.row_axis} - {None, axis}:
        raise NotRowLocal("operands carry rows on different axes")
    if update.shape[axis] != operand.shape[axis]:
        raise NotRowLocal("rows are written at a position known only at run time", (axis,))

    def evaluate(windows: Sequence[Array], rows: Rows) -> Sequence[Array]:
        starts = with_at(windows[2:], axis, jax.numpy.zeros_like(windows[2 + axis]))
        return [lax.dynamic_update_slice(windows[0], windows[1], starts)]

    return RowOp(
        reads=(RowRead(IDENTITY, axis),) * 2 + (None,) * (len(equation.operands) - 2),
        out_axes=(axis,),
        height=operand.shape[axis],
        evaluate=evaluate,
    )


def _batched_axes(
    operand: Operand, indices: Operand, operand_dims: Sequence[int], index_dims: Sequence[int]
) -> tuple[int, int] | None:
    """The pair of batching dimensions that carries rows in either operand."""
    for a, b in zip(operand_dims, index_dims, strict=True):
        if a == operand.row_axis or b == indices.row_axis:
            if operand.row_axis not in (None, a) or indices.row_axis not in (None, b):
                raise NotRowLocal("rows of indices pick from other rows")
            return a, b
    return None


def _dimensions_without(dims: Sequence[int], rank: int) -> list[int]:
    return [a for a in range(rank) if a not in dims]


def _picks(equation: FlatEquation, given: Sequence[Dependence]) -> list[Dependence]:
    """Additive, but for a number other than NaN that stands where indices lie outside."""
    fills = equation.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    number = equation.params["fill_value"]
    if fills and number not in (None, 0) and not np.isnan(number):
        return not_additive(equation, given)
    return additive_in(0)(equation, given)


# fmt: off
RULES = (
    Rule((lax.gather_p,), gather, Traits(
        Kind.FUSED, preserves_finiteness=True, linearity=_picks, divides_unevenly=False,
    )),
    Rule((
        lax.scatter_p, lax.scatter_max_p, lax.scatter_min_p, lax.scatter_mul_p, lax.scatter_sub_p,
    ), scatter, Traits(Kind.LIBRARY, preserves_finiteness=True, divides_unevenly=False)),
    Rule((lax.scatter_add_p,), scatter, Traits(
        Kind.LIBRARY, preserves_finiteness=True, linearity=additive_in(0, 2),
        divides_unevenly=False,
    )),
    Rule((lax.dynamic_update_slice_p,), dynamic_update_slice, Traits(
        preserves_finiteness=True, linearity=additive_in(0, 1),
    )),
)
# fmt: on
