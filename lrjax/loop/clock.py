"""The integers of a step: where every task's rows and windows lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lrjax.loop.rowloop import RowLoop


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
        series["window", s.node, s.operand] = loop.window_starts(s).tolist()
        if s.value in loop.producer:
            series["back", s.node, s.operand] = loop.look_back(s).tolist()
    return Clock(series)
