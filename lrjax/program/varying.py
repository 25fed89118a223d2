"""Types of values. Within ``jax.shard_map``, they say over which mesh axes a value may differ
between devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def is_inexact(value: Any) -> bool:
    """Whether a value, or values of a type, are floating-point numbers, real or complex."""
    return bool(jnp.issubdtype(value.dtype, jnp.inexact))


def is_reference(value: Any) -> bool:
    """Whether a value is a mutable array (``jax.new_ref``)."""
    return hasattr(jax.typeof(value), "inner_aval")


def is_in_shard_map() -> bool:
    """Whether some axes of the mesh at hand are divided by an enclosing ``jax.shard_map``."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def varying_axes(value: Any) -> frozenset[str]:
    """Mesh axes over which a value, or values of a type, may differ between devices.

    None outside ``jax.shard_map``, and within one that does not track them (``check_vma=False``).
    """
    if not hasattr(value, "manual_axis_type"):
        value = jax.typeof(value)
    kind = getattr(value, "manual_axis_type", None)  # random keys, tokens: other types
    return frozenset() if kind is None else kind.varying


def varying_over(value: Any, axes: frozenset[str]) -> Any:
    """The value, as one that may differ along these mesh axes; its cotangents are summed there."""
    missing = tuple(sorted(axes - varying_axes(value))) if axes else ()
    return lax.pcast(value, missing, to="varying") if missing else value


def struct(
    shape: Sequence[int], dtype: Any, varying: frozenset[str] = frozenset()
) -> jax.ShapeDtypeStruct:
    """A type whose values may differ along some axes of the mesh at hand."""
    if not varying:
        return jax.ShapeDtypeStruct(shape, dtype)
    spec = jax.sharding.PartitionSpec(*[None] * len(shape))
    sharding = jax.sharding.NamedSharding(jax.sharding.get_abstract_mesh(), spec)
    kind = jax.sharding.ManualAxisType(varying=varying)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding, manual_axis_type=kind)


def struct_like(aval: Any, shape: Sequence[int] | None = None) -> jax.ShapeDtypeStruct:
    """A type as a ``ShapeDtypeStruct``, of the same or another shape."""
    own = getattr(aval, "shape", ()) if shape is None else shape
    return struct(own, aval.dtype, varying_axes(aval))
