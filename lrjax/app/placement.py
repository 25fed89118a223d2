"""Where the arrays of a run are: on one device, or on a mesh of devices of one or more processes.

A mesh has two axes. Along `rows` devices share the rows of each image, along `data` the images of a
batch; parameters and the optimizer's state are on every device. Neighbours along `rows` exchange
halos in every row loop, so they are devices that follow each other: those of one host first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lrjax.app.data.batching import Share
from lrjax.app.strategy import ROWS, Planned
from lrjax.plan import Plan

DATA = "data"


@dataclass(frozen=True)
class Placement:
    """How arrays are divided among devices.

    Attributes:
      mesh: its axes are `data` and `rows`; None for the one device that JAX uses by itself.
    """

    mesh: Mesh | None = None

    @property
    def rows(self) -> int:
        """Devices that share the rows of an image."""
        return 1 if self.mesh is None else int(self.mesh.shape[ROWS])

    @property
    def data(self) -> int:
        """Groups of devices that share a batch."""
        return 1 if self.mesh is None else int(self.mesh.shape[DATA])

    def check(self, image_shape: tuple[int, ...], batch_size: int) -> None:
        """Refuses images and batches that cannot be divided.

        Raises:
          ValueError: says what would do.
        """
        height = image_shape[0]
        if height < self.rows:
            raise ValueError(
                f"devices: {height} rows of an image cannot be shared by {self.rows}; use at most "
                f"{height}, and more --data-devices"
            )
        if batch_size % self.data:
            below = max(self.data, batch_size - batch_size % self.data)
            raise ValueError(
                f"batch: got {batch_size}, and data_devices={self.data}, which share it evenly; "
                f"use --batch {below}, or another multiple of {self.data}"
            )

    @property
    def replicated(self) -> NamedSharding | None:
        """Of what every device has."""
        return None if self.mesh is None else NamedSharding(self.mesh, P())

    def of_batch(self, shape: tuple[int, ...]) -> NamedSharding | None:
        """Of images `[B, H, W, C]` or labels `[B]`, `[B, H, W]`.

        Rows that devices do not share evenly are given to each of them; `rowwise` takes shares.
        """
        if self.mesh is None:
            return None
        divides_rows = len(shape) > 1 and shape[1] % self.rows == 0
        return NamedSharding(self.mesh, P(DATA, ROWS) if divides_rows else P(DATA))

    def share(self, batch_size: int, image_shape: tuple[int, ...]) -> Share:
        """The images of every batch, and their rows, that this process has to read."""
        shape = (batch_size, *image_shape)
        sharding = self.of_batch(shape)
        if sharding is None:
            return Share(0, batch_size)
        parts = sharding.addressable_devices_indices_map(shape).values()
        of_batch, of_rows = zip(*((part[0], part[1]) for part in parts if part), strict=True)
        first, stop = _hull(of_batch, batch_size)
        low, high = _hull(of_rows, shape[1])
        return Share(first, stop, (low, high) if (low, high) != (0, shape[1]) else None)

    def batch(
        self, batch: Mapping[str, np.ndarray], batch_size: int, image_shape: tuple[int, ...]
    ) -> tuple[Any, Any]:
        """Images and labels on the devices, of what this process read of a batch."""
        images, labels = batch["image"], batch["label"]
        if self.mesh is None:
            return images, labels
        share = self.share(batch_size, image_shape)
        height = image_shape[0]
        return (
            self._divided(images, share, (batch_size, *image_shape)),
            self._divided(
                labels,
                share,
                (batch_size, *([height] if labels.ndim > 1 else []), *labels.shape[2:]),
            ),
        )

    def _divided(self, own: np.ndarray, share: Share, shape: tuple[int, ...]) -> jax.Array:
        """A global array of which this process has `own`, from the share's first image and row."""
        low = 0 if share.rows is None else share.rows[0]

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            starts = (share.first, low)
            moved = [
                slice(s.start - start, s.stop - start) if s.start is not None else s
                for s, start in zip(index, starts, strict=False)
            ]
            return own[tuple(moved)]

        sharding = self.of_batch(shape)
        assert sharding is not None
        return jax.make_array_from_callback(shape, sharding, part)

    def everywhere(self, tree: Any) -> Any:
        """A tree of arrays, alike in all processes, on every device."""
        sharding = self.replicated
        if sharding is None:
            return tree

        def put(leaf: Any) -> Any:
            if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
                return leaf
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                data = put(jax.random.key_data(leaf))
                return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
            host = np.asarray(leaf)
            return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

        return jax.tree.map(put, tree)


ONE_DEVICE = Placement()


def planned(plan: Plan, placement: Placement) -> Planned:
    """A plan on the devices of a run.

    Raises:
      ValueError: it was made for others.
    """
    mesh = placement.mesh if placement.rows > 1 else None
    axis = None if mesh is None else ROWS
    if (plan.row_mesh_axis, plan.devices) != (axis, placement.rows):
        raise ValueError(
            f"plan: it was made for {plan.devices} devices along {plan.row_mesh_axis!r}, and the "
            f"run has {placement.rows} along {axis!r}; give --devices {plan.devices}, or make a "
            f"plan by lrjax plan --devices {placement.rows}"
        )
    return Planned(plan, mesh)


def placement_of(rows: int | None, data: int) -> Placement:
    """The mesh of a run.

    Args:
      rows: devices that share the rows of an image; None: one, or, of several processes, as many
        as there are for each of the `data`.
      data: groups of devices that share a batch.

    Raises:
      ValueError: there are not so many devices, or processes have others that were left out.
    """
    there = jax.devices()
    several = jax.process_count() > 1
    if rows is None:
        rows = max(1, len(there) // data) if several else 1
    count = rows * data
    asked = f"devices: got {rows} for rows times {data} for data"
    if count > len(there):
        how = ""
        if there[0].platform == "cpu" and not several:
            how = (
                "; of a CPU JAX makes more with XLA_FLAGS=--xla_force_host_platform_device_count"
                f"={count}"
            )
        raise ValueError(f"{asked}, and there are {len(there)} ({there[0].device_kind}){how}")
    if several and count != len(there):
        raise ValueError(
            f"{asked}, and {jax.process_count()} processes have {len(there)}, all of which must "
            "take part; leave --devices out, or start fewer"
        )
    if count == 1:
        return ONE_DEVICE
    kinds = (AxisType.Auto, AxisType.Auto)
    return Placement(jax.make_mesh((data, rows), (DATA, ROWS), kinds, devices=there[:count]))


def _hull(parts: Any, size: int) -> tuple[int, int]:
    """The first of all, and the end of all, of some ranges."""
    bounds = [part.indices(size) for part in parts]
    return min(b[0] for b in bounds), max(b[1] for b in bounds)
