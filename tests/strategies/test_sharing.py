"""Per value, halo rows are shared between steps or computed again: any mixture is the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lrjax.program.comparisons import simpler_comparisons
from lrjax.program.inline import flatten
from lrjax.rowgraph import graph as row_graph
from lrjax.strategies.base import TOP_DOWN
from lrjax.strategies.programs import RowProgram, row_program
from lrjax.testing import Results, check

pytestmark = pytest.mark.usefixtures("x64")

HEIGHT = 23


def gradient(kernels, images):
    """Value and gradient of a small network with a stride, as one flat program's function."""

    def loss(kernels, images):
        x = images
        for kernel, stride in zip(kernels, (1, 2, 1), strict=True):
            x = lax.conv_general_dilated(
                x, kernel, (stride, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x)
        return jnp.sum(jnp.sin(x))

    return jax.value_and_grad(loss, argnums=(0, 1))(kernels, images)


@pytest.fixture
def arguments(x64):
    rng = np.random.default_rng(0)
    kernels = [rng.normal(size=(3, 3, c, 2)) for c in (1, 2, 2)]
    return kernels, rng.normal(size=(2, HEIGHT, 4, 1))


def program_with(kernels, images, share: str, num_blocks: int) -> RowProgram:
    closed = jax.make_jaxpr(gradient)(kernels, images)
    program = simpler_comparisons(flatten(closed))
    graph = row_graph.build(program, [None] * len(kernels) + [1])
    streamed = sorted(graph.streamed)
    again = {"all": [], "none": streamed, "every other": streamed[::2]}[share]
    return row_program(graph, TOP_DOWN, num_blocks, frozenset(again))


@pytest.mark.parametrize("num_blocks", [2, 5, HEIGHT])
@pytest.mark.parametrize("share", ["all", "none", "every other"])
def test_any_mixture_gives_the_same_gradients(arguments, share, num_blocks):
    kernels, images = arguments
    rows = program_with(kernels, images, share, num_blocks)
    found = jax.jit(lambda *xs: rows.run(xs))(*kernels, images)
    expected = jax.tree.leaves(gradient(kernels, images))
    check(Results(list(found)), Results(expected), tolerance=1e-12)


def test_recomputing_keeps_no_lines_and_computes_more_rows(arguments):
    shared, again = (program_with(*arguments, share, 5).loops[0] for share in ("all", "none"))
    assert sum(shared.line_rows(v) for v in shared.producer) > 0
    assert all(again.line_rows(v) == 0 for v in again.producer)
    assert sum(t.rows for t in again.schedule.tracks) > sum(t.rows for t in shared.schedule.tracks)
