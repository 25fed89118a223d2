"""Constant sums of rows: rows picked by constant indices, banded matrices, mirrored rows.

Every output row is a weighted sum of a few input rows (its *taps*), known while the program is
traced: a resize, a gather or scatter with constant indices, a reversal of a few rows. A line with a
band around it bounds where the taps lie (``BandMap``), so such an operation streams like a window
operation, at whatever rate its rows advance.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np

from lrjax.program.constants import Constant
from lrjax.rules.base import Array, Equation, NotRowLocal, RowOp, RowRead, Rows, with_at
from lrjax.rules.block_sums import accumulator_dtype
from lrjax.rules.geometry import BandMap

# A band is worth streaming if it is lower than this, or than half of the map.
LOWEST_MAP = 16
# Taps per row, on average, of a matrix that is applied tap by tap.
MOST_TAPS = 32
# Denominators of the slopes that are tried before the exact one.
_SIMPLE = 16
_FINEST = 4096


@dataclasses.dataclass(frozen=True)
class Taps:
    """The input rows behind every output row.

    Attributes:
      band: bounds where they lie.
      rows: [output rows, taps] input row of every tap.
      is_tap: [output rows, taps] False where an output row has fewer taps.
      weights: [output rows, taps], None for plain sums.
    """

    band: BandMap
    rows: np.ndarray
    is_tap: np.ndarray
    weights: np.ndarray | None

    @property
    def height(self) -> int:
        return len(self.rows)

    def sum(self, window: Array, rows: Rows, axis: int, dtype: Any) -> Array:
        """Output rows of a block, from the window of input rows that its band gives."""
        wanted = jnp.clip(rows.start + np.arange(rows.count), 0, self.height - 1)
        positions = jnp.asarray(self.rows)[wanted] - self._window_start(rows.start)
        positions = jnp.clip(positions, 0, window.shape[axis] - 1)
        is_tap = jnp.asarray(self.is_tap)[wanted]
        along = [-1 if a == axis else 1 for a in range(window.ndim)]
        if self.weights is None and self.rows.shape[1] == 1 and self.is_tap.all():
            return jnp.take(window, positions[:, 0], axis=axis, mode="clip").astype(dtype)
        accumulator = accumulator_dtype(dtype)
        total: Array | None = None
        for tap in range(self.rows.shape[1]):
            term = jnp.take(window, positions[:, tap], axis=axis, mode="clip").astype(accumulator)
            if self.weights is not None:
                weights = jnp.asarray(self.weights[:, tap], accumulator)[wanted]
                term = term * weights.reshape(along)
            term = jnp.where(is_tap[:, tap].reshape(along), term, jnp.zeros((), accumulator))
            total = term if total is None else total + term
        assert total is not None
        return total.astype(dtype)

    def _window_start(self, start: Array | int) -> Array | int:
        """``band.first`` without a product that leaves 32 bits."""
        whole, rest = start // self.band.base, start % self.band.base
        return whole * self.band.stride + rest * self.band.stride // self.band.base + self.band.low


_KNOWN: collections.OrderedDict[bytes, Taps | str] = collections.OrderedDict()
_MOST_KNOWN = 256


def remembered(key: bytes, make: Callable[[], Taps]) -> Taps:
    """The taps of a constant; a program is traced several times, its matrices evaluated once."""
    if key not in _KNOWN:
        try:
            _KNOWN[key] = make()
        except NotRowLocal as reason:
            _KNOWN[key] = str(reason)
        if len(_KNOWN) > _MOST_KNOWN:
            _KNOWN.popitem(last=False)
    found = _KNOWN[key]
    if isinstance(found, str):
        raise NotRowLocal(found)
    return found


def taps(
    outputs: np.ndarray,
    inputs: np.ndarray,
    weights: np.ndarray | None,
    height: int,
    input_height: int,
    slope: Fraction | None = None,
) -> Taps:
    """Taps from pairs of output and input rows.

    Args:
      outputs, inputs: [pairs] the rows.
      weights: [pairs], None for plain sums.
      height, input_height: rows of the output and the input.
      slope: input rows per output row, found from the pairs by default.

    Raises:
      NotRowLocal: if the band is so wide that streaming gains nothing.
    """
    order = np.lexsort((inputs, outputs))
    outputs, inputs = outputs[order], inputs[order]
    counts = np.bincount(outputs, minlength=height)
    most = max(int(np.max(counts, initial=0)), 1)
    if slope is None:
        found = len(outputs) > 0
        slope = _slope(outputs, inputs, height, input_height) if found else Fraction(1)
    band = _band(outputs, inputs, slope)
    if band.extent > max(input_height // 2, LOWEST_MAP):
        raise NotRowLocal(
            f"an output row needs rows up to {band.extent} apart of {input_height}: "
            "they are far from a line"
        )
    tap = np.arange(len(outputs)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.zeros((height, most), np.int32)
    table[outputs, tap] = inputs
    is_tap = np.arange(most) < counts[:, None]
    table = np.where(is_tap, table, table[:, :1])
    scaled = None
    if weights is not None:
        scaled = np.zeros((height, most), weights.dtype)
        scaled[outputs, tap] = weights[order]
    return Taps(band, table, is_tap, scaled)


def _slope(outputs: np.ndarray, inputs: np.ndarray, height: int, input_height: int) -> Fraction:
    """The simplest slope whose band is at most a row wider than the narrowest.

    Simplest, so that rows that were halved and doubled again meet at one rate; the same for an
    operation and its transpose, which must meet too.
    """
    if height > input_height:
        return 1 / _slope(inputs, outputs, input_height, height)
    exact = Fraction(max(input_height, 1), max(height, 1))
    steepness = float(np.polyfit(outputs, inputs, 1)[0]) if np.ptp(outputs) else float(exact)
    slopes = {exact.limit_denominator(_FINEST)}
    for base in range(1, _SIMPLE + 1):
        floor = math.floor(max(steepness, 0.5) * base)
        slopes.update(Fraction(stride, base) for stride in (floor, floor + 1) if stride)
    candidates = sorted(slopes, key=lambda slope: (slope.denominator, slope.numerator))
    spread = [float(np.ptp(inputs - outputs * float(slope))) for slope in candidates]
    accepted = min(spread) + float(max(exact, Fraction(1)))
    return next(s for s, width in zip(candidates, spread, strict=True) if width <= accepted)


def _band(outputs: np.ndarray, inputs: np.ndarray, slope: Fraction) -> BandMap:
    distance = inputs - outputs * slope.numerator // slope.denominator
    low, high = (int(distance.min()), int(distance.max())) if len(distance) else (0, 0)
    return BandMap(slope.numerator, slope.denominator, low, high - low + 1)


def sum_of_taps(
    equation: Equation,
    found: Taps,
    axis: int,
    out_axis: int,
    arrange: Callable[[Array], Array] = lambda rows: rows,
    operand: int | None = None,
) -> RowOp:
    """The row form of an equation that sums taps of one operand along ``axis``.

    ``arrange`` moves the axes of the sum, whose rows still lie on ``axis``, into place.
    """
    operand = equation.row_operand if operand is None else operand
    dtype = equation.outputs[0].dtype

    def evaluate(windows: Sequence[Array], rows: Rows) -> Sequence[Array]:
        return [arrange(found.sum(windows[operand], rows, axis, dtype))]

    reads = with_at([None] * len(equation.operands), operand, RowRead(found.band, axis))
    elements = float(np.prod(equation.outputs[0].shape)) / max(found.height, 1)
    return RowOp(
        reads=reads,
        out_axes=(out_axis,),
        height=found.height,
        evaluate=evaluate,
        flops=2.0 * found.rows.shape[1] * elements,
        is_positional=True,
    )


def of_matrix(matrix: Constant, contracted: int) -> Taps:
    """Taps of rows times a constant matrix, whose axis ``contracted`` meets the input rows.

    A resize and its gradient use the same matrix; it is evaluated once.
    """
    if matrix.key not in _ENTRIES:
        values = matrix.value()
        places = np.nonzero(values)
        _ENTRIES[matrix.key] = values.shape, places, values[places]
        if len(_ENTRIES) > _MOST_KNOWN:
            _ENTRIES.popitem(last=False)
    shape, places, weights = _ENTRIES[matrix.key]
    if len(weights) > MOST_TAPS * max(shape):
        raise NotRowLocal(f"a matrix with {len(weights)} entries is no band")
    outputs, inputs = places[1 - contracted], places[contracted]
    return taps(outputs, inputs, weights, shape[1 - contracted], shape[contracted])


_Entries = tuple[tuple[int, ...], tuple[np.ndarray, ...], np.ndarray]
_ENTRIES: collections.OrderedDict[bytes, _Entries] = collections.OrderedDict()


def of_reversal(height: int) -> Taps:
    """The rows of a map that is so low that its mirror image is near."""
    rows = np.arange(height)
    return taps(rows, height - 1 - rows, None, height, height, Fraction(1))


def constant_rows(equation: Equation, operand: int, height: int) -> np.ndarray:
    """The row indices of a gather or scatter, [rows, 1] constants, brought into range."""
    constant = equation.operands[operand].constant
    if constant is None:
        raise NotRowLocal("rows are picked by indices")
    rows = constant.value().reshape(-1).astype(np.int64)
    if "CLIP" in str(equation.params["mode"]).upper():
        return np.clip(rows, 0, height - 1)
    if rows.size and (np.min(rows) < 0 or np.max(rows) >= height):
        raise NotRowLocal("rows are picked by indices outside the map")
    return rows
