"""Why training stopped: where numbers ceased to be finite, and what filled the memory."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lrjax import memory
from lrjax.app.config import Config
from lrjax.app.data import ImageSource
from lrjax.app.data.sources import name_of
from lrjax.app.losses import LossFunction, classification_loss, loss_in_axes
from lrjax.app.step import CompiledStep
from lrjax.app.strategy import Strategy
from lrjax.app.training import DivergedError
from lrjax.text import MIB, shortened

_MOST_NAMED = 8
_TOP = 6


class OutOfMemoryError(MemoryError):
    """The device has no room for the training step."""


def of_divergence(error: DivergedError, compiled: CompiledStep, source: ImageSource) -> str:
    """Where a step's numbers ceased to be finite: step, images, and layer, gradient or parameter.

    The forward pass is run again on the step's batch, under the run's strategy, with every layer's
    output counted; where all are finite, the gradient.
    """
    names = [name_of(source, int(index)) for index in error.batch["index"]]
    listed = ", ".join(names[:_MOST_NAMED]) + (" ..." if len(names) > _MOST_NAMED else "")
    try:
        where = _where(error, compiled)
    except Exception as failure:  # a diagnosis that fails must not hide what it was about
        where = f"the layer could not be found ({type(failure).__name__})"
    return f"{error}\n  images: {listed}\n  {where}"


def _where(error: DivergedError, compiled: CompiledStep) -> str:
    bad = _not_finite(error.state.params)
    if bad:
        return f"parameters that are not finite before the step: {_listed(bad)}"
    key = jax.random.fold_in(compiled.dropout_key, error.step)
    images, labels = error.batch["image"], error.batch["label"]
    args = (error.state.params, images, labels, error.state.statistics, key)
    layers = counts_by_layer(compiled)(*args)
    for name, count in layers.items():
        if count:
            return f"first layer whose output is not finite: {name} ({count} values)"
    loss = compiled.execution.loss(compiled.model, labels_pixels=compiled.labels_pixels)
    if not np.isfinite(error.loss):
        return "every layer's output is finite, the loss of them is not"
    gradients = jax.jit(jax.grad(loss, has_aux=True))(*args)[0]
    return (
        "the forward pass is finite; gradients that are not: "
        f"{_listed(_not_finite(gradients)) or 'none, when computed again'}"
    )


def counts_by_layer(compiled: CompiledStep) -> Callable[..., dict[str, int]]:
    """A function of the loss's arguments: values that are not finite in each layer's output.

    Layers come in the order in which they end. By rows no map exists whole; where the strategy
    cannot run the counting, it is ordinary execution's.
    """
    execution = compiled.execution.without_plan
    model, pixels = compiled.model, compiled.labels_pixels

    def call(*args: Any) -> dict[str, int]:
        for strategy in (_without_cuts(execution), Strategy("column")):
            names: list[str] = []
            counting = _counting(classification_loss(model), names)
            by_rows = strategy.by_rows(counting, in_axes=loss_in_axes(labels_pixels=pixels))
            with contextlib.suppress(ValueError, NotImplementedError):
                counts = jax.jit(by_rows)(*args)
                return dict(zip(names, map(int, counts), strict=True))
        raise ValueError("the forward pass cannot be run again")

    return call


def _without_cuts(strategy: Strategy) -> Strategy:
    """What needs no backward pass needs no cuts; images are not taken apart for one count."""
    blocks = strategy.num_blocks
    return Strategy(strategy.name, max(blocks) if isinstance(blocks, tuple) else blocks)


def _counting(loss: LossFunction, names: list[str]) -> Callable[..., list[jax.Array]]:
    """The loss's forward pass, giving counts of what is not finite; fills in the layers' names."""

    def forward(*args: Any) -> list[jax.Array]:
        names.clear()
        counts: list[jax.Array] = []

        def count(
            call: Callable[..., Any],
            args: tuple[Any, ...],
            kwargs: Mapping[str, Any],
            context: nn.module.InterceptorContext,
        ) -> Any:
            output = call(*args, **kwargs)
            if context.method_name == "__call__":
                leaves = [leaf for leaf in jax.tree.leaves(output) if _is_float(leaf)]
                names.append("/".join(context.module.path) or type(context.module).__name__)
                counts.append(sum((_count(leaf) for leaf in leaves), jnp.zeros((), jnp.int32)))
            return output

        with nn.intercept_methods(count):
            loss(*args)
        return counts

    return forward


def _is_float(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _count(leaf: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(jnp.isfinite(leaf), 0, 1).astype(jnp.int32))


def _not_finite(tree: Any) -> list[str]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in leaves
        if not bool(jnp.isfinite(leaf).all())
    ]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def is_out_of_memory(error: BaseException) -> bool:
    """XLA's way of saying so; also what the compiler for a TPU says."""
    said = str(error)
    return isinstance(error, memory.DoesNotFitError | jax.errors.JaxRuntimeError) and any(
        text in said for text in ("RESOURCE_EXHAUSTED", "Ran out of memory", "Out of memory")
    )


def of_memory(
    error: BaseException,
    config: Config,
    image_shape: tuple[int, int, int],
    compiled: CompiledStep | None,
) -> str:
    """What the step needs, what holds it, and which commands find a plan that fits."""
    capacity = memory.device_memory_bytes(None)
    lines = [f"out of memory: {str(error).splitlines()[0][:300]}"]
    if compiled is not None:
        lines.append(f"  the step needs {compiled.xla_peak / MIB:,.0f} MiB, by XLA's plan")
        lines += _largest_buffers(compiled)
    if capacity is not None:
        lines.append(f"  the device has {capacity / MIB:,.0f} MiB")
    lines.append(f"  what fits: {plan_command(config, image_shape)}")
    lines.append("  to train so: add --budget, such as --budget 0.9, and leave the strategy out")
    return "\n".join(lines)


def _largest_buffers(compiled: CompiledStep) -> list[str]:
    try:
        profile = memory.profile(compiled.step, *compiled.structs, donate_argnums=0)
    except Exception as failure:
        return [f"  what holds it could not be found ({type(failure).__name__})"]
    rows = [
        f"    {b.bytes / MIB:,.0f} MiB  {b.shape}  {shortened(b.layer, 60)}  ({b.kind})"
        for b in profile.at_peak()[:_TOP]
    ]
    return ["  the largest of it:", *rows]


def plan_command(config: Config, image_shape: tuple[int, int, int]) -> str:
    """The `lrjax plan` line for a run's network and images."""
    model = config.model
    options = [
        f"--model {model.name}",
        f"--image {image_shape[0]}x{image_shape[1]}",
        f"--batch {config.train.batch}",
        f"--dtype {model.dtype}",
        f"--width {model.width}",
    ]
    options += [
        f"--{name} {getattr(model, name)}" for name in ("head", "norm") if getattr(model, name)
    ]
    return " ".join(["lrjax plan", *options, "--budget 0.9"])
