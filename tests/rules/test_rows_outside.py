"""What rows outside the image hold never reaches a row inside, a gradient or a sum.

Stream is run with NaN in every such row that no operation reads as padding; 2PS and OverL, which
differentiate a step, must hold something finite in all of them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lrjax.loop import engine
from lrjax.loop.step import _Step
from lrjax.rules.masks import keep_rows
from lrjax.testing import assert_same_as_column
from marks import slow

pytestmark = pytest.mark.usefixtures("x64")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def convolve(image, kernel, stride=1):
    return lax.conv_general_dilated(
        image, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def pool(image, size, stride, padding="VALID"):
    window, strides = (1, size, size, 1), (1, stride, stride, 1)
    return lax.reduce_window(image, -jnp.inf, lax.max, window, strides, padding)


def pools(image, scale, first, second):
    """Pools of whole arrays, with and without padding, before what has a parameter."""
    image = pool(image, 2, 1) * scale
    image = pool(convolve(image, first), 3, 2, "SAME") * scale
    return convolve(image, second)


def poles(image, scale, first, second):
    """Logarithms, roots, quotients and powers, also of the image and beside parameters."""
    image = jnp.log(jnp.abs(image) + 0.1) * scale + scale[0] / (1 - image)
    image = convolve(image, first) + 1 / (1 + jnp.exp(scale[1] - image))
    image = jnp.abs(image) + 0.2
    image = convolve(image, first) + scale[0] / image  # outside, 0 is wanted and no pole
    image = jnp.abs(scale[1]) ** image / jnp.sqrt(image**2 + 0.3) - jnp.arctanh(jnp.tanh(image) / 2)
    masked = jnp.where(jnp.arange(image.shape[2])[:, None] < 3, image * scale, -jnp.inf)
    return convolve(jax.nn.softmax(masked, 2), second)


def moving(image, scale, first, second):
    """Padding, mirrored edges, resizes, shifted rows and interior padding."""
    image = jnp.pad(image, ((0, 0), (2, 1), (0, 0), (0, 0)), constant_values=1.5) * scale
    image = convolve(jnp.pad(image, ((0, 0), (1, 1), (0, 0), (0, 0)), mode="reflect"), first, 2)
    image = jax.image.resize(image, (1, 13, 6, 2), "linear") * scale
    image = image[:, 2:] * image[:, :-2] + image[:, 1:-1]
    config = ((0, 0, 0), (1, 0, 1), (0, 0, 0), (0, 0, 0))
    return convolve(lax.pad(image, np.float64(0), config), second)


def picking(image, scale, first, second):
    """Indices that are meaningless outside the image, products of elements, normalisations."""
    rows = jnp.arange(image.shape[1])[:, None, None] % 2
    image = convolve(image, first)
    chosen = jnp.take_along_axis(image, jnp.broadcast_to(rows, image.shape), 3)
    image = chosen * scale + jnp.cumprod(image, 2) + jnp.sort(image, 3)
    image = (image - image.mean((0, 1, 2))) / jnp.sqrt(image.var((0, 1, 2)) + 1e-3)
    return convolve(image * scale, second), jnp.prod(image, (2, 3)), image.sum()


NETWORKS = [pools, poles, moving, picking]
ARGUMENTS = (
    np.random.default_rng(5).uniform(0.1, 0.8, (1, 13, 6, 2)),
    np.array([0.7, -1.2]),
    normal(3, 3, 2, 2) / 2,
    normal(3, 3, 2, 2, seed=1) / 2,
)
AXES = (1, None, None, None)


@pytest.mark.parametrize("fun", NETWORKS)
def test_stream_with_nan_outside(fun, monkeypatch):
    fill, keep, empty_lines = engine._fill, _Step.keep, engine.empty_lines

    def nan_beyond_arrays(loop, source):
        needed = loop.fill_of(source) is not None
        return fill(loop, source) if needed or not is_inexact(loop, source.value) else np.nan

    def nan_beyond_slabs(step, made, value, slab):
        loop = step.loop
        if is_unfilled(loop, value):
            start, axis = step.clock["start", loop.producer[value]], loop.graph.row_axis[value]
            slab = keep_rows(slab, start, axis, 0, loop.graph.height(value), np.nan)
        return keep(step, made, value, slab)

    def nan_at_first(loop, full):
        lines = empty_lines(loop, full)
        return {v: x * np.nan if is_unfilled(loop, v) else x for v, x in lines.items()}

    monkeypatch.setattr(engine, "_fill", nan_beyond_arrays)
    monkeypatch.setattr(_Step, "keep", nan_beyond_slabs)
    monkeypatch.setattr(engine, "empty_lines", nan_at_first)
    assert_same_as_column(fun, ARGUMENTS, AXES, num_blocks=3, strategy="stream")


def is_inexact(loop, value):
    return jnp.issubdtype(loop.graph.program.avals[value].dtype, np.inexact)


def is_unfilled(loop, value):
    return value not in loop.production_fill and is_inexact(loop, value)


@pytest.mark.parametrize("strategy", ["2ps", *slow("overl")])
@pytest.mark.parametrize("fun", NETWORKS)
def test_differentiated_steps_are_finite_outside(fun, strategy, monkeypatch):
    keep, seen = _Step.keep, []

    def watched(step, made, value, slab):
        loop = step.loop
        if loop.is_differentiated and is_inexact(loop, value):
            name = loop.nodes[loop.producer[value]].equation.primitive.name
            start, axis = step.clock["start", loop.producer[value]], loop.graph.row_axis[value]
            ones = jnp.ones(slab.shape)
            inside = keep_rows(ones, start, axis, 0, loop.graph.height(value), 0) > 0
            finite = jnp.all(inside | jnp.isfinite(slab))
            jax.debug.callback(lambda ok: seen.append((name, bool(ok))), finite)
        return keep(step, made, value, slab)

    monkeypatch.setattr(_Step, "keep", watched)
    assert_same_as_column(fun, ARGUMENTS, AXES, num_blocks=3, strategy=strategy)
    jax.effects_barrier()
    assert seen
    assert {name for name, finite in seen if not finite} == set()
