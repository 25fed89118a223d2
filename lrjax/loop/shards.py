"""Rows of one image over the devices of a mesh axis: who owns which, and what neighbours lend.

Device ``d`` owns rows ``d * share : (d + 1) * share`` of every value, its *shard*, and counts rows
from its own first one. Shares are in proportion to the values' rates, so a row map is the same on
every device, and one schedule, of a share's rows, serves all of them; what differs is where the
image begins and ends. Before a loop every device fetches the halo that its own rows depend on
from its neighbours, so that no step waits for another device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lrjax.loop.blocks import read_rows, write_rows
from lrjax.rowgraph.graph import RowGraph, root_of
from lrjax.rowgraph.row_mesh import RowMesh
from lrjax.rules.base import Array
from lrjax.rules.geometry import ChainedMap, ceil_div, round_up
from lrjax.rules.masks import rows_inside

Rate = tuple[int, Fraction]


@dataclasses.dataclass(frozen=True)
class Shards:
    """How many rows of every value a device owns.

    Attributes:
      row_mesh: the devices.
      root_rows: rows of the root of every component of a row graph.
    """

    row_mesh: RowMesh
    root_rows: Mapping[int, int]

    @property
    def axis(self) -> str:
        return self.row_mesh.axis

    @property
    def count(self) -> int:
        return self.row_mesh.count

    def rows(self, rate: Rate) -> int:
        """The share of a value, or of an operation, of this root and rate."""
        root, per_row = rate
        share = self.root_rows[root] * per_row
        assert share.denominator == 1
        return share.numerator

    def padded(self, array: Array, axis: int, share: int) -> Array:
        """An array with as many rows as all shares have; those behind the image are zero."""
        missing = self.count * share - array.shape[axis]
        if missing == 0:
            return array
        zero = jnp.zeros((), array.dtype)
        return lax.pad(array, zero, [(0, missing * (a == axis), 0) for a in range(array.ndim)])

    def spec(self, axis: int) -> jax.P:
        """How an array is divided whose rows lie along ``axis``."""
        return jax.P(*[None] * axis, self.axis)

    def run(
        self, function: Callable[..., Any], inputs: Sequence[Any], in_specs: Any, out_specs: Any
    ) -> Any:
        """``function`` on every device, on its shards of what is divided."""
        at_hand = jax.sharding.get_abstract_mesh()
        mapped = jax.shard_map(
            function,
            mesh=self.row_mesh.mesh if at_hand.empty else None,
            in_specs=tuple(in_specs),
            out_specs=out_specs,
            axis_names={self.axis},
        )
        return jax.jit(mapped)(*inputs)  # outside of jit, axes that stay Auto are not supported

    def index(self) -> Array:
        """The number of this device among those that share the rows."""
        return lax.axis_index(self.axis)

    def with_halo(self, own: Array, axis: int, top: int, bottom: int) -> WithHalo:
        """A device's rows with ``top`` and ``bottom`` rows of those before and behind it.

        Rows beyond the first and the last device are zero. A halo higher than a share comes from
        several devices, in as many hops.
        """
        share = own.shape[axis]
        above: list[Array] = []
        below: list[Array] = []
        for hop in range(1, ceil_div(top, share) + 1):
            size = min(share, top - (hop - 1) * share)
            rows = lax.slice_in_dim(own, share - size, share, axis=axis)
            above.insert(0, self._moved(rows, hop))
        for hop in range(1, ceil_div(bottom, share) + 1):
            size = min(share, bottom - (hop - 1) * share)
            below.append(self._moved(lax.slice_in_dim(own, 0, size, axis=axis), -hop))
        pieces, firsts = [own], [0]
        if above:
            pieces.append(lax.concatenate(above, axis))
            firsts.append(-top)
        if below:
            pieces.append(lax.concatenate(below, axis))
            firsts.append(share)
        return WithHalo(tuple(pieces), tuple(firsts), axis)

    def _moved(self, rows: Array, by: int) -> Array:
        pairs = [(d, d + by) for d in range(self.count) if 0 <= d + by < self.count]
        return lax.ppermute(rows, self.axis, pairs) if pairs else jnp.zeros_like(rows)

    def with_returned_halo(self, cotangents: WithHalo, top: int, bottom: int) -> Array:
        """The transpose of ``with_halo``: every device gets back what others add to its rows."""
        own, axis = cotangents.pieces[0], cotangents.axis
        _, pull = jax.vjp(lambda rows: self.with_halo(rows, axis, top, bottom), own)
        (found,) = pull(cotangents)
        return found

    def combined(self, reduction: str, partial: Any) -> Any:
        """What the devices' contributions to a reduction over rows give together (a pytree)."""
        direct = {"sum": lax.psum, "max": lax.pmax, "min": lax.pmin}
        if reduction in direct:
            return direct[reduction](partial, self.axis)
        combine = {"prod": jnp.prod, "and": jnp.bitwise_and.reduce, "or": jnp.bitwise_or.reduce}
        return jax.tree.map(lambda x: combine[reduction](self._of_all(x), axis=0), partial)

    def _of_all(self, partial: Array) -> Array:
        """Every device's array, on all devices: a sum to which each adds its own place.

        ``lax.all_gather`` has a result that ``jax.shard_map`` takes to differ between devices.
        """
        is_flag = partial.dtype == np.bool_
        number = partial.astype(np.int32) if is_flag else partial
        places = jnp.arange(self.count).reshape(-1, *[1] * partial.ndim)
        own = jnp.where(places == self.index(), number[None], jnp.zeros((), number.dtype))
        found = lax.psum(own, self.axis)
        return found.astype(np.bool_) if is_flag else found


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["pieces"], meta_fields=["firsts", "axis"]
)
@dataclasses.dataclass(frozen=True)
class WithHalo:
    """A device's rows and those of its neighbours, apart: joined they would be one more map.

    Attributes:
      pieces: its own rows, then those before and behind them where such are read.
      firsts: the first row of each.
      axis: of the rows.
    """

    pieces: tuple[Array, ...]
    firsts: tuple[int, ...]
    axis: int

    def read(
        self, start: Any, size: int, fill: Any, bounds: tuple[int, int], zero: Any = 0
    ) -> Array:
        """``read_rows`` of all pieces; rows in none of them are ``fill``."""
        low, high = bounds

        def read_of(piece: Array, first: int) -> Array:
            moved = low - first, high - first
            return read_rows(piece, start - first, size, self.axis, fill, moved, zero)

        found = read_of(self.pieces[0], 0)
        for piece, first in zip(self.pieces[1:], self.firsts[1:], strict=True):
            count = piece.shape[self.axis]
            if high + size <= first or low >= first + count:
                continue  # no step reads of this piece
            inside = rows_inside(start - first, size, 0, count)
            mask = lax.broadcast_in_dim(inside, found.shape, (self.axis,))
            found = lax.select(mask, read_of(piece, first), found)
        return found

    def plus(self, rows: Array, start: Any, bounds: tuple[int, int]) -> WithHalo:
        """With rows from ``start`` on added to those that are there, in place."""
        low, high = bounds

        def added(piece: Array, first: int) -> Array:
            moved = low - first, high - first
            return write_rows(piece, rows, start - first, self.axis, moved, jnp.add)

        pieces = tuple(map(added, self.pieces, self.firsts))
        return dataclasses.replace(self, pieces=pieces)


