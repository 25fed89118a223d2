"""Prologues and epilogues where devices share the rows: the rows that a share depends on alone.

Devices are counted when JAX starts, so the cases run in a process of their own, with eight.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from lrjax.loop import ends, halos
from lrjax.loop.rowloop import row_loop
from lrjax.loop.shards import shards_of
from lrjax.rowgraph.graph import build
from lrjax.rowgraph.row_mesh import RowMesh
from lrjax.rowgraph.tracing import trace
from lrjax.strategies.base import TOP_DOWN
from lrjax.testing import assert_same_as_column
from several_devices import is_process_with, run_with
from test_rows_over_devices import (
    NETWORKS,
    PARAMS,
    batch_norm,
    far_reaching,
    image_of,
    over_devices,
    unet,
)

IS_CHILD = is_process_with(8)
in_child = pytest.mark.skipif(not IS_CHILD, reason="runs in the process with eight devices")


@pytest.mark.skipif(IS_CHILD, reason="starts that process")
@pytest.mark.slow
def test_on_eight_devices():
    run_with(8, __file__)


@pytest.fixture
def everywhere(monkeypatch):
    """All loops that can have a prologue or an epilogue have them: programs here are small."""
    for name in ("LEAST_OUTSIDE", "LEAST_SAVED", "LEAST_OPERATIONS", "LEAST_OF_SECOND"):
        monkeypatch.setattr(ends, name, 0)
    monkeypatch.setattr(halos, "LARGEST_HALO", 3.0)


@in_child
@pytest.mark.usefixtures("x64", "everywhere")
@pytest.mark.parametrize(("devices", "height", "blocks"), [(3, 45, (2, 4)), (8, 64, (4,))])
@pytest.mark.parametrize("network", NETWORKS)
def test_same_as_column(network, devices, height, blocks):
    args, expected = (PARAMS, image_of(height)), None
    for num_blocks in blocks:
        expected = assert_same_as_column(
            network, args, (None, 1), num_blocks=num_blocks, expected=expected,
            **over_devices(devices),
        )  # fmt: skip


@in_child
@pytest.mark.usefixtures("x64", "everywhere")
@pytest.mark.parametrize("strategy", ["2ps", "overl"])
@pytest.mark.parametrize("network", [batch_norm, unet, far_reaching])
def test_steps_that_are_differentiated(network, strategy):
    args = PARAMS, image_of(45)
    assert_same_as_column(
        network, args, (None, 1), num_blocks=3, strategy=strategy, **over_devices(3)
    )


@pytest.mark.skipif(IS_CHILD, reason="needs one device")
@pytest.mark.usefixtures("everywhere")
def test_the_ends_compute_what_a_share_depends_on():
    def network(image):
        for _ in range(8):
            kernel = jnp.ones((3, 3, 4, 4))
            numbers = ("NHWC", "HWIO", "NHWC")
            image = jax.nn.relu(
                jax.lax.conv_general_dilated(
                    image, kernel, (1, 1), "SAME", dimension_numbers=numbers
                )
            )
        return image

    traced = trace(network, 1, (jax.ShapeDtypeStruct((1, 256, 8, 4), jnp.float32),), {})
    graph = build(traced.program, traced.axes)
    shards = shards_of(graph, RowMesh(AbstractMesh((4,), ("rows",)), "rows"))
    loop = row_loop(
        graph, 0, order=TOP_DOWN, num_blocks=4, is_differentiated=False, shards=shards
    )  # fmt: skip
    first, stop = loop.repeated
    assert (first, stop) != (0, loop.steps)
    for index, needed in enumerate(loop.needs):
        parts = [loop.rows_inside(index, step) for step in range(loop.steps)]
        rows = {row for part in parts for row in range(*part)}
        assert rows == set(range(*needed))
        assert needed[0] <= 0
        assert needed[1] >= 64
