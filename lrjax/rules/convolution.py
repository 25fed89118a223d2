"""``conv_general_dilated``: forward, input gradient (rows on the left) and weight gradient
(rows on both sides, a reduction over rows)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from lrjax.program.compatibility import bind, evaluate_jaxpr
from lrjax.program.platforms import per_platform
from lrjax.rules.base import (
    Array,
    Equation,
    NotRowLocal,
    RowOp,
    RowRead,
    Rows,
    Rule,
    reads_along,
    with_at,
)
from lrjax.rules.block_sums import accumulator_dtype
from lrjax.rules.geometry import IDENTITY, RowMap
from lrjax.rules.linearity import product
from lrjax.rules.traits import Kind, Traits


def convolution(equation: Equation) -> RowOp:
    lhs, rhs = equation.operands
    spec = equation.params["dimension_numbers"]
    if lhs.row_axis in spec.lhs_spec[2:]:
        dim = spec.lhs_spec[2:].index(lhs.row_axis)
    elif lhs.row_axis is None and rhs.row_axis in spec.rhs_spec[2:]:
        dim = spec.rhs_spec[2:].index(rhs.row_axis)
    else:
        return _rows_in_batch_or_features(equation)
    if rhs.row_axis is None:
        return _rows_in_image(equation, dim)
    if rhs.row_axis != spec.rhs_spec[2:][dim]:
        raise NotRowLocal("rows in two different dimensions of a convolution")
    return _rows_in_both(equation, dim)


def _rows_in_image(equation: Equation, dim: int) -> RowOp:
    """Forward convolutions and input gradients (``base`` is the forward stride)."""
    params, spec = equation.params, equation.params["dimension_numbers"]
    kernel = equation.operands[1].shape[spec.rhs_spec[2 + dim]]
    out_axis = spec.out_spec[2 + dim]
    row_map = RowMap(
        stride=params["window_strides"][dim],
        extent=(kernel - 1) * params["rhs_dilation"][dim] + 1,
        pad=params["padding"][dim][0],
        base=params["lhs_dilation"][dim],
    )

    def evaluate(windows: Sequence[Array], rows: Rows) -> Sequence[Array]:
        image, weights = windows
        padded = _padded_block(equation, dim, row_map, image, rows)
        low, high = padded["padding"][dim]
        # Fewer rows than a stride give no row more.
        padded["padding"] = with_at(
            padded["padding"], dim, (low, 0 if 0 > high >= -slack else high)
        )
        return [_block_convolution(image, weights, padded, rows.is_differentiated)]

    height = equation.outputs[0].shape[out_axis]
    slack = row_map.stride - 1 if row_map.base == 1 else 0
    return RowOp(
        reads=(RowRead(row_map, spec.lhs_spec[2 + dim], fill=0, slack=slack), None),
        out_axes=(out_axis,),
        height=height,
        evaluate=evaluate,
        flops=operations(equation) / max(height, 1),
    )


def _rows_in_both(equation: Equation, dim: int) -> RowOp:
    """Weight gradients: every row of the right operand meets a window of rows of the left."""
    params, spec = equation.params, equation.params["dimension_numbers"]
    outputs = equation.outputs[0].shape[spec.out_spec[2 + dim]]
    image_axis, rows_axis = spec.lhs_spec[2 + dim], spec.rhs_spec[2 + dim]
    height = equation.operands[1].shape[rows_axis]
    extent = (outputs - 1) * params["window_strides"][dim] + 1
    row_map = RowMap(
        stride=params["rhs_dilation"][dim],
        extent=extent,
        pad=params["padding"][dim][0],
        base=params["lhs_dilation"][dim],
    )

    def evaluate(windows: Sequence[Array], rows: Rows) -> Sequence[Array]:
        image, cotangent = windows
        padded = _padded_block(equation, dim, row_map, image, rows)
        if rows.is_differentiated:  # JAX does not transpose a convolution to a wider dtype
            return [_block_convolution(image, cotangent, padded, True)]
        return [_summing_convolution(image, cotangent, padded)]

    return RowOp(
        reads=(
            # Padding may be negative: column's kernel gradients crop what a stride skips.
            RowRead(row_map, image_axis, fill=0, slack=row_map.stride - 1),
            RowRead(IDENTITY, rows_axis, fill=0),
        ),
        out_axes=(None,),
        height=height,
        evaluate=evaluate,
        reduction="sum",
        drivers=(1,),
        flops=operations(equation) / max(height, 1),
    )


def _rows_in_batch_or_features(equation: Equation) -> RowOp:
    """Rows are examples, filters, or (a reduction) the features that are contracted."""
    params, spec = equation.params, equation.params["dimension_numbers"]
    lhs, rhs = equation.operands
    if params["batch_group_count"] != 1 or params["feature_group_count"] != 1:
        raise NotRowLocal("rows in the batch or features of a grouped convolution")
    (batch, features, *_), (filters, channels, *_) = spec.lhs_spec, spec.rhs_spec
    is_reduction = lhs.row_axis in (features, None) and rhs.row_axis in (channels, None)
    if is_reduction:
        axes, out_axis = (features, channels), None
    elif lhs.row_axis == batch and rhs.row_axis is None:
        axes, out_axis = (batch, None), spec.out_spec[0]
    elif lhs.row_axis is None and rhs.row_axis == filters:
        axes, out_axis = (None, filters), spec.out_spec[1]
    else:
        raise NotRowLocal("rows of one operand meet other rows of the other")
    return RowOp(
        reads=reads_along(axes, fill=0 if is_reduction else None),
        out_axes=(out_axis,),
        height=equation.height,
        evaluate=equation.bind_block,
        reduction="sum" if is_reduction else None,
        drivers=(0, 1) if is_reduction else (),
        flops=operations(equation) / max(equation.height, 1),
    )


def _padded_block(
    equation: Equation, dim: int, row_map: RowMap, image: Array, rows: Rows
) -> dict[str, Any]:
    """The parameters for a block of rows."""
    params = equation.params
    height = image.shape[params["dimension_numbers"].lhs_spec[2 + dim]]
    padding = row_map.block_padding(height, rows.count)
    return {**params, "padding": with_at(params["padding"], dim, padding)}


def operations(equation: Equation) -> float:
    """Multiplications and additions."""
    spec = equation.params["dimension_numbers"]
    weights = equation.operands[1].shape
    per_output = np.prod([weights[a] for a in spec.rhs_spec[1:]])
    return 2.0 * float(per_output) * float(np.prod(equation.outputs[0].shape))


# XLA:CPU runs a convolution inside a loop through a naive path unless its operands are in
# canonical order (jax issue 12868): 2,502 ms against 46 for a 3x3x64x64 weight gradient on
# 32x256 rows. Behind a barrier the transposes are not folded back into the convolution.
# Two more conditions, met by padding the image before the convolution (jax 0.10 and 0.12):
# - XLA swaps the operands, and so leaves the canonical order, if the image has fewer rows times
#   columns than the kernel.
# - float64 has no fast path but YNNPACK's, which wants neither an output nor a kernel larger than
#   the image, nor zeros between its rows: 2PS and OverL on VGG-16 took 31 and 93 times column's
#   time at 107x75.

_CANONICAL_2D = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def _block_convolution(
    lhs: Array, rhs: Array, params: dict[str, Any], is_differentiated: bool
) -> Array:
    """A convolution as XLA wants it inside a loop, on every platform."""
    if len(params["dimension_numbers"].lhs_spec) != 4:
        return _convolve(lhs, rhs, params)
    run = _differentiable_convolution if is_differentiated else _convolve_on_platform
    return run(lhs, rhs, params)


def _summing_convolution(lhs: Array, rhs: Array, params: dict[str, Any]) -> Array:
    """The gradient of a kernel on a block of rows, in the dtype in which blocks are added up.

    cuDNN gives sums of bfloat16 in bfloat16. Asked for float32, XLA:GPU would widen both maps.
    """
    dtype = accumulator_dtype(params["preferred_element_type"] or lhs.dtype)
    return per_platform(_summed_for, lhs, rhs, sum_dtype=np.dtype(dtype), **params)


def _summed_for(
    lhs: Array, rhs: Array, *, platform: str | None, sum_dtype: Any, **params: Any
) -> Array:
    if platform not in ("cuda", "rocm"):
        params["preferred_element_type"] = sum_dtype
    return _convolved_for(lhs, rhs, platform=platform, **params).astype(sum_dtype)


def _convolve_on_platform(lhs: Array, rhs: Array, params: dict[str, Any]) -> Array:
    return per_platform(_convolved_for, lhs, rhs, **params)


def _convolved_for(lhs: Array, rhs: Array, *, platform: str | None, **params: Any) -> Array:
    is_planar = len(params["dimension_numbers"].lhs_spec) == 4
    if platform == "cpu" and is_planar:
        return _convolve_canonically(lhs, rhs, params)
    if platform in ("cuda", "rocm") and _spreads_pixels(rhs, params):
        return _convolve_by_pixel(lhs, rhs, params)
    return _convolve(lhs, rhs, params)


def _spreads_pixels(kernel: Array, params: dict[str, Any]) -> bool:
    """Every pixel of the result reads one pixel and one tap: an upsampling's transposed
    convolution, whose stride (``lhs_dilation``) is the size of its kernel."""
    sizes = tuple(kernel.shape[axis] for axis in params["dimension_numbers"].rhs_spec[2:])
    return (
        math.prod(sizes) > 1
        and tuple(params["lhs_dilation"]) == sizes
        and all(stride == 1 for stride in (*params["window_strides"], *params["rhs_dilation"]))
        and all(
            tuple(own) == (size - 1,) * 2
            for own, size in zip(params["padding"], sizes, strict=True)
        )
        and params["feature_group_count"] == params["batch_group_count"] == 1
    )


def _convolve_by_pixel(lhs: Array, rhs: Array, params: dict[str, Any]) -> Array:
    """A convolution that spreads pixels, as one of a single tap whose channels are then moved.

    XLA:GPU runs it on zeros between the pixels: of 2x2 taps four times the operations, and the
    image four times as large written and read (U-Net at 2048x2048 in 4 blocks: 2.7 of 56 ms).
    """
    spec = params["dimension_numbers"]
    spatial = len(spec.rhs_spec) - 2
    features, channels, *dims = spec.rhs_spec
    kernel = lax.rev(rhs, dims).transpose((channels, *dims, features))
    sizes = kernel.shape[1:-1]
    kernel = kernel.reshape((1,) * spatial + (kernel.shape[0], -1))
    image = lhs.transpose((spec.lhs_spec[0], *spec.lhs_spec[2:], spec.lhs_spec[1]))
    order = tuple(range(spatial + 2))
    nhwc = lax.ConvDimensionNumbers(
        (0, spatial + 1, *order[1:-1]),
        (spatial + 1, spatial, *order[:spatial]),
        (0, spatial + 1, *order[1:-1]),
    )
    single = {
        **params,
        "dimension_numbers": nhwc,
        "lhs_dilation": (1,) * spatial,
        "padding": ((0, 0),) * spatial,
    }
    out = _convolve(image, kernel, single)
    batch, *pixels, _ = out.shape
    out = out.reshape((batch, *pixels, *sizes, rhs.shape[features]))
    pairs = [axis for dim in range(spatial) for axis in (1 + dim, 1 + spatial + dim)]
    out = out.transpose((0, *pairs, 2 * spatial + 1))
    whole = [n * size for n, size in zip(pixels, sizes, strict=True)]
    out = out.reshape((batch, *whole, rhs.shape[features]))
    return out.transpose(np.argsort((spec.out_spec[0], *spec.out_spec[2:], spec.out_spec[1])))


def _convolve(lhs: Array, rhs: Array, params: dict[str, Any]) -> Array:
    return lax.conv_general_dilated_p.bind(lhs, rhs, **params)


def _convolve_canonically(lhs: Array, rhs: Array, params: dict[str, Any]) -> Array:
    spec = params["dimension_numbers"]
    to_nhwc = (spec.lhs_spec[0], *spec.lhs_spec[2:], spec.lhs_spec[1])
    to_hwio = (*spec.rhs_spec[2:], spec.rhs_spec[1], spec.rhs_spec[0])
    image, kernel = lhs.transpose(to_nhwc), rhs.transpose(to_hwio)
    params = {**params, "dimension_numbers": _CANONICAL_2D}
    if image.dtype == np.float64 or math.prod(image.shape[1:3]) < math.prod(kernel.shape[:2]):
        borders = zip(params["padding"], params["lhs_dilation"], strict=True)
        spatial = [(low, high, dilation - 1) for (low, high), dilation in borders]
        image = lax.pad(image, np.zeros((), image.dtype), [(0, 0, 0), *spatial, (0, 0, 0)])
        params.update(padding=((0, 0), (0, 0)), lhs_dilation=(1, 1))
    image, kernel = lax.optimization_barrier((image, kernel))
    out = _convolve(image, kernel, params)
    from_nhwc = np.argsort((spec.out_spec[0], *spec.out_spec[2:], spec.out_spec[1]))
    return lax.optimization_barrier(out).transpose(from_nhwc)


def _differentiable_convolution(lhs: Array, rhs: Array, params: dict[str, Any]) -> Array:
    """Autodiff of the canonical form would give gradients that are not canonical again."""

    @jax.custom_vjp
    def convolve(lhs: Array, rhs: Array) -> Array:
        return _convolve_on_platform(lhs, rhs, params)

    def forward(lhs: Array, rhs: Array) -> tuple[Array, tuple[Array, Array]]:
        return convolve(lhs, rhs), (lhs, rhs)

    def backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
        lhs, rhs = residuals
        (lhs_bar,) = _transposed(lambda x: _convolve(x, rhs, params), lhs, cotangent)
        (rhs_bar,) = _transposed(lambda w: _convolve(lhs, w, params), rhs, cotangent)
        return lhs_bar, rhs_bar

    convolve.defvjp(forward, backward)
    return convolve(lhs, rhs)


def _transposed(function: Any, primal: Array, cotangent: Array) -> list[Array]:
    """``linear_transpose`` with every convolution in it per platform."""
    closed = jax.make_jaxpr(lambda ct: jax.linear_transpose(function, primal)(ct))(cotangent)

    def run(eqn: Any, values: list[Any]) -> list[Any]:
        if eqn.primitive is lax.conv_general_dilated_p:
            lhs, rhs = values
            return [_convolve_on_platform(lhs, rhs, eqn.params)]
        return bind(eqn.primitive, values, eqn.params)

    return evaluate_jaxpr(closed, [cotangent], run)


RULES = (
    Rule(
        (lax.conv_general_dilated_p,),
        convolution,
        Traits(
            Kind.LIBRARY,
            is_contraction=True,
            preserves_finiteness=True,
            linearity=product,
            operations=operations,
        ),
    ),
)
