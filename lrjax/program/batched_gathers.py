"""Gathers at positions one of which counts an axis: ``log_probs[jnp.arange(n), labels]``.

Along such an axis every example picks from itself, as ``jnp.take_along_axis`` says it. Written so,
with a batching dimension in the place of numbers that count, a gather goes by rows where rows are,
or are among, the examples.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lrjax.program.constants import LARGEST_GIVEN
from lrjax.program.inline import (
    Atom,
    FlatEquation,
    FlatProgram,
    Literal,
    without_dead_equations,
)
from lrjax.program.varying import struct_like


def with_batched_gathers(program: FlatProgram) -> FlatProgram:
    """Batching dimensions in the place of columns of indices that count an axis."""
    if not any(equation.primitive is lax.gather_p for equation in program.equations):
        return program
    made = _Program(program)
    for equation in program.equations:
        made.add(equation)
    return without_dead_equations(
        dataclasses.replace(program, avals=tuple(made.avals), equations=tuple(made.equations))
    )


class _Program:
    """Equations as they are made."""

    def __init__(self, program: FlatProgram):
        self.avals = list(program.avals)
        self.equations: list[FlatEquation] = []
        self.aval = program.aval
        self.constants = program.constants
        self.producer = {v: e for e in program.equations for v in e.outputs}

    def add(self, equation: FlatEquation) -> None:
        if equation.primitive is lax.gather_p:
            columns = self.columns(equation.inputs[1])
            pairs = self.pairs(equation, columns)
            if pairs and len(pairs) < len(columns):
                equation = self.batched(equation, columns, pairs)
        self.equations.append(equation)

    def columns(self, indices: Atom) -> list[Atom]:
        """What the indices are joined of, one coordinate each; empty where they are made else."""
        made_by = self.made_by(indices)
        if made_by is None or made_by.primitive is not lax.concatenate_p:
            return []
        last = len(self.aval(indices).shape) - 1
        widths = {self.aval(piece).shape[-1] for piece in made_by.inputs}
        is_joined = made_by.params["dimension"] == last and widths == {1}
        return [*made_by.inputs] if is_joined else []

    def pairs(self, equation: FlatEquation, columns: list[Atom]) -> dict[int, tuple[int, int]]:
        """Of every column that counts an axis: that axis of the operand, and of the indices."""
        numbers, shape = equation.params["dimension_numbers"], self.aval(equation.inputs[0]).shape
        found: dict[int, tuple[int, int]] = {}
        for column, atom in enumerate(columns):
            axis, counted = numbers.start_index_map[column], self.counted(atom)
            if counted is None or axis not in numbers.collapsed_slice_dims:
                continue
            taken = (*numbers.start_indices_batching_dims, *(c for _, c in found.values()))
            if self.aval(atom).shape[counted] == shape[axis] and counted not in taken:
                found[column] = axis, counted
        return found

    def batched(
        self, equation: FlatEquation, columns: list[Atom], pairs: dict[int, tuple[int, int]]
    ) -> FlatEquation:
        numbers = equation.params["dimension_numbers"]
        batching = [
            *zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True),
            *pairs.values(),
        ]
        batching.sort()
        own = [a for a, _ in batching]
        changed = numbers._replace(
            collapsed_slice_dims=tuple(a for a in numbers.collapsed_slice_dims if a not in own),
            start_index_map=tuple(
                a for column, a in enumerate(numbers.start_index_map) if column not in pairs
            ),
            operand_batching_dims=tuple(own),
            start_indices_batching_dims=tuple(b for _, b in batching),
        )
        left = tuple(atom for column, atom in enumerate(columns) if column not in pairs)
        return dataclasses.replace(
            equation,
            params={**equation.params, "dimension_numbers": changed},
            inputs=(equation.inputs[0], self.joined(equation, left)),
        )

    def joined(self, equation: FlatEquation, columns: tuple[Atom, ...]) -> Atom:
        if len(columns) == 1:
            return columns[0]
        struct = self.aval(equation.inputs[1])
        self.avals.append(struct_like(struct, (*struct.shape[:-1], len(columns))))
        made, params = len(self.avals) - 1, {"dimension": len(struct.shape) - 1}
        source = equation.source
        self.equations.append(FlatEquation(lax.concatenate_p, params, columns, (made,), source))
        return made

    def made_by(self, atom: Atom) -> FlatEquation | None:
        return self.producer.get(atom) if isinstance(atom, int) else None

    def counted(self, atom: Atom) -> int | None:
        """The axis along which a value counts from zero and is alike along all others."""
        if isinstance(atom, int) and atom in self.constants:
            return _counted_in(self.constants[atom])
        equation = self.made_by(atom)
        if equation is None:
            return None
        params, primitive = equation.params, equation.primitive
        if primitive is lax.iota_p:
            return params["dimension"] if _holds(self.aval(atom)) else None
        if primitive is lax.broadcast_in_dim_p:
            (operand,) = equation.inputs[:1]
            axis = self.counted(operand)
            if axis is None:
                return None
            target = params["broadcast_dimensions"][axis]
            is_kept = self.aval(operand).shape[axis] == params["shape"][target]
            return target if is_kept else None
        if primitive is lax.convert_element_type_p and _holds(self.aval(atom)):
            return self.counted(equation.inputs[0])
        if primitive is lax.select_n_p and self.is_negative(equation.inputs[0]):
            return self.counted(equation.inputs[1])
        return None

    def is_negative(self, atom: Atom) -> bool:
        """Whether it says where a value that counts is below zero: nowhere."""
        if isinstance(atom, int) and atom in self.constants:
            known = self.constants[atom]
            return not isinstance(known, jax.core.Tracer) and not np.any(known)
        equation = self.made_by(atom)
        if equation is None or equation.primitive is not lax.lt_p:
            return False
        value, zero = equation.inputs
        is_zero = isinstance(zero, Literal) and zero.scalar is not None and bool(zero.scalar == 0)
        return is_zero and self.counted(value) is not None


def _holds(aval: Any) -> bool:
    """Whether a type is one of integers that can number all elements along an axis."""
    if not jnp.issubdtype(aval.dtype, np.integer):
        return False
    return max(aval.shape, default=0) <= int(jnp.iinfo(aval.dtype).max) + 1


def _counted_in(array: Any) -> int | None:
    """The axis along which an array that a program closes over counts."""
    if isinstance(array, jax.core.Tracer) or not jnp.issubdtype(array.dtype, np.integer):
        return None
    if not 1 < np.size(array) <= LARGEST_GIVEN:
        return None
    for axis, size in enumerate(np.shape(array)):
        along = [size if a == axis else 1 for a in range(np.ndim(array))]
        if size > 1 and np.all(np.asarray(array) == np.arange(size).reshape(along)):
            return axis
    return None
