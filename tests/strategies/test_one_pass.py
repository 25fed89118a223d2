"""Which gradients wait for a reduction over rows: told before the gradient is traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lrjax.program.inline import function_of
from lrjax.rowgraph.graph import build
from lrjax.rowgraph.tracing import trace
from lrjax.strategies.one_pass import gradient_waits
from lrjax.strategies.programs import traced_graph

IMAGES = jnp.ones((2, 16, 8, 3))
KERNEL = jnp.ones((3, 3, 3, 4))


def _maps(kernel, images):
    maps = lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.tanh(maps)


LOSSES = {
    "sum": (lambda maps, images: jnp.sum(maps**2), False),
    "mean": (lambda maps, images: 3 * jnp.mean(maps) + 1, False),
    "two sums": (lambda maps, images: jnp.sum(maps) - 2 * jnp.sum(maps**2), False),
    "square of a mean": (lambda maps, images: jnp.mean(maps) ** 2, True),
    "quotient": (lambda maps, images: jnp.sum(maps) / jnp.sum(maps**2), True),
    "number of pixels": (lambda maps, images: jnp.sum(maps) / jnp.sum(images > 0), True),
    "pooled": (lambda maps, images: jnp.sum(maps.mean((1, 2)) ** 2), True),
    "normalised": (lambda maps, images: jnp.sum((maps - maps.mean()) ** 2), True),
    "whole map": (lambda maps, images: jnp.sum(jnp.sort(maps, 1) ** 2), True),
    "without rows": (lambda maps, images: jnp.zeros(()), False),
}


@pytest.mark.parametrize("name", LOSSES)
def test_told_without_the_gradient(name):
    loss, expected = LOSSES[name]
    traced = trace(lambda k, x: loss(_maps(k, x), x), (None, 1), (KERNEL, IMAGES), {})
    program, axes, wrt = traced.program, traced.axes, [0]

    def both(*inputs):
        function, moving = function_of(program, wrt, inputs)
        (value,), pull = jax.vjp(function, *moving)
        return value, *pull([np.ones((), value.dtype)])

    found = traced_graph(both, program.structs, axes)
    assert (len(found.loops) > 1) == expected
    assert gradient_waits(build(program, axes), wrt) == expected
