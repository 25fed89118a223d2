"""Models written with other JAX libraries pass through rowwise unchanged."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import pytest

from lrjax.testing import assert_same_as_column


def equinox_network(key):
    """A residual block and GroupNorm between strided convolutions, as Equinox writes them."""

    class Block(eqx.Module):
        norm: eqx.nn.GroupNorm
        conv: eqx.nn.Conv2d

        def __init__(self, key):
            self.norm = eqx.nn.GroupNorm(2, 4)
            self.conv = eqx.nn.Conv2d(4, 4, 3, padding=1, key=key)

        def __call__(self, x):
            return x + self.conv(jax.nn.silu(self.norm(x)))

    keys = jax.random.split(key, 3)
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 4, 3, stride=2, padding=1, key=keys[0]),
            eqx.nn.Lambda(Block(keys[1])),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.AdaptiveAvgPool2d(1),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(4, 2, key=keys[2]),
        ]
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("strategy", "num_blocks"), [("stream", 4), ("overl", 2)])
def test_equinox(strategy, num_blocks):
    """Images are [C, H, W], one at a time under ``vmap``: rows are axis 2 of the batch."""
    arrays, static = eqx.partition(equinox_network(jax.random.key(0)), eqx.is_inexact_array)

    def forward(arrays, images):
        return jax.vmap(eqx.combine(arrays, static))(images)

    images = jax.random.normal(jax.random.key(1), (2, 3, 23, 10))
    assert_same_as_column(
        forward, (arrays, images), (None, 2), num_blocks=num_blocks, strategy=strategy
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("strategy", "num_blocks"), [("stream", 4), ("2ps", 2)])
def test_haiku(strategy, num_blocks):
    """BatchNorm by moving averages in Haiku's state, which the call returns updated."""

    @hk.transform_with_state
    def network(images):
        x = hk.Conv2D(4, 3, stride=2, padding=((1, 1), (1, 1)), with_bias=False)(images)
        x = jax.nn.relu(hk.BatchNorm(True, True, decay_rate=0.9)(x, is_training=True))
        x = x + hk.DepthwiseConv2D(1, 3, padding=((1, 1), (1, 1)))(x)
        x = hk.avg_pool(x, (2, 2), (2, 2), "VALID")
        return hk.Linear(2)(x.mean(axis=(1, 2)))

    images = jax.random.normal(jax.random.key(1), (2, 23, 10, 3))
    params, state = network.init(jax.random.key(0), images)

    def forward(params, images, state):
        return network.apply(params, state, None, images)

    assert_same_as_column(
        forward,
        (params, images, state),
        (None, 1, None),
        num_blocks=num_blocks,
        strategy=strategy,
    )
