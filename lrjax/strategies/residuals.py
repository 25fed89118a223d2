"""What stream's forward pass saves for its backward pass.

Whatever ends a stage is saved in any case, so that the recomputed forward has no barriers. The
backward pass of a network with barriers has barriers of its own, and would compute the same maps
again behind each of them; there, the maps that are worth holding are found by the minimum cut of
``stages``, on forward and backward as one program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lrjax.program.comparisons import compared_extremes
from lrjax.program.inline import FlatProgram
from lrjax.program.varying import is_inexact
from lrjax.rowgraph.graph import ColumnNode, RowGraph, build, stage_problem
from lrjax.rowgraph.stages import Problem, Stages, cut_into_stages
from lrjax.strategies.frozen import worth_saving
from lrjax.strategies.joint import Joint, joint_of

# The least memory is taken with which all operations stay within this multiple of column's (a
# forward pass done again is 4/3).
MAX_OPERATIONS = 1.5
# Budgets that are tried are what exists whole without one, halved so often; no bisection, for to
# hold less at one boundary may cost less at the next.
_COARSE, _FINER = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0), (0.25, 0.125)


def residuals(
    program: FlatProgram, axes: Sequence[int | None], wrt: Sequence[int]
) -> tuple[Joint, set[int], float]:
    """What the forward pass saves for the gradient with respect to the inputs ``wrt``.

    Returns:
      The program and its gradient as one, values of it that are kept between the passes, and the
      bytes that may exist whole while a row loop of either pass runs.
    """
    graph = build(program, axes)
    made = {v for equation in program.equations for v in equation.outputs}
    # What fun compares with its operand is computed again from what the operand then is.
    made -= compared_extremes(program)
    late = _ends_of_stages(graph) | worth_saving(graph, wrt)
    joint = joint_of(program, wrt, made & (late | graph.streamed))
    saved, budget = {joint.place[v] for v in late if v in joint.place}, math.inf
    if len(graph.loops) > 1:
        held, budget = _worth_holding(joint, axes, graph)
        saved |= held
    return joint, saved, budget


def cotangent_axes(graph: RowGraph) -> list[int | None]:
    """Row axes of the cotangents that a program's gradient takes: those of its outputs."""
    program = graph.program
    return [graph.axis_of(v) for v in program.outputs if is_inexact(program.aval(v))]


def _ends_of_stages(graph: RowGraph) -> set[int]:
    """Results of reductions over rows and of column operations that depend on rows, the maps that
    column operations take whole (they exist whole anyway), and what effects give."""
    found: set[int] = set()
    for node, home in zip(graph.nodes, graph.stages.home, strict=True):
        is_late = isinstance(node, ColumnNode) and home > 0
        if node.is_reduction or is_late or node.equation.has_effects:
            found.update(node.equation.outputs)
        if isinstance(node, ColumnNode):
            found.update(graph.streamed.intersection(node.equation.values))
    return found


def _worth_holding(
    joint: Joint, axes: Sequence[int | None], forward: RowGraph
) -> tuple[set[int], float]:
    """Row values that cross from the forward to the backward pass, and the budget."""
    both = build(joint.program, [*axes, *cotangent_axes(forward)])
    border = len(forward.stages.members) - 1
    places = {place for v, place in joint.place.items() if v in forward.streamed}
    problem = stage_problem(
        both.program,
        both.nodes,
        both.streamed,
        both.row_axis,
        both.compared,
        available=dict.fromkeys(joint.cotangents, border + 1),
        pinned={border: both.streamed - places},
    )
    stages, budget = _leanest(problem)
    return set(stages.crossing[border] & places), budget


def _leanest(problem: Problem) -> tuple[Stages, float]:
    """The stages of least memory within ``MAX_OPERATIONS``, and their budget.

    Budgets are tried in coarse steps until they ask for too many operations, then in finer ones on
    both sides of the best.
    """
    once = sum(o.flops for o in problem.operations if math.isfinite(o.flops))
    best = cut_into_stages(problem)
    most = best.peak_bytes(problem)
    chosen, budget, least = 0.0, math.inf, most

    def is_affordable(exponent: float) -> bool:
        nonlocal best, chosen, budget, least
        limit = most * 2.0**-exponent
        found = cut_into_stages(problem, limit)
        if found.flops(problem) > MAX_OPERATIONS * once:
            return False
        peak = found.peak_bytes(problem)
        if peak < least:
            best, chosen, budget, least = found, exponent, limit, peak
        return True

    for exponent in _COARSE:
        if not is_affordable(exponent):
            break
    for step in _FINER:
        for exponent in (chosen - step, chosen + step):
            is_affordable(exponent)
    return best, budget
