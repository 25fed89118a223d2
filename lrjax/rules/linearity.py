"""How the results of one operation depend on its operands, as far as addition goes.

A rule states it as a ``Linearity``, made here: ``additive_in``, ``product``, ... ``dependence``
walks a program with them and proves which of its values are additive, ``f(a + b) = f(a) + f(b)``,
in some of its inputs.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lrjax.program.inline import FlatEquation


class Dependence(enum.Enum):
    """How a value depends on the inputs in question."""

    ZERO = "zero whatever they are"
    FIXED = "the same whatever they are"
    ADDITIVE = "additive"
    UNKNOWN = "not proved additive"


ZERO, FIXED, ADDITIVE, UNKNOWN = Dependence

# From an equation and the dependences of its operands to those of its results.
Linearity = Callable[[FlatEquation, Sequence[Dependence]], list[Dependence]]


def not_additive(equation: FlatEquation, given: Sequence[Dependence]) -> list[Dependence]:
    """Any operation: nothing is known of it but that it gives the same for the same operands."""
    is_fixed = all(dependence in (FIXED, ZERO) for dependence in given)
    return [FIXED if is_fixed else UNKNOWN] * len(equation.outputs)


def additive_in(*operands: int) -> Linearity:
    """Additive in the operands of these positions together, for fixed values of all others."""

    def linearity(equation: FlatEquation, given: Sequence[Dependence]) -> list[Dependence]:
        others = [dependence for i, dependence in enumerate(given) if i not in operands]
        found = of_sum([given[i] for i in operands], others)
        return [found] * len(equation.outputs)

    return linearity


def additive_in_all(equation: FlatEquation, given: Sequence[Dependence]) -> list[Dependence]:
    """Additive in all operands together, however many there are."""
    return [of_sum(given, ())] * len(equation.outputs)


def choice(equation: FlatEquation, given: Sequence[Dependence]) -> list[Dependence]:
    """Elements of the others, chosen by the first operand."""
    return [of_sum(given[1:], given[:1])]


def product(equation: FlatEquation, given: Sequence[Dependence]) -> list[Dependence]:
    """Additive in either operand for a fixed other."""
    return [_of_product(given)]


def conversion(equation: FlatEquation, given: Sequence[Dependence]) -> list[Dependence]:
    """To another type: additive, but for rounding, unless that is to integers or to a float8."""
    dtype = equation.params["new_dtype"]
    if not jnp.issubdtype(dtype, np.inexact) or is_coarse(dtype):
        return not_additive(equation, given)
    return [of_sum(given, ())]


def reduces_precision(params: Mapping[str, Any], dtype: Any) -> bool:
    """Whether a ``reduce_precision`` rounds values of a type at all."""
    found = jnp.finfo(dtype)
    return params["mantissa_bits"] < found.nmant or params["exponent_bits"] < found.nexp


def is_coarse(dtype: Any) -> bool:
    """A floating type of fewer bits than a half: its rounding is no small error."""
    return jnp.issubdtype(dtype, np.inexact) and jnp.finfo(dtype).bits < 16


def of_sum(terms: Sequence[Dependence], others: Sequence[Dependence]) -> Dependence:
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
