"""What stream's forward pass saves for its backward pass.

Whatever ends a stage is saved in any case, so that the recomputed forward has no barriers. The
backward pass of a network with barriers has barriers of its own, and would compute the same maps
again behind each of them; there, the maps that are worth holding are found by the minimum cut of
``stages``, on forward and backward as one program.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lrjax.program.comparisons import compared_extremes, simpler_comparisons
from lrjax.program.compatibility import tag_of
from lrjax.program.inline import FlatProgram, flatten, function_of, replaced_at
from lrjax.program.varying import is_inexact, struct_like
from lrjax.rowgraph.graph import ColumnNode, RowGraph, build, stage_problem
from lrjax.rowgraph.stages import Problem, Stages, cut_into_stages

# The least memory is taken with which all operations stay within this multiple of column's (a
# forward pass done again is 4/3).
MAX_OPERATIONS = 1.5
# Budgets that are tried, as fractions of what exists whole without one. Not a bisection: to hold
# less at one boundary may cost less at the next.
_FRACTIONS = tuple(2.0 ** (-k / 4) for k in range(13))


@dataclasses.dataclass(frozen=True)
class Saved:
    """What is kept between the passes.

    Attributes:
      names: values of the program, with names for a checkpoint policy.
      budget: bytes that may exist whole while a row loop of either pass runs.
    """

    names: dict[int, str]
    budget: float


def residuals(program: FlatProgram, axes: Sequence[int | None], wrt: Sequence[int]) -> Saved:
    """What the forward pass saves for the gradient with respect to the inputs ``wrt``."""
    graph = build(program, axes)
    late = _ends_of_stages(graph)
    budget = math.inf
    if len(graph.loops) > 1:
        held, budget = _worth_holding(program, axes, graph, wrt)
        late |= held
    made = {v for equation in program.equations for v in equation.outputs}
    # What fun compares with its operand is computed again from what the operand then is.
    return Saved(_names((late & made) - compared_extremes(program)), budget)


def _names(values: set[int]) -> dict[int, str]:
    return {v: f"lrjax_{v}" for v in sorted(values)}


def _ends_of_stages(graph: RowGraph) -> set[int]:
    """Results of reductions over rows and of column operations that depend on rows, and the maps
    that column operations take whole (they exist whole anyway)."""
    found: set[int] = set()
    for node, home in zip(graph.nodes, graph.stages.home, strict=True):
        if node.is_reduction or (isinstance(node, ColumnNode) and home > 0):
            found.update(node.equation.outputs)
        if isinstance(node, ColumnNode):
            found.update(graph.streamed.intersection(node.equation.values))
    return found


def _worth_holding(
    program: FlatProgram, axes: Sequence[int | None], forward: RowGraph, wrt: Sequence[int]
) -> tuple[set[int], float]:
    """Row values that cross from the forward to the backward pass, and the budget."""
    names = _names(set(forward.streamed))
    joint = _joint_graph(program, axes, forward, wrt, names)
    value_of = {name: v for v, name in names.items()}
    tagged = {
        node.equation.outputs[0]: value_of[tag]
        for node in joint.nodes
        for tag in [tag_of(node.equation)]
        if tag in value_of
    }
    border = len(forward.stages.members) - 1
    count = sum(is_inexact(program.aval(v)) for v in program.outputs)
    cotangents = joint.program.inputs[len(joint.program.inputs) - count :]
    problem = stage_problem(
        joint.program,
        joint.nodes,
        joint.streamed,
        joint.row_axis,
        joint.compared,
        available=dict.fromkeys(cotangents, border + 1),
        pinned={border: joint.streamed - tagged.keys()},
    )
    stages, budget = _leanest(problem)
    return {tagged[v] for v in stages.crossing[border] if v in tagged}, budget


def _leanest(problem: Problem) -> tuple[Stages, float]:
    """The stages of least memory within ``MAX_OPERATIONS``, and their budget."""
    once = sum(o.flops for o in problem.operations if math.isfinite(o.flops))
    best, budget = cut_into_stages(problem), math.inf
    most = least = best.peak_bytes(problem)
    for fraction in _FRACTIONS:
        found = cut_into_stages(problem, fraction * most)
        peak = found.peak_bytes(problem)
        if found.flops(problem) <= MAX_OPERATIONS * once and peak < least:
            best, budget, least = found, fraction * most, peak
    return best, budget


def _joint_graph(
    program: FlatProgram,
    axes: Sequence[int | None],
    forward: RowGraph,
    wrt: Sequence[int],
    names: dict[int, str],
) -> RowGraph:
    """Outputs and gradients as one program, with the row values of the forward pass named."""
    outputs = [program.aval(v) for v in program.outputs]
    inexact = [i for i, out in enumerate(outputs) if is_inexact(out)]

    def joint(*arrays: Any) -> Any:
        inputs, moving_cotangents = arrays[: len(axes)], arrays[len(axes) :]
        function, moving = function_of(program, wrt, inputs, names)
        values, pull = jax.vjp(function, *moving)
        zeros = [np.zeros(out.shape, jax.dtypes.float0) for out in outputs]
        return values, pull(replaced_at(zeros, inexact, moving_cotangents))

    structs = [struct_like(outputs[i]) for i in inexact]
    out_axes = [*map(forward.axis_of, program.outputs)]
    traced = simpler_comparisons(flatten(jax.make_jaxpr(joint)(*program.structs, *structs)))
    return build(traced, [*axes, *(out_axes[i] for i in inexact)])
