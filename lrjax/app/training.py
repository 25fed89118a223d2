"""Train a Flax network under one of the strategies, and measure it: losses, time and memory.

The strategy is `lrjax.linen.rowwise` around the model, or `lrjax.rowwise` around the loss where
pixels have labels, and nothing else; the model, the optimizer and the data are the same ones an
ordinary Flax loop would use. `"column"` is that ordinary loop.
"""

import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import psutil

import lrjax
import lrjax.linen
from lrjax.app.data import ImageSource, batches
from lrjax.memory import peak_bytes, temp_bytes
from lrjax.memory.rss import return_freed_memory
from lrjax.strategies import Column, MicroBatches, named, registered

LossFunction = Callable[..., tuple[jax.Array, Any]]


@dataclass(frozen=True)
class Strategy:
    """How the loss is run: the arguments of `lrjax.rowwise` that a training run chooses.

    Attributes:
      name: of a strategy, such as `"stream"`; all that lrjax knows by name.
      num_blocks: steps the rows are admitted in, or one number per segment; default: lrjax chooses.
      cuts: names of the values between segments; for VGG-16 `"pool1"` to `"pool5"`.
      micro_batches: parts of the batch that run one after the other.
    """

    name: str = "stream"
    num_blocks: int | tuple[int, ...] | None = None
    cuts: tuple[str, ...] = ()
    micro_batches: int = 1

    def __post_init__(self) -> None:
        names = [strategy.name for strategy in registered()]
        if self.name not in names:
            raise ValueError(f"strategy: got {self.name!r}; use one of {', '.join(names)}")
        if self.num_blocks is not None and not named(self.name).by_rows:
            raise ValueError(
                f"strategy: {self.name} runs whole maps and takes no num_blocks; leave them out "
                "or choose another strategy"
            )
        if self.is_ordinary and self.cuts:
            raise ValueError(
                f"strategy: {self.name} keeps all maps and takes no cuts; leave them out or choose "
                "another strategy"
            )
        if self.micro_batches < 1:
            raise ValueError(f"micro_batches: got {self.micro_batches}; use 1 or more")
        segments = len(self.cuts) + 1
        if isinstance(self.num_blocks, tuple) and len(self.num_blocks) != segments:
            raise ValueError(
                f"num_blocks: got {len(self.num_blocks)} numbers for {segments} segments "
                f"(cuts={list(self.cuts)}); give one number, or one per segment"
            )

    @classmethod
    def parse(cls, spec: str) -> "Strategy":
        """Reads `name[:blocks[,...]][/parts][@cut[,...]]`, such as `stream:16` or `2ps:8,2@pool2`.

        With `/4` the batch runs in 4 parts, as in `checkpoint/4`.
        """
        head, _, cuts = spec.partition("@")
        head, _, parts = head.partition("/")
        name, _, blocks = head.partition(":")
        if parts and not parts.isdecimal():
            raise ValueError(f"micro_batches: got {parts!r}; use a whole number, as in {name}/4")
        return cls(
            name,
            parse_num_blocks(blocks) if blocks else None,
            tuple(cuts.split(",")) if cuts else (),
            int(parts or 1),
        )

    @property
    def is_ordinary(self) -> bool:
        """Nothing is lrjax's: the network runs as Flax runs it."""
        return named(self.name) == Column() and self.micro_batches == 1

    @property
    def label(self) -> str:
        """The name used in tables and plots; hybrids (with cuts) end in `-H`."""
        parts = f" /{self.micro_batches}" if self.micro_batches > 1 else ""
        return (named(self.name).label or self.name) + ("-H" if self.cuts else "") + parts

    def loss(self, model: nn.Module, *, labels_pixels: bool) -> LossFunction:
        """`classification_loss` of the model under this strategy; under column it is plain Flax.

        Where every pixel has a label the loss is a sum over rows, and runs by rows with the model:
        forward and backward are one pass. Where an image has one, the model alone runs by rows.
        """
        if self.is_ordinary:
            return classification_loss(model)
        rows: dict[str, Any] = {
            "num_blocks": self.num_blocks,
            "strategy": MicroBatches(self.name, self.micro_batches),
            "cuts": self.cuts,
        }
        if labels_pixels:
            axes = loss_in_axes(labels_pixels=True)
            return lrjax.rowwise(classification_loss(model), in_axes=axes, **rows)
        return classification_loss(lrjax.linen.rowwise(model, in_axes=1, **rows))


