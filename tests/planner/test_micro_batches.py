"""Micro-batches around row loops: exact, and offered only where images are independent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from networks import arguments, features, plan_by_hand, structs

from lrjax.plan import Choice
from lrjax.rowgraph.segments import Cuttable
from lrjax.rowgraph.tracing import trace
from lrjax.strategies import MicroBatches
from lrjax.strategies.micro_batches import batch_graph, micro_batches
from lrjax.testing import assert_same_as_column


def segment_of(fun, *args, in_axes=(None, 1)):
    traced = trace(fun, in_axes, args, {})
    whole = Cuttable.of(traced.program, traced.axes)
    return whole.between(0, len(whole.operations))


@pytest.mark.parametrize("choice", [Choice("stream", 4, 2), Choice("checkpoint", 1, 4)])
def test_gradients_are_columns(choice, x64):
    args = arguments(32, 8, batch=4)
    plan = plan_by_hand(features, structs(32, 8, batch=4), (Choice("column"), choice), (2,))
    assert_same_as_column(features, args, (None, 1), plan=plan)


def tripled(x):
    """A derivative that is not the function's."""
    triple = jax.custom_vjp(lambda x: x * 2)
    triple.defvjp(lambda x: (x * 2, None), lambda _, g: (3 * g,))
    return triple(x)


def rounded(x):
    """Straight through."""
    through = jax.custom_jvp(lambda x: jnp.round(x))
    through.defjvp(lambda primals, tangents: (jnp.round(*primals), *tangents))
    return through(3 * x)


# Rectified, the half of the image that is black has a gradient of 0, or 1 / 2 by the maximum's.
RULES = {
    "relu": jax.nn.relu,
    "custom_vjp": tripled,
    "custom_jvp": rounded,
    "in vmap": jax.vmap(tripled),
    "in scan": lambda x: lax.scan(lambda c, _: (tripled(c), None), x, None, length=2)[0],
    "in checkpoint": jax.checkpoint(tripled),
    "of whole maps": lambda x: tripled(x[:, ::-1]),
}


@pytest.mark.parametrize("strategy", ["stream", "2ps", "checkpoint", "selective"])
@pytest.mark.parametrize("name", RULES)
def test_derivatives_of_its_own_stay_a_functions_derivatives(name, strategy, x64):
    def network(params, image):
        return RULES[name](image @ params)

    image = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8, 4, 3))).at[:, 4:].set(0)
    args = jnp.asarray(np.random.default_rng(1).standard_normal((3, 3))), image
    divided = MicroBatches(strategy, 2)
    assert_same_as_column(network, args, (None, 1), num_blocks=2, strategy=divided)


def normalised(params, image):
    image = image @ params
    return image - image.mean(axis=(0, 1, 2))


def normalised_by_image(params, image):
    return (image @ params) - image.mean(axis=(1, 2), keepdims=True)


def flipped(params, image):
    return (image @ params)[::-1]


def merged(params, image):
    return (image @ params).reshape(2, 8, 4, 4).reshape(4, 8, 2, 4)


@pytest.mark.parametrize(
    ("fun", "is_independent"),
    [
        (lambda p, x: jnp.tanh(x @ p), True),
        (normalised_by_image, True),
        (normalised, False),
        (flipped, False),
        (merged, False),
        (lambda p, x: (x @ p).sum(), False),
        (lambda p, x: x @ p + jnp.arange(2.0)[:, None, None, None], False),
        (lambda p, x: x @ p * lax.broadcasted_iota(x.dtype, x.shape, 0), False),
        (lambda p, x: x @ p * lax.broadcasted_iota(x.dtype, x.shape, 1), True),
        (lambda p, x: x @ p * jax.random.uniform(jax.random.key(0), x.shape, x.dtype), False),
        (lambda p, x: jax.nn.relu(x @ p) * jax.random.bernoulli(jax.random.key(0), 0.5), True),
    ],
)
def test_independence_is_read_off_the_program(fun, is_independent):
    args = jnp.ones((4, 4)), jnp.ones((2, 8, 4, 4))
    assert (batch_graph(segment_of(fun, *args)) is not None) == is_independent


def test_what_cannot_be_divided_is_refused():
    args = jax.tree.map(jnp.asarray, arguments(8, 8, batch=3))
    with pytest.raises(ValueError, match="micro_batches=2 does not divide the batch of 3"):
        micro_batches(segment_of(features, *args), 2)
    with pytest.raises(ValueError, match="not independent: reduce_sum mixes"):
        micro_batches(segment_of(normalised, jnp.ones((4, 4)), jnp.ones((2, 8, 4, 4))), 2)


def test_random_values_are_not_repeated_by_parts(x64):
    """Dropout's mask depends on an image's number."""

    def dropped(params, image):
        image = features(params, image)
        return jnp.where(jax.random.bernoulli(jax.random.key(7), 0.5, image.shape), image, 0)

    with pytest.raises(ValueError, match="not independent: "):
        plan_by_hand(dropped, structs(32, 8, batch=4), (Choice("stream", 4, 2),), ())
    by_hand = plan_by_hand(dropped, structs(32, 8, batch=4), (Choice("stream", 4),), ())
    assert_same_as_column(dropped, arguments(32, 8, batch=4), (None, 1), plan=by_hand)
