"""Line buffers: the rows of a value that are kept between steps."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from lrjax.loop.blocks import put_rows, slice_rows
from lrjax.loop.clock import Clock
from lrjax.loop.dependent_fill import Full, full_like
from lrjax.loop.devices import axes_within, row_specs, type_on_device
from lrjax.loop.rowloop import RowLoop
from lrjax.program.inline import FlatEquation
from lrjax.program.varying import varying_over
from lrjax.rules.base import Array, with_at
from lrjax.rules.geometry import ceil_div
from lrjax.scopes import LINE_BUFFERS

Values = dict[int, Array]


class SavedLines(NamedTuple):
    """The line buffers that the steps of a loop started with, or what belongs to each of these.

    Attributes:
      before: of every step before those that one program repeats.
      repeated: of those, along a leading axis.
      behind: of every step behind them.
    """

    before: tuple[Any, ...]
    repeated: Any
    behind: tuple[Any, ...]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["pieces"], meta_fields=["axis"])
@dataclasses.dataclass(frozen=True)
class AtHand:
    """Rows of a value within a step: contiguous rows that end at its frontier.

    They are in pieces, older rows and the newest slab, and windows are cut from the pieces: joined
    first, all rows would be copied once more (VGG-16 at 4096x4096 in 16 blocks: 2,238 MiB and 22 ms
    by a roofline for an H200, in pieces 1,411 MiB and 8 ms).
    """

    pieces: tuple[Array, ...]
    axis: int

    def window(self, back: Any, size: int, slack: int, zero: Any = 0) -> Array:
        """``size`` rows, the first of them ``back`` rows before the frontier.

        No copy is made before ``zero`` is there. Up to ``slack`` rows more behind them where the
        newest slab then is the window as it is: a 1x1 convolution of stride 2 reads all rows of a
        slab but the last.
        """
        slab = self.pieces[-1]
        if isinstance(back, int) and takes_slab(back, size, slack, slab.shape[self.axis]):
            return slab
        total = sum(piece.shape[self.axis] for piece in self.pieces)
        if isinstance(back, int):
            return _cut(self.pieces, total - back, size, self.axis, zero)
        joined = lax.concatenate(self.pieces, self.axis)
        return slice_rows(joined, total - back, size, self.axis)


def takes_slab(back: int, size: int, slack: int, rows: int) -> bool:
    """A window is the newest ``rows`` as they are; see ``AtHand.window``."""
    return back == rows and 0 <= back - size <= slack


def _cut(pieces: Sequence[Array], start: int, size: int, axis: int, zero: Any = 0) -> Array:
    """``size`` rows from ``start`` on of arrays one behind the other, none before ``zero``."""
    found, first = [], 0
    for piece in pieces:
        rows = piece.shape[axis]
        low, high = max(start, first), min(start + size, first + rows)
        if high - low == rows:
            found.append(piece)
        elif high > low:
            found.append(slice_rows(piece, low - first, high - low, axis, zero))
        first += rows
    return found[0] if len(found) == 1 else lax.concatenate(found, axis)


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

    def window(self, back: int, size: int, slack: int, zero: Any = 0) -> Array:
        """As that of ``AtHand``."""
        del slack, zero
        rows = self.slab.shape[self.axis]
        count = self.slots.shape[self.axis] // rows
        pieces = []
        for age in range(ceil_div(back, rows) - 1, (back - size) // rows - 1, -1):
            # Rows counted from the frontier back: this slab holds (age * rows, age * rows + rows].
            far, near = min(back, (age + 1) * rows), max(back - size, age * rows)
            offset = (age + 1) * rows - far
            if age == 0:
                pieces.append(slice_rows(self.slab, offset, far - near, self.axis))
            else:
                slot = (self.step + count - age) % count
                pieces.append(slice_rows(self.slots, slot * rows + offset, far - near, self.axis))
        return pieces[0] if len(pieces) == 1 else lax.concatenate(pieces, self.axis)


@contextlib.contextmanager
def line_buffer_of(loop: RowLoop, value: int) -> Iterator[None]:
    """Operations within are named as the line buffer of a value, for memory profiles."""
    with producer_of(loop, value).origin(), jax.named_scope(LINE_BUFFERS):
        yield


def producer_of(loop: RowLoop, value: int) -> FlatEquation:
    return loop.nodes[loop.producer[value]].equation


def reader_of(loop: RowLoop, value: int) -> FlatEquation:
    """The first equation that reads a value from outside the loop."""
    return next(node.equation for node in loop.nodes if value in node.equation.inputs)


def empty_lines(loop: RowLoop, full: Full) -> Values:
    """Line buffers before the first step: nothing but rows above the image."""
    lines = {}
    for v in loop.producer:
        if loop.line_rows(v):
            with line_buffer_of(loop, v):
                fill = loop.production_fill.get(v, 0)
                aval = type_on_device(loop, v)
                shape = with_at(aval.shape, loop.graph.row_axis[v], loop.line_rows(v))
                lines[v] = full_like(full, aval, fill, shape=shape)
    return lines


def no_saved_lines(loop: RowLoop) -> SavedLines:
    """Of a loop whose steps compute all rows that they read."""
    assert not any(map(loop.line_rows, loop.producer))
    first, stop = loop.repeated
    return SavedLines(({},) * first, {}, ({},) * (loop.steps - stop))


def saved_line_specs(loop: RowLoop) -> SavedLines:
    """How saved line buffers are divided among devices: every device has its own."""
    lines = [v for v in loop.producer if loop.line_rows(v)]
    (first, stop), alone = loop.repeated, row_specs(loop, lines)
    repeated = row_specs(loop, lines, leading=1) if stop > first else {}
    return SavedLines((alone,) * first, repeated, (alone,) * (loop.steps - stop))


def typed(loop: RowLoop, value: int, rows: Array) -> Array:
    """Rows of a value, varying over the mesh axes that the whole value varies over."""
    return varying_over(rows, axes_within(loop, value))


def extend(
    loop: RowLoop, clock: Clock, value: int, lines: Values, slab: Array, *, keeps: bool = True
) -> tuple[AtHand | Ring, Array | None]:
    """Add a step's rows to what is kept of a value: what can be read now, and what is kept.

    Nothing is kept where ``keeps`` is False: reads are of the line buffer that the step starts
    with (of a ring, none of the slot that is next to be overwritten) and of the slab.
    """
    track, axis = loop.track(value), loop.graph.row_axis[value]
    if value not in lines:
        return AtHand((slab,), axis), None
    if loop.is_ring(value) and not keeps:
        return Ring(lines[value], slab, axis, clock["step"]), None
    if loop.is_ring(value):
        count = lines[value].shape[axis] // track.rows
        slot = (clock["step"] % count) * track.rows
        slots = put_rows(lines[value], slab, slot, axis)
        return Ring(slots, slab, axis, clock["step"]), slots
    shift = clock["shift", loop.producer[value]]
    older = slice_rows(lines[value], shift, track.depth - track.rows, axis)
    pieces = older, slab
    if not keeps:
        return AtHand(pieces, axis), None
    kept = _cut(pieces, track.depth - track.carried, track.carried, axis)
    return AtHand(pieces, axis), kept
