"""Operations that move elements: broadcasts, reshapes that keep rows whole, slices, padding."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax import lax

from lrjax.rules import banded
from lrjax.rules.base import (
    Array,
    Equation,
    NotRowLocal,
    RowOp,
    RowRead,
    Rows,
    Rule,
    reads_along,
    removed_axes,
    row_for_row,
    with_at,
)
from lrjax.rules.block_sums import spread
from lrjax.rules.geometry import IDENTITY, RowMap
from lrjax.rules.linearity import additive_in, additive_in_all
from lrjax.rules.traits import Kind, Traits


def _row_by_row(equation: Equation, out_axis: int, **block_params: object) -> RowOp:
    """One row operand, whose rows keep their order; parameters may depend on the row count.

    ``block_params`` maps a parameter to a function of the number of rows.
    """
    axes = with_at([None] * len(equation.operands), equation.row_operand, equation.row_axis)

    def evaluate(windows: Sequence[Array], rows: Rows) -> Sequence[Array]:
        changed = {name: of_rows(rows.count) for name, of_rows in block_params.items()}  # type: ignore[operator]
        return equation.bind(*windows, **changed)

    return RowOp(
        reads=reads_along(axes),
        out_axes=(out_axis,) * len(equation.outputs),
        height=equation.outputs[0].shape[out_axis],
        evaluate=evaluate,
    )


# Rows that a reshape folds into one or makes of one (pixel shuffle, patches of up to 32 rows). One
# that makes more flattens the map, which then ends a stage.
MOST_ROWS_PER_ROW = 32


def broadcast_in_dim(equation: Equation) -> RowOp:
    axis, params = equation.row_axis, equation.params
    out_axis = params["broadcast_dimensions"][axis]
    if params["shape"][out_axis] != equation.height:
        raise NotRowLocal("one row is broadcast to many")
    return _row_by_row(equation, out_axis, shape=lambda n: with_at(params["shape"], out_axis, n))


def alike_rows(equation: Equation, axis: int) -> RowOp | None:
    """A broadcast of what has one row for all, or none."""
    params, shape = equation.params, equation.outputs[0].shape
    if len(equation.operands) != 1:
        return None
    operand = equation.operands[0]
    for source, target in enumerate(params["broadcast_dimensions"]):
        if target == axis and operand.shape[source] != 1:
            return None

    def evaluate(windows: Sequence[Array], rows: Rows) -> Sequence[Array]:
        block = with_at(shape, axis, rows.count)
        if rows.is_differentiated:
            return [spread(windows[0], block, params["broadcast_dimensions"])]
        return equation.bind(*windows, shape=block)

    return RowOp(
        reads=(None,),
        out_axes=(axis,),
        height=shape[axis],
        evaluate=evaluate,
        preserves_finiteness=operand.is_finite,
    )


def counted_rows(equation: Equation, axis: int) -> RowOp | None:
    """Numbers of rows, or of elements along another axis."""
    params, shape = equation.params, equation.outputs[0].shape
    if equation.operands:
        return None

    def evaluate(windows: Sequence[Array], rows: Rows) -> Sequence[Array]:
        block = equation.bind(shape=with_at(shape, axis, rows.count))[0]
        if params["dimension"] == axis:
            block = block + jax.numpy.asarray(rows.start).astype(block.dtype)
        return [block]

    return RowOp(
        reads=(),
        out_axes=(axis,),
        height=shape[axis],
        evaluate=evaluate,
        is_positional=params["dimension"] == axis,
    )


def reshape(equation: Equation) -> RowOp:
    axis, shape = equation.row_axis, equation.operands[0].shape
    new_sizes = equation.params["new_sizes"]
    order = equation.params.get("dimensions")  # transposed like this first
    order = tuple(range(len(shape))) if order is None else tuple(order)
    before = math.prod(shape[a] for a in order[: order.index(axis)])
    # Axes at the rows' place in memory; one of as many rows is the best, then one of the most.
    heights = {
        out_axis: size
        for out_axis, size in enumerate(new_sizes)
        if math.prod(new_sizes[:out_axis]) == before
    }
    for out_axis, height in heights.items():
        if height == shape[axis]:
            return _reshaped(equation, out_axis, IDENTITY)
    for out_axis, height in sorted(heights.items(), key=lambda item: -item[1]):
        rows, left = divmod(shape[axis], max(height, 1))
        if not left and rows <= MOST_ROWS_PER_ROW:
            return _reshaped(equation, out_axis, RowMap(stride=rows, extent=rows))
        rows, left = divmod(height, max(shape[axis], 1))
        if not left and rows <= MOST_ROWS_PER_ROW:
            # Floor division: rows of the operand that hold the output rows.
            row_map = RowMap(extent=rows, pad=rows - 1, base=rows)
            return _reshaped(equation, out_axis, row_map)
    raise NotRowLocal(f"reshape {shape} -> {tuple(new_sizes)} does not keep rows whole")


def _reshaped(equation: Equation, out_axis: int, row_map: RowMap) -> RowOp:
    kept = _row_by_row(
        equation, out_axis, new_sizes=lambda n: with_at(equation.params["new_sizes"], out_axis, n)
    )
    return dataclasses.replace(kept, reads=(RowRead(row_map, equation.row_axis),))


def squeeze(equation: Equation) -> RowOp:
    dimensions = equation.params["dimensions"]
    if equation.row_axis in dimensions:
        raise NotRowLocal("the row axis is squeezed away")
    return _row_by_row(equation, removed_axes(equation.row_axis, dimensions))


def transpose(equation: Equation) -> RowOp:
    return _row_by_row(equation, equation.params["permutation"].index(equation.row_axis))


def rev(equation: Equation) -> RowOp:
    axis, dimensions = equation.row_axis, equation.params["dimensions"]
    if axis not in dimensions:
        return _row_by_row(equation, axis)
    if equation.height > banded.LOWEST_MAP:
        raise NotRowLocal("rows are reversed")

    def arrange(rows: Array) -> Array:
        return lax.rev(rows, [a for a in dimensions if a != axis])

    return banded.sum_of_taps(equation, banded.of_reversal(equation.height), axis, axis, arrange)


def slice_(equation: Equation) -> RowOp:
    axis, params = equation.row_axis, equation.params
    stride = 1 if params["strides"] is None else params["strides"][axis]
    start = params["start_indices"][axis]
    row_map = RowMap(stride=stride, pad=-start)

    def evaluate(windows: Sequence[Array], rows: Rows) -> Sequence[Array]:
        return equation.bind(
            *windows,
            start_indices=with_at(params["start_indices"], axis, 0),
            limit_indices=with_at(params["limit_indices"], axis, (rows.count - 1) * stride + 1),
        )

    return RowOp(
        reads=(RowRead(row_map, axis, fill=0),),
        out_axes=(axis,),
        height=equation.outputs[0].shape[axis],
        evaluate=evaluate,
    )


def pad(equation: Equation) -> RowOp:
    operand, value = equation.operands
    axis = operand.row_axis
    if axis is None:
        raise NotRowLocal("the padding value carries rows")
    config = equation.params["padding_config"]
    low, high, interior = config[axis]
    touches_rows = (low, high, interior) != (0, 0, 0)
    if touches_rows and value.constant is None:
        raise NotRowLocal("rows are padded with a value that is not a constant", (axis,))
    row_map = RowMap(pad=low, base=interior + 1)
    filling = value.constant.value().item() if touches_rows and value.constant else None

    def evaluate(windows: Sequence[Array], rows: Rows) -> Sequence[Array]:
        edges = (*row_map.block_padding(windows[0].shape[axis], rows.count), interior)
        return equation.bind(*windows, padding_config=with_at(config, axis, edges))

    return RowOp(
        reads=(RowRead(row_map, axis, fill=filling), None),
        out_axes=(axis,),
        height=equation.outputs[0].shape[axis],
        evaluate=evaluate,
        preserves_finiteness=value.is_finite,
    )


def _shared_axis(equation: Equation) -> int:
    """The axis that carries rows in every operand that has any."""
    axis = equation.row_axis
    if any(operand.row_axis not in (None, axis) for operand in equation.operands):
        raise NotRowLocal("operands carry rows on different axes")
    return axis


def concatenate(equation: Equation) -> RowOp:
    axis = _shared_axis(equation)
    if equation.params["dimension"] == axis:
        return _rows_after_rows(equation, axis)
    return row_for_row(equation, (axis,) * len(equation.operands), axis)


def _rows_after_rows(equation: Equation, axis: int) -> RowOp:
    """Every operand at its offset; a row is taken from the one that it lies in."""
    heights = [operand.shape[axis] for operand in equation.operands]
    ends = np.cumsum(heights)
    starts = ends - heights

    def evaluate(windows: Sequence[Array], rows: Rows) -> Sequence[Array]:
        position = jax.numpy.asarray(rows.start) + lax.iota(np.int32, rows.count)
        along = [-1 if a == axis else 1 for a in range(windows[0].ndim)]
        result = windows[0]
        for start, window in zip(starts[1:], windows[1:], strict=True):
            result = jax.numpy.where((position >= start).reshape(along), window, result)
        return [result]

    return RowOp(
        reads=tuple(RowRead(RowMap(pad=int(start)), axis) for start in starts),
        out_axes=(axis,),
        height=int(ends[-1]),
        evaluate=evaluate,
        is_positional=True,
    )


def stack(equation: Equation) -> RowOp:
    axis = _shared_axis(equation)
    out_axis = axis + (equation.params["axis"] <= axis)
    return row_for_row(equation, (axis,) * len(equation.operands), out_axis)


def unstack(equation: Equation) -> RowOp:
    if equation.params["axis"] == equation.row_axis:
        raise NotRowLocal("rows are unstacked")
    return _row_by_row(equation, removed_axes(equation.row_axis, [equation.params["axis"]]))


def tile(equation: Equation) -> RowOp:
    if equation.params["reps"][equation.row_axis] != 1:
        raise NotRowLocal("rows are tiled", (equation.row_axis,))
    return _row_by_row(equation, equation.row_axis)


def dynamic_slice(equation: Equation) -> RowOp:
    operand = equation.operands[0]
    axis, sizes = operand.row_axis, equation.params["slice_sizes"]
    if axis is None or sizes[axis] != operand.shape[axis]:
        axes = () if axis is None else (axis,)
        raise NotRowLocal("rows are sliced at a position known only at run time", axes)

    def evaluate(windows: Sequence[Array], rows: Rows) -> Sequence[Array]:
        starts = with_at(windows[1:], axis, jax.numpy.zeros_like(windows[1 + axis]))
        return [lax.dynamic_slice(windows[0], starts, with_at(sizes, axis, rows.count))]

    return RowOp(
        reads=(RowRead(IDENTITY, axis),) + (None,) * (len(equation.operands) - 1),
        out_axes=(axis,),
        height=operand.shape[axis],
        evaluate=evaluate,
    )


# Moves of the first operand's elements; what other operands there are say where to.
_MOVE = Traits(
    Kind.FUSED,
    preserves_finiteness=True,
    linearity=additive_in(0),
    reverse_reads_operands=False,
)
_MOVE_OF_ALL = dataclasses.replace(_MOVE, linearity=additive_in_all)

RULES = (
    Rule((lax.broadcast_in_dim_p,), broadcast_in_dim, _MOVE, without_rows=alike_rows),
    Rule(
        (lax.iota_p,),
        None,
        Traits(Kind.FUSED, preserves_finiteness=True),
        without_rows=counted_rows,
    ),
    Rule((lax.reshape_p,), reshape, _MOVE),
    Rule((lax.squeeze_p,), squeeze, _MOVE),
    Rule((lax.transpose_p,), transpose, _MOVE),
    Rule((lax.rev_p,), rev, _MOVE),
    Rule((lax.slice_p,), slice_, _MOVE),
    Rule((lax.tile_p,), tile, _MOVE),
    Rule((lax.dynamic_slice_p,), dynamic_slice, _MOVE),
    Rule((lax.split_p,), None, _MOVE),  # a program has slices in its place
    Rule((lax.pad_p,), pad, _MOVE_OF_ALL),
    Rule((lax.concatenate_p,), concatenate, _MOVE_OF_ALL),
    Rule((lax.stack_p,), stack, Traits(preserves_finiteness=True, linearity=additive_in_all)),
    Rule((lax.unstack_p,), unstack, Traits(preserves_finiteness=True, linearity=additive_in(0))),
)