def shards_of(graph: RowGraph, row_mesh: RowMesh) -> Shards:
    """Shares of a row graph's values: as small as they can be with every row owned by a device."""
    multiple: dict[int, int] = {}  # of a root's rows, in which every value has whole rows
    least: dict[int, int] = {}
    made_whole = frozenset[int]().union(*graph.stages.made_whole)

    def divide(root: int, rate: Fraction) -> None:
        multiple[root] = math.lcm(multiple.get(root, 1), rate.denominator)

    def cover(root: int, rate: Fraction, height: int) -> None:
        least[root] = max(least.get(root, 1), math.ceil(height / rate / row_mesh.count))

    for v, (root, rate) in graph.rate.items():
        divide(root, rate)
        if v in made_whole or v not in graph.streamed:
            cover(root, rate, graph.height(v))
    for node in graph.row_nodes:
        root, rate = root_of(graph, node)
        divide(root, rate)
        if node.is_reduction:
            cover(root, rate, node.op.height)
        for _, v, read in node.row_reads:
            own = rate
            maps = read.row_map.maps if isinstance(read.row_map, ChainedMap) else (read.row_map,)
            for one in maps:
                own *= one.rate
                divide(root, own)
            if v not in graph.streamed:  # it may be read at several rates
                cover(root, own, graph.program.avals[v].shape[read.axis])
    rows = {root: round_up(least.get(root, 1), multiple[root]) for root in multiple}
    return Shards(row_mesh, rows)
