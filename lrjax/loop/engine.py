"""Run row loops: one compiled step under ``lax.scan``, line buffers, in-place outputs, reductions.

Every step has the same shape: rows outside the image are computed like any others and hold the
fill value where something reads them. Offsets that change from step to step are scanned
integers; most do not change.
"""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lrjax.loop import devices
from lrjax.loop.blocks import read_rows, write_rows
from lrjax.loop.clock import Clock, clock_of
from lrjax.loop.dependent_fill import Full, full_depending_on, full_like
from lrjax.loop.line_buffers import (
    AtHand,
    Ring,
    Values,
    empty_lines,
    extend,
    line_buffer_of,
    producer_of,
    typed,
)
from lrjax.loop.offload import empty_on_host, from_host, is_on_host, to_host
from lrjax.loop.rowloop import Band, RowLoop, Source
from lrjax.loop.shards import WithHalo
from lrjax.loop.small_sums import SmallSums
from lrjax.program.inline import FlatEquation, array_of, values_of
from lrjax.program.interpreter import collection_paused
from lrjax.program.varying import varying_axes, varying_over
from lrjax.rowgraph.graph import RowGraph
from lrjax.rules.base import Array, Rows, with_at
from lrjax.rules.block_sums import accumulator_dtype
from lrjax.rules.masks import keep
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


def slice_windows(
    loop: RowLoop, clock: Clock, arrays: Mapping[Any, Array | WithHalo]
) -> dict[tuple[int, int], Array]:
    """The windows that a step reads from values that exist whole, by (node, operand)."""
    windows = {}
    for s in loop.sliced:
        name, size = ("window", s.node, s.operand), loop.window_rows(s)
        start, bounds = clock[name], clock.bounds(name)
        fill, array = _fill(loop, s), arrays[devices.array_key(loop, s)]
        if isinstance(array, WithHalo):
            window = array.read(start, size, fill, bounds)
            window = devices.of_image(loop, clock, s, window, fill)
        else:
            window = read_rows(array, start, size, s.read.axis, fill, bounds)
        windows[s.node, s.operand] = window
    return windows


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
    windows: Mapping[tuple[int, int], Array],
    wholes: Values,
) -> StepResult:
    """Every operation of the stage on this step's rows.

    Bands of operations that have no row of the image in many steps sit under a ``cond``.
    """
    step, done = _Step(loop, clock.afresh(), lines, windows, wholes), StepResult()
    for band in loop.bands:

        def compute(done: StepResult = done, band: Band = band) -> StepResult:
            return step.afresh().run(band, done)

        def skip(band: Band = band) -> StepResult:
            return step.afresh().skip(band)

        if band.first == 0 and band.last == loop.steps - 1:
            made = step.run(band, done)
        else:
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
      windows: of values that exist whole, by (node, operand).
      wholes: values that are taken whole.
    """

    loop: RowLoop
    clock: Clock
    lines: Values
    windows: Mapping[tuple[int, int], Array]
    wholes: Values

    def afresh(self) -> _Step:
        """The step in a function of its own; see ``Clock.afresh``."""
        return dataclasses.replace(self, clock=self.clock.afresh())

    def run(self, band: Band, done: StepResult) -> StepResult:
        """What the band makes."""
        loop, made = self.loop, StepResult()
        at_hand = ChainMap(made.at_hand, done.at_hand)
        for i in band.nodes:
            node = loop.nodes[i]
            sources = {s.operand: s for s in loop.sources_of(i)}
            with node.equation.origin():
                operands = [
                    self.window(sources[operand], at_hand)
                    if operand in sources
                    else array_of(atom, self.wholes)
                    for operand, atom in enumerate(node.equation.inputs)
                ]
                count = loop.schedule.tracks[i].rows
                start = self.clock.in_image(("start", i), devices.share_of_node(loop, i))
                rows = Rows(start, count, loop.is_differentiated)
                results = node.op.evaluate(operands, rows)
            if node.is_reduction:
                for v, partial in zip(node.equation.outputs, results, strict=True):
                    partial = partial.astype(accumulator_dtype(partial.dtype))
                    made.partial[v] = typed(loop, v, partial)
                continue
            for v, slab in zip(node.equation.outputs, results, strict=True):
                with node.equation.origin():
                    slab = typed(loop, v, self.filled(v, slab))
                self.keep(made, v, slab)
        return _exported(band, made)

    def skip(self, band: Band) -> StepResult:
        """Rows outside the image hold the fill value, and add nothing to reductions."""
        loop, made = self.loop, StepResult()
        avals = loop.graph.program.avals
        for i in band.nodes:
            node, track = loop.nodes[i], loop.schedule.tracks[i]
            for v in node.equation.outputs:
                if node.op.reduction is not None:
                    dtype = accumulator_dtype(avals[v].dtype)
                    fill = identity_of(node.op.reduction, dtype)
                    made.partial[v] = typed(loop, v, jnp.full(avals[v].shape, fill, dtype))
                    continue
                shape = with_at(avals[v].shape, loop.graph.row_axis[v], track.rows)
                slab = jnp.full(shape, loop.production_fill.get(v, 0), avals[v].dtype)
                self.keep(made, v, typed(loop, v, slab))
        return _exported(band, made)

    def keep(self, made: StepResult, value: int, slab: Array) -> None:
        """A step's rows of a value, among what the step makes."""
        with line_buffer_of(self.loop, value):
            made.at_hand[value], line = extend(self.loop, self.clock, value, self.lines, slab)
        if line is not None:
            made.lines[value] = line
        if value in self.loop.row_outputs:
            made.rows[value] = slab

    def window(self, source: Source, at_hand: Mapping[int, AtHand | Ring]) -> Array:
        """The rows that a read takes."""
        loop, clock, axis = self.loop, self.clock, source.read.axis
        place = source.node, source.operand
        height = loop.graph.program.avals[source.value].shape[axis]
        if source.value in loop.producer:
            back, rows = clock["back", *place], loop.window_rows(source)
            window = at_hand[source.value].window(back, rows, source.read.slack)
            if loop.masked_at_read(source):
                share = devices.share(loop, source.value)
                kept = clock.inside(("window", *place), window.shape[axis], 0, height, share)
                window = keep(window, kept, axis, loop.fill_of(source))
        else:
            window = self.windows[place]
        if loop.shards is not None and loop.nodes[source.node].is_reduction:
            return devices.own_rows(loop, clock, source, window)
        is_driver = source.operand in loop.nodes[source.node].op.drivers
        if is_driver and not loop.schedule.tracks[source.node].is_steady:
            # Rows computed again belong to an earlier step's contribution.
            low, high = ("owned", source.node), ("stop", source.node)
            kept = clock.inside(("window", *place), window.shape[axis], low, high)
            window = keep(window, kept, axis, source.read.fill)
        return window

    def filled(self, value: int, slab: Array) -> Array:
        """A step's rows of a value, of which those outside the image hold what readers need."""
        loop, clock = self.loop, self.clock
        if value not in loop.production_fill:
            return slab
        start, stop = ("start", loop.producer[value]), ("stop", loop.producer[value])
        height, axis = loop.graph.height(value), loop.graph.row_axis[value]
        if devices.is_inside_image(loop, value, clock.bounds(start)[0], clock.bounds(stop)[1]):
            return slab
        kept = clock.inside(start, slab.shape[axis], 0, height, devices.share(loop, value))
        return keep(slab, kept, axis, loop.production_fill[value])


