"""Row maps: which input rows an operation needs for a range of output rows.

Plain Python on integers or arrays of them, no JAX. Rows are counted in *virtual* coordinates:
they run below zero and beyond the height, so that every map stays affine; whoever reads rows
outside the image fills them with the padding value.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from fractions import Fraction
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Frontier = NDArray[np.int64]
# A row, or one row per step.
Row = TypeVar("Row", int, Frontier)


def ceil_div(numerator: Row, denominator: int) -> Row:
    return -(-numerator // denominator)


def round_up(rows: Row, quantum: int) -> Row:
    return ceil_div(rows, quantum) * quantum


def round_down(rows: Row, quantum: int) -> Row:
    return rows // quantum * quantum


@dataclasses.dataclass(frozen=True)
class RowMap:
    """A window sliding along rows (DESIGN section 4).

    Output row ``i`` touches the positions ``i * stride - pad + [0, extent)`` of the input after
    it was dilated by ``base`` (``base - 1`` empty positions between neighbouring rows).

    Attributes:
      stride: positions between the windows of neighbouring output rows.
      extent: positions that one window spans, ``(kernel - 1) * dilation + 1``.
      pad: low padding in positions; negative padding crops.
      base: dilation of the input (``lhs_dilation``).
    """

    stride: int = 1
    extent: int = 1
    pad: int = 0
    base: int = 1

    @functools.cached_property
    def shift(self) -> int | None:
        """One past the last input row less one past the last output row, if that is a constant."""
        return int(self.extent - 1 - self.pad) if self.stride == self.base == 1 else None

    @functools.cached_property
    def quantum(self) -> int:
        """The least shift of output rows that shifts the input rows by a whole number."""
        return self.base // math.gcd(self.stride, self.base)

    @property
    def rate(self) -> Fraction:
        """Input rows consumed per output row."""
        return Fraction(int(self.stride), int(self.base))  # numpy has integers of its own

    def first(self, start: Row) -> Row:
        """The first input row that output rows from ``start`` on need."""
        return ceil_div(start * self.stride - self.pad, self.base)

    def end(self, stop: Row) -> Row:
        """One past the last input row that output rows before ``stop`` need."""
        return ((stop - 1) * self.stride - self.pad + self.extent - 1) // self.base + 1

    def size(self, count: int) -> int:
        """Input rows of ``count`` output rows that start at a multiple of the quantum."""
        return self.end(count) - self.first(0)

    def frontier(self, rows: Row) -> Row:
        """The largest ``stop`` whose input rows all lie before ``rows``."""
        return (rows * self.base - 1 + self.pad - (self.extent - 1)) // self.stride + 1

    def block_padding(self, inputs: int, outputs: int) -> tuple[int, int]:
        """Low and high padding with which so many input rows give so many output rows.

        Any block that starts at a multiple of the quantum sees the same alignment.
        """
        low = self.first(0) * self.base + self.pad
        dilated = max((inputs - 1) * self.base + 1, 0)
        return low, (outputs - 1) * self.stride + self.extent - low - dilated

    def then(self, outer: RowMap | ChainedMap) -> ChainedMap:
        """The map of an operation that needs ``self``'s rows of what ``outer`` gives."""
        return ChainedMap((self, outer))


@dataclasses.dataclass(frozen=True)
class ChainedMap:
    """Row maps applied one after the other, from the output towards the input."""

    maps: tuple[RowMap | ChainedMap, ...]

    @functools.cached_property
    def shift(self) -> int | None:
        shifts = [m.shift for m in self.maps]
        return None if None in shifts else sum(shift or 0 for shift in shifts)

    @property
    def rate(self) -> Fraction:
        return math.prod((m.rate for m in self.maps), start=Fraction(1))

    @functools.cached_property
    def quantum(self) -> int:
        quantum, rate = 1, Fraction(1)
        for m in self.maps:
            quantum = math.lcm(quantum, (m.quantum / rate).numerator)
            rate *= m.rate
        return quantum

    def first(self, start: Row) -> Row:
        return functools.reduce(lambda row, m: m.first(row), self.maps, start)

    def end(self, stop: Row) -> Row:
        return functools.reduce(lambda row, m: m.end(row), self.maps, stop)

    def size(self, count: int) -> int:
        return self.end(count) - self.first(0)

    def frontier(self, rows: Row) -> Row:
        return functools.reduce(lambda row, m: m.frontier(row), reversed(self.maps), rows)


# Above this many rows, blocks are not aligned to a band's period.
_LONGEST_PERIOD = 16


@dataclasses.dataclass(frozen=True)
class BandMap:
    """A band around a line: output row ``i`` needs rows ``i * stride // base + low + [0, extent)``.

    Bounds any monotone map (a resize, rows picked by constant indices, a mirrored edge). Where the
    line's period is long, blocks may start anywhere and their windows are one row larger.

    Attributes:
      stride, base: input rows per output row, as a fraction.
      low: where the band begins, in rows relative to the line.
      extent: rows of the band.
    """

    stride: int
    base: int
    low: int
    extent: int

    @functools.cached_property
    def shift(self) -> int | None:
        """As of a ``RowMap``."""
        return self.low + self.extent - 1 if self.stride == self.base == 1 else None

    @property
    def quantum(self) -> int:
        return self.base if self.base <= _LONGEST_PERIOD else 1

    @property
    def rate(self) -> Fraction:
        return Fraction(self.stride, self.base)

    @property
    def _slack(self) -> int:
        """Windows of equal size differ by a row in what they need, unless they are aligned."""
        return int(self.base > _LONGEST_PERIOD)

    def first(self, start: Row) -> Row:
        return start * self.stride // self.base + self.low

    def end(self, stop: Row) -> Row:
        return (stop - 1) * self.stride // self.base + self.low + self.extent + self._slack

    def size(self, count: int) -> int:
        return (count - 1) * self.stride // self.base + self.extent + self._slack

    def frontier(self, rows: Row) -> Row:
        reach = rows - self.low - self.extent - self._slack
        return ((reach + 1) * self.base - 1) // self.stride + 1


AnyMap = RowMap | ChainedMap | BandMap

IDENTITY = RowMap()
