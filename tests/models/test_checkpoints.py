"""What a plain model saved, the row-wise one loads, and the other way round, bit for bit."""

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import lrjax.linen
import lrjax.nnx
from lrjax.models import ResNet
from lrjax.testing import check, results

IMAGES = jax.random.normal(jax.random.key(0), (1, 21, 8, 3))
NET = ResNet(blocks=(1,), bottleneck=True, width=1 / 16, num_classes=3)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), padding=1, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.conv(x)))


class RowBlock(Block):
    """The same module with its call by rows."""

    def __call__(self, x):
        return lrjax.nnx.rowwise(Block.__call__, in_axes=(None, 1), num_blocks=3)(self, x)


def restored(directory, like, saved):
    """What comes back when ``saved`` has been written and is read into the structure ``like``."""
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(directory / "state", saved)
    checkpointer.wait_until_finished()
    return checkpointer.restore(directory / "state", like)


def trained_linen(model, seed):
    """Variables after one training step's update of the running statistics."""
    variables = model.init(jax.random.key(seed), IMAGES)
    _, updated = model.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
    return {**variables, **updated}


def trained_nnx(kind, seed):
    model = kind(nnx.Rngs(seed))
    model(IMAGES)
    return nnx.split(model)


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, found, expected)))


@pytest.mark.parametrize("to_rows", [True, False], ids=["plain to rows", "rows to plain"])
def test_linen_checkpoint(tmp_path, to_rows):
    rows = lrjax.linen.rowwise(NET, in_axes=1, num_blocks=3)
    source, target = (NET, rows) if to_rows else (rows, NET)
    saved, other = trained_linen(source, seed=0), trained_linen(target, seed=1)
    loaded = restored(tmp_path, other, saved)
    assert_equal(loaded, saved)
    check(*(results(model.apply, (loaded, IMAGES)) for model in (target, source)))


@pytest.mark.parametrize("to_rows", [True, False], ids=["plain to rows", "rows to plain"])
def test_nnx_checkpoint(tmp_path, to_rows):
    source, target = (Block, RowBlock) if to_rows else (RowBlock, Block)
    (source_graph, saved), (graph, other) = trained_nnx(source, 0), trained_nnx(target, 1)
    loaded = restored(tmp_path, other, saved)
    assert_equal(loaded, saved)

    def call(graph):
        return lambda state, images: nnx.merge(graph, state, copy=True)(images)

    check(*(results(call(one), (loaded, IMAGES)) for one in (graph, source_graph)))
