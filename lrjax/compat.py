"""Differences between the versions of JAX that lrjax supports, in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def bind(primitive: Any, values: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    """Apply a primitive with the parameters of an equation; results as a list.

    ``get_bind_params`` turns the bodies of calls into functions. It returns the parameters in
    jax 0.10 and later, and a pair with the functions first in earlier versions.
    """
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
