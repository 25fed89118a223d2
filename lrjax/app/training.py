"""The training loop: batches through a compiled step, and what it measures on the way.

The model, the optimizer and the data are the same ones an ordinary Flax loop would use; the
strategy alone is lrjax's.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from lrjax.app.data import Augmentation, ImageSource, batches
from lrjax.app.losses import classification_loss, loss_in_axes, loss_structs
from lrjax.app.measuring import Memory, device_peak, measured_rss
from lrjax.app.step import CompiledStep, State, check_step, compile_step
from lrjax.app.strategy import Strategy, parse_num_blocks

__all__ = [
    "DivergedError",
    "Memory",
    "Progress",
    "Start",
    "Strategy",
    "Training",
    "check_step",
    "classification_loss",
    "compile_step",
    "loss_in_axes",
    "loss_structs",
    "measured_rss",
    "parse_num_blocks",
    "train",
]


@dataclass(frozen=True)
class Training:
    """What a training run gave.

    Attributes:
      params: the trained parameters.
      statistics: the model's other collections, such as `batch_stats`; empty where it has none.
      losses: of each step, before its update.
      step_seconds: wall time of each step, loss on the host.
      compile_seconds: wall time of tracing and compiling the step.
      memory: the peaks.
    """

    params: Any = field(repr=False)
    statistics: Any = field(repr=False)
    losses: tuple[float, ...]
    step_seconds: tuple[float, ...]
    compile_seconds: float
    memory: Memory

    @property
    def seconds_per_step(self) -> float:
        """Median step time; the first step, which also faults memory in, is left out."""
        return statistics.median(self.step_seconds[1:] or self.step_seconds or (0.0,))


class DivergedError(ArithmeticError):
    """The loss, or a gradient, is no longer finite.

    Attributes:
      step: the step's number, from 1; it has changed nothing.
      loss: its loss.
      batch: what it was given, as `lrjax.app.data.batches` gives it.
      state: the state that it started from.
    """

    def __init__(self, step: int, loss: float, batch: Mapping[str, np.ndarray], state: State):
        wrong = f"loss is {loss}" if not np.isfinite(loss) else "a gradient is not finite"
        super().__init__(f"{wrong} at step {step}; use a smaller learning rate")
        self.step, self.loss, self.batch, self.state = step, loss, batch, state


@dataclass(frozen=True)
class Start:
    """Where training begins, if not at the beginning.

    Attributes:
      step: steps that are done.
      state: after them.
      position: of the data, `Progress.position` of then.
    """

    step: int
    state: State = field(repr=False)
    position: Any


@dataclass(frozen=True)
class Progress:
    """A step that was done.

    Attributes:
      step: its number, from 1.
      loss, gradient_norm: before its update.
      seconds: wall time of the step.
      state: after it; used up by the next step, so copy what is kept.
      position: of the data after it, a value that JSON can hold.
    """

    step: int
    loss: float
    gradient_norm: float
    seconds: float
    state: State = field(repr=False)
    position: Any


def train(
    compiled: CompiledStep,
    source: ImageSource,
    *,
    batch_size: int,
    steps: int,
    seed: int,
    balanced: bool = False,
    augmentation: Augmentation | None = None,
    start: Start | None = None,
    on_step: Callable[[int, float, float], None] = lambda step, loss, seconds: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Training:
    """Trains until `steps` steps are done, on shuffled batches of `source`.

    Args:
      compiled: from `compile_step` with the same source and batch size; its state is used up.
      source: the images.
      batch_size: images per step.
      steps: how many, at least one, those before `start` among them.
      seed: of the order of the images, and of their augmentation.
      balanced: the classes take turns; see `lrjax.app.data.batches`.
      augmentation: alters the images; see `lrjax.app.data.batches`.
      start: goes on from there, with the same numbers as if it had not been interrupted.
      on_step: called after each step with its number (from 1), loss and seconds.
      on_progress: called after each step with all there is to know of it.

    Returns:
      The parameters, and the losses and times of the steps that this call made.

    Raises:
      ValueError: for no steps, or fewer than are done.
      DivergedError: when a loss or a gradient is not finite.
    """
    done = start.step if start else 0
    if steps < 1:
        raise ValueError(f"steps: got {steps}; use 1 or more")
    if steps < done:
        raise ValueError(f"steps: got {steps}, and {done} are done; use more than that")
    placement = compiled.placement
    state = placement.everywhere(start.state) if start else compiled.state
    losses: list[float] = []
    seconds: list[float] = []
    data = batches(
        source,
        batch_size,
        seed=seed,
        balanced=balanced,
        augmentation=augmentation,
        share=placement.share(batch_size, source.image_shape),
    )
    if start is not None:
        data.set_state(start.position)
    with measured_rss() as rss:
        for number in range(done + 1, steps + 1):
            batch = next(data)
            key = placement.everywhere(jax.random.fold_in(compiled.dropout_key, number))
            begin = time.perf_counter()
            images, labels = placement.batch(batch, batch_size, source.image_shape)
            state, outcome = compiled.call(state, images, labels, key)
            losses.append(float(outcome.loss))
            seconds.append(time.perf_counter() - begin)
            if not outcome.is_finite:
                raise DivergedError(number, losses[-1], batch, state)
            on_step(number, losses[-1], seconds[-1])
            norm = float(outcome.gradient_norm)
            on_progress(Progress(number, losses[-1], norm, seconds[-1], state, data.get_state()))
    return Training(
        params=state.params,
        statistics=state.statistics,
        losses=tuple(losses),
        step_seconds=tuple(seconds),
        compile_seconds=compiled.compile_seconds,
        memory=Memory(
            xla_temp=compiled.xla_temp,
            xla_peak=compiled.xla_peak,
            rss=rss.peak - rss.baseline,
            device=device_peak(),
        ),
    )
