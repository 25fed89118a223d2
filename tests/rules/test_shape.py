"""Operations that move elements, on rows and beside them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from graphs import assert_row_local, check_rule
from lrjax.testing import assert_same_as_column

pytestmark = pytest.mark.usefixtures("x64")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


ROW_LOCAL = {
    "broadcast to more axes": lambda x: jnp.broadcast_to(x[:, :, None], (2, 9, 5, 4)) ** 2,
    "broadcast in front": lambda x: jnp.broadcast_to(x, (3, 2, 9, 4)) ** 2,
    "reshape of other axes": lambda x: x.reshape(1, 2, 9, 2, 2) ** 2,
    "merge of other axes": lambda x: x[..., None].repeat(3, -1).reshape(2, 9, 12) ** 2,
    "squeeze": lambda x: jnp.squeeze(x[:1], 0) ** 2,
    "expand": lambda x: jnp.expand_dims(x, (0, 2, 4)) ** 2,
    "transpose": lambda x: x.transpose(1, 2, 0) ** 2,
    "transpose twice": lambda x: jnp.sin(x.transpose(2, 1, 0)).transpose(0, 2, 1) ** 2,
    "reverse another axis": lambda x: jnp.flip(x, (0, 2)) * x,
    "slice another axis": lambda x: x[:, :, 1:3] ** 2,
    "strided slice of another axis": lambda x: x[:, :, ::2] ** 2,
    "concatenate another axis": lambda x: jnp.concatenate([x, x**2, jnp.sin(x)], 2) ** 2,
    "stack": lambda x: jnp.stack([x, x**2], -1) ** 2,
    "split another axis": lambda x: jnp.prod(jnp.stack(jnp.split(x, 2, axis=2)), 0),
    "pad another axis": lambda x: jnp.pad(x, ((0, 0), (0, 0), (1, 2)), constant_values=3.0) ** 2,
    "select a channel": lambda x: x[..., 1] * x[..., 0],
    "iota of rows": lambda x: x * lax.broadcasted_iota(jnp.float64, x.shape, 1),
    "iota of columns": lambda x: x * lax.broadcasted_iota(jnp.float64, x.shape, 2),
    "coordinates": lambda x: x * jnp.linspace(0.0, 1.0, 9)[:, None],
    "position mask": lambda x: jnp.where(lax.broadcasted_iota(int, x.shape, 1) < 4, x, x**2),
    "split and join": lambda x: jnp.concatenate(jnp.split(jnp.sin(x), [1, 3], axis=2)[::-1], 2) * x,
    "tile another axis": lambda x: jnp.tile(x, (1, 1, 3)) ** 2,
    "full rows of zeros": lambda x: x**2 + jnp.zeros_like(x).at[:, :, 0].set(1.0),
}


@pytest.mark.parametrize("name", ROW_LOCAL)
def test_row_local(name):
    check_rule(ROW_LOCAL[name], normal(2, 9, 4), strategies=("stream", "2ps"))


ALONG_ROWS = {
    "slice": lambda x: x[:, 2:] ** 2,
    "slice below": lambda x: x[:, :-3] ** 2,
    "slice both": lambda x: x[:, 3:7] ** 2,
    "strided": lambda x: x[:, ::2] ** 2,
    "strided from one": lambda x: x[:, 1::3] ** 2,
    "strided part": lambda x: x[:, 1:8:2] ** 2,
    "one row": lambda x: x[:, 4:5] ** 2,
    "differences": lambda x: (x[:, 1:] - x[:, :-1]) ** 2,
    "pad": lambda x: jnp.pad(x, ((0, 0), (2, 1), (0, 0))) ** 2 + 1,
    "pad with a value": lambda x: jnp.sin(
        jnp.pad(x, ((0, 0), (1, 3), (0, 0)), constant_values=2.0)
    ),
    "negative pad": lambda x: lax.pad(x, jnp.float64(0), ((0, 0, 0), (-2, -1, 0), (0, 0, 0))) ** 2,
    "interior pad": lambda x: jnp.cos(lax.pad(x, 0.0, ((0, 0, 0), (0, 0, 1), (0, 0, 0)))),
    "interior pad with edges": lambda x: jnp.cos(
        lax.pad(x, 0.5, ((0, 0, 0), (1, -2, 2), (0, 0, 0)))
    ),
    "shift": lambda x: x * jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1],
    "up and down": lambda x: jnp.cos(lax.pad(x, 0.0, ((0, 0, 0), (0, 1, 1), (0, 0, 0))))[:, ::2],
}


@pytest.mark.parametrize("name", ALONG_ROWS)
def test_along_rows(name):
    check_rule(ALONG_ROWS[name], normal(2, 9, 4))


def shuffled(x):
    """Pixel shuffle: two rows and columns from the features of one."""
    batch, height, width, features = x.shape
    x = jnp.sin(x).reshape(batch, height, width, 2, 2, features // 4).transpose(0, 1, 3, 2, 4, 5)
    return jnp.sin(x.reshape(batch, 2 * height, 2 * width, features // 4))


def folded(x, rows):
    """Space to depth."""
    batch, height, width, features = x.shape
    x = jnp.sin(x).reshape(batch, height // rows, rows, width, features).swapaxes(2, 3)
    return jnp.sin(x.reshape(batch, height // rows, width, rows * features))


SCALED = {
    "repeat": lambda x: jnp.repeat(jnp.sin(x), 3, axis=1) ** 2,
    "repeat by broadcast": lambda x: jnp.sin(
        jnp.broadcast_to(jnp.sin(x)[:, :, None], (2, 15, 2, 3, 4)).reshape(2, 30, 3, 4)
    ),
    "pixel shuffle": shuffled,
    "space to depth": lambda x: folded(x, 3),
    "there and back": lambda x: folded(shuffled(x)[:, :, ::2], 2) * x[..., :2],
    "average pooling by a reshape": lambda x: jnp.sin(x).reshape(2, 5, 3, 3, 4).mean(2) ** 2,
    "attention in patches": lambda x: jax.nn.softmax(jnp.sin(x).reshape(2, 5, 9, 4), 2) ** 2,
}


@pytest.mark.parametrize("name", SCALED)
def test_reshapes_that_scale_rows(name):
    check_rule(SCALED[name], normal(2, 15, 3, 4), num_blocks=4)


@pytest.mark.parametrize("num_blocks", [1, 5, 7])
def test_pixel_shuffle_in_any_blocks(num_blocks):
    check_rule(shuffled, normal(1, 7, 2, 4), num_blocks=num_blocks, strategies=("stream", "overl"))


COLUMN = {
    "reverse rows": lambda x: jnp.flip(jnp.sin(x), 1) * x,
    "flatten": lambda x: jnp.sin(x).repeat(10, 2).reshape(2, 43 * 40) ** 2,
    "merge rows with batch": lambda x: jnp.sin(x).reshape(86, 4) ** 2,
    "rows for columns": lambda x: jnp.sin(x).reshape(2, 4, 43) ** 2,
    "roll": lambda x: jnp.roll(jnp.sin(x), 2, 1) * x,
    "concatenate rows": lambda x: jnp.concatenate([jnp.sin(x), x], 1) ** 2,
    "split rows": lambda x: jnp.prod(jnp.stack(jnp.split(jnp.sin(x)[:, 1:], 2, axis=1)), 0),
    "squares of rows": lambda x: jnp.sin(x) @ jnp.swapaxes(x, 1, 2),
}


@pytest.mark.parametrize("name", COLUMN)
def test_not_row_local(name):
    """Column-wise, exact, and reported."""
    check_rule(COLUMN[name], normal(2, 43, 4), falls_back=True, strategies=("stream", "2ps"))


def test_not_row_local_between_row_local_ones():
    def op(image):
        image = jnp.flip(jnp.sin(image[:, 1:] * image[:, :-1]), 1)
        return jnp.cumsum(image[:, 1:] + image[:, :-1], 1)[:, ::2] ** 2

    check_rule(op, normal(2, 42, 3), falls_back=True)


@pytest.mark.parametrize("start", [0, 1, 2])
def test_dynamic_slice_of_another_axis(start):
    def op(image, offset):
        return lax.dynamic_slice_in_dim(image, offset, 2, axis=2) ** 2

    check_rule(op, normal(2, 9, 4), np.int64(start), axes=(1, None))


def test_dynamic_slice_of_rows_falls_back():
    def op(image, offset):
        return lax.dynamic_slice_in_dim(jnp.sin(image), offset, 4, axis=1) ** 2

    check_rule(op, normal(2, 9, 4), np.int64(3), axes=(1, None), falls_back=True)


def test_padding_with_a_parameter_falls_back():
    def op(image, value):
        return jnp.sin(lax.pad(image, value, ((0, 0, 0), (1, 1, 0), (0, 0, 0))))

    check_rule(op, normal(2, 9, 4), np.float64(0.3), axes=(1, None), falls_back=True)


def test_padding_of_the_image():
    """Its value is converted, so that it is computed, though from no input."""

    def fun(image, scale):
        padded = jnp.pad(image, ((0, 0), (3, 2), (0, 0)), constant_values=1)
        return padded[:, 2:] * padded[:, :-2] * scale

    image = normal(2, 9, 4)
    assert_row_local(fun, (image, np.float64(2)), (1, None))
    for strategy in ("stream", "2ps", "overl"):
        assert_same_as_column(
            fun, (image, np.float64(2)), (1, None), num_blocks=3, strategy=strategy
        )


@pytest.mark.parametrize("height", [1, 2, 3])
def test_few_rows(height):
    def op(image):
        padded = jnp.pad(image, ((0, 0), (2, 2), (0, 0)))
        return padded[:, :-2] * padded[:, 2:], image.transpose(2, 1, 0), image[:, ::2]

    check_rule(op, normal(2, height, 3), num_blocks=height)


def test_rows_first_and_last():
    check_rule(lambda x: jnp.sin(x[1:] * x[:-1]), normal(9, 3), axes=0)
    check_rule(lambda x: jnp.sin(x[..., 1:] * x[..., :-1]), normal(3, 9), axes=1)


def test_a_single_axis():
    check_rule(lambda x: jnp.sin(x[1:] * x[:-1]), normal(11), axes=0)


def test_a_map_that_is_constant_along_rows():
    """A parameter spread over the map never exists whole."""

    def op(image, bias):
        spread = jnp.broadcast_to(bias[None, None], image.shape)
        return jax.nn.sigmoid(image + jnp.exp(spread)) * spread

    check_rule(op, normal(2, 9, 4), normal(4, seed=1), axes=(1, None))


def test_nearest_upsampling():
    """A repetition of rows by a dilated window sum."""

    def op(image):
        return lax.reduce_window(
            image, 0.0, lax.add, (1, 2, 1), (1, 1, 1), ((0, 0), (1, 1), (0, 0)), (1, 2, 1)
        )

    check_rule(lambda x: jnp.sin(op(x)) ** 2, normal(2, 9, 4))
