"""Segments that run on whole maps: the gradient as one flat program, and what of it exists."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import MutableMapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrjax.graph import size_bytes
from lrjax.inline import (
    FlatEquation,
    FlatProgram,
    Literal,
    flatten,
    function_of,
    without_dead_equations,
)
from lrjax.planner.liveness import Kind, Liveness, Operation
from lrjax.rules.elementwise import ELEMENTWISE

# What compilers fuse into readers beside elementwise operations.
_MOVES = (
    "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "rev", "slice", "pad",
    "concatenate", "dynamic_slice", "gather", "iota", "tile", "split", "select_and_gather_add",
    "custom_jvp_call", "custom_vjp_call", "random_bits", "random_wrap", "random_unwrap", "random_fold_in", "random_seed", "threefry2x32",
)  # fmt: skip
_FUSED = frozenset((*ELEMENTWISE, *_MOVES)) - {"optimization_barrier"}
_LIBRARY = ("conv_general_dilated", "dot_general", "scatter", "sort",
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
      gradients: the number of outputs that are gradients.
      border: equations before it belong to the forward pass.
    """

    program: FlatProgram
    cotangents: tuple[int, ...]
    gradients: int
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


def operations_of(
    program: FlatProgram, size: MutableMapping[int, float]
) -> tuple[tuple[Operation, ...], list[int]]:
    """Operations of a program, and where each of its equations went."""
    pools = pool_gradients(program, size)
    operations: list[Operation] = []
    position = []
    for i, equation in enumerate(program.equations):
        for pool in pools:
            if pool.first_zeros == i:
                made = tuple(v for v in (pool.zeros, pool.target) if v is not None)
                operations.append(Operation((), made, Kind.ROOT))
        inputs = values(equation.inputs)
        inputs += tuple(p.zeros for p in pools if p.last_zeros == i and p.zeros is not None)
        own = next((p for p in pools if p.equation == i), None)
        operation = Operation(inputs, equation.outputs, kind_of(equation.primitive))
        if own is not None:
            target = own.target
            operation = dataclasses.replace(
                operation,
                inputs=(*inputs, target) if target is not None else inputs,
                scratch=own.scratch,
                overwrites=target,
            )
        position.append(len(operations))
        operations.append(operation)
    return tuple(operations), position


@dataclasses.dataclass(frozen=True)
class PoolGradient:
    """What XLA:GPU makes of the gradient of a max pool: a scatter of values to stored indices.

    The array it scatters into is a copy of zeros. A ReLU over a map of the same shape compares
    with those zeros and is made together with them, so that both exist from there on.
    """

    equation: int
    scratch: float
    first_zeros: int = -1
    last_zeros: int = -1
    zeros: int | None = None
    target: int | None = None


# Per element of the pooled map: the value in float32 and its place as four int32.
POOL_INDEX_BYTES = 20


def pool_gradients(program: FlatProgram, size: MutableMapping[int, float]) -> list[PoolGradient]:
    found: list[PoolGradient] = []
    readers: dict[int, list[FlatEquation]] = {}
    for equation in program.equations:
        for v in values(equation.inputs):
            readers.setdefault(v, []).append(equation)
    fresh = len(program.avals)
    for i, equation in enumerate(program.equations):
        if equation.primitive.name != "select_and_scatter_add":
            continue
        (made,) = equation.outputs
        pooled = program.aval(equation.inputs[0])
        scratch = float(math.prod(pooled.shape) * POOL_INDEX_BYTES)
        is_added = any(e.primitive.name in ("add", "add_any") for e in readers.get(made, []))
        users = [
            j
            for j, e in enumerate(program.equations)
            if _uses_zeros(program, e, program.avals[made])
        ]
        if is_added or not users or users[0] > i:
            found.append(PoolGradient(i, scratch))
            continue
        size[fresh] = size[fresh + 1] = size[made]
        found.append(PoolGradient(i, scratch, users[0], users[-1], fresh, fresh + 1))
        fresh += 2
    return found


def _uses_zeros(program: FlatProgram, equation: FlatEquation, aval: Any) -> bool:
    if (
        kind_of(equation.primitive) is not Kind.FUSED
        or equation.primitive.name == "broadcast_in_dim"
    ):
        return False
    like = program.avals[equation.outputs[0]]
    name = equation.primitive.name
    return name in ("max", "select_n") and (like.shape, like.dtype) == (aval.shape, aval.dtype)


def column_liveness(
    joint: Joint, axes: Sequence[int | None], wrt: Sequence[int]
) -> tuple[Liveness, int]:
    """What exists in the course of both passes; arguments and parameter gradients take nothing."""
    program = joint.program
    size: dict[int, float] = {v: size_bytes(program.avals[v]) for e in program.equations
                              for v in e.outputs}  # fmt: skip
    size.update((v, size_bytes(program.avals[v])) for v in joint.cotangents)
    gradients = program.outputs[len(program.outputs) - len(wrt) :]
    free = [v for v, i in zip(gradients, wrt, strict=True) if axes[i] is None]
    size.update((v, 0.0) for v in values(free))
    operations, position = operations_of(program, size)
    border = position[joint.border] if joint.border < len(position) else len(operations)
    lives = Liveness(
        operations,
        size,
        before=frozenset(joint.cotangents),
        after=frozenset(values(gradients)),
    )
    return lives, border


def forward_liveness(program: FlatProgram) -> Liveness:
    """What exists in the course of a forward pass of which nothing is kept but its outputs."""
    size: dict[int, float] = {
        v: size_bytes(program.avals[v]) for e in program.equations for v in e.outputs
    }
    operations, _ = operations_of(program, size)
    return Liveness(operations, size, after=frozenset(values(program.outputs)))


def without_outputs(joint: Joint) -> Joint:
    """The gradients alone: the forward pass as far as they need it."""
    count = len(joint.program.outputs) - joint.gradients
    program = dataclasses.replace(joint.program, outputs=joint.program.outputs[count:])
    program = without_dead_equations(program)
    return dataclasses.replace(joint, program=program, border=0)
