"""Comparisons of a value with what it was made of: masks of ReLUs, positions of maxima."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as public

from lrjax.program.inline import Atom, FlatEquation, FlatProgram, Literal, without_dead_equations
from lrjax.program.manual_axes import MOVES

_COMPARE = (lax.eq_p, lax.ne_p, lax.ge_p, lax.gt_p, lax.le_p, lax.lt_p)
_EXTREMES = (lax.reduce_max_p, lax.reduce_min_p)
# What such operations give is, element for element, what they take.
_MOVES = (*MOVES, lax.optimization_barrier_p, public.name_p)
# Nor do these give anything but what they take, one or another.
_CHOICES = (*_MOVES, lax.max_p, lax.min_p, lax.clamp_p, lax.select_n_p, lax.concatenate_p)
# What they give for two equal numbers, and what jumps there without being asked for a number.
_EQUAL = {lax.sub_p: 0, lax.div_p: 1}
_JUMPS = (lax.sign_p, lax.floor_p, lax.ceil_p)


def is_comparison(equation: FlatEquation) -> bool:
    return equation.primitive in _COMPARE


def compared_extremes(program: FlatProgram) -> frozenset[int]:
    """Results of ``reduce_max`` and ``reduce_min`` that are compared, and moved forms of them.

    ``x - max >= 0`` and ``x / max >= 1`` compare too, and so do ``max(max, 0.1)`` and the like.

    Such a result must come from the very numbers it is compared with: if either were computed
    again in another program, rounded otherwise, no element might equal the maximum.
    """
    taken: dict[int, frozenset[int]] = {}  # the extremes whose number a value may be
    gaps: dict[int, tuple[frozenset[int], int]] = {}  # and less or by another: what equals then
    compared: set[int] = set()
    for equation in program.equations:
        primitive, inputs = equation.primitive, equation.values
        origins = frozenset[int]().union(*(taken.get(v, ()) for v in inputs))
        if primitive in _EXTREMES:
            taken.update((v, origins | {v}) for v in equation.outputs)
        elif primitive in _CHOICES:
            taken.update((v, origins) for v in equation.outputs)
            for gap in (gaps[v] for v in inputs if v in gaps):
                gaps.update((v, gap) for v in equation.outputs)
        elif primitive in _EQUAL and origins:
            gaps[equation.outputs[0]] = origins, _EQUAL[primitive]
        elif is_comparison(equation):
            met = [gaps[v] for v in inputs if v in gaps]
            equal = [of for of, number in met if _has_scalar(equation, number)]
            compared |= origins.union(*equal)
        elif primitive in _JUMPS:
            compared.update(*(gaps[v][0] for v in inputs if v in gaps))
    return frozenset(v for v, origins in taken.items() if origins & compared)


def simpler_comparisons(program: FlatProgram) -> FlatProgram:
    """Comparisons that need fewer values, or values that one program makes.

    ``x > 0`` -> ``max(x, 0) > 0`` where ``max(x, 0)`` is computed anyway. Rows of the ReLU's output
    are kept for the weight gradients in any case; the mask, or its input, then need not be (185 of
    578 MiB of line buffers in VGG-16 at 4096x4096).

    ``x == max(x, y)`` -> ``x >= y``, as JAX's derivatives of maxima ask; see ``extremes``.

    All are equal for every number, NaN included.
    """
    rectified: dict[int, int] = {}
    extremes: dict[int, FlatEquation] = {}
    equations = []
    for equation in program.equations:
        inputs = equation.inputs
        if equation.primitive in _WINS and not _is_complex(program.aval(equation.outputs[0])):
            extremes[equation.outputs[0]] = equation
            is_relu = equation.primitive is lax.max_p and _is_zero(inputs[1])
            if is_relu and isinstance(inputs[0], int):
                rectified.setdefault(inputs[0], equation.outputs[0])
        elif equation.primitive is lax.gt_p and _is_zero(inputs[1]) and inputs[0] in rectified:
            operands = (rectified[inputs[0]], inputs[1])
            equation = dataclasses.replace(equation, inputs=operands)
        elif equation.primitive is lax.eq_p:
            equation = _of_operands(equation, extremes)
        equations.append(equation)
    return without_dead_equations(dataclasses.replace(program, equations=tuple(equations)))


_WINS = {lax.max_p: lax.ge_p, lax.min_p: lax.le_p}


def _of_operands(equation: FlatEquation, extremes: dict[int, FlatEquation]) -> FlatEquation:
    for one, result in (equation.inputs, equation.inputs[::-1]):
        made = extremes.get(result) if isinstance(result, int) else None
        if made is None:
            continue
        for operand, other in (made.inputs, made.inputs[::-1]):
            if _is_same(one, operand):
                wins = _WINS[made.primitive]
                return dataclasses.replace(equation, primitive=wins, inputs=(one, other))
    return equation


def _is_same(first: Atom, second: Atom) -> bool:
    if isinstance(first, int) or isinstance(second, int):
        return isinstance(first, int) and isinstance(second, int) and first == second
    return first.scalar is not None and bool(first.scalar == second.scalar)


def _is_complex(aval: Any) -> bool:
    """Whether ``ge`` does not take it."""
    return jnp.issubdtype(aval.dtype, jnp.complexfloating)


def _is_zero(atom: Atom) -> bool:
    return _is_scalar(atom, 0)


def _has_scalar(equation: FlatEquation, number: int) -> bool:
    return any(_is_scalar(atom, number) for atom in equation.inputs)


def _is_scalar(atom: Atom, number: int) -> bool:
    return isinstance(atom, Literal) and atom.scalar is not None and bool(atom.scalar == number)
