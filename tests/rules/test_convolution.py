"""Convolutions in full: forward, input gradient and weight gradient of every case."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lrjax
from graphs import check_rule
from lrjax.rules import convolution as convolutions
from marks import slow

pytestmark = pytest.mark.usefixtures("x64")

NHWC = ("NHWC", "HWIO", "NHWC")
HALO = ((1, 1), (1, 1))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def convolution(kernel, strides=(1, 1), padding=HALO, spec=NHWC, **options):
    weights = normal(*kernel, seed=1) / 2

    def op(image, weights):
        return lax.conv_general_dilated(
            image, weights, strides, padding, dimension_numbers=spec, **options
        )

    return op, weights


def check(op, weights, image, row_axis=1, **options):
    check_rule(op, image, weights, axes=(row_axis, None), **options)


@pytest.mark.parametrize("padding", ["SAME", "VALID", HALO, ((2, 0), (0, 1)), ((0, 3), (1, 1))])
@pytest.mark.parametrize("kernel", [2, 3, *slow(1, 4)])
def test_padding(kernel, padding):
    op, weights = convolution((kernel, 2, 2, 3), padding=padding)
    check(op, weights, normal(2, 11, 4, 2), strategies=("stream", "2ps"))


@pytest.mark.parametrize("padding", [((-1, 0), (0, 0)), ((0, -2), (0, 0)), ((-1, 2), (1, -1))])
def test_negative_padding(padding):
    op, weights = convolution((3, 2, 2, 2), padding=padding)
    check(op, weights, normal(1, 11, 4, 2))


@pytest.mark.parametrize("padding", ["SAME", "VALID", HALO])
@pytest.mark.parametrize("stride", [2, 4, *slow(3)])
@pytest.mark.parametrize("kernel", [3, 4, *slow(1)])
def test_strides(kernel, stride, padding):
    op, weights = convolution((kernel, 1, 1, 2), (stride, 2), padding)
    check(op, weights, normal(1, 13, 4, 1), strategies=("stream", "2ps"))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [2, 3])
@pytest.mark.parametrize("kernel", [2, 3])
def test_kernel_dilation(kernel, dilation, stride):
    op, weights = convolution((kernel, 3, 1, 2), (stride, 1), "SAME", rhs_dilation=(dilation, 1))
    check(op, weights, normal(1, 12, 3, 1), strategies=("stream", "overl"))


@pytest.mark.parametrize("stride", [1, 2, *slow(3)])
@pytest.mark.parametrize("base", [2, 3])
@pytest.mark.parametrize("kernel", [2, 3, *slow(1, 4)])
def test_input_dilation(kernel, base, stride):
    op, weights = convolution((kernel, 2, 1, 2), (stride, 1), HALO, lhs_dilation=(base, 2))
    check(op, weights, normal(1, 7, 3, 1), strategies=("stream", "2ps"))


def test_everything_at_once():
    op, weights = convolution(
        (3, 2, 1, 4),
        (2, 1),
        ((3, 1), (0, 2)),
        lhs_dilation=(3, 2),
        rhs_dilation=(2, 1),
        feature_group_count=2,
    )
    check(op, weights, normal(2, 9, 3, 2))


@pytest.mark.parametrize(("groups", "features"), [(2, 2), (2, 4), (4, 4), (4, 8)])
def test_feature_groups(groups, features):
    op, weights = convolution((3, 2, 4 // groups, features), feature_group_count=groups)
    check(op, weights, normal(2, 9, 3, 4))


@pytest.mark.parametrize("stride", [1, 2])
def test_batch_groups(stride):
    op, weights = convolution((3, 2, 2, 4), (stride, 1), batch_group_count=2)
    check(op, weights, normal(4, 9, 3, 2))


@pytest.mark.parametrize(
    ("spec", "row_axis"),
    [
        (("NHWC", "HWIO", "NHWC"), 2),
        (("NCHW", "OIHW", "NCHW"), 2),
        (("NCHW", "OIHW", "NCHW"), 3),
        (("NCHW", "HWIO", "NHWC"), 2),
        (("HWNC", "OHWI", "CHWN"), 0),
        (("CHWN", "IHWO", "HWNC"), 1),
        (("WNCH", "WIOH", "CWHN"), 3),
        (("WNCH", "WIOH", "CWHN"), 0),
    ],
)
def test_dimension_numbers(spec, row_axis):
    sizes = {"N": 2, "C": 2, "H": 9, "W": 9}
    kernel = {"I": 2, "O": 3, "H": 3, "W": 2}
    op, weights = convolution([kernel[a] for a in spec[1]], (2, 1), spec=spec)
    check(op, weights, normal(*(sizes[a] for a in spec[0])), row_axis)


@pytest.mark.parametrize("stride", [1, 2])
def test_one_dimension(stride):
    op, weights = convolution((3, 2, 2), (stride,), ((2, 1),), ("NWC", "WIO", "NWC"))
    check(op, weights, normal(2, 11, 2))


@pytest.mark.parametrize("row_axis", [1, 2, 3])
def test_three_dimensions(row_axis):
    spec = ("NDHWC", "DHWIO", "NDHWC")
    op, weights = convolution((3, 2, 2, 1, 2), (2, 1, 2), "SAME", spec)
    check(op, weights, normal(1, 7, 6, 5, 1), row_axis)


def test_rows_in_the_batch():
    """The weight gradient contracts rows as if they were features."""
    op, weights = convolution((3, 2, 2, 3))
    check(op, weights, normal(7, 4, 3, 2), row_axis=0)


def test_rows_in_the_features():
    """A reduction over rows; its value is whole after the loop."""
    op, weights = convolution((3, 2, 6, 3))
    check(op, weights, normal(1, 4, 3, 6), row_axis=3)


def test_rows_in_the_filters():
    def op(filters):
        image = jnp.asarray(normal(2, 5, 4, 2, seed=4))
        return lax.conv_general_dilated(image, filters, (1, 1), "SAME", dimension_numbers=NHWC)

    check_rule(op, normal(3, 2, 2, 7), axes=3)


def test_rows_in_the_batch_of_a_grouped_convolution_fall_back():
    op, weights = convolution((3, 2, 1, 4), feature_group_count=2)
    check_rule(op, normal(7, 4, 3, 2), weights, axes=(0, None), falls_back=True)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("padding", [((1, 1), (0, 0)), ((2, 0), (0, 0)), ((0, 0), (0, 0))])
def test_rows_in_both_operands(padding, dilation):
    """A weight gradient as a forward operation: every row meets a window, summed over rows.

    Its own gradient reverses rows.
    """

    def op(image, other):
        return lax.conv_general_dilated(
            image, other, (1, 1), padding, rhs_dilation=(dilation, 1), dimension_numbers=NHWC
        )

    other = normal(35 // dilation, 3, 2, 2, seed=1)
    check_rule(op, normal(1, 35, 3, 2), other, axes=(1, 0), falls_back=True)


def test_kernel_made_of_rows_alone():
    """Rows only in the right operand, the left exists whole; the gradient reverses rows."""

    def op(rows):
        pattern = jnp.asarray(normal(1, 11, 3, 2, seed=4))
        return lax.conv_general_dilated(
            pattern, rows, (1, 1), ((0, 0), (0, 0)), dimension_numbers=NHWC
        )

    check_rule(op, normal(9, 3, 2, 2), axes=0, falls_back=True)


@pytest.mark.parametrize("height", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", ((2, 2), (0, 0))])
def test_fewer_rows_than_the_kernel(height, padding):
    op, weights = convolution((5, 1, 1, 2), padding=padding)
    check(op, weights, normal(2, height, 3, 1), num_blocks=height)


def test_depthwise_then_pointwise():
    """MobileNet's pair: the weight gradient of a depthwise convolution is a grouped one."""

    def op(image, depthwise, pointwise):
        options = {"dimension_numbers": NHWC}
        image = lax.conv_general_dilated(
            image, depthwise, (2, 2), "SAME", feature_group_count=3, **options
        )
        return lax.conv_general_dilated(jnp.tanh(image), pointwise, (1, 1), "SAME", **options)

    images = (normal(2, 11, 4, 3), normal(3, 3, 1, 3, seed=1), normal(1, 1, 3, 2, seed=2))
    check_rule(op, *images, axes=(1, None, None))


