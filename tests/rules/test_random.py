"""Random values are column's, and those of partitionable threefry are made by rows."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from graphs import check_rule, graphs_of

pytestmark = pytest.mark.usefixtures("x64")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


KEY = jax.random.key_data(jax.random.key(3))


def typed(key):
    return jax.random.wrap_key_data(key)


def random_nodes(fun, args, in_axes):
    """Where random bits are made: by rows (True) or whole, in every pass."""
    nodes = [node for graph in graphs_of(fun, args, in_axes) for node in graph.nodes]
    return [n.op is not None for n in nodes if n.equation.primitive.name == "random_bits"]


RANDOM = {
    "dropout": lambda x, key: nn.Dropout(0.4, deterministic=False).apply(
        {}, jnp.sin(x), rngs={"dropout": key}
    ),
    "dropout of whole features": lambda x, key: nn.Dropout(
        0.4, broadcast_dims=(1, 2), deterministic=False
    ).apply({}, jnp.sin(x), rngs={"dropout": key}),
    "dropout along columns": lambda x, key: nn.Dropout(
        0.4, broadcast_dims=(2,), deterministic=False
    ).apply({}, jnp.sin(x), rngs={"dropout": key}),
    "noise": lambda x, key: jnp.sin(x + jax.random.normal(key, x.shape)),
    "uniform": lambda x, key: x * jax.random.uniform(key, x.shape, minval=-2.0),
    "uniform float32": lambda x, key: x * jax.random.uniform(key, x.shape, jnp.float32),
    "bits": lambda x, key: x * (jax.random.bits(key, x.shape, jnp.uint8) % 3),
    "gumbel": lambda x, key: jax.nn.softmax(x + jax.random.gumbel(key, x.shape)),
}


@pytest.mark.parametrize("name", RANDOM)
def test_values_are_columns(name):
    def op(x, key):
        return RANDOM[name](x, typed(key)) ** 2

    check_rule(op, normal(2, 11, 3, 2), KEY, axes=(1, None), num_blocks=4)


@pytest.mark.parametrize("name", ["dropout", "noise", "uniform", "bits"])
def test_threefry_runs_by_rows(name):
    def fun(x, key):
        return jnp.sum(RANDOM[name](x, typed(key)) ** 2, (0, 2, 3))

    made_by_rows = random_nodes(fun, (normal(2, 11, 3, 2), KEY), (1, None))
    assert made_by_rows
    assert all(made_by_rows)


def test_other_generators_are_made_whole():
    def fun(x, key):
        key = jax.random.wrap_key_data(jnp.tile(key, 2), impl="rbg")
        return x * jax.random.uniform(key, x.shape)

    check_rule(fun, normal(2, 11, 3), KEY, axes=(1, None))
    made_by_rows = random_nodes(fun, (normal(2, 11, 3), KEY), (1, None))
    assert made_by_rows
    assert not any(made_by_rows)


def test_original_threefry_is_made_whole():
    with jax.threefry_partitionable(False):
        check_rule(
            lambda x, key: x * jax.random.uniform(typed(key), x.shape),
            normal(2, 11, 3),
            KEY,
            axes=(1, None),
        )


def test_a_typed_key_as_an_argument():
    check_rule(
        lambda x, key: x * jax.random.uniform(key, x.shape),
        normal(2, 11, 3),
        jax.random.key(5),
        axes=(1, None),
    )


def test_the_same_mask_in_rows_that_move():
    """Rows of the mask along an axis that is not the second."""

    def op(x, key):
        x = jnp.sin(x).transpose(2, 0, 1)
        return x * jax.random.bernoulli(typed(key), 0.5, x.shape)

    check_rule(op, normal(2, 11, 3), KEY, axes=(1, None))
