"""Gathers and scatters: indices that belong to a row, and indices for all rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from graphs import check_rule
from lrjax.testing import assert_same_as_column

pytestmark = pytest.mark.usefixtures("x64")

LABELS = np.random.default_rng(0).integers(0, 4, (2, 9))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("axis", [0, 2])
def test_take_along_another_axis(axis):
    def op(image, indices):
        return jnp.take_along_axis(jnp.sin(image), indices, axis) ** 2

    indices = np.random.default_rng(1).integers(0, 2, (2, 9, 4))
    check_rule(op, normal(2, 9, 4), indices)


def test_cross_entropy_with_integer_labels():
    def op(image, labels):
        chosen = jnp.take_along_axis(jax.nn.log_softmax(image), labels[..., None], -1)
        return -chosen.mean()

    check_rule(op, normal(2, 9, 4), LABELS)


def test_labels_that_exist_whole():
    def op(image, labels):
        return jnp.take_along_axis(jnp.sin(image), labels[..., None], -1)

    check_rule(op, normal(2, 9, 4), LABELS, axes=(1, None))


@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_the_same_indices_for_all_rows(mode):
    picked = np.array([3, 0, 0, 2])
    check_rule(lambda x: jnp.sin(x).at[:, :, picked].get(mode=mode) ** 2, normal(2, 9, 4))


def test_indices_into_two_other_axes():
    check_rule(lambda x: jnp.sin(x)[np.array([0, 1]), :, np.array([2, 3])] ** 2, normal(2, 9, 4))


def test_rows_that_move():
    check_rule(lambda x: jnp.sin(x)[:, :, np.array([[3, 1], [0, 0]])] ** 2, normal(2, 9, 4))


@pytest.mark.parametrize("method", ["add", "set", "multiply", "min", "max"])
def test_updates_at_another_axis(method):
    def op(image):
        target = jnp.cos(image).at[:, :, np.array([0, 2])]
        return getattr(target, method)(image[:, :, 1:3], unique_indices=True) ** 2

    check_rule(op, normal(2, 9, 4), strategies=("stream",))


def test_an_update_of_all_rows_alike():
    check_rule(lambda x: jnp.cos(x).at[:, :, 1].set(0.5) * x, normal(2, 9, 4))


def test_scatter_to_explicit_rows_falls_back():
    def op(image, labels):
        batch, rows = np.indices((2, 9))
        counts = jnp.zeros((2, 9, 4)).at[batch, rows, labels].add(1.0)
        return counts * image

    check_rule(op, normal(2, 9, 4), LABELS, falls_back=True)


TABLE = normal(4, 4, seed=2)
EMBEDDINGS = {
    "numpy's": lambda image, labels, table: table[labels] * image,
    "taken": lambda image, labels, table: jnp.take(table, labels, axis=0) * image,
    "filled": lambda image, labels, table: (
        image + table.at[2 * labels].get(mode="fill", fill_value=0)
    ),
    "clipped": lambda image, labels, table: image + table.at[2 * labels].get(mode="clip"),
    "columns": lambda image, labels, table: image + jnp.moveaxis(table[:, labels], 0, -1),
    "a number": lambda image, labels, table: image * table[labels, 3 - labels][..., None],
    "squared": lambda image, labels, table: table[labels] ** 2 + image,
    "summed": lambda image, labels, table: table[labels].sum() + image.sum(),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embedding_of_labels(name):
    """Rows of indices pick from a table; the table's gradient is a sum over rows."""
    check_rule(EMBEDDINGS[name], normal(2, 9, 4), LABELS, TABLE, axes=(1, 1, None))


def test_sums_by_label():
    def op(image, labels):
        return jnp.zeros((4, 4)).at[labels].add(jnp.cos(image)) ** 2

    check_rule(op, normal(2, 9, 4), LABELS)
    for blocks in (2, 5):  # rows beyond the last one are none's
        assert_same_as_column(op, (normal(2, 9, 4), LABELS), (1, 1), num_blocks=blocks)


def test_embedding_of_images_in_half_precision():
    """Few classes, many elements each: sums of blocks stay in float32."""
    image, table = normal(2, 64, 16, 4), normal(4, 4, seed=2)
    labels = np.random.default_rng(0).integers(0, 4, (2, 64, 16))
    args = [jnp.asarray(x, jnp.bfloat16) for x in (image, table)]
    assert_same_as_column(
        lambda image, labels, table: jnp.tanh(image + table[labels]).sum(),
        (args[0], labels, args[1]),
        (1, 1, None),
        num_blocks=16,
    )


def test_additions_to_a_table_that_is_not_zero_fall_back():
    def op(image, labels, table):
        return table.at[labels].add(image)

    check_rule(op, normal(2, 9, 4), LABELS, TABLE, axes=(1, 1, None), falls_back=True)


def test_rows_of_an_image_that_labels_pick_fall_back():
    def op(image, labels):
        return image[0][labels % 9]

    check_rule(op, normal(2, 9, 4), LABELS, falls_back=True)


def test_dynamic_update_of_another_axis():
    def op(image, offset):
        return lax.dynamic_update_slice_in_dim(jnp.sin(image), image[..., :2], offset, 2) ** 2

    check_rule(op, normal(2, 9, 4), np.int64(1), axes=(1, None))


def test_dynamic_update_of_rows_falls_back():
    def op(image, offset):
        return lax.dynamic_update_slice_in_dim(jnp.sin(image), image[:, :2], offset, 1) ** 2

    check_rule(op, normal(2, 9, 4), np.int64(1), axes=(1, None), falls_back=True)
