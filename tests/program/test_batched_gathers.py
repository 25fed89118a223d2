"""Gathers one of whose coordinates counts an axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lrjax.program.batched_gathers import with_batched_gathers
from lrjax.program.inline import evaluate, flatten

GENERATOR = np.random.default_rng(0)
VALUES = GENERATOR.standard_normal((4, 5, 6)).astype(np.float32)
BATCH, ROWS = jnp.arange(4)[:, None], jnp.arange(5)
SHUFFLED = GENERATOR.permutation(20)
FLAT = VALUES.reshape(20, 6)
BY_EXAMPLE = {
    "every example": (lambda x, i: x[jnp.arange(20), i[0]], FLAT, (1, 20)),
    "a slice of every example": (lambda x, i: x[BATCH, :, i], VALUES, (4, 3)),
    "two axes": (lambda x, i: x[BATCH, ROWS, i], VALUES, (4, 5)),
    "two coordinates left": (lambda x, i: x[jnp.arange(4), i[0], i[1]], VALUES, (2, 4)),
    "numbers of numpy": (lambda x, i: x[np.arange(20), i[0]], FLAT, (1, 20)),
    "other integers": (lambda x, i: x[jnp.arange(20, dtype=np.int16), i[0]], FLAT, (1, 20)),
    "a diagonal": (lambda x, i: x[:4, :4][jnp.arange(4), jnp.arange(4)] * i[0, 0], FLAT, (1, 1)),
    "swapped": (lambda x, i: x[i, jnp.arange(5)], VALUES, (3, 5)),
}
LEFT = {
    "from one": (lambda x, i: x[jnp.arange(1, 5), i[0]], FLAT, (1, 4)),
    "a part": (lambda x, i: x[jnp.arange(4), i[0]], FLAT, (1, 4)),
    "shuffled": (lambda x, i: x[SHUFFLED, i[0]], FLAT, (1, 20)),
    "every second": (lambda x, i: x[2 * jnp.arange(4), i[0]], FLAT, (1, 4)),
    "counted alone": (lambda x, i: x[jnp.arange(20)] * i[0, 0], FLAT, (1, 1)),
}


def programs(function, values, shape):
    indices = GENERATOR.integers(-5, 5, shape)
    program = flatten(jax.make_jaxpr(function)(values, indices))
    return program, with_batched_gathers(program), (values, indices)


def batching_dims(program):
    return [
        e.params["dimension_numbers"].operand_batching_dims
        for e in program.equations
        if e.primitive is lax.gather_p
    ]


@pytest.mark.parametrize("name", [*BY_EXAMPLE, *LEFT])
def test_the_same_elements(name):
    program, batched, args = programs(*{**BY_EXAMPLE, **LEFT}[name])
    (own,), (expected,) = evaluate(batched, args), evaluate(program, args)
    np.testing.assert_array_equal(own, expected)
    assert any(batching_dims(batched)) == (name in BY_EXAMPLE)
    assert not any(batching_dims(program))
