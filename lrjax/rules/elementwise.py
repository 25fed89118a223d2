"""Operations that act on every element alone: an output row needs the same input row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax import lax
from jax.extend.core import primitives as public

from lrjax.program.compatibility import primitives
from lrjax.rules.base import (
    Array,
    Equation,
    NotRowLocal,
    RowOp,
    RowRead,
    Rows,
    Rule,
    row_for_row,
    with_at,
)
from lrjax.rules.block_sums import is_small, spread
from lrjax.rules.geometry import IDENTITY
from lrjax.rules.linearity import (
    additive_in,
    additive_in_all,
    choice,
    conversion,
    is_coarse,
    product,
    reduces_precision,
)
from lrjax.rules.traits import Kind, Traits


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
            block = with_at(equation.outputs[0].shape, axis, rows.count)
            windows = [_spread_over(block, window) for window in windows]
        return equation.bind(*windows)

    elements = max(int(np.prod(out.shape)) for out in equation.outputs) // max(height, 1)
    return RowOp(
        reads=tuple(reads),
        out_axes=tuple(axis if out.shape else None for out in equation.outputs),
        height=height,
        evaluate=evaluate,
        flops=elements * len(equation.outputs),
    )


def _spread_over(block: tuple[int, ...], window: Array) -> Array:
    """A window in the block's shape, unless it is a scalar."""
    is_smaller = np.ndim(window) == len(block) and np.shape(window) != block
    return spread(window, block, range(len(block))) if is_smaller and is_small(block) else window


def reduce_precision(equation: Equation) -> RowOp:
    """Cotangents are rounded too: the sum of rounded parts is not the rounded sum."""
    rounds = reduces_precision(equation.params, equation.outputs[0].dtype)
    found = elementwise(equation)
    reason = "reduce_precision rounds cotangents" if rounds else None
    return dataclasses.replace(found, undifferentiable=lambda: reason)


def convert_element_type(equation: Equation) -> RowOp:
    """From and to a float8 cotangents are rounded so much that their sum must be there before."""
    dtypes = {equation.operands[0].dtype, equation.outputs[0].dtype}
    rounds = len(dtypes) > 1 and any(map(is_coarse, dtypes))
    reason = "a float8 rounds cotangents" if rounds else None
    return dataclasses.replace(elementwise(equation), undifferentiable=lambda: reason)


def bitcast(equation: Equation) -> RowOp:
    if equation.outputs[0].shape != equation.operands[0].shape:
        raise NotRowLocal("a bitcast between types of different widths")
    return elementwise(equation)


def cumulative(equation: Equation) -> RowOp:
    if equation.params["axis"] == equation.row_axis:
        raise NotRowLocal(f"{equation.primitive.name} along rows")
    return elementwise(equation)


def sort(equation: Equation) -> RowOp:
    if equation.params["dimension"] == equation.row_axis:
        raise NotRowLocal("sort along rows")
    return elementwise(equation)


def top_k(equation: Equation) -> RowOp:
    if equation.params["axis"] == equation.row_axis:
        raise NotRowLocal("top_k along rows", (equation.row_axis,) * 2)
    axis, elements = equation.row_axis, float(np.prod(equation.operands[0].shape))
    return row_for_row(equation, (axis,), axis, flops=elements)


def fourier_transform(equation: Equation) -> RowOp:
    """A transform along the last axes; rows before them are examples."""
    axis, lengths = equation.row_axis, equation.params["fft_lengths"]
    if axis >= len(equation.operands[0].shape) - len(lengths):
        raise NotRowLocal("a Fourier transform along rows", (axis,))
    elements = max(np.prod(equation.operands[0].shape), np.prod(equation.outputs[0].shape))
    flops = float(5 * elements * np.log2(max(np.prod(lengths), 2)))
    return row_for_row(equation, (axis,), axis, flops=flops)


def elements_made(equation: Equation) -> float:
    """An operation for every element of the results."""
    return float(sum(np.prod(out.shape) for out in equation.outputs))


# With poles, or values that overflow.
_UNBOUNDED = Traits(Kind.FUSED, is_elementwise=True, operations=elements_made)
# Finite everywhere, with finite derivatives.
_FINITE = dataclasses.replace(_UNBOUNDED, preserves_finiteness=True)
_KEPT = dataclasses.replace(_UNBOUNDED, is_kept=True)
_FINITE_KEPT = dataclasses.replace(_FINITE, is_kept=True)
_CONSTANT = dataclasses.replace(_FINITE, has_derivative=False)
_ADDITIVE = dataclasses.replace(_FINITE, linearity=additive_in_all)
_SUM = dataclasses.replace(_ADDITIVE, reverse_reads_operands=False)

