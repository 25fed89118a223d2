"""Segments that run on whole maps: the gradient as one flat program, and what of it exists."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrjax.graph import size_bytes
from lrjax.inline import FlatEquation, FlatProgram, Literal, flatten, function_of
from lrjax.planner.liveness import Kind, Liveness, Operation
from lrjax.rules.elementwise import ELEMENTWISE

# What compilers fuse into readers beside elementwise operations.
_MOVES = (
    "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "rev", "slice", "pad",
    "concatenate", "dynamic_slice", "gather", "iota", "tile", "split", "select_and_gather_add",
    "custom_jvp_call", "custom_vjp_call", "random_bits", "random_wrap", "random_unwrap", "random_fold_in", "random_seed", "threefry2x32",
)  # fmt: skip
_FUSED = frozenset((*ELEMENTWISE, *_MOVES)) - {"optimization_barrier"}
_LIBRARY = ("conv_general_dilated", "dot_general", "select_and_scatter_add", "scatter", "sort",
            "scan", "while", "cond", "fft", "custom_call", "pure_callback")  # fmt: skip


def kind_of(primitive: Any) -> Kind:
    """How XLA runs a primitive."""
    if primitive.name in _FUSED:
        return Kind.FUSED
    if primitive.name.startswith(_LIBRARY):
        return Kind.LIBRARY
    return Kind.ROOT


def values(atoms: Sequence[Any]) -> tuple[int, ...]:
    return tuple(v for v in atoms if not isinstance(v, Literal))


@dataclasses.dataclass(frozen=True)
class Joint:
    """Outputs and gradients of a segment as one program.

    Attributes:
      program: inputs are the segment's, then cotangents; outputs the segment's, then gradients.
      cotangents: the inputs that are cotangents.
      border: equations before it belong to the forward pass.
    """

    program: FlatProgram
    cotangents: tuple[int, ...]
    border: int


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
    return Joint(flat, cotangents, len(forward))


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


def operations_of(program: FlatProgram) -> tuple[Operation, ...]:
    return tuple(
        Operation(values(e.inputs), e.outputs, kind_of(e.primitive)) for e in program.equations
    )


def column_liveness(joint: Joint, axes: Sequence[int | None], wrt: Sequence[int]) -> Liveness:
    """What exists in the course of both passes; arguments and parameter gradients take nothing."""
    program = joint.program
    size: dict[int, float] = {v: size_bytes(program.avals[v]) for e in program.equations
                              for v in e.outputs}  # fmt: skip
    size.update((v, size_bytes(program.avals[v])) for v in joint.cotangents)
    gradients = program.outputs[len(program.outputs) - len(wrt) :]
    free = [v for v, i in zip(gradients, wrt, strict=True) if axes[i] is None]
    size.update((v, 0.0) for v in values(free))
    return Liveness(
        operations_of(program),
        size,
        before=frozenset(joint.cotangents),
        after=frozenset(values(gradients)),
    )
