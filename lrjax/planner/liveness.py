"""Bytes alive over a sequence of operations, as a compiler that fuses would have them.

Plain numbers. What is fused into its readers never exists as a buffer; what a library
reads or writes does.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lrjax.rules.traits import Kind

__all__ = ["GradientOf", "Kind", "Liveness", "Operation", "bytes_beside"]


@dataclasses.dataclass(frozen=True)
class GradientOf:
    """What gives the cotangent of an operation's operand, where that is not traced."""

    what: Any


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation on values.

    Attributes:
      what: the primitive, a ``GradientOf`` one, or words for what a row loop adds.
      inputs, outputs: values.
      kind: how it runs.
      like: shape and dtype of its first output.
      is_backward: it belongs to the backward pass.
      scratch: bytes that exist only while it runs.
      overwrites: an input whose place the result takes, if nobody reads it afterwards.
      flops: floating-point operations.
      seconds: of what is no single kernel: a row loop.
    """

    what: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    kind: Kind
    like: Any = None
    is_backward: bool = False
    scratch: float = 0.0
    overwrites: int | None = None
    flops: float = 0.0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Liveness:
    """When the values of a sequence of operations exist.

    Attributes:
      operations: in the order in which they run.
      size: bytes of every value; a value that is not in it takes none.
      before: values that exist when the first operation starts.
      after: values that must exist when the last one has run.
      hosts: bytes of results that have a place of their own (parameter gradients). Until they are
        made, smaller values may live there.
    """

    operations: tuple[Operation, ...]
    size: Mapping[int, float]
    before: frozenset[int] = frozenset()
    after: frozenset[int] = frozenset()
    hosts: Mapping[int, float] = dataclasses.field(default_factory=dict)
    moved: Mapping[int, float] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def maker(self) -> dict[int, int]:
        return {v: i for i, o in enumerate(self.operations) for v in o.outputs}

    @functools.cached_property
    def border(self) -> int:
        """The first operation of the backward pass."""
        marks = (i for i, o in enumerate(self.operations) if o.is_backward)
        return next(marks, len(self.operations))

    @functools.cached_property
    def existing(self) -> frozenset[int]:
        """Values that are buffers."""
        found = set(self.before | self.after)
        for operation in self.operations:
            if operation.kind is not Kind.FUSED:
                found.update(operation.outputs)
            if operation.kind is Kind.LIBRARY:
                found.update(operation.inputs)
        return frozenset(found)

    @functools.cached_property
    def sources(self) -> tuple[frozenset[int], ...]:
        """Per operation, the buffers that it reads, those of what is fused into it included."""
        behind: dict[int, frozenset[int]] = {}
        found = []
        for operation in self.operations:
            read: set[int] = set()
            for v in operation.inputs:
                read |= {v} if v in self.existing else behind.get(v, frozenset())
            own = frozenset(read)
            found.append(own)
            for v in operation.outputs:
                if v not in self.existing:
                    behind[v] = own
        return tuple(found)

    @functools.cached_property
    def last_use(self) -> dict[int, int]:
        """The last operation that runs while a value must exist."""
        end = len(self.operations)
        found: dict[int, int] = {}
        for i, operation in enumerate(self.operations):
            if self.existing.isdisjoint(operation.outputs):
                continue
            found.update((v, i) for v in operation.outputs if v in self.existing)
            found.update((v, i) for v in self.sources[i])
        found.update((v, end) for v in self.after)
        return found

    @functools.cached_property
    def timeline(self) -> list[float]:
        """Bytes alive while each operation runs."""
        count = len(self.operations)
        changes = [0.0] * (count + 2)
        for v, (first, last) in self.intervals.items():
            if v not in self.hosted:
                changes[first] += self.size[v]
                changes[last + 1] -= self.size[v]
        alive, found = 0.0, []
        for i, operation in enumerate(self.operations):
            alive += changes[i]
            found.append(alive + operation.scratch)
        return found

    @functools.cached_property
    def intervals(self) -> dict[int, tuple[int, int]]:
        """The first and the last operation while which a value takes a place."""
        return {
            v: (self.maker.get(v, 0), last - self._is_overwritten(v, last))
            for v, last in self.last_use.items()
            if self.size.get(v, 0.0)
        }

    @functools.cached_property
    def hosted(self) -> frozenset[int]:
        """Values that live where a result will be, as XLA assigns them: largest first, each to the
        smallest place that is free as long as it lives."""
        places = sorted((size, self.maker.get(v, 0), v) for v, size in self.hosts.items())
        taken: dict[int, list[tuple[int, int]]] = {}
        found: set[int] = set()
        for v in sorted(self.intervals, key=lambda v: (-self.size[v], self.intervals[v])):
            first, last = self.intervals[v]
            for size, made, place in places:
                others = taken.get(place, ())
                free = last < made and all(last < a or first > b for a, b in others)
                if self.size[v] <= size and free and v not in self.before:
                    taken.setdefault(place, []).append((first, last))
                    found.add(v)
                    break
        return frozenset(found)

    def _is_overwritten(self, value: int, last: int) -> bool:
        """The last reader puts its result into the value's own place."""
        if last >= len(self.operations) or last <= self.maker.get(value, -1):
            return False
        operation = self.operations[last]
        if operation.overwrites == value:
            return True
        fits = any(self.size.get(v, 0.0) == self.size[value] for v in operation.outputs)
        others = (v for v in self.sources[last] if v != value)
        taken = any(
            self.last_use.get(v) == last and self.size.get(v) == self.size[value] and v < value
            for v in others
        )
        return operation.kind is Kind.FUSED and fits and not taken and value not in self.after

    def alive_at(self, index: int) -> Collection[int]:
        """Values that exist before the operation ``index`` runs and are wanted by it or later."""
        return [
            v
            for v, last in self.last_use.items()
            if self.maker.get(v, -1) < index <= last and self.size.get(v, 0.0)
        ]

    def peak(self, first: int = 0, stop: int | None = None) -> float:
        return max(self.timeline[first:stop], default=0.0)


def bytes_beside(sizes: Iterable[float], hosts: Iterable[float]) -> float:
    """Bytes of values that find no place among results that are not made yet, one in each."""
    places = sorted(hosts)
    total = 0.0
    for size in sorted(sizes, reverse=True):
        place = bisect.bisect_left(places, size)
        if place < len(places):
            del places[place]
        else:
            total += size
    return total
