"""Which values of a program are additive functions of some of its inputs.

2PS and OverL run the backward rule of a custom derivative on the cotangents of one block at a
time, and rows that several blocks read get their cotangents in parts. That is exact only where the
rule is additive, ``f(a + b) = f(a) + f(b)``. Nothing obliges a ``custom_vjp`` to be (gradient
clipping is not), so it is proved here, by walking the program once with the ``linearity`` that the
rule of every primitive states; what states none is not additive.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from jax import lax
from jax.extend.core import primitives as public

from lrjax.program.compatibility import open_jaxpr
from lrjax.program.inline import Atom, FlatEquation, FlatProgram, Literal
from lrjax.rules.base import traits_of
from lrjax.rules.linearity import (
    ADDITIVE,
    FIXED,
    ZERO,
    Dependence,
    is_coarse,
    reduces_precision,
)


def dependences(program: FlatProgram, inputs: Collection[int]) -> dict[int, Dependence]:
    """How every value of a program depends on the ``inputs`` (values of it) together."""
    found = {v: ADDITIVE if v in inputs else FIXED for v in program.inputs}
    found.update(dict.fromkeys(program.constants, FIXED))
    for equation in program.equations:
        given = [_of(found, atom) for atom in equation.inputs]
        made = traits_of(equation.primitive).linearity(equation, given)
        found.update(zip(equation.outputs, made, strict=True))
    return found


def output_dependences(program: FlatProgram, inputs: Collection[int]) -> list[Dependence]:
    """How the outputs depend on the ``inputs``."""
    found = dependences(program, inputs)
    return [_of(found, atom) for atom in program.outputs]


def has_custom_vjp(program: FlatProgram) -> bool:
    """Whether there is a ``custom_vjp`` in a program, bodies of its equations included."""
    return any(_holds_custom_vjp(e.primitive, e.params) for e in program.equations)


def needs_whole_cotangent(program: FlatProgram, equation: FlatEquation) -> bool:
    """Whether an operation on whole arrays must not be differentiated for parts of a cotangent.

    The rule of a ``custom_vjp`` may do anything with what it gets (clip it, take its sign), and
    what rounds coarsely rounds the sum to something else than its terms.
    """
    if equation.primitive is lax.reduce_precision_p:
        return reduces_precision(equation.params, program.avals[equation.outputs[0]].dtype)
    if equation.primitive is lax.convert_element_type_p:
        atoms = (*equation.inputs, *equation.outputs)
        return any(is_coarse(program.aval(v).dtype) for v in atoms)
    return _holds_custom_vjp(equation.primitive, equation.params)


def _holds_custom_vjp(primitive: Any, params: Mapping[str, Any]) -> bool:
    if primitive is public.custom_vjp_call_p:
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
