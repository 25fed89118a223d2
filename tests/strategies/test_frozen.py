"""Fine-tuning: what is not trained runs once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lrjax.rowgraph.tracing import trace
from lrjax.strategies.stream import stream_programs
from lrjax.testing import assert_same_as_column

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


@pytest.mark.parametrize(("frozen", "trained"), [(6, 1), (3, 3)])
def test_same_as_column(frozen, trained):
    with jax.enable_x64(True):
        args = arguments(frozen, trained)
        assert_same_as_column(network, args, AXES, argnums=(1,), num_blocks=4)
        assert_same_as_column(network, args, AXES, argnums=(1, 2), num_blocks=4)
