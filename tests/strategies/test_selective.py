"""Selective strategies: what they keep, and that what is made again is what it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import lrjax
from lrjax.rowgraph.tracing import trace
from lrjax.strategies import Selective, SelectiveNarrow
from lrjax.testing import assert_same_as_column

pytestmark = pytest.mark.usefixtures("x64")

STRATEGIES = (Selective(), SelectiveNarrow())


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def convolve(images, kernel):
    return lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def normalised(images):
    mean = images.mean((0, 1, 2))
    return (images - mean) * lax.rsqrt(jnp.square(images - mean).mean((0, 1, 2)) + 1e-3)


def bottleneck(kernels, images):
    """1x1 to fewer channels, 3x3, 1x1 to more; batch statistics."""
    y = images
    for kernel in kernels:
        y = jax.nn.relu(normalised(convolve(y, kernel)))
    return checkpoint_name(images + y, "block")


ARGS = (
    [normal(1, 1, 8, 2), normal(3, 3, 2, 2, seed=1), normal(1, 1, 2, 8, seed=2)],
    normal(2, 12, 6, 8, seed=3),
)


def kept_shapes(strategy, fun, *args, in_axes=(None, 1)):
    program = trace(fun, in_axes, args, {}).program
    return sorted(program.avals[v].shape for v in strategy.kept_values(program))


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_maps_that_are_kept(strategy):
    """Outputs of narrow convolutions, of wide ones if asked, and statistics."""
    found = [s for s in kept_shapes(strategy, bottleneck, *ARGS) if len(s) == 4 and s[1] > 1]
    narrow = [(2, 12, 6, 2)] * 2
    assert found == (narrow + [(2, 12, 6, 8)] if strategy.keeps_wide else narrow)
    assert (2,) in kept_shapes(strategy, bottleneck, *ARGS)


def extremes(kernels, images):
    """Derivatives of maxima over channels, over rows and over windows."""
    x = convolve(images, kernels[0])
    x = jnp.sin(x) - x.max(3, keepdims=True)
    x = jnp.tanh(convolve(jnp.tanh(x) - jnp.min(jnp.cos(x), 1, keepdims=True), kernels[1]))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def of_complex_numbers(kernels, images):
    spectrum = jnp.fft.fft(convolve(images, kernels[0]).astype(complex), axis=2)
    return jnp.abs(spectrum @ (1j * jnp.ones((2, 3)))) ** 2


def with_a_loop(kernels, images):
    x = convolve(images, kernels[0])
    return lax.fori_loop(0, 3, lambda _, x: jnp.sin(x) * x.mean(), x)


def with_softmax(kernels, images):
    return jax.nn.softmax(convolve(images, kernels[0])) * jax.nn.gelu(images[..., :2])


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
@pytest.mark.parametrize(
    "fun", [bottleneck, extremes, of_complex_numbers, with_a_loop, with_softmax]
)
def test_gradients_are_columns(strategy, fun):
    assert_same_as_column(fun, ARGS, (None, 1), strategy=strategy)


def test_extremes_are_made_with_what_they_are_compared_with():
    assert (2, 12, 6) not in kept_shapes(Selective(), extremes, *ARGS)


def test_explain_tells_what_is_computed_again():
    """Of narrow results the wide 1x1 convolution, of 2 to 8 channels, is one operation more."""
    wide, narrow = (
        lrjax.explain(bottleneck, *ARGS, in_axes=(None, 1), strategy=s).segments[0]
        for s in STRATEGIES
    )
    assert 0 < wide.recomputed < narrow.recomputed < 1
    again = (narrow.recomputed - wide.recomputed) * wide.forward_operations
    assert again == pytest.approx(2 * 2 * 12 * 6 * 2 * 8)


def test_in_a_group_beside_others():
    def network(kernels, images):
        images = checkpoint_name(jnp.tanh(bottleneck(kernels, images)), "first")
        images = checkpoint_name(jnp.tanh(bottleneck(kernels, images)), "second")
        return bottleneck(kernels, images)

    options = {
        "cuts": [("first",), "second"],
        "strategy": ["selective-narrow", "checkpoint", "selective"],
    }
    assert_same_as_column(network, ARGS, (None, 1), **options)


def saved_shapes(strategy, fun, *args):
    """Shapes that a gradient's backward pass gets from the forward pass."""
    by_rows = lrjax.rowwise(fun, in_axes=(None, 1), strategy=strategy)
    _, pull = jax.eval_shape(lambda *args: jax.vjp(by_rows, *args), *args)
    return [leaf.shape for leaf in jax.tree.leaves(pull) if getattr(leaf, "ndim", 0) == 4]


def test_the_backward_pass_gets_what_is_kept_and_the_inputs():
    column, wide, narrow = (
        len(saved_shapes(s, bottleneck, *ARGS)) for s in ("column", *STRATEGIES)
    )
    assert narrow < wide < column
    assert saved_shapes(SelectiveNarrow(), bottleneck, *ARGS).count((2, 12, 6, 2)) == 2
