"""What ``rowwise`` will do with a function, without compiling it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lrjax import autodiff
from lrjax.autodiff import RowProgram
from lrjax.geometry import AnyMap
from lrjax.graph import RowGraph, size_bytes
from lrjax.options import Cuts, checked_options
from lrjax.rowloop import RowLoop
from lrjax.segments import Segment
from lrjax.tracing import trace
from lrjax.transform import segments_and_choices


@dataclasses.dataclass(frozen=True)
class OperationRow:
    """One operation of a row loop.

    Attributes:
      name: primitive and output shape.
      receptive_field: rows of the segment's inputs that one output row depends on.
      halo: input rows that neighbouring blocks of the operation share.
      rows_per_step: output rows computed in a step.
      line_buffer_rows, line_buffer_bytes: what is kept of the output between steps.
      recomputed_rows: rows of the image that this pass computes again, in it or after another.
    """

    name: str
    receptive_field: int
    halo: int
    rows_per_step: int
    line_buffer_rows: int
    line_buffer_bytes: int
    recomputed_rows: int


@dataclasses.dataclass(frozen=True)
class Pass:
    """One program (forward or backward) of a segment: its row loops and what fell back.

    Attributes:
      name: "forward", "backward", or "forward and backward" where both stream together.
      steps: steps of every row loop.
      operations: the row operations, in order.
      saved_bytes: what the pass keeps for the backward pass besides its inputs and outputs.
      column: operations on whole values at the boundaries between row loops, in order.
      fallbacks: those among them that have rows but are not local in them, with the reason.
    """

    name: str
    steps: tuple[int, ...]
    operations: tuple[OperationRow, ...]
    saved_bytes: int
    column: tuple[str, ...]
    fallbacks: tuple[str, ...]

    @property
    def line_buffer_bytes(self) -> int:
        return sum(operation.line_buffer_bytes for operation in self.operations)


@dataclasses.dataclass(frozen=True)
class SegmentReport:
    """A segment, and the segments of its group: the backward pass first runs them all again."""

    strategy: str
    num_blocks: int
    passes: tuple[Pass, ...]
    group: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The answer of ``explain``; print it for a table."""

    segments: tuple[SegmentReport, ...]

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Every operation that fell back to column, with the reason."""
        passes = (p for segment in self.segments for p in segment.passes)
        return tuple(dict.fromkeys(f for p in passes for f in p.fallbacks))

    def __str__(self) -> str:
        lines: list[str] = []
        for index, segment in enumerate(self.segments):
            title = f"segment {index}: {segment.strategy}"
            if segment.passes:
                title += f", {segment.num_blocks} blocks"
            if len(segment.group) > 1:
                first, *_, last = segment.group
                title += f"; group of segments {first} to {last}, run again for the backward pass"
            lines.append(title)
            for one in segment.passes:
                lines.extend(_table(one))
        if self.fallbacks:
            lines.append("column-wise, because not local in rows:")
            lines.extend(f"  {fallback}" for fallback in self.fallbacks)
        return "\n".join(lines)


def explain(
    fun: Callable[..., Any],
    *args: Any,
    in_axes: Any,
    num_blocks: int | Sequence[int] | None = None,
    strategy: str | Sequence[str] = "stream",
    cuts: Cuts = (),
    plan: Any = None,
    **kwargs: Any,
) -> Explanation:
    """What ``rowwise(fun, ...)(*args, **kwargs)`` and its gradient will do; nothing is compiled.

    The gradient is taken with respect to the floating-point arguments that carry no rows (all
    floating-point arguments where there are none).

    Args:
      fun, in_axes, num_blocks, strategy, cuts, plan: as for ``lrjax.rowwise``.
      args, kwargs: ``fun``'s arguments, arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      An ``Explanation``: per segment and pass a table of operations with receptive field, halo,
      rows per step, line buffers and recomputed rows, and everything that fell back to column.

    Raises:
      ValueError: as ``lrjax.rowwise`` does when it is called.
    """
    options = checked_options(num_blocks, strategy, cuts, plan)
    traced = trace(fun, in_axes, args, kwargs)
    segments, choices = segments_and_choices(traced, options)
    groups = [tuple(group) for group in options.groups(len(segments)) for _ in group]
    return Explanation(
        tuple(
            SegmentReport(c.strategy, c.num_blocks, _passes(s, c.strategy, c.num_blocks), group)
            for s, c, group in zip(segments, choices, groups, strict=True)
        )
    )


def _passes(segment: Segment, strategy: str, num_blocks: int) -> tuple[Pass, ...]:
    program, axes = segment.program, segment.axes
    if strategy in ("column", "checkpoint"):
        return ()
    if strategy in ("2ps", "overl"):
        rows = autodiff.differentiable_program(program, axes, strategy, num_blocks)
        saved = sum(
            loop.steps * _line_bytes(loop, v)
            for loop in rows.loops
            if loop is not None
            for v in loop.producer
        )
        forward = _pass("forward", rows, saved)
        again = tuple(
            dataclasses.replace(o, recomputed_rows=o.recomputed_rows + _height(rows, i))
            for i, o in enumerate(forward.operations)
        )
        return forward, dataclasses.replace(
            forward, name="backward (every step again, in reverse)", operations=again
        )
    wrt = _differentiated(segment)
    programs = autodiff.stream_programs(program, axes, num_blocks, wrt)
    if programs.backward is None:
        return (_pass("forward and backward", programs.forward, 0),)
    residuals = programs.forward.graph.program.outputs[len(program.outputs) :]
    inputs = set(programs.forward.graph.program.inputs)
    saved = sum(
        size_bytes(programs.forward.graph.program.avals[v])
        for v in residuals
        if isinstance(v, int) and v not in inputs
    )
    cotangents = len(programs.backward.graph.program.inputs) - len(residuals)
    return (
        _pass("forward", programs.forward, saved),
        _pass("backward", programs.backward, 0, cotangents),
    )


def _differentiated(segment: Segment) -> list[int]:
    inexact = [
        i
        for i, v in enumerate(segment.program.inputs)
        if jnp.issubdtype(segment.program.avals[v].dtype, jnp.inexact)
    ]
    return [i for i in inexact if segment.axes[i] is None] or inexact


def _pass(name: str, rows: RowProgram, saved_bytes: int, cotangents: int = 0) -> Pass:
    """Describe a program whose last ``cotangents`` inputs are cotangents."""
    graph = rows.graph
    moved = set(graph.program.inputs[len(graph.program.inputs) - cotangents :])
    for node in graph.nodes:
        if moved.intersection(v for v in node.equation.inputs if isinstance(v, int)):
            moved.update(node.equation.outputs)
    operations = []
    for loop in rows.loops:
        for i in range(0 if loop is None else len(loop.nodes)):
            assert loop is not None
            is_again = bool(cotangents) and not moved.intersection(loop.nodes[i].equation.outputs)
            operations.append(_operation(loop, i, is_again))
    column = [n for n in graph.nodes if n.op is None]
    return Pass(
        name,
        tuple(loop.steps for loop in rows.loops if loop is not None),
        tuple(operations),
        saved_bytes,
        tuple(_title(graph, n.equation) for n in column),
        tuple(f"{_title(graph, n.equation)}: {n.reason}" for n in column if n.reason is not None),
    )


def _operation(loop: RowLoop, index: int, is_again: bool) -> OperationRow:
    node, track = loop.nodes[index], loop.schedule.tracks[index]
    assert node.op is not None
    kept = [v for v in node.equation.outputs if v in loop.producer]
    return OperationRow(
        name=_title(loop.graph, node.equation),
        receptive_field=_receptive_field(loop, index),
        halo=max((_halo(read.row_map) for read in node.op.reads if read is not None), default=0),
        rows_per_step=track.rows,
        line_buffer_rows=max((loop.line_rows(v) for v in kept), default=0),
        line_buffer_bytes=sum(_line_bytes(loop, v) for v in kept),
        recomputed_rows=_rows_twice(loop, index) + (node.op.height if is_again else 0),
    )


def _rows_twice(loop: RowLoop, index: int) -> int:
    """Rows of the image that later steps compute again, because blocks overlap."""
    track, node = loop.schedule.tracks[index], loop.nodes[index]
    assert node.op is not None
    total = sum(
        max(0, min(track.stop(t), node.op.height) - max(track.start(t), 0))
        for t in range(loop.steps)
    )
    return max(0, total - node.op.height)


def _height(rows: RowProgram, index: int) -> int:
    ops = [n.op for loop in rows.loops if loop is not None for n in loop.nodes]
    op = ops[index]
    assert op is not None
    return op.height


def _receptive_field(loop: RowLoop, index: int) -> int:
    """Rows of the loop's inputs behind one output row in the middle of the image."""
    node = loop.nodes[index]
    assert node.op is not None
    middle = node.op.height // 2
    wanted: dict[int, tuple[int, int]] = {index: (middle, middle + 1)}
    reach = 1
    for i in range(index, -1, -1):
        if i not in wanted:
            continue
        first, stop = wanted[i]
        for source in loop.sources_of(i):
            row_map = source.read.row_map
            rows = row_map.first(first), row_map.end(stop)
            if source.value in loop.producer:
                j = loop.producer[source.value]
                known = wanted.get(j, rows)
                wanted[j] = min(known[0], rows[0]), max(known[1], rows[1])
            else:
                reach = max(reach, rows[1] - rows[0])
    return reach


