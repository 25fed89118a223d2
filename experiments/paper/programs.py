"""VGG-16's and ResNet-50's training steps by every method that LR-CNN's evaluation compares.

A program is a network's loss and gradient on a batch of square images: cross-entropy of 1000
classes, global average pooling before the dense layer (so that any size of image will do), float32
as in the paper unless stated. ResNet-50 has frozen BatchNorm: what it computes is local in rows, as
the paper's ResNet-50 is with its statistics per row block; ``resnet50-batch`` has BatchNorm as
published, whose statistics need all rows.

Programs are compiled for a device that need not be there; peaks are XLA's, times a roofline's.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import lrjax
from lrjax import memory, models
from lrjax.memory.targets import GpuTarget, find

MIB = 2**20
IN_AXES = (None, 1, None, None)
RESNET_CUTS = ("stem", "stage1_block3", "stage2_block4", "stage3_block6")


@dataclasses.dataclass(frozen=True)
class Network:
    """A network, and the names of the maps that hybrids and checkpoints keep."""

    make: Callable[..., nn.Module]
    cuts: tuple[str, ...]


NETWORKS = {
    "vgg16": Network(
        functools.partial(models.VGG16, head="gap"), tuple(f"pool{i}" for i in range(1, 5))
    ),
    "resnet50": Network(functools.partial(models.ResNet50, norm="frozen"), RESNET_CUTS),
    "resnet50-batch": Network(models.ResNet50, RESNET_CUTS),
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to run a training step.

    Attributes:
      label: the paper's name, or ours.
      strategy: of ``lrjax.rowwise``; None: plain JAX.
      has_cuts: a segment between every two of the network's cuts (the paper's -H).
      offload: the maps between segments wait in the host's memory.
      rows: of the image that a block takes where nothing else is said; None: whole maps.
    """

    label: str
    strategy: str | None = None
    has_cuts: bool = False
    offload: bool = False
    rows: int | None = None


METHODS = {
    "column": Method("Base"),
    "checkpoint": Method("Ckp", "checkpoint", has_cuts=True),
    "offload": Method("OffLoad", "checkpoint", has_cuts=True, offload=True),
    "2ps": Method("2PS", "2ps", rows=128),
    "overl": Method("OverL", "overl", rows=128),
    "2ps-h": Method("2PS-H", "2ps", has_cuts=True, rows=128),
    "overl-h": Method("OverL-H", "overl", has_cuts=True, rows=128),
    "stream": Method("stream", "stream", rows=64),
}
TOTAL_STRIDE = 32


@dataclasses.dataclass(frozen=True)
class Program:
    """A training step: network, method, batch, side of the square images.

    Attributes:
      num_blocks: row blocks; None: the method's usual number of rows in each.
      width: multiplier of the network's channels.
      dtype: of images and computation; parameters are float32.
    """

    network: str
    method: str
    batch: int
    side: int
    num_blocks: int | None = None
    width: float = 1.0
    dtype: str = "float32"

    def __str__(self) -> str:
        blocks = "" if self.blocks is None else f"/{self.blocks}"
        return f"{self.network}/{self.batch}x{self.side}/{self.method}{blocks}"

    @property
    def blocks(self) -> int | None:
        """Row blocks; never more than the last map has rows."""
        rows = METHODS[self.method].rows
        if rows is None:
            return None
        most = max(1, self.side // TOTAL_STRIDE)
        return min(self.num_blocks or max(1, self.side // rows), most)

    @property
    def module(self) -> nn.Module:
        dtype = jnp.dtype(self.dtype)
        return NETWORKS[self.network].make(num_classes=1000, width=self.width, dtype=dtype)

    def loss(self) -> Callable[..., Any]:
        """``loss(params, images, labels, statistics)``: the mean cross-entropy, new statistics."""
        return by_method(loss_of(self.module), self.method, self.network, self.blocks)

    def arguments(self) -> tuple[Any, ...]:
        """Shapes and dtypes of the loss's arguments."""
        shape = (self.batch, self.side, self.side, 3)
        return arguments_of(self.module, jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype)))


def loss_of(module: nn.Module) -> Callable[..., Any]:
    """``loss(params, images, labels, statistics)`` of a network: cross-entropy, new statistics."""

    def loss(params: Any, images: jax.Array, labels: jax.Array, statistics: Any) -> Any:
        logits, updated = module.apply(
            {"params": params, **statistics}, images, train=True, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updated

    return loss


def arguments_of(module: nn.Module, images: jax.ShapeDtypeStruct) -> tuple[Any, ...]:
    """Shapes of parameters, images, labels and statistics."""
    small = jax.ShapeDtypeStruct((1, 64, 64, 3), images.dtype)
    variables = dict(jax.eval_shape(module.init, jax.random.key(0), small))
    params = variables.pop("params")
    return params, images, jax.ShapeDtypeStruct(images.shape[:1], jnp.int32), variables


def by_method(
    loss: Callable[..., Any],
    method: str,
    network: str,
    num_blocks: int | None,
    cuts: tuple[str, ...] | None = None,
) -> Callable[..., Any]:
    """A loss run by a method; its cuts are the network's unless others are given.

    Raises:
      ValueError: there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}; use one of {', '.join(METHODS)}")
    way = METHODS[method]
    if way.strategy is None:
        return loss
    if cuts is None:
        cuts = NETWORKS[network].cuts
    return lrjax.rowwise(
        loss,
        in_axes=IN_AXES,
        strategy=way.strategy,
        num_blocks=num_blocks,
        cuts=cuts if way.has_cuts else (),
        offload=way.offload,
    )


# For a program that runs once on this CPU: without LLVM's optimisations it compiles in a fraction
# of the time.
_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
if jax.__version_info__ < (0, 11):
    _QUICK |= {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}


def quick_jit(fun: Callable[..., Any]) -> Callable[..., Any]:
    """``jax.jit`` for what runs once on a CPU: compiled quickly, not to be timed."""
    return jax.jit(fun, compiler_options=_QUICK if jax.default_backend() == "cpu" else None)


def measured(fun: Callable[..., Any], args: tuple[Any, ...], target: str) -> dict[str, Any]:
    """What compiling a function for a target tells.

    Returns:
      ``peak_bytes`` and ``host_bytes`` by XLA, and for a GPU ``seconds`` and ``launches`` by the
      roofline of the compiled program.
    """
    compiled = memory.compile_for(fun, *args, target=target)
    found: dict[str, Any] = {
        "peak_bytes": memory.peak_bytes(compiled),
        "host_bytes": memory.host_bytes(compiled),
    }
    if isinstance(find(target), GpuTarget):
        time = lrjax.roofline.roofline_of(compiled.as_text(), lrjax.roofline.rates_of(target))
        found |= {"seconds": time.seconds, "launches": time.launches}
    return found


def measured_program(program: Program, target: str) -> dict[str, Any]:
    """Peak and time of a program's loss and gradient."""
    step = jax.value_and_grad(program.loss(), has_aux=True)
    return {"blocks": program.blocks, **measured(step, program.arguments(), target)}
