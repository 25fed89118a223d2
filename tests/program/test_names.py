"""Named values are the values that they name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from lrjax.program.inline import evaluate, flatten
from lrjax.program.names import without_names
from lrjax.rowgraph.segments import Segment
from lrjax.rowgraph.tracing import trace
from lrjax.strategies import named
from lrjax.testing import assert_same_as_column


def network(named_values):
    """Three convolutions, each of whose results has a name, or none has."""

    def fun(weights, image):
        for i, kernel in enumerate(weights):
            image = jnp.maximum(
                jax.lax.conv_general_dilated(
                    image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                ),
                0,
            )
            if named_values:
                image = checkpoint_name(image, f"layer{i}")
        return image

    return fun


def arguments(height=33):
    generator = np.random.default_rng(0)
    weights = [0.3 * generator.standard_normal((3, 3, c, 4)) for c in (2, 4, 4)]
    return weights, generator.standard_normal((2, height, 6, 2))


def test_names_are_dropped():
    def fun(x):
        first = checkpoint_name(x, "input")
        second = checkpoint_name(checkpoint_name(2 * first, "once"), "twice")
        return first, second, second + 1

    x = jnp.arange(3.0)
    program = flatten(jax.make_jaxpr(fun)(x))
    found = without_names(program)
    assert [equation.primitive.name for equation in found.equations] == ["mul", "add"]
    assert found.outputs[0] == found.inputs[0]
    for one, other in zip(evaluate(found, [x]), fun(x), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("strategy", ["stream", "2ps", "overl"])
def test_a_name_costs_no_rows(strategy):
    """Nothing more is kept between steps, and nothing more is done."""
    kept = []
    for named_values in (True, False):
        args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments())
        traced = trace(network(named_values), (None, 1), args, {})
        segment = Segment(traced.program, traced.axes, traced.program.outputs)
        passes = named(strategy).execution(segment, 4, [0, 1, 2]).passes
        loops = [loop for one in passes for loop in one.rows.loops if loop is not None]
        kept.append([(loop.line_bytes, len(loop.nodes)) for loop in loops])
    assert kept[0] == kept[1]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("strategy", ["stream", "2ps", "overl"])
def test_same_as_column(strategy):
    assert_same_as_column(network(True), arguments(), (None, 1), strategy=strategy, num_blocks=5)
