"""Copies of operations just before late readers: fewer line buffers, the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from experiments import vgg16_stack
from lrjax.rowgraph.tracing import trace
from lrjax.strategies import rematerialisation
from lrjax.strategies.stream import stream_programs
from lrjax.testing import assert_same_as_column
from marks import slow


def convolve(image, weights):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(image, weights, (1, 1), "SAME", dimension_numbers=numbers)


def deep(weights, image):
    """A wide first layer that a convolution of one channel gives again."""
    image = jnp.tanh(convolve(image, weights["wide"]))
    image = convolve(image, weights["narrow"])
    for kernel in weights["deep"]:
        image = jnp.tanh(convolve(image, kernel))
    return (image**2).sum()


def arguments(height=61, dtype=np.float64):
    generator = np.random.default_rng(0)
    shapes = {"wide": (1, 1, 1, 8), "narrow": (3, 3, 8, 1), "deep": [(3, 3, 1, 1)] * 12}
    weights = jax.tree.map(
        lambda shape: 0.3 * generator.standard_normal(shape).astype(dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    return weights, generator.standard_normal((2, height, 5, 1)).astype(dtype)


def only_loop(fun, args, num_blocks):
    traced = trace(fun, (None, 1), args, {})
    wrt = [i for i, axis in enumerate(traced.axes) if axis is None]
    programs = stream_programs(traced.program, traced.axes, num_blocks, wrt)
    assert programs.backward is None
    (loop,) = (loop for loop in programs.forward.loops if loop is not None)
    return loop


def operations(loop):
    return sum(node.op.flops * node.op.height for node in loop.nodes)


@pytest.mark.usefixtures("x64")
def test_wide_values_are_done_again_from_the_image(monkeypatch):
    args = arguments()
    with_copies = only_loop(deep, args, 15)
    monkeypatch.setattr(rematerialisation, "EXTRA_OPERATIONS", (0,))
    without = only_loop(deep, args, 15)
    assert with_copies.line_bytes < 0.75 * without.line_bytes
    assert operations(without) < operations(with_copies) <= 1.1 * operations(without)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("share", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("num_blocks", [2, 61, *slow(15)])
def test_same_as_column(share, num_blocks, monkeypatch):
    monkeypatch.setattr(rematerialisation, "EXTRA_OPERATIONS", (share,))
    args = arguments()
    assert len(only_loop(deep, args, 61).nodes) > 80
    assert_same_as_column(deep, args, (None, 1), num_blocks=num_blocks)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_operations_stay_within_the_share(share, monkeypatch):
    args = vgg16_stack.structs(512, 512, jnp.bfloat16)
    monkeypatch.setattr(rematerialisation, "EXTRA_OPERATIONS", (0,))
    without = operations(only_loop(vgg16_stack.loss, args, 64))
    monkeypatch.setattr(rematerialisation, "EXTRA_OPERATIONS", (share,))
    monkeypatch.setattr(rematerialisation, "WORTH_OPERATIONS", 0)
    found = operations(only_loop(vgg16_stack.loss, args, 64))
    assert without < found <= (1 + share) * without
