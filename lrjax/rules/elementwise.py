"""Operations that act on every element alone: an output row needs the same input row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from lrjax.rules.base import Array, Equation, NotRowLocal, RowOp, RowRead, Rows, rule
from lrjax.rules.block_sums import is_small, spread
from lrjax.rules.geometry import IDENTITY

# fmt: off
ELEMENTWISE = (
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "bessel_i0e", "bessel_i1e", "bitcast_convert_type", "cbrt", "ceil", "clamp", "clz", "complex",
    "conj",
    "convert_element_type", "copy", "cos", "cosh", "digamma", "div", "eq", "eq_to", "erf",
    "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "igamma", "igamma_grad_a",
    "igammac", "imag", "integer_pow", "is_finite", "le", "le_to", "lgamma", "log", "log1p", "log2",
    "logistic", "lt", "lt_to", "max", "min", "mul", "mulhi", "name", "ne", "neg", "nextafter",
    "not", "one_minus_square", "optimization_barrier", "or", "polygamma", "polynomial",
    "population_count", "pow", "pvary", "real", "reduce_precision", "regularized_incomplete_beta",
    "rem", "round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic",
    "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan",
    "tanh", "xor", "zeta",
)

# Finite everywhere, with finite derivatives; what is left has poles or overflows.
TAME = frozenset((
    "abs", "add", "add_any", "and", "ceil", "clamp", "complex", "conj", "convert_element_type",
    "copy", "cos", "cummax", "cummin", "cumsum", "eq", "erf", "erfc", "floor", "ge", "gt", "imag",
    "is_finite", "le", "logistic", "lt", "max", "min", "mul", "name", "ne", "neg", "not",
    "one_minus_square", "optimization_barrier", "or", "pvary", "real", "reduce_precision",
    "round", "select_n", "sign", "sin", "sort", "square", "stop_gradient", "sub", "tanh", "xor",
))
# Derivatives that JAX knows to be zero.
WITHOUT_DERIVATIVE = frozenset(("ceil", "floor", "is_finite", "round", "sign", "stop_gradient"))
# fmt: on


@rule(*ELEMENTWISE)
def elementwise(equation: Equation) -> RowOp:
    axis = equation.row_axis
    ndim = len(equation.operands[equation.row_operand].shape)
    # Not the operand's: one row may meet all rows of another.
    height = equation.outputs[0].shape[axis]
    reads: list[RowRead | None] = []
    for operand in equation.operands:
        if not operand.shape or operand.shape[min(axis, len(operand.shape) - 1)] == 1 != height:
            reads.append(None)  # a scalar, or the same for all rows
        elif len(operand.shape) != ndim or operand.row_axis not in (None, axis):
            raise NotRowLocal(f"rows on axis {operand.row_axis} meet rows on axis {axis}")
        else:
            reads.append(RowRead(IDENTITY, axis))

    def evaluate(windows: Sequence[Array], rows: Rows) -> Sequence[Array]:
        if rows.is_differentiated:
            block = list(equation.outputs[0].shape)
            block[axis] = rows.count
            windows = [_spread_over(block, window) for window in windows]
        return equation.bind(*windows)

    elements = max(int(np.prod(out.shape)) for out in equation.outputs) // max(height, 1)
    return RowOp(
        reads=tuple(reads),
        out_axes=tuple(axis if out.shape else None for out in equation.outputs),
        height=height,
        evaluate=evaluate,
        flops=elements * len(equation.outputs),
        is_tame=equation.primitive.name in TAME,
    )


def _spread_over(block: Sequence[int], window: Array) -> Array:
    """A window in the block's shape, unless it is a scalar."""
    is_smaller = np.ndim(window) == len(block) and np.shape(window) != tuple(block)
    return spread(window, block, range(len(block))) if is_smaller and is_small(block) else window


@rule("reduce_precision")
def reduce_precision(equation: Equation) -> RowOp:
    """Cotangents are rounded too: the sum of rounded parts is not the rounded sum."""
    params, of_dtype = equation.params, jnp.finfo(equation.outputs[0].dtype)
    rounds = params["mantissa_bits"] < of_dtype.nmant or params["exponent_bits"] < of_dtype.nexp
    found = elementwise(equation)
    reason = "reduce_precision rounds cotangents" if rounds else None
    return dataclasses.replace(found, undifferentiable=reason)


@rule("bitcast_convert_type")
def bitcast(equation: Equation) -> RowOp:
    if equation.outputs[0].shape != equation.operands[0].shape:
        raise NotRowLocal("a bitcast between types of different widths")
    return elementwise(equation)


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def cumulative(equation: Equation) -> RowOp:
    if equation.params["axis"] == equation.row_axis:
        raise NotRowLocal(f"{equation.primitive.name} along rows")
    return elementwise(equation)


@rule("sort")
def sort(equation: Equation) -> RowOp:
    if equation.params["dimension"] == equation.row_axis:
        raise NotRowLocal("sort along rows")
    return elementwise(equation)


@rule("top_k")
def top_k(equation: Equation) -> RowOp:
    if equation.params["axis"] == equation.row_axis:
        raise NotRowLocal("top_k along rows")
    return _row_for_row(equation, float(np.prod(equation.operands[0].shape)))


@rule("fft")
def fourier_transform(equation: Equation) -> RowOp:
    """A transform along the last axes; rows before them are examples."""
    lengths = equation.params["fft_lengths"]
    if equation.row_axis >= len(equation.operands[0].shape) - len(lengths):
        raise NotRowLocal("a Fourier transform along rows")
    elements = max(np.prod(equation.operands[0].shape), np.prod(equation.outputs[0].shape))
    return _row_for_row(equation, float(5 * elements * np.log2(max(np.prod(lengths), 2))))


def _row_for_row(equation: Equation, flops: float) -> RowOp:
    """One operand, whose other axes may change, on rows that stay where they are."""

    def evaluate(windows: Sequence[Array], rows: Rows) -> Sequence[Array]:
        return equation.bind(*windows)

    return RowOp(
        reads=(RowRead(IDENTITY, equation.row_axis),),
        out_axes=(equation.row_axis,) * len(equation.outputs),
        height=equation.height,
        evaluate=evaluate,
        flops=flops / max(equation.height, 1),
    )
