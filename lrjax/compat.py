"""Differences between the versions of JAX that lrjax supports, in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name


def bind(primitive: Any, values: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    """Apply a primitive with the parameters of an equation; results as a list.

    ``get_bind_params`` turns the bodies of calls into functions. It returns the parameters in
    jax 0.10 and later, and a pair with the functions first in earlier versions.
    Operands need not vary over the same mesh axes, as those of a primitive must.
    """
    if len(values) > 1 and is_in_shard_map() and not has_body(params):
        axes = frozenset[str]().union(*map(varying_axes, values))
        values = [varying_over(value, axes) for value in values]
    found = primitive.get_bind_params(params)
    subfuns, bind_params = found if isinstance(found, tuple) else ((), found)
    results = primitive.bind(*subfuns, *values, **bind_params)
    return list(results) if primitive.multiple_results else [results]


def open_jaxpr(body: Any) -> tuple[Any, list[Any]]:
    """A jaxpr and its constants, from a closed or an open one.

    jax 0.12 merged the two classes; there a jaxpr may hold constants itself.
    """
    consts = list(getattr(body, "consts", ()))
    return getattr(body, "jaxpr", body), consts


def scan_arity(eqn: Any) -> tuple[int, int]:
    """How many of a scan's operands are constants, and how many are carried.

    jax 0.10 has parameters for it, 0.12 trees. What is scanned has one axis more outside the body.
    """
    body, _ = open_jaxpr(eqn.params["jaxpr"])

    def stays(outside: Any, inside: Any) -> bool:
        return len(outside.aval.shape) == len(inside.aval.shape)

    carried = sum(map(stays, eqn.outvars, body.outvars))
    return sum(map(stays, eqn.invars, body.invars)) - carried, carried


# ``jax.checkpoint`` rounds what it saves by ``reduce_precision``, which has no complex form (jax
# 0.10 to 0.12): complex values are saved as their real and imaginary parts.


def checkpoint(function: Callable[..., Any], policy: Any = None) -> Callable[..., Any]:
    """``jax.checkpoint`` of a function of arrays, complex ones too."""

    def call(*arrays: Any) -> Any:
        def joined(*parts: Any) -> Any:
            return function(*map(from_real_parts, parts))

        return jax.checkpoint(joined, policy=policy)(*map(real_parts, arrays))

    return call


def real_parts(array: Any) -> Any:
    """A complex array as the pair of its real and imaginary parts; any other array as it is."""
    return (lax.real(array), lax.imag(array)) if jnp.iscomplexobj(array) else array


def from_real_parts(parts: Any) -> Any:
    """The array that ``real_parts`` took apart."""
    return lax.complex(*parts) if isinstance(parts, tuple) else parts


def named(array: Any, name: str) -> Any:
    """``checkpoint_name`` of an array, a complex one too."""
    if not jnp.iscomplexobj(array):
        return checkpoint_name(array, name)
    return from_real_parts(tuple(checkpoint_name(part, name) for part in real_parts(array)))


def has_body(params: dict[str, Any]) -> bool:
    """Whether these are the parameters of a call, a loop or a branch."""
    return any("jaxpr" in name or name in ("branches", "call") for name in params)


# --- Values within ``jax.shard_map`` --------------------------------------------------------------


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