# fmt: off
RULES = (
    Rule((
        lax.acos_p, lax.acosh_p, lax.asin_p, lax.asinh_p, lax.atan_p, lax.atan2_p, lax.atanh_p,
        lax.bessel_i0e_p, lax.bessel_i1e_p, lax.clz_p, lax.cosh_p, lax.digamma_p, lax.eq_to_p,
        lax.igamma_p, lax.igamma_grad_a_p, lax.igammac_p, lax.integer_pow_p, lax.le_to_p,
        lax.lt_to_p, lax.mulhi_p, lax.nextafter_p, lax.polygamma_p, lax.population_count_p,
        lax.regularized_incomplete_beta_p, lax.rem_p, lax.shift_left_p,
        lax.shift_right_arithmetic_p, lax.shift_right_logical_p, lax.sinh_p, lax.zeta_p,
        *primitives("log2", "polynomial"),
    ), elementwise, _UNBOUNDED),
    Rule((
        lax.cbrt_p, lax.erf_inv_p, lax.exp_p, lax.exp2_p, lax.expm1_p, lax.lgamma_p, lax.log_p,
        lax.log1p_p, lax.pow_p, lax.rsqrt_p, lax.sqrt_p, lax.tan_p,
    ), elementwise, _KEPT),
    Rule((
        lax.cos_p, lax.erf_p, lax.erfc_p, lax.logistic_p, lax.sin_p, lax.tanh_p,
    ), elementwise, _FINITE_KEPT),
    Rule((
        lax.abs_p, lax.and_p, lax.clamp_p, lax.eq_p, lax.ge_p, lax.gt_p, lax.le_p, lax.lt_p,
        lax.max_p, lax.min_p, lax.ne_p, lax.not_p, lax.or_p, lax.square_p, lax.xor_p,
        *primitives("one_minus_square"),
    ), elementwise, _FINITE),
    Rule((
        lax.ceil_p, lax.floor_p, lax.is_finite_p, lax.round_p, lax.sign_p, public.stop_gradient_p,
    ), elementwise, _CONSTANT),
    Rule((
        lax.add_p, public.add_jaxvals_p, lax.copy_p, lax.imag_p, public.name_p, lax.neg_p,
        lax.real_p, lax.sub_p,
    ), elementwise, _SUM),
    Rule((lax.complex_p, lax.conj_p, *primitives("pvary")), elementwise, _ADDITIVE),
    Rule((lax.convert_element_type_p,), convert_element_type,
         dataclasses.replace(_SUM, linearity=conversion)),
    Rule((lax.mul_p,), elementwise, dataclasses.replace(_FINITE, linearity=product)),
    Rule((lax.div_p,), elementwise, dataclasses.replace(_UNBOUNDED, linearity=additive_in(0))),
    Rule((lax.select_n_p,), elementwise, dataclasses.replace(_FINITE, linearity=choice)),
    # A barrier's result exists: that is what it is for.
    Rule((lax.optimization_barrier_p,), elementwise, dataclasses.replace(_SUM, kind=Kind.ROOT)),
    Rule((lax.reduce_precision_p,), reduce_precision,
         dataclasses.replace(_FINITE, reverse_reads_operands=False)),
    Rule((lax.bitcast_convert_type_p,), bitcast, _UNBOUNDED),
    Rule((lax.cumprod_p, lax.cumlogsumexp_p), cumulative),
    Rule((lax.cummax_p, lax.cummin_p), cumulative, Traits(preserves_finiteness=True)),
    Rule((lax.cumsum_p,), cumulative, Traits(
        preserves_finiteness=True, linearity=additive_in(0), reverse_reads_operands=False,
    )),
    Rule((lax.sort_p,), sort, Traits(
        Kind.LIBRARY, preserves_finiteness=True, divides_unevenly=False,
    )),
    Rule((lax.top_k_p,), top_k, Traits(preserves_finiteness=True, divides_unevenly=False)),
    Rule((lax.fft_p,), fourier_transform, Traits(
        Kind.LIBRARY, preserves_finiteness=True, linearity=additive_in(0),
    )),
)
# fmt: on
