"""Which values of a program are additive functions of some of its inputs.

2PS and OverL run the backward rule of a custom derivative on the cotangents of one block at a
time, and rows that several blocks read get their cotangents in parts. That is exact only where the
rule is additive, ``f(a + b) = f(a) + f(b)``. Nothing obliges a ``custom_vjp`` to be (gradient
clipping is not), so it is proved here, by walking the program once; what is not in the tables is
not additive.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lrjax.program.compatibility import open_jaxpr
from lrjax.program.inline import Atom, FlatEquation, FlatProgram, Literal, flatten


class Dependence(enum.Enum):
    """How a value depends on the inputs in question."""

    ZERO = "zero whatever they are"
    FIXED = "the same whatever they are"
    ADDITIVE = "additive"
    UNKNOWN = "not proved additive"


ZERO, FIXED, ADDITIVE, UNKNOWN = Dependence

# Additive in the operands of these positions together, for fixed values of all others.
_MOVES = dict.fromkeys(
    (
        "broadcast_in_dim", "conj", "convert_element_type", "copy", "copy_p", "cumsum",
        "dynamic_slice", "expand_dims", "fft", "gather", "imag", "mesh_cast", "name", "neg",
        "optimization_barrier", "pcast", "pvary", "real", "reduce_sum",
        "reduce_window_sum", "reshape", "rev", "select_and_gather_add", "select_and_scatter_add",
        "sharding_constraint", "slice", "split", "squeeze", "tile", "transpose", "unstack",
    ),
    (0,),
)  # fmt: skip
_SUMS = {
    "add": (0, 1),
    "add_any": (0, 1),
    "complex": (0, 1),
    "dynamic_update_slice": (0, 1),
    "pad": (0, 1),
    "scatter-add": (0, 2),
    "sub": (0, 1),
}
_SUMS_OF_ALL = ("concatenate", "stack")
_PRODUCTS = ("conv_general_dilated", "dot_general", "mul")


def dependences(program: FlatProgram, inputs: Collection[int]) -> dict[int, Dependence]:
    """How every value of a program depends on the ``inputs`` (values of it) together."""
    found = {v: ADDITIVE if v in inputs else FIXED for v in program.inputs}
    found.update(dict.fromkeys(program.constants, FIXED))
    for equation in program.equations:
        given = [_of(found, atom) for atom in equation.inputs]
        found.update(zip(equation.outputs, _of_results(equation, given), strict=True))
    return found


def output_dependences(program: FlatProgram, inputs: Collection[int]) -> list[Dependence]:
    """How the outputs depend on the ``inputs``."""
    found = dependences(program, inputs)
    return [_of(found, atom) for atom in program.outputs]


def has_custom_vjp(program: FlatProgram) -> bool:
    """Whether there is a ``custom_vjp`` in a program, bodies of its equations included."""
    return any(_holds_custom_vjp(e.primitive, e.params) for e in program.equations)


def _holds_custom_vjp(primitive: Any, params: Mapping[str, Any]) -> bool:
    if primitive.name.startswith("custom_vjp"):
        return True
    values = itertools.chain.from_iterable(
        value if isinstance(value, tuple | list) else [value] for value in params.values()
    )
    bodies = (
        open_jaxpr(value)[0]
        for value in values
        if hasattr(value, "eqns") or hasattr(value, "jaxpr")
    )
    return any(_holds_custom_vjp(eqn.primitive, eqn.params) for body in bodies for eqn in body.eqns)


def _of(found: dict[int, Dependence], atom: Atom) -> Dependence:
    if isinstance(atom, Literal):
        return ZERO if np.ndim(atom.value) == 0 and atom.value == 0 else FIXED
    return found[atom]


def _of_results(equation: FlatEquation, given: Sequence[Dependence]) -> list[Dependence]:
    name, count = equation.primitive.name, len(equation.outputs)
    if name == "cond":
        return _of_branches(equation, given)
    if name == "convert_element_type" and not _is_inexact(equation.params["new_dtype"]):
        return [FIXED if given[0] in (FIXED, ZERO) else UNKNOWN]
    if name in _PRODUCTS:
        return [_of_product(given)]
    if name == "div":
        return [given[0] if given[1] in (FIXED, ZERO) else UNKNOWN]
    if name == "select_n":
        return [_of_sum(given[1:], given[:1])]
    if name in _SUMS_OF_ALL:
        return [_of_sum(given, ())]
    summed = _SUMS.get(name) or _MOVES.get(name)
    if summed is not None:
        others = [d for i, d in enumerate(given) if i not in summed]
        return [_of_sum([given[i] for i in summed], others)] * count
    is_fixed = all(dependence in (FIXED, ZERO) for dependence in given)
    return [FIXED if is_fixed else UNKNOWN] * count


def _of_sum(terms: Sequence[Dependence], others: Sequence[Dependence]) -> Dependence:
    """Of a function that is additive in ``terms`` together."""
    if UNKNOWN in terms or any(other not in (FIXED, ZERO) for other in others):
        return UNKNOWN
    if ADDITIVE not in terms:
        return FIXED if FIXED in terms else ZERO
    return UNKNOWN if FIXED in terms else ADDITIVE


def _of_product(factors: Sequence[Dependence]) -> Dependence:
    if ZERO in factors:
        return ZERO
    if UNKNOWN in factors or factors.count(ADDITIVE) > 1:
        return UNKNOWN
    return ADDITIVE if ADDITIVE in factors else FIXED


def _is_inexact(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, np.inexact))


def _of_branches(equation: FlatEquation, given: Sequence[Dependence]) -> list[Dependence]:
    index, *operands = given
    count = len(equation.outputs)
    if index not in (FIXED, ZERO) or UNKNOWN in operands:
        return [UNKNOWN] * count
    per_branch = []
    for branch in equation.params["branches"]:
        program = flatten(branch)
        moving = [v for v, d in zip(program.inputs, operands, strict=True) if d is ADDITIVE]
        per_branch.append(output_dependences(program, moving))
    return [_of_sum(choices, ()) for choices in zip(*per_branch, strict=True)]
