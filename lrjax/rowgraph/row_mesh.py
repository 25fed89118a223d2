"""The axis of a device mesh along which the rows of one image are divided."""

from __future__ import annotations

import dataclasses
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
        spec = PartitionSpec(*(None if a == axis else rest for a in range(array.ndim)))
        at_hand = jax.sharding.get_abstract_mesh()
        where = spec if not at_hand.empty else NamedSharding(self.mesh, spec)
        return lax.with_sharding_constraint(array, where)
