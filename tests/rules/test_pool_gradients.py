"""A pool's gradient element by element against XLA's scatter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lrjax.rules.pool_gradients import Pooling

NONE = ((0, 0),) * 4


def of_xla(operand, cotangents, pooling):
    reduce, start = (lax.max, -np.inf) if pooling.chooses_max else (lax.min, np.inf)

    def pool(x):
        return lax.reduce_window(x, start, reduce, pooling.size, pooling.stride, pooling.padding)

    return jax.vjp(pool, operand)[1](cotangents)[0]


@pytest.mark.parametrize("chooses_max", [True, False])
@pytest.mark.parametrize("has_ties", [True, False])
@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [
        ((1, 2, 2, 1), (1, 2, 2, 1), NONE),
        ((1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))),
        ((1, 3, 2, 1), (1, 1, 3, 1), ((0, 0), (0, 2), (1, 0), (0, 0))),
        ((1, 2, 5, 2), (1, 3, 2, 1), ((0, 0), (1, 0), (2, 4), (0, 1))),
        ((2, 1, 4, 1), (2, 1, 4, 1), ((1, 0), (0, 0), (3, 3), (0, 0))),
    ],
)
def test_is_xlas(size, stride, padding, has_ties, chooses_max):
    pooling = Pooling(size, stride, padding, chooses_max)
    random = np.random.default_rng(0)
    operand = random.normal(size=(3, 9, 10, 4))
    operand = np.round(operand) if has_ties else operand
    pooled = [
        (low + n + high - k) // s + 1
        for n, k, s, (low, high) in zip(operand.shape, size, stride, padding, strict=True)
    ]
    cotangents = random.normal(size=pooled)
    with jax.enable_x64(True):
        operand, cotangents = jnp.asarray(operand), jnp.asarray(cotangents)
        found = pooling.gradient(cotangents, operand)
        np.testing.assert_allclose(found, of_xla(operand, cotangents, pooling), atol=1e-12)


def test_overlapping_windows_add_up_in_single_precision():
    pooling = Pooling((1, 3, 1, 1), (1, 1, 1, 1), NONE, True)
    operand = jnp.zeros((1, 5, 1, 1), jnp.bfloat16).at[0, 2].set(1)
    cotangents = jnp.array([256.0, 1.0, 1.0], jnp.bfloat16).reshape(1, 3, 1, 1)
    assert pooling.gradient(cotangents, operand)[0, 2, 0, 0] == 258


def test_large_windows_are_left_to_xla():
    assert not Pooling((1, 6, 6, 1), (1, 6, 6, 1), NONE, True).is_small
