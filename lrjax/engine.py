"""Run row loops: one compiled step under ``lax.scan``, line buffers, in-place outputs, reductions.

Every step has the same shape: rows outside the image are computed like any others and hold the
fill value where something reads them. Offsets that change from step to step are scanned
integers; most do not change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lrjax.geometry import ceil_div
from lrjax.graph import RowGraph
from lrjax.inline import Atom, FlatEquation, Literal
from lrjax.rowloop import Band, RowLoop, Source
from lrjax.rules.base import Array, Rows
from lrjax.rules.reduction import identity_of

Values = dict[int, Array]

LINE_BUFFERS = "line_buffers"  # the named scope of operations that keep rows between steps


# --- Clock: the integers of a step ---------------------------------------------------------------


class Clock:
    """Integers that depend on the step, by name: constants stay Python integers.

    Call ``table()`` for the scanned rows and ``at(row)`` inside the loop.
    """

    def __init__(self, series: Mapping[Any, Sequence[int]], row: Any = None):
        self.series = series
        varying = [name for name, values in series.items() if len(set(values)) > 1]
        self.column = {name: i for i, name in enumerate(varying)}
        self.row = row

    def table(self) -> np.ndarray:
        steps = len(next(iter(self.series.values())))
        columns = [self.series[name] for name in self.column]
        return np.array(columns, dtype=np.int32).reshape(len(columns), steps).T

    def at(self, row: Any) -> Clock:
        return Clock(self.series, row)

    def __getitem__(self, name: Any) -> Any:
        column = self.column.get(name)
        return self.series[name][0] if column is None else self.row[column]

    def bounds(self, name: Any) -> tuple[int, int]:
        values = self.series[name]
        return min(values), max(values)


def clock_of(loop: RowLoop) -> Clock:
    """The step, every task's rows, and where windows lie."""
    steps = range(loop.steps)
    series: dict[Any, Sequence[int]] = {"step": list(steps)}
    for i, track in enumerate(loop.schedule.tracks):
        owned, stops = track.frontier[:-1], track.frontier[1:]
        series["start", i] = [stop - track.rows for stop in stops]
        series["owned", i], series["stop", i] = owned, stops
        if track.depth > track.rows:
            gap = track.carried - track.depth
            series["shift", i] = [advance + gap for advance in track.advances]
    for s in loop.sources:
        series["window", s.node, s.operand] = loop.window_starts(s)
        if s.value in loop.producer:
            series["back", s.node, s.operand] = loop.look_back(s)
    return Clock(series)


# --- Rows of whole arrays ------------------------------------------------------------------------


def _slice(array: Array, start: Any, size: int, axis: int) -> Array:
    if isinstance(start, int | np.integer):
        return lax.slice_in_dim(array, int(start), int(start) + size, axis=axis)
    return lax.dynamic_slice_in_dim(array, start, size, axis=axis)


def _shifted(rows: Array, start: Any, size: int, axis: int, fill: Any) -> Array:
    """``size`` rows from ``start`` on, where rows outside are ``fill``; any start is allowed."""
    count = rows.shape[axis]
    shape = list(rows.shape)
    shape[axis] = size
    edge = jnp.full(shape, fill, rows.dtype)
    padded = lax.concatenate([edge, rows, edge], axis)
    return _slice(padded, jnp.clip(start + size, 0, count + size), size, axis)


def read_rows(
    array: Array, start: Any, size: int, axis: int, fill: Any, bounds: tuple[int, int]
) -> Array:
    """Rows of a whole array, those outside it ``fill``; ``bounds`` are the extremes of start."""
    height = array.shape[axis]
    if bounds[0] >= 0 and bounds[1] + size <= height:
        return _slice(array, start, size, axis)
    count = min(size, height)
    inside = jnp.clip(start, 0, height - count)
    rows = lax.dynamic_slice_in_dim(array, inside, count, axis=axis)
    return _shifted(rows, start - inside, size, axis, fill)


