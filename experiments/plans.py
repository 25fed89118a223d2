"""Training steps under plans written by hand, what the cost model says of them and what XLA says.

A plan is written ``network/size/segments``, the segments joined by ``+``: ``stream-32+column`` is a
first half in 32 blocks of rows and a second half by whole maps. The network is cut where the maps
are narrowest.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments import vgg16_stack
from lrjax import memory, models
from lrjax.memory.targets import GpuTarget
from lrjax.plan import Choice
from lrjax.planner.cost import peak_bytes, segment_cost
from lrjax.roofline import rates_of, roofline_of
from lrjax.rowgraph.graph import size_bytes
from lrjax.rowgraph.segments import Cuttable, Segment, split
from lrjax.rowgraph.tracing import trace


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


def _vgg16(dtype: Any, batch: int) -> Network:
    def loss(params: Any, images: jax.Array) -> Any:
        return vgg16_stack.loss(params, images), ()

    def arguments(size: int) -> tuple[Any, ...]:
        return vgg16_stack.structs(size, size, dtype, batch)

    return Network(loss, arguments, (None, 1))


# Batch statistics of one image would be no batch's.
NETWORKS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "resnet50": (models.ResNet50, 4),
    "resnet50-frozen": (functools.partial(models.ResNet50, norm="frozen"), 1),
    "unet": (functools.partial(models.UNet, norm="frozen"), 1),
    "convnext": (models.ConvNeXtT, 1),
    "resnet18": (models.ResNet18, 4),
    "unet-group": (functools.partial(models.UNet, norm="group"), 1),
    "densenet": (functools.partial(models.DenseNet121, norm="frozen"), 1),
    "mobilenet": (functools.partial(models.MobileNetV2, norm="frozen", dropout_rate=0.0), 1),
    "efficientnet": (
        functools.partial(models.EfficientNetB0, dropout_rate=0.0, drop_path_rate=0.0),
        4,
    ),
}


@functools.cache
def network(name: str, target: str) -> Network:
    """A network in the dtype that is usual on the target; ``"unet x2"`` takes two images.

    Raises:
      ValueError: there is no such network.
    """
    dtype = jnp.float32 if target == "cpu" else jnp.bfloat16
    name, _, batch = name.partition(" x")
    if name == "vgg16":
        return _vgg16(dtype, int(batch or 1))
    if name not in NETWORKS:
        raise ValueError(f"network: got {name!r}; use 'vgg16' or one of {list(NETWORKS)}")
    make, usual = NETWORKS[name]
    return _flax(make(dtype=dtype), int(batch or usual))


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

    def as_compiled(self) -> list[tuple[Segment, Choice]]:
        """Segments as XLA has them: neighbours between which it knows no border are one.

        Nothing keeps whole maps of one segment from those of the next; and XLA:CPU removes the
        barriers by which a checkpoint's forward pass is done again.
        """
        is_column = [
            (self.target == "cpu" and c == Choice("checkpoint")) or c == Choice("column")
            for c in self.choices
        ]
        traced = trace(self.step.loss, self.step.in_axes, self.step.arguments(self.size), {})
        whole = Cuttable.of(traced.program, traced.axes)
        place = {e.outputs[0]: i for i, e in enumerate(whole.operations)}
        joined: list[tuple[Segment, Choice]] = []
        start = previous = 0
        for k, (segment, choice) in enumerate(zip(self.segments(), self.choices, strict=True)):
            stop = 1 + max(place.get(e.outputs[0], -1) for e in segment.program.equations)
            if k and is_column[k] and is_column[k - 1]:
                joined[-1] = whole.between(start, stop), Choice("column")
            else:
                joined.append((segment, choice))
                start = previous
            previous = stop
        return joined

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

        return jax.value_and_grad(planned, has_aux=True)


def _function(segment: Segment, choice: Choice) -> Callable[..., Sequence[Any]]:
    return choice.strategy.function(segment, choice.num_blocks)


def _name(choice: Choice) -> str:
    name = choice.strategy.name
    return f"{name}-{choice.num_blocks}" if choice.strategy.by_rows else name


def parse(text: str, target: str) -> Plan:
    """A plan for a target from its name."""
    name, size, choices = text.split("/")
    parts = (part.partition("-") for part in choices.split("+"))
    return Plan(name, int(size), tuple(Choice(name, int(n or 1)) for name, _, n in parts), target)


def wrt_of(plan: Plan, segment: Segment) -> list[int]:
    """Inputs of a segment that are differentiated: all but images and statistics."""
    args = plan.step.arguments(plan.size)
    still = range(len(jax.tree.leaves(args[0])), len(jax.tree.leaves(args)))
    avals = segment.program.avals
    return [
        i
        for i, v in enumerate(segment.program.inputs)
        if v not in still and jnp.issubdtype(avals[v].dtype, jnp.inexact)
    ]


def predicted(plan: Plan) -> tuple[float, float]:
    """The peak, and seconds, by the cost model."""
    args = plan.step.arguments(plan.size)
    fixed = sum(size_bytes(leaf) for leaf in jax.tree.leaves((args, args[0])))
    costs = [segment_cost(s, c, wrt_of(plan, s), plan.target) for s, c in plan.as_compiled()]
    return peak_bytes(costs, fixed), sum(cost.seconds for cost in costs)


def compiled(plan: Plan) -> tuple[int, float | None]:
    """The peak by XLA; seconds by the compiled program's roofline, for a GPU."""
    args = plan.step.arguments(plan.size)
    found = memory.compile_for(plan.gradient(), *args, target=plan.target)
    seconds = None
    if isinstance(memory.TARGETS[plan.target], GpuTarget):
        seconds = roofline_of(str(found.as_text()), rates_of(plan.target)).seconds
    return memory.peak_bytes(found), seconds
