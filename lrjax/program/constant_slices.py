"""Slices at positions that are known: ``lax.dynamic_slice`` with numbers of Python's, say.

A slice whose position is known only at run time takes its operand whole. Where no input changes the
position, what is taken or written are rows like any others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax import lax

from lrjax.program.constants import Constants
from lrjax.program.inline import Atom, FlatEquation, FlatProgram
from lrjax.program.varying import struct_like

Shape = tuple[int, ...]


def with_constant_slices(program: FlatProgram) -> FlatProgram:
    """Slices, and concatenations along one axis, in the place of dynamic ones of known position."""
    made = _Program(program)
    for equation in program.equations:
        made.add(equation)
    return dataclasses.replace(program, avals=tuple(made.avals), equations=tuple(made.equations))


class _Program:
    """Equations as they are made."""

    def __init__(self, program: FlatProgram):
        self.avals = list(program.avals)
        self.equations: list[FlatEquation] = []
        self.aval = program.aval
        self.constants = Constants(program)

    def add(self, equation: FlatEquation) -> None:
        if equation.primitive is lax.dynamic_slice_p:
            sizes, atoms = equation.params["slice_sizes"], equation.inputs[1:]
            start = self.start(equation, sizes, atoms)
            if start is not None:
                self.add_slice(equation, start, sizes, equation.outputs[0])
                return
        if equation.primitive is lax.dynamic_update_slice_p:
            sizes, atoms = self.aval(equation.inputs[1]).shape, equation.inputs[2:]
            start = self.start(equation, sizes, atoms)
            if start is not None and self.is_along_one_axis(equation, sizes):
                self.add_update(equation, start, sizes)
                return
        self.equations.append(equation)

    def start(self, equation: FlatEquation, sizes: Shape, atoms: Sequence[Atom]) -> Shape | None:
        """The position within the operand, if no input changes it."""
        found = [self.constants.of(atom) for atom in atoms]
        numbers = [int(np.asarray(one.value())) for one in found if one is not None]
        if not atoms or len(numbers) < len(atoms):
            return None
        shape = self.aval(equation.inputs[0]).shape
        return tuple(
            min(max(number, 0), whole - size)
            for number, whole, size in zip(numbers, shape, sizes, strict=True)
        )

    def is_along_one_axis(self, equation: FlatEquation, sizes: Shape) -> bool:
        """Whether an update leaves its operand's elements alone along at most one axis."""
        shape = self.aval(equation.inputs[0]).shape
        return sum(size != whole for size, whole in zip(sizes, shape, strict=True)) <= 1

    def add_slice(self, equation: FlatEquation, start: Shape, sizes: Shape, output: int) -> None:
        limits = tuple(low + size for low, size in zip(start, sizes, strict=True))
        params = {"start_indices": start, "limit_indices": limits, "strides": None}
        self.equations.append(
            dataclasses.replace(
                equation,
                primitive=lax.slice_p,
                params=params,
                inputs=equation.inputs[:1],
                outputs=(output,),
            )
        )

    def add_update(self, equation: FlatEquation, start: Shape, sizes: Shape) -> None:
        operand, update = equation.inputs[:2]
        shape = self.aval(operand).shape
        axis = next((a for a, size in enumerate(sizes) if size != shape[a]), 0)
        before = self.part(equation, axis, 0, start[axis])
        behind = self.part(equation, axis, start[axis] + sizes[axis], shape[axis])
        self.equations.append(
            dataclasses.replace(
                equation,
                primitive=lax.concatenate_p,
                params={"dimension": axis},
                inputs=(*before, update, *behind),
            )
        )

    def part(self, equation: FlatEquation, axis: int, low: int, high: int) -> tuple[Atom, ...]:
        """The first operand between two places on an axis; nothing where that is empty."""
        if low == high:
            return ()
        struct = self.aval(equation.inputs[0])
        sizes = tuple(high - low if a == axis else n for a, n in enumerate(struct.shape))
        place = tuple(low if a == axis else 0 for a in range(len(sizes)))
        self.avals.append(struct_like(struct, sizes))
        self.add_slice(equation, place, sizes, len(self.avals) - 1)
        return (len(self.avals) - 1,)
