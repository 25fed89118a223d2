"""2PS and OverL: row loops whose steps are differentiated one by one, in reverse."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from lrjax.loop.rowloop import RowLoop
from lrjax.planner.adjoint import Adjoint
from lrjax.planner.compilers import compiled, in_main_memory
from lrjax.planner.kernels import kernel_seconds, seconds
from lrjax.planner.liveness import Kind, Liveness, Operation, bytes_beside
from lrjax.planner.loops import (
    accumulation_seconds,
    accumulator_bytes,
    device_bytes,
    program_liveness,
)
from lrjax.planner.steps import Step, kernels_read, line_bytes, row_bytes
from lrjax.planner.whole import values
from lrjax.roofline import rates_of
from lrjax.rowgraph.graph import size_bytes
from lrjax.strategies.programs import DifferentiatedRows


@dataclasses.dataclass(frozen=True)
class DifferentiatedBytes:
    """Bytes saved for the backward pass, and the most in the course of each pass."""

    saved: float
    forward: float
    backward: float
    seconds: float


def differentiated_bytes(
    execution: DifferentiatedRows, axes: Sequence[int | None], wrt: Sequence[int], target: str
) -> DifferentiatedBytes:
    """What a differentiable row program takes.

    Args:
      execution: the program.
      axes: row axis of every input.
      wrt: inputs that are differentiated.
      target: the device.
    """
    rows = execution.rows
    program = rows.graph.program
    own = set(program.inputs)
    moving = {program.inputs[i] for i in wrt}
    for node in rows.graph.nodes:
        if not moving.isdisjoint(values(node.equation.inputs)):
            moving.update(node.equation.outputs)
    params = {program.inputs[i] for i in wrt if axes[i] is None}
    held = set(values(program.outputs)) - own
    lines, most, time = 0.0, 0.0, 0.0
    for loop in filter(None, rows.loops):
        lines += loop.steps * line_bytes(loop)
        held |= {v for v in (*loop.arrays, *loop.wholes) if v not in own}
        moved = {v for v in loop.arrays if v in moving}
        cotangents = sum(device_bytes(rows, v) for v in moved.union(loop.row_outputs))
        around = lines + sum(device_bytes(rows, v) for v in held) + cotangents
        step = _step(loop, moving, target)
        inner = _weight_bytes(loop, moving, params) + in_main_memory(step.peak(), target)
        most = max(most, around + line_bytes(loop) + inner)
        time += reverse_seconds(loop, step, moving, target)
    saved = lines + sum(device_bytes(rows, v) for v in held)
    forward = program_liveness(execution.forward, own, target)
    time += seconds(forward, rates_of(target))
    return DifferentiatedBytes(saved, forward.peak() + lines, most, time)


def reverse_seconds(loop: RowLoop, step: Liveness, moving: Collection[int], target: str) -> float:
    """All steps in reverse: forward again and differentiated."""
    rates, graph = rates_of(target), loop.graph
    avals = graph.program.avals
    branches = sum((b.first, b.last) != (0, loop.steps - 1) for b in loop.bands)
    total = seconds(step, rates) + 2 * branches * rates.branch_s
    for v in loop.producer:
        lines = row_bytes(graph, v) * loop.line_rows(v)
        if lines:
            # Saved in the forward pass; windows are cut from it, and its gradient from theirs,
            # within what reads them.
            total += kernel_seconds(rates, 0.0, 2 * lines)
        if v in loop.row_outputs:
            total += kernel_seconds(rates, 0.0, 2 * row_bytes(graph, v) * loop.track(v).rows)
    total += accumulation_seconds((avals[v] for v in loop.wholes if v in moving), rates)
    for s in loop.sliced:
        if s.value in moving:
            start, stop = loop.window(s, 0)
            total += kernel_seconds(rates, 0.0, 3 * row_bytes(graph, s.value) * (stop - start))
    return loop.full_steps * total


def _weight_bytes(loop: RowLoop, moving: Collection[int], params: Collection[int]) -> float:
    """Accumulators, and copies of kernels: forward, for the input's gradient, out of branches."""
    avals = loop.graph.program.avals
    wholes = [v for v in loop.wholes if v in moving]
    hosts = {v: float(size_bytes(avals[v])) for v in params}
    sizes = []
    for v in wholes:
        wide = accumulator_bytes(avals[v])
        if v in params and wide == size_bytes(avals[v]):
            del hosts[v]  # accumulated in its place
        else:
            sizes.append(wide)
    has_branches = len(loop.bands) > 1
    for v in kernels_read(loop):
        sizes += [float(size_bytes(avals[v]))] * (1 + (v in params) + has_branches)
    return bytes_beside(sizes, hosts.values())


def _step(loop: RowLoop, moving: Collection[int], target: str) -> Liveness:
    """One step: forward, then its adjoint."""
    avals = loop.graph.program.avals
    step = Step(loop)
    size = step.size
    still = {v for v in loop.wholes if v not in moving}
    adjoint = Adjoint(size, {*moving, *step.older.values()} - still, step.next)
    given = [adjoint.seed(v) for v in loop.row_outputs]
    sums = [v for n in loop.nodes if n.is_reduction for v in n.equation.outputs]
    for v in (*step.older.values(), *sums):
        adjoint.seed(v, size=0.0)
    # Contributions to the gradients of line buffers and parameters have sizes of their own; what
    # they belong to is counted outside the step.
    outside = {line: row_bytes(loop.graph, v) * loop.line_rows(v) for v, line in step.older.items()}
    outside |= {v: float(size_bytes(avals[v])) for v in loop.wholes if v in moving}
    size.update(outside)
    adjoint.reverse(step.operations)
    kept = {*step.older.values()}
    if step.conditional:
        kept.update(loop.wholes)  # added to the accumulators when all branches are done
    pieces = frozenset(p for v in kept for p in adjoint.pieces.get(v, []))
    size.update(dict.fromkeys(outside, 0.0))
    forward = with_residuals(step, adjoint.operations)
    operations = compiled((*forward, *adjoint.operations), size, adjoint.next, target)
    moved = {**outside, **step.moved}
    return Liveness(operations, size, before=frozenset(given), after=pieces, moved=moved)


def with_residuals(step: Step, reverse: Sequence[Operation]) -> list[Operation]:
    """A step's operations, where what the reverse of a branch reads exists.

    The residuals of a ``cond`` are among its results, so XLA can't fuse them into their readers.
    """
    read = {v for operation in reverse for v in operation.inputs}
    return [
        dataclasses.replace(operation, kind=Kind.ROOT)
        if i in step.conditional
        and operation.kind is Kind.FUSED
        and not read.isdisjoint(operation.outputs)
        else operation
        for i, operation in enumerate(step.operations)
    ]
