"""Fine-tuning: what is not trained runs once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params, primitives

import lrjax
from lrjax.rowgraph.tracing import trace
from lrjax.strategies.stream import stream_programs
from lrjax.testing import assert_same_as_column
from marks import STRATEGIES

AXES = (None, None, 1)


def network(frozen, trained, image):
    x = image
    for kernel in (*frozen, *trained):
        x = lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jnp.tanh(x)
    return x


def arguments(frozen, trained):
    random = np.random.default_rng(0)
    kernels = [random.normal(size=(3, 3, 4, 4)) / 6 for _ in range(frozen + trained)]
    return kernels[:frozen], kernels[frozen:], random.normal(size=(2, 19, 5, 4))


def convolutions(frozen, trained):
    """Of the forward and the backward pass, kernel gradients included."""
    args = arguments(frozen, trained)
    traced = trace(network, AXES, args, {})
    wrt = range(frozen, frozen + trained)
    found = stream_programs(traced.program, traced.axes, 4, [*wrt])
    assert found.backward is not None
    return [
        sum(e.primitive is lax.conv_general_dilated_p for e in rows.graph.program.equations)
        for rows in (found.forward, found.backward)
    ]


@pytest.mark.parametrize(
    ("frozen", "trained", "backward"),
    [
        (6, 1, 1 + 0 + 1),  # again, image gradients, kernel gradients; what it reads is saved
        (5, 2, 2 + 1 + 2),
        (0, 4, 4 + 3 + 4),  # nothing is saved
    ],
)
def test_frozen_convolutions_run_once(frozen, trained, backward):
    assert convolutions(frozen, trained) == [frozen + trained, backward]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("frozen", "trained"), [(6, 1), (3, 3)])
def test_same_as_column(frozen, trained, strategy):
    with jax.enable_x64(True):
        args = arguments(frozen, trained)
        for argnums in [(1,), (1, 2)]:
            assert_same_as_column(
                network, args, AXES, argnums=argnums, num_blocks=4, strategy=strategy
            )


def all_equations(jaxpr):
    found = []
    for equation in jaxpr.eqns:
        found.append(equation)
        for body in jaxprs_in_params(equation.params):
            found.extend(all_equations(body))
    return found


def convolutions_of_loops(strategy, frozen, trained):
    """In a step of every loop of a gradient, in order."""

    def loss(trained, *others):
        rows = lrjax.rowwise(network, in_axes=AXES, num_blocks=2, strategy=strategy)
        return jnp.sum(rows(others[0], trained, others[1]))

    own, moving, image = arguments(frozen, trained)
    found = all_equations(jax.make_jaxpr(jax.grad(loss))(moving, own, image).jaxpr)
    loops = [e.params["jaxpr"] for e in found if e.primitive is primitives.scan_p]
    return [
        sum(
            getattr(e.params.get("function"), "__name__", "") == "_convolved_for" for e in equations
        )
        for equations in map(all_equations, loops)
    ]


@pytest.mark.parametrize("strategy", ["2ps", "overl"])
def test_blocks_run_frozen_convolutions_once(strategy):
    # Again, gradients of the kernel and, read by nobody, of what is saved.
    assert convolutions_of_loops(strategy, 6, 1) == [6, 1, 1 + 2]
    assert convolutions_of_loops(strategy, 0, 2) == [2, 2 + 4]


def test_a_frozen_map_that_is_returned_is_made_once():
    """And frozen branches meet trained ones, whose loops have outputs of both."""

    def two(frozen, trained, image):
        low = network(frozen, [], image)
        return low, network([], trained, low) + low

    with jax.enable_x64(True):
        for strategy in ("2ps", "overl"):
            assert_same_as_column(
                two, arguments(5, 1), AXES, argnums=(1,), num_blocks=3, strategy=strategy
            )