def parse_num_blocks(text: str) -> int | tuple[int, ...]:
    """Reads `"8"` as 8 and `"8,4"` as one number per segment."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"num_blocks: got {text!r}; use a whole number, or one per segment such as 8,4"
        ) from None
    return numbers if len(numbers) > 1 else numbers[0]


@dataclass(frozen=True)
class Memory:
    """Peak memory of training, in bytes.

    Attributes:
      xla_temp: temporaries of the compiled step.
      xla_peak: what XLA plans to hold at most, parameters and optimizer state included.
      rss: largest resident size of the process while it trained, above that just before: on CPU the
        temporaries as the operating system saw them.
      device: the accelerator's own peak, where it reports one.
    """

    xla_temp: int
    xla_peak: int
    rss: int
    device: int | None


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
        return statistics.median(self.step_seconds[1:] or self.step_seconds)


class DivergedError(ArithmeticError):
    """The loss is no longer finite."""


def classification_loss(model: nn.Module) -> LossFunction:
    """Mean softmax cross-entropy of images or of pixels, as `labels` has one class for either.

    A function `loss(params, images, labels, statistics, dropout_key)` that gives the loss and the
    updated `statistics`: every collection of the model but its parameters.
    """

    def loss(
        params: Any, images: jax.Array, labels: jax.Array, statistics: Any, dropout_key: jax.Array
    ) -> tuple[jax.Array, Any]:
        logits, updated = model.apply(
            {"params": params, **statistics},
            images,
            train=True,
            mutable=list(statistics),
            rngs={"dropout": dropout_key},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updated

    return loss


def loss_in_axes(*, labels_pixels: bool) -> tuple[int | None, ...]:
    """Row axes of the loss's arguments: images carry rows, and so do labels of pixels."""
    return None, 1, 1 if labels_pixels else None, None, None


def loss_structs(
    model: nn.Module, images: jax.ShapeDtypeStruct, *, labels_pixels: bool
) -> tuple[Any, ...]:
    """Shapes of all arguments of the loss, for images ``[B, H, W, C]``; nothing is computed."""
    batch, height, width, _ = images.shape
    shape = (batch, height, width) if labels_pixels else (batch,)
    key = jax.eval_shape(lambda: jax.random.key(0))
    statistics = dict(jax.eval_shape(model.init, key, images))
    params = statistics.pop("params")
    return params, images, jax.ShapeDtypeStruct(shape, jnp.int32), statistics, key


@dataclass(frozen=True)
class CompiledStep:
    """One training step compiled for its arguments, and the state it starts from."""

    call: Callable[..., tuple[Any, Any, Any, jax.Array]] = field(repr=False)
    params: Any = field(repr=False)
    statistics: Any = field(repr=False)
    optimizer_state: Any = field(repr=False)
    dropout_key: jax.Array
    compile_seconds: float
    xla_temp: int
    xla_peak: int


def check_step(
    model: nn.Module, source: ImageSource, strategy: Strategy, *, batch_size: int
) -> None:
    """Traces the forward pass of a training step, so that what does not fit is known early.

    Raises:
      ValueError: where the model does not take the images, or lrjax not the strategy.
    """
    images, _ = _batch_structs(source, batch_size)
    pixels = bool(source.label_shape)
    loss = strategy.loss(model, labels_pixels=pixels)
    jax.eval_shape(loss, *loss_structs(model, images, labels_pixels=pixels))


def compile_step(
    model: nn.Module,
    source: ImageSource,
    optimizer: optax.GradientTransformation,
    strategy: Strategy,
    *,
    batch_size: int,
    seed: int,
) -> CompiledStep:
    """Initialises the parameters from `seed` and compiles a training step; trains nothing.

    Raises:
      ValueError: where the model does not take the images, or lrjax not the strategy.
    """
    init_key, dropout_key = jax.random.split(jax.random.key(seed))
    images, labels = _batch_structs(source, batch_size)
    # Traced, not run: a convolution stack's parameters need no forward pass over a large image.
    statistics = dict(
        jax.jit(lambda key: model.init(key, jnp.zeros(images.shape, images.dtype)))(init_key)
    )
    params = statistics.pop("params")
    optimizer_state = jax.jit(optimizer.init)(params)
    step = _step(strategy.loss(model, labels_pixels=bool(source.label_shape)), optimizer)

    start = time.perf_counter()
    compiled = (
        jax.jit(step, donate_argnums=(0, 1, 2))
        .lower(params, statistics, optimizer_state, images, labels, dropout_key)
        .compile()
    )
    return CompiledStep(
        call=compiled,
        params=params,
        statistics=statistics,
        optimizer_state=optimizer_state,
        dropout_key=dropout_key,
        compile_seconds=time.perf_counter() - start,
        xla_temp=temp_bytes(compiled),
        xla_peak=peak_bytes(compiled),
    )


