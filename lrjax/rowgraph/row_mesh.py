"""The axis of a device mesh along which the rows of one image are divided."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class RowMesh:
    """Devices that each own a share of the rows.

    Attributes:
      mesh: a ``jax.sharding.Mesh`` or ``AbstractMesh`` whose axes are all Auto, or Manual by an
        enclosing ``jax.shard_map``.
      axis: the axis of the mesh along which rows are divided, an Auto one.
    """

    mesh: Any
    axis: str

    @property
    def count(self) -> int:
        """How many devices share the rows of an image."""
        return int(self.mesh.shape[self.axis])

    def divides(self, height: int) -> bool:
        """Whether every device gets as many of so many rows."""
        return height % self.count == 0

    def on_every_device(self, array: jax.Array, axis: int) -> jax.Array:
        """An array with rows along ``axis``, all of which every device has."""
        rest = PartitionSpec.UNCONSTRAINED
        return self._placed(array, [None if a == axis else rest for a in range(array.ndim)])

    def whole(self, array: jax.Array, batch_axis: int | None) -> jax.Array:
        """An array all of which every device has, but for its images where devices share a batch.

        Of an array without rows it is not known which of its axes XLA would divide.
        """
        shares_batch = batch_axis is not None and self.mesh.size > self.count
        rest = PartitionSpec.UNCONSTRAINED
        axes = range(array.ndim)
        return self._placed(
            array, [rest if shares_batch and a == batch_axis else None for a in axes]
        )

    def _placed(self, array: jax.Array, parts: Sequence[Any]) -> jax.Array:
        spec = PartitionSpec(*parts)
        at_hand = jax.sharding.get_abstract_mesh()
        where = spec if not at_hand.empty else NamedSharding(self.mesh, spec)
        return lax.with_sharding_constraint(array, where)
