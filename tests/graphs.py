"""What a test may ask of the row graphs, so that a run that is secretly column-wise cannot pass."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrjax
from lrjax.rowgraph.fallbacks import fallbacks_of
from lrjax.rowgraph.graph import RowGraph
from lrjax.rowgraph.tracing import trace
from lrjax.strategies.stream import stream_programs
from lrjax.testing import assert_same_as_column


def graphs_of(fun: Any, args: Sequence[Any], in_axes: Any) -> list[RowGraph]:
    """Forward and backward of stream; a single graph where both are one pass."""
    traced = trace(fun, in_axes, tuple(args), {})
    structs = [traced.program.avals[v] for v in traced.program.inputs]
    wrt = [i for i, s in enumerate(structs) if jnp.issubdtype(s.dtype, jnp.inexact)]
    programs = stream_programs(traced.program, traced.axes, 1, wrt)
    return [p.graph for p in (programs.forward, programs.backward) if p is not None]


def fallbacks(graph: RowGraph) -> list[str]:
    """Primitives that carry rows but run column-wise."""
    return [fallback.primitive for fallback in fallbacks_of(graph)]


def assert_row_local(fun: Any, args: Sequence[Any], in_axes: Any, *, one_loop: bool = True) -> None:
    """Nothing falls back to column, and every pass is one row loop."""
    for graph in graphs_of(fun, args, in_axes):
        column = [f"{fallback.primitive}: {fallback.reason}" for fallback in fallbacks_of(graph)]
        assert not column, column
        if one_loop:
            assert len(graph.loops) == 1, f"{len(graph.loops)} row loops"


def largest_num_blocks(fun: Any, args: Sequence[Any], in_axes: Any, strategy: str) -> int:
    """What the message of a ``num_blocks`` that is too large says."""
    with pytest.raises(ValueError, match="largest allowed is") as error:
        jax.eval_shape(
            lrjax.rowwise(fun, in_axes=in_axes, num_blocks=10**6, strategy=strategy), *args
        )
    return _largest_allowed(error.value)


def _largest_allowed(error: ValueError) -> int:
    found = re.search(r"largest allowed is (\d+)", str(error))
    assert found is not None, error
    return int(found.group(1))


# Those that ``check_rule`` checks: see tests/conftest.py.
STRATEGIES = ("stream", "2ps", "overl")


def assert_same_in_blocks(fun: Any, args: Any, counts: Any, strategy: str) -> None:
    """By rows of the second argument's axis 1; ``counts`` are blocks, given the most there are."""
    most, expected = largest_num_blocks(fun, args, (None, 1), strategy), None
    for blocks in {min(count, most) for count in counts(most)}:
        expected = assert_same_as_column(
            fun, args, (None, 1), num_blocks=blocks, strategy=strategy, expected=expected
        )


def check_rule(
    op: Any,
    *images: Any,
    axes: int | tuple[int | None, ...] = 1,
    falls_back: bool = False,
    one_loop: bool = True,
    strategies: Sequence[str] = (),
    num_blocks: int = 3,
) -> None:
    """One operation on rows made in the loop: its graph, outputs and gradients.

    Args:
      op: the operation, of as many arrays as there are ``images``.
      images: the arrays; floating-point ones are scaled by a parameter first, so that their
        rows come from the row loop.
      axes: their row axes.
      falls_back: whether it should run column-wise (and be exact all the same).
      one_loop: whether there is no barrier in it.
      strategies: those to check, instead of all.
      num_blocks: the number of blocks, at most.
    """

    def fun(scale: Any, *images: Any) -> Any:
        scaled = (x * scale if jnp.issubdtype(x.dtype, jnp.inexact) else x for x in images)
        return op(*scaled), (scale * images[0]).sum()

    axes = axes if isinstance(axes, tuple) else (axes,) * len(images)
    args, in_axes = (np.float64(1.25), *images), (None, *axes)
    if falls_back:
        assert any(fallbacks(graph) for graph in graphs_of(fun, args, in_axes))
    else:
        assert_row_local(fun, args, in_axes, one_loop=one_loop)
    expected = None
    for strategy in strategies or STRATEGIES:
        check = functools.partial(
            assert_same_as_column, fun, args, in_axes, strategy=strategy, expected=expected
        )
        try:
            expected = check(num_blocks=num_blocks)
        except ValueError as error:
            expected = check(num_blocks=_largest_allowed(error))
