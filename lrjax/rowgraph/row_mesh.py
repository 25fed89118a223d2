"""The axis of a device mesh along which the rows of one image are divided."""

from __future__ import annotations

import dataclasses
from typing import Any


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
