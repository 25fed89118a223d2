"""Runs of a network that compiles in a second; as a program, one that can be killed.

    python tests/app/tiny_runs.py OUT key=value ...

trains, or goes on, in OUT and prints the number of every step that is done.
"""

import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lrjax.app import config, processes, runs, saved
from lrjax.models import registry


class Tiny(nn.Module):
    """A convolution, batch statistics and dropout: everything that a checkpoint must hold."""

    num_classes: int
    width: float = 1.0
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, images, *, train=False):
        x = images.astype(self.dtype) / 127.5 - 1
        x = nn.Conv(4, (3, 3), strides=2, dtype=self.dtype, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = checkpoint_name(nn.max_pool(x, (2, 2), (2, 2)), "pool")
        x = nn.Dropout(0.2, deterministic=not train)(x.mean(axis=(1, 2)))
        return nn.Dense(self.num_classes, name="classes")(x)


class TinyPixels(nn.Module):
    """The same for every pixel."""

    num_classes: int
    width: float = 1.0
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.relu(nn.Conv(4, (3, 3), name="conv")(images.astype(self.dtype) / 127.5 - 1))
        return nn.Conv(self.num_classes, (1, 1), name="classes")(x)


registry.NETWORKS["tiny"] = registry.Network(Tiny)
registry.NETWORKS["tiny_pixels"] = registry.Network(TinyPixels, labels_pixels=True)

SMALL = {
    "data.image_size": 16,
    "data.digits": "0,1",
    "data.num_images": 12,
    "model.name": "tiny",
    "strategy.name": "column",
    "optimizer.lr": 0.05,
    "train.steps": 4,
    "run.samples": 0,
    "run.checkpoint_every": 2,
}


class Notes(runs.Listener):
    """Remembers what it is told."""

    def __init__(self):
        self.notes = []
        self.evaluations = []

    def note(self, text):
        self.notes.append(text)

    def evaluated(self, step, evaluation):
        self.evaluations.append((step, evaluation))


def train(out, listener=None, **settings):
    """A run from the beginning; settings have `__` for the dot."""
    return runs.run(configured(**settings), out, listener=listener)


def go_on(out, listener=None, **settings):
    """The run in `out`, after its newest checkpoint."""
    given = {key.replace("__", "."): value for key, value in settings.items()}
    return runs.run(runs.config_to_resume(out, given), out, resume=True, listener=listener)


def configured(**settings):
    given = {key.replace("__", "."): value for key, value in settings.items()}
    return config.Config.of({**SMALL, **given})


def assert_same_bits(found, expected):
    """Parameters, statistics and losses of two runs, to the last bit."""
    assert found.training.losses == expected.training.losses
    for one, other in zip(
        jax.tree.leaves((found.training.params, found.training.statistics)),
        jax.tree.leaves((expected.training.params, expected.training.statistics)),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


class Printer(runs.Listener):
    def step(self, progress, steps):
        print(progress.step, flush=True)

    def note(self, text):
        print(text, file=sys.stderr, flush=True)


def main(out, *settings):
    asked = config.Config.of({**SMALL, **config.assignments(settings)})
    resume = (out / saved.CONFIG_FILE).exists()
    if resume:
        asked = runs.config_to_resume(out, config.assignments(settings))
    joined = asked.processes
    processes.start(joined.count, joined.coordinator, joined.id)
    runs.run(asked, out, resume=resume, listener=Printer())


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
