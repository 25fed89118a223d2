"""Values of a program that depend on none of its inputs, computed while it is traced.

The matrices of ``jax.image.resize`` and the indices of a gather are made from iotas inside the
program; a rule that must know which rows they join asks for them here.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrjax.program.compatibility import has_body
from lrjax.program.inline import Atom, FlatEquation, FlatProgram, Literal
from lrjax.program.manual_axes import is_cast, is_collective

# Elements of the largest array that is made to be looked at: a resize from 8,192 rows to 16,384.
LARGEST = 2**27
# Elements of the largest array that a program closes over and that is looked at.
LARGEST_GIVEN = 2**20


@dataclasses.dataclass(frozen=True)
class Constant:
    """A value that no input changes.

    Attributes:
      key: equal for equal computations, across programs.
      value: computes it.
    """

    key: bytes
    value: Callable[[], np.ndarray]


class Constants:
    """The constants of one program."""

    def __init__(self, program: FlatProgram):
        self.program = program
        self.producer = {v: e for e in program.equations for v in e.outputs}
        self.keys: dict[int, bytes | None] = dict.fromkeys(program.inputs)

    def of(self, atom: Atom) -> Constant | None:
        """The constant that an operand is, or None."""
        key = self._key(atom)
        return None if key is None else Constant(key, functools.partial(self._value, atom))

    def _key(self, atom: Atom) -> bytes | None:
        if isinstance(atom, Literal):
            return _digest("literal", atom.dtype, np.asarray(atom.value).tobytes())
        if atom not in self.keys:
            self.keys[atom] = self._key_of_made(atom)
        return self.keys[atom]

    def _key_of_made(self, value: int) -> bytes | None:
        if value in self.program.constants:
            return _key_of_array(self.program.constants[value])
        equation = self.producer.get(value)
        if equation is None:
            return None
        found: list[bytes] = []
        for v in equation.inputs:
            key = self._key(v)
            if key is None:
                return None
            found.append(key)
        if not _is_plain(equation):
            return None
        if any(math.prod(self.program.avals[v].shape) > LARGEST for v in equation.outputs):
            return None
        position = equation.outputs.index(value)
        return _digest(equation.primitive.name, sorted(equation.params.items()), position, *found)

    def _value(self, atom: Atom) -> np.ndarray:
        with jax.ensure_compile_time_eval():
            return np.asarray(_Evaluation(self)(atom))


class _Evaluation:
    """Computes one value, operation by operation."""

    def __init__(self, constants: Constants):
        self.constants = constants
        self.known: dict[int, Any] = {}

    def __call__(self, atom: Atom) -> Any:
        if isinstance(atom, Literal):
            return jnp.asarray(atom.value, atom.dtype)
        if atom in self.constants.program.constants:
            return jnp.asarray(self.constants.program.constants[atom])
        if atom not in self.known:
            equation = self.constants.producer[atom]
            operands = [self(v) for v in equation.inputs]
            # Outside of ``jax.shard_map`` there are no axes to vary over.
            results = operands if is_cast(equation) else equation.evaluate(operands)
            self.known.update(zip(equation.outputs, results, strict=True))
        return self.known[atom]


def _is_plain(equation: FlatEquation) -> bool:
    """No effect, no body, no randomness, the same on all devices: cheap to run, and its
    parameters describe it."""
    return not (equation.has_effects or has_body(equation.params) or is_collective(equation))


def _key_of_array(array: Any) -> bytes | None:
    if isinstance(array, jax.core.Tracer) or np.size(array) > LARGEST_GIVEN:
        return None
    if jnp.issubdtype(array.dtype, jax.dtypes.extended):
        return None
    return _digest("array", array.shape, array.dtype, np.asarray(array).tobytes())


def _digest(*parts: Any) -> bytes:
    texts = (part if isinstance(part, bytes) else repr(part).encode() for part in parts)
    return hashlib.blake2b(b"\0".join(texts), digest_size=16).digest()