def test_mixed_precision_accumulation():
    """``preferred_element_type``: float32 rows, float64 sums."""

    def op(image, weights):
        return lax.conv_general_dilated(
            image.astype(jnp.float32),
            weights.astype(jnp.float32),
            (1, 1),
            "SAME",
            dimension_numbers=NHWC,
            preferred_element_type=jnp.float64,
        )

    image, weights = (
        x.astype(np.float32).astype(float) for x in (normal(1, 9, 3, 2), normal(3, 3, 2, 2))
    )
    check_rule(op, image, weights, axes=(1, None))


@pytest.mark.users_compiler
@pytest.mark.parametrize("strategy", ["stream", "2ps", "overl"])
def test_convolutions_in_loops_are_those_that_xla_cpu_is_fast_at(strategy):
    """In canonical order, though the maps are smaller than the kernel, and in float64 unpadded."""

    def fun(image, weights):
        for _ in range(2):
            image = lax.conv_general_dilated(image, weights, (2, 1), "SAME", dimension_numbers=NHWC)
        return image

    by_rows = lrjax.rowwise(fun, in_axes=(1, None), num_blocks=2, strategy=strategy)
    gradient = jax.grad(lambda *args: by_rows(*args).sum(), argnums=(0, 1))
    compiled = jax.jit(gradient).lower(normal(1, 8, 2, 2), normal(3, 3, 2, 2)).compile()
    found = re.findall(
        r" convolution\(.*?window={(.*?)}, dim_labels=(\S+?)[,\n]", compiled.as_text()
    )
    assert {labels for _, labels in found} == {"b01f_01io->b01f"}
    assert not any("pad=" in window or "lhs_dilate" in window for window, _ in found)


