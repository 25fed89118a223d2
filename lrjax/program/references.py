"""Mutable arrays (``jax.new_ref``): what is read of one depends on what was written before.

Their operations have effects and run in the order of the program, on whole values.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lrjax.program.compatibility import primitives

NEW, GET, SWAP, ADD_UPDATE, _FREEZE = primitives("new_ref", "get", "swap", "addupdate", "freeze")


def uses_references(equations: Iterable[Any]) -> bool:
    """Whether some of the equations make, read or write a mutable array."""
    return any(equation.primitive in (NEW, GET, SWAP, _FREEZE) for equation in equations)


def reads_from_outside(equations: Iterable[Any]) -> bool:
    """Whether they read or write a mutable array that none of them makes."""
    made: set[Any] = set()
    for equation in equations:
        if equation.primitive is NEW:
            made.update(equation.outputs)
        elif equation.primitive in (GET, SWAP) and equation.inputs[0] not in made:
            return True
    return False
