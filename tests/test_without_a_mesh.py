"""Without ``row_mesh_axis`` nothing that divides rows among devices has a part in a program."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType

import lrjax
from lrjax.loop import shards
from lrjax.rowgraph import row_mesh

# Who owns which rows, and what neighbours lend: all of it is in these two modules.
OF_DEVICES = {Path(shards.__file__), Path(row_mesh.__file__)}
# Primitives by which devices exchange rows and sums, and that tell them apart.
PRIMITIVES = ("shard_map", "ppermute", "psum", "pmax", "axis_index", "sharding_constraint")


def convolve(image, kernel):
    return lax.conv_general_dilated(
        image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def chain(kernel, image):
    image = lax.reduce_window(
        jnp.tanh(convolve(image, kernel)), -np.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
    )
    return (convolve(image, kernel) ** 2).mean()


def batch_norm(kernel, image):
    image = convolve(image, kernel)
    return jnp.square(image * lax.rsqrt(image.var((0, 1, 2)) + 1e-3)).sum()


ARGS = np.ones((3, 3, 1, 1), np.float32), np.ones((1, 16, 6, 1), np.float32)


def traced(fun, **options):
    """The gradient's jaxpr, and the functions of ``OF_DEVICES`` that were called to make it."""
    called = set()

    def note(frame, event, _):
        if event == "call" and Path(frame.f_code.co_filename) in OF_DEVICES:
            called.add(frame.f_code.co_name)

    gradient = jax.grad(lrjax.rowwise(fun, in_axes=(None, 1), num_blocks=2, **options))
    sys.setprofile(note)
    try:
        jaxpr = jax.make_jaxpr(gradient)(*ARGS)
    finally:
        sys.setprofile(None)
    text = str(jaxpr)
    return {name for name in PRIMITIVES if re.search(rf"\b{name}\w*\[", text)}, called


def mesh_of_one():
    return jax.make_mesh((1,), ("rows",), (AxisType.Auto,), devices=jax.devices()[:1])


@pytest.mark.parametrize("strategy", ["stream", "2ps", "overl", "checkpoint"])
@pytest.mark.parametrize("fun", [chain, batch_norm])
def test_no_code_of_several_devices_runs(fun, strategy):
    assert traced(fun, strategy=strategy) == (set(), set())
    with jax.set_mesh(mesh_of_one()):  # a mesh for something else
        assert traced(fun, strategy=strategy) == (set(), set())


@pytest.mark.parametrize("fun", [chain, batch_norm])
def test_with_a_mesh_it_is_noticed(fun):
    primitives, called = traced(fun, mesh=mesh_of_one(), row_mesh_axis="rows")
    assert {"shard_map", "psum"} <= primitives
    assert {"shards_of", "run", "combined"} <= called


def test_a_mesh_of_one_device_changes_no_number():
    alone, on_mesh = (
        jax.jit(jax.value_and_grad(lrjax.rowwise(chain, in_axes=(None, 1), num_blocks=2, **o)))
        for o in ({}, {"mesh": mesh_of_one(), "row_mesh_axis": "rows"})
    )
    for own, found in zip(
        jax.tree.leaves(alone(*ARGS)), jax.tree.leaves(on_mesh(*ARGS)), strict=True
    ):
        np.testing.assert_array_equal(own, found)
