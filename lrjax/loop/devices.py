"""What a row loop reads and gives, where devices own shares of its rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lrjax.loop.clock import Clock
from lrjax.loop.rowloop import RowLoop, Source
from lrjax.loop.shards import Shards, WithHalo
from lrjax.program.varying import struct, varying_axes, varying_over
from lrjax.rules.base import Array, with_at
from lrjax.rules.masks import keep, keep_rows

Values = dict[int, Array]


def share(loop: RowLoop, value: int) -> int:
    """Rows of a value that a device owns: all, where rows are not divided among devices."""
    if loop.shards is None:
        return loop.graph.height(value)
    return loop.shards.rows(loop.graph.rate[value])


def share_of_node(loop: RowLoop, index: int) -> int:
    """Likewise of what a node makes, or of what drives it where it is a reduction."""
    return loop.schedule.tasks[index].height


def type_on_device(loop: RowLoop, value: int) -> Any:
    """The type of what a device holds of a value within the loop."""
    aval = loop.graph.program.avals[value]
    if loop.shards is None:
        return aval
    shape = aval.shape
    if value in loop.graph.row_axis:
        shape = with_at(shape, loop.graph.row_axis[value], share(loop, value))
    return struct(shape, aval.dtype, axes_within(loop, value))


def axes_within(loop: RowLoop, value: int) -> frozenset[str]:
    """Mesh axes over which a value may differ between devices within the loop."""
    aval = loop.graph.program.avals[value]
    is_number = not jnp.issubdtype(aval.dtype, jax.dtypes.extended)  # random keys have no such
    own = frozenset({loop.shards.axis} if loop.shards is not None and is_number else ())
    return varying_axes(aval) | own


class Division(NamedTuple):
    """A value that exists whole, divided along an axis for those who read its rows at one rate."""

    value: int
    axis: int
    share: int


def division_of(loop: RowLoop, source: Source) -> Division:
    """How a value is divided that a node reads by rows."""
    own = share_of_node(loop, source.node) * source.read.row_map.rate
    return Division(source.value, source.read.axis, int(own))


def array_key(loop: RowLoop, source: Source) -> Any:
    """By which a loop finds the array that a node reads by rows: its value, or its division."""
    return source.value if loop.shards is None else division_of(loop, source)


def halo(loop: RowLoop, division: Division) -> tuple[int, int]:
    """Rows before and behind its share that a device reads."""
    top = bottom = 0
    for s in loop.sliced:
        if division_of(loop, s) == division:
            first, stop = loop.needs[s.node]
            top = max(top, -int(s.read.row_map.first(first)))
            bottom = max(bottom, int(s.read.row_map.end(stop)) - division.share)
    most = (shards_of_loop(loop).count - 1) * division.share
    return min(top, most), min(bottom, most)


def fetched_rows(loop: RowLoop) -> int:
    """The most rows of an array that a device fetches on one side; none on one device."""
    if loop.shards is None:
        return 0
    halos = (halo(loop, division_of(loop, s)) for s in loop.sliced)
    return max((max(one) for one in halos), default=0)


def is_inside_image(loop: RowLoop, value: int, first: int, stop: int) -> bool:
    """Whether rows that a step makes, as devices count them, are rows of the image on each."""
    devices = 1 if loop.shards is None else loop.shards.count
    beyond = stop + (devices - 1) * share(loop, value)
    return first >= 0 and beyond <= loop.graph.height(value)


def kept_rows(loop: RowLoop, clock: Clock, value: int, count: int) -> Array | None:
    """Which of a step's rows of a value are rows of the image; None where all are.

    Of a step that is differentiated on several devices, those that a device's own rows depend on:
    of others it has not fetched what they are made of.
    """
    node = loop.producer[value]
    start = "start", node
    first, stop = clock.bounds(start)[0], clock.bounds(("stop", node))[1]
    kept = None
    if not is_inside_image(loop, value, first, stop):
        kept = clock.inside(start, count, 0, loop.graph.height(value), share(loop, value))
    if loop.shards is not None and loop.is_differentiated:
        low, high = loop.needs[node]
        if first < low or stop > high:
            own = clock.inside(start, count, low, high)
            kept = own if kept is None else kept & own
    return kept


def row_specs(loop: RowLoop, values: Iterable[int], leading: int = 0) -> dict[int, jax.P]:
    """How values are divided among devices that carry rows, behind some ``leading`` axes."""
    shards = shards_of_loop(loop)
    return {v: shards.spec(loop.graph.row_axis[v] + leading) for v in values}


def read_specs(loop: RowLoop) -> tuple[dict[Division, jax.P], jax.P]:
    """How the two that ``read_values`` gives are divided."""
    shards = shards_of_loop(loop)
    divisions = (division_of(loop, s) for s in loop.sliced)
    return {division: shards.spec(division.axis) for division in divisions}, jax.P()


def read_values(
    loop: RowLoop, values: Mapping[int, Array]
) -> tuple[dict[Division, Array], dict[int, Array]]:
    """The arrays that are read by rows, with as many as all shares have, and those read whole."""
    shards, avals = shards_of_loop(loop), loop.graph.program.avals
    arrays = {}
    for division in dict.fromkeys(division_of(loop, s) for s in loop.sliced):
        value, axis, own = division
        array = values[value]
        if array.shape[axis] != shards.count * own:
            array = lax.slice_in_dim(array, 0, avals[value].shape[axis], axis=axis)
            array = shards.padded(array, axis, own)
        arrays[division] = array
    return arrays, {v: values[v] for v in loop.wholes}


def images(loop: RowLoop, values: Mapping[int, Array]) -> Values:
    """Values without the rows behind the image, where loops gave such."""
    if loop.shards is None:
        return dict(values)
    avals = loop.graph.program.avals
    return {
        v: x if x.shape == avals[v].shape else lax.slice(x, (0,) * x.ndim, avals[v].shape)
        for v, x in values.items()
    }


def shared(loop: RowLoop, values: Mapping[int, Array]) -> Values:
    """Values with as many rows as all shares have, as a loop gives its row outputs."""
    if loop.shards is None:
        return dict(values)
    row_outputs, axes, shards = loop.row_outputs, loop.graph.row_axis, loop.shards
    return {
        v: shards.padded(x, axes[v], share(loop, v)) if v in row_outputs else x
        for v, x in values.items()
    }


def with_halos(loop: RowLoop, own: Mapping[Division, Array]) -> dict[Division, WithHalo]:
    """Shards of arrays that are read by rows, each with the rows that neighbours lend."""
    shards = shards_of_loop(loop)
    return {d: shards.with_halo(x, d.axis, *halo(loop, d)) for d, x in own.items()}


def of_image(loop: RowLoop, clock: Clock, source: Source, window: Array, fill: Any) -> Array:
    """A window of a shard and its halo, of which rows outside the image hold ``fill``.

    What is there else are rows behind the image that fill up the last shares.
    """
    name, (value, axis, own) = ("window", source.node, source.operand), division_of(loop, source)
    height, rows = loop.graph.program.avals[value].shape[axis], window.shape[axis]
    low, high = clock.bounds(name)
    is_inside = low >= 0 and high + rows + (shards_of_loop(loop).count - 1) * own <= height
    if is_inside or not (loop.is_differentiated or loop.fill_of(source) is not None):
        return window
    return keep(window, clock.inside(name, rows, 0, height, own), axis, fill)


def of_image_alone(
    loop: RowLoop, clock: Clock, source: Source, window: Array, start: int, fill: Any
) -> Array:
    """A window in a step of its own, from ``start`` on: rows outside the image hold ``fill``."""
    axis, rows = source.read.axis, window.shape[source.read.axis]
    own, height = 0, loop.graph.program.avals[source.value].shape[axis]
    if loop.shards is not None:
        own = division_of(loop, source).share
    devices = 1 if loop.shards is None else loop.shards.count
    if start >= 0 and start + rows + (devices - 1) * own <= height:
        return window
    return keep_rows(window, clock.row_of_image(start, own), axis, 0, height, fill)


def without_unread(
    loop: RowLoop,
    clock: Clock,
    source: Source,
    window: Array,
    part: tuple[int, int] | None = None,
) -> Array:
    """A window in which rows of the image that column never reads are finite.

    ``part``: the rows of the node, in a step of its own.
    """
    found = loop.unread.get((source.node, source.operand))
    if found is None:
        return window
    (low, high), axis, fill = found, source.read.axis, source.read.fill
    fill = fill if fill is not None and np.isfinite(fill) else 1
    own = 0 if loop.shards is None else division_of(loop, source).share
    if part is not None:
        first = clock.row_of_image(loop.window_of(source, part)[0], own)
        return keep_rows(window, first, axis, low, high, fill)
    name = "window", source.node, source.operand
    return keep(window, clock.inside(name, window.shape[axis], low, high, own), axis, fill)


def own_rows(loop: RowLoop, clock: Clock, source: Source, window: Array) -> Array:
    """What a reduction reads, without rows that are other devices' or outside the image.

    Of what the drivers meet, rows behind those that the own ones meet may never be computed.
    """
    track, (value, axis, own) = loop.schedule.tracks[source.node], division_of(loop, source)
    name, row_map = ("window", source.node, source.operand), source.read.row_map
    low: Any = row_map.first(0)
    high: Any = row_map.end(share_of_node(loop, source.node))
    if source.operand in loop.nodes[source.node].op.drivers and not track.is_steady:
        # Rows computed again belong to an earlier step's contribution.
        low = jnp.maximum(clock["owned", source.node], low)
        high = jnp.minimum(clock["stop", source.node], high)
    begin = clock.in_image(name, own) - clock[name]  # the row of the image that is row 0 here
    height = loop.graph.program.avals[value].shape[axis]
    low = jnp.maximum(low, -begin)
    high = jnp.maximum(jnp.minimum(high, height - begin), low)
    return keep_rows(window, clock[name], axis, low, high, source.read.fill)


def with_returned_halos(loop: RowLoop, bars: Mapping[Division, WithHalo]) -> dict[Division, Array]:
    """Cotangents of shards, with those that neighbours send back of rows they were lent."""
    shards = shards_of_loop(loop)
    return {d: shards.with_returned_halo(bar, *halo(loop, d)) for d, bar in bars.items()}


def varying(loop: RowLoop, values: Mapping[int, Array]) -> Values:
    """Values that are alike on all devices, as such that may differ: no step adds up gradients."""
    return {v: varying_over(x, axes_within(loop, v)) for v, x in values.items()}


def shards_of_loop(loop: RowLoop) -> Shards:
    assert loop.shards is not None
    return loop.shards


def combined(loop: RowLoop, sums: Mapping[int, Any]) -> dict[int, Any]:
    """Accumulators of all devices together, with one collective for each kind of reduction.

    Negative numbers are those of vectors of small sums.
    """
    kinds: dict[str, dict[int, Any]] = {}
    for v, partial in sums.items():
        kind = "sum" if v < 0 else loop.reductions[v][1]
        kinds.setdefault(kind, {})[v] = partial
    shards, found = shards_of_loop(loop), dict[int, Any]()
    for kind, partials in kinds.items():
        found.update(shards.combined(kind, partials))
    return found
