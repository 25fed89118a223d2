"""What a segment costs under a choice: operations, and bytes by liveness, without compiling.

Bytes are those of XLA's buffers, not of jaxpr's values: what XLA fuses does not exist, what its
libraries read and write does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from lrjax.plan import Choice
from lrjax.planner.kernels import seconds
from lrjax.planner.loops import program_liveness
from lrjax.planner.reverse import differentiated_bytes
from lrjax.planner.segment_programs import (
    column_operations,
    joint_of,
    operations_of,
    program_operations,
    repetition,
)
from lrjax.planner.whole import column_liveness, forward_liveness, values, without_outputs
from lrjax.program.inline import FlatProgram
from lrjax.roofline import rates_of
from lrjax.rowgraph.segments import Segment
from lrjax.strategies.programs import DifferentiatedRows, RowPrograms, WholeMaps


@dataclasses.dataclass(frozen=True)
class SegmentCost:
    """What one segment costs.

    Attributes:
      operations: of all passes, forward and backward.
      saved_bytes: held from its forward to its backward pass: the maps it gives and residuals.
      forward_bytes: most bytes alive while its forward pass runs.
      backward_bytes: most bytes alive while its backward pass runs.
      offloaded_bytes: of the maps it gives, what waits in the host's memory, left out above.

    Bytes of the passes leave out what other segments have saved, and the function's arguments and
    parameter gradients. Where devices share the rows, all is of one of them.
    """

    operations: float
    saved_bytes: float
    forward_bytes: float
    backward_bytes: float
    offloaded_bytes: float = 0.0
    seconds: float = 0.0


def peak_bytes(costs: Sequence[SegmentCost], fixed_bytes: float) -> float:
    """Most bytes alive in a training step made of segments.

    Args:
      costs: of the segments, in order.
      fixed_bytes: arguments and parameter gradients.
    """
    saved, most = 0.0, 0.0
    for cost in costs:
        most = max(most, saved + cost.forward_bytes, saved + cost.backward_bytes)
        saved += cost.saved_bytes
    return fixed_bytes + most


def segment_cost(segment: Segment, choice: Choice, wrt: Sequence[int], target: str) -> SegmentCost:
    """Predict what a segment costs; nothing is compiled.

    What does not depend on the number of blocks is kept while the same ``segment`` object is asked
    about again.

    Args:
      segment: the segment.
      choice: how it runs. Micro-batches and offloading are the caller's to account for.
      wrt: inputs of the segment that are differentiated.
      target: a name in ``lrjax.memory.TARGETS``.

    Example:
      >>> segments = split(traced.program, traced.axes, 2)
      >>> costs = [segment_cost(s, Choice("stream", 64), wrt, "h200") for s in segments]
      >>> peak_bytes(costs, fixed_bytes)
    """
    execution = choice.strategy.execution(segment, choice.num_blocks, wrt)
    return _COSTS[type(execution)](segment, execution, tuple(wrt), target)


def _whole_maps_cost(
    segment: Segment, execution: WholeMaps, wrt: tuple[int, ...], target: str
) -> SegmentCost:
    if execution.kept is not None:
        found = _partly_recomputed_cost(segment, execution.kept, wrt, target)
    else:
        cost = _recomputed_cost if execution.is_recomputed else _kept_cost
        found = cost(segment, wrt, target)
    devices = segment.devices
    # XLA divides maps, and what it does with them, evenly.
    return dataclasses.replace(
        found,
        operations=found.operations / devices,
        saved_bytes=found.saved_bytes / devices,
        forward_bytes=found.forward_bytes / devices,
        backward_bytes=found.backward_bytes / devices,
    )


def _kept_cost(segment: Segment, wrt: tuple[int, ...], target: str) -> SegmentCost:
    """Bytes and operations of all devices together; the seconds that they take at once."""
    joint = joint_of(segment, wrt)
    lives = column_liveness(joint, segment.axes, wrt, target)
    border = lives.border
    given = set(values(joint.program.outputs[: len(segment.program.outputs)]))
    saved = given.union(lives.alive_at(border)).difference(joint.cotangents)
    waiting = sum(lives.size[v] for v in joint.cotangents)
    # The next segment reads what this one gives, so it is written.
    written = dataclasses.replace(lives, after=lives.after | given)
    return SegmentCost(
        column_operations(segment, wrt),
        sum(lives.size.get(v, 0.0) for v in saved),
        max(lives.peak(0, border) - waiting, 0.0),
        lives.peak(border),
        seconds=seconds(written, rates_of(target).of_devices(segment.devices)),
    )


def _recomputed_cost(segment: Segment, wrt: tuple[int, ...], target: str) -> SegmentCost:
    """What a segment gives is all it saves; its backward pass begins with its forward pass."""
    operations = column_operations(segment, wrt) + program_operations(segment.program)
    if target == "cpu":
        # XLA:CPU sees that what is done again has been done before, and keeps that instead.
        return dataclasses.replace(_kept_cost(segment, wrt, target), operations=operations)
    forward = forward_liveness(segment.program, target)
    joint = without_outputs(joint_of(segment, wrt))
    lives = column_liveness(joint, segment.axes, wrt, target)
    saved = sum(forward.size.get(v, 0.0) for v in values(segment.program.outputs))
    rates = rates_of(target).of_devices(segment.devices)
    time = seconds(forward, rates) + seconds(lives, rates)
    return SegmentCost(operations, saved, forward.peak(), lives.peak(), seconds=time)


def _partly_recomputed_cost(
    segment: Segment,
    kept_of: Callable[[FlatProgram], frozenset[int]],
    wrt: tuple[int, ...],
    target: str,
) -> SegmentCost:
    """Some values are kept beside what the segment gives; the backward pass starts from them."""
    joint = joint_of(segment, wrt)
    second = without_outputs(joint).starting_from(kept_of(joint.forward))
    first = joint.saving(second.kept)
    operations = program_operations(first) + program_operations(second.program)
    if target == "cpu":
        return dataclasses.replace(_kept_cost(segment, wrt, target), operations=operations)
    forward = forward_liveness(first, target)
    lives = column_liveness(second, segment.axes, wrt, target)
    saved = sum(forward.size.get(v, 0.0) for v in set(values(first.outputs)))
    rates = rates_of(target).of_devices(segment.devices)
    time = seconds(forward, rates) + seconds(lives, rates)
    return SegmentCost(operations, saved, forward.peak(), lives.peak(), seconds=time)


def _row_programs_cost(
    segment: Segment, found: RowPrograms, wrt: tuple[int, ...], target: str
) -> SegmentCost:
    """Arguments and parameter gradients take nothing, residuals do."""
    first, count = found.forward.graph.program, found.outputs
    own = set(first.inputs)
    if found.backward is None:
        gradients = set(values(first.outputs[count:]))
        both = program_liveness(found.forward, own | gradients, target)
        time = seconds(both, rates_of(target))
        return SegmentCost(operations_of(found.forward), 0.0, both.peak(), 0.0, seconds=time)
    forward = program_liveness(found.forward, own, target)
    saved = sum(forward.size.get(v, 0.0) for v in set(values(first.outputs)) - own)
    second = found.backward.graph.program
    residuals = zip(second.inputs, first.outputs[count:], strict=False)
    free = {v for v, residual in residuals if residual in own}
    for v, i in zip(second.outputs, wrt, strict=True):
        if isinstance(v, int) and segment.axes[i] is None:
            free.add(v)
    backward = program_liveness(found.backward, free, target)
    operations = operations_of(found.forward) + operations_of(found.backward)
    rates = rates_of(target)
    time = seconds(forward, rates) + seconds(backward, rates)
    return SegmentCost(operations, saved, forward.peak(), backward.peak(), seconds=time)


def _differentiated_cost(
    segment: Segment, execution: DifferentiatedRows, wrt: tuple[int, ...], target: str
) -> SegmentCost:
    """The forward loops, then each step again and differentiated, in reverse."""
    rows = execution.rows
    found = differentiated_bytes(execution, segment.axes, wrt, target)
    first = program_operations(segment.program) * repetition(execution.forward)
    second = column_operations(segment, wrt) * repetition(rows)
    operations = (first + second) / rows.devices
    return SegmentCost(
        operations, found.saved, found.forward, found.backward, seconds=found.seconds
    )


# By the kind of execution; whatever strategy it is.
_COSTS: dict[type, Callable[..., SegmentCost]] = {
    WholeMaps: _whole_maps_cost,
    RowPrograms: _row_programs_cost,
    DifferentiatedRows: _differentiated_cost,
}
