"""What stream saves of a part that is not trained.

Column runs frozen early layers once. Stream would run them in both passes, to make again what the
trained part reads of them; saved, it is read. Which maps cross is a minimum cut again, bytes held
against operations done again.
"""

from __future__ import annotations

from collections.abc import Sequence

from lrjax.program.inline import dependents
from lrjax.rowgraph.graph import RowGraph, stage_problem
from lrjax.rowgraph.stages import MinimumCuts, Problem

# Frozen operations may be done again for up to this fraction of what column does.
MOST_REPEATED = 0.1
# Operations that are worth doing again to hold one byte less: the highest rate is tried first.
_RATES = tuple(2.0**k for k in range(16, 3, -1))


def worth_saving(graph: RowGraph, wrt: Sequence[int]) -> frozenset[int]:
    """Row values of the frozen part to save for the backward pass.

    The fewest bytes with which frozen operations that are done again are few. Column does all
    operations once, and those behind what is trained three times.

    Args:
      graph: a program.
      wrt: numbers of its inputs that are differentiated.
    """
    program = graph.program
    moving = dependents(program.equations, {program.inputs[i] for i in wrt})
    frozen = [n for n in graph.row_nodes if moving.isdisjoint(n.equation.outputs)]
    trained = [n for n in graph.nodes if not moving.isdisjoint(n.equation.outputs)]
    made = {v for n in frozen for v in n.equation.outputs} & graph.streamed
    wanted = frozenset(made.intersection(v for n in trained for v in n.equation.values))
    if not wanted:
        return wanted
    once = graph.operations(once=True)
    column = 3 * once - 2 * sum(n.op.flops * n.op.height for n in frozen)
    problem = stage_problem(program, frozen, frozenset(made), graph.row_axis, graph.compared)
    cuts = MinimumCuts(problem, [0] * len(frozen))
    held: frozenset[int] = frozenset()
    for rate in _RATES:
        held = cuts.cheapest(0, wanted, frozenset(), rate)
        if _repeated(problem, wanted, held) <= MOST_REPEATED * column:
            break
    return held


def _repeated(problem: Problem, wanted: frozenset[int], held: frozenset[int]) -> float:
    """Operations that make what is wanted from what is held and from the inputs."""
    missing, flops = set(wanted - held), 0.0
    for operation in reversed(problem.operations):
        if not missing.isdisjoint(operation.outputs):
            flops += operation.flops
            missing.update(v for v in operation.inputs if v not in held)
    return flops
