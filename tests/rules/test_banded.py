"""Constant sums of rows: resizes, constant indices, mirrored edges."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from graphs import check_rule, graphs_of
from lrjax.program.constants import Constant
from lrjax.rules import banded
from lrjax.rules.base import NotRowLocal
from lrjax.rules.geometry import BandMap

pytestmark = pytest.mark.usefixtures("x64")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def resized(height, method):
    def op(x):
        shape = (x.shape[0], height, 5, x.shape[-1])
        return jnp.sin(jax.image.resize(jnp.sin(x), shape, method))

    return op


@pytest.mark.parametrize(
    ("method", "height", "new_height"),
    [
        ("bilinear", 23, 46),
        ("bilinear", 37, 61),
        ("bilinear", 45, 19),
        ("bilinear", 2, 5),
        ("cubic", 24, 36),
        ("nearest", 23, 46),
        ("nearest", 37, 61),
        ("nearest", 45, 19),
    ],
)
def test_resize(method, height, new_height):
    check_rule(resized(new_height, method), normal(1, height, 3, 2), num_blocks=4)


@pytest.mark.parametrize("num_blocks", [1, 9, 19])
def test_resize_in_any_blocks(num_blocks):
    op, image = resized(38, "bilinear"), normal(1, 19, 2, 1)
    check_rule(op, image, num_blocks=num_blocks, strategies=("stream", "overl"))


@pytest.mark.parametrize("method", ["nearest", "bilinear"])
def test_down_and_up_again_at_an_odd_height(method):
    """Rows that were halved and doubled meet those that were not, as in a U-Net."""
    kernel = normal(3, 3, 2, 2, seed=1)

    def op(x):
        narrow = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        wide = jax.image.resize(jnp.sin(narrow), x.shape, method)
        return jnp.sin(jnp.concatenate([wide, x], -1))

    check_rule(op, normal(1, 37, 6, 2), num_blocks=5)


def test_resize_of_a_rows_first_map():
    check_rule(
        lambda x: jnp.sin(jax.image.resize(jnp.sin(x), (34, 4, 3), "bilinear")),
        normal(17, 3, 3),
        axes=0,
    )


@pytest.mark.parametrize(
    "rows",
    [
        np.arange(41) // 2,
        np.array([0, 0, 3, 4, 4, 7, 9, 12, 12, 15, 17, 19, 20]),
        np.arange(21)[::2],
        np.minimum(np.arange(25), 20),
        np.abs(np.arange(21) - 2),
    ],
    ids=["twice", "uneven", "every second", "edge", "mirrored"],
)
def test_constant_indices(rows):
    check_rule(lambda x: jnp.sin(jnp.sin(x)[:, rows]), normal(2, 21, 3), num_blocks=4)


def test_two_sets_of_constant_indices():
    rows = np.arange(21) // 2
    check_rule(
        lambda x: jnp.sin(x)[:, rows] * jnp.sin(x)[:, rows + 1],
        normal(2, 21, 3),
        strategies=("stream",),
    )


@pytest.mark.parametrize("mode", ["clip", "wrap", "fill"])
def test_constant_indices_in_every_mode(mode):
    rows = np.minimum(np.arange(23), 20)
    check_rule(lambda x: jnp.take(jnp.sin(x), rows, axis=1, mode=mode) ** 2, normal(2, 21, 3))


def test_indices_outside_the_map():
    """Clipped they are rows like others; rows of NaN are not picked from anywhere."""
    rows = np.arange(23)
    check_rule(lambda x: jnp.take(jnp.sin(x), rows, axis=1, mode="clip") ** 2, normal(2, 21, 3))
    check_rule(
        lambda x: jnp.nan_to_num(jnp.sin(x).at[:, rows].get(mode="fill")) ** 2,
        normal(2, 21, 3),
        falls_back=True,
    )


@pytest.mark.parametrize(
    "rows", [np.array([30, 2, 40, 1]), np.arange(43)[::-1]], ids=["shuffled", "reversed"]
)
def test_indices_far_from_a_line_fall_back(rows):
    check_rule(lambda x: jnp.sin(jnp.sin(x)[:, rows]), normal(2, 43, 3), falls_back=True)


def test_indices_known_only_at_run_time_fall_back():
    check_rule(
        lambda x, rows: jnp.sin(jnp.sin(x)[:, rows]),
        normal(2, 21, 3),
        np.arange(21) // 2,
        axes=(1, None),
        falls_back=True,
    )


def padded(x, mode, below, above):
    return jnp.sin(jnp.pad(jnp.sin(x), ((0, 0), (below, above), (1, 1)), mode=mode))


@pytest.mark.parametrize("mode", ["reflect", "symmetric", "edge"])
@pytest.mark.parametrize("width", [(1, 1), (3, 2), (0, 4)])
def test_edges_padded_with_rows_nearby(mode, width):
    check_rule(lambda x: padded(x, mode, *width), normal(2, 19, 3), num_blocks=5)


def test_padding_by_rows_far_away_falls_back():
    check_rule(lambda x: padded(x, "wrap", 1, 1), normal(2, 43, 3), falls_back=True)


def test_rows_above_other_rows():
    """Two maps that both exist whole, one above the other."""

    def op(x, y):
        return jnp.sin(jnp.concatenate([x, y, x[:, :1]], 1))

    check_rule(op, normal(2, 7, 3), normal(2, 5, 3, seed=1))


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR", ((1, 2), (0, 1))])
@pytest.mark.parametrize("strides", [(2, 2), (3, 1)])
def test_flax_transposed_convolution(padding, strides):
    model = nn.ConvTranspose(
        2, (3, 3), strides, padding=padding, param_dtype=jnp.float64, dtype=jnp.float64
    )
    variables = jax.tree.map(
        lambda x: normal(*x.shape, seed=3),
        jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 37, 3, 2))),
    )
    check_rule(
        lambda x: jnp.sin(model.apply(variables, jnp.sin(x))),
        normal(1, 37, 3, 2),
        falls_back=padding == "CIRCULAR" and strides[0] < 3,  # stride 3 needs no rows from afar
        num_blocks=4,
    )


def test_a_resize_keeps_few_rows():
    """Its line buffers are as deep as its band, not as the map."""

    def fun(x):
        return jnp.sin(jax.image.resize(jnp.sin(x), (1, 512, 3, 1), "bilinear")).sum()

    for graph in graphs_of(fun, (normal(1, 256, 3, 1),), (1,)):
        bands = [
            read.row_map
            for node in graph.nodes
            if node.op is not None
            for read in node.op.reads
            if read is not None and isinstance(read.row_map, BandMap)
        ]
        assert bands
        assert all(band.extent <= 6 and band.rate in (0.5, 2) for band in bands)


def test_a_dense_matrix_is_no_band():
    pairs = np.nonzero(np.ones((64, 64)))
    with pytest.raises(NotRowLocal, match="far from a line"):
        banded.taps(*pairs, None, 64, 64)
    with pytest.raises(NotRowLocal, match="no band"):
        banded.of_matrix(Constant(b"ones", lambda: np.ones((64, 64))), 1)


@pytest.mark.parametrize(
    ("height", "new_height"), [(9, 4), (100, 33), (33, 100), (64, 128), (7, 7)]
)
def test_a_band_and_its_transpose_advance_alike(height, new_height):
    matrix = np.array(
        jax.image.resize(np.eye(height), (new_height, height), "bilinear", antialias=True)
    )
    constant = Constant(repr(matrix).encode(), lambda: matrix)
    there, back = (banded.of_matrix(constant, axis).band for axis in (1, 0))
    assert there.rate * back.rate == 1
    rows, columns = np.nonzero(matrix)
    for band, outputs, inputs in [(there, rows, columns), (back, columns, rows)]:
        first = np.array([band.first(int(i)) for i in outputs])
        assert (first <= inputs).all()
        assert (inputs < first + band.extent).all()
