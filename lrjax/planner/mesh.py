"""The devices that a plan is made for, which need not be there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

from lrjax.memory.compile import mesh_for
from lrjax.rowgraph.row_mesh import RowMesh
from lrjax.rowgraph.tracing import flat_axes

PlannedMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh | Mapping[str, int] | None


def planned_row_mesh(mesh: PlannedMesh, axis: str | None, target: str | None) -> RowMesh | None:
    """The devices that share rows in a plan; None for one device.

    Args:
      mesh: a mesh, or its axes and their sizes; None for the mesh at hand if ``axis`` is given.
      axis: along which rows are divided; None for the only axis of ``mesh``.
      target: the kind of device.

    Raises:
      ValueError: there is no such mesh or axis, or XLA cannot compile for so many of ``target``.
      ImportError: XLA's plugin for the target is not installed; the message has the command.
    """
    if mesh is None and axis is None:
        return None
    sizes = _sizes(mesh, axis)
    if axis is None and len(sizes) == 1:
        (axis,) = sizes
    if not isinstance(axis, str):
        raise ValueError(
            f"row_mesh_axis={axis!r:.80} must name one axis of the mesh, {tuple(sizes)}: the one "
            "along which rows are divided."
        )
    if axis not in sizes:
        raise ValueError(f"row_mesh_axis={axis!r} is no axis of the mesh; it has {tuple(sizes)}.")
    mesh_for(target, {axis: sizes[axis]})
    return RowMesh(jax.sharding.AbstractMesh((sizes[axis],), (axis,), (AxisType.Auto,)), axis)


def compile_options(
    args: tuple[Any, ...], in_axes: Any, row_mesh: RowMesh | None
) -> dict[str, Any]:
    """What ``lrjax.memory.compile_for`` takes for a call on devices that share its rows.

    Arrays whose heights the devices do not divide are given whole to each: JAX divides evenly.
    """
    if row_mesh is None:
        return {}
    leaves, tree = jax.tree.flatten(args)
    specs = [
        jax.P(*[None] * (axis or 0), row_mesh.axis) if is_divided(leaf, axis, row_mesh) else jax.P()
        for leaf, axis in zip(leaves, flat_axes(in_axes, args), strict=True)
    ]
    return {
        "mesh_shape": {row_mesh.axis: row_mesh.count},
        "in_specs": tuple(jax.tree.unflatten(tree, specs)),
    }


def is_divided(array: Any, axis: int | None, row_mesh: RowMesh) -> bool:
    """Whether every device is given its own rows of an array alone."""
    return axis is not None and array.shape[axis] % row_mesh.count == 0


def _sizes(mesh: PlannedMesh, axis: str | None) -> dict[str, int]:
    if mesh is None:
        found = jax.sharding.get_abstract_mesh()
        if found.empty:
            raise ValueError(
                f"row_mesh_axis={axis!r}: there is no mesh; give mesh={{{axis!r}: 8}} for eight "
                "devices, which need not be there, or a mesh that jax.make_mesh returned."
            )
        return dict(found.shape)
    if isinstance(mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh):
        return dict(mesh.shape)
    if not isinstance(mesh, Mapping) or not all(isinstance(name, str) for name in mesh):
        raise ValueError(
            f"mesh={mesh!r:.80} is no mesh; give what jax.make_mesh returned, or the size of its "
            "axis by name, as {'rows': 8}."
        )
    return {n: size.item() if isinstance(size, np.integer) else size for n, size in mesh.items()}
