"""Segments that run by rows: what exists while row loops run."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from lrjax.loop.rowloop import RowLoop
from lrjax.loop.small_sums import MOST_ELEMENTS
from lrjax.planner.compilers import compiled, in_main_memory, is_gpu, is_tpu
from lrjax.planner.kernels import kernel_seconds, seconds
from lrjax.planner.liveness import Kind, Liveness, Operation
from lrjax.planner.steps import Step, kernels_read, line_bytes, row_bytes
from lrjax.planner.whole import equation_operations, values
from lrjax.roofline import Rates, rates_of
from lrjax.rowgraph.graph import Node, size_bytes
from lrjax.rules.base import traits_of
from lrjax.rules.block_sums import accumulator_dtype
from lrjax.strategies.programs import RowProgram


def program_liveness(rows: RowProgram, free: Collection[int], target: str) -> Liveness:
    """A row program as a sequence of column operations and row loops.

    Args:
      rows: the program.
      free: inputs and outputs that take nothing here (arguments, parameter gradients).
      target: the device.
    """
    events = _Events(rows, free, target)
    for stage, loop in enumerate(rows.loops):
        for node in rows.graph.column_nodes(stage):
            events.run_column(node)
        if loop is not None:
            events.run_loop(loop)
    return events.liveness()


class _Events:
    """Column operations and row loops, in order."""

    def __init__(self, rows: RowProgram, free: Collection[int], target: str):
        graph = rows.graph
        self.program, self.free, self.target = graph.program, free, target
        self.rows = rows
        self.avals = graph.program.avals
        self.size = {v: self.bytes_of(v) for v in range(len(self.avals)) if v not in free}
        self.next = len(self.avals)
        self.made = {v for node in graph.nodes for v in node.equation.outputs}
        self.copies: dict[int, int] = {}
        self.operations: list[Operation] = []

    def bytes_of(self, value: int) -> float:
        return device_bytes(self.rows, value)

    def fresh(self, size: float) -> int:
        self.size[self.next] = size
        self.next += 1
        return self.next - 1

    def run_column(self, node: Node) -> None:
        equation = node.equation
        what, kind = equation.primitive, traits_of(equation.primitive).kind
        like, read = self.avals[equation.outputs[0]], values(equation.inputs)
        flops = equation_operations(self.program, equation)
        self.operations.append(Operation(what, read, equation.outputs, kind, like, flops=flops))

    def run_loop(self, loop: RowLoop) -> None:
        read = dict.fromkeys((*loop.arrays, *loop.wholes, *self._kernel_copies(loop)))
        sums = [v for n in loop.nodes if n.is_reduction for v in n.equation.outputs]
        wide = {v: self.fresh(accumulator_bytes(self.avals[v])) for v in sums if self._is_wide(v)}
        # On TPUs both are counted: predictions are nearer so. Whether XLA holds both is not known.
        given = sums if is_tpu(self.target) else [v for v in sums if v not in wide]
        made = (*loop.row_outputs, *given, *wide.values())
        lives = Step(loop).liveness(self.target)
        step = in_main_memory(lives.peak(), self.target)
        inside = line_bytes(loop) + step
        if len(loop.bands) == 1:
            # Rows that shift are written to a second buffer and copied back when the step is done;
            # the results of branches are that second buffer.
            inside += line_bytes(loop, deep_only=True)
        time = loop_seconds(loop, lives, self.target)
        loops = Operation("row loop", tuple(read), made, Kind.LIBRARY, scratch=inside, seconds=time)
        self.operations.append(loops)
        for v in (v for v in sums if v not in given):
            like = self.avals[v]
            self.operations.append(Operation("narrow", (wide[v],), (v,), Kind.FUSED, like))

    def _is_wide(self, value: int) -> bool:
        """Reductions are summed in float32; one in float32 is summed in its own place."""
        return accumulator_bytes(self.avals[value]) != self.bytes_of(value)

    def _kernel_copies(self, loop: RowLoop) -> list[int]:
        """XLA:GPU's libraries read kernels in another layout than arguments have."""
        if not is_gpu(self.target):
            return []
        kernels = [v for v in kernels_read(loop) if v not in self.made]
        for v in kernels:
            if v not in self.copies:
                self.copies[v] = self.fresh(self.bytes_of(v))
                self.operations.append(Operation("kernel copy", (), (self.copies[v],), Kind.ROOT))
        return [self.copies[v] for v in kernels]

    def liveness(self) -> Liveness:
        outputs = frozenset(values(self.program.outputs))
        inputs = frozenset(self.program.inputs)
        operations = compiled(self.operations, self.size, self.next, self.target)
        moved = {v: self.bytes_of(v) for v in self.free}
        hosts = {v: self.bytes_of(v) for v in outputs.intersection(self.free) - inputs}
        return Liveness(
            operations, self.size, before=inputs, after=outputs, hosts=hosts, moved=moved
        )


def device_bytes(rows: RowProgram, value: int) -> float:
    """Bytes of a value on a device: of what carries rows its share."""
    whole = float(size_bytes(rows.graph.program.avals[value]))
    return whole / rows.devices if value in rows.graph.row_axis else whole


def loop_seconds(loop: RowLoop, step: Liveness, target: str) -> float:
    """All steps of a loop: the kernels of a step, and what it does to what outlives it."""
    rates = rates_of(target)
    graph, avals = loop.graph, loop.graph.program.avals
    branches = sum((b.first, b.last) != (0, loop.steps - 1) for b in loop.bands)
    total = seconds(step, rates) + branches * rates.branch_s
    for v in loop.producer:
        rows = loop.line_rows(v)
        slab = row_bytes(graph, v) * loop.track(v).rows
        if rows and loop.is_ring(v):
            total += kernel_seconds(rates, 0.0, 2 * slab)
        elif rows:
            total += kernel_seconds(rates, 0.0, 2 * row_bytes(graph, v) * rows)
        if v in loop.row_outputs:
            total += kernel_seconds(rates, 0.0, 2 * slab)
    sums = [avals[v] for n in loop.nodes if n.is_reduction for v in n.equation.outputs]
    return loop.full_steps * (total + accumulation_seconds(sums, rates))


def accumulation_seconds(sums: Iterable[Any], rates: Rates) -> float:
    """Of adding up arrays in a step; the small ones are one vector (``loop.small_sums``)."""
    total = small = 0.0
    for aval in sums:
        moved = 2 * accumulator_bytes(aval) + size_bytes(aval)
        if aval.size <= MOST_ELEMENTS:
            small += moved
        else:
            total += kernel_seconds(rates, 0.0, moved)
    return total + (kernel_seconds(rates, 0.0, small) if small else 0.0)


def accumulator_bytes(aval: Any) -> float:
    """Bytes of the accumulator of a reduction."""
    return float(aval.size * accumulator_dtype(aval.dtype).itemsize)