@pytest.mark.parametrize("spec", [NHWC, ("NCHW", "OIHW", "NHWC")])
@pytest.mark.parametrize("size", [(2, 2), (2, 3), (1, 4)])
def test_upsampling_on_gpus(size, spec):
    """As a product of single pixels and a shuffle; run here on the CPU."""
    image, kernel = normal(2, 5, 7, 3), normal(*size, 3, 4, seed=1)
    if spec != NHWC:
        image, kernel = image.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1)
    padding = [(n - 1, n - 1) for n in size]
    made = jax.make_jaxpr(
        lambda x, w: lax.conv_general_dilated(
            x, w, (1, 1), padding, lhs_dilation=size, dimension_numbers=spec
        )
    )(image, kernel)
    params = made.eqns[0].params
    assert convolutions._spreads_pixels(kernel, params)
    found = convolutions._convolved_for(image, kernel, platform="cuda", **params)
    (expected,) = jax.core.eval_jaxpr(made.jaxpr, made.consts, image, kernel)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change", [{"padding": ((1, 1), (0, 1))}, {"lhs_dilation": (1, 2)}, {"rhs_dilation": (2, 1)}]
)
def test_other_transposed_convolutions_stay(change):
    image, kernel = normal(2, 5, 7, 3), normal(2, 2, 3, 4)
    options = {"padding": ((1, 1), (1, 1)), "lhs_dilation": (2, 2), **change}
    made = jax.make_jaxpr(
        lambda x, w: lax.conv_general_dilated(x, w, (1, 1), dimension_numbers=NHWC, **options)
    )(image, kernel)
    assert not convolutions._spreads_pixels(kernel, made.eqns[0].params)