def _batch_structs(
    source: ImageSource, batch_size: int
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Images and labels of a batch."""
    return (
        jax.ShapeDtypeStruct((batch_size, *source.image_shape), jnp.uint8),
        jax.ShapeDtypeStruct((batch_size, *source.label_shape), jnp.int32),
    )


def _step(
    loss: LossFunction, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[Any, Any, Any, jax.Array]]:
    """Gradient and update: new parameters, statistics and optimizer state, and the loss."""

    def step(
        params: Any,
        statistics: Any,
        state: Any,
        images: jax.Array,
        labels: jax.Array,
        key: jax.Array,
    ) -> tuple[Any, Any, Any, jax.Array]:
        (value, updated), grads = jax.value_and_grad(loss, has_aux=True)(
            params, images, labels, statistics, key
        )
        # Flax starts running statistics in float32 and gives them back in the computation's type.
        statistics = jax.tree.map(lambda new, old: new.astype(old.dtype), updated, statistics)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), statistics, state, value

    return step


def train(
    compiled: CompiledStep,
    source: ImageSource,
    *,
    batch_size: int,
    steps: int,
    seed: int,
    balanced: bool = False,
    on_step: Callable[[int, float, float], None] = lambda step, loss, seconds: None,
) -> Training:
    """Trains for `steps` steps on shuffled batches of `source`.

    Args:
      compiled: from `compile_step` with the same source and batch size; its state is used up.
      source: the images.
      batch_size: images per step.
      steps: how many, at least one.
      seed: of the order of the images.
      balanced: the classes take turns; see `lrjax.app.data.batches`.
      on_step: called after each step with its number (from 1), loss and seconds.

    Raises:
      DivergedError: when a loss is not finite.
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}; use 1 or more")
    params, statistics, state = compiled.params, compiled.statistics, compiled.optimizer_state
    losses: list[float] = []
    seconds: list[float] = []
    stream = batches(source, batch_size, seed=seed, balanced=balanced)
    with measured_rss() as rss:
        for number, batch in zip(range(1, steps + 1), stream, strict=False):
            key = jax.random.fold_in(compiled.dropout_key, number)
            start = time.perf_counter()
            params, statistics, state, value = compiled.call(
                params, statistics, state, batch["image"], batch["label"], key
            )
            losses.append(float(value))
            seconds.append(time.perf_counter() - start)
            if not jnp.isfinite(losses[-1]):
                raise DivergedError(
                    f"loss is {losses[-1]} at step {number}; use a smaller learning rate"
                )
            on_step(number, losses[-1], seconds[-1])
    return Training(
        params=params,
        statistics=statistics,
        losses=tuple(losses),
        step_seconds=tuple(seconds),
        compile_seconds=compiled.compile_seconds,
        memory=Memory(
            xla_temp=compiled.xla_temp,
            xla_peak=compiled.xla_peak,
            rss=rss.peak - rss.baseline,
            device=_device_peak(),
        ),
    )


@dataclass
class ResidentSize:
    """Resident bytes of this process: before, and at most during, a measurement."""

    baseline: int
    peak: int


@contextmanager
def measured_rss() -> Iterator[ResidentSize]:
    """Samples the process's resident size, every two milliseconds, while the body runs.

    Memory that compilation freed is handed back to the operating system first: the allocator would
    otherwise reuse it and the training would seem to need less than it does.
    """
    gc.collect()
    return_freed_memory()
    process = psutil.Process()
    before = process.memory_info().rss
    size = ResidentSize(before, before)
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            size.peak = max(size.peak, process.memory_info().rss)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield size
    finally:
        done.set()
        sampler.join()


def _device_peak() -> int | None:
    statistics_of_device = jax.local_devices()[0].memory_stats()
    return (statistics_of_device or {}).get("peak_bytes_in_use")
