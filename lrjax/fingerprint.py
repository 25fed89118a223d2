"""What a plan knows a function by: its flat program in words, the same in every process."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lrjax.program.inline import Literal
from lrjax.program.manual_axes import body_outside
from lrjax.rowgraph.tracing import Traced


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What a plan must find again in the function it runs.

    Attributes:
      inputs: type and row axis of every array that goes in, closed-over arrays first, such as
        ``"bf16[1, 64, 64, 3] rows on axis 1"``.
      operations: primitive, parameters, types and operands of every equation of the flat program.
        Numbers written into the function (a learning rate, a seed) are not told apart.
    """

    inputs: tuple[str, ...]
    operations: tuple[str, ...]

    @property
    def digest(self) -> str:
        text = "\n".join((*self.inputs, "--", *self.operations))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"Fingerprint({self.digest}, {len(self.operations)} operations)"

    def difference(self, other: Fingerprint) -> str | None:
        """What ``other`` has in the first place where it is not this, or None."""
        for name, own, found in (
            ("input", self.inputs, other.inputs),
            ("operation", self.operations, other.operations),
        ):
            if len(own) != len(found) and name == "input":
                return f"it takes {len(own)} arrays, this call has {len(found)}"
            for i, (one, two) in enumerate(zip(own, found, strict=False)):
                if one != two:
                    return f"{name} {i} is {one} in the plan and {two} in this call"
            if len(own) != len(found):
                return f"it has {len(own)} operations, this call has {len(found)}"
        return None


def fingerprint(traced: Traced) -> Fingerprint:
    """The fingerprint of a traced call; the same in every process with the same jax."""
    program = traced.program
    number: dict[int, int] = {}

    def operand(atom: Any) -> str:
        if isinstance(atom, Literal):
            return f"{atom.dtype}{list(atom.shape)}"
        return f"%{number.setdefault(atom, len(number))}"

    inputs = []
    for v, axis in zip(program.inputs, traced.axes, strict=True):
        operand(v)
        rows = "" if axis is None else f" rows on axis {axis}"
        inputs.append(_type(program.avals[v]) + rows)
    operations = []
    for equation in program.equations:
        read = " ".join(map(operand, equation.inputs))
        made = " ".join(f"{operand(v)}:{_type(program.avals[v])}" for v in equation.outputs)
        name, params = equation.primitive.name, _parameters(equation.params)
        operations.append(f"{name}{params} {read} -> {made}")
    operations.append("return " + " ".join(map(operand, program.outputs)))
    return Fingerprint(tuple(inputs), tuple(operations))


# What the text of a body has of where it was traced: addresses, and the mesh at hand.
_PLACES = re.compile(r" at 0x[0-9a-f]+|\bctx_mesh=\w*Mesh\((?:[^()]|\([^()]*\))*\)")
_PLAIN = (bool, int, float, complex, str, type(None), np.dtype, np.generic, enum.Enum)


def _parameters(params: Mapping[str, Any]) -> str:
    """What an operation does, in words that are the same in every process.

    Functions and other objects without such words go by their types.
    """
    texts = {name: _rendered(value) for name, value in sorted(params.items())}
    found = ", ".join(f"{name}={text}" for name, text in texts.items() if text)
    return f"[{found}]" if found else ""


def _rendered(value: Any) -> str:
    if hasattr(value, "eqns"):  # a body: of a loop, a branch, a custom derivative
        text = " ".join(_PLACES.sub("", str(body_outside(value))).split())
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return f"jaxpr {digest}"
    if isinstance(value, Mapping):
        value = sorted(value.items())
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_rendered, value))})"
    if isinstance(value, type):
        return value.__name__
    return repr(value) if isinstance(value, _PLAIN) else type(value).__name__


def _type(aval: Any) -> str:
    return f"{aval.dtype}{list(aval.shape)}"
