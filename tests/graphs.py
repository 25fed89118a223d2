"""What a test may ask of the row graphs, so that a run that is secretly column-wise cannot pass."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lrjax
from lrjax.autodiff import stream_programs
from lrjax.graph import RowGraph
from lrjax.tracing import trace


def graphs_of(fun: Any, args: Sequence[Any], in_axes: Any) -> list[RowGraph]:
    """Forward and backward of stream; a single graph where both are one pass."""
    traced = trace(fun, in_axes, tuple(args), {})
    structs = [traced.program.avals[v] for v in traced.program.inputs]
    wrt = [i for i, s in enumerate(structs) if jnp.issubdtype(s.dtype, jnp.inexact)]
    programs = stream_programs(traced.program, traced.axes, 1, wrt)
    return [p.graph for p in (programs.forward, programs.backward) if p is not None]


def fallbacks(graph: RowGraph) -> list[str]:
    """Primitives that carry rows but run column-wise."""
    return [node.equation.primitive.name for node in graph.fallbacks]


def assert_row_local(fun: Any, args: Sequence[Any], in_axes: Any) -> None:
    """Every pass is one row loop, and nothing falls back to column."""
    for graph in graphs_of(fun, args, in_axes):
        assert [f"{n.equation.primitive.name}: {n.reason}" for n in graph.fallbacks] == []
        assert sum(bool(graph.stage_nodes(s)) for s in range(graph.stages)) == 1


def largest_num_blocks(fun: Any, args: Sequence[Any], in_axes: Any, strategy: str) -> int:
    """What the message of a ``num_blocks`` that is too large says."""
    with pytest.raises(ValueError, match="largest allowed is") as error:
        jax.eval_shape(
            lrjax.rowwise(fun, in_axes=in_axes, num_blocks=10**6, strategy=strategy), *args
        )
    found = re.search(r"largest allowed is (\d+)", str(error.value))
    assert found is not None
    return int(found.group(1))
