"""What the planner may choose from: segments between places, how each may run, what it costs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Collection, Iterator, Sequence

import jax.numpy as jnp

from lrjax.memory.compile import target_name
from lrjax.memory.targets import CpuTarget, find
from lrjax.plan import Choice
from lrjax.planner.cost import SegmentCost, segment_cost
from lrjax.planner.places import Places, values_of
from lrjax.program.inline import FlatProgram
from lrjax.roofline import rates_of
from lrjax.rowgraph.graph import RowGraph, build, size_bytes
from lrjax.rowgraph.row_mesh import RowMesh
from lrjax.rowgraph.segments import Cuttable, Segment
from lrjax.rules.geometry import ceil_div
from lrjax.strategies import Strategy, registered
from lrjax.strategies.micro_batches import (
    BATCH_AXIS,
    DividedSegment,
    batch_graph,
    independent_operations,
    micro_batches,
)

COLUMN, CHECKPOINT = Choice("column"), Choice("checkpoint")
# Rows of a step, at the least: below, launching kernels costs more than what they compute.
LEAST_ROWS = 8
MOST_BLOCKS = 1024
# How often an offloaded map crosses the link. It is written, and read in two passes, its gradient
# written and read, and halos are read twice; compiled programs take as long as ten (VGG-16 at 4096
# x 4096 behind its second pool: 60 ms more by their roofline than five crossings would).
_TRANSFERS = 10
# Seconds of a row loop over whole maps', at the least.
_LOOP = 1.01


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a segment may run, whatever the number of its blocks and micro-batches.

    Attributes:
      strategy: that runs it, or one part of its batch after the other.
      is_divided: in micro-batches.
      offload: what it gives waits in the host's memory.
      is_group: several segments, run again by it before their backward passes; see ``groups``.
    """

    strategy: Strategy
    is_divided: bool = False
    offload: bool = False
    is_group: bool = False

    @classmethod
    def of(cls, choice: Choice) -> Kind:
        return cls(choice.strategy, choice.micro_batches > 1, choice.offload)

    @property
    def is_plain(self) -> bool:
        """Whole maps of all images, on the device."""
        return not (self.strategy.by_rows or self.is_divided or self.offload or self.is_group)

    def __str__(self) -> str:
        notes = ["micro-batches"] * self.is_divided + ["offload"] * self.offload
        notes += ["group"] * self.is_group
        return self.strategy.name + (f" ({', '.join(notes)})" if notes else "")


def every_kind() -> tuple[Kind, ...]:
    """All ways to run a segment, under the strategies that have a name.

    Only what starts from a segment's inputs is divided: all else keeps maps of all images. Maps
    wait in the host's memory between row loops: around whole maps XLA's peaks were above column's.
    """
    found = [
        Kind(strategy, is_divided, offload)
        for offload, is_divided in itertools.product((False, True), repeat=2)
        for strategy in registered()
        if (strategy.starts_from_inputs or not is_divided) and (strategy.streams or not offload)
    ]
    return (*found, GROUP)


GROUP = Kind(CHECKPOINT.strategy, is_group=True)


