"""Rows of the image that column never reads may hold anything: no gradient is made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lrjax
from marks import STRATEGIES

KERNELS = 0.3 * np.random.default_rng(0).standard_normal((2, 3, 3, 1, 1))
IMAGE = np.abs(np.random.default_rng(1).standard_normal((1, 33, 8, 1))) + 0.1


def convolve(image, kernel, stride=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        image, kernel, (stride, stride), "VALID", dimension_numbers=numbers
    )


def head(kernels, image):
    return jnp.mean(convolve(jnp.tanh(image), kernels[1]) ** 2)


def strided(kernels, image):
    """Of 32 rows the last is not read."""
    return head(kernels, convolve(image[:, :32], kernels[0], 2))


def cropped_above(kernels, image):
    return head(kernels, convolve(jnp.log(image)[:, 2:], kernels[0]))


def cropped_below(kernels, image):
    return head(kernels, convolve(jnp.log(image)[:, :-2], kernels[0]))


def pooled(kernels, image):
    window = (1, 2, 2, 1)
    most = lax.reduce_window(image, -jnp.inf, lax.max, window, window, "VALID")
    return head(kernels, convolve(most, kernels[0]))


def averaged(kernels, image):
    window = (1, 4, 2, 1)
    sums = lax.reduce_window(image, 0.0, lax.add, window, window, "VALID")
    return head(kernels, kernels[0, 0, 0, 0, 0] * sums)


def made_within(kernels, image):
    rows = convolve(image, kernels[0])
    is_last = jnp.arange(rows.shape[1])[:, None, None] == rows.shape[1] - 1
    return head(kernels, jnp.where(is_last, jnp.nan, rows)[:, :-1])


# Per function: where rows that it does not read begin and end, and what they hold.
CASES = {
    "stride": (strided, slice(31, None), np.nan),
    "infinite": (strided, slice(31, None), np.inf),
    "above, a pole": (cropped_above, slice(0, 2), 0.0),
    "below, a pole": (cropped_below, slice(-2, None), 0.0),
    "pool": (pooled, slice(32, None), np.nan),
    "average": (averaged, slice(32, None), np.nan),
    "made within": (made_within, slice(0, 0), 0.0),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_columns(name, strategy):
    fun, rows, held = CASES[name]
    image = IMAGE.copy()
    image[:, rows] = held
    expected = jax.value_and_grad(fun, (0, 1))(KERNELS, image)
    assert np.isfinite(expected[1][0]).all()
    for blocks in (1, 2, 3, 5):
        row_fun = lrjax.rowwise(fun, in_axes=(None, 1), num_blocks=blocks, strategy=strategy)
        found = jax.jit(jax.value_and_grad(row_fun, (0, 1)))(KERNELS, image)
        check(found, expected)


def check(found, expected):
    """At a pole in an unread row the image's gradient is 0 / 0 in column, or 0 where not made."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for own, column in (map(np.asarray, pair) for pair in pairs):
        known = np.isfinite(column)
        np.testing.assert_allclose(own[known], column[known], rtol=1e-11, atol=1e-13)
