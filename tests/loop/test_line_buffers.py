"""Rows that wait between steps: rings of slabs, low and tall, give what whole maps do."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lrjax.rowgraph.tracing import trace
from lrjax.strategies.stream import stream_programs
from lrjax.testing import assert_same_as_column

pytestmark = pytest.mark.usefixtures("x64")


def deep(params, image):
    for kernel in params:
        image = jnp.tanh(
            lax.conv_general_dilated(
                image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )
    return jnp.mean(jnp.square(image), axis=(1, 2))


def arguments(layers, height):
    random = np.random.default_rng(0)
    params = [random.normal(size=(3, 3, 2, 2)) / 3 for _ in range(layers)]
    return params, random.normal(size=(2, height, 4, 2))


def slab_rows_of_rings(args, num_blocks):
    traced = trace(deep, (None, 1), args, {})
    wrt = [i for i, axis in enumerate(traced.axes) if axis is None]
    found = stream_programs(traced.program, traced.axes, num_blocks, wrt)
    loops = [loop for one in (found.forward, found.backward) for loop in one.loops if loop]
    return {
        loop.track(v).rows
        for loop in loops
        for v in loop.producer
        if loop.line_rows(v) and loop.is_ring(v)
    }


@pytest.mark.parametrize(
    ("layers", "height", "num_blocks", "rows"),
    [(10, 97, 97, 1), (24, 190, 12, 16)],
    ids=["one row a slab", "tall slabs"],
)
def test_rings_are_exact(layers, height, num_blocks, rows):
    args = arguments(layers, height)
    assert slab_rows_of_rings(args, num_blocks) == {rows}
    assert_same_as_column(deep, args, (None, 1), num_blocks=num_blocks)