@dataclasses.dataclass(frozen=True)
class Span:
    """The operations between two of the places where the program may be cut.

    Attributes:
      segment: they, as a segment; bytes are those of one of the devices that share its rows.
      wrt: inputs of the segment that are differentiated.
      output_bytes: what it gives to later segments, or to the caller.
      moving_bytes: row maps it takes whose gradients it gives.
      may_divide: its operations take every image by itself.
    """

    segment: Segment
    wrt: tuple[int, ...]
    output_bytes: float
    moving_bytes: float
    may_divide: bool

    @functools.cached_property
    def graph(self) -> RowGraph:
        return build(self.segment.program, self.segment.axes)

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

    @functools.cached_property
    def parts(self) -> dict[int, DividedSegment]:
        """The span in parts of its batch, as far as they were asked for."""
        return {}

    def choices(self, kind: Kind, ratio: int = 4) -> Iterator[Choice]:
        """The choices of one kind, in numbers of blocks by a ratio, from much memory to little."""
        parts = [1]
        if kind.is_divided:
            parts = [n for n in range(2, self.batch + 1) if self.batch % n == 0]
        for count in self.block_counts(kind.strategy, ratio) if kind.strategy.by_rows else [1]:
            # Row loops make a part as small as blocks are many: images one by one, if at all.
            for part in parts[-1:] if kind.strategy.by_rows else parts:
                yield Choice(kind.strategy, count, part, kind.offload)

    def most_blocks(self, strategy: Strategy) -> int:
        """Rows that blocks divide, of a device's share."""
        return ceil_div(strategy.most_blocks(self.graph), self.segment.devices)

    def smallest_steps(self, strategy: Strategy) -> int:
        """The most blocks that are worth their kernels."""
        most = self.most_blocks(strategy)
        return min(most // LEAST_ROWS if strategy.streams else most, MOST_BLOCKS)

    def block_counts(self, strategy: Strategy, ratio: int) -> list[int]:
        if not any(node.op is not None and node.op.flops > 0 for node in self.graph.nodes):
            return []
        most = self.smallest_steps(strategy)
        counts = [4 * ratio**k for k in range(10)]
        if self.segment.devices > 1:
            # Whole maps of the shares, without XLA's partitioner, which takes more memory for them:
            # VGG-16, 4096 x 4096 on each of eight, cut behind four pools, by "overl" in one block
            # 16,086 MiB and 78 ms, under "checkpoint" 24,093 MiB and 127 ms.
            counts = [1, *counts]
        counts = [count for count in counts if count <= most] or [2] * (most >= 2)
        # The smallest steps that there can be, where the next smallest are far from them.
        return [*counts, most] if strategy.streams and counts and most >= 3 * counts[-1] else counts


class Candidates:
    """Spans of one program and their costs, each made when it is asked for.

    Attributes:
      places: where it may be cut; ``bounds`` are they.
      row_mesh: the devices that share the rows; None for one.
    """

    def __init__(
        self,
        program: FlatProgram,
        axes: Sequence[int | None],
        wrt: Collection[int],
        target: str | None,
        row_mesh: RowMesh | None = None,
    ):
        self.row_mesh = row_mesh
        self.whole = Cuttable.of(program, axes)
        self.target = target_name(target)
        self.rates = rates_of(self.target)
        self.moving = _moving_values(program, {program.inputs[i] for i in wrt})
        self.independent = independent_operations(self.whole, axes)
        self.places = Places(self.whole, axes)
        self.bounds = self.places.bounds
        self._spans: dict[tuple[int, int], Span] = {}
        self._between: dict[int, float] = {}
        self._offloadable: dict[tuple[int, int], float] = {}
        self._costs: dict[tuple[int, int, Choice], SegmentCost] = {}

    @property
    def devices(self) -> int:
        """How many share the rows."""
        return 1 if self.row_mesh is None else self.row_mesh.count

    @property
    def last(self) -> int:
        """The number of the last bound."""
        return len(self.bounds) - 1

    def spans(self, kind: Kind) -> Iterator[tuple[int, int]]:
        """Bounds between which segments of a kind may run."""
        if kind.is_plain and kind.strategy.keeps_maps_within:
            # Two, for what the first gives may be wide: a stem's map before its pool. XLA:CPU keeps
            # all the same (see ``cost``).
            counts = (1,) if self.target == "cpu" else (1, 2)
            every = itertools.product(range(self.last), counts)
            yield from ((k, k + count) for k, count in every if k + count <= self.last)
            return
        bounds = range(self.last + 1) if kind.is_plain else self.places.row_bounds
        for start, stop in itertools.combinations(bounds, 2):
            if not kind.offload or self.offloadable_bytes(start, stop):
                yield start, stop

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
            self._costs[key] = self._cost(start, stop, choice)
        return self._costs[key]

    def _cost(self, start: int, stop: int, choice: Choice) -> SegmentCost:
        if choice.offload:
            return self._offloaded(start, stop, choice)
        strategy, is_divided = choice.strategy, choice.micro_batches > 1
        is_single = stop - start == 1 or strategy.keeps_maps_within
        if not (is_single or strategy.by_rows or is_divided):
            return self._by_whole_maps(start, stop, choice)
        span = self.span(start, stop)
        if is_divided:
            found = self._by_micro_batches(span, choice)
        else:
            found = segment_cost(span.segment, choice, span.wrt, self.target)
        backward = found.backward_bytes + self._waiting_bytes(start, stop)
        # Fewer bytes may seem to move by rows, but what whole maps find in caches is not known.
        least = _LOOP * self.cost(start, stop, COLUMN).seconds if choice.strategy.by_rows else 0.0
        return dataclasses.replace(
            found, backward_bytes=backward, seconds=max(found.seconds, least)
        )

    def _waiting_bytes(self, start: int, stop: int) -> float:
        """Gradients of maps that later spans read and earlier ones made, which wait meanwhile."""
        first, after = self.bounds[start], self.bounds[stop]
        avals = self.whole.program.avals
        waiting = sum(
            size_bytes(avals[v])
            for v, made in self.places.made_at.items()
            if made < first and self.places.last_use[v] >= after and v in self.moving
        )
        return waiting / self.devices

    # --- Maps on the host ------------------------------------------------------------------------

    def offloadable_bytes(self, start: int, stop: int) -> float:
        """Of the maps that a span gives, what may wait in the host's memory.

        Maps of numbers that are read between this bound and the next alone, so that one segment
        reads them, wherever the next cut is. A CPU has no other memory, and maps whose rows are
        divided among devices stay there.
        """
        stays = self.row_mesh is not None or isinstance(find(self.target), CpuTarget)
        if stays or stop == self.last:
            return 0.0
        if (start, stop) not in self._offloadable:
            self._offloadable[start, stop] = self._offloadable_bytes(start, stop)
        return self._offloadable[start, stop]

    def _offloadable_bytes(self, start: int, stop: int) -> float:
        program, row_axis = self.whole.program, self.whole.row_axis
        first, after = self.bounds[stop], self.bounds[stop + 1]
        later = {v for e in self.whole.operations[after:] for v in values_of(e)}
        later.update(v for v in program.outputs if isinstance(v, int))
        soon = {v for e in self.whole.operations[first:after] for v in values_of(e)}
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
        return dataclasses.replace(
            found,
            saved_bytes=found.saved_bytes - given,
            forward_bytes=max(found.forward_bytes - by_rows, 0.0),
            backward_bytes=max(found.backward_bytes - by_rows, 0.0),
            offloaded_bytes=given,
            seconds=found.seconds + _TRANSFERS * given / self.rates.host_bytes_per_s,
        )

    # --- Spans of several ------------------------------------------------------------------------

    def _by_whole_maps(self, start: int, stop: int, choice: Choice) -> SegmentCost:
        """From the spans between neighbouring bounds: their passes follow each other."""
        kept = [self.cost(k, k + 1, COLUMN) for k in range(start, stop)]
        own = [self.cost(k, k + 1, choice) for k in range(start, stop)]
        saved = forward = backward = 0.0
        for k, cost in zip(range(start, stop), kept, strict=True):
            forward = max(forward, saved + cost.forward_bytes)
            backward = max(backward, saved + cost.backward_bytes)
            saved += cost.saved_bytes + (self._saved_between(k) if k > start else 0.0)
        # XLA:CPU keeps what should be done again (see ``cost``).
        if choice.strategy.recomputes and self.target != "cpu":
            saved = self.span(start, stop).output_bytes
            # What one span gives the next takes.
            pairs = itertools.pairwise(own)
            forward = max(b.forward_bytes + a.saved_bytes for a, b in pairs)
            forward = max(forward, own[0].forward_bytes)
        return SegmentCost(
            sum(c.operations for c in own),
            saved,
            forward,
            backward,
            seconds=sum(c.seconds for c in own),
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
        count = choice.micro_batches
        if count not in span.parts:
            span.parts[count] = micro_batches(span.segment, count)
        own, single = span.parts[count], dataclasses.replace(choice, micro_batches=1)
        once = segment_cost(own.part, single, span.wrt, self.target)
        structs = span.segment.program.structs
        sums = sum(4.0 * math.prod(structs[i].shape) for i in span.wrt if i not in own.divided)
        taken = sum(size_bytes(structs[i]) for i in own.divided) / count / self.devices
        around = span.output_bytes + span.moving_bytes + sums + taken
        return SegmentCost(
            once.operations * count,
            span.output_bytes,
            span.output_bytes + once.forward_bytes + taken,
            around + max(once.backward_bytes, once.forward_bytes),
            seconds=count * (once.seconds + 3 * sums / self.rates.bytes_per_s),
        )

    def _span(self, start: int, stop: int) -> Span:
        segment = dataclasses.replace(self.whole.between(start, stop), row_mesh=self.row_mesh)
        program, row_axis = segment.program, self.whole.row_axis
        avals = self.whole.program.avals
        maps = [v for v, a in zip(program.inputs, segment.axes, strict=True) if a is not None]
        return Span(
            segment=segment,
            wrt=tuple(i for i, v in enumerate(program.inputs) if v in self.moving),
            output_bytes=sum(
                size_bytes(avals[v]) / (self.devices if v in row_axis else 1) for v in segment.made
            ),
            moving_bytes=sum(size_bytes(avals[v]) for v in maps if v in self.moving) / self.devices,
            may_divide=all(self.independent[start:stop]),
        )


def _moving_values(program: FlatProgram, wrt: set[int]) -> set[int]:
    """Values through which gradients flow."""
    moving = {v for v in wrt if jnp.issubdtype(program.avals[v].dtype, jnp.inexact)}
    for equation in program.equations:
        if moving.intersection(values_of(equation)):
            moving.update(
                v for v in equation.outputs if jnp.issubdtype(program.avals[v].dtype, jnp.inexact)
            )
    return moving
