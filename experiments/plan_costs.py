"""Predicted memory of plans against XLA's peaks.

    python -m experiments.plan_costs                              # everything
    python -m experiments.plan_costs --target h200 --only vgg16/1024 resnet50/512/column

Training steps in bfloat16 (on CPU float32), batch 1 (ResNet-50: 4), gradients with respect to the
parameters. A plan is written ``network/size/segments``, the segments joined by ``+``: ``stream-32+column`` is a first
half in 32 blocks of rows and a second half by whole maps. The network is cut where the maps are
narrowest.

Compiled programs are not compiled again: XLA's peaks are kept, per version of jax, in
``results/plan_costs.json``; predictions are made anew and go with them into ``.md``.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: no device is wanted

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments import vgg16_stack
from lrjax import models
from lrjax.inline import evaluate
from lrjax.planner.choice import Choice
from lrjax.segments import Segment, split
from lrjax.tracing import trace
from lrjax.transform import segment_function


@dataclasses.dataclass(frozen=True)
class Network:
    """A training step's loss, and its arguments: what moves, images, and what does not move."""

    loss: Callable[..., Any]
    arguments: Callable[[int], tuple[Any, ...]]
    in_axes: tuple[int | None, ...]


def _flax(model: nn.Module, batch: int) -> Network:
    """A model in training mode; new batch statistics are among the outputs."""

    def loss(params: Any, images: jax.Array, others: Any) -> Any:
        outputs, updated = model.apply(
            {"params": params, **others}, images, train=True, mutable=["batch_stats"]
        )
        return jnp.mean(jnp.square(outputs.astype(jnp.float32))), updated

    def arguments(size: int) -> tuple[Any, ...]:
        small = jax.ShapeDtypeStruct((1, 64, 64, 3), model.dtype)
        variables = dict(jax.eval_shape(model.init, jax.random.key(0), small))
        images = jax.ShapeDtypeStruct((batch, size, size, 3), model.dtype)
        return variables.pop("params"), images, variables

    return Network(loss, arguments, (None, 1, None))


def _vgg16(dtype: Any) -> Network:
    def loss(params: Any, images: jax.Array) -> Any:
        return vgg16_stack.loss(params, images), ()

    return Network(loss, lambda size: vgg16_stack.structs(size, size, dtype), (None, 1))


@functools.cache
def network(name: str, target: str) -> Network:
    """A network in the dtype that is usual on the target."""
    dtype = jnp.float32 if target == "cpu" else jnp.bfloat16
    if name == "vgg16":
        return _vgg16(dtype)
    if name == "resnet50":
        return _flax(models.ResNet50(dtype=dtype), 4)
    if name == "unet":
        return _flax(models.UNet(norm="frozen", dtype=dtype), 1)
    return _flax(models.ConvNeXtT(dtype=dtype), 1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A network at a size, and the choice for each of its segments."""

    network: str
    size: int
    choices: tuple[Choice, ...]
    target: str

    @property
    def step(self) -> Network:
        return network(self.network, self.target)

    def __str__(self) -> str:
        return f"{self.network}/{self.size}/{'+'.join(map(_name, self.choices))}"

    def segments(self) -> list[Segment]:
        step = self.step
        traced = trace(step.loss, step.in_axes, step.arguments(self.size), {})
        count = len(self.choices)
        return split(traced.program, traced.axes, count if count > 1 else ())

    def gradient(self) -> Callable[..., Any]:
        """The training step, run as planned."""

        def planned(*args: Any) -> Any:
            traced = trace(self.step.loss, self.step.in_axes, args, {})
            values = dict(zip(traced.program.inputs, traced.inputs, strict=True))
            values.update(traced.program.constants)
            for segment, choice in zip(self.segments(), self.choices, strict=True):
                call = _function(segment, choice)
                outputs = call(*(jnp.asarray(values[v]) for v in segment.program.inputs))
                values.update(zip(segment.made, outputs, strict=True))
            outputs = [values[v] for v in traced.program.outputs]
            return jax.tree.unflatten(traced.out_tree, outputs)

        return jax.grad(planned, has_aux=True)


def _function(segment: Segment, choice: Choice) -> Callable[..., Sequence[Any]]:
    if choice.strategy == "checkpoint":
        return jax.checkpoint(lambda *inputs: evaluate(segment.program, inputs))
    return segment_function(segment, choice.strategy, choice.num_blocks)


def _name(choice: Choice) -> str:
    is_whole = choice.strategy in ("column", "checkpoint")
    return choice.strategy if is_whole else f"{choice.strategy}-{choice.num_blocks}"


def parse(text: str, target: str) -> Plan:
    """A plan for a target from its name."""
    name, size, choices = text.split("/")
    parts = (part.partition("-") for part in choices.split("+"))
    return Plan(name, int(size), tuple(Choice(name, int(n or 1)) for name, _, n in parts), target)


def wrt_of(plan: Plan, segment: Segment) -> list[int]:
    """Inputs of a segment that are differentiated: those that depend on the parameters."""
    args = plan.step.arguments(plan.size)
    moving = len(jax.tree.leaves(args[0]))
    count = len(jax.tree.leaves(args))
    still = range(moving, count)  # images, statistics
    avals = segment.program.avals
    return [
        i
        for i, v in enumerate(segment.program.inputs)
        if v not in still and jnp.issubdtype(avals[v].dtype, jnp.inexact)
    ]
