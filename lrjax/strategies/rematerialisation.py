"""Rows recomputed just before a second reader, instead of waiting in a line buffer.

In a gradient, a forward value has readers at two times: the next layer at once, the layer's own
gradient when the cotangents have come back, a round trip later. Until then its rows wait in a line
buffer, unless they are computed again when they are wanted: from the image, which exists whole, or
from a narrower value that waits in their place. Which values wait is a minimum cut again (see
``stages``): bytes of line buffers against operations.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable

import numpy as np

from lrjax.loop.rowloop import RowLoop
from lrjax.program.inline import Atom
from lrjax.rowgraph.graph import RowGraph, RowNode
from lrjax.rowgraph.stages import MinimumCuts, Operation, Problem

# Shares of a loop's operations that may be done again, and how many percent the line buffers must
# shrink for every percent of operations.
EXTRA_OPERATIONS = (0.02, 0.1)
WORTH_OPERATIONS = 8
# Copies wait for their own readers; what part of the share is for copies of copies. Little is
# enough: in a gradient, a map and what an elementwise operation made of it often wait side by side.
COPIES_OF_COPIES = 0.1
# A reader is late if its rows are this many slabs behind those of the first reader, and more than
# the halo of a window or two.
_LATE_SLABS = 1
_LATE_ROWS = 8
_RATES = tuple(2.0 ** (k / 4) for k in range(160, 0, -1))


def with_rematerialised_reads(
    graph: RowGraph, stage: int, loop_of: Callable[[RowGraph, int], RowLoop]
) -> RowGraph:
    """The graph, with copies of operations in a stage that run just before late readers.

    Args:
      graph: the graph.
      stage: number of the stage.
      loop_of: schedules a stage of a graph.
    """
    first = loop_of(graph, stage)
    if not _late_sources(first):
        return graph
    found = [first]
    for share in EXTRA_OPERATIONS:
        loop = first
        for part in (1 - COPIES_OF_COPIES, COPIES_OF_COPIES):
            made = _copied(loop, stage, part * share * _operations(first))
            loop = loop if made is loop.graph else loop_of(made, stage)
        found.append(loop)

    once = max(_operations(first), 1)  # a loop may move rows only

    def cost(loop: RowLoop) -> float:
        return loop.line_bytes * (_operations(loop) / once) ** WORTH_OPERATIONS

    return min(found, key=cost).graph


def _operations(loop: RowLoop) -> float:
    return sum(node.operations for node in loop.nodes)


def _copied(loop: RowLoop, stage: int, allowed: float) -> RowGraph:
    """The loop's graph with the copies that make its line buffers smallest."""
    late = _late_sources(loop)
    if not late:
        return loop.graph
    copied = _worth_copying(loop, late, allowed)
    return _Copier(loop, stage, late, copied).graph() if copied else loop.graph


def _late_sources(loop: RowLoop) -> set[tuple[int, int]]:
    """Reads, by node and operand, of rows that others have read long before."""
    found: set[tuple[int, int]] = set()
    for value, sources in loop.readers.items():
        if value not in loop.producer or len(sources) == 1:
            continue
        back = {s: int(np.max(loop.look_back(s))) for s in sources}
        margin = max(_LATE_SLABS * loop.track(value).rows, _LATE_ROWS)
        found.update(
            (s.node, s.operand)
            for s in sources
            if back[s] > min(back.values()) + margin and not _must_not_copy(loop, s.node)
        )
    return found


def _must_not_copy(loop: RowLoop, index: int) -> bool:
    """An extreme, or what compares it: both read the same rows, not copies."""
    equation = loop.nodes[index].equation
    return not loop.graph.compared.isdisjoint((*equation.values, *equation.outputs))


def _worth_copying(loop: RowLoop, late: set[tuple[int, int]], allowed: float) -> set[int]:
    """Nodes to do again late, with ``allowed`` operations."""
    wanted = frozenset(s.value for s in loop.sources if (s.node, s.operand) in late)
    problem = _problem(loop, late)
    cuts = MinimumCuts(problem, [0] * len(loop.nodes))

    def copies(rate: float) -> set[int]:
        held = cuts.cheapest(0, wanted, frozenset(), rate)
        needed = set(wanted - held)
        found: set[int] = set()
        for i in reversed(range(len(loop.nodes))):
            if needed.intersection(loop.nodes[i].equation.outputs):
                found.add(i)
                inputs = problem.operations[i].inputs
                needed.update(v for v in inputs if v in loop.producer and v not in held)
        return found

    def is_affordable(rate: float) -> bool:
        return sum(problem.operations[i].flops for i in copies(rate)) <= allowed

    first = bisect.bisect_left(_RATES, True, key=is_affordable)
    return copies(_RATES[first]) if first < len(_RATES) else set()


