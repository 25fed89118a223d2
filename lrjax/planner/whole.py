"""Segments that run on whole maps: the gradient as one flat program, and what of it exists."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrjax.planner.compilers import buffer_bytes, compiled, convolution_scratch
from lrjax.planner.liveness import Liveness, Operation
from lrjax.program.inline import (
    FlatEquation,
    FlatProgram,
    Literal,
    flatten,
    function_of,
    without_dead_equations,
)
from lrjax.rowgraph.graph import size_bytes
from lrjax.rules.base import Equation, Operand, traits_of


def values(atoms: Sequence[Any]) -> tuple[int, ...]:
    return tuple(v for v in atoms if not isinstance(v, Literal))


@dataclasses.dataclass(frozen=True)
class Joint:
    """Outputs and gradients of a segment as one program.

    Attributes:
      program: inputs are the segment's, then cotangents; outputs the segment's, then gradients.
      cotangents: the inputs that are cotangents.
      gradients: the number of outputs that are gradients.
      border: equations before it belong to the forward pass.
      kept: the inputs that the forward pass made, of a backward pass that starts from them.
    """

    program: FlatProgram
    cotangents: tuple[int, ...]
    gradients: int
    border: int
    kept: tuple[int, ...] = ()

    @property
    def forward(self) -> FlatProgram:
        """The forward pass alone."""
        count = len(self.program.outputs) - self.gradients
        forward = dataclasses.replace(
            self.program,
            equations=self.program.equations[: self.border],
            outputs=self.program.outputs[:count],
        )
        return without_dead_equations(forward)

    def saving(self, kept: Collection[int]) -> FlatProgram:
        """The forward pass, which gives ``kept`` too."""
        forward = self.forward
        more = sorted(set(kept).difference(values(forward.outputs)))
        return dataclasses.replace(forward, outputs=(*forward.outputs, *more))

    def starting_from(self, kept: frozenset[int]) -> Joint:
        """The same gradients from kept values; whatever only these were made of is dead."""
        equations = tuple(e for e in self.program.equations if kept.isdisjoint(e.outputs))
        program = without_dead_equations(dataclasses.replace(self.program, equations=equations))
        own = tuple(sorted(kept.intersection(v for e in program.equations for v in e.values)))
        program = dataclasses.replace(program, inputs=(*program.inputs, *own))
        border = len(_split(program.equations, self.cotangents)[0])
        return dataclasses.replace(self, program=program, border=border, kept=own)


def joint_program(program: FlatProgram, wrt: Sequence[int]) -> Joint:
    """Forward and backward pass of a segment, by whole maps."""
    outputs = [program.aval(v) for v in program.outputs]
    inexact = [i for i, out in enumerate(outputs) if jnp.issubdtype(out.dtype, jnp.inexact)]
    count = len(program.inputs)

    def joint(*arrays: Any) -> Any:
        function, moving = function_of(program, wrt, arrays[:count])
        results, pull = jax.vjp(function, *moving)
        cotangents = [np.zeros(out.shape, jax.dtypes.float0) for out in outputs]
        for i, ct in zip(inexact, arrays[count:], strict=True):
            cotangents[i] = ct
        return results, pull(cotangents)

    structs = [jax.ShapeDtypeStruct(outputs[i].shape, outputs[i].dtype) for i in inexact]
    flat = flatten(jax.make_jaxpr(joint)(*program.structs, *structs))
    cotangents = flat.inputs[count:]
    forward, backward = _split(flat.equations, cotangents)
    flat = dataclasses.replace(flat, equations=(*forward, *backward))
    return Joint(flat, cotangents, len(wrt), len(forward))


def _split(
    equations: Sequence[FlatEquation], cotangents: Sequence[int]
) -> tuple[list[FlatEquation], list[FlatEquation]]:
    """What does not depend on the cotangents, and what does."""
    moved = set(cotangents)
    forward, backward = [], []
    for equation in equations:
        if moved.isdisjoint(values(equation.inputs)):
            forward.append(equation)
        else:
            backward.append(equation)
            moved.update(equation.outputs)
    return forward, backward


def operations_of(program: FlatProgram, border: int, target: str) -> list[Operation]:
    """A program's equations; those from ``border`` on are the backward pass."""
    return [
        Operation(
            e.primitive,
            values(e.inputs),
            e.outputs,
            traits_of(e.primitive).kind,
            program.avals[e.outputs[0]] if e.outputs else None,
            i >= border,
            convolution_scratch(program, e, target),
            flops=equation_operations(program, e),
        )
        for i, e in enumerate(program.equations)
    ]


def moved_bytes(program: FlatProgram) -> dict[int, float]:
    """Bytes of every value, arguments and gradients included."""
    return {v: float(size_bytes(aval)) for v, aval in enumerate(program.avals)}


def equation_operations(program: FlatProgram, equation: FlatEquation) -> float:
    """Floating-point operations of an equation on whole maps."""
    described = Equation(
        equation.primitive,
        equation.params,
        tuple(Operand(a.shape, a.dtype, None) for a in map(program.aval, equation.inputs)),
        tuple(program.avals[v] for v in equation.outputs),
    )
    return traits_of(equation.primitive).operations(described)


def made_sizes(program: FlatProgram, target: str) -> dict[int, float]:
    """Bytes of everything that a program's equations make."""
    return {
        v: buffer_bytes(program.avals[v], target)
        for equation in program.equations
        for v in equation.outputs
    }


def column_liveness(
    joint: Joint, axes: Sequence[int | None], wrt: Sequence[int], target: str
) -> Liveness:
    """What exists in the course of both passes; arguments and parameter gradients take nothing."""
    program = joint.program
    size = made_sizes(program, target)
    before = (*joint.cotangents, *joint.kept)
    size.update((v, buffer_bytes(program.avals[v], target)) for v in before)
    gradients = program.outputs[len(program.outputs) - len(wrt) :]
    free = [v for v, i in zip(gradients, wrt, strict=True) if axes[i] is None]
    hosts = {v: float(size_bytes(program.avals[v])) for v in values(free)}
    size.update(dict.fromkeys(hosts, 0.0))
    operations = compiled(
        operations_of(program, joint.border, target), size, len(program.avals), target
    )
    given = frozenset(values(gradients))
    return Liveness(
        operations,
        size,
        before=frozenset(before),
        after=given,
        hosts=hosts,
        moved=moved_bytes(program),
    )


def forward_liveness(program: FlatProgram, target: str) -> Liveness:
    """What exists in the course of a forward pass of which nothing is kept but its outputs."""
    size = made_sizes(program, target)
    listed = operations_of(program, len(program.equations), target)
    operations = compiled(listed, size, len(program.avals), target)
    after = frozenset(values(program.outputs))
    return Liveness(operations, size, after=after, moved=moved_bytes(program))


def without_outputs(joint: Joint) -> Joint:
    """The gradients alone: the forward pass as far as they need it."""
    count = len(joint.program.outputs) - joint.gradients
    program = dataclasses.replace(joint.program, outputs=joint.program.outputs[count:])
    program = without_dead_equations(program)
    border = len(_split(program.equations, joint.cotangents)[0])
    return dataclasses.replace(joint, program=program, border=border)
