"""Floating-point operations of a segment under a choice, as a row graph counts them.

Column's are the forward pass and, for what multiplies (convolutions, products), as much again for
every operand that has a gradient. What is done again is counted from the schedules.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp

from lrjax.loop.rowloop import Order, row_loop
from lrjax.plan import Choice
from lrjax.planner.cost import SegmentCost
from lrjax.program.inline import FlatEquation, FlatProgram, flatten, function_of
from lrjax.rowgraph.graph import RowGraph, build
from lrjax.rules.base import traits_of


class OperationCounts:
    """Operations of every equation of one program, done once, forward and with its gradients."""

    def __init__(
        self,
        program: FlatProgram,
        axes: Sequence[int | None],
        wrt: Collection[int],
        moving: Collection[int],
    ):
        graph = build(program, axes)
        self.forward = {
            node.equation.outputs[0]: node.op.flops * node.op.height
            for node in graph.nodes
            if node.op is not None
        }
        rough = {
            e.outputs[0]: self.forward.get(e.outputs[0], 0.0) * (1 + _gradients(e, moving))
            for e in program.equations
        }
        exact = _graph_operations(_gradient_graph(program, axes, sorted(wrt)))
        scale = exact / max(sum(rough.values()), 1.0)
        self.column = {v: flops * scale for v, flops in rough.items()}

    def of(
        self,
        equations: Sequence[FlatEquation],
        choice: Choice,
        cost: SegmentCost,
        graph: RowGraph,
    ) -> float:
        """Operations of a segment.

        Args:
          equations: its operations on rows.
          choice: how it runs.
          cost: the cost model's answer; it counts those of row programs from their passes.
          graph: the segment's forward pass.
        """
        heads = [e.outputs[0] for e in equations]
        once = sum(self.column[v] for v in heads)
        again = sum(self.forward.get(v, 0.0) for v in heads)
        strategy = choice.strategy
        if not strategy.recomputes:
            return once
        if strategy.order is None:
            return once + again
        if strategy.streams:
            return max(cost.operations, once)
        if strategy.order.recomputes_halos:
            return (once + again) * _overlap(graph, strategy.order, choice.num_blocks)
        return once + again


def _gradients(equation: FlatEquation, moving: Collection[int]) -> int:
    count = sum(isinstance(v, int) and v in moving for v in equation.inputs)
    return count if traits_of(equation.primitive).is_contraction else min(count, 1)


def _gradient_graph(
    program: FlatProgram, axes: Sequence[int | None], wrt: Sequence[int]
) -> RowGraph:
    def gradient(*inputs: jax.Array) -> object:
        function, moving = function_of(program, wrt, inputs)
        outputs, pull = jax.vjp(lambda *xs: [y for y in function(*xs) if _is_inexact(y)], *moving)
        return pull([jnp.ones_like(y) for y in outputs])

    return build(flatten(jax.make_jaxpr(gradient)(*program.structs)), axes)


def _is_inexact(array: jax.Array) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.inexact))


def _graph_operations(graph: RowGraph) -> float:
    return sum(node.op.flops * node.op.height for node in graph.nodes if node.op is not None)


def _overlap(graph: RowGraph, order: Order, num_blocks: int) -> float:
    """Rows computed in blocks that each compute their halos, over rows."""
    done = once = 0.0
    for stage in graph.loops:
        loop = row_loop(graph, stage, order=order, num_blocks=num_blocks, is_differentiated=True)
        for node, track in zip(loop.nodes, loop.schedule.tracks, strict=True):
            assert node.op is not None
            done += node.op.flops * max(track.rows * loop.steps, node.op.height)
            once += node.op.flops * node.op.height
    return done / max(once, 1.0)
