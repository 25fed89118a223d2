"""What a segment costs under a choice: operations, and bytes by liveness, without compiling.

Bytes are those of XLA's buffers, not of jaxpr's values: what XLA fuses does not exist, what its
libraries read and write does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lrjax import autodiff
from lrjax.graph import RowGraph
from lrjax.planner.choice import Choice
from lrjax.planner.loops import program_liveness
from lrjax.planner.reverse import differentiated_bytes
from lrjax.planner.whole import (
    column_liveness,
    forward_liveness,
    joint_program,
    values,
    without_outputs,
)
from lrjax.segments import Segment


@dataclasses.dataclass(frozen=True)
class SegmentCost:
    """What one segment costs.

    Attributes:
      operations: of all passes, forward and backward.
      saved_bytes: held from its forward to its backward pass: the maps it gives and residuals.
      forward_bytes: most bytes alive while its forward pass runs.
      backward_bytes: most bytes alive while its backward pass runs.

    The last two leave out what other segments have saved, and the function's arguments and
    parameter gradients.
    """

    operations: float
    saved_bytes: float
    forward_bytes: float
    backward_bytes: float


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
    """Predict what a segment costs.

    Args:
      segment: the segment.
      choice: how it runs.
      wrt: inputs of the segment that are differentiated.
      target: a name in ``lrjax.memory.TARGETS``.
    """
    # XLA:CPU finds that what a checkpoint does again has been done before, and keeps it.
    if choice.strategy == "column" or (choice.strategy == "checkpoint" and target == "cpu"):
        return _column_cost(segment, wrt, target)
    if choice.strategy == "checkpoint":
        return _checkpoint_cost(segment, wrt, target)
    if choice.strategy == "stream":
        return _stream_cost(segment, choice, wrt, target)
    return _differentiated_cost(segment, choice, wrt, target)


def _stream_cost(segment: Segment, choice: Choice, wrt: Sequence[int], target: str) -> SegmentCost:
    program = segment.program
    found = autodiff.stream_programs(program, segment.axes, choice.num_blocks, wrt)
    first = found.forward.graph.program
    count = len(program.outputs)
    operations = sum(_operations(p.graph) for p in (found.forward, found.backward) if p)
    own = set(first.inputs)
    if found.backward is None:
        free = own | set(values(first.outputs[count:]))
        lives = program_liveness(found.forward, free, target)
        return SegmentCost(operations, 0.0, lives.peak(), 0.0)
    lives = program_liveness(found.forward, own, target)
    saved = sum(lives.size.get(v, 0.0) for v in set(values(first.outputs)) - own)
    second = found.backward.graph.program
    residuals = dict(zip(second.inputs, first.outputs[count:], strict=False))
    free = {v for v, r in residuals.items() if r in own}
    free |= {
        v
        for v, i in zip(second.outputs, wrt, strict=True)
        if isinstance(v, int) and segment.axes[i] is None
    }
    back = program_liveness(found.backward, free, target)
    return SegmentCost(operations, saved, lives.peak(), back.peak())


def _differentiated_cost(
    segment: Segment, choice: Choice, wrt: Sequence[int], target: str
) -> SegmentCost:
    """2PS and OverL: the forward loops, then each step again and differentiated, in reverse."""
    rows = autodiff.differentiable_program(
        segment.program, segment.axes, choice.strategy, choice.num_blocks
    )
    found = differentiated_bytes(rows, segment.axes, wrt, target)
    operations = 4 * _operations(rows.graph)
    return SegmentCost(operations, found.saved, found.forward, found.backward)


def _operations(graph: RowGraph) -> float:
    stages = (graph.stage_nodes(stage) for stage in graph.loops)
    return sum(n.op.flops * n.op.height for nodes in stages for n in nodes if n.op is not None)


def _column_cost(segment: Segment, wrt: Sequence[int], target: str) -> SegmentCost:
    joint = joint_program(segment.program, wrt)
    lives = column_liveness(joint, segment.axes, wrt, target)
    border = lives.border
    given = set(values(joint.program.outputs[: len(segment.program.outputs)]))
    saved = given.union(lives.alive_at(border)).difference(joint.cotangents)
    waiting = sum(lives.size[v] for v in joint.cotangents)
    return SegmentCost(
        0.0,
        sum(lives.size.get(v, 0.0) for v in saved),
        lives.peak(0, border) - waiting,
        lives.peak(border),
    )


def _checkpoint_cost(segment: Segment, wrt: Sequence[int], target: str) -> SegmentCost:
    """What a segment gives is all it saves; its backward pass begins with its forward pass."""
    forward = forward_liveness(segment.program, target)
    joint = without_outputs(joint_program(segment.program, wrt))
    lives = column_liveness(joint, segment.axes, wrt, target)
    saved = sum(forward.size.get(v, 0.0) for v in values(segment.program.outputs))
    return SegmentCost(0.0, saved, forward.peak(), lives.peak())
