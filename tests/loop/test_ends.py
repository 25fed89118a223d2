"""Prologues and epilogues, and halos that are computed again: who has them; both are exact.

Programs as small as these would have neither, so the thresholds are lowered.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lrjax
from experiments.small_models import MODELS, TrainingCall
from graphs import assert_same_in_blocks
from lrjax.loop import ends, halos
from lrjax.loop.ends import repeated_steps
from lrjax.loop.rowloop import row_loop
from lrjax.rowgraph.graph import build
from lrjax.rowgraph.tracing import trace
from lrjax.strategies.base import TOP_DOWN
from lrjax.testing import assert_same_as_column
from marks import STRATEGIES, slow
from strategies.test_strategies import GEOMETRIES, convolve, normal

NHWC = ("NHWC", "HWIO", "NHWC")


@pytest.fixture
def everywhere(monkeypatch):
    """All loops that can have a prologue, an epilogue or halos have them."""
    for name in ("LEAST_OUTSIDE", "LEAST_SAVED", "LEAST_OPERATIONS"):
        monkeypatch.setattr(ends, name, 0)
    monkeypatch.setattr(halos, "LARGEST_HALO", 3.0)


def loop_of(network, image, num_blocks, *, is_differentiated=False):
    traced = trace(network, 1, (jax.ShapeDtypeStruct(image, jnp.float32),), {})
    graph = build(traced.program, traced.axes)
    return row_loop(
        graph, 0, order=TOP_DOWN, num_blocks=num_blocks, is_differentiated=is_differentiated
    )


def convolutions(channels, count=2):
    def network(image):
        for _ in range(count):
            kernel = jnp.ones((3, 3, image.shape[-1], channels))
            image = jax.nn.relu(
                lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=NHWC)
            )
        return image

    return network


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        ([1e12] * 5, (0, 5)),
        ([6e11, 1e12, 1e12, 1e12, 9.5e11], (1, 5)),
        ([6e11, 8e11, 1e12, 1e12, 5e11], (2, 4)),
        ([1e11] * 3, (2, 2)),  # of one that is outside at both ends, nothing is left to repeat
        ([1e11, 2e11, 3e11, 8e11, 3e11, 2e11, 1e11], (2, 5)),  # no more than two
        ([9.99e11, *[1e12] * 20], (0, 21)),
        ([1e11, 8e11, *[1e12] * 20, 8e11, 1e11], (1, 23)),  # the second save too little
    ],
)
def test_steps_with_much_outside_the_image_are_programs_of_their_own(inside, expected):
    assert repeated_steps(len(inside), 1e12, inside.__getitem__) == expected


@pytest.mark.parametrize(("second", "on_mesh"), [(7e11, (2, 16)), (7.5e11, (1, 17))])
def test_on_a_mesh_the_second_must_save_enough_by_itself(second, on_mesh):
    inside = [1e11, second, *[1e12] * 14, second, 1e11]
    assert repeated_steps(18, 1e12, inside.__getitem__) == (2, 16)
    assert repeated_steps(18, 1e12, inside.__getitem__, is_shared=True) == on_mesh


def test_small_programs_are_not_compiled_several_times():
    assert repeated_steps(4, 1e8, [1e7, 1e8, 1e8, 1e7].__getitem__) == (0, 4)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("is_differentiated", [False, True])
def test_the_ends_compute_rows_of_the_image_alone(is_differentiated):
    network = convolutions(4, count=8)
    loop = loop_of(network, (1, 64, 8, 4), 4, is_differentiated=is_differentiated)
    first, stop = loop.repeated
    assert (first, stop) == (1, loop.steps - 1)
    assert loop.steps - 2 < loop.full_steps < loop.steps
    for index, node in enumerate(loop.nodes):
        parts = [loop.rows_inside(index, step) for step in range(loop.steps)]
        rows = {row for part in parts for row in range(*part)}
        assert rows == set(range(node.op.height))
        own = loop.schedule.tracks[index].rows
        ends = sum(end - start for start, end in (*parts[:first], *parts[stop:]))
        assert loop.executed_rows(index) == (stop - first) * own + ends < loop.steps * own
        for start, end in parts[first:stop]:
            assert end - start == loop.schedule.tracks[index].rows


@pytest.mark.usefixtures("everywhere")
def test_no_rows_are_computed_again_where_steps_are_differentiated():
    loop = loop_of(convolutions(4), (1, 64, 8, 4), 4, is_differentiated=True)
    assert all(track.is_steady for track in loop.schedule.tracks)


def test_a_window_is_a_slab_where_copies_take_longer():
    """Of four channels two rows are nothing beside a copy of all; of 4096 they are more."""
    halos = []
    for channels in (4, 4096):
        loop = loop_of(convolutions(channels), (1, 256, 256, channels), 4)
        first = loop.schedule.tracks[0]
        halos.append(first.rows - max(first.advances))
    assert halos == [2, 0]


@pytest.mark.usefixtures("x64", "everywhere")
@pytest.mark.parametrize("strategy", ["stream", *slow("2ps", "overl")])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name, strategy):
    fun, shapes, image = GEOMETRIES[name]
    args = ([normal(i, *s, scale=0.6) for i, s in enumerate(shapes)], normal(7, *image))
    assert_same_in_blocks(fun, args, lambda most: (2, (most + 1) // 2), strategy)


@pytest.mark.usefixtures("x64", "everywhere")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["unet_none", *slow("resnet_frozen", "resnet")])
def test_networks(name, strategy):
    call = TrainingCall(MODELS[name])
    assert_same_as_column(call, call.arguments(), (None, 1, None), num_blocks=3, strategy=strategy)


@pytest.mark.usefixtures("x64", "everywhere")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("num_blocks", [1, 2, 5])
def test_a_sum_over_rows_in_one_pass(num_blocks, strategy):
    def loss(kernels, image):
        for kernel in kernels:
            image = jnp.tanh(convolve(image, kernel))
        return jnp.sum(image**2), jnp.max(image)

    args = ([normal(i, 3, 3, 2, 2, scale=0.5) for i in range(3)], normal(7, 2, 11, 5, 2))
    assert_same_as_column(loss, args, (None, 1), num_blocks=num_blocks, strategy=strategy)


@pytest.mark.usefixtures("x64", "everywhere")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_outside_are_not_read(strategy):
    """A logarithm of what is outside the image would be infinite."""

    def fun(kernel, image):
        return convolve(jnp.log(convolve(jnp.exp(image), jnp.exp(kernel))), kernel)

    args = normal(1, 3, 3, 1, 1), normal(7, 1, 17, 4, 1)
    assert_same_as_column(fun, args, (None, 1), num_blocks=3, strategy=strategy)


WAYS = {
    "a gradient's derivative": lambda fun: (
        lambda params, image: jax.jvp(lambda own: jax.grad(fun)(own, image), (params,), (params,))
    ),
    "a gradient's gradient": lambda fun: jax.grad(
        lambda params, image: sum(
            jnp.sum(bar**3) for bar in jax.tree.leaves(jax.grad(fun)(params, image))
        )
    ),
    "several images": lambda fun: (
        lambda params, image: jax.vmap(jax.grad(fun), (None, 0))(
            params, jnp.stack([image, -2 * image])
        )
    ),
    "a checkpoint": lambda fun: jax.grad(jax.checkpoint(fun), (0, 1)),
}


@pytest.mark.usefixtures("x64", "everywhere")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("way", WAYS)
def test_transformations(way, strategy):
    def loss(kernels, image):
        image = jnp.tanh(convolve(image, kernels[0], (2, 1)))
        return jnp.mean(jnp.log1p(convolve(image, kernels[1]) ** 2))

    args = ([normal(i, 3, 3, 2, 2, scale=0.5) for i in range(2)], normal(7, 1, 27, 5, 2))
    by_rows = lrjax.rowwise(loss, in_axes=(None, 1), num_blocks=4, strategy=strategy)
    found, expected = (jax.jit(WAYS[way](fun))(*args) for fun in (by_rows, loss))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-11 * float(jnp.max(jnp.abs(other))))
