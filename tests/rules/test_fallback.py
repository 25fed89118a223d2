"""Primitives without a rule run on whole maps, exactly, under every strategy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lrjax
from lrjax.testing import assert_same_as_column
from marks import STRATEGIES, slow

pytestmark = pytest.mark.usefixtures("x64")

SPEC = ("NHWC", "HWIO", "NHWC")
LABELS = np.random.default_rng(3).integers(0, 4, (2, 13, 6))
MATRIX = np.array([[2.0, 0.0], [0.5, 1.5]])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape) / 2


def covariance(y):
    return jnp.einsum("bhwc,bhwd->cd", y, y) / 156 + jnp.diag(jnp.array([1.0, 2.0]))


def per_row_factors(y):
    factors = jnp.linalg.cholesky(jnp.einsum("bhwc,bhwd->bhcd", y, y) + jnp.eye(2))
    return factors.sum(-1)[:, :, None] * y


def solved(y):
    found = jax.scipy.linalg.solve_triangular(MATRIX, y.reshape(-1, 2).T, lower=True)
    return found.T.reshape(y.shape)


def detached(function):
    """Of what has no gradient."""
    return lambda y: y * function(lax.stop_gradient(y))


def largest(a, b):
    return jnp.where(jnp.abs(a) > jnp.abs(b), a, b)


def convolve(image, kernel, **options):
    return lax.conv_general_dilated(
        image, kernel, (1, 1), "SAME", dimension_numbers=SPEC, **options
    )


def local(y):
    kernel = normal(13, 6, 18, 2, seed=5)
    return lax.conv_general_dilated_local(y, kernel, (1, 1), "SAME", (3, 3), dimension_numbers=SPEC)


def patches(y):
    found = lax.conv_general_dilated_patches(y, (3, 3), (1, 1), "SAME", dimension_numbers=SPEC)
    return found[..., ::9]


def ragged(y):
    sizes = np.array([50, 50, 56], np.int32)
    return lax.ragged_dot(y.reshape(-1, 2), normal(3, 2, 2), sizes).reshape(y.shape)


GROUPS = {
    "transforms": [
        lambda y: jnp.fft.fft(y, axis=1).real,
        lambda y: jnp.abs(jnp.fft.fft2(y, axes=(1, 2))) ** 2,
        lambda y: jnp.moveaxis(lax.top_k(jnp.moveaxis(y, 1, -1), 13)[0], -1, 1),
        lambda y: y * jnp.argsort(y, axis=1),
        lambda y: jnp.cumsum(y, axis=1) + jnp.sort(y, axis=1) * jnp.quantile(y, 0.3),
        lambda y: lax.associative_scan(jnp.add, y, axis=2),
        lambda y: lax.associative_scan(jnp.multiply, y, axis=1),
    ],
    "algebra": [
        lambda y: y @ jnp.linalg.inv(jnp.linalg.cholesky(covariance(y))),
        lambda y: y @ jnp.linalg.eigh(covariance(y))[1],
        lambda y: jnp.linalg.solve(covariance(y), y[..., None])[..., 0],
        per_row_factors,
        solved,
    ],
    "scatters": [
        lambda y: y.at[:, np.array([3, 0, 7])].set(y[:, 1:4] * 2),
        lambda y: y.at[:, 1:-1, 1:-1].set(jnp.tanh(y[:, 1:-1, 1:-1])),
        lambda y: y.at[:, 1:, :, :1].set(y[:, :-1, :, :1]),
        lambda y: y.at[:, ::2].multiply(2.0),
        lambda y: y * jnp.sin(jnp.arange(8.0)).reshape(4, 2)[LABELS],
        lambda y: y * jnp.zeros(4).at[jnp.clip((y * 2).astype(int), 0, 3)].add(1.0)[1],
        lambda y: lax.dynamic_update_slice(y, y[:, :3] * 2, (0, 5, 0, 0)),
    ],
    "reductions": [
        detached(lambda y: lax.reduce(y, 0.0, largest, (1, 2))[:, None, None]),
        detached(lambda y: lax.reduce(y, 0.0, largest, (3,))[..., None]),
        detached(lambda y: lax.reduce_window(y, 0.0, largest, (1, 2, 1, 1), (1, 1, 1, 1), "SAME")),
        detached(lambda y: lax.approx_max_k(y, 2, reduction_dimension=3)[0]),
        lambda y: y * lax.reduce((y > 0).astype(np.int32), np.int32(0), lax.bitwise_xor, (1, 2))[0],
        lambda y: y * lax.reduce_and((y > -9).astype(np.uint32) * np.uint32(7), (1, 2))[0],
    ],
    "convolutions": [
        lambda y: convolve(y, normal(3, 3, 2, 2, seed=4), batch_group_count=2),
        lambda y: convolve(y, y[0, :3, :3, :, None] * np.ones(2)),
        local,
        patches,
        ragged,
    ],
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("group", GROUPS)
def test_between_convolutions(group, strategy):
    def fun(image, first, scale, second):
        image = convolve(image, first)
        made = [scale[i] * function(image) for i, function in enumerate(GROUPS[group])]
        return convolve(sum(made), second)

    kernels = normal(3, 3, 2, 2, seed=1), normal(3, 3, 2, 2, seed=2)
    scale = 1 + normal(len(GROUPS[group]), seed=3)
    args = normal(2, 13, 6, 2), kernels[0], scale, kernels[1]
    assert_same_as_column(fun, args, (1, None, None, None), num_blocks=3, strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_map_without_rows(rows, strategy):
    """A window that fits nowhere leaves an empty map, which padding brings back."""

    def fun(kernel, image):
        empty = lax.conv_general_dilated(image, kernel, (1, 1), "VALID", dimension_numbers=SPEC)
        assert empty.shape[1] == 0
        repeated = jnp.repeat(empty, 2, axis=1)
        filled = jnp.pad(repeated, ((0, 0), (0, rows), (0, 0), (0, 0)))
        return jnp.concatenate([image, filled], 3)

    args = normal(rows + 1, 1, 2, 2), normal(1, rows, 3, 2)
    assert_same_as_column(fun, args, (None, 1), num_blocks=1, strategy=strategy)


def rolled_by(y, start):
    return jnp.roll(y, start, 1)


def cropped(y, start):
    return lax.dynamic_slice(y, (0, start, start, 0), (2, 9, 4, 2))


def cropped_each(y, start):
    def crop(image, start):
        return lax.dynamic_slice_in_dim(image, start, 9)

    return jax.vmap(crop)(y, jnp.stack([start, start + 1]))


def picked(y, start):
    return y[:, start + jnp.array([4, 0, 0, 7, 1])]


def warped(y, start):
    """Bilinear, at other places: a rotation, say."""
    rows, columns = jnp.meshgrid(
        jnp.linspace(0, 7, 9) + 0.3 * start, jnp.arange(5.0), indexing="ij"
    )

    def sampled(plane):
        places = [rows, columns + 0.1 * rows]
        return jax.scipy.ndimage.map_coordinates(plane, places, 1, mode="nearest")

    return jax.vmap(jax.vmap(sampled, -1, -1))(y)


def wrapped(y, start):
    del start
    return jnp.pad(y, ((0, 0), (2, 1), (0, 0), (0, 0)), mode="wrap")


def put_together(y, start):
    del start
    return jnp.concatenate([y, 2 * y], 1)


def tiled(y, start):
    del start
    return jnp.tile(y, (1, 2, 1, 1))


def padded(y, start):
    return lax.pad(y, jnp.tanh(0.1 * start), ((0, 0, 0), (2, 3, 0), (0, 0, 0), (0, 0, 0)))


def pasted(y, start):
    return lax.dynamic_update_slice(jnp.zeros((2, 20, 6, 2)), y, (0, start, 0, 0))


def written(y, start):
    del start
    return jnp.zeros((2, 20, 6, 2)).at[:, 4:17].set(y)


def largest_of_rows(y, start):
    del start
    return jnp.moveaxis(lax.top_k(jnp.moveaxis(y, 1, -1), 9)[0], -1, 1)


def low_frequencies(y, start):
    del start
    return jnp.fft.irfft(jnp.fft.rfft(y, axis=1)[:, :5], axis=1)


MOVES = (
    *(rolled_by, cropped, cropped_each, picked, warped, wrapped, put_together, tiled),
    *(padded, pasted, written, largest_of_rows, low_frequencies),
)


@pytest.mark.parametrize("strategy", ["stream", *slow("2ps", "overl")])
@pytest.mark.parametrize("moved", MOVES)
def test_all_goes_on_by_rows_behind_what_needs_all_rows(moved, strategy):
    """Whatever the height of what it makes is: a crop at random begins a network, say."""

    def fun(image, first, second, start):
        image = moved(image + first[0, 0, 0], start)
        return convolve(jnp.tanh(convolve(image, first)), second)

    args = normal(2, 13, 6, 2), normal(3, 3, 2, 2, seed=1), normal(3, 3, 2, 2, seed=2), 3
    options = {"num_blocks": 2, "strategy": strategy}
    assert_same_as_column(fun, args, (1, None, None, None), **options)
    explanation = lrjax.explain(fun, *args, in_axes=(1, None, None, None), **options)
    by_rows = [op.name for op in explanation.segments[0].passes[0].operations]
    assert sum(name.startswith("conv_general_dilated") for name in by_rows) >= 2


def test_a_crop_at_random_begins_a_network_that_needs_little_memory():
    def loss(kernels, images, start):
        images = lax.dynamic_slice(images, (0, start, start, 0), (1, 1024, 64, 4))
        for kernel in kernels:
            images = jnp.tanh(convolve(images, kernel))
        return jnp.mean(images**2)

    def peak(fun):
        gradient = jax.value_and_grad(fun)
        return lrjax.memory.peak_bytes(lrjax.memory.compile_for(gradient, *args, target="cpu"))

    args = [normal(3, 3, 4, 4)] * 6, normal(1, 2048, 96, 4), 3
    by_rows = lrjax.rowwise(loss, in_axes=(None, 1, None), num_blocks=16)
    assert peak(by_rows) < 0.5 * peak(loss)
