"""The integers of a step: where every task's rows and windows lie."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from lrjax.loop.rowloop import RowLoop
from lrjax.rules.masks import rows_inside


class Clock:
    """Integers that depend on the step, by name: constants stay Python integers.

    Call ``table()`` for the scanned rows and ``at(row)`` inside the loop. What is made of a number
    is made once in a step. Names do not share columns, though many of them advance alike: XLA then
    merges fusions that read the same numbers, whose results wait for each other (U-Net at 4096x4096
    in 128 blocks: 1,716 MiB for 1,693).
    """

    def __init__(self, series: Mapping[Any, Sequence[int]], device: jax.Array | None = None):
        self.series = series
        self.device = device  # its number among those that share the rows, if several do
        varying = {name: tuple(v) for name, v in series.items() if len(set(v)) > 1}
        number = {values: i for i, values in enumerate(dict.fromkeys(varying.values()))}
        self.column = {name: number[values] for name, values in varying.items()}
        self.row: jax.Array | None = None
        self.known: dict[Any, jax.Array] = {}
        self.is_alone = False

    def table(self) -> np.ndarray:
        steps = len(next(iter(self.series.values())))
        columns = [*dict.fromkeys(tuple(self.series[name]) for name in self.column)]
        return np.array(columns, np.int32).reshape(len(columns), steps).T

    def at(self, row: Any) -> Clock:
        """The clock in one step."""
        clock = copy.copy(self)
        clock.row, clock.known = row, {}
        return clock

    def of_steps(self, first: int, stop: int) -> Clock:
        """The clock of some of the steps, counted as before."""
        return Clock({n: values[first:stop] for n, values in self.series.items()}, self.device)

    def alone(self, step: int) -> Clock:
        """The clock of a step that is a program of its own: all numbers are constants."""
        clock = self.of_steps(step, step + 1)
        clock.is_alone = True
        return clock

    def afresh(self) -> Clock:
        """This step's clock for a function of its own (a branch, or what is differentiated).

        What is made of the row within such a function does not exist outside.
        """
        return self.at(self.row)

    def __getitem__(self, name: Any) -> Any:
        column = self.column.get(name)
        if column is None:
            return int(self.series[name][0])
        if column not in self.known:
            assert self.row is not None
            self.known[column] = lax.index_in_dim(self.row, column, keepdims=False)
        return self.known[column]

    def bounds(self, name: Any) -> tuple[int, int]:
        values = self.series[name]
        return min(values), max(values)

    def in_image(self, name: Any, share: int) -> Any:
        """The row named, counted from the image's first row.

        Where devices own shares of the rows, each counts from its own first row.
        """
        return self[name] if self.device is None else self[name] + self.device * share

    def row_of_image(self, row: int, share: int) -> Any:
        """A device's row, in a step of its own, counted from the image's first."""
        return row if self.device is None else row + self.device * share

    def inside(self, name: Any, count: int, low: Any, high: Any, share: int = 0) -> jax.Array:
        """Which of ``count`` rows, the first of them named, are in ``[low, high)``.

        The bounds are numbers, or names of such. With a ``share``, they are rows of the image.
        """
        keys = [self.key(x) if isinstance(x, tuple) else x for x in (low, high)]
        own = self.key(name), count, *keys, *(() if self.device is None else (share,))
        if own not in self.known:
            bounds = [self[x] if isinstance(x, tuple) else x for x in (low, high)]
            self.known[own] = rows_inside(self.in_image(name, share), count, *bounds)
        return self.known[own]

    def key(self, name: Any) -> tuple[int | None, int]:
        """Equal for equal series."""
        return self.column.get(name), int(self.series[name][0])


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
        series["window", s.node, s.operand] = loop.window_starts(s).tolist()
        if s.value in loop.producer:
            series["back", s.node, s.operand] = loop.look_back(s).tolist()
    return Clock(series, None if loop.shards is None else loop.shards.index())
