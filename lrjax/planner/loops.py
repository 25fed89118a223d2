"""Segments that run by rows: what exists while row loops run."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import jax

from lrjax.autodiff import RowProgram
from lrjax.engine import accumulator_dtype
from lrjax.graph import RowGraph, size_bytes
from lrjax.planner.compilers import compiled, is_tpu, kind_of
from lrjax.planner.liveness import Kind, Liveness, Operation
from lrjax.planner.whole import values
from lrjax.rowloop import RowLoop


def row_bytes(graph: RowGraph, value: int) -> float:
    return size_bytes(graph.program.avals[value]) / max(graph.height(value), 1)


def program_liveness(rows: RowProgram, free: Collection[int], target: str) -> Liveness:
    """A row program as a sequence of column operations and row loops.

    Args:
      rows: the program.
      free: inputs and outputs that take nothing here (arguments, parameter gradients).
      target: the device.
    """
    graph = rows.graph
    avals = graph.program.avals
    size = {v: float(size_bytes(avals[v])) for v in range(len(avals)) if v not in free}
    fresh = len(avals)
    copies: dict[int, int] = {}
    maker = {v for node in graph.nodes for v in node.equation.outputs}
    operations: list[Operation] = []
    for stage, loop in enumerate(rows.loops):
        for node in graph.column_nodes(stage):
            equation = node.equation
            kind = kind_of(equation.primitive)
            like = graph.program.avals[equation.outputs[0]]
            read = values(equation.inputs)
            operations.append(
                Operation(equation.primitive.name, read, equation.outputs, kind, like)
            )
        if loop is not None:
            sums = [v for n in loop.nodes if n.is_reduction for v in n.equation.outputs]
            read = tuple(dict.fromkeys((*loop.arrays, *loop.wholes)))
            made = (*loop.row_outputs, *sums)
            inner = loop_bytes(loop, target)
            for v in () if is_tpu(target) else kernels_read(loop).difference(maker):
                if v not in copies:
                    copies[v] = fresh
                    fresh += 1
                    size[copies[v]] = float(size_bytes(avals[v]))
                    operations.append(Operation("copy", (), (copies[v],), Kind.ROOT))
            read += tuple(copies[v] for v in kernels_read(loop) if v in copies)
            wide = {v: accumulator_bytes(loop, v) for v in sums}
            for v in sums:
                if v in free and wide[v] == size_bytes(avals[v]):
                    continue
                size[fresh] = wide[v]
                made = (*made, fresh)
                fresh += 1
            operations.append(Operation("row loop", read, made, Kind.LIBRARY, scratch=inner))
    outputs = frozenset(values(graph.program.outputs))
    inputs = frozenset(graph.program.inputs)
    operations = compiled(operations, size, fresh, target)
    hosts = {v: float(size_bytes(avals[v])) for v in outputs.intersection(free) - inputs}
    return Liveness(operations, size, before=inputs, after=outputs, hosts=hosts)


def kernels_read(loop: RowLoop) -> set[int]:
    """Whole values that are kernels of convolutions."""
    found = (
        node.equation.inputs[1]
        for node in loop.nodes
        if node.equation.primitive.name == "conv_general_dilated"
    )
    return {v for v in found if isinstance(v, int) and v in loop.wholes}


def loop_bytes(loop: RowLoop, target: str) -> float:
    """Bytes of line buffers, and of whatever else exists only within a step, at its worst."""
    return line_bytes(loop) + step_of(loop).liveness(target).peak()


def accumulator_bytes(loop: RowLoop, value: int) -> float:
    aval = loop.graph.program.avals[value]
    return float(aval.size * accumulator_dtype(aval.dtype).itemsize)


@dataclasses.dataclass
class Step:
    """One step of a row loop as named operations on slabs, windows and line buffers.

    Attributes:
      operations: with the names of their primitives; "window" and "extend" are the loop's own.
      size: bytes of every value.
      kept: values that exist when the step ends.
      older: stand-ins for what line buffers hold when the step starts.
      wholes: whole values read.
      windows: of whole maps, by stand-in.
    """

    operations: list[Operation]
    size: dict[int, float]
    kept: set[int]
    older: dict[int, int]
    slab: dict[int, int]
    windows: dict[int, int]
    fresh: int

    def liveness(self, target: str) -> Liveness:
        operations = compiled(self.operations, self.size, self.fresh, target)
        return Liveness(operations, self.size, after=frozenset(self.kept))


def step_of(loop: RowLoop) -> Step:
    """What one step does, as far as bytes go."""
    graph, avals = loop.graph, loop.graph.program.avals
    step = Step([], {}, set(), {}, {}, {}, len(avals))
    is_banded = len(loop.bands) > 1

    def fresh(size: float) -> int:
        step.size[step.fresh] = size
        step.fresh += 1
        return step.fresh - 1

    for v in loop.producer:
        track = loop.track(v)
        is_line = loop.line_rows(v) > 0
        rows = track.depth if is_line and not loop.is_ring(v) else track.rows
        step.size[v] = row_bytes(graph, v) * rows
        if is_line and not loop.is_ring(v):
            step.slab[v] = fresh(row_bytes(graph, v) * track.rows)
            step.older[v] = fresh(0.0)
    for i, node in enumerate(loop.nodes):
        sources = {s.operand: s for s in loop.sources_of(i)}
        inputs = []
        for operand, v in enumerate(node.equation.inputs):
            if not isinstance(v, int):
                continue
            source = sources.get(operand)
            if source is None:
                inputs.append(v)
                continue
            start, stop = loop.window(source, 0)
            height = avals[v].shape[source.read.axis]
            window = size_bytes(avals[v]) / max(height, 1) * (stop - start)
            if v in loop.producer and not loop.is_ring(v) and step.size[v] == window:
                inputs.append(v)
                continue
            cut = fresh(window)
            like = rows_like(avals[v], source.read.axis, stop - start)
            step.operations.append(Operation("window", (v,), (cut,), Kind.FUSED, like))
            step.windows[cut] = v
            inputs.append(cut)
        made = tuple(step.slab.get(v, v) for v in node.equation.outputs)
        kind = kind_of(node.equation.primitive)
        name = node.equation.primitive.name
        head = node.equation.outputs[0]
        axis = graph.row_axis.get(head)
        like = rows_like(avals[head], axis, loop.schedule.tracks[i].rows)
        step.operations.append(Operation(name, tuple(inputs), made, kind, like))
        for v in node.equation.outputs:
            if v in step.slab:
                read = (step.slab[v], step.older[v])
                like = rows_like(avals[v], graph.row_axis[v], loop.track(v).depth)
                step.operations.append(Operation("extend", read, (v,), Kind.FUSED, like))
            if node.is_reduction:
                step.size[v] = size_bytes(avals[v])
                if is_banded:
                    step.kept.add(v)
    return step


def rows_like(aval: Any, axis: int | None, rows: int) -> jax.ShapeDtypeStruct:
    """Shape and dtype of some rows of a value."""
    shape = list(aval.shape)
    if axis is not None:
        shape[axis] = rows
    return jax.ShapeDtypeStruct(tuple(shape), aval.dtype)


def line_bytes(loop: RowLoop) -> float:
    return sum(row_bytes(loop.graph, v) * loop.line_rows(v) for v in loop.producer)