def _exported(band: Band, made: StepResult) -> StepResult:
    at_hand = {v: rows for v, rows in made.at_hand.items() if v in band.exports}
    return dataclasses.replace(made, at_hand=at_hand)


# --- The loop ------------------------------------------------------------------------------------

_COMBINE: dict[str, Callable[[Array, Array], Array]] = {
    "sum": jnp.add,
    "prod": jnp.multiply,
    "max": jnp.maximum,
    "min": jnp.minimum,
    "and": jnp.bitwise_and,
    "or": jnp.bitwise_or,
}


def small_sums(loop: RowLoop) -> SmallSums:
    """Which of the loop's sums over rows are added up together."""
    added = (n for n in loop.nodes if n.op is not None and n.op.reduction == "sum")
    values = (v for node in added for v in node.equation.outputs)
    avals = {v: devices.type_on_device(loop, v) for v in values}
    return SmallSums((v, aval, accumulator_dtype(aval.dtype)) for v, aval in avals.items())


def empty_sums(loop: RowLoop, full: Full) -> Values:
    """Accumulators at their identities."""
    sums = {}
    for v, (equation, reduction) in loop.reductions.items():
        aval = devices.type_on_device(loop, v)
        dtype = accumulator_dtype(aval.dtype)
        with equation.origin():
            sums[v] = full_like(full, aval, identity_of(reduction, dtype), dtype=dtype)
    return small_sums(loop).packed(sums)


def add_partial(loop: RowLoop, sums: Values, partial: Values) -> Values:
    partial = small_sums(loop).packed(partial)
    combined = {v: sums[v] + partial[v] for v in sums if v < 0}  # vectors of small sums
    for v, (equation, reduction) in loop.reductions.items():
        if v in sums:
            with equation.origin():
                combined[v] = _COMBINE[reduction](sums[v], partial[v])
    return combined


def finished_sums(loop: RowLoop, sums: Values) -> Values:
    sums, finished = small_sums(loop).unpacked(sums), {}
    for v, (equation, _) in loop.reductions.items():
        with equation.origin():
            finished[v] = sums[v].astype(loop.graph.program.avals[v].dtype)
    return finished


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


def start_of(
    loop: RowLoop, values: Values, hosted: Collection[int] = (), after: Sequence[Any] = ()
) -> tuple[Values, Values, Values]:
    """Line buffers, row outputs and sums before the first step."""
    latest = () if loop.latest_input is None else (values[loop.latest_input],)
    full = full_depending_on((*latest, *after))
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


