"""Operations that have rows and run on whole maps all the same: which, and why."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

from lrjax.rowgraph.graph import RowGraph
from lrjax.text import shortened


@dataclasses.dataclass(frozen=True)
class Fallback:
    """An operation that has rows and runs column-wise.

    Attributes:
      primitive: its name in JAX.
      made: types of what it makes, such as ``"float32[1, 64, 64, 8]"``.
      reason: why it is not local in rows.
    """

    primitive: str
    made: str
    reason: str

    def __str__(self) -> str:
        return f"{self.primitive} {self.made}: {self.reason}"


def fallbacks_of(graph: RowGraph) -> list[Fallback]:
    """Those of a graph, in order."""
    return [
        Fallback(node.equation.primitive.name, made_by(graph, node.equation), node.reason)
        for node in graph.nodes
        if node.reason is not None
    ]


def made_by(graph: RowGraph, equation: Any) -> str:
    """Types of the values that an equation makes."""
    avals = (graph.program.avals[v] for v in equation.outputs)
    return ", ".join(f"{aval.dtype.name}{list(aval.shape)}" for aval in avals)


def counted(fallbacks: Iterable[Fallback], most: int = 5, width: int = 120) -> list[str]:
    """A line for every primitive and reason, with their number; the most frequent first."""
    found = list(fallbacks)
    groups = Counter((f.primitive, f.reason) for f in found)
    lines = []
    for (primitive, reason), count in groups.most_common(most):
        alike = (f.made for f in found if (f.primitive, f.reason) == (primitive, reason))
        made = shortened(next(alike), 40)  # the reason says more than the types of many results
        which = f"{primitive} {made}" if count == 1 else f"{count} x {primitive}, as {made}"
        lines.append(shortened(f"{which}: {reason}", width))
    others = groups.total() - sum(count for _, count in groups.most_common(most))
    return [*lines, f"{others} more"] if others else lines
