"""Reductions and products, over rows and beside them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lrjax
from graphs import check_rule

pytestmark = pytest.mark.usefixtures("x64")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


REDUCTIONS = {"sum": jnp.sum, "max": jnp.max, "min": jnp.min, "prod": jnp.prod, "mean": jnp.mean}


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("axis", [0, 2, (0, 2)])
def test_beside_rows(name, axis):
    reduce = REDUCTIONS[name]
    check_rule(lambda x: reduce(x, axis=axis) * 2, normal(2, 7, 3), strategies=("stream", "2ps"))


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("axis", [1, (0, 1), None])
def test_over_rows(name, axis):
    """The gradient of an extreme asks which element was chosen: both are of one map."""
    reduce = REDUCTIONS[name]
    exact = name in ("sum", "mean")
    check_rule(
        lambda x: reduce(x, axis=axis) * 2,
        normal(2, 7, 3),
        one_loop=exact,
        falls_back=not exact,
        strategies=("stream", "2ps") if exact else ("stream", "2ps", "overl"),
    )


# A block of 8 * 16 * 31 elements, which XLA:CPU would add up with one accumulator.
IMAGES = np.random.default_rng(0).uniform(0, 1, (8, 8, 32, 31, 1)).astype(np.float32)
SMALL = 2e-7


def mean_error(sums):
    exact = IMAGES.sum((1, 2, 3, 4), dtype=np.float64)
    return np.abs(np.ravel(sums) / exact - 1).mean()


@pytest.mark.parametrize("axis", [(0, 1, 2), None])
def test_sums_over_rows_round_little(axis):
    by_rows = jax.jit(lrjax.rowwise(lambda x: x.sum(axis), in_axes=1, num_blocks=2))
    assert mean_error([by_rows(image) for image in IMAGES]) <= SMALL


@pytest.mark.parametrize("strategy", ["stream", "2ps", "overl"])
@pytest.mark.parametrize("spread", [lambda x: x, lambda x: jnp.broadcast_to(x, IMAGES.shape[1:])])
def test_sums_of_cotangents_round_little(strategy, spread):
    """What is the same for all rows gets a sum over rows."""
    by_rows = lrjax.rowwise(
        lambda scale, x: spread(scale) * x, in_axes=(None, 1), num_blocks=2, strategy=strategy
    )
    scale = np.ones((1, 1, 1, 1), np.float32)
    gradient = jax.jit(lambda x: jax.vjp(lambda s: by_rows(s, x), scale)[1](jnp.ones_like(x))[0])
    assert mean_error([gradient(image) for image in IMAGES]) <= SMALL


@pytest.mark.parametrize("reduce", [jnp.all, jnp.any])
@pytest.mark.parametrize("axis", [1, 2, None])
def test_booleans(reduce, axis):
    check_rule(lambda x: reduce(x > -1.5, axis=axis), normal(2, 7, 3))


def test_integers_over_rows():
    def op(image, labels):
        bits = [lax.reduce_and(labels, (1,)), lax.reduce_or(labels, (1,))]
        return labels.sum(1), labels.max((0, 1)), labels.min(), jnp.prod(labels, 1), bits

    labels = np.random.default_rng(0).integers(1, 7, (2, 7, 3))
    check_rule(op, normal(2, 7, 3), labels)


@pytest.mark.parametrize("arg", [jnp.argmax, jnp.argmin])
@pytest.mark.parametrize("axis", [0, 2])
def test_positions_beside_rows(arg, axis):
    check_rule(lambda x: arg(x, axis=axis), normal(2, 7, 3))


def test_extremes_on_one_side_of_zero():
    """Rows outside the image must not pass for the largest, or the smallest."""

    def op(x):
        return jnp.max(jnp.tanh(x) - 2, 1), jnp.min(jnp.tanh(x) + 2, 1)

    check_rule(op, normal(2, 7, 3), falls_back=True, strategies=("stream",))


def test_positions_over_rows_fall_back():
    check_rule(lambda x: jnp.argmax(x, axis=1), normal(2, 7, 3), falls_back=True)


def test_ties_of_maxima():
    image = np.random.default_rng(0).integers(0, 2, (2, 7, 3)).astype(float)
    check_rule(lambda x: jnp.max(x, axis=1), image, falls_back=True)
    check_rule(lambda x: jnp.max(x, axis=2), image)


PRODUCTS = {
    "pixels by a matrix": ("nhc,cd->nhd", (2, 7, 3), (3, 4), (1, None)),
    "matrix by pixels": ("dc,nhc->dnh", (4, 3), (2, 7, 3), (None, 1)),
    "rows in the batch": ("nhc,nhd->nhcd", (2, 7, 3), (2, 7, 4), (1, 1)),
    "rows in the batch, one whole": ("nhc,hd->nhcd", (2, 7, 3), (7, 4), (1, None)),
    "contracted over rows": ("nhc,nhd->cd", (2, 7, 3), (2, 7, 4), (1, 1)),
    "contracted, one whole": ("nhc,h->nc", (2, 7, 3), (7,), (1, None)),
    "whole first": ("h,nhc->nc", (7,), (2, 7, 3), (None, 1)),
    "per-row matrices": ("nhc,hcd->nhd", (2, 7, 3), (7, 3, 2), (1, 0)),
    "attention along columns": ("nhwc,nhvc->nhwv", (1, 6, 3, 2), (1, 6, 3, 2), (1, 1)),
    "batch beside rows": ("nhc,ncd->nhd", (2, 7, 3), (2, 3, 4), (1, None)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name):
    equation, *shapes, axes = PRODUCTS[name]
    images = (normal(*shape, seed=i) for i, shape in enumerate(shapes))
    check_rule(
        lambda x, y: jnp.einsum(equation, x, y),
        *images,
        axes=axes,
        strategies=("stream", "2ps"),
    )


def test_every_row_with_every_other_falls_back():
    check_rule(
        lambda x: jnp.einsum("nhc,nkc->nhk", jnp.sin(x), x), normal(2, 6, 3), falls_back=True
    )


def test_softmax_and_cross_entropy():
    def op(image, labels):
        chosen = jax.nn.log_softmax(image) * jax.nn.one_hot(labels, 3)
        return -chosen.sum((1, 2)).mean()

    labels = np.random.default_rng(0).integers(0, 3, (2, 8))
    check_rule(op, normal(2, 8, 3), labels)


def test_variance_is_two_sweeps():
    check_rule(lambda x: x.var((0, 1)), normal(2, 7, 3), one_loop=False)


def test_batch_statistics_in_the_middle():
    def op(image, scale):
        image = jnp.sin(image[:, 1:] * image[:, :-1])
        normed = (image - image.mean((0, 1))) * lax.rsqrt(image.var((0, 1)) + 1e-3)
        return (normed * scale)[:, ::2] ** 2, image.mean((0, 1))

    check_rule(op, normal(2, 9, 3), normal(3, seed=1), axes=(1, None), one_loop=False)


def test_logsumexp_over_rows():
    check_rule(lambda x: jax.nn.logsumexp(x, axis=1), normal(2, 7, 3), one_loop=False)


def test_sums_are_accumulated_in_float32():
    """A sum of 4096 ones in bfloat16 would stop at 256."""
    import lrjax

    image = jnp.ones((1, 4096, 1), jnp.bfloat16)
    # jnp.sum would convert to float32 itself.
    total = lrjax.rowwise(lambda x: lax.reduce_sum(x * 1, (0, 1, 2)), in_axes=1, num_blocks=4096)(
        image
    )
    assert total.dtype == jnp.bfloat16
    assert float(total) == 4096
