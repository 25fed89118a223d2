"""Pooling windows and their gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from graphs import check_rule
from marks import slow

pytestmark = pytest.mark.usefixtures("x64")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


KINDS = {"max": (lax.max, -np.inf), "min": (lax.min, np.inf), "sum": (lax.add, 0.0)}


def pooling(kind, size, stride=1, padding="VALID", dilation=1, base=1, width=2):
    combine, start = KINDS[kind]
    if not isinstance(padding, str):
        padding = ((0, 0), padding, (0, 0), (0, 0))

    def op(image):
        return lax.reduce_window(
            image,
            start,
            combine,
            (1, size, width, 1),
            (1, stride, 1, 1),
            padding,
            base_dilation=(1, base, 1, 1),
            window_dilation=(1, dilation, 1, 1),
        )

    return op


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride", [1, 3, *slow(2)])
@pytest.mark.parametrize("size", [2, 3, *slow(1)])
def test_size_and_stride(kind, size, stride):
    check_rule(pooling(kind, size, stride), normal(2, 11, 3, 2), strategies=("stream", "2ps"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", ["SAME", (2, 0), *slow((1, 1), (0, 1), (1, 2))])
@pytest.mark.parametrize("stride", [1, 2])
def test_padding(kind, padding, stride):
    check_rule(pooling(kind, 3, stride, padding), normal(1, 10, 3, 2))


@pytest.mark.parametrize("kind", ["sum"])
@pytest.mark.parametrize(("dilation", "base"), [(2, 1), (1, 2), (1, 3), (3, 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_dilated_sums(kind, dilation, base, stride):
    op = pooling(kind, 3, stride, (2, 1), dilation, base)
    check_rule(op, normal(1, 10, 3, 2))


@pytest.mark.parametrize("kind", ["max", "min"])
@pytest.mark.parametrize(("dilation", "base"), [(2, 1), (1, 2), (3, 2)])
def test_dilated_extremes_forward(kind, dilation, base):
    """Column has no gradient for these, nor has a step of 2PS or OverL."""
    pool = pooling(kind, 3, 2, (1, 1), dilation, base)

    def op(image):
        return jnp.nan_to_num(pool(lax.stop_gradient(image)), posinf=9.0, neginf=-9.0), image**2

    check_rule(op, normal(1, 10, 3, 2), strategies=("stream",))


@pytest.mark.parametrize("kind", ["max", "min"])
def test_tangents(kind):
    """``select_and_gather_add``, which forward-mode differentiation makes."""
    pool = pooling(kind, 3, 2, (1, 1))

    def op(image, tangent):
        return jax.jvp(pool, (image,), (tangent,))[1]

    images = normal(1, 9, 3, 2), normal(1, 9, 3, 2, seed=1)
    check_rule(op, *images, axes=(1, 1))


@pytest.mark.parametrize("kind", ["max", "min"])
@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(2, 2, (0, 0)), (3, 2, (1, 1)), (2, 3, (0, 1))]
)
def test_gradient_as_a_forward_operation(kind, size, stride, padding):
    """``select_and_scatter_add`` with rows in both operands, and its own gradient."""
    pool = pooling(kind, size, stride, padding)

    def op(image):
        out, pull = jax.vjp(pool, image)
        return pull(jnp.tanh(out))[0]

    check_rule(op, normal(1, 11, 3, 1))


def test_ties_go_where_column_sends_them():
    image = np.random.default_rng(0).integers(0, 3, (2, 12, 4, 2)).astype(float)
    check_rule(pooling("max", 3, 2, (1, 1)), image)
    check_rule(pooling("min", 2, 2), image)


@pytest.mark.parametrize("include", [True, False])
def test_flax_average_pooling(include):
    def op(image):
        return nn.avg_pool(image, (3, 2), (2, 1), "SAME", count_include_pad=include)

    check_rule(op, normal(1, 11, 4, 2))


def test_flax_max_pooling():
    check_rule(lambda x: nn.max_pool(x, (3, 3), (2, 2), "SAME"), normal(1, 11, 4, 2))


@pytest.mark.parametrize("row_axis", [0, 2, 3])
def test_other_row_axes(row_axis):
    def op(image):
        window = [1, 1, 1, 1]
        window[row_axis] = 2
        return lax.reduce_window(image, -jnp.inf, lax.max, window, window, "VALID")

    check_rule(op, normal(6, 7, 6, 5), axes=row_axis)


def test_windows_that_cross_no_rows():
    def op(image):
        return lax.reduce_window(image, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 1), "VALID")

    check_rule(op, normal(2, 7, 4, 3))


@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_integers(dtype):
    """The identity of an integer's maximum is not infinite."""

    def op(image, labels):
        low = np.iinfo(dtype).min
        pool = lax.reduce_window(
            labels, np.asarray(low, dtype), lax.max, (1, 3, 1), (1, 2, 1), ((0, 0), (1, 1), (0, 0))
        )
        return pool, image**2

    labels = np.random.default_rng(0).integers(0, 9, (2, 11, 3)).astype(dtype)
    check_rule(op, normal(2, 11, 3), labels)


def test_pooling_of_pooling():
    def op(image):
        image = pooling("max", 3, 2, (1, 1))(image)
        return pooling("min", 2, 1, (1, 0))(pooling("sum", 2, 2)(image))

    check_rule(op, normal(1, 19, 5, 1))


def test_overlapping_pooling_before_a_convolution():
    """The convolution's cotangents go on outside the image; windows there touch rows inside."""
    kernel = normal(3, 1, 2, 2)

    def op(image):
        pooled = jnp.sin(pooling("max", 3, 1, (1, 1), width=1)(image))
        return lax.conv_general_dilated(
            pooled, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    check_rule(op, normal(1, 10, 3, 2), strategies=("stream",))


def test_a_general_window_falls_back():
    """A window with a computation of its own has no rule (and in column no gradient)."""

    def op(image, labels):
        def combine(a, b):
            return jnp.bitwise_xor(a, b)

        windows = lax.reduce_window(labels, 0, combine, (1, 2, 1), (1, 2, 1), "VALID")
        return windows, image**2

    labels = np.random.default_rng(0).integers(0, 9, (2, 8, 3))
    check_rule(op, normal(2, 8, 3), labels, falls_back=True)
