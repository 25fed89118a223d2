"""Loops and branches inside the function."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lrjax
from graphs import assert_row_local, check_rule, fallbacks, graphs_of
from lrjax.testing import assert_same_as_column

pytestmark = pytest.mark.usefixtures("x64")

STRATEGIES = ("stream", "2ps", "overl")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def blur(x, kernel):
    """A convolution of three rows by hand."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
    return jnp.tanh(sum(padded[:, i : i + x.shape[1]] * kernel[i] for i in range(3)))


def layers(x, kernels, reverse=False):
    return lax.scan(lambda x, k: (blur(x, k), jnp.sin(x)), x, kernels, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_over_layers(reverse):
    def op(x, kernels):
        x, between = layers(x, kernels, reverse)
        return x, between[1] * between[2]

    check_rule(op, normal(2, 13, 3), normal(3, 3, 3, seed=1), axes=(1, None), num_blocks=4)


def test_scan_whose_maps_are_scanned_again():
    """What one loop stacks, the next takes apart: the stack is never made."""

    def op(x, kernels):
        _, between = layers(x, kernels)
        return lax.scan(lambda total, y: (total + y**2, None), jnp.zeros_like(x), between)[0]

    args, axes = (normal(2, 13, 3), normal(3, 3, 3, seed=1)), (1, None)
    check_rule(op, *args, axes=axes)
    names = {n.equation.primitive.name for graph in graphs_of(op, args, axes) for n in graph.nodes}
    assert "concatenate" not in names


@pytest.mark.parametrize("stacks", [False, True])
def test_a_scan_over_no_layers(stacks):
    def op(x, kernels):
        x, between = layers(jnp.sin(x), kernels)
        return (x, between) if stacks else x

    check_rule(op, normal(2, 13, 3), normal(0, 3, 3, seed=1), axes=(1, None), num_blocks=4)


def test_gradient_of_a_scan():
    """Forward and backward loops within one function, as ``rowwise(value_and_grad)`` has them."""

    def loss(kernels, x):
        return jnp.sum(layers(x, kernels)[0] ** 2)

    args, axes = (normal(3, 3, 3, seed=1), normal(2, 13, 3)), (None, 1)
    assert_row_local(jax.value_and_grad(loss), args, axes, one_loop=False)
    assert_same_as_column(jax.value_and_grad(loss), args, axes, num_blocks=4)


def test_flax_scan_over_blocks():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = nn.Conv(2, (3, 3), dtype=jnp.float64, param_dtype=jnp.float64)(x)
            return nn.tanh(x), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return scanned()(x, None)[0]

    image = normal(1, 13, 4, 2)
    variables = Net().init(jax.random.key(0), image)
    fun = Net().apply
    assert_row_local(fun, (variables, image), (None, 1))
    for strategy in STRATEGIES:
        assert_same_as_column(fun, (variables, image), (None, 1), num_blocks=4, strategy=strategy)


def test_a_long_scan_falls_back():
    def op(x):
        return lax.scan(lambda x, _: (jnp.sin(x) + x, None), x, None, length=5000)[0]

    graphs = graphs_of(lambda x: op(jnp.cos(x)), (normal(1, 5, 2),), (1,))
    assert any("scan" in fallbacks(graph) for graph in graphs)


def test_while_over_rows_falls_back():
    def op(x, labels, count):
        return lax.fori_loop(0, count, lambda _, labels: labels * 2 + 1, labels) * x

    labels = np.arange(18).reshape(2, 9, 1)
    check_rule(op, normal(2, 9, 3), labels, np.int64(3), axes=(1, 1, None), falls_back=True)


def test_a_loop_without_a_reverse_mode_behind_stop_gradient():
    """What a row loop makes of it has no tangent, as in column."""

    def op(x, count):
        fixed = lax.stop_gradient(jnp.sin(x))
        return lax.fori_loop(0, count, lambda _, y: jnp.tanh(y), fixed) * x

    check_rule(op, normal(2, 9, 3), np.int64(3), axes=(1, None), falls_back=True)


@pytest.mark.parametrize(
    "use",
    [
        lambda fixed, x: lax.stop_gradient(fixed) * x,
        lambda fixed, x: lax.stop_gradient(fixed.sum(1, keepdims=True)) * x,
        lambda fixed, x: (fixed > 0.1) * x,
        lambda fixed, x: jnp.where(fixed > fixed.mean(), x, 0),
        lambda fixed, x: jnp.round(3 * fixed) * x,
        lambda fixed, x: (3 * fixed).astype(np.int32) * x,
        lambda fixed, x: jnp.argmax(fixed, -1)[..., None] * x,
    ],
)
def test_a_loop_without_a_reverse_mode_of_which_no_gradient_is_wanted(use):
    """Fixed points to a tolerance, though all that they are made of has a gradient."""

    def op(x, count):
        x = jnp.sin(x)
        return use(lax.fori_loop(0, count, lambda _, y: jnp.tanh(0.3 * y) + x, x), x)

    check_rule(op, normal(2, 9, 3), np.int64(3), axes=(1, None), falls_back=True)


def test_while_without_rows():
    def op(x, power):
        factor = lax.while_loop(lambda s: s[0] < 5, lambda s: (s[0] + 1, s[1] * 1.1), (power, 1.0))
        return jnp.sin(x) * factor[1]

    check_rule(op, normal(2, 9, 3), np.int64(2), axes=(1, None))


@pytest.mark.parametrize("flag", [False, True])
def test_branches_row_by_row(flag):
    def op(x, flag):
        x = jnp.sin(x)
        return lax.cond(flag, lambda x: jnp.exp(x) * 2, lambda x: x**3, x) ** 2

    check_rule(op, normal(2, 9, 3), np.bool_(flag), axes=(1, None))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_switch_with_a_constant(index):
    def op(x, index):
        branches = [lambda x: jax.nn.relu(x) * 1.5, lambda x: x * 0 + 2.0, jnp.zeros_like]
        return lax.switch(index, branches, jnp.sin(x)) * x

    check_rule(op, normal(2, 9, 3), np.int64(index), axes=(1, None))


def test_a_branch_with_a_parameter():
    """Its gradient is a sum over rows within a branch: exact, by column."""

    def op(x, scale, flag):
        return lax.cond(flag, lambda x: x * scale, lambda x: x, jnp.sin(x)) * x

    check_rule(
        op,
        normal(2, 9, 3),
        normal(3, seed=1),
        np.bool_(True),
        axes=(1, None, None),
        falls_back=True,
    )


def test_branches_that_mix_rows_fall_back():
    def op(x, flag):
        return lax.cond(flag, lambda x: x[:, 1:] + x[:, :-1], lambda x: x[:, 1:], jnp.sin(x))

    check_rule(op, normal(2, 9, 3), np.bool_(True), axes=(1, None), falls_back=True)


def test_branches_with_convolutions_fall_back_and_explain_says_so():
    def convolved(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def fun(kernel, x, flag):
        x = convolved(x, kernel)
        return lax.cond(flag, lambda x: convolved(jnp.tanh(x), kernel), jnp.sin, x)

    args = (normal(3, 3, 2, 2), normal(2, 9, 4, 2, seed=1), np.bool_(True))
    axes = (None, 1, None)
    assert_same_as_column(fun, args, axes, num_blocks=3)
    explained = lrjax.explain(fun, *args, in_axes=axes, num_blocks=3)
    reasons = [text for text in explained.fallbacks if text.startswith("cond")]
    assert any("mixes neighbouring rows" in text for text in reasons), reasons
    assert all(text in explained.tables() for text in reasons)
    assert "a branch is not row-local" in str(explained)