def _problem(loop: RowLoop, late: set[tuple[int, int]]) -> Problem:
    """The loop as a cutting problem: a value costs the line buffer it would wait in."""
    delay: dict[int, float] = {}  # steps from a value's production to its last late reader
    for i in reversed(range(len(loop.nodes))):
        node = loop.nodes[i]
        behind = max((delay.get(v, 0.0) for v in node.equation.outputs), default=0.0)
        for source in loop.sources_of(i):
            if source.value not in loop.producer:
                continue
            own = 0.0
            if (i, source.operand) in late:
                own = int(np.max(loop.look_back(source))) / max(loop.track(source.value).rows, 1)
            reach = own if node.is_reduction else max(own, behind)
            delay[source.value] = max(delay.get(source.value, 0.0), reach)
    operations = []
    for i, node in enumerate(loop.nodes):
        is_fixed = node.equation.has_effects or _must_not_copy(loop, i)
        flops = math.inf if is_fixed else node.operations
        inputs, outputs = tuple(node.equation.values), node.equation.outputs
        operations.append(Operation(inputs, outputs, True, node.is_reduction, flops))
    size = {
        v: math.ceil(loop.graph.row_bytes(v) * loop.track(v).rows * max(delay.get(v, 0.0), 1.0))
        for v in loop.producer
    }
    return Problem(tuple(operations), frozenset(), size)


class _Copier:
    """Builds the graph with copies, each just before the first operation that reads it."""

    def __init__(self, loop: RowLoop, stage: int, late: set[tuple[int, int]], copied: set[int]):
        self.loop, self.stage, self.late, self.copied = loop, stage, late, copied
        self.avals = list(loop.graph.program.avals)
        self.copy_of: dict[int, int] = {}
        self.copies: set[int] = set()
        self.order: list[RowNode] = []

    def graph(self) -> RowGraph:
        for i, node in enumerate(self.loop.nodes):
            inputs = tuple(
                self.late_value(v) if (i, operand) in self.late else v
                for operand, v in enumerate(node.equation.inputs)
            )
            equation = dataclasses.replace(node.equation, inputs=inputs)
            self.order.append(dataclasses.replace(node, equation=equation))
        return self.assembled()

    def late_value(self, value: Atom) -> Atom:
        """The copy of a value, made now if need be; the value itself if it waits."""
        if not isinstance(value, int) or self.loop.producer.get(value) not in self.copied:
            return value
        if value not in self.copy_of:
            node = self.loop.nodes[self.loop.producer[value]]
            inputs = tuple(map(self.late_value, node.equation.inputs))
            outputs = tuple(map(self.fresh, node.equation.outputs))
            equation = dataclasses.replace(node.equation, inputs=inputs, outputs=outputs)
            self.order.append(dataclasses.replace(node, equation=equation))
        return self.copy_of[value]

    def fresh(self, value: int) -> int:
        self.avals.append(self.avals[value])
        self.copy_of[value] = len(self.avals) - 1
        self.copies.add(self.copy_of[value])
        return self.copy_of[value]

    def assembled(self) -> RowGraph:
        graph, stages = self.loop.graph, self.loop.graph.stages
        members = stages.members[self.stage]
        elsewhere = {i for s, m in enumerate(stages.members) if s != self.stage for i in m}
        nodes, number = list(graph.nodes), {}
        originals = (node for node in self.order if not self.is_copy(node))
        for i, node in zip(members, originals, strict=True):
            # What another stage recomputes must not read the copies of this one.
            if node.equation.inputs != nodes[i].equation.inputs and i in elsewhere:
                number[id(node)] = len(nodes)
                nodes.append(node)
            else:
                number[id(node)] = i
                nodes[i] = node
        for node in filter(self.is_copy, self.order):
            number[id(node)] = len(nodes)
            nodes.append(node)
        own = tuple(number[id(node)] for node in self.order)
        every = [own if s == self.stage else m for s, m in enumerate(stages.members)]
        added = len(nodes) - len(graph.nodes)
        return dataclasses.replace(
            graph,
            program=dataclasses.replace(
                graph.program,
                avals=tuple(self.avals),
                equations=tuple(node.equation for node in nodes),
            ),
            nodes=tuple(nodes),
            row_axis=graph.row_axis | {c: graph.row_axis[v] for v, c in self.copy_of.items()},
            streamed=graph.streamed | frozenset(self.copy_of.values()),
            rate=graph.rate | {c: graph.rate[v] for v, c in self.copy_of.items()},
            stages=dataclasses.replace(
                stages, home=(*stages.home, *[self.stage] * added), members=tuple(every)
            ),
        )

    def is_copy(self, node: RowNode) -> bool:
        return not self.copies.isdisjoint(node.equation.outputs)
