"""One step of a row loop, as operations on slabs, windows and line buffers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
from jax import lax

from lrjax.loop.line_buffers import takes_slab
from lrjax.loop.rowloop import Band, RowLoop, Source
from lrjax.planner.compilers import EXTEND, KERNEL_GRADIENT, WINDOW, compiled
from lrjax.planner.liveness import Kind, Liveness, Operation
from lrjax.rowgraph.graph import RowGraph, size_bytes
from lrjax.rules.base import traits_of


def row_bytes(graph: RowGraph, value: int) -> float:
    return size_bytes(graph.program.avals[value]) / max(graph.height(value), 1)


def line_bytes(loop: RowLoop, *, deep_only: bool = False) -> float:
    """Bytes of all line buffers of a loop, or of those that shift rows older than the newest slab.

    What is kept of the newest slab alone is written in place.
    """

    def is_deep(value: int) -> bool:
        return not loop.is_ring(value) and loop.line_rows(value) > loop.track(value).rows

    return sum(
        row_bytes(loop.graph, v) * loop.line_rows(v)
        for v in loop.producer
        if not deep_only or is_deep(v)
    )


class Step:
    """What one step of a loop does, as far as bytes go.

    Line buffers are outside: they exist throughout. A value whose buffer shifts is extended in the
    step: its slab, and the older rows, become the rows that can be read. A ring is written in
    place. Windows that are not all of what is at hand are copies.

    Attributes:
      operations: of the loop's nodes, and its own: ``WINDOW``, ``EXTEND`` and "branch".
      size: bytes of every value.
      kept: values that exist when the step ends.
      older: what stands for the older rows of a value whose line buffer shifts.
      conditional: indices of the operations that are in a branch.
      next: the first number that no value has.
    """

    def __init__(self, loop: RowLoop):
        self.loop = loop
        self.avals = loop.graph.program.avals
        self.operations: list[Operation] = []
        self.size: dict[int, float] = {}
        self.moved: dict[int, float] = {}
        self.kept: set[int] = set()
        self.older: dict[int, int] = {}
        self.slab: dict[int, int] = {}
        self.next = len(self.avals)
        self.moved.update((v, float(size_bytes(self.avals[v]))) for v in loop.wholes)
        for v in loop.producer:
            self._place(v)
        branches = {band.nodes[-1]: band for band in loop.bands if self._is_branch(band)}
        skipped = {i for band in branches.values() for i in band.nodes}
        self.conditional: set[int] = set()
        for i in range(len(loop.nodes)):
            start = len(self.operations)
            self._run(i)
            if i in skipped:
                self.conditional.update(range(start, len(self.operations)))
            if i in branches:
                self._end_branch(branches[i])

    def liveness(self, target: str) -> Liveness:
        operations = compiled(self.operations, self.size, self.next, target)
        return Liveness(operations, self.size, after=frozenset(self.kept), moved=self.moved)

    def fresh(self, size: float) -> int:
        self.size[self.next] = size
        self.next += 1
        return self.next - 1

    def _is_branch(self, band: Band) -> bool:
        return (band.first, band.last) != (0, self.loop.steps - 1)

    def _place(self, value: int) -> None:
        loop, track = self.loop, self.loop.track(value)
        per_row = row_bytes(loop.graph, value)
        if loop.line_rows(value) and not loop.is_ring(value):
            self.size[value] = per_row * track.depth
            self.slab[value] = self.fresh(per_row * track.rows)
            self.older[value] = self.fresh(0.0)
            self.moved[self.older[value]] = per_row * (track.depth - track.rows)
        else:
            self.size[value] = per_row * track.rows

    def _run(self, index: int) -> None:
        node, track = self.loop.nodes[index], self.loop.schedule.tracks[index]
        sources = {s.operand: s for s in self.loop.sources_of(index)}
        inputs = tuple(
            self._window(sources[operand]) if operand in sources else v
            for operand, v in enumerate(node.equation.inputs)
            if isinstance(v, int)
        )
        head = node.equation.outputs[0]
        like = _rows_of(self.avals[head], self.loop.graph.row_axis.get(head), track.rows)
        made = tuple(self.slab.get(v, v) for v in node.equation.outputs)
        what: Any = node.equation.primitive
        kind = traits_of(what).kind
        if node.is_reduction and what is lax.conv_general_dilated_p:
            what = KERNEL_GRADIENT
        assert node.op is not None
        flops = node.op.flops * track.rows
        self.operations.append(Operation(what, inputs, made, kind, like, flops=flops))
        for v in node.equation.outputs:
            if v in self.slab:
                self._extend(v)
            if node.is_reduction:
                self.size[v] = float(size_bytes(self.avals[v]))
                if len(self.loop.bands) > 1:
                    self.kept.add(v)  # added to the accumulators when all branches are done

    def _window(self, source: Source) -> int:
        """What an operation reads: all that is at hand, or a copy of some rows."""
        loop, value, axis = self.loop, source.value, source.read.axis
        if self._is_slab(source):
            return self.slab.get(value, value)
        start, stop = loop.window(source, 0)
        aval = self.avals[value]
        size = size_bytes(aval) / max(aval.shape[axis], 1) * (stop - start)
        if value in loop.producer and not loop.is_ring(value) and self.size[value] == size:
            return value
        window = self.fresh(size)
        like = _rows_of(aval, axis, stop - start)
        self.operations.append(Operation(WINDOW, (value,), (window,), Kind.FUSED, like))
        return window

    def _is_slab(self, source: Source) -> bool:
        """The rows that are read are the newest slab, without a copy."""
        loop, value = self.loop, source.value
        if value not in loop.producer or loop.is_ring(value):
            return False
        rows, size = loop.track(value).rows, loop.window_rows(source)
        backs = {int(back) for back in loop.look_back(source)}
        return all(takes_slab(back, size, source.read.slack, rows) for back in backs)

    def _extend(self, value: int) -> None:
        axis = self.loop.graph.row_axis[value]
        like = _rows_of(self.avals[value], axis, self.loop.track(value).depth)
        read = self.slab[value], self.older[value]
        self.operations.append(Operation(EXTEND, read, (value,), Kind.FUSED, like))

    def _end_branch(self, band: Band) -> None:
        """What a branch reads exists until it is done."""
        nodes = [self.loop.nodes[i] for i in band.nodes]
        inside = {v for node in nodes for v in node.equation.outputs}
        outside = {v for node in nodes for v in node.row_inputs() if v in self.size} - inside
        done = self.fresh(0.0)
        self.operations.append(Operation("branch", tuple(outside), (done,), Kind.LIBRARY))


def _rows_of(aval: Any, axis: int | None, rows: int) -> jax.ShapeDtypeStruct:
    """Shape and dtype of some rows of a value."""
    shape = list(aval.shape)
    if axis is not None:
        shape[axis] = rows
    return jax.ShapeDtypeStruct(tuple(shape), aval.dtype)


def kernels_read(loop: RowLoop) -> Collection[int]:
    """Whole values that are kernels of a loop's convolutions."""
    found = (
        node.equation.inputs[1]
        for node in loop.nodes
        if node.equation.primitive is lax.conv_general_dilated_p
    )
    return dict.fromkeys(v for v in found if isinstance(v, int) and v in loop.wholes)
