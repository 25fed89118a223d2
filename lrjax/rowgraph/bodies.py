"""Bodies of calls and branches that act on every row alone: typed once, run on blocks of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrjax.program.inline import array_of, flatten
from lrjax.rowgraph.graph import ColumnNode, RowGraph, RowNode, build
from lrjax.rules.base import Array, NotRowLocal, Rows
from lrjax.rules.geometry import IDENTITY
from lrjax.rules.masks import keep_rows


def pointwise_graph(
    function: Callable[..., Any],
    structs: Sequence[Any],
    axes: Sequence[int | None],
    *,
    keep_custom_rules: bool = False,
) -> RowGraph:
    """A function of arrays whose rows depend on the same rows of its operands.

    Args:
      function: the function.
      structs: types of its operands.
      axes: their row axes.
      keep_custom_rules: as for ``flatten``.

    Raises:
      NotRowLocal: an operation mixes rows, reads whole maps, or has an effect.
    """
    program = flatten(jax.make_jaxpr(function)(*structs), keep_custom_rules=keep_custom_rules)
    if any(isinstance(c, jax.core.Tracer) for c in program.constants.values()):
        raise NotRowLocal("it closes over a traced array")
    graph = build(program, axes)
    given = {v for v, axis in zip(program.inputs, axes, strict=True) if axis is not None}
    for node in graph.nodes:
        name = node.equation.primitive.name
        if node.equation.has_effects:
            raise NotRowLocal(f"{name} has an effect")
        if node.reason is not None:
            raise NotRowLocal(node.reason)
        if isinstance(node, ColumnNode):
            continue
        if any(read is not None and read.row_map != IDENTITY for read in node.op.reads):
            raise NotRowLocal(f"{name} mixes neighbouring rows")
        if any(v not in given and v not in graph.streamed for v in node.row_inputs()):
            raise NotRowLocal(f"{name} reads rows of a whole map")
    return graph


def reducing_primitive(graph: RowGraph) -> str | None:
    """The name of an operation that reduces over rows, if there is one."""
    return next((n.equation.primitive.name for n in graph.nodes if n.is_reduction), None)


def operations_per_row(graph: RowGraph) -> float:
    return sum(node.op.flops for node in graph.row_nodes)


def preserves_finiteness(graph: RowGraph) -> bool:
    return all(node.op.preserves_finiteness for node in graph.row_nodes)


def is_positional(graph: RowGraph) -> bool:
    return any(node.op.is_positional for node in graph.row_nodes)


def run_on_block(graph: RowGraph, inputs: Sequence[Array], rows: Rows, height: int) -> list[Array]:
    """The outputs on a block of rows, some of which may lie outside the image.

    Where an operation may have a pole, rows outside never reach a reduction, and in a block that
    will be differentiated they hold 1 around that operation: 0 times infinity would be NaN. Else
    they hold finite numbers, as the operands do, and what is zero there stays so.

    Args:
      graph: made by ``pointwise_graph``.
      inputs: blocks of the operands that carry rows, and whole arrays for the others.
      rows: the block.
      height: rows of the image.
    """
    values: dict[int, Any] = {v: jnp.asarray(c) for v, c in graph.program.constants.items()}
    values.update(zip(graph.program.inputs, inputs, strict=True))

    has_poles = not preserves_finiteness(graph)
    for node in graph.nodes:
        operands = [array_of(v, values) for v in node.equation.inputs]
        if isinstance(node, ColumnNode):
            results: Sequence[Any] = node.equation.evaluate(operands)
        else:
            with node.equation.origin():
                results = (
                    _run_masked(node, operands, rows, height)
                    if has_poles
                    else node.op.evaluate(operands, rows)
                )
        values.update(zip(node.equation.outputs, results, strict=True))
    return [array_of(v, values) for v in graph.program.outputs]


def _run_masked(
    node: RowNode, operands: Sequence[Array], rows: Rows, height: int
) -> Sequence[Array]:
    reads = node.op.reads
    has_pole = rows.is_differentiated and not node.op.preserves_finiteness
    masked = []
    for operand, read in zip(operands, reads, strict=True):
        if read is not None and node.is_reduction:
            operand = masked_rows(operand, rows, read.axis, height, read.fill)
        elif read is not None and has_pole:
            operand = masked_rows(operand, rows, read.axis, height, 1)
        masked.append(operand)
    results = node.op.evaluate(masked, rows)
    if not has_pole or node.is_reduction:
        return results
    return [
        result if axis is None else masked_rows(result, rows, axis, height, 1)
        for result, axis in zip(results, node.op.out_axes, strict=True)
    ]


def masked_rows(block: Array, rows: Rows, axis: int, height: int, fill: Any) -> Array:
    """A block whose rows outside the image hold ``fill``."""
    is_static = isinstance(rows.start, int | np.integer)
    if is_static and rows.start >= 0 and rows.start + rows.count <= height:
        return block
    return keep_rows(block, rows.start, axis, 0, height, fill)