def _halo(row_map: AnyMap) -> int:
    rows = row_map.quantum
    return max(0, row_map.end(rows) - row_map.first(0) - math.floor(rows * row_map.rate))


def _line_bytes(loop: RowLoop, value: int) -> int:
    aval, axis = loop.graph.program.avals[value], loop.graph.row_axis[value]
    row = int(np.prod(aval.shape)) // max(aval.shape[axis], 1) * aval.dtype.itemsize
    return loop.line_rows(value) * row


def _title(graph: RowGraph, equation: Any) -> str:
    shapes = ", ".join(
        f"{graph.program.avals[v].dtype.name}{list(graph.program.avals[v].shape)}"
        for v in equation.outputs
    )
    return f"{equation.primitive.name} {shapes}"


_COLUMNS = (
    ("operation", "name"),
    ("field", "receptive_field"),
    ("halo", "halo"),
    ("rows/step", "rows_per_step"),
    ("line rows", "line_buffer_rows"),
    ("line bytes", "line_buffer_bytes"),
    ("recomputed", "recomputed_rows"),
)


def _table(one: Pass) -> list[str]:
    steps = " + ".join(map(str, one.steps)) or "no"
    lines = [
        f"  {one.name}: {steps} steps, line buffers {one.line_buffer_bytes:,} bytes"
        f", saved for the backward pass {one.saved_bytes:,} bytes"
    ]
    rows = [[str(getattr(o, field)) for _, field in _COLUMNS] for o in one.operations]
    table = [[title for title, _ in _COLUMNS], *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(_COLUMNS))]
    for row in table:
        cells = [
            row[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("    " + "  ".join(cells))
    return lines
