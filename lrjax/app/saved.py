"""Runs on disk: what a run's directory holds, and the network in it ready for use."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

import lrjax
from lrjax.app import building, checkpoints
from lrjax.app.config import Config
from lrjax.app.step import State, initial_state
from lrjax.files import write_whole
from lrjax.models import registry

CONFIG_FILE = "config.json"
PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class SavedRun:
    """A network as a checkpoint holds it.

    Attributes:
      config: of its run.
      step: of the checkpoint.
      model: the network.
      state: its parameters and statistics, and the optimizer's state.
      class_names: of its classes, in order.
      image_shape: `(height, width, 3)` that it was trained on.
      facts: what the checkpoint says of its run.
    """

    config: Config
    step: int
    model: nn.Module = field(repr=False)
    state: State = field(repr=False)
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    facts: Mapping[str, Any] = field(repr=False)

    @property
    def labels_pixels(self) -> bool:
        return registry.network(self.config.model.name).labels_pixels


@dataclass(frozen=True)
class ImageShape:
    """Stands for a data set where only shapes are asked for."""

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    label_shape: tuple[int, ...] = ()
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> Any:
        raise IndexError(index)


def write_config(run: Path, config: Config) -> None:
    """Writes a run's configuration, and by which lrjax."""
    content = {"lrjax": lrjax.__version__, **config.kept()}
    write_whole(run / CONFIG_FILE, json.dumps(content, indent=1) + "\n")


def read_config(run: Path) -> Config:
    """The configuration of a run.

    Raises:
      ValueError: the directory holds none, or one that this lrjax cannot read.
    """
    path = run / CONFIG_FILE
    try:
        content = json.loads(path.read_text("utf-8"))
        content.pop("lrjax", None)
        return config_of(content)
    except FileNotFoundError:
        raise ValueError(
            f"run: {run} has no {CONFIG_FILE}; give a directory that lrjax train wrote"
        ) from None
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"run: {path} is no configuration of this lrjax: {error}") from None


def kept_plan(run: Path) -> Path | None:
    """The file of the plan that a run is run by; None where it has none."""
    place = run / PLAN_FILE
    return place if place.exists() else None


def config_of(nested: dict[str, Any]) -> Config:
    """A configuration from what `Config.model_dump` gave."""
    flat = {
        f"{section}.{name}": value
        for section, values in nested.items()
        for name, value in values.items()
    }
    return Config.of(flat)


def load(run: Path, on_damaged: Callable[[str], None], *, step: int | None = None) -> SavedRun:
    """The network of a run's newest checkpoint, or of a given step's.

    Args:
      run: the run's directory.
      on_damaged: is told of each checkpoint that cannot be read.
      step: of the checkpoint.

    Raises:
      ValueError: there is no such run or checkpoint, or it is of another version.
    """
    read_config(run)
    if step is None:
        return checkpoints.newest(run, lambda one: _load(run, one), on_damaged)
    if step not in checkpoints.saved_steps(run):
        listed = ", ".join(map(str, checkpoints.saved_steps(run))) or "none"
        raise ValueError(f"step: got {step}; {run} has checkpoints of {listed}")
    return _load(run, step)


def _load(run: Path, step: int) -> SavedRun:
    facts = checkpoints.read_facts(run, step)
    try:
        config = config_of(facts["config"])
        names, shape = tuple(facts["class_names"]), tuple(facts["image_shape"])
        height, width, channels = shape
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise checkpoints.CheckpointError(f"step {step}: its configuration: {error}") from error
    source = ImageShape((height, width, channels), names)
    model = building.network_of(config.model, len(names))
    optimizer = config.optimizer.build().build(config.schedule.build(), 1)
    like = jax.eval_shape(
        lambda key: initial_state(model, source, optimizer, batch_size=config.train.batch, key=key),
        jax.random.key(0),
    )
    state = checkpoints.restore(run, step, like).state
    return SavedRun(config, step, model, state, names, source.image_shape, facts)
