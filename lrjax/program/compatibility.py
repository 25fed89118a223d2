"""Differences between the versions of JAX that lrjax supports, in one place."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal, Primitive
from jax.extend.core import primitives as public
from jax.interpreters import ad

from lrjax.program.varying import is_in_shard_map, is_reference, varying_axes, varying_over

# Primitives that some of the supported versions lack; ``primitive`` is None for them there.
_NOT_IN_EVERY_VERSION = frozenset(
    (
        "closed_call",  # until 0.11
        "log2",  # from 0.12
        "one_minus_square",  # from 0.12
        "polynomial",  # from 0.12
    )
)


def primitive(name: str) -> Primitive | None:
    """The primitive of this name, None if this version of JAX lacks it and others have it.

    For primitives that are no attribute of ``jax.lax`` in every version; for all others write
    ``lax.add_p``.

    Raises:
      LookupError: if there is none and none was expected to be missing: a misspelt name, or one
        that a new version of JAX dropped.

    Example:
      >>> primitive("pvary")
      pvary
    """
    found = _primitives_by_name().get(name)
    if found is None and name not in _NOT_IN_EVERY_VERSION:
        raise LookupError(
            f"jax {jax.__version__} has no primitive {name!r}; correct the name, or list it among "
            "those that not every version has, in lrjax/program/compatibility.py."
        )
    return found


def primitives(*names: str) -> tuple[Primitive, ...]:
    """Those of the primitives that this version of JAX has; see ``primitive``."""
    return tuple(found for found in map(primitive, names) if found is not None)


@functools.cache
def _primitives_by_name() -> Mapping[str, Primitive]:
    """Public primitives; then those that have a derivative and no public name."""
    of_modules = (getattr(module, name) for module in (lax, public) for name in dir(module))
    found: dict[str, Primitive] = {}
    for one in itertools.chain(of_modules, ad.primitive_jvps):
        if isinstance(one, Primitive):
            found.setdefault(one.name, one)
    return found


def tag_of(equation: Any) -> str | None:
    """The name that an equation gives to a value (``jax.ad_checkpoint.checkpoint_name``)."""
    return equation.params["name"] if equation.primitive is public.name_p else None


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


def evaluate_jaxpr(
    body: Any, arguments: Sequence[Any], run: Callable[[Any, list[Any]], Sequence[Any]]
) -> list[Any]:
    """The outputs of a jaxpr, of whose equations ``run`` gives the results."""
    jaxpr, consts = open_jaxpr(body)
    variables = (*jaxpr.constvars, *jaxpr.invars)
    known = dict(zip(variables, (*consts, *arguments), strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else known[v]

    for eqn in jaxpr.eqns:
        results = run(eqn, [read(v) for v in eqn.invars])
        known.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


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


def checkpoint(
    function: Callable[..., Any], *, policy: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """``jax.checkpoint`` of a function of arrays, complex ones too.

    A ``policy`` must not save complex values.
    """

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


def strongly_typed(value: Any) -> Any:
    """A number or an array as an array whose type is not weak; a reference as it is."""
    if is_reference(value):
        return value
    array = jnp.asarray(value)
    is_weak = getattr(array, "weak_type", False)  # random keys have none
    return lax.convert_element_type(array, array.dtype) if is_weak else array


def weakly_typed(value: Any) -> Any:
    """The value with a weak type, which gives way to others' as that of a Python scalar does."""
    dtype = jnp.result_type(value)
    params = {"new_dtype": dtype, "weak_type": True, "sharding": None}
    return lax.convert_element_type_p.bind(value, **params)


def is_ordered(params: dict[str, Any]) -> bool:
    """Whether these are the parameters of a callback that runs in the order of the program."""
    return bool(params.get("ordered")) or type(params.get("effect")).__name__.startswith("Ordered")


def has_body(params: dict[str, Any]) -> bool:
    """Whether these are the parameters of a call, a loop or a branch."""
    return any("jaxpr" in name or name in ("branches", "call") for name in params)
