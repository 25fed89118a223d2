"""Run row loops: one compiled step under ``lax.scan``, line buffers, in-place outputs, reductions.

Every step has the same shape: rows outside the image are computed like any others and hold the
fill value where something reads them. Offsets that change from step to step are scanned
integers; most do not change.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import ChainMap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lrjax.loop import devices
from lrjax.loop.bands import Band
from lrjax.loop.blocks import padded_rows, read_rows, write_rows
from lrjax.loop.clock import Clock, clock_of
from lrjax.loop.dependent_fill import Full, full_depending_on, full_like, zero_behind
from lrjax.loop.line_buffers import (
    AtHand,
    Ring,
    SavedLines,
    Values,
    empty_lines,
    extend,
    line_buffer_of,
    producer_of,
    saved_line_specs,
    typed,
)
from lrjax.loop.offload import empty_on_host
from lrjax.loop.rowloop import RowLoop, Source
from lrjax.loop.shards import WithHalo
from lrjax.loop.sums import add_partial, empty_sums, finished_sums
from lrjax.program.inline import array_of
from lrjax.program.interpreter import collection_paused
from lrjax.rowgraph.graph import RowNode
from lrjax.rules.base import Array, Rows, with_at
from lrjax.rules.block_sums import accumulator_dtype
from lrjax.rules.masks import keep, keep_rows
from lrjax.rules.reduction import identity_of

# --- One step ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step has made so far.

    Attributes:
      at_hand: rows that it may still read.
      lines: line buffers for the next step.
      rows: of the loop's outputs.
      partial: contributions to reductions.
    """

    at_hand: dict[int, AtHand | Ring] = dataclasses.field(default_factory=dict)
    lines: Values = dataclasses.field(default_factory=dict)
    rows: Values = dataclasses.field(default_factory=dict)
    partial: Values = dataclasses.field(default_factory=dict)

    def updated(self, other: StepResult) -> StepResult:
        return StepResult(
            {**self.at_hand, **other.at_hand},
            {**self.lines, **other.lines},
            {**self.rows, **other.rows},
            {**self.partial, **other.partial},
        )


jax.tree_util.register_dataclass(StepResult, ["at_hand", "lines", "rows", "partial"], [])


# The rows that a read takes of an array that exists whole, not before a zero is there, by the clock
# of the function (a branch, say) in which it is read.
ReadWindow = Callable[[Clock, Source, Any], Array]


def place_of_window(
    loop: RowLoop, clock: Clock, source: Source
) -> tuple[Any, int, tuple[int, int]]:
    """First row and rows of what a step's read takes, and the extremes of the first row."""
    if clock.is_alone:
        part = loop.rows_inside(source.node, clock["step"])
        start, size = loop.window_of(source, part)
        return start, size, (start, start)
    name = "window", source.node, source.operand
    return clock[name], loop.window_rows(source), clock.bounds(name)


def window_of_array(
    loop: RowLoop,
    clock: Clock,
    arrays: Mapping[Any, Array | WithHalo],
    source: Source,
    zero: Any = 0,
) -> Array:
    """The rows that a step's read takes of an array that exists whole."""
    start, size, bounds = place_of_window(loop, clock, source)
    fill = _fill(loop, source)
    array = arrays[devices.array_key(loop, source)]
    if not isinstance(array, WithHalo):
        return read_rows(array, start, size, source.read.axis, fill, bounds, zero)
    window = array.read(start, size, fill, bounds, zero)
    if not clock.is_alone:
        return devices.of_image(loop, clock, source, window, fill)
    if loop.fill_of(source) is not None:
        return devices.of_image_alone(loop, clock, source, window, start, fill)
    return window


def _fill(loop: RowLoop, source: Source) -> Any:
    """What rows outside a whole array hold: a number, also where the read's own fill is infinite.

    No window leaves the image where ``fill_of`` is None, so any number does. It is 1 in a step that
    is differentiated, where rows outside the image must be finite (see ``RowLoop.fill_of``).
    """
    fill = loop.fill_of(source)
    return int(loop.is_differentiated) if fill is None else fill


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
            return step.afresh().run(band, done)

        def skip(band: Band = band) -> StepResult:
            return step.afresh().skip(band)

        now = step.clock["step"]
        made = lax.cond((now >= band.first) & (now <= band.last), compute, skip)
        done = done.updated(made)
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
    """

    loop: RowLoop
    clock: Clock
    lines: Values
    read: ReadWindow
    wholes: Values

    def afresh(self) -> _Step:
        """The step in a function of its own; see ``Clock.afresh``."""
        return dataclasses.replace(self, clock=self.clock.afresh())

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
        return _exported(band, made)

    def rows_inside(self, index: int) -> tuple[int, int] | None:
        """The rows that a node computes in a step of its own; None in a step like all others."""
        alone = self.clock.is_alone
        return self.loop.rows_inside(index, self.clock["step"]) if alone else None

    def skip(self, band: Band) -> StepResult:
        """Rows outside the image hold the fill value, and add nothing to reductions."""
        made = StepResult()
        for i in band.nodes:
            self.skip_node(i, made)
        return _exported(band, made)

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
            made.at_hand[value], line = extend(self.loop, self.clock, value, self.lines, slab)
        if line is not None:
            made.lines[value] = line
        if value in self.loop.row_outputs:
            made.rows[value] = slab

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


def _exported(band: Band, made: StepResult) -> StepResult:
    at_hand = {v: rows for v, rows in made.at_hand.items() if v in band.exports}
    return dataclasses.replace(made, at_hand=at_hand)


# --- The loop ------------------------------------------------------------------------------------


def empty_outputs(loop: RowLoop, full: Full, hosted: Collection[int] = ()) -> Values:
    """Arrays for the row outputs, of which every row will be written; some in the host's memory."""
    avals = loop.graph.program.avals
    outputs = {}
    for v in loop.row_outputs:
        with producer_of(loop, v).origin():
            if v in hosted:
                empty = empty_on_host(avals[v].shape, avals[v].dtype)
                outputs[v] = typed(loop, v, empty)
            else:
                outputs[v] = full_like(full, devices.type_on_device(loop, v))
    return outputs


