"""When every piece of memory of a compiled program is in use, from XLA's simulation of its heaps.

Values that share memory (the state of a loop, operations in place) are one piece: it is in use from
its first value's birth to its last value's death.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

from lrjax.memory.assignment import HOST_COLOR, Allocation, Assignment, Event, Instruction
from lrjax.memory.wire import DecodeError


@dataclasses.dataclass(frozen=True)
class Piece:
    """Memory in use from step ``start`` to step ``end``, inclusive.

    Attributes:
      values: ids of the values in it, in the order of their birth.
      bytes: its size.
      start: the first step of the schedule.
      end: the last one.
      allocation: for arguments, constants and outputs, which have memory of their own throughout.
    """

    values: tuple[int, ...]
    bytes: int
    start: int
    end: int
    allocation: Allocation | None = None


def pieces(assignment: Assignment, steps: Sequence[Instruction]) -> list[Piece]:
    """Everything that counts towards XLA's peak.

    A TPU has several memories; XLA's peak is that of the fullest, which is the main one in any
    program that is large for its device. What is in the host's memory does not count.

    Raises:
      DecodeError: there are temporaries, but no simulation of the heap.
    """
    last = len(steps) - 1
    whole = [
        Piece(tuple(v for v, _, _ in a.assigned), a.bytes, 0, last, a)
        for a in assignment.allocations
        if a.is_parameter or a.is_constant or a.is_output
    ]
    if not assignment.traces:
        if any(a.is_temporary and a.bytes for a in assignment.allocations):
            raise DecodeError("the buffer assignment has no simulation of its heap")
        return whole
    heaps = [
        _replay(assignment, trace, steps)
        for trace in assignment.traces
        if not any(assignment.values[event.value].color == HOST_COLOR for event in trace)
    ]
    return whole + max(heaps, key=lambda heap: max(usage(heap, len(steps)), default=0), default=[])


class _Lifetime(Protocol):
    """Bytes that are in use from a step to another, inclusive."""

    @property
    def bytes(self) -> int: ...

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...


def usage(found: Iterable[_Lifetime], steps: int) -> list[int]:
    """Bytes in use in every step."""
    changes = [0] * (steps + 1)
    for one in found:
        changes[one.start] += one.bytes
        changes[one.end + 1] -= one.bytes
    return list(itertools.accumulate(changes[:-1]))


@dataclasses.dataclass
class _Open:
    values: list[int]
    start: int
    users: int


def _replay(
    assignment: Assignment, trace: Sequence[Event], steps: Sequence[Instruction]
) -> list[Piece]:
    """Follow the events of one heap.

    Events name the instruction that made the value, also when the value dies. So the time of a
    death is known to lie between two births; within that, it is the last direct use.
    """
    step_of = {instruction.id: i for i, instruction in enumerate(steps)}
    last_use = {operand: i for i, step in enumerate(steps) for operand in step.operands}
    times = _birth_times(trace, step_of)
    next_birth = _following(times, len(steps))
    canonical: dict[int, int] = {}
    open_pieces: dict[int, _Open] = {}
    # A TPU's trace may have the death of a value before its birth, both in one moment.
    early_deaths: Counter[int] = Counter()
    done = []
    for i, event in enumerate(trace):
        now = times[i]
        if event.kind == "free":
            owner = canonical[event.value]
            if owner not in open_pieces:
                early_deaths[owner] += 1
                continue
            piece = open_pieces[owner]
            piece.users -= 1
            if piece.users == 0:
                used = max(last_use.get(assignment.values[v].instruction, 0) for v in piece.values)
                end = min(max(used, now), next_birth[i] - 1)
                size = assignment.values[owner].bytes
                done.append(Piece(tuple(piece.values), size, piece.start, end))
                del open_pieces[owner]
            continue
        shared = canonical.get(event.shared_with, event.shared_with)
        owner = event.value if event.kind == "alloc" else shared
        canonical[event.value] = owner
        if early_deaths[owner]:
            early_deaths[owner] -= 1
            continue
        piece = open_pieces.setdefault(owner, _Open([], now, 0))
        piece.values.append(event.value)
        piece.users += 1
    for owner, piece in open_pieces.items():
        size = assignment.values[owner].bytes
        done.append(Piece(tuple(piece.values), size, piece.start, len(steps) - 1))
    return done


def _birth_times(trace: Sequence[Event], step_of: dict[int, int]) -> list[int]:
    """The step of every event; a death takes that of the birth before it."""
    times, now = [], 0
    for event in trace:
        if event.kind != "free":
            now = max(now, step_of.get(event.instruction, now))
        times.append(now)
    return times


def _following(times: Sequence[int], end: int) -> list[int]:
    """For every event, the step of the first event that is later than it."""
    following = [end] * len(times)
    for i in range(len(times) - 2, -1, -1):
        following[i] = times[i + 1] if times[i + 1] > times[i] else following[i + 1]
    return following
