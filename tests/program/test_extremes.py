"""Maxima whose gradient asks which element was chosen: no cotangent is lost to rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lrjax
from graphs import graphs_of
from lrjax.program.comparisons import compared_extremes, is_comparison, simpler_comparisons
from lrjax.program.inline import flatten
from lrjax.testing import assert_same_as_column

pytestmark = pytest.mark.usefixtures("x64")

AXES = (None, None, None, 1)


def convolve(image, weights):
    return lax.conv_general_dilated(
        image, weights, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def batch_norm(x):
    mean = x.mean((0, 1, 2))
    return (x - mean) * lax.rsqrt(((x - mean) ** 2).mean((0, 1, 2)) + 0.1)


def arguments():
    generator = np.random.default_rng(0)
    kernels = [0.5 * generator.standard_normal((3, 3, 2, 2)) for _ in range(2)]
    return (*kernels, np.float64(1.3), generator.standard_normal((2, 13, 5, 2)))


def global_maximum(first, second, scale, image):
    return convolve(jnp.tanh(convolve(image, first)), second).max((1, 2)) * scale


def attention(first, second, scale, image):
    # Of what a convolution gives: of a fused map, XLA itself takes no element for the maximum.
    y = convolve(batch_norm(convolve(image, first)), second)
    gate = y.max(-1, keepdims=True) * scale + y.mean(-1, keepdims=True)
    return batch_norm(y * jax.nn.sigmoid(gate)) ** 2


def marked(first, second, scale, image):
    y = batch_norm(convolve(image, first))
    z = batch_norm(batch_norm(y * 2) + y)
    return convolve(jnp.where(y == y.min((1, 2), keepdims=True), z * scale, y / 8), second)


def of_two_maps(first, second, scale, image):
    y = jnp.maximum(batch_norm(convolve(image, first)), 0)
    return jnp.minimum(convolve(jnp.clip(y, 0.1, scale), second), image * scale)


def ties(first, second, scale, image):
    y = convolve(image, first)
    z = y * second.sum()
    return jnp.round(y).max((1, 2)) * scale + jnp.maximum(z * scale, scale * z).sum((1, 2))


def relative(first, second, scale, image):
    y = batch_norm(convolve(image, first))
    return convolve(jnp.where(y - y.max((1, 2), keepdims=True) >= 0, y * scale, y / 8), second)


def of_maxima(first, second, scale, image):
    y = batch_norm(convolve(image, first))
    most = jnp.maximum(y.max(1).max((1, 2)), 0.1)[:, None, None, None]
    return convolve(jnp.where(y == most, y * scale, y / 8), second)


NETWORKS = (global_maximum, attention, marked, relative, of_maxima, of_two_maps, ties)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
def test_same_as_column(network):
    args, expected = arguments(), None
    for strategy in ("stream", "2ps"):
        expected = assert_same_as_column(
            network, args, AXES, num_blocks=4, strategy=strategy, expected=expected
        )


def test_maxima_of_complex_numbers():
    """JAX orders them; ``ge`` does not."""

    def network(first, scale, image):
        y = convolve(image, first) * (scale + 1j)
        return jnp.abs(jnp.where(jnp.maximum(y, 0.1 + 0.2j) == y, y, 2.0)).sum((1, 2))

    first, _, scale, image = arguments()
    try:
        jax.grad(lambda x: jnp.maximum(x, 1j).real)(1 + 1j)
    except TypeError:
        pytest.skip("this version of JAX has no gradient of a complex maximum")
    for strategy in ("stream", "2ps", "overl"):
        assert_same_as_column(
            network, (first, scale, image), (None, None, 1), num_blocks=4, strategy=strategy
        )


def test_a_maximum_that_no_recomputed_element_equals():
    """Compiled with optimisations, the two passes round this division differently."""

    def network(x):
        return (x / jnp.sqrt(jnp.sum(x * x, 2, keepdims=True) + 0.1)).max(1)

    image = np.array([[[0.5], [0.1]]])
    for strategy in ("stream", "2ps", "overl"):
        by_rows = lrjax.rowwise(network, in_axes=1, num_blocks=1, strategy=strategy)
        gradient = jax.grad(lambda x, f=by_rows: f(x).sum())(image)
        assert gradient[0, 0, 0] > 0.4


@pytest.mark.parametrize("network", NETWORKS[:5], ids=lambda network: network.__name__)
def test_a_compared_maximum_comes_from_the_stage_that_compares_it(network):
    found = 0
    for graph in graphs_of(network, arguments(), AXES):
        for v in graph.compared:
            found += 1
            assert not any(v in crossing for crossing in graph.stages.crossing)
        for node in graph.nodes:
            is_extreme = node.equation.primitive in (lax.reduce_max_p, lax.reduce_min_p)
            if (
                node.op is None
                and is_extreme
                and graph.compared.intersection(node.equation.outputs)
            ):
                (operand,) = node.equation.inputs
                producers = [i for i, n in enumerate(graph.nodes) if operand in n.equation.outputs]
                runs = [m.count(i) for m in graph.stages.members for i in producers]
                assert sum(runs) <= 1
    assert found


@pytest.mark.parametrize(
    ("function", "is_compared"),
    [
        (lambda x: x == x.max(1, keepdims=True), True),
        (lambda x: x >= jnp.broadcast_to(x.min(1)[:, None], x.shape), True),
        (lambda x: x - x.max(1, keepdims=True) >= 0, True),
        (lambda x: x / x.max(1, keepdims=True) >= 1, True),
        (lambda x: x == x.max(1).max(), True),
        (lambda x: x >= jnp.maximum(x.max(1, keepdims=True), 0.1), True),
        (lambda x: jnp.where(x > 2, x - x.max(), -1) >= 0, True),
        (lambda x: jnp.sign(x.min(1)[:, None] - x), True),
        (lambda x: jnp.floor(x / x.max()), True),
        (lambda x: x / x.max() > 0.5, False),
        (lambda x: x - x.max() > -1, False),
        (lambda x: jnp.exp(x - x.max(1, keepdims=True)), False),
        (lambda x: jax.nn.logsumexp(x, 1), False),
        (lambda x: x.max(1) + x.sum(1), False),
    ],
)
def test_which_are_compared(function, is_compared):
    assert (
        bool(compared_extremes(flatten(jax.make_jaxpr(function)(np.ones((3, 4)))))) == is_compared
    )


def test_derivatives_of_two_compare_operands():
    def gradient(x, y):
        return jax.grad(lambda x, y: (jnp.maximum(x, y) * jnp.minimum(y, x)).sum(), (0, 1))(x, y)

    x, y = np.array([1.0, 2.0, 3.0, np.nan, 1.0]), np.array([2.0, 2.0, 1.0, 1.0, np.nan])
    program = simpler_comparisons(flatten(jax.make_jaxpr(gradient)(x, y)))
    extremes = {
        v for e in program.equations if e.primitive in (lax.max_p, lax.min_p) for v in e.outputs
    }
    comparisons = [e for e in program.equations if is_comparison(e)]
    assert comparisons
    assert not [
        e for e in comparisons if any(v in extremes for v in e.inputs if isinstance(v, int))
    ]
