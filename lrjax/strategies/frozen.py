"""What is saved of a part that is not trained.

Column runs frozen early layers once. A strategy that does the forward pass again would run them
twice, to make again what the trained part reads of them; saved, it is read. Which maps cross is a
minimum cut again, bytes held against operations done again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from lrjax.loop.rowloop import RowLoop
from lrjax.program.inline import FlatProgram, dependents, values_of, without_dead_equations
from lrjax.rowgraph.graph import RowGraph, build, stage_problem
from lrjax.rowgraph.stages import MinimumCuts, Problem
from lrjax.strategies.joint import made_from

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


@dataclasses.dataclass(frozen=True)
class Division:
    """A row loop in two: what runs once, and what is differentiated.

    Attributes:
      frozen: takes what the loop takes; gives values that are held.
      trained: takes some of both, by their numbers; gives what the loop gives.
      graph: the loop's operations, with the row axes of all.
    """

    frozen: FlatProgram
    trained: FlatProgram
    graph: RowGraph


def division(loop: RowLoop, perturbed: Collection[int]) -> Division | None:
    """Divide a loop where a part of it is frozen whose results are worth saving.

    Args:
      loop: any loop.
      perturbed: of the values that it takes, those that are differentiated.

    Returns:
      None where the loop had better run as it is.
    """
    names = tuple(dict.fromkeys((*loop.arrays, *loop.wholes)))
    nodes = tuple(node.equation for node in loop.nodes)
    if len(perturbed) == len(names) or any(e.has_effects for e in nodes):
        return None
    made = (*loop.row_outputs, *loop.reductions)
    alone = dataclasses.replace(
        loop.graph.program, equations=nodes, inputs=names, outputs=made, constants={}
    )
    axes = [loop.graph.row_axis.get(v) if v in loop.arrays else None for v in names]
    graph = build(alone, axes)
    program = graph.program  # in which values may have other numbers
    saved = worth_saving(graph, [i for i, v in enumerate(names) if v in perturbed])
    if not saved:
        return None
    moving = dependents(program.equations, perturbed)
    also = [v for v in values_of(program.outputs) if v not in moving]
    held = tuple(dict.fromkeys((*sorted(saved), *also)))
    frozen = without_dead_equations(dataclasses.replace(program, outputs=held))
    return Division(frozen, made_from(program, 0, held, program.outputs), graph)


def _repeated(problem: Problem, wanted: frozenset[int], held: frozenset[int]) -> float:
    """Operations that make what is wanted from what is held and from the inputs."""
    missing, flops = set(wanted - held), 0.0
    for operation in reversed(problem.operations):
        if not missing.isdisjoint(operation.outputs):
            flops += operation.flops
            missing.update(v for v in operation.inputs if v not in held)
    return flops
