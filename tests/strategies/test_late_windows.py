"""Rows that kernel gradients read are cut when their cotangents are there, not before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lrjax
from lrjax import memory
from lrjax.loop import step
from lrjax.testing import assert_same_as_column
from marks import COMPILES_FOR_H200

SIDE, CHANNELS, DEPTH = 1024, 32, 6


def loss(weights, image):
    for i, kernel in enumerate(weights):
        image = lax.conv_general_dilated(
            image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        image = jnp.maximum(image, 0) if i % 2 else jnp.tanh(image)
    return (image.astype(jnp.float32) ** 2).mean()


def shapes():
    channels = [3] + [CHANNELS] * (DEPTH - 1)
    return [(3 if i % 2 else 1, 3 if i % 2 else 1, c, CHANNELS) for i, c in enumerate(channels)]


def peak_bytes():
    args = (
        [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes()],
        jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.bfloat16),
    )
    by_rows = lrjax.rowwise(loss, in_axes=(None, 1), num_blocks=4)
    return memory.peak_bytes(memory.compile_for(jax.grad(by_rows), *args, target="h200"))


class TestMemory:
    pytestmark = COMPILES_FOR_H200

    def test_windows_do_not_wait_beside_what_they_are_cut_from(self, monkeypatch):
        late = peak_bytes()
        monkeypatch.setattr(step, "zero_behind", lambda arrays: 0)
        jax.clear_caches()
        assert late < 0.95 * peak_bytes()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("num_blocks", [2, 3, 7])
@pytest.mark.parametrize("height", [29, 48])
def test_same_as_column(height, num_blocks):
    generator = np.random.default_rng(1)
    weights = [0.2 * generator.standard_normal(shape) for shape in shapes()]
    image = generator.standard_normal((2, height, 6, 3))
    assert_same_as_column(loss, (weights, image), (None, 1), num_blocks=num_blocks)


def test_examples_share_the_offset():
    """Each with an offset of its own would make a gather of every window."""
    args = (
        [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes()],
        jax.ShapeDtypeStruct((3, 1, 40, 6, 3), jnp.float32),
    )
    by_rows = lrjax.rowwise(loss, in_axes=(None, 1), num_blocks=4)
    each = jax.vmap(jax.grad(by_rows), (None, 0))
    assert " gather(" not in jax.jit(each).lower(*args).compile().as_text()


@pytest.mark.usefixtures("x64")
def test_every_example_has_its_gradient():
    generator = np.random.default_rng(2)
    weights = [0.2 * generator.standard_normal(shape) for shape in shapes()]
    images = generator.standard_normal((3, 1, 29, 6, 3))
    by_rows = lrjax.rowwise(loss, in_axes=(None, 1), num_blocks=4)
    found = jax.jit(jax.vmap(jax.grad(by_rows), (None, 0)))(weights, images)
    expected = jax.vmap(jax.grad(loss), (None, 0))(weights, images)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
