"""Collective operations of a compiled program: what devices exchange, and whether in every step."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from lrjax.memory.assignment import Assignment, Instruction, Shape

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
      name: XLA's name of the operation.
      kind: such as ``"all-reduce"``; one of ``KINDS``.
      bytes: of its results on one device.
      is_in_loop: it runs in every step of a loop.
    """

    name: str
    kind: str
    bytes: int
    is_in_loop: bool


def collectives(assignment: Assignment) -> tuple[Collective, ...]:
    """All exchanges of a program, those that run once first."""
    in_loops = _in_loops(assignment)
    found = [
        Collective(
            instruction.name,
            kind,
            _result_bytes(instruction, kind),
            computation.id in in_loops,
        )
        for computation in assignment.computations.values()
        for instruction in (assignment.instructions[i] for i in computation.instructions)
        if (kind := _kind(instruction)) is not None
    ]
    return tuple(sorted(found, key=lambda one: (one.is_in_loop, one.kind, one.name)))


def _kind(instruction: Instruction) -> str | None:
    """Of one that starts in one place and is done in another, the start counts."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _result_bytes(instruction: Instruction, kind: str) -> int:
    shape = instruction.shape
    if instruction.opcode == f"{kind}-start" and kind in ("all-gather", "collective-permute"):
        shape = shape.at((1,))  # operands, results, and what the runtime needs in between
    return _bytes(shape)


def _bytes(shape: Shape) -> int:
    if shape.elements:
        return sum(map(_bytes, shape.elements))
    return math.prod(shape.dimensions) * _item_bytes(shape.dtype)


def _item_bytes(dtype: str) -> int:
    try:
        return jnp.dtype(dtype).itemsize
    except TypeError:
        return 0  # tokens and the like


def _in_loops(assignment: Assignment) -> set[int]:
    """Computations that run in every step of a loop."""
    waiting = [
        callee
        for instruction in assignment.instructions.values()
        if instruction.opcode == "while"
        for callee in instruction.called
    ]
    found: set[int] = set()
    while waiting:
        number = waiting.pop()
        if number not in found:
            found.add(number)
            members = assignment.computations[number].instructions
            waiting += [c for i in members for c in assignment.instructions[i].called]
    return found
