"""One training step, compiled: gradient, update, and whether either went wrong."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from lrjax.app.data import ImageSource
from lrjax.app.losses import LossFunction, loss_structs
from lrjax.app.placement import ONE_DEVICE, Placement
from lrjax.app.strategy import Execution
from lrjax.memory import peak_bytes, temp_bytes


class State(NamedTuple):
    """What a training step changes.

    Attributes:
      params: the parameters, float32.
      statistics: the model's other collections, such as `batch_stats`; empty where it has none.
      optimizer_state: optax's.
    """

    params: Any
    statistics: Any
    optimizer_state: Any


class Outcome(NamedTuple):
    """What a training step tells of itself, all scalars.

    Attributes:
      loss: before the update.
      gradient_norm: of all parameters' gradients together.
      is_finite: the loss and every gradient are; where not, the step has changed nothing.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    is_finite: jax.Array


@dataclass(frozen=True)
class CompiledStep:
    """One training step compiled for its arguments, and the state it starts from.

    Attributes:
      call: `call(state, images, labels, dropout_key)` gives the next state and an `Outcome`; the
        state is used up.
      state: to start from.
      dropout_key: of step 0; step `n` uses `jax.random.fold_in(dropout_key, n)`.
      compile_seconds: wall time of tracing and compiling.
      xla_temp: bytes of temporaries, as XLA plans them.
      xla_peak: bytes that XLA plans to hold at most, with arguments and outputs.
      model, execution: what was compiled.
      step: the function, not compiled, and `structs`, its arguments' shapes.
      placement: the devices that its arguments and results are on.
    """

    call: Callable[..., tuple[State, Outcome]] = field(repr=False)
    state: State = field(repr=False)
    dropout_key: jax.Array
    compile_seconds: float
    xla_temp: int
    xla_peak: int
    model: nn.Module = field(repr=False)
    execution: Execution = field(repr=False)
    step: Callable[..., tuple[State, Outcome]] = field(repr=False)
    structs: tuple[Any, ...] = field(repr=False)
    placement: Placement = ONE_DEVICE

    @property
    def labels_pixels(self) -> bool:
        """Every pixel has a label, not every image."""
        return self.structs[2].ndim > 1


def check_step(
    model: nn.Module, source: ImageSource, strategy: Execution, *, batch_size: int
) -> None:
    """Traces the forward pass of a training step, so that what does not fit is known early.

    Raises:
      ValueError: where the model does not take the images, or lrjax not the strategy.
    """
    images, _ = batch_structs(source, batch_size)
    pixels = bool(source.label_shape)
    loss = strategy.loss(model, labels_pixels=pixels)
    jax.eval_shape(loss, *loss_structs(model, images, labels_pixels=pixels))


def initial_state(
    model: nn.Module,
    source: ImageSource,
    optimizer: optax.GradientTransformation,
    *,
    batch_size: int,
    key: jax.Array,
) -> State:
    """Parameters, statistics and optimizer state from a random key."""
    images, _ = batch_structs(source, batch_size)
    # Traced, not run: a convolution stack's parameters need no forward pass over a large image.
    statistics = dict(
        jax.jit(lambda key: model.init(key, jnp.zeros(images.shape, images.dtype)))(key)
    )
    params = statistics.pop("params")
    return State(params, statistics, jax.jit(optimizer.init)(params))


def keys_of(seed: int) -> tuple[jax.Array, jax.Array]:
    """The random keys of a run: for its parameters and for dropout."""
    init_key, dropout_key = jax.random.split(jax.random.key(seed))
    return init_key, dropout_key


def compile_step(
    model: nn.Module,
    source: ImageSource,
    optimizer: optax.GradientTransformation,
    strategy: Execution,
    *,
    batch_size: int,
    seed: int,
    state: State | None = None,
    placement: Placement = ONE_DEVICE,
) -> CompiledStep:
    """Initialises the parameters from `seed` and compiles a training step; trains nothing.

    Args:
      model: takes `[B, H, W, 3]`.
      source: of the images; only shapes are read.
      optimizer: optax's.
      strategy: how the rows run.
      batch_size: images per step.
      seed: of the parameters, and of dropout.
      state: to start from, in place of parameters from the seed.
      placement: the devices; the strategy's mesh is the same one.

    Raises:
      ValueError: where the model does not take the images, or lrjax not the strategy.
    """
    init_key, dropout_key = keys_of(seed)
    if state is None:
        state = initial_state(model, source, optimizer, batch_size=batch_size, key=init_key)
    images, labels = batch_structs(source, batch_size)
    step = _step(strategy.loss(model, labels_pixels=bool(source.label_shape)), optimizer)
    structs = jax.tree.map(_struct, (state, images, labels, dropout_key))

    start = time.perf_counter()
    jitted = jax.jit(step, donate_argnums=0, **_shardings(placement, images, labels))
    compiled = jitted.lower(*structs).compile()
    return CompiledStep(
        call=compiled,
        state=placement.everywhere(state),
        dropout_key=dropout_key,
        compile_seconds=time.perf_counter() - start,
        xla_temp=temp_bytes(compiled),
        xla_peak=peak_bytes(compiled),
        model=model,
        execution=strategy,
        step=step,
        structs=structs,
        placement=placement,
    )


def _shardings(placement: Placement, images: Any, labels: Any) -> dict[str, Any]:
    """How `jax.jit` of a step divides its arguments and results."""
    everywhere = placement.replicated
    if everywhere is None:
        return {}
    batch = placement.of_batch(images.shape), placement.of_batch(labels.shape)
    return {"in_shardings": (everywhere, *batch, everywhere), "out_shardings": everywhere}


def batch_structs(
    source: ImageSource, batch_size: int
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Images and labels of a batch."""
    return (
        jax.ShapeDtypeStruct((batch_size, *source.image_shape), jnp.uint8),
        jax.ShapeDtypeStruct((batch_size, *source.label_shape), jnp.int32),
    )


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _step(
    loss: LossFunction, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[State, Outcome]]:
    """Gradient and update; a step whose loss or gradient is not finite changes nothing."""
    update = optax.with_extra_args_support(optimizer).update

    def step(
        state: State, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> tuple[State, Outcome]:
        def of_params(params: Any) -> Any:
            return loss(params, images, labels, state.statistics, key)

        (value, updated), grads = jax.value_and_grad(of_params, has_aux=True)(state.params)
        # Flax starts running statistics in float32 and gives them back in the computation's type.
        statistics = jax.tree.map(lambda new, old: new.astype(old.dtype), updated, state.statistics)
        # Optimisers with a line search, or that read the loss, take these; others ignore them.
        updates, optimizer_state = update(
            grads,
            state.optimizer_state,
            state.params,
            value=value,
            grad=grads,
            value_fn=lambda params: of_params(params)[0],
        )
        params = optax.apply_updates(state.params, updates)
        leaves = jax.tree.leaves(grads)
        norm = jnp.sqrt(sum((jnp.vdot(g, g) for g in leaves), jnp.zeros(())))
        finite = [jnp.isfinite(value)] + [jnp.isfinite(g).all() for g in leaves]
        is_finite = jnp.stack(finite).all()
        new = State(params, statistics, optimizer_state)
        kept = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), new, state)
        return kept, Outcome(value, norm, is_finite)

    return step
