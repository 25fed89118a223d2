"""One step of a row loop: every operation on its rows, band by band."""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lrjax.loop import devices
from lrjax.loop.bands import Band
from lrjax.loop.blocks import padded_rows
from lrjax.loop.clock import Clock
from lrjax.loop.dependent_fill import zero_behind
from lrjax.loop.line_buffers import (
    AtHand,
    Ring,
    Values,
    extend,
    line_buffer_of,
    typed,
)
from lrjax.loop.rowloop import RowLoop, Source
from lrjax.program.inline import array_of
from lrjax.rowgraph.graph import RowNode
from lrjax.rules.base import Array, Rows, with_at
from lrjax.rules.block_sums import accumulator_dtype
from lrjax.rules.masks import keep, keep_rows
from lrjax.rules.reduction import identity_of


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step has made so far.

    Attributes:
      at_hand: rows that it may still read.
      lines: line buffers for the next step.
      rows: of the loop's outputs.
      partial: contributions to reductions.
      slabs: what a branch gives instead of rows at hand, line buffers and outputs, which are made
        of them behind it. No line buffer passes through a branch: XLA may copy it there.
    """

    at_hand: dict[int, AtHand | Ring] = dataclasses.field(default_factory=dict)
    lines: Values = dataclasses.field(default_factory=dict)
    rows: Values = dataclasses.field(default_factory=dict)
    partial: Values = dataclasses.field(default_factory=dict)
    slabs: Values = dataclasses.field(default_factory=dict)

    def updated(self, other: StepResult) -> StepResult:
        return StepResult(
            {**self.at_hand, **other.at_hand},
            {**self.lines, **other.lines},
            {**self.rows, **other.rows},
            {**self.partial, **other.partial},
        )


jax.tree_util.register_dataclass(StepResult, ["at_hand", "lines", "rows", "partial", "slabs"], [])


# The rows that a read takes of an array that exists whole, not before a zero is there, by the clock
# of the function (a branch, say) in which it is read.
ReadWindow = Callable[[Clock, Source, Any], Array]


def run_step(
    loop: RowLoop,
    clock: Clock,
    lines: Values,
    read: ReadWindow,
    wholes: Values,
) -> StepResult:
    """Every operation of the stage on this step's rows.

    Bands of operations that have no row of the image in many steps sit under a ``cond``.
    """
    step, done = _Step(loop, clock.afresh(), lines, read, wholes), StepResult()
    for band in loop.bands:
        if clock.is_alone or (band.first, band.last) == (0, loop.steps - 1):
            done = done.updated(step.run(band, done))
            continue

        def compute(done: StepResult = done, band: Band = band) -> StepResult:
            return step.in_branch().run(band, done)

        def skip(band: Band = band) -> StepResult:
            return step.in_branch().skip(band)

        now = step.clock["step"]
        made = lax.cond((now >= band.first) & (now <= band.last), compute, skip)
        done = done.updated(step.kept(band, made))
    return done


@dataclasses.dataclass(frozen=True)
class _Step:
    """One step of a loop, band by band.

    Attributes:
      loop: the loop.
      clock: the integers of the step.
      lines: line buffers that it starts with.
      read: gives windows of values that exist whole.
      wholes: values that are taken whole.
      is_branch: it is a function of its own, behind a ``cond``.
    """

    loop: RowLoop
    clock: Clock
    lines: Values
    read: ReadWindow
    wholes: Values
    is_branch: bool = False

    def in_branch(self) -> _Step:
        """The step in a function of its own; see ``Clock.afresh``."""
        return dataclasses.replace(self, clock=self.clock.afresh(), is_branch=True)

    def kept(self, band: Band, made: StepResult) -> StepResult:
        """What a branch made, with its slabs where the step keeps them."""
        result = StepResult(partial=made.partial)
        for v, slab in made.slabs.items():
            self.keep(result, v, slab)
        return self.exported(band, result)

    def run(self, band: Band, done: StepResult) -> StepResult:
        """What the band makes."""
        loop, made = self.loop, StepResult()
        at_hand = ChainMap(made.at_hand, done.at_hand)
        for i in band.nodes:
            node, part = loop.nodes[i], self.rows_inside(i)
            if part == (0, 0):
                self.skip_node(i, made)
                continue
            sources = {s.operand: s for s in loop.sources_of(i)}
            with node.equation.origin():
                zero = self.zero_behind_driver(node, sources, at_hand, part)
                operands = [
                    self.window(sources[operand], at_hand, part, zero)
                    if operand in sources
                    else array_of(atom, self.wholes)
                    for operand, atom in enumerate(node.equation.inputs)
                ]
                share, count = devices.share_of_node(loop, i), loop.schedule.tracks[i].rows
                if part is None:
                    start = self.clock.in_image(("start", i), share)
                else:
                    start, count = self.clock.row_of_image(part[0], share), part[1] - part[0]
                results = node.op.evaluate(operands, Rows(start, count, loop.is_differentiated))
            if node.is_reduction:
                for v, partial in zip(node.equation.outputs, results, strict=True):
                    partial = partial.astype(accumulator_dtype(partial.dtype))
                    made.partial[v] = typed(loop, v, partial)
                continue
            for v, slab in zip(node.equation.outputs, results, strict=True):
                with node.equation.origin():
                    slab = typed(loop, v, self.filled(v, slab, part))
                self.keep(made, v, slab)
        return self.exported(band, made)

    def rows_inside(self, index: int) -> tuple[int, int] | None:
        """The rows that a node computes in a step of its own; None in a step like all others."""
        alone = self.clock.is_alone
        return self.loop.rows_inside(index, self.clock["step"]) if alone else None

    def skip(self, band: Band) -> StepResult:
        """Rows outside the image hold the fill value, and add nothing to reductions."""
        made = StepResult()
        for i in band.nodes:
            self.skip_node(i, made)
        return self.exported(band, made)

    def skip_node(self, index: int, made: StepResult) -> None:
        """What a step makes of an operation that has no row of the image in it."""
        loop, avals = self.loop, self.loop.graph.program.avals
        node, track = loop.nodes[index], loop.schedule.tracks[index]
        for v in node.equation.outputs:
            if node.op.reduction is not None:
                dtype = accumulator_dtype(avals[v].dtype)
                fill = identity_of(node.op.reduction, dtype)
                made.partial[v] = typed(loop, v, jnp.full(avals[v].shape, fill, dtype))
                continue
            shape = with_at(avals[v].shape, loop.graph.row_axis[v], track.rows)
            slab = jnp.full(shape, loop.production_fill.get(v, 0), avals[v].dtype)
            self.keep(made, v, typed(loop, v, slab))

    def keep(self, made: StepResult, value: int, slab: Array) -> None:
        """A step's rows of a value, among what the step makes."""
        with line_buffer_of(self.loop, value):
            made.at_hand[value], line = extend(
                self.loop, self.clock, value, self.lines, slab, keeps=not self.is_branch
            )
        if self.is_branch:
            made.slabs[value] = slab
            return
        if line is not None:
            made.lines[value] = line
        if value in self.loop.row_outputs:
            made.rows[value] = slab

    def exported(self, band: Band, made: StepResult) -> StepResult:
        """What is used outside a band."""
        if not self.is_branch:
            at_hand = {v: rows for v, rows in made.at_hand.items() if v in band.exports}
            return dataclasses.replace(made, at_hand=at_hand)
        used = band.exports.union(self.lines, self.loop.row_outputs)
        slabs = {v: slab for v, slab in made.slabs.items() if v in used}
        return StepResult(partial=made.partial, slabs=slabs)

    def window(
        self,
        source: Source,
        at_hand: Mapping[int, AtHand | Ring],
        part: tuple[int, int] | None = None,
        zero: Any = 0,
    ) -> Array:
        """The rows that a read takes, for all rows of the node's slab or ``part`` of them."""
        is_driver = source.operand in self.loop.nodes[source.node].op.drivers
        zero = 0 if is_driver else zero
        loop, clock, axis = self.loop, self.clock, source.read.axis
        if part is not None:
            window = self.window_of_part(source, at_hand, part, zero)
            return devices.without_unread(loop, clock, source, window, part)
        place = source.node, source.operand
        height = loop.graph.program.avals[source.value].shape[axis]
        if source.value in loop.producer:
            back, rows = clock["back", *place], loop.window_rows(source)
            window = at_hand[source.value].window(back, rows, source.read.slack, zero)
            if loop.masked_at_read(source):
                share = devices.share(loop, source.value)
                kept = clock.inside(("window", *place), window.shape[axis], 0, height, share)
                window = keep(window, kept, axis, loop.fill_of(source))
        else:
            window = self.read(self.clock, source, zero)
        window = devices.without_unread(loop, clock, source, window)
        if loop.shards is not None and loop.nodes[source.node].is_reduction:
            return devices.own_rows(loop, clock, source, window)
        if is_driver and not loop.schedule.tracks[source.node].is_steady:
            # Rows computed again belong to an earlier step's contribution.
            low, high = ("owned", source.node), ("stop", source.node)
            kept = clock.inside(("window", *place), window.shape[axis], low, high)
            window = keep(window, kept, axis, source.read.fill)
        return window

    def zero_behind_driver(
        self,
        node: RowNode,
        sources: Mapping[int, Source],
        at_hand: Mapping[int, AtHand | Ring],
        part: tuple[int, int] | None,
    ) -> Any:
        """The integer 0, known when the rows are there that drive a reduction of several operands.

        XLA cuts the forward rows that kernel gradients read as soon as they are there, and keeps
        them beside those that they are cut from (VGG-16 at 4096x4096 in 4 blocks: 3,289 MiB, so
        2,756).
        """
        drivers = [sources[i] for i in node.op.drivers if i in sources]
        if self.loop.is_differentiated or len(drivers) != 1 or len(sources) == 1:
            return 0
        if part is None and drivers[0].value not in self.loop.producer:
            return 0  # it is there already
        return zero_behind([self.window(drivers[0], at_hand, part)])

    def window_of_part(
        self,
        source: Source,
        at_hand: Mapping[int, AtHand | Ring],
        part: tuple[int, int],
        zero: Any = 0,
    ) -> Array:
        """The rows that a read takes for some rows of the node's, in a step of its own."""
        loop, (start, size) = self.loop, self.loop.window_of(source, part)
        fill, is_masked = loop.fill_of(source), loop.masked_at_read(source)
        if loop.shards is not None and loop.nodes[source.node].is_reduction:
            fill, is_masked = source.read.fill, True
        if source.value not in loop.producer:
            window = self.read(self.clock, source, zero)
        else:
            back = self.clock["stop", loop.producer[source.value]] - start
            window = at_hand[source.value].window(back, size, source.read.slack, zero)
        if not is_masked:
            return window
        return devices.of_image_alone(loop, self.clock, source, window, start, fill)

    def filled(self, value: int, slab: Array, part: tuple[int, int] | None = None) -> Array:
        """A step's rows of a value, of which those outside the image hold what readers need.

        Of ``part`` of the rows all others are outside, or nothing depends on them.
        """
        loop, clock = self.loop, self.clock
        if part is not None:
            node, axis = loop.producer[value], loop.graph.row_axis[value]
            start, stop = clock["start", node], clock["stop", node]
            fill, height = loop.production_fill.get(value, 0), loop.graph.height(value)
            is_inside = devices.is_inside_image(loop, value, *part)
            if not is_inside and value in loop.production_fill:
                first = clock.row_of_image(part[0], devices.share(loop, value))
                slab = keep_rows(slab, first, axis, 0, height, fill)
            return padded_rows(slab, part[0] - start, stop - part[1], axis, fill)
        if value not in loop.production_fill:
            return slab
        axis = loop.graph.row_axis[value]
        kept = devices.kept_rows(loop, clock, value, slab.shape[axis])
        if kept is None:
            return slab
        return keep(slab, kept, axis, loop.production_fill[value])
