"""Which gradients wait for a reduction over rows: told before the gradient is traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lrjax
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


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("scale", [1e-5, 2.0**16])
def test_a_scaled_loss_scales_what_comes_between(dtype, scale):
    """Float16's gradients of a mean over pixels vanish, and those of a sum overflow, at scale 1."""
    keys = jax.random.split(jax.random.key(0), 2)
    kernel = jax.random.normal(keys[0], KERNEL.shape, dtype) * jnp.asarray(0.1, dtype)
    images = jax.random.normal(keys[1], (1, 64, 64, 3), dtype)
    of = jnp.mean if scale > 1 else jnp.sum

    def gradient(function):
        def scaled(kernel, images):
            return scale * function(kernel, images)

        return jax.grad(scaled, (0, 1))(kernel, images)

    def loss(kernel, images):
        return of((100 * _maps(kernel, images).astype(jnp.float32)) ** (2 if scale < 1 else 1))

    for strategy in ("stream", "2ps"):
        found = gradient(lrjax.rowwise(loss, in_axes=(None, 1), num_blocks=4, strategy=strategy))
        for one, expected in zip(found, gradient(loss), strict=True):
            assert jnp.isfinite(expected).all()
            difference = one.astype(jnp.float32) - expected.astype(jnp.float32)
            norm = jnp.linalg.norm(expected.astype(jnp.float32))
            assert jnp.linalg.norm(difference) < 0.02 * norm
