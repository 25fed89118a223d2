"""What a segment computes under its strategies, made once and kept while the segment is in use.

A plan search asks about a segment many times, in many numbers of blocks. Tracing, differentiating
and cutting it into stages takes far longer than a schedule of blocks, and does not depend on them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from lrjax.planner.whole import Joint, equation_operations, joint_program
from lrjax.program.inline import FlatProgram
from lrjax.rowgraph.segments import Segment
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
    return sum(equation_operations(program, equation) for equation in program.equations)


def operations_of(rows: RowProgram) -> float:
    """Operations of the steps on a device, rows outside the image included that they compute."""
    return _executed(rows)[0]


def repetition(rows: RowProgram) -> float:
    """Operations of the steps over those of the rows that a device owns."""
    done, once = _executed(rows)
    return done / once if once else 1.0


def _executed(rows: RowProgram) -> tuple[float, float]:
    """Operations of all steps, and of the image's rows alone: of a device's share of them."""
    done, once = 0.0, 0.0
    for loop in filter(None, rows.loops):
        for i, (node, task) in enumerate(zip(loop.nodes, loop.schedule.tasks, strict=True)):
            once += node.op.flops * task.height
            done += node.op.flops * max(loop.executed_rows(i), task.height)
    return done, once
