"""How a training run is executed: a strategy of lrjax's, chosen by name, or a plan.

The strategy is `lrjax.linen.rowwise` around the model, or `lrjax.rowwise` around the loss where
pixels have labels, and nothing else. `"column"` is the ordinary Flax loop.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
from jax.sharding import Mesh

import lrjax
import lrjax.linen
from lrjax.app.losses import LossFunction, classification_loss, loss_in_axes
from lrjax.plan import Plan
from lrjax.strategies import Column, MicroBatches, named, registered

ROWS = "rows"  # the mesh axis along which devices share rows


@dataclass(frozen=True)
class Strategy:
    """How the loss is run: the arguments of `lrjax.rowwise` that a training run chooses.

    Attributes:
      name: of a strategy, such as `"stream"`; all that lrjax knows by name.
      num_blocks: steps the rows are admitted in, or one number per segment; default: lrjax chooses.
      cuts: names of the values between segments; for VGG-16 `"pool1"` to `"pool5"`.
      micro_batches: parts of the batch that run one after the other.
      mesh: devices that share the rows of each image; None: one device, the mesh at hand, or XLA
        divides what arrays' shardings say.
      row_mesh_axis: the mesh's axis along which they do.
    """

    name: str = "stream"
    num_blocks: int | tuple[int, ...] | None = None
    cuts: tuple[str, ...] = ()
    micro_batches: int = 1
    mesh: Mesh | None = None
    row_mesh_axis: str | None = None

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
        if labels_pixels:
            axes = loss_in_axes(labels_pixels=True)
            return self.by_rows(classification_loss(model), in_axes=axes)
        return classification_loss(self.model_by_rows(model))

    def by_rows(self, fun: Callable[..., Any], *, in_axes: Any) -> Callable[..., Any]:
        """Any function of arrays under this strategy."""
        if self.is_ordinary:
            return fun
        return lrjax.rowwise(fun, in_axes=in_axes, **self._options)

    def model_by_rows(self, model: nn.Module) -> nn.Module:
        """The model under this strategy; its images carry rows."""
        if self.is_ordinary:
            return model
        return lrjax.linen.rowwise(model, in_axes=1, **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "num_blocks": self.num_blocks,
            "strategy": MicroBatches(self.name, self.micro_batches),
            "cuts": self.cuts,
            "mesh": self.mesh,
            "row_mesh_axis": self.row_mesh_axis,
        }

    @property
    def without_plan(self) -> "Strategy":
        """For programs that are not the loss: the same."""
        return self


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
class Planned:
    """The loss as a plan of `lrjax.plan` says.

    Attributes:
      plan: made for this loss (`lrjax.app.planning.training_call`); it runs no other.
      mesh: devices that share the rows; None for one device.
    """

    plan: Plan
    mesh: Mesh | None = None

    @property
    def label(self) -> str:
        """The name used in tables and plots."""
        return "plan"

    def loss(self, model: nn.Module, *, labels_pixels: bool) -> LossFunction:
        """`classification_loss` of the model, run by the plan."""
        axes = loss_in_axes(labels_pixels=labels_pixels)
        return lrjax.rowwise(
            classification_loss(model), in_axes=axes, plan=self.plan, mesh=self.mesh
        )

    @property
    def without_plan(self) -> Strategy:
        """For programs that the plan was not made for: stream in as many blocks as it has."""
        if self.plan.is_column:
            return Strategy("column")
        blocks = max(choice.num_blocks for choice in self.plan.choices)
        return Strategy("stream", blocks, mesh=self.mesh, row_mesh_axis=self.plan.row_mesh_axis)


Execution = Strategy | Planned
