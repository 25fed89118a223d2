"""What the planner may choose from: where a program may be cut, and how each segment may run."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Collection, Sequence

import jax.numpy as jnp
import numpy as np

from lrjax.memory.compile import target_name
from lrjax.memory.targets import TARGETS, GpuTarget, TpuTarget
from lrjax.plan import Choice
from lrjax.planner.cost import SegmentCost, segment_cost
from lrjax.planner.operations import OperationCounts
from lrjax.program.inline import FlatEquation, FlatProgram
from lrjax.rowgraph.graph import RowGraph, build, size_bytes
from lrjax.rowgraph.segments import Cuttable, Segment
from lrjax.rules.windows import POOLINGS
from lrjax.strategies import Strategy
from lrjax.strategies.micro_batches import (
    BATCH_AXIS,
    DividedSegment,
    batch_graph,
    independent_operations,
    micro_batches,
)

COLUMN = Choice("column")
MOST_CUTS = 18
# Rows of a step, at the least: below, launching kernels costs more than what they compute.
LEAST_ROWS = 8
FEWEST_BLOCKS = 4
MOST_BLOCKS = 1024
# How often an offloaded map crosses the link: it is written, and read in two passes; its gradient
# is written and read.
_TRANSFERS = 5


@dataclasses.dataclass(frozen=True)
class Span:
    """The operations between two of the places where the program may be cut.

    Attributes:
      segment: they, as a segment.
      wrt: inputs of the segment that are differentiated.
      output_bytes: what it gives to later segments, or to the caller.
      moving_bytes: row maps it takes whose gradients it gives.
      flops: operations of its forward pass.
      may_divide: its operations take every image by itself.
    """

    segment: Segment
    wrt: tuple[int, ...]
    output_bytes: float
    moving_bytes: float
    flops: float
    may_divide: bool

    @functools.cached_property
    def graph(self) -> RowGraph:
        return build(self.segment.program, self.segment.axes)

    @functools.cached_property
    def has_rows(self) -> bool:
        return any(node.op is not None and node.op.flops > 0 for node in self.graph.nodes)

    @property
    def is_scalar(self) -> bool:
        """Its only result is a number, so that forward and backward pass may be one."""
        avals = [self.segment.program.avals[v] for v in self.segment.made]
        return len(avals) == 1 and avals[0].shape == ()

    @functools.cached_property
    def batch(self) -> int:
        """Images that may be run one after the other; 1 where they depend on each other."""
        structs = zip(self.segment.program.structs, self.segment.axes, strict=True)
        count = next((x.shape[BATCH_AXIS] for x, axis in structs if axis is not None), 1)
        if not self.may_divide or count == 1 or batch_graph(self.segment) is None:
            return 1
        return count

    def parts(self, count: int) -> DividedSegment:
        """The span in parts of its batch."""
        if count not in self._parts:
            self._parts[count] = micro_batches(self.segment, count)
        return self._parts[count]

    @functools.cached_property
    def _parts(self) -> dict[int, DividedSegment]:
        return {}

    def block_counts(self, strategy: Strategy) -> list[int]:
        """Numbers of blocks to choose from, rising; few rows a step come last."""
        if not self.has_rows:
            return []
        most, first = strategy.most_blocks(self.graph), 2
        if strategy.streams:
            most, first = most // LEAST_ROWS, FEWEST_BLOCKS
        most = min(most, MOST_BLOCKS)
        ladder = sorted(m * 2**k for k in range(20) for m in (2, 3))
        return [count for count in ladder if first <= count <= most]


class Candidates:
    """Spans of one program and their costs, each made when it is asked for.

    Attributes:
      bounds: operations on rows before each place where the program may be cut, from 0 to all.
      operations_per_byte: that the target could do while a byte goes to or comes from the host;
        0 where nothing is offloaded: a CPU has no other memory.
    """

    def __init__(
        self,
        program: FlatProgram,
        axes: Sequence[int | None],
        wrt: Collection[int],
        target: str | None,
    ):
        self.whole = Cuttable.of(program, axes)
        self.target = target_name(target)
        device = TARGETS.get(self.target)
        self.operations_per_byte = (
            device.operations_per_byte_of_host if isinstance(device, GpuTarget | TpuTarget) else 0.0
        )
        self.moving = _moving_values(program, {program.inputs[i] for i in wrt})
        self.counts = OperationCounts(program, axes, wrt, self.moving)
        self.independent = independent_operations(self.whole, axes)
        self.bounds = (0, *self._cuts(), len(self.whole.operations))
        self._spans: dict[tuple[int, int], Span] = {}
        self._between: dict[int, float] = {}
        self._offloadable: dict[tuple[int, int], float] = {}
        self._costs: dict[tuple[int, int, Choice], SegmentCost] = {}

    @property
    def last(self) -> int:
        """The number of the last bound."""
        return len(self.bounds) - 1

    def span(self, start: int, stop: int) -> Span:
        """The span between two bounds, by their numbers."""
        key = start, stop
        if key not in self._spans:
            self._spans[key] = self._span(self.bounds[start], self.bounds[stop])
        return self._spans[key]

    def cost(self, start: int, stop: int, choice: Choice) -> SegmentCost:
        """The cost model's answer for a span."""
        key = start, stop, choice
        if key not in self._costs:
            if choice.offload:
                self._costs[key] = self._offloaded(start, stop, choice)
                return self._costs[key]
            span = self.span(start, stop)
            found = self._bytes(start, stop, choice)
            equations = self.whole.operations[self.bounds[start] : self.bounds[stop]]
            operations = self.counts.of(equations, choice, found, span.graph)
            self._costs[key] = dataclasses.replace(found, operations=operations)
        return self._costs[key]

    def transfer_operations(self, start: int, stop: int) -> float:
        """Operations that could be done while what a span gives goes to the host and comes back."""
        return _TRANSFERS * self.offloadable_bytes(start, stop) * self.operations_per_byte

    def offloadable_bytes(self, start: int, stop: int) -> float:
        """Of the maps that a span gives, what may wait in the host's memory; 0 without a link.

        Maps of numbers that are read between this bound and the next alone, so that one segment
        reads them, wherever the next cut is.
        """
        if not self.operations_per_byte or stop == self.last:
            return 0.0
        if (start, stop) not in self._offloadable:
            self._offloadable[start, stop] = self._offloadable_bytes(start, stop)
        return self._offloadable[start, stop]

    def _offloadable_bytes(self, start: int, stop: int) -> float:
        program, row_axis = self.whole.program, self.whole.row_axis
        first, after = self.bounds[stop], self.bounds[stop + 1]
        later = {v for e in self.whole.operations[after:] for v in _values(e)}
        later.update(v for v in program.outputs if isinstance(v, int))
        soon = {v for e in self.whole.operations[first:after] for v in _values(e)}
        return sum(
            size_bytes(program.avals[v])
            for v in self.span(start, stop).segment.made
            if v in row_axis
            and v in soon
            and v not in later
            and jnp.issubdtype(program.avals[v].dtype, jnp.inexact)
        )

    def _offloaded(self, start: int, stop: int, choice: Choice) -> SegmentCost:
        """A row loop writes maps to the host and reads gradients there; else both exist whole."""
        found = self.cost(start, stop, dataclasses.replace(choice, offload=False))
        given = self.offloadable_bytes(start, stop)
        by_rows = given if choice.strategy.streams and choice.micro_batches == 1 else 0.0
        return SegmentCost(
            found.operations + self.transfer_operations(start, stop),
            found.saved_bytes - given,
            max(found.forward_bytes - by_rows, 0.0),
            max(found.backward_bytes - by_rows, 0.0),
            given,
        )

    def _bytes(self, start: int, stop: int, choice: Choice) -> SegmentCost:
        span = self.span(start, stop)
        if choice.micro_batches > 1:
            return self._by_micro_batches(span, choice)
        if stop - start > 1 and not choice.strategy.by_rows:
            return self._by_whole_maps(start, stop, choice)
        return segment_cost(span.segment, choice, span.wrt, self.target)

    def _by_whole_maps(self, start: int, stop: int, choice: Choice) -> SegmentCost:
        """From the spans between neighbouring bounds: their passes follow each other."""
        saved = forward = backward = 0.0
        for k in range(start, stop):
            kept = self.cost(k, k + 1, COLUMN)
            forward = max(forward, saved + kept.forward_bytes)
            backward = max(backward, saved + kept.backward_bytes)
            saved += kept.saved_bytes + (self._saved_between(k) if k > start else 0.0)
        # XLA:CPU keeps what should be done again (see ``cost``).
        if not choice.strategy.recomputes or self.target == "cpu":
            return SegmentCost(0.0, saved, forward, backward)
        again = [self.cost(k, k + 1, choice) for k in range(start, stop)]
        pairs = itertools.pairwise(again)
        return SegmentCost(
            0.0,
            again[-1].saved_bytes,
            # What one span gives the next takes.
            max(again[0].forward_bytes, *(b.forward_bytes + a.saved_bytes for a, b in pairs)),
            backward,
        )

    def _saved_between(self, bound: int) -> float:
        """What two neighbouring spans hold together beyond what each holds by itself."""
        if bound not in self._between:
            before, both = self.span(bound - 1, bound), self.span(bound - 1, bound + 1)
            joint = segment_cost(both.segment, COLUMN, both.wrt, self.target)
            single = [self.cost(k, k + 1, COLUMN).saved_bytes for k in (bound - 1, bound)]
            # A map that only the second reads is given by the first; joined, it may not exist.
            least = -float(before.output_bytes)
            self._between[bound] = max(joint.saved_bytes - sum(single), least)
        return self._between[bound]

    def _by_micro_batches(self, span: Span, choice: Choice) -> SegmentCost:
        """One part's passes beside the whole maps that enter and leave, and the gradients' sums."""
        parts = choice.micro_batches
        own = span.parts(parts)
        once = segment_cost(
            own.part, dataclasses.replace(choice, micro_batches=1), span.wrt, self.target
        )
        structs = span.segment.program.structs
        sums = sum(4.0 * math.prod(structs[i].shape) for i in span.wrt if i not in own.divided)
        taken = sum(size_bytes(structs[i]) for i in own.divided) / parts
        return SegmentCost(
            once.operations * parts,
            span.output_bytes,
            span.output_bytes + once.forward_bytes + taken,
            span.output_bytes
            + span.moving_bytes
            + sums
            + taken
            + max(once.backward_bytes, once.forward_bytes),
        )

    # --- Where to cut ----------------------------------------------------------------------------

    def _cuts(self) -> list[int]:
        """Positions behind which few bytes cross, and before operations that cost something."""
        operations = self.whole.operations
        width, count = self._crossing()
        heavy = [i for i, e in enumerate(operations) if self._weight(e) > 0]
        places = heavy[1:]
        # Not where more crosses than at a neighbour: inside a residual block.
        narrow = [
            p
            for k, p in enumerate(places)
            if any(
                measure[p] <= measure[places[max(k - 1, 0)]]
                and measure[p] <= measure[places[min(k + 1, len(places) - 1)]]
                for measure in (width, count)
            )
        ]
        while len(narrow) > MOST_CUTS:
            narrow.remove(self._least_missed(narrow))
        return narrow

    def _weight(self, equation: FlatEquation) -> float:
        """Operations of convolutions and the like, and of windows; 0 for what is elementwise."""
        flops = self.counts.forward.get(equation.outputs[0], 0.0)
        if equation.primitive in POOLINGS:
            return max(flops, 1.0)
        size = max(math.prod(self.whole.program.avals[v].shape) for v in equation.outputs)
        return flops if flops > 4 * size else 0.0

    def _crossing(self) -> tuple[list[int], list[int]]:
        """Bytes and number of the row maps that cross before every operation."""
        operations, program = self.whole.operations, self.whole.program
        last_use = {v: len(operations) for v in program.outputs if isinstance(v, int)}
        for i, equation in enumerate(operations):
            last_use.update((v, max(i, last_use.get(v, 0))) for v in _values(equation))
        steps = np.zeros((2, len(operations) + 2), np.int64)
        for i, equation in enumerate(operations):
            for v in equation.outputs:
                if v in self.whole.row_axis and last_use.get(v, i) > i:
                    change = size_bytes(program.avals[v]), 1
                    steps[:, i + 1] += change
                    steps[:, last_use[v] + 1] -= change
        width, count = np.cumsum(steps, axis=1)[:, : len(operations)].tolist()
        return width, count

    def _least_missed(self, places: list[int]) -> int:
        """The place between whose neighbours the least is done."""
        operations = self.whole.operations
        work = [0.0]
        for equation in operations:
            work.append(work[-1] + self.counts.forward.get(equation.outputs[0], 0.0))
        bounds = [0, *places, len(operations)]
        between = {p: work[bounds[k + 2]] - work[bounds[k]] for k, p in enumerate(places)}
        return min(places, key=between.__getitem__)

    # --- Spans -----------------------------------------------------------------------------------

    def _span(self, start: int, stop: int) -> Span:
        segment = self.whole.between(start, stop)
        program, avals = segment.program, self.whole.program.avals
        maps = [v for v, a in zip(program.inputs, segment.axes, strict=True) if a is not None]
        own = [
            self.counts.forward.get(e.outputs[0], 0.0) for e in self.whole.operations[start:stop]
        ]
        return Span(
            segment=segment,
            wrt=tuple(i for i, v in enumerate(program.inputs) if v in self.moving),
            output_bytes=sum(size_bytes(avals[v]) for v in segment.made),
            moving_bytes=sum(size_bytes(avals[v]) for v in maps if v in self.moving),
            flops=sum(own),
            may_divide=all(self.independent[start:stop]),
        )


def _values(equation: FlatEquation) -> list[int]:
    return [v for v in equation.inputs if isinstance(v, int)]


def _moving_values(program: FlatProgram, wrt: set[int]) -> set[int]:
    """Values through which gradients flow."""
    moving = {v for v in wrt if jnp.issubdtype(program.avals[v].dtype, jnp.inexact)}
    for equation in program.equations:
        if moving.intersection(_values(equation)):
            moving.update(
                v for v in equation.outputs if jnp.issubdtype(program.avals[v].dtype, jnp.inexact)
            )
    return moving
