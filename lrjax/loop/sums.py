"""Reductions over rows: accumulators that every step adds to."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from lrjax.loop.dependent_fill import Full, full_like
from lrjax.loop.line_buffers import Values
from lrjax.loop.rowloop import RowLoop
from lrjax.loop.small_sums import SmallSums
from lrjax.rules.base import Array
from lrjax.rules.block_sums import accumulator_dtype
from lrjax.rules.reduction import identity_of

_COMBINE: dict[str, Callable[[Array, Array], Array]] = {
    "sum": jnp.add,
    "prod": jnp.multiply,
    "max": jnp.maximum,
    "min": jnp.minimum,
    "and": jnp.bitwise_and,
    "or": jnp.bitwise_or,
}


def small_sums(loop: RowLoop) -> SmallSums:
    """Which of the loop's sums over rows are added up together."""
    avals = loop.graph.program.avals
    added = (n for n in loop.nodes if n.op is not None and n.op.reduction == "sum")
    values = (v for node in added for v in node.equation.outputs)
    return SmallSums((v, avals[v], accumulator_dtype(avals[v].dtype)) for v in values)


def empty_sums(loop: RowLoop, full: Full) -> Values:
    """Accumulators at their identities."""
    sums = {}
    for v, (equation, reduction) in loop.reductions.items():
        aval = loop.graph.program.avals[v]
        dtype = accumulator_dtype(aval.dtype)
        with equation.origin():
            sums[v] = full_like(full, aval, identity_of(reduction, dtype), dtype=dtype)
    return small_sums(loop).packed(sums)


def add_partial(loop: RowLoop, sums: Values, partial: Values) -> Values:
    partial = small_sums(loop).packed(partial)
    combined = {v: sums[v] + partial[v] for v in sums if v < 0}  # vectors of small sums
    for v, (equation, reduction) in loop.reductions.items():
        if v in sums:
            with equation.origin():
                combined[v] = _COMBINE[reduction](sums[v], partial[v])
    return combined


def finished_sums(loop: RowLoop, sums: Values) -> Values:
    sums, finished = small_sums(loop).unpacked(sums), {}
    for v, (equation, _) in loop.reductions.items():
        with equation.origin():
            finished[v] = sums[v].astype(loop.graph.program.avals[v].dtype)
    return finished