def write_rows(
    array: Array,
    rows: Array,
    start: Any,
    axis: int,
    bounds: tuple[int, int],
    combine: Callable[[Array, Array], Array] = lambda old, new: new,
) -> Array:
    """Put rows into a whole array in place; rows outside it are dropped."""
    height, size = array.shape[axis], rows.shape[axis]
    rows = rows.astype(array.dtype)
    if bounds[0] >= 0 and bounds[1] + size <= height:
        old = _slice(array, start, size, axis)
        return lax.dynamic_update_slice_in_dim(array, combine(old, rows), start, axis)
    count = min(size, height)
    inside = jnp.clip(start, 0, height - count)
    old = lax.dynamic_slice_in_dim(array, inside, count, axis=axis)
    new = _shifted(rows, inside - start, count, axis, 0)
    position = inside + jnp.arange(count)
    kept = _along(axis, array.ndim, (position >= start) & (position < start + size))
    new = jnp.where(kept, combine(old, new), old)
    return lax.dynamic_update_slice_in_dim(array, new, inside, axis)


def _along(axis: int, ndim: int, mask: Array) -> Array:
    return mask.reshape([-1 if a == axis else 1 for a in range(ndim)])


def keep_rows(block: Array, start: Any, axis: int, low: Any, high: Any, fill: Any) -> Array:
    """Set rows of a block outside ``[low, high)`` to ``fill``; the first row is ``start``."""
    # One unsigned comparison: a row before ``low`` wraps round to a large number.
    inside = lax.iota(np.int32, block.shape[axis]) + jnp.asarray(start - low, np.int32)
    kept = inside.astype(np.uint32) < jnp.asarray(high - low, np.uint32)
    mask = lax.broadcast_in_dim(kept, block.shape, (axis,))
    return lax.select(mask, block, lax.full_like(block, fill))


