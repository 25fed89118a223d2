"""Reductions and dot products: over other axes row by row, over rows as a sum over steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from lrjax.program.varying import is_inexact
from lrjax.rules import banded
from lrjax.rules.banded import Taps
from lrjax.rules.base import (
    Array,
    Equation,
    NotRowLocal,
    Operand,
    RowOp,
    RowRead,
    Rows,
    Rule,
    highest,
    lowest,
    reads_along,
    removed_axes,
    row_for_row,
)
from lrjax.rules.block_sums import accumulator_dtype, block_sum
from lrjax.rules.geometry import IDENTITY
from lrjax.rules.linearity import additive_in, product
from lrjax.rules.traits import Kind, Traits

_COMBINE = {
    lax.reduce_sum_p: "sum",
    lax.reduce_max_p: "max",
    lax.reduce_min_p: "min",
    lax.reduce_prod_p: "prod",
    lax.reduce_and_p: "and",
    lax.reduce_or_p: "or",
}


def identity_of(reduction: str, dtype: Any) -> Any:
    """What rows outside the image must hold so that a reduction does not see them."""
    return {
        "sum": 0,
        "prod": 1,
        "max": lowest(dtype),
        "min": highest(dtype),
        "and": _all_bits(dtype),
        "or": 0,
    }[reduction]


def _all_bits(dtype: Any) -> Any:
    """The identity of a bitwise and."""
    return highest(dtype) if jnp.issubdtype(dtype, np.unsignedinteger) or dtype == np.bool_ else -1


def reduce(equation: Equation) -> RowOp:
    axis, axes = equation.row_axis, equation.params["axes"]
    over_rows = axis in axes
    combine = _COMBINE[equation.primitive]
    fill = identity_of(combine, equation.operands[0].dtype) if over_rows else None
    is_long_sum = over_rows and combine == "sum" and is_inexact(equation.operands[0])

    def evaluate(windows: Sequence[Array], rows: Rows) -> Sequence[Array]:
        return [block_sum(windows[0], axes)] if is_long_sum else equation.bind(*windows)

    return RowOp(
        reads=(RowRead(IDENTITY, axis, fill=fill),),
        out_axes=(None if over_rows else removed_axes(axis, axes),),
        height=equation.height,
        evaluate=evaluate,
        reduction=combine if over_rows else None,
        drivers=(0,) if over_rows else (),
        flops=elements_read(equation) / max(equation.height, 1),
    )


def arg_reduce(equation: Equation) -> RowOp:
    axis, axes = equation.row_axis, equation.params["axes"]
    if axis in axes:
        raise NotRowLocal(f"{equation.primitive.name} over rows")
    return row_for_row(equation, (axis,), removed_axes(axis, axes))


def dot_general(equation: Equation) -> RowOp:
    lhs, rhs = equation.operands
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = equation.params["dimension_numbers"]

    def evaluate_sum(windows: Sequence[Array], rows: Rows) -> Sequence[Array]:
        dtype = accumulator_dtype(equation.outputs[0].dtype)
        return equation.bind(*windows, preferred_element_type=dtype)

    def op(
        axes: tuple[int | None, int | None], out_axis: int | None, is_reduction: bool = False
    ) -> RowOp:
        return RowOp(
            reads=reads_along(axes, fill=0 if is_reduction else None),
            out_axes=(out_axis,),
            height=equation.height,
            evaluate=evaluate_sum if is_reduction else equation.bind_block,
            reduction="sum" if is_reduction else None,
            drivers=(0, 1) if is_reduction else (),
            flops=operations_of_product(equation) / max(equation.height, 1),
        )

    paired = _paired_axis(lhs, rhs, lhs_contract, rhs_contract)
    if paired is not None:
        band = _product_with_band(equation, paired)
        return op(paired, None, is_reduction=True) if band is None else band
    paired = _paired_axis(lhs, rhs, lhs_batch, rhs_batch)
    if paired is not None:
        return op(paired, lhs_batch.index(paired[0]))
    if lhs.row_axis is not None and rhs.row_axis is not None:
        raise NotRowLocal("every row of one operand meets every row of the other")
    batch = len(lhs_batch)
    if lhs.row_axis is not None:
        free = _free_axes(lhs, lhs_contract, lhs_batch)
        return op((lhs.row_axis, None), batch + free.index(lhs.row_axis))
    assert rhs.row_axis is not None
    free = _free_axes(rhs, rhs_contract, rhs_batch)
    lhs_free = len(lhs.shape) - len(lhs_contract) - batch
    return op((None, rhs.row_axis), batch + lhs_free + free.index(rhs.row_axis))


def _product_with_band(equation: Equation, paired: tuple[int, int]) -> RowOp | None:
    """Rows times a constant banded matrix, as ``jax.image.resize`` makes them; None if not."""
    dimensions = equation.params["dimension_numbers"]
    if dimensions[0] != ((paired[0],), (paired[1],)) or any(map(len, dimensions[1])):
        return None
    image = equation.row_operand
    axis, matrix = paired[image], equation.operands[1 - image]
    contracted = paired[1 - image]
    if matrix.constant is None or matrix.row_axis is not None or len(matrix.shape) != 2:
        return None

    def make() -> Taps:
        assert matrix.constant is not None
        return banded.of_matrix(matrix.constant, contracted)

    try:
        found = banded.remembered(matrix.constant.key + bytes([contracted]), make)
    except NotRowLocal:
        return None
    # The axis of the matrix comes after the others, or before them.
    out_axis = len(equation.outputs[0].shape) - 1 if image == 0 else 0

    def arrange(rows: Array) -> Array:
        return jnp.moveaxis(rows, axis, out_axis)

    return banded.sum_of_taps(equation, found, axis, out_axis, arrange)


def _free_axes(operand: Operand, contract: Sequence[int], batch: Sequence[int]) -> list[int]:
    return [a for a in range(len(operand.shape)) if a not in contract and a not in batch]


def _paired_axis(
    lhs: Operand, rhs: Operand, lhs_axes: Sequence[int], rhs_axes: Sequence[int]
) -> tuple[int, int] | None:
    """The pair of contracted (or batch) axes that carries rows in either operand."""
    for a, b in zip(lhs_axes, rhs_axes, strict=True):
        if a == lhs.row_axis or b == rhs.row_axis:
            if lhs.row_axis not in (None, a) or rhs.row_axis not in (None, b):
                raise NotRowLocal("a product whose operands carry rows on different axes")
            return a, b
    return None


def elements_read(equation: Equation) -> float:
    """An operation for every element of the operand."""
    return float(np.prod(equation.operands[0].shape))


def operations_of_product(equation: Equation) -> float:
    """Multiplications and additions."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    given = 2.0 * float(np.prod(equation.outputs[0].shape))
    return given * float(np.prod([equation.operands[0].shape[a] for a in contracted]))


_REDUCTION = Traits(preserves_finiteness=True, operations=elements_read)

RULES = (
    Rule(
        (lax.reduce_max_p, lax.reduce_min_p, lax.reduce_and_p, lax.reduce_or_p), reduce, _REDUCTION
    ),
    Rule(
        (lax.reduce_sum_p,),
        reduce,
        dataclasses.replace(_REDUCTION, linearity=additive_in(0), reverse_reads_operands=False),
    ),
    Rule((lax.reduce_prod_p,), reduce, Traits(operations=elements_read)),
    Rule((lax.reduce_xor_p,), None, Traits(operations=elements_read)),
    Rule((lax.argmax_p, lax.argmin_p), arg_reduce, Traits(preserves_finiteness=True)),
    Rule(
        (lax.dot_general_p,),
        dot_general,
        Traits(
            Kind.LIBRARY,
            is_contraction=True,
            preserves_finiteness=True,
            linearity=product,
            operations=operations_of_product,
        ),
    ),
)
