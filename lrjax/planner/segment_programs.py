"""What a segment computes under its strategies, made once and kept while the segment is in use.

A plan search asks about a segment many times, in many numbers of blocks. Tracing, differentiating
and cutting it into stages takes far longer than a schedule of blocks, and does not depend on them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from lrjax.planner.whole import Joint, joint_program
from lrjax.program.inline import FlatEquation, FlatProgram
from lrjax.rowgraph.segments import Segment
from lrjax.rules.base import Equation, Operand, traits_of
from lrjax.strategies.programs import RowProgram

# Segments whose programs are kept. A search that cuts at a hundred places has no use for old ones.
KEPT = 64

Result = TypeVar("Result")


class _ByIdentity:
    """A segment as a key: the same if it is the same object."""

    def __init__(self, segment: Segment):
        self.segment = segment

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and other.segment is self.segment

    def __hash__(self) -> int:
        return id(self.segment)


def _once(make: Callable[..., Result]) -> Callable[..., Result]:
    cached = functools.lru_cache(maxsize=KEPT)(lambda key, *rest: make(key.segment, *rest))

    @functools.wraps(make)
    def call(segment: Segment, *rest: Any) -> Result:
        return cached(_ByIdentity(segment), *rest)

    return call


@_once
def joint_of(segment: Segment, wrt: tuple[int, ...]) -> Joint:
    return joint_program(segment.program, wrt)


@_once
def column_operations(segment: Segment, wrt: tuple[int, ...]) -> float:
    """Operations of both passes by whole maps."""
    return program_operations(joint_of(segment, wrt).program)


def program_operations(program: FlatProgram) -> float:
    """Operations of a flat program, counted as the rules count a row graph's."""
    return sum(_equation_operations(program, equation) for equation in program.equations)


def _equation_operations(program: FlatProgram, equation: FlatEquation) -> float:
    described = Equation(
        equation.primitive,
        equation.params,
        tuple(Operand(a.shape, a.dtype, None) for a in map(program.aval, equation.inputs)),
        tuple(program.avals[v] for v in equation.outputs),
    )
    return traits_of(equation.primitive).operations(described)


def operations_of(rows: RowProgram) -> float:
    """Operations of the row loops, those that are done again in later stages included."""
    graph = rows.graph
    nodes = (node for stage in graph.loops for node in graph.stage_nodes(stage))
    return sum(n.op.flops * n.op.height for n in nodes if n.op is not None)


def repetition(rows: RowProgram) -> float:
    """Operations of the steps, overlapping rows included, over those of the image's rows."""
    done, once = 0.0, 0.0
    for loop in filter(None, rows.loops):
        for node, track in zip(loop.nodes, loop.schedule.tracks, strict=True):
            assert node.op is not None
            once += node.op.flops * node.op.height
            done += node.op.flops * max(loop.steps * track.rows, node.op.height)
    return done / once if once else 1.0
