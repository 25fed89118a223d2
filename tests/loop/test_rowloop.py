"""How many rows a step has."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from lrjax.loop.rowloop import row_loop
from lrjax.rowgraph.graph import build
from lrjax.rowgraph.tracing import trace
from lrjax.strategies.base import TOP_DOWN


def loop_of(height, layers, num_blocks, stride=1):
    def network(image):
        for _ in range(layers):
            image = lax.conv_general_dilated(
                image,
                jnp.ones((3, 3, 1, 1)),
                (stride, stride),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        return image

    image = jax.ShapeDtypeStruct((1, height, 8, 1), jnp.float32)
    traced = trace(network, 1, (image,), {})
    return row_loop(
        build(traced.program, traced.axes),
        0,
        order=TOP_DOWN,
        num_blocks=num_blocks,
        is_differentiated=False,
    )


@pytest.mark.parametrize(
    ("height", "layers", "num_blocks", "stride", "steps", "rows"),
    [
        (1024, 10, 4, 1, 5, 207),  # nine rows of lag: 5 x 207 = 1035
        (64, 2, 4, 1, 5, 13),
        (64, 1, 4, 1, 4, 16),  # no lag
        (64, 10, 64, 1, 73, 1),
        (256, 4, 4, 2, 5, 64),  # blocks of whole strides
    ],
)
def test_no_more_rows_than_the_steps_need(height, layers, num_blocks, stride, steps, rows):
    loop = loop_of(height, layers, num_blocks, stride)
    assert loop.steps == steps
    assert max(max(track.advances) for track in loop.schedule.tracks) == rows // stride