def _awaited(loop: RowLoop, values: Values, after: Sequence[Any]) -> tuple[Any, ...]:
    """Arrays before which the loop does not start."""
    latest = () if loop.latest_input is None else (values[loop.latest_input],)
    return *latest, *after


def start_of(
    loop: RowLoop, values: Values, hosted: Collection[int] = (), after: Sequence[Any] = ()
) -> tuple[Values, Values, Values]:
    """Line buffers, row outputs and sums before the first step."""
    full = full_depending_on(_awaited(loop, values, after))
    return empty_lines(loop, full), empty_outputs(loop, full, hosted), empty_sums(loop, full)


def write_outputs(loop: RowLoop, clock: Clock, outputs: Values, rows: Values) -> Values:
    written = {}
    for v, array in outputs.items():
        name = ("start", loop.producer[v])
        axis = loop.graph.row_axis[v]
        with producer_of(loop, v).origin():
            written[v] = write_rows(array, rows[v], clock[name], axis, clock.bounds(name))
    return written


def run_loop(
    loop: RowLoop, values: Values, hosted: Collection[int] = (), after: Sequence[Any] = ()
) -> Values:
    """Run a row loop on values that exist whole; returns its row outputs and reductions.

    Row outputs among ``hosted`` never exist whole on the device. What the loop starts with is made
    behind its own latest input, and behind the arrays ``after``.
    """
    return run_steps(loop, values, hosted, after)[0]


Carry = tuple[Values, Values, Values]


@collection_paused()
def run_steps(
    loop: RowLoop,
    values: Values,
    hosted: Collection[int] = (),
    after: Sequence[Any] = (),
    *,
    saves_lines: bool = False,
) -> tuple[Values, SavedLines | None]:
    """``run_loop``; with it the line buffers that every step starts with, if they are saved."""
    if loop.shards is not None:
        return _run_over_devices(loop, values, after, saves_lines=saves_lines)
    arrays = {v: values[v] for v in loop.arrays}
    wholes = {v: values[v] for v in loop.wholes}
    start, awaited = start_of(loop, values, hosted, after), _awaited(loop, values, after)
    outputs, sums, saved = _scanned(loop, arrays, wholes, start, awaited, saves_lines=saves_lines)
    return {**outputs, **finished_sums(loop, sums)}, saved


def _scanned(
    loop: RowLoop,
    arrays: Mapping[Any, Array | WithHalo],
    wholes: Values,
    start: Carry,
    awaited: Sequence[Any],
    *,
    saves_lines: bool,
) -> tuple[Values, Values, SavedLines | None]:
    """Row outputs, accumulators and saved line buffers, behind the last step."""
    every = clock_of(loop)

    def step(clock: Clock, carry: Carry, row: Any, zero: Any = 0) -> tuple[Any, Values | None]:
        lines, outputs, sums = carry
        now = clock.at(row)

        def read(clock: Clock, source: Source, later: Any) -> Array:
            behind = zero if isinstance(later, int) else later
            return window_of_array(loop, clock, arrays, source, behind)

        result = run_step(loop, now, lines, read, wholes)
        outputs = write_outputs(loop, now, outputs, result.rows)
        saved = lines if saves_lines else None
        return (result.lines, outputs, add_partial(loop, sums, result.partial)), saved

    def one(carry: Carry, t: int) -> tuple[Any, Values | None]:
        return step(every.alone(t), carry, None, zero_behind(carry[1:] if t else awaited))

    carry, repeated, (first, stop) = start, None, loop.repeated
    alone = {}
    for t in range(first):
        carry, alone[t] = one(carry, t)
    if stop > first:
        clock = every.of_steps(first, stop)
        carry, repeated = lax.scan(functools.partial(step, clock), carry, clock.table())
    for t in range(stop, loop.steps):
        carry, alone[t] = one(carry, t)
    _, outputs, sums = carry
    if not saves_lines:
        return outputs, sums, None
    before, behind = ([alone[t] for t in ts] for ts in (range(first), range(stop, loop.steps)))
    return outputs, sums, SavedLines(tuple(before), repeated or {}, tuple(behind))


def _run_over_devices(
    loop: RowLoop, values: Values, after: Sequence[Any], *, saves_lines: bool
) -> tuple[Values, SavedLines | None]:
    """``run_steps`` on every device's share; row outputs have as many rows as all shares have."""

    def on_device(own: Any, wholes: Values, after: Sequence[Any]) -> tuple[Values, Any, Any]:
        wholes = devices.varying(loop, wholes)
        arrays = devices.with_halos(loop, own)
        shards = {division.value: array for division, array in own.items()}
        start = start_of(loop, {**wholes, **shards}, (), after)
        awaited = _awaited(loop, {**wholes, **shards}, after)
        outputs, sums, saved = _scanned(
            loop, arrays, wholes, start, awaited, saves_lines=saves_lines
        )
        return outputs, finished_sums(loop, devices.combined(loop, sums)), saved

    outputs, sums, saved = devices.shards_of_loop(loop).run(
        on_device,
        (*devices.read_values(loop, values), tuple(after)),
        (*devices.read_specs(loop), jax.P()),
        (
            devices.row_specs(loop, loop.row_outputs),
            jax.P(),
            saved_line_specs(loop) if saves_lines else None,
        ),
    )
    return {**outputs, **sums}, saved
