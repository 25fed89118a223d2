"""Whole maps, layer by layer: kept for the backward pass (column), or computed again (checkpoint).

Column is what JAX does with a function anyway, and what all else is measured against. Checkpoint is
``jax.checkpoint`` around a segment (Chen et al., arXiv 1604.06174): with cuts it keeps the maps at
them alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lrjax.loop import offload
from lrjax.loop.stage_by_stage import run_column
from lrjax.program.compatibility import checkpoint
from lrjax.program.inline import FlatProgram, array_of, evaluate
from lrjax.rowgraph.graph import Node, RowGraph, RowNode, build
from lrjax.rowgraph.row_mesh import RowMesh
from lrjax.rowgraph.segments import Segment
from lrjax.rules.base import Array, traits_of
from lrjax.strategies.base import NOTHING_HOSTED, Function, Strategy
from lrjax.strategies.programs import WholeMaps


class Column(Strategy):
    """Whole maps, every one kept that a gradient reads: the baseline."""

    name = "column"
    fate = "all maps kept"
    recomputes = False
    has_every_derivative = True

    def function(
        self,
        segment: Segment,
        num_blocks: int,
        given: Mapping[int, int] = NOTHING_HOSTED,
        taken: Mapping[int, int] = NOTHING_HOSTED,
    ) -> Function:
        return with_hosted_maps(evaluation(segment), given, taken)

    def execution(self, segment: Segment, num_blocks: int, wrt: Sequence[int]) -> WholeMaps:
        return WholeMaps(is_recomputed=False)


class Checkpoint(Strategy):
    """Whole maps; only the segment's inputs are kept, and the forward pass is done again."""

    name = "checkpoint"
    fate = "inputs kept, whole maps computed again"
    starts_from_inputs = True
    has_every_derivative = True

    def function(
        self,
        segment: Segment,
        num_blocks: int,
        given: Mapping[int, int] = NOTHING_HOSTED,
        taken: Mapping[int, int] = NOTHING_HOSTED,
    ) -> Function:
        function = evaluation(segment)
        # The copies of what arrives from the host must not be kept for the backward pass either.
        function = offload.checkpointed(function, taken) if taken else checkpoint(function)
        return with_hosted_maps(function, given, NOTHING_HOSTED)

    def execution(self, segment: Segment, num_blocks: int, wrt: Sequence[int]) -> WholeMaps:
        return WholeMaps(is_recomputed=True)


def with_hosted_maps(
    function: Function, given: Mapping[int, int], taken: Mapping[int, int]
) -> Function:
    """A function of whole maps, some of which it gives to the host's memory or takes from there."""
    if taken:
        function = offload.with_hosted_inputs(function, taken)
    return offload.with_hosted_outputs(function, given) if given else function


Seen = Callable[[int, Array], Array]


def evaluation(
    segment: Segment, seen_of: Callable[[FlatProgram], Seen] = lambda program: lambda v, x: x
) -> Function:
    """The segment's operations, one after the other.

    Args:
      segment: the segment.
      seen_of: of a program, what stands for every value and its result, such as it with a name.
    """
    program, row_mesh = segment.program, segment.row_mesh
    if row_mesh is None:
        return lambda *inputs: evaluate(program, inputs, seen=seen_of(program))
    graph = build(program, segment.axes)
    seen = seen_of(graph.program)

    def evaluated(*inputs: Array) -> list[Array]:
        values: dict[int, Array] = dict(graph.program.constants)
        values.update(zip(graph.program.inputs, inputs, strict=True))
        for node in graph.nodes:
            is_divided = _is_divided(graph, node, row_mesh)
            mesh = None if is_divided else row_mesh
            made = run_column(graph, node.equation, values, mesh)
            values.update((v, seen(v, x)) for v, x in made.items())
        return [array_of(v, values) for v in graph.program.outputs]

    return evaluated


def _is_divided(graph: RowGraph, node: Node, row_mesh: RowMesh) -> bool:
    """Whether XLA may divide the rows of what an operation reads and makes among devices."""
    traits, equation = traits_of(node.equation.primitive), node.equation
    if isinstance(node, RowNode) and not traits.divides_unevenly:
        rows = [v for v in (*equation.values, *equation.outputs) if v in graph.row_axis]
        return all(row_mesh.divides(graph.height(v)) for v in rows)
    return isinstance(node, RowNode)
