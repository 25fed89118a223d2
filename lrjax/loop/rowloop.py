"""A stage of a row graph with its schedule: everything about a row loop that is decided before
anything runs. Static; ``engine`` runs it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from lrjax.loop.bands import Band, joined_spans
from lrjax.loop.ends import repeated_steps
from lrjax.loop.halos import Halos, kind_of
from lrjax.loop.heights import Order, is_sink, references_of, speeds_of
from lrjax.loop.schedule import (
    Read,
    Schedule,
    Task,
    Track,
    brought_forward,
    needed_rows,
    overlap_schedule,
    shared_schedule,
)
from lrjax.loop.shards import Shards
from lrjax.program.inline import FlatEquation
from lrjax.program.varying import is_inexact
from lrjax.rowgraph.graph import RowGraph, RowNode, root_of
from lrjax.rules.base import RowRead
from lrjax.rules.geometry import Frontier, ceil_div, round_down, round_up
from lrjax.rules.traits import Kind


@dataclasses.dataclass(frozen=True)
class Source:
    """A read of one operand: the node and operand it belongs to and the value it reads."""

    node: int
    operand: int
    value: int
    read: RowRead


# Rings of slabs lower than this cost more than they save, unless they are deep: every window is
# then put together from many slots, and XLA compiles VGG-16's gradient at 4096x4096 in 256 blocks a
# third slower. Shifting moves all of a deep buffer for a few new rows, and XLA keeps it twice:
# ConvNeXt-T's gradient at 4096x4096 takes a third more without deep rings.
RING_SLAB = 16
DEEP_SLABS = 16
# Rows of a step over those asked for, at most, where operations of all rates then take even steps.
_MOST_ALIGNED = 1.0625
# A row beyond all others.
_FAR = 1 << 30


@dataclasses.dataclass(frozen=True)
class RowLoop:
    """One stage, ready to run.

    Attributes:
      graph: the graph it is a stage of.
      nodes: its row operations; task ``i`` of ``schedule`` is node ``i``.
      schedule: the steps.
      row_outputs: streamed values that must exist whole after the loop.
      producer: node that makes a streamed value of this stage.
      is_differentiated: steps are differentiated one by one: line buffers are saved for every
        step and must be small, so they are no rings.
      shards: where the rows are divided among devices, how; the schedule is of a share's rows.
      forward: of steps that are differentiated and find nothing in line buffers, the loop that
        makes the same rows once; None where this one does.
    """

    graph: RowGraph
    nodes: tuple[RowNode, ...]
    schedule: Schedule
    row_outputs: tuple[int, ...]
    producer: dict[int, int]
    is_differentiated: bool
    shards: Shards | None = None
    forward: RowLoop | None = None

    @functools.cached_property
    def needs(self) -> list[tuple[int, int]]:
        """Per node, the rows that what leaves the loop depends on."""
        return needed_rows(self.schedule.tasks)

    @property
    def steps(self) -> int:
        return self.schedule.steps

    @functools.cached_property
    def sources(self) -> tuple[Source, ...]:
        """Every read by rows, in the order of the schedule's reads."""
        return tuple(s for i in range(len(self.nodes)) for s in self.sources_of(i))

    def sources_of(self, index: int) -> list[Source]:
        return [Source(index, *row_read) for row_read in self.nodes[index].row_reads]

    @functools.cached_property
    def readers(self) -> dict[int, list[Source]]:
        """The reads of every value."""
        found: dict[int, list[Source]] = {}
        for source in self.sources:
            found.setdefault(source.value, []).append(source)
        return found

    @functools.cached_property
    def sliced(self) -> tuple[Source, ...]:
        """Reads of values that exist whole."""
        return tuple(s for s in self.sources if s.value not in self.producer)

    @functools.cached_property
    def wholes(self) -> tuple[int, ...]:
        """Values that operations of this stage use whole."""
        return tuple(dict.fromkeys(v for node in self.nodes for v in node.whole_inputs()))

    @functools.cached_property
    def arrays(self) -> tuple[int, ...]:
        """Values that exist whole and are sliced by rows."""
        return tuple(dict.fromkeys(s.value for s in self.sliced))

    @functools.cached_property
    def reductions(self) -> dict[int, tuple[FlatEquation, str]]:
        """The equation of every result that is combined over the steps, and how."""
        return {
            v: (node.equation, node.op.reduction)
            for node in self.nodes
            if node.op.reduction is not None
            for v in node.equation.outputs
        }

    @functools.cached_property
    def latest_input(self) -> int | None:
        """One of the maps that are sliced, or of what earlier stages made, made as late as any.

        Inputs that are taken whole are parameters more often than not, and exist from the start.
        """
        made = self.graph.made_at
        maps = [v for v in self.arrays if v not in self.graph.program.constants]
        wholes = [v for v in self.wholes if made.get(v, 0) > 0]
        return max((*maps, *wholes), key=lambda v: made.get(v, -1), default=None)

    def track(self, value: int) -> Track:
        return self.schedule.tracks[self.producer[value]]

    def window(self, source: Source, step: int) -> tuple[int, int]:
        start = source.read.row_map.first(self.schedule.tracks[source.node].start(step))
        return start, start + self.window_rows(source)

    def window_rows(self, source: Source) -> int:
        """How many rows a read takes in a step."""
        return source.read.row_map.size(self.schedule.tracks[source.node].rows)

    def window_starts(self, source: Source) -> Frontier:
        """The first row that a read needs, per step."""
        track = self.schedule.tracks[source.node]
        return source.read.row_map.first(track.stops - track.rows)

    def rows_inside(self, index: int, step: int) -> tuple[int, int]:
        """The first row of the image that a node has in a step, and one past the last.

        Of a reduction those that the step owns. ``(0, 0)``: none. Where devices share the rows,
        those on which the share of each depends; the image may begin or end among them.
        """
        node, track = self.nodes[index], self.schedule.tracks[index]
        first = track.owned(step)[0] if node.is_reduction else track.start(step)
        quantum = self.quanta[index]
        low, high = (0, node.op.height) if self.shards is None else self.needs[index]
        start = max(first, round_down(low, quantum))
        stop = min(track.stop(step), round_up(high, quantum))
        return (start, stop) if stop > start else (0, 0)

    @functools.cached_property
    def quanta(self) -> tuple[int, ...]:
        """Of every node, rows of which its steps compute multiples."""
        reads = ([read.row_map.quantum for _, _, read in node.row_reads] for node in self.nodes)
        return tuple(math.lcm(*own) for own in reads)

    def window_of(self, source: Source, part: tuple[int, int]) -> tuple[int, int]:
        """First row and number of rows that a read takes for some rows of its node."""
        row_map = source.read.row_map
        return row_map.first(part[0]), row_map.size(part[1] - part[0])

    @functools.cached_property
    def repeated(self) -> tuple[int, int]:
        """The first of the steps that one program repeats, and one past the last.

        The others are programs of their own; see ``ends``.
        """
        # What is differentiated runs forward, then forward and backward (OverL's first run is
        # another loop's: less is saved than is counted).
        runs = 4 if self.is_differentiated else 1

        @functools.cache
        def inside(step: int) -> float:
            parts = (self.rows_inside(i, step) for i in range(len(self.nodes)))
            pairs = zip(self.nodes, parts, strict=True)
            return runs * sum(node.op.flops * (stop - start) for node, (start, stop) in pairs)

        is_shared = self.shards is not None
        return repeated_steps(self.steps, runs * sum(self.work), inside, is_shared=is_shared)

    @functools.cached_property
    def work(self) -> tuple[float, ...]:
        """Operations of every node in a step."""
        pairs = zip(self.nodes, self.schedule.tracks, strict=True)
        return tuple(node.op.flops * track.rows for node, track in pairs)

    def executed_rows(self, index: int) -> int:
        """Rows that a node computes in all steps: some twice, or outside the image."""
        first, stop = self.repeated
        inside = (self.rows_inside(index, t) for t in (*range(first), *range(stop, self.steps)))
        return (stop - first) * self.schedule.tracks[index].rows + sum(b - a for a, b in inside)

    @functools.cached_property
    def full_steps(self) -> float:
        """Steps by their operations: one of which a part is outside the image counts as less."""
        if not sum(self.work):
            return float(self.steps)
        pairs = zip(range(len(self.nodes)), self.nodes, strict=True)
        return sum(node.op.flops * self.executed_rows(i) for i, node in pairs) / sum(self.work)

    def leaves_image(self, source: Source) -> bool:
        """Some step reads rows outside the image that must hold the fill value."""
        if source.read.fill is None:
            return False
        height = self.graph.program.avals[source.value].shape[source.read.axis]
        node, row_map = self.nodes[source.node], source.read.row_map
        if self.shards is not None and node.is_reduction:
            return False  # it takes a device's own rows of the image alone
        if not node.is_reduction:
            return row_map.first(0) < 0 or row_map.end(node.op.height) > height
        starts = self.window_starts(source)
        return bool(np.min(starts) < 0 or np.max(starts) + self.window_rows(source) > height)

    def fill_of(self, source: Source) -> Any:
        """What a window must hold outside the image, None if it does not matter.

        A step that is differentiated multiplies what rows outside the image hold by cotangents
        of zero, so beside a parameter, whose gradient is a sum over all rows, they must hold
        something whose derivatives are finite: 1.
        """
        if self.leaves_image(source):
            return source.read.fill
        node = self.nodes[source.node]
        if not self.is_differentiated or node.op.preserves_finiteness:
            return None
        is_beside_parameter = bool(node.whole_inputs())
        return 1 if is_beside_parameter else None

    @functools.cached_property
    def production_fill(self) -> dict[int, Any]:
        """Streamed values whose rows outside the image are set as they are made.

        One select fused into the value's own producer serves all consumers; where they disagree
        on the value, each masks its window.
        """
        wanted: dict[int, set[Any]] = {}
        for s in self.sources:
            if s.value in self.producer and self.fill_of(s) is not None:
                wanted.setdefault(s.value, set()).add(self.fill_of(s))
        chosen = {v: next(iter(fills)) for v, fills in wanted.items() if len(fills) == 1}
        if not self.is_differentiated:
            return chosen
        return self.possibly_not_finite | {
            v: fill for v, fill in chosen.items() if np.isfinite(fill)
        }

    @functools.cached_property
    def possibly_not_finite(self) -> dict[int, int]:
        """Values whose rows outside the image could turn a cotangent of zero into NaN.

        They are set to 1 as they are made, which also stops cotangents there: what operations with
        poles or overflows make and read, and windows over infinite padding.
        """
        found: dict[int, int] = {}
        for i, node in enumerate(self.nodes):
            sources = self.sources_of(i)
            fills = [s.read.fill for s in sources if self.leaves_image(s)]
            if node.op.preserves_finiteness and all(map(np.isfinite, fills)):
                continue
            values = [*node.equation.outputs, *(s.value for s in sources)]
            found.update((v, 1) for v in values if v in self.producer)
        avals = self.graph.program.avals
        return {v: 1 for v in found if is_inexact(avals[v])}

    @functools.cached_property
    def unread(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Reads, by node and operand, in which rows of the image are that column never reads.

        What a crop, or the rest of a stride, leaves out meets cotangents of zero there, and may be
        infinite. The rows that count are from the first number up to the second.
        """
        found: dict[tuple[int, int], tuple[int, int]] = {}
        for s in self.sources:
            node, row_map = self.nodes[s.node], s.read.row_map
            aval, height = self.graph.program.avals[s.value], node.op.height
            if not (self.is_differentiated or node.is_reduction) or not is_inexact(aval):
                continue
            low, high = int(row_map.first(0)), int(row_map.end(height))
            track, is_shared = self.schedule.tracks[s.node], self.shards is not None
            # Rows that the node makes outside of the image read rows of the image.
            is_above = is_shared or track.start(0) < 0
            is_below = is_shared or track.stop(self.steps - 1) > height
            above = low if is_above and min(low, int(row_map.end(0))) > 0 else -_FAR
            last = max(high, int(row_map.first(height)))
            below = high if is_below and last < aval.shape[s.read.axis] else _FAR
            if (above, below) != (-_FAR, _FAR):
                found[s.node, s.operand] = above, below
        return found

    def masked_at_read(self, source: Source) -> bool:
        """The window is masked where it is read, because the value itself holds another fill."""
        if source.value not in self.producer:
            return False
        fill = self.fill_of(source)
        return fill is not None and fill != self.production_fill.get(source.value)

    def active_steps(self, index: int) -> tuple[int, int]:
        """First and last step in which a node has rows of the image."""
        track, node = self.schedule.tracks[index], self.nodes[index]
        low, high = (0, node.op.height) if self.shards is None else self.needs[index]
        starts = np.array(track.frontier[:-1]) if node.is_reduction else track.stops - track.rows
        first = int(np.searchsorted(track.stops, low, side="right"))
        last = int(np.searchsorted(starts, high, side="left")) - 1
        return (first, last) if first <= last else (0, 0)

    @functools.cached_property
    def bands(self) -> tuple[Band, ...]:
        """The nodes in order; one band for all where skipping saves too little."""
        begin, end = self.repeated
        spans = [self.active_steps(i) for i in range(len(self.nodes))]
        spans = [(max(first, begin) - begin, min(last, end - 1) - begin) for first, last in spans]
        bands = []
        for start, stop, first, last in joined_spans(spans, self.work, end - begin):
            is_always = (first, last) == (0, end - begin - 1)
            first, last = (0, self.steps - 1) if is_always else (first + begin, last + begin)
            nodes = range(start, stop)
            made = {v for i in nodes for v in self.nodes[i].equation.outputs}
            read = {s.value for s in self.sources if s.node not in nodes}
            bands.append(Band(tuple(nodes), first, last, frozenset(made & read)))
        return tuple(bands)

    def is_ring(self, value: int) -> bool:
        """The line buffer is a ring of slabs, written in place, instead of rows that shift.

        Shifting moves the whole buffer in every step; a ring wants steady slabs, and pays off
        where the buffer is much deeper than a slab.
        """
        return value in self._rings

    @functools.cached_property
    def _rings(self) -> frozenset[int]:
        return frozenset(filter(self._may_be_ring, self.producer))

    def _may_be_ring(self, value: int) -> bool:
        track = self.track(value)
        return (
            not self.is_differentiated
            and track.is_steady
            and track.depth >= (3 if track.rows >= RING_SLAB else DEEP_SLABS) * track.rows
            and all(np.ptp(self.look_back(s)) == 0 for s in self.readers.get(value, ()))
        )

    def line_rows(self, value: int) -> int:
        """Rows of the value's line buffer, 0 for none."""
        track = self.track(value)
        if track.depth <= track.rows:
            return 0
        if self.is_ring(value):
            return round_up(track.depth, track.rows)
        return track.carried

    @functools.cached_property
    def line_bytes(self) -> int:
        """Bytes of all line buffers."""
        return sum(self.line_rows(v) * self.graph.row_bytes(v) for v in self.producer)

    def look_back(self, source: Source) -> Frontier:
        """Per step, how far before the value's frontier a window starts."""
        return self.track(source.value).stops - self.window_starts(source)


def row_loop(
    graph: RowGraph,
    stage: int,
    *,
    order: Order,
    num_blocks: int,
    is_differentiated: bool,
    shards: Shards | None = None,
) -> RowLoop:
    """Schedule one stage, or a device's share of it."""
    nodes = graph.stage_nodes(stage)
    producer = {
        v: i
        for i, node in enumerate(nodes)
        if not node.is_reduction
        for v in node.equation.outputs
        if v in graph.row_axis
    }
    row_outputs = tuple(v for v in producer if v in graph.stages.made_whole[stage])
    if num_blocks == 1:
        # One step that computes everything; the same rows in every order.
        order = Order(divides_output=True, recomputes_halos=True)
    references = references_of(graph, stage, order)
    if shards is not None:
        references = {
            root: (shards.rows((root, rate)), rate) for root, (_, rate) in references.items()
        }

    def height(node: RowNode) -> int:
        return node.op.height if shards is None else shards.rows(root_of(graph, node))

    halos = None if is_differentiated else Halos(graph, nodes)
    # What does not depend on the rows of a block.
    reads = [
        tuple(
            Read(producer.get(v), read.row_map, kind_of(node) is Kind.LIBRARY)
            for _, v, read in node.row_reads
        )
        for node in nodes
    ]
    heights = [height(node) for node in nodes]
    sinks = [is_sink(graph, node, stage) for node in nodes]
    widths = [
        sum(graph.row_bytes(v) for v in node.equation.outputs if v in producer) for node in nodes
    ]

    def schedule(blocks: Fraction) -> Schedule:
        speeds = speeds_of(graph, nodes, references, blocks)
        most = [0] * len(nodes) if halos is None else halos.most(speeds)
        tasks = list(map(Task, reads, heights, speeds, sinks, most, widths))
        if order.recomputes_halos:
            return overlap_schedule(tasks)
        return shared_schedule(tasks, is_share=shards is not None)

    found = _shortest_blocks(graph, nodes, references, num_blocks, schedule)
    return RowLoop(graph, tuple(nodes), found, row_outputs, producer, is_differentiated, shards)


def with_less_waiting(loop: RowLoop) -> RowLoop:
    """The loop with operations brought forward that give less than what waits for them."""
    found = dataclasses.replace(loop, schedule=brought_forward(loop.schedule))
    return found if found.line_bytes < loop.line_bytes else loop


def _shortest_blocks(
    graph: RowGraph,
    nodes: Sequence[RowNode],
    references: Mapping[int, tuple[int, Fraction]],
    num_blocks: int,
    schedule: Callable[[Fraction], Schedule],
) -> Schedule:
    """The schedule of ``num_blocks``, with the fewest rows a step that take no more steps.

    Operations behind others lag by a few rows, for which there is one step more or several. Blocks
    of a share of the height would make rows beyond the image there: 4 blocks were 5 full steps.
    """
    found = schedule(Fraction(num_blocks))
    if found.steps <= num_blocks or not references:
        return found
    root, (height, rate) = max(references.items(), key=lambda item: item[1][0] / item[1][1])
    rows = ceil_div(height, num_blocks)
    own = [own for node in nodes for at, own in [root_of(graph, node)] if at == root]
    unit = math.lcm(*((own_rate / rate).denominator for own_rate in own))
    if rows % unit and round_up(rows, unit) <= _MOST_ALIGNED * rows:
        # Even steps of all operations: buffers need not shift by other numbers of rows every time.
        tried = schedule(Fraction(height, round_up(rows, unit)))
        if tried.steps <= found.steps:
            found, rows = tried, round_up(rows, unit)
    unit = unit if rows % unit == 0 else 1
    # In units of rows: too few for so many steps, and enough.
    low, high = ceil_div(ceil_div(height, found.steps), unit) - 1, rows // unit
    while high - low > 1:
        middle = (low + high) // 2
        tried = schedule(Fraction(height, middle * unit))
        if tried.steps <= found.steps:
            found, high = tried, middle
        else:
            low = middle
    return found
