"""Where a program may be cut: behind operations that cost something, where few maps cross."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from lrjax.program.inline import FlatEquation
from lrjax.rowgraph.graph import build, size_bytes
from lrjax.rowgraph.segments import Cuttable
from lrjax.rules.windows import POOLINGS

# Segments of whole maps begin and end at any of so many places; those that run by rows, which take
# long to trace, at a few of them: as many as keep the operations of all such segments below a sum.
MOST_CUTS = 18
_MOST_ROW_CUTS, _FEWEST_ROW_CUTS = 6, 3
_MOST_TRACED = 10_000


class Places:
    """Positions among a program's operations on rows.

    Attributes:
      bounds: positions where it may be cut, from 0 to all operations.
      row_bounds: numbers of those where segments that run by rows may begin or end.
      made_at, last_use: of maps that are read: the operation that makes them, and the last to read.
    """

    def __init__(self, whole: Cuttable, axes: Sequence[int | None]):
        self.whole = whole
        self.flops = {
            node.equation.outputs[0]: node.op.flops * node.op.height
            for node in build(whole.program, axes).nodes
            if node.op is not None
        }
        self.made = [self._made_bytes(e) for e in whole.operations]
        count = len(whole.operations)
        self.last_use = {v: count for v in whole.program.outputs if isinstance(v, int)}
        for i, equation in enumerate(whole.operations):
            self.last_use.update((v, max(i, self.last_use.get(v, 0))) for v in values_of(equation))
        self.made_at = {
            v: i
            for i, equation in enumerate(whole.operations)
            for v in equation.outputs
            if v in whole.row_axis and self.last_use.get(v, i) > i
        }
        narrow = self._fewest_missed(self._narrowest(self._narrow(), MOST_CUTS), MOST_CUTS)
        most = _MOST_ROW_CUTS
        # All segments between k cuts have (k + 2)(k + 3) / 6 times the program's operations.
        while most > _FEWEST_ROW_CUTS and count * (most + 2) * (most + 3) > 6 * _MOST_TRACED:
            most -= 1
        self.bounds = (0, *narrow, count)
        by_rows = {0, count, *self._fewest_missed(narrow, most)}
        self.row_bounds = [k for k, bound in enumerate(self.bounds) if bound in by_rows]

    def _made_bytes(self, equation: FlatEquation) -> float:
        avals = self.whole.program.avals
        return sum(size_bytes(avals[v]) for v in equation.outputs if v in self.whole.row_axis)

    def _narrow(self) -> list[int]:
        """Before operations that cost something; not where more crosses than at a neighbour."""
        places = [i for i, e in enumerate(self.whole.operations) if self._weight(e) > 0][1:]
        return self._minima(places)

    def _narrowest(self, places: list[int], most: int) -> list[int]:
        """Without those where more crosses than at a neighbour, again, while they are too many.

        Within a residual block the shortcut crosses, too: cut there, it is kept for nothing.
        """
        while len(places) > most:
            fewer = self._minima(places)
            if len(fewer) == len(places):
                break
            places = fewer
        return places

    def _minima(self, places: list[int]) -> list[int]:
        """Places with no more bytes, or no more maps, than at either neighbour."""
        measures = self.crossing
        return [
            p
            for k, p in enumerate(places)
            if any(
                measure[p] <= measure[places[max(k - 1, 0)]]
                and measure[p] <= measure[places[min(k + 1, len(places) - 1)]]
                for measure in measures
            )
        ]

    def _weight(self, equation: FlatEquation) -> float:
        """Operations of convolutions and the like, and of windows; 0 for what is elementwise."""
        flops = self.flops.get(equation.outputs[0], 0.0)
        if equation.primitive in POOLINGS:
            return max(flops, 1.0)
        size = max(math.prod(self.whole.program.avals[v].shape) for v in equation.outputs)
        return flops if flops > 4 * size else 0.0

    @functools.cached_property
    def crossing(self) -> tuple[list[int], list[int]]:
        """Bytes and number of the row maps that cross before every operation."""
        avals, operations = self.whole.program.avals, self.whole.operations
        steps = np.zeros((2, len(operations) + 2), np.int64)
        for v, made in self.made_at.items():
            change = size_bytes(avals[v]), 1
            steps[:, made + 1] += change
            steps[:, self.last_use[v] + 1] -= change
        width, count = np.cumsum(steps, axis=1)[:, : len(operations)].tolist()
        return width, count

    def _fewest_missed(self, places: Sequence[int], most: int) -> list[int]:
        """So many of the places; between their neighbours the least is computed and made."""
        operations = self.whole.operations
        flops = [self.flops.get(e.outputs[0], 0.0) for e in operations]
        per_flop, per_byte = 1 / max(sum(flops), 1.0), 1 / max(sum(self.made), 1.0)
        both = zip(flops, self.made, strict=True)
        work = np.cumsum([0.0, *(f * per_flop + b * per_byte for f, b in both)])
        left = list(places)
        while len(left) > most:
            bounds = [0, *left, len(operations)]
            between = {p: work[bounds[k + 2]] - work[bounds[k]] for k, p in enumerate(left)}
            left.remove(min(left, key=between.__getitem__))
        return left


def values_of(equation: FlatEquation) -> list[int]:
    """Values that an equation reads."""
    return [v for v in equation.inputs if isinstance(v, int)]
