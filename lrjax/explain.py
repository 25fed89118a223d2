"""What ``rowwise`` will do with a function, without compiling it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lrjax.explanation import Explanation, OperationRow, Pass, SegmentReport
from lrjax.groups import outermost
from lrjax.loop import devices
from lrjax.loop.rowloop import RowLoop
from lrjax.meshes import without_explicit_axes
from lrjax.options import Cuts, MeshOption, Options, StrategyOption, check_callable, checked_options
from lrjax.program.varying import is_inexact
from lrjax.rowgraph.fallbacks import fallbacks_of, made_by
from lrjax.rowgraph.graph import ColumnNode, RowGraph, build, size_bytes
from lrjax.rowgraph.row_mesh import RowMesh
from lrjax.rowgraph.segments import Segment
from lrjax.rowgraph.tracing import Traced, differentiated_leaves, trace
from lrjax.rules.geometry import AnyMap
from lrjax.strategies.programs import Execution, RowPass, WholeMaps
from lrjax.transform import hosted_values, row_mesh_of, segments_and_choices


def explain(
    fun: Callable[..., Any],
    *args: Any,
    in_axes: Any,
    num_blocks: int | Sequence[int] | None = None,
    strategy: StrategyOption = "stream",
    cuts: Cuts = (),
    plan: Any = None,
    offload: bool = False,
    mesh: MeshOption = None,
    row_mesh_axis: str | None = None,
    wrt: int | Sequence[int] | None = None,
    **kwargs: Any,
) -> Explanation:
    """What ``rowwise(fun, ...)(*args, **kwargs)`` and its gradient will do; nothing is compiled.

    Unless ``wrt`` names arguments, the gradient is taken with respect to the floating-point ones
    that carry no rows; where there are none, with respect to closed-over arrays, and where there
    are none of these either, to all floating-point arguments.

    Args:
      fun, in_axes, num_blocks, strategy, cuts, plan, offload, mesh, row_mesh_axis: as for
        ``lrjax.rowwise``.
      wrt: numbers of the positional arguments that are differentiated.
      args, kwargs: ``fun``'s arguments, arrays or ``jax.ShapeDtypeStruct``. A keyword argument of
        ``fun`` that is called like an option must be closed over.

    Returns:
      An ``Explanation``. Printed, it is a summary of every segment: strategy, blocks, steps, line
      buffers, what it saves and computes again, and what fell back to column and why. Its
      ``tables()`` are of every pass's operations, with receptive field, halo, rows per step, line
      buffers and recomputed rows.

    Raises:
      ValueError: as ``lrjax.rowwise`` does when it is called, or ``wrt`` names no floating-point
        array.
    """
    check_callable(fun)
    options = checked_options(
        num_blocks=num_blocks,
        strategy=strategy,
        cuts=cuts,
        plan=plan,
        offload=offload,
        mesh=mesh,
        row_mesh_axis=row_mesh_axis,
    )
    row_mesh = row_mesh_of(options)
    with without_explicit_axes(args, kwargs) as (own_args, own_kwargs):
        chosen = None if wrt is None else differentiated_leaves(own_args, wrt)
        traced = trace(fun, in_axes, own_args, own_kwargs)
        return explain_with(traced, options, row_mesh, chosen)


def explain_with(
    traced: Traced,
    options: Options,
    row_mesh: RowMesh | None,
    wrt: Sequence[int] | None = None,
) -> Explanation:
    """``explain`` for a traced call and options that are checked already.

    Args:
      traced: the call.
      options: how it runs.
      row_mesh: the devices that share its rows.
      wrt: numbers of its positional arguments' leaves; by default as ``explain`` says.
    """
    segments, choices = segments_and_choices(traced, options, row_mesh)
    groups = [group for group in outermost(options.groups(len(segments))) for _ in group]
    hosted = hosted_values(traced, segments, choices)
    reports = []
    for segment, choice, group in zip(segments, choices, groups, strict=True):
        moving = _differentiated(segment, traced, wrt)
        execution = choice.runner.execution(segment, choice.num_blocks, moving)
        graph = build(segment.program, segment.axes)
        reports.append(
            SegmentReport(
                choice,
                tuple(map(_pass, execution.passes)),
                group,
                graph.operations(once=True),
                sum(size_bytes(traced.program.avals[v]) for v in segment.made if v in hosted),
                segment.row_mesh,
                _fetched_rows(execution.passes),
                _kept_operations(graph, execution),
            )
        )
    return Explanation(tuple(reports))


def _kept_operations(graph: RowGraph, execution: Execution) -> float:
    """Operations of a segment of whole maps that the backward pass need not do again."""
    if not isinstance(execution, WholeMaps) or execution.kept is None:
        return 0.0
    kept = execution.kept(graph.program)
    nodes = (node for node in graph.row_nodes if kept.issuperset(node.equation.outputs))
    return sum(node.operations for node in nodes)


def _fetched_rows(passes: Sequence[RowPass]) -> int:
    """The most rows of a map that a device fetches on one side before a loop."""
    loops = (loop for one in passes for loop in one.rows.loops)
    return max((devices.fetched_rows(loop) for loop in loops if loop is not None), default=0)


def _constants(traced: Traced) -> frozenset[int]:
    """Closed-over arrays of a function whose parameters are among its arguments."""
    count, structs = traced.closed_over, traced.program.structs
    has_parameters = any(
        axis is None and is_inexact(struct)
        for axis, struct in zip(traced.axes[count:], structs[count:], strict=True)
    )
    return frozenset(traced.program.inputs[:count] if has_parameters else ())


def _differentiated(segment: Segment, traced: Traced, wrt: Sequence[int] | None) -> list[int]:
    """Numbers of a segment's inputs: those that are asked for, and all that is made on the way; by
    default those without rows, or all where there are none."""
    if wrt is None:
        left_out = _constants(traced)
    else:
        asked = {traced.program.inputs[traced.closed_over + i] for i in wrt}
        left_out = frozenset(traced.program.inputs) - asked
    inexact = [
        i
        for i, (v, struct) in enumerate(
            zip(segment.program.inputs, segment.program.structs, strict=True)
        )
        if is_inexact(struct) and v not in left_out
    ]
    without_rows = [i for i in inexact if segment.axes[i] is None]
    return inexact if wrt is not None else without_rows or inexact


def _pass(one: RowPass) -> Pass:
    graph, loops = one.rows.graph, [loop for loop in one.rows.loops if loop is not None]
    first = set(one.first)
    operations = []
    for number, loop in enumerate(loops):
        for i, node in enumerate(loop.nodes):
            head = node.equation.outputs[0]
            operations.append(_operation(loop, number, i, is_again=head not in first))
            first.discard(head)
    column = (
        [] if one.is_reversed else [node for node in graph.nodes if isinstance(node, ColumnNode)]
    )
    return Pass(
        one.name,
        tuple(loop.steps for loop in loops),
        tuple(operations),
        one.saved_bytes,
        tuple(_title(graph, node.equation) for node in column),
        () if one.is_reversed else tuple(fallbacks_of(graph)),
    )


def _operation(loop: RowLoop, number: int, index: int, *, is_again: bool) -> OperationRow:
    node, track = loop.nodes[index], loop.schedule.tracks[index]
    kept = [v for v in node.equation.outputs if v in loop.producer]
    return OperationRow(
        name=_title(loop.graph, node.equation),
        loop=number,
        rows=node.op.height,
        operations=node.operations,
        receptive_field=_receptive_field(loop, index),
        halo=max((_halo(read.row_map) for read in node.op.reads if read is not None), default=0),
        rows_per_step=track.rows,
        line_buffer_rows=max((loop.line_rows(v) for v in kept), default=0),
        line_buffer_bytes=sum(loop.line_rows(v) * loop.graph.row_bytes(v) for v in kept),
        recomputed_rows=_rows_twice(loop, index) + (node.op.height if is_again else 0),
    )


def _rows_twice(loop: RowLoop, index: int) -> int:
    """Rows of the image that are computed again, because blocks, or devices' shares, overlap."""
    track, height = loop.schedule.tracks[index], loop.nodes[index].op.height
    spans = [(track.start(t), track.stop(t)) for t in range(loop.steps)]
    firsts = [0]
    if loop.shards is not None:
        low, high = loop.needs[index]
        spans = [(max(start, low), min(stop, high)) for start, stop in spans]
        share = devices.share_of_node(loop, index)
        firsts = [device * share for device in range(loop.shards.count)]
    total = sum(
        max(0, min(first + stop, height) - max(first + start, 0))
        for first in firsts
        for start, stop in spans
    )
    return max(0, total - height)


def _receptive_field(loop: RowLoop, index: int) -> int:
    """Rows of the loop's inputs behind one output row in the middle of the image."""
    middle = loop.nodes[index].op.height // 2
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


def _title(graph: RowGraph, equation: Any) -> str:
    return f"{equation.primitive.name} {made_by(graph, equation)}"