def run_steps(
    loop: RowLoop,
    values: Values,
    hosted: Collection[int] = (),
    after: Sequence[Any] = (),
    *,
    saves_lines: bool = False,
) -> tuple[Values, Values | None]:
    """``run_loop``; with it the line buffers that every step starts with, if they are saved."""
    if loop.shards is not None:
        return _run_over_devices(loop, values, after, saves_lines=saves_lines)
    arrays = {v: values[v] for v in loop.arrays}
    wholes = {v: values[v] for v in loop.wholes}
    start = start_of(loop, values, hosted, after)
    outputs, sums, saved = _scanned(loop, arrays, wholes, start, saves_lines=saves_lines)
    return {**outputs, **finished_sums(loop, sums)}, saved


def _scanned(
    loop: RowLoop,
    arrays: Mapping[Any, Array | WithHalo],
    wholes: Values,
    start: tuple[Values, Values, Values],
    *,
    saves_lines: bool,
) -> tuple[Values, Values, Values | None]:
    """Row outputs, accumulators and saved line buffers, behind the last step."""
    clock = clock_of(loop)

    def step(carry: tuple[Values, Values, Values], row: Any) -> tuple[Any, Values | None]:
        lines, outputs, sums = carry
        now = clock.at(row)
        result = run_step(loop, now, lines, slice_windows(loop, now, arrays), wholes)
        outputs = write_outputs(loop, now, outputs, result.rows)
        saved = lines if saves_lines else None
        return (result.lines, outputs, add_partial(loop, sums, result.partial)), saved

    with collection_paused():
        (_, outputs, sums), saved = lax.scan(step, start, clock.table())
    return outputs, sums, saved


def _run_over_devices(
    loop: RowLoop, values: Values, after: Sequence[Any], *, saves_lines: bool
) -> tuple[Values, Values | None]:
    """``run_steps`` on every device's share; row outputs have as many rows as all shares have."""

    def on_device(own: Any, wholes: Values, after: Sequence[Any]) -> tuple[Values, Any, Any]:
        wholes = devices.varying(loop, wholes)
        arrays = devices.with_halos(loop, own)
        shards = {division.value: array for division, array in own.items()}
        start = start_of(loop, {**wholes, **shards}, (), after)
        outputs, sums, saved = _scanned(loop, arrays, wholes, start, saves_lines=saves_lines)
        return outputs, finished_sums(loop, devices.combined(loop, sums)), saved

    outputs, sums, saved = devices.shards_of_loop(loop).run(
        on_device,
        (*devices.read_values(loop, values), tuple(after)),
        (*devices.read_specs(loop), jax.P()),
        (
            devices.row_specs(loop, loop.row_outputs),
            jax.P(),
            devices.line_specs(loop) if saves_lines else None,
        ),
    )
    return {**outputs, **sums}, saved


# --- Whole graphs --------------------------------------------------------------------------------

RunLoop = Callable[[RowLoop, Values, Collection[int]], Values]


def run_graph(
    graph: RowGraph,
    loops: Sequence[RowLoop | None],
    inputs: Sequence[Array],
    run: RunLoop = run_loop,
    hosted: Mapping[int, int] | None = None,
) -> list[Array]:
    """Column operations and row loops, stage by stage.

    Inputs in the host's memory are read there by blocks of rows; what takes them whole gets a copy.

    Args:
      graph: the row graph.
      loops: one row loop per stage, None for a stage without row operations.
      inputs: the program's inputs.
      run: how a row loop is run (``strategies.tiled`` gives a differentiable one).
      hosted: numbers of the outputs that are put in the host's memory, with their row axes.
    """
    hosted = hosted or {}
    wanted = set(values_of(graph.program.outputs[i] for i in hosted))
    copies: Values = {}
    values: Values = {v: jnp.asarray(c) for v, c in graph.program.constants.items()}
    values.update(zip(graph.program.inputs, inputs, strict=True))
    images: Values = {}  # of row outputs that have rows behind the image too
    whole = ChainMap(copies, images, values)
    for stage, loop in enumerate(loops):
        for node in graph.column_nodes(stage):
            copies.update(_copies(graph, whole, node.equation.values))
            values.update(run_column(graph, node.equation, whole))
        if loop is not None:
            copies.update(_copies(graph, whole, loop.wholes))
            taken = {v: whole[v] for v in loop.wholes}
            values.update(run(loop, {**values, **taken}, wanted))
            images.update(devices.images(loop, {v: values[v] for v in loop.row_outputs}))
    results = [array_of(v, ChainMap(images, values)) for v in graph.program.outputs]
    for i, axis in hosted.items():
        if not is_on_host(results[i]):
            results[i] = to_host(results[i], axis)
    return results


def _copies(graph: RowGraph, values: Mapping[int, Any], taken: Sequence[int]) -> Values:
    """What is in the host's memory and is about to be taken whole, on the device."""
    return {v: from_host(values[v], graph.row_axis[v]) for v in taken if is_on_host(values[v])}


def run_column(graph: RowGraph, equation: FlatEquation, values: Mapping[int, Any]) -> Values:
    """Evaluate one equation on whole values."""
    results = equation.evaluate([array_of(v, values) for v in equation.inputs])
    avals = graph.program.avals
    return {
        v: varying_over(result, varying_axes(avals[v]))
        for v, result in zip(equation.outputs, results, strict=True)
    }
