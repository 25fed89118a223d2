"""The gradient of a maximum over windows, as elementwise work on a block of rows.

XLA:GPU scatters: one float32 and four int32 maps for the places of the maxima, zeros, a copy of
them, then atomic additions. Here every window remembers in a byte which of its elements is chosen,
and every element adds up the cotangents of the few windows that chose it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from lrjax.rules.base import Array

# Windows of more elements than this are left to XLA.
MOST_ELEMENTS = 25


@dataclasses.dataclass(frozen=True)
class Pooling:
    """Windows over an array.

    Attributes:
      size, stride: per axis.
      padding: per axis, elements in front of the array and behind it that windows reach and that
        are never chosen.
      chooses_max: the first of the largest elements is chosen, else of the smallest.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    chooses_max: bool

    @property
    def is_small(self) -> bool:
        """Whether it is worth doing element by element."""
        return math.prod(self.size) <= MOST_ELEMENTS

    @property
    def places(self) -> list[tuple[int, ...]]:
        """Of the elements of a window, in the order in which they are looked at."""
        return [*itertools.product(*map(range, self.size))]

    def gradient(self, cotangents: Array, operand: Array) -> Array:
        """What ``select_and_scatter_add`` of the cotangents of the windows gives."""
        chosen = self.chosen(operand, cotangents.shape)
        found = None
        # The windows that an element is in, by how many strides they start before its own.
        for back in itertools.product(*map(self._backs, range(operand.ndim))):
            part = self._of_windows(cotangents, chosen, back, operand.shape)
            found = part if found is None else found + part
        assert found is not None
        return found.astype(operand.dtype)

    def chosen(self, operand: Array, windows: Sequence[int]) -> Array:
        """The number of the element that every window chooses, in the order of ``places``."""
        filled = lax.pad(operand, np.zeros((), operand.dtype), [(*p, 0) for p in self.padding])
        best, number = None, jnp.zeros(windows, np.uint8)
        has_one: Array | None = None
        for k, place in enumerate(self.places):
            stops = [
                p + (n - 1) * s + 1 for p, n, s in zip(place, windows, self.stride, strict=True)
            ]
            other = lax.slice(filled, place, stops, self.stride)
            exists = self._exists(place, operand.shape, windows)
            if best is None:
                best, has_one = other, exists
                continue
            keeps = best >= other if self.chooses_max else best <= other
            if exists is not None:
                keeps = keeps | ~exists
            if has_one is not None:
                keeps = keeps & has_one
                has_one = None if exists is None else has_one | exists
            best = lax.select(keeps, best, other)
            number = lax.select(keeps, number, lax.full_like(number, k))
        return number

    def _exists(
        self, place: Sequence[int], shape: Sequence[int], windows: Sequence[int]
    ) -> Array | None:
        """Of every window, whether this element is in the array; None where all are."""
        found: Array | None = None
        for axis, (n, (low, _)) in enumerate(zip(windows, self.padding, strict=True)):
            at = np.arange(n) * self.stride[axis] + place[axis] - low
            inside = (at >= 0) & (at < shape[axis])
            if not inside.all():
                mask = lax.broadcast_in_dim(jnp.asarray(inside), windows, (axis,))
                found = mask if found is None else found & mask
        return found

    def _backs(self, axis: int) -> range:
        return range(-(-self.size[axis] // self.stride[axis]))

    def _of_windows(
        self, cotangents: Array, chosen: Array, back: Sequence[int], shape: Sequence[int]
    ) -> Array:
        """What elements get of the windows that start so many strides before their own."""
        counts, own = [], []
        for axis, (n, stride, (low, high)) in enumerate(
            zip(shape, self.stride, self.padding, strict=True)
        ):
            counts.append(-(-(low + n + high) // stride))
            # In element e * stride + phase, the place of window e - back.
            own.append(np.arange(stride) + back[axis] * stride)
        moved = [
            _moved(x, [(b, c) for b, c in zip(back, counts, strict=True)])
            for x in (cotangents, chosen)
        ]
        split = [n for c, s in zip(counts, self.stride, strict=True) for n in (c, s)]
        spread = [lax.broadcast_in_dim(x, split, range(0, 2 * x.ndim, 2)) for x in moved]
        place = lax.broadcast_in_dim(self._numbers(own), split, range(1, 2 * len(own), 2))
        wide = jnp.promote_types(cotangents.dtype, np.float32)
        wide = wide if len(self._overlaps) else cotangents.dtype
        taken = jnp.where(spread[1] == place, spread[0].astype(wide), np.zeros((), wide))
        whole = taken.reshape([c * s for c, s in zip(counts, self.stride, strict=True)])
        starts = [low for low, _ in self.padding]
        return lax.slice(whole, starts, [s + n for s, n in zip(starts, shape, strict=True)])

    @property
    def _overlaps(self) -> list[int]:
        """Axes along which an element is in several windows."""
        pairs = zip(self.size, self.stride, strict=True)
        return [axis for axis, (size, stride) in enumerate(pairs) if size > stride]

    def _numbers(self, places: Sequence[np.ndarray]) -> Array:
        """Numbers of places, per axis; 255 for those that no window has."""
        number, exists = np.zeros((1,) * len(places), int), np.ones((1,) * len(places), bool)
        for axis, own in enumerate(places):
            shaped = own.reshape([-1 if a == axis else 1 for a in range(len(places))])
            number = number * self.size[axis] + shaped
            exists = exists & (shaped < self.size[axis])
        return jnp.asarray(np.where(exists, number, 255), np.uint8)


def _moved(x: Array, moves: Sequence[tuple[int, int]]) -> Array:
    """Per axis, so many elements later and so many in all; zeros come in."""
    padding = [(back, count - back - n, 0) for n, (back, count) in zip(x.shape, moves, strict=True)]
    return lax.pad(x, np.zeros((), x.dtype), padding)
