"""Where one part of a value is read long after the other, the part waits: the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lrjax.rowgraph.tracing import trace
from lrjax.strategies import programs
from lrjax.strategies.stream import stream_programs
from lrjax.testing import assert_same_as_column

CHANNELS = 8


def convolve(image, weights, stride=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        image, weights, (stride, stride), "SAME", dimension_numbers=numbers
    )


def shortcut(weights, image):
    """A U-Net of two levels: what its shortcut joins has a gradient that is divided again."""
    wide = jnp.tanh(convolve(image, weights["first"]))
    low = jnp.tanh(convolve(wide, weights["down"], 2))
    for kernel in weights["deep"]:
        low = jnp.tanh(convolve(low, kernel))
    up = jnp.repeat(jnp.repeat(low, 2, axis=1), 2, axis=2)[:, : wide.shape[1], : wide.shape[2]]
    both = jnp.concatenate([wide, up], axis=-1)
    return (jnp.tanh(convolve(both, weights["last"])) ** 2).sum()


def arguments(height):
    generator = np.random.default_rng(0)
    shapes = {
        "first": (3, 3, 1, CHANNELS),
        "down": (3, 3, CHANNELS, CHANNELS),
        "deep": [(3, 3, CHANNELS, CHANNELS)] * 3,
        "last": (3, 3, 2 * CHANNELS, 2),
    }
    weights = jax.tree.map(
        lambda shape: 0.2 * generator.standard_normal(shape),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    return weights, generator.standard_normal((2, height, 6, 1))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("height", [64, 61])
@pytest.mark.parametrize("strategy", ["stream", "2ps"])
@pytest.mark.parametrize("num_blocks", [3, 16])
def test_same_as_column(height, strategy, num_blocks):
    assert_same_as_column(
        shortcut, arguments(height), (None, 1), strategy=strategy, num_blocks=num_blocks
    )


@pytest.mark.usefixtures("x64")
def test_less_waits_and_the_steps_are_as_many(monkeypatch):
    args = arguments(64)
    traced = trace(shortcut, (None, 1), args, {})
    wrt = [i for i, axis in enumerate(traced.axes) if axis is None]

    def only_loop():
        found = stream_programs(traced.program, traced.axes, 16, wrt)
        assert found.backward is None
        (loop,) = (loop for loop in found.forward.loops if loop is not None)
        return loop

    divided = only_loop()
    monkeypatch.setattr(programs, "with_less_waiting", lambda loop: loop)
    whole = only_loop()
    assert divided.steps == whole.steps
    row = args[1].shape[0] * args[1].shape[2] * CHANNELS * args[1].itemsize
    assert whole.line_bytes - divided.line_bytes >= 4 * row
