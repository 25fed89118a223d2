"""What was proved of custom derivatives, tried on random numbers.

``lrjax.rowgraph.calls`` proves from a rule's jaxpr that its derivative is row by row and additive.
The checker (``lrjax.testing``) tries it on numbers, so that an error in the tables of the proof
shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as public

from lrjax.program.inline import replaced_at
from lrjax.program.varying import is_inexact
from lrjax.rowgraph.calls import differentiable_operands
from lrjax.rules.base import Array, Equation, RowOp, Rows

# Elements of the largest operand that is tried.
LARGEST = 2**20
# Several roundings of the largest element; a rule that is wrong is off by far more.
_ROUNDINGS = 1e3


def assert_proofs_hold(calls: Iterable[tuple[Equation, RowOp]], seed: int = 0) -> list[str]:
    """Try the proofs of ``custom_vjp`` calls that 2PS and OverL tile.

    Rules of ``custom_jvp`` are linear by JAX's own construction.

    Args:
      calls: equations and how they run on blocks (``lrjax.rowgraph.calls.watched`` collects them).
      seed: of the random numbers.

    Returns:
      The names of the calls that were tried.

    Raises:
      AssertionError: a call's derivative is not what was proved of it.
    """
    tried = []
    for equation, op in calls:
        is_small = all(math.prod(o.shape) <= LARGEST for o in equation.operands)
        if equation.primitive is public.custom_vjp_call_p and is_small:
            _try(equation, op, np.random.default_rng(seed))
            tried.append(equation.primitive.name)
    return tried


def _try(equation: Equation, op: RowOp, generator: np.random.Generator) -> None:
    structs = equation.operands
    values = [_random(struct, generator) for struct in structs]
    moving = differentiable_operands(equation)

    def pulled_back(function: Callable[..., Any]) -> tuple[Any, Callable[..., Any]]:
        def of_moving(*arrays: Array) -> Any:
            return function(replaced_at(values, moving, arrays))

        return jax.vjp(of_moving, *(values[i] for i in moving))

    whole, pull = pulled_back(lambda full: equation.bind(*full))
    first, second = ([_random(out, generator) for out in whole] for _ in range(2))
    both = [a + b for a, b in zip(first, second, strict=True)]
    name = equation.primitive.name
    _compare(f"{name}: additive cotangents", map(jnp.add, pull(first), pull(second)), pull(both))
    half = max(op.height // 2, 1)
    blocks = [(0, half), *([(half, op.height - half)] if op.height > half else [])]

    def by_blocks(full: Sequence[Array]) -> list[Array]:
        found = []
        for start, count in blocks:
            windows = [
                x if read is None else jax.lax.slice_in_dim(x, start, start + count, axis=read.axis)
                for x, read in zip(full, op.reads, strict=True)
            ]
            found.append(op.evaluate(windows, Rows(start, count, is_differentiated=True)))
        return [
            jnp.concatenate(pieces, axis)
            for pieces, axis in zip(zip(*found, strict=True), op.out_axes, strict=True)
        ]

    tiled, pull_tiled = pulled_back(by_blocks)
    _compare(f"{name}: outputs by blocks", tiled, whole)
    _compare(f"{name}: cotangents by blocks", pull_tiled(first), pull(first))


def _random(struct: Any, generator: np.random.Generator) -> Array:
    if is_inexact(struct):
        return jnp.asarray(generator.uniform(0.1, 0.9, struct.shape), struct.dtype)
    return jnp.ones(struct.shape, struct.dtype)


def _compare(what: str, found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        if not jnp.issubdtype(jnp.result_type(b), jnp.inexact):
            continue
        largest = float(np.max(np.abs(b), initial=0.0))
        off = float(np.max(np.abs(np.asarray(a) - np.asarray(b)), initial=0.0))
        allowed = _ROUNDINGS * float(jnp.finfo(jnp.result_type(b)).eps) * max(largest, 1.0)
        assert off <= allowed, f"{what} differ by {off:.2e}, though they were proved equal"
