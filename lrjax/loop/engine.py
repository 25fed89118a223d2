"""Run row loops: one compiled step under ``lax.scan``, line buffers, in-place outputs, reductions.

Every step has the same shape: rows outside the image are computed like any others and hold the
fill value where something reads them. Offsets that change from step to step are scanned
integers; most do not change.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
from jax import lax

from lrjax.loop import devices
from lrjax.loop.blocks import read_rows, write_rows
from lrjax.loop.clock import Clock, clock_of
from lrjax.loop.dependent_fill import Full, full_depending_on, full_like, zero_behind
from lrjax.loop.line_buffers import (
    SavedLines,
    Values,
    empty_lines,
    producer_of,
    saved_line_specs,
    typed,
)
from lrjax.loop.offload import empty_on_host
from lrjax.loop.rowloop import RowLoop, Source
from lrjax.loop.shards import WithHalo
from lrjax.loop.step import run_step
from lrjax.loop.sums import add_partial, empty_sums, finished_sums
from lrjax.program.interpreter import collection_paused
from lrjax.rules.base import Array


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
