"""Operations on weights alone whose derivative must see the sum of all cotangents, not its terms.

Clipping, signs and coarse rounding are not additive: such an operation is differentiated once,
however many segments use its result, and never for a part of the batch.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import lrjax
from lrjax.strategies import MicroBatches
from lrjax.testing import assert_same_as_column
from marks import slow

pytestmark = pytest.mark.usefixtures("x64")

KERNEL = np.random.default_rng(1).standard_normal((3, 3, 3, 3)) * 0.3


def images(height=12, batch=4):
    return np.random.default_rng(0).standard_normal((batch, height, 6, 3))


def convolve(image, kernel):
    return lax.conv_general_dilated(
        image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def with_rule(function, rule):
    """A function with a gradient of its own."""
    found = jax.custom_vjp(function)
    found.defvjp(lambda w: (function(w), None), lambda _, ct: (rule(ct),))
    return found


RULES = {
    "clipped": with_rule(lambda w: w, lambda ct: jnp.clip(ct, -0.5, 0.5)),
    "sign": with_rule(lambda w: w, jnp.sign),
    "unit norm": with_rule(lambda w: w, lambda ct: ct / jnp.linalg.norm(ct)),
    "reduce_precision": lambda w: lax.reduce_precision(w, 5, 2),
    "float8": lambda w: w.astype(jnp.float8_e5m2).astype(w.dtype),
}
STRAIGHT_THROUGH = with_rule(lambda w: jnp.round(4 * w) / 4, lambda ct: ct)


def twice(rule):
    def fun(kernel, image):
        kernel = rule(kernel)
        image = checkpoint_name(jnp.sin(convolve(image, kernel)), "first")
        return jnp.sin(convolve(image, kernel)).sum()

    return fun


def made_of_each_other(rule):
    """First needed in the second segment; what is made of it in the second and the third."""

    def fun(kernel, image):
        ruled = rule(kernel)
        other = 2 * ruled + rule(ruled)
        image = checkpoint_name(jnp.sin(convolve(image, kernel)), "first")
        image = checkpoint_name(jnp.sin(convolve(image, other)), "second")
        return convolve(image, ruled + other).sum()

    return fun


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("clipped", "stream"),
        ("float8", "2ps"),
        ("unit norm", ("overl", "checkpoint")),
        pytest.param(*("clipped", "column"), marks=pytest.mark.slow),
        pytest.param(*("clipped", "2ps"), marks=pytest.mark.slow),
        pytest.param(*("sign", ("stream", "2ps")), marks=pytest.mark.slow),
        pytest.param(*("unit norm", "selective"), marks=pytest.mark.slow),
        pytest.param(*("reduce_precision", "overl"), marks=pytest.mark.slow),
        pytest.param(*("float8", "stream"), marks=pytest.mark.slow),
    ],
)
def test_two_segments_use_it(name, strategy):
    by_rows = {"stream", "2ps", "overl"}
    blocks = 3 if strategy in by_rows or isinstance(strategy, tuple) else None
    if isinstance(strategy, tuple):
        blocks = tuple(3 if one in by_rows else None for one in strategy)
    assert_same_as_column(
        twice(RULES[name]), (KERNEL, images()), (None, 1),
        num_blocks=blocks, strategy=strategy, cuts=["first"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "cuts"),
    [
        ("2ps", ["first", "second"]),
        ("overl", [("first",), "second"]),
        pytest.param("stream", ["first", "second"], marks=pytest.mark.slow),
    ],
)
def test_one_is_made_of_another(strategy, cuts):
    fun = made_of_each_other(RULES["clipped"])
    args = KERNEL, images()
    assert_same_as_column(fun, args, (None, 1), num_blocks=2, strategy=strategy, cuts=cuts)


def test_a_plan_of_several_segments():
    def deep(kernel, image):
        kernel = RULES["clipped"](kernel)
        for _ in range(6):
            image = jnp.sin(convolve(image, kernel))
        return jnp.sum(image**2)

    args = KERNEL, images(96, batch=2)
    column = lrjax.memory.profile(jax.grad(deep), *args, target="cpu").peak_bytes
    plan = lrjax.plan(deep, *args, in_axes=(None, 1), budget=column // 2, target="cpu")
    assert len(plan.choices) > 1
    row_fun = lrjax.rowwise(deep, in_axes=(None, 1), plan=plan)
    found, expected = (jax.jit(jax.grad(f))(*args) for f in (row_fun, deep))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def by_parts_of_the_batch(rule):
    return lambda kernel, image: convolve(jnp.sin(convolve(image, rule(kernel))), kernel)


@pytest.mark.parametrize("strategy", ["2ps", *slow("stream", "column")])
def test_an_additive_rule_goes_by_micro_batches(strategy):
    blocks = None if strategy == "column" else 2
    assert_same_as_column(
        by_parts_of_the_batch(STRAIGHT_THROUGH), (KERNEL, images()), (None, 1),
        num_blocks=blocks, strategy=MicroBatches(strategy, 2),
    )  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_any_other_is_refused_under_micro_batches(name):
    fun = lrjax.rowwise(
        by_parts_of_the_batch(RULES[name]), in_axes=(None, 1), strategy=MicroBatches("2ps", 2)
    )
    with pytest.raises(ValueError, match="must see the cotangents of all of them at once"):
        jax.eval_shape(fun, KERNEL, images())


@pytest.mark.parametrize("strategy", ["stream", *slow("2ps", "overl")])
def test_a_factor_of_the_loss_comes_before_what_rounds_maps(strategy):
    def fun(kernel, image):
        rounded = lax.reduce_precision(convolve(image, kernel), 5, 2)
        return 0.3 * jnp.sin(convolve(rounded, kernel)).sum()

    assert_same_as_column(fun, (KERNEL, images()), (None, 1), num_blocks=3, strategy=strategy)


@pytest.mark.parametrize(("bits", "passes"), [((11, 52), 1), ((8, 23), 2)])
def test_what_rounds_nothing_takes_one_pass(bits, passes):
    def fun(kernel, image):
        return jnp.sin(lax.reduce_precision(convolve(image, kernel), *bits)).sum()

    found = lrjax.explain(fun, KERNEL, images(), in_axes=(None, 1), num_blocks=3, wrt=0)
    assert len(found.segments[0].passes) == passes


@pytest.mark.parametrize("strategy", ["overl", *slow("2ps", "stream")])
def test_float8_maps(strategy):
    """Compared tightly: the checker allows what a float8 rounds."""

    def fun(kernel, image):
        rounded = RULES["float8"](convolve(image, kernel))
        return jnp.sin(convolve(rounded, kernel)).sum()

    row_fun = lrjax.rowwise(fun, in_axes=(None, 1), num_blocks=3, strategy=strategy)
    found, expected = (jax.jit(jax.grad(f, (0, 1)))(KERNEL, images()) for f in (row_fun, fun))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-11)