# --- Line buffers --------------------------------------------------------------------------------


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=["axis"])
@dataclasses.dataclass(frozen=True)
class AtHand:
    """Rows of a value within a step: contiguous rows that end at its frontier."""

    rows: Array
    axis: int

    def window(self, back: Any, size: int) -> Array:
        """``size`` rows, the first of them ``back`` rows before the frontier."""
        if isinstance(back, int) and back == size == self.rows.shape[self.axis]:
            return self.rows
        return _slice(self.rows, self.rows.shape[self.axis] - back, size, self.axis)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["slots", "slab", "step"], meta_fields=["axis"]
)
@dataclasses.dataclass(frozen=True)
class Ring:
    """Rows of a value within a step: the newest slab, and older ones in their slots."""

    slots: Array
    slab: Array
    axis: int
    step: Any

    def window(self, back: int, size: int) -> Array:
        rows = self.slab.shape[self.axis]
        count = self.slots.shape[self.axis] // rows
        pieces = []
        for age in range(ceil_div(back, rows) - 1, (back - size) // rows - 1, -1):
            # Rows counted from the frontier back: this slab holds (age * rows, age * rows + rows].
            far, near = min(back, (age + 1) * rows), max(back - size, age * rows)
            offset = (age + 1) * rows - far
            if age == 0:
                pieces.append(_slice(self.slab, offset, far - near, self.axis))
            else:
                slot = (self.step + count - age) % count
                pieces.append(
                    lax.dynamic_slice_in_dim(
                        self.slots, slot * rows + offset, far - near, axis=self.axis
                    )
                )
        return pieces[0] if len(pieces) == 1 else lax.concatenate(pieces, self.axis)


def _line_shape(loop: RowLoop, value: int) -> tuple[int, ...]:
    shape = list(loop.graph.program.avals[value].shape)
    shape[loop.graph.row_axis[value]] = loop.line_rows(value)
    return tuple(shape)


@contextlib.contextmanager
def _line_buffer_of(loop: RowLoop, value: int) -> Iterator[None]:
    """Operations within are named as the line buffer of a value, for memory profiles."""
    with _producer(loop, value).origin(), jax.named_scope(LINE_BUFFERS):
        yield


def _producer(loop: RowLoop, value: int) -> FlatEquation:
    return loop.nodes[loop.producer[value]].equation


def reader(loop: RowLoop, value: int) -> FlatEquation:
    """The first equation that reads a value from outside the loop."""
    return next(node.equation for node in loop.nodes if value in node.equation.inputs)


def empty_lines(loop: RowLoop) -> Values:
    """Line buffers before the first step: nothing but rows above the image."""
    lines = {}
    for v in loop.producer:
        if loop.line_rows(v):
            with _line_buffer_of(loop, v):
                fill = loop.production_fill.get(v, 0)
                dtype = loop.graph.program.avals[v].dtype
                lines[v] = jnp.full(_line_shape(loop, v), fill, dtype)
    return lines


def _extend(
    loop: RowLoop, clock: Clock, value: int, lines: Values, slab: Array
) -> tuple[AtHand | Ring, Array | None]:
    """Add a step's rows to what is kept of a value: what can be read now, and what is kept."""
    track, axis = loop.track(value), loop.graph.row_axis[value]
    if value not in lines:
        return AtHand(slab, axis), None
    if loop.is_ring(value):
        count = lines[value].shape[axis] // track.rows
        slot = (clock["step"] % count) * track.rows
        slots = lax.dynamic_update_slice_in_dim(lines[value], slab, slot, axis)
        return Ring(slots, slab, axis, clock["step"]), slots
    shift = clock["shift", loop.producer[value]]
    older = _slice(lines[value], shift, track.depth - track.rows, axis)
    rows = lax.concatenate([older, slab], axis)
    kept = _slice(rows, track.depth - track.carried, track.carried, axis)
    return AtHand(rows, axis), kept


# --- One step ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StepResult:
    """Line buffers for the next step, rows of outputs, and contributions to reductions."""

    lines: Values
    rows: Values
    partial: Values


@dataclasses.dataclass
class _Progress:
    """What a step has made so far."""

    at_hand: dict[int, AtHand | Ring]
    lines: Values
    rows: Values
    partial: Values

    def updated(self, other: _Progress) -> _Progress:
        return _Progress(
            {**self.at_hand, **other.at_hand},
            {**self.lines, **other.lines},
            {**self.rows, **other.rows},
            {**self.partial, **other.partial},
        )


jax.tree_util.register_dataclass(_Progress, ["at_hand", "lines", "rows", "partial"], [])


def slice_windows(loop: RowLoop, clock: Clock, arrays: Values) -> dict[tuple[int, int], Array]:
    """The windows that a step reads from values that exist whole, by (node, operand)."""
    windows = {}
    for s in loop.sliced:
        start, stop = loop.window(s, 0)
        name = ("window", s.node, s.operand)
        windows[s.node, s.operand] = read_rows(
            arrays[s.value],
            clock[name],
            stop - start,
            s.read.axis,
            _fill(loop, s),
            clock.bounds(name),
        )
    return windows


def _fill(loop: RowLoop, source: Source) -> Any:
    """What rows of a whole array are outside it: something, where nobody minds."""
    fill = source.read.fill if loop.fill_of(source) is None else loop.fill_of(source)
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
    done = _Progress({}, {}, {}, {})
    for band in loop.bands:

        def compute(done: _Progress = done, band: Band = band) -> _Progress:
            return _run_band(loop, clock, band, done, lines, windows, wholes)

        def skip(band: Band = band) -> _Progress:
            return _skip_band(loop, clock, band, lines)

        if band.first == 0 and band.last == loop.steps - 1:
            made = compute()
        else:
            is_active = (clock["step"] >= band.first) & (clock["step"] <= band.last)
            made = lax.cond(is_active, compute, skip)
        done = done.updated(made)
    return StepResult(done.lines, done.rows, done.partial)


def _run_band(
    loop: RowLoop,
    clock: Clock,
    band: Band,
    done: _Progress,
    lines: Values,
    windows: Mapping[tuple[int, int], Array],
    wholes: Values,
) -> _Progress:
    made = _Progress({}, {}, {}, {})
    for i in band.nodes:
        node, op = loop.nodes[i], loop.nodes[i].op
        assert op is not None
        at_hand = {**done.at_hand, **made.at_hand}
        sources = {s.operand: s for s in loop.sources_of(i)}
        with node.equation.origin():
            operands = []
            for operand, atom in enumerate(node.equation.inputs):
                if isinstance(atom, Literal):
                    operands.append(atom.value)
                elif operand in sources:
                    operands.append(_window(loop, clock, sources[operand], at_hand, windows))
                else:
                    operands.append(wholes[atom])
            results = op.evaluate(operands, Rows(clock["start", i], loop.schedule.tracks[i].rows))
        if node.is_reduction:
            made.partial.update(zip(node.equation.outputs, results, strict=True))
            continue
        for v, slab in zip(node.equation.outputs, results, strict=True):
            with node.equation.origin():
                slab = _filled(loop, clock, v, slab)
            _keep(loop, clock, made, v, slab, lines)
    return _exported(band, made)


def _skip_band(loop: RowLoop, clock: Clock, band: Band, lines: Values) -> _Progress:
    """Rows outside the image hold the fill value, and add nothing to reductions."""
    made = _Progress({}, {}, {}, {})
    avals = loop.graph.program.avals
    for i in band.nodes:
        node, track = loop.nodes[i], loop.schedule.tracks[i]
        assert node.op is not None
        for v in node.equation.outputs:
            if node.op.reduction is not None:
                fill = identity_of(node.op.reduction, avals[v].dtype)
                made.partial[v] = jnp.full(avals[v].shape, fill, avals[v].dtype)
                continue
            shape = list(avals[v].shape)
            shape[loop.graph.row_axis[v]] = track.rows
            slab = jnp.full(shape, loop.production_fill.get(v, 0), avals[v].dtype)
            _keep(loop, clock, made, v, slab, lines)
    return _exported(band, made)


def _keep(
    loop: RowLoop, clock: Clock, made: _Progress, value: int, slab: Array, lines: Values
) -> None:
    with _line_buffer_of(loop, value):
        made.at_hand[value], line = _extend(loop, clock, value, lines, slab)
    if line is not None:
        made.lines[value] = line
    if value in loop.row_outputs:
        made.rows[value] = slab


def _exported(band: Band, made: _Progress) -> _Progress:
    at_hand = {v: rows for v, rows in made.at_hand.items() if v in band.exports}
    return dataclasses.replace(made, at_hand=at_hand)


def _window(
    loop: RowLoop,
    clock: Clock,
    source: Source,
    at_hand: Mapping[int, AtHand | Ring],
    windows: Mapping[tuple[int, int], Array],
) -> Array:
    node, axis = loop.nodes[source.node], source.read.axis
    name = ("window", source.node, source.operand)
    height = loop.graph.program.avals[source.value].shape[axis]
    if source.value in loop.producer:
        start, stop = loop.window(source, 0)
        back = clock["back", source.node, source.operand]
        window = at_hand[source.value].window(back, stop - start)
        if loop.masked_at_read(source):
            fill = loop.fill_of(source)
            window = keep_rows(window, clock[name], axis, 0, height, fill)
    else:
        window = windows[source.node, source.operand]
    assert node.op is not None
    is_driver = source.operand in node.op.drivers
    if is_driver and not loop.schedule.tracks[source.node].is_steady:
        # Rows computed again belong to an earlier step's contribution.
        low, high = clock["owned", source.node], clock["stop", source.node]
        window = keep_rows(window, clock[name], axis, low, high, source.read.fill)
    return window


def _filled(loop: RowLoop, clock: Clock, value: int, slab: Array) -> Array:
    if value not in loop.production_fill:
        return slab
    producer = loop.producer[value]
    height = loop.graph.height(value)
    if clock.bounds(("start", producer))[0] >= 0 and clock.bounds(("stop", producer))[1] <= height:
        return slab
    fill = loop.production_fill[value]
    start = clock["start", producer]
    return keep_rows(slab, start, loop.graph.row_axis[value], 0, height, fill)


# --- The loop ------------------------------------------------------------------------------------

_COMBINE: dict[str, Callable[[Array, Array], Array]] = {
    "sum": jnp.add,
    "prod": jnp.multiply,
    "max": jnp.maximum,
    "min": jnp.minimum,
    "and": jnp.bitwise_and,
    "or": jnp.bitwise_or,
}


def accumulator_dtype(dtype: Any) -> Any:
    """Reductions over rows are accumulated in float32 or wider."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.inexact) else dtype


def empty_sums(loop: RowLoop) -> Values:
    """Accumulators at their identities."""
    sums = {}
    for node in loop.nodes:
        if node.is_reduction:
            assert node.op is not None
            assert node.op.reduction is not None
            for v in node.equation.outputs:
                aval = loop.graph.program.avals[v]
                dtype = accumulator_dtype(aval.dtype)
                with node.equation.origin():
                    sums[v] = jnp.full(aval.shape, identity_of(node.op.reduction, dtype), dtype)
    return sums


def add_partial(loop: RowLoop, sums: Values, partial: Values) -> Values:
    combined = {}
    for node in loop.nodes:
        if node.is_reduction:
            assert node.op is not None
            assert node.op.reduction is not None
            for v in node.equation.outputs:
                with node.equation.origin():
                    contribution = partial[v].astype(sums[v].dtype)
                    combined[v] = _COMBINE[node.op.reduction](sums[v], contribution)
    return combined


def finished_sums(loop: RowLoop, sums: Values) -> Values:
    finished = {}
    for node in loop.nodes:
        if node.is_reduction:
            for v in node.equation.outputs:
                with node.equation.origin():
                    finished[v] = sums[v].astype(loop.graph.program.avals[v].dtype)
    return finished


def empty_outputs(loop: RowLoop, values: Values) -> Values:
    """Arrays for the row outputs, of which every row will be written.

    They are filled with an element of what the loop before this one made. Of plain zeros XLA:GPU
    makes one fusion for all loops of a program, so that all outputs exist from the beginning on.
    """
    avals = loop.graph.program.avals
    filling: Any = 0
    if loop.latest_input is not None:
        filling = lax.stop_gradient(values[loop.latest_input]).ravel()[0]
    outputs = {}
    for v in loop.row_outputs:
        with _producer(loop, v).origin():
            outputs[v] = jnp.full(avals[v].shape, filling, avals[v].dtype)
    return outputs


def write_outputs(loop: RowLoop, clock: Clock, outputs: Values, rows: Values) -> Values:
    written = {}
    for v, array in outputs.items():
        name = ("start", loop.producer[v])
        axis = loop.graph.row_axis[v]
        with _producer(loop, v).origin():
            written[v] = write_rows(array, rows[v], clock[name], axis, clock.bounds(name))
    return written


def run_loop(loop: RowLoop, values: Values) -> Values:
    """Run a row loop on values that exist whole; returns its row outputs and reductions."""
    clock = clock_of(loop)
    arrays = {v: values[v] for v in loop.arrays}
    wholes = {v: values[v] for v in loop.wholes}

    def step(carry: tuple[Values, Values, Values], row: Any) -> tuple[Any, None]:
        lines, outputs, sums = carry
        now = clock.at(row)
        result = run_step(loop, now, lines, slice_windows(loop, now, arrays), wholes)
        outputs = write_outputs(loop, now, outputs, result.rows)
        return (result.lines, outputs, add_partial(loop, sums, result.partial)), None

    carry = (empty_lines(loop), empty_outputs(loop, values), empty_sums(loop))
    (_, outputs, sums), _ = lax.scan(step, carry, clock.table())
    return {**outputs, **finished_sums(loop, sums)}


# --- Whole graphs --------------------------------------------------------------------------------

RunLoop = Callable[[RowLoop, Values], Values]


def run_graph(
    graph: RowGraph,
    loops: Sequence[RowLoop | None],
    inputs: Sequence[Array],
    run: RunLoop = run_loop,
) -> list[Array]:
    """Column operations and row loops, stage by stage.

    Args:
      graph: the row graph.
      loops: one row loop per stage, None for a stage without row operations.
      inputs: the program's inputs.
      run: how a row loop is run (``autodiff`` gives a differentiable one).
    """
    values: Values = {v: jnp.asarray(c) for v, c in graph.program.constants.items()}
    values.update(zip(graph.program.inputs, inputs, strict=True))
    for stage, loop in enumerate(loops):
        for node in graph.column_nodes(stage):
            run_column(node.equation, values)
        if loop is not None:
            values.update(run(loop, values))
    return [_read(values, v) for v in graph.program.outputs]


def run_column(equation: FlatEquation, values: Values) -> None:
    """Evaluate one equation on whole values and record its results."""
    results = equation.evaluate([_read(values, v) for v in equation.inputs])
    values.update(zip(equation.outputs, results, strict=True))


def _read(values: Mapping[int, Any], atom: Atom) -> Any:
    if isinstance(atom, Literal):
        return jax.numpy.asarray(atom.value, atom.dtype)
    return values[atom]
