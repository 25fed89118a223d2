"""Gathers and scatters: indices that belong to a row, and indices for all rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from graphs import check_rule

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


def test_embedding_of_labels_falls_back():
    """Rows of indices pick from a table."""

    def op(image, labels, table):
        return table[labels] * image

    check_rule(op, normal(2, 9, 4), LABELS, normal(4, 4), axes=(1, 1, None), falls_back=True)


def test_dynamic_update_of_another_axis():
    def op(image, offset):
        return lax.dynamic_update_slice_in_dim(jnp.sin(image), image[..., :2], offset, 2) ** 2

    check_rule(op, normal(2, 9, 4), np.int64(1), axes=(1, None))


def test_dynamic_update_of_rows_falls_back():
    def op(image, offset):
        return lax.dynamic_update_slice_in_dim(jnp.sin(image), image[:, :2], offset, 1) ** 2

    check_rule(op, normal(2, 9, 4), np.int64(1), axes=(1, None), falls_back=True)
