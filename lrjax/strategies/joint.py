"""A program and its gradient as one flat program, and its division into two passes.

JAX differentiates the program once. What the forward pass saves is then a choice of values of that
joint program: the forward pass is what outputs and saved values need, the backward pass what
gradients need beside them, so that all else of the forward pass is in both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np

from lrjax.program.comparisons import simpler_comparisons
from lrjax.program.inline import (
    FlatEquation,
    FlatProgram,
    flatten,
    function_of,
    replaced_at,
    without_dead_equations,
)
from lrjax.program.names import without_names
from lrjax.program.varying import is_inexact, is_reference, struct_like


@dataclasses.dataclass(frozen=True, eq=False)
class Joint:
    """Outputs and gradients of a program.

    Attributes:
      program: takes the inputs, then the cotangents of outputs that are not integers; gives the
        outputs, then gradients.
      cotangents: the last of its inputs.
      count: how many of its outputs are the original's.
      place: values of the original program, as values of this one.
    """

    program: FlatProgram
    cotangents: tuple[int, ...]
    count: int
    place: dict[int, int]

    def divided(self, saved: Collection[int]) -> tuple[FlatProgram, FlatProgram]:
        """Forward and backward pass.

        The forward pass gives the outputs, then what the backward pass takes before the
        cotangents: values that are saved, and inputs. Effects happen once, in the pass that JAX
        would have them in, so ``saved`` must have what the forward pass's give.
        """
        program, border = self.program, self._border
        gradients = program.outputs[self.count :]
        backward = made_from(program, border, saved, gradients, self.cotangents)
        taken = backward.inputs[: len(backward.inputs) - len(self.cotangents)]
        forward = dataclasses.replace(
            program,
            equations=program.equations[:border],
            inputs=program.inputs[: len(program.inputs) - len(self.cotangents)],
            outputs=(*program.outputs[: self.count], *taken),
        )
        return without_dead_equations(forward), backward

    @property
    def _border(self) -> int:
        """The number of the first equation that reads a cotangent: of the backward pass's first."""
        equations = self.program.equations
        return next((i for i, e in enumerate(equations) if self._reads(e)), len(equations))

    def _reads(self, equation: FlatEquation) -> bool:
        return any(isinstance(v, int) and v in self.cotangents for v in equation.inputs)


def joint_of(program: FlatProgram, wrt: Sequence[int], placed: Collection[int]) -> Joint:
    """Outputs and gradients of a program with respect to inputs, as one program.

    Args:
      program: what is differentiated.
      wrt: numbers of its inputs.
      placed: values whose place in the joint program is asked for.
    """
    count = len(program.outputs)
    outputs = [program.aval(v) for v in program.outputs]
    inexact = [i for i, out in enumerate(outputs) if is_inexact(out)]
    wanted = sorted(placed)
    telling = dataclasses.replace(program, outputs=(*program.outputs, *wanted))

    def joint(*arrays: Any) -> Any:
        inputs, moving_cotangents = arrays[: len(program.inputs)], arrays[len(program.inputs) :]
        function, moving = function_of(telling, wrt, inputs)

        def told(*moving: Any) -> tuple[list[Any], dict[int, Any]]:
            values = function(*moving)
            placed = zip(wanted, values[count:], strict=True)
            return values[:count], {v: x for v, x in placed if not is_reference(x)}

        values, pull, places = jax.vjp(told, *moving, has_aux=True)
        zeros = [np.zeros(out.shape, jax.dtypes.float0) for out in outputs]
        return (values, pull(replaced_at(zeros, inexact, moving_cotangents))), places

    structs = [struct_like(outputs[i]) for i in inexact]
    closed, (_, placed) = jax.make_jaxpr(joint, return_shape=True)(*program.structs, *structs)
    traced, stop = without_names(flatten(closed)), count + len(wrt)
    places = zip(sorted(placed), traced.outputs[stop:], strict=True)
    found = simpler_comparisons(dataclasses.replace(traced, outputs=traced.outputs[:stop]))
    known = {v for equation in found.equations for v in equation.outputs}
    return Joint(
        found,
        found.inputs[len(program.inputs) :],
        count,
        {v: place for v, place in places if isinstance(place, int) and place in known},
    )


def made_from(
    program: FlatProgram,
    border: int,
    saved: Collection[int],
    outputs: Sequence[Any],
    last: Sequence[int] = (),
) -> FlatProgram:
    """What gives ``outputs``, and effects behind ``border``, from saved values and from inputs.

    The inputs that it takes are these, ``last`` the last.
    """
    given = {*saved, *program.inputs}
    alive = {v for v in outputs if isinstance(v, int)}
    avals, kept = list(program.avals), []
    for i, equation in reversed([*enumerate(program.equations)]):
        has_effects = equation.has_effects and i >= border
        if not has_effects and not (alive.intersection(equation.outputs) - given):
            continue
        made = list(equation.outputs)
        for k, v in enumerate(made):
            if v in given:  # made again beside what is wanted, and not read
                avals.append(avals[v])
                made[k] = len(avals) - 1
        kept.append(dataclasses.replace(equation, outputs=tuple(made)))
        alive.update(v for v in equation.inputs if isinstance(v, int))
    taken = sorted((alive & given).difference(last))
    return dataclasses.replace(
        program,
        avals=tuple(avals),
        equations=tuple(reversed(kept)),
        inputs=(*taken, *last),
        outputs=tuple(outputs),
    )
