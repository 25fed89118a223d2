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


@pytest.mark.parametrize(("height", "num_blocks", "rows"), [(1000, 11, 96), (2048, 22, 96)])
def test_rows_are_rounded_up_so_that_all_operations_take_even_steps(height, num_blocks, rows):
    loop = loop_of(height, 4, num_blocks, stride=2)
    assert loop.steps == num_blocks
    found = [set(track.advances) for track in loop.schedule.tracks]
    assert found == [{rows // 2**k} for k in (1, 2, 3, 4)]


def test_rows_are_not_rounded_up_far():
    loop = loop_of(1000, 4, 12, stride=2)  # 84 rows; 96 are a seventh more
    assert max(loop.schedule.tracks[0].advances) <= 42
