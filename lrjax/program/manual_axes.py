"""Programs within ``jax.shard_map``: where values come to vary over mesh axes.

With ``check_vma=True`` the operands of an operation must vary over the same mesh axes, and JAX
inserts casts (``pvary``) before it. The transpose of a cast is a sum over devices. jax 0.10 casts a
parameter after it is broadcast to the shape of a map, which would make that sum one of maps; so
casts are moved up to what is broadcast, as jax 0.12 does by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
from jax import lax

from lrjax.program.compatibility import (
    bind,
    evaluate_jaxpr,
    has_body,
    open_jaxpr,
    primitive,
    primitives,
)
from lrjax.program.varying import struct, varying_axes, varying_over

if TYPE_CHECKING:
    from lrjax.program.inline import Atom, FlatEquation, FlatProgram

# Operations of one operand that move or repeat its elements.
MOVES = (
    lax.broadcast_in_dim_p,
    lax.convert_element_type_p,
    lax.reshape_p,
    lax.squeeze_p,
    lax.transpose_p,
)
_PVARY = primitive("pvary")
_SUMS = primitives("psum", "psum_invariant")


def is_cast(equation: FlatEquation) -> bool:
    """Whether all it does is to let a value vary over further mesh axes."""
    return equation.primitive is _PVARY


def is_collective(equation: FlatEquation) -> bool:
    """Whether it exchanges values between devices, or tells them apart."""
    params = equation.params
    return "axis_name" in params or "axis_index_groups" in params or equation.primitive in _SUMS


def with_early_casts(program: FlatProgram) -> FlatProgram:
    """The program with its casts as early as they can be.

    What no input changes is read without a cast where that makes no difference, so that rules see
    the constant.
    """
    if not any(map(is_cast, program.equations)):
        return program
    return _Mover(program).moved()


class _Mover:
    def __init__(self, program: FlatProgram):
        self.program = program
        self.avals = list(program.avals)
        self.equations: list[FlatEquation] = []
        self.producer: dict[int, FlatEquation] = {}
        self.moving = set(program.inputs)  # values that depend on inputs
        self.uncast: dict[int, Atom] = {}  # casts of what does not

    def moved(self) -> FlatProgram:
        replaced: dict[int, int] = {}
        for equation in self.program.equations:
            equation = equation.reading(replaced)
            if not has_body(equation.params) and not is_collective(equation):
                equation = equation.reading(self.uncast)
            operand = equation.inputs[0] if is_cast(equation) else None
            if isinstance(operand, int) and operand in self.moving:
                replaced[equation.outputs[0]] = self.cast(equation, operand)
                continue
            if operand is not None:
                self.uncast[equation.outputs[0]] = operand
            self.add(equation)
        return dataclasses.replace(
            self.program,
            avals=tuple(self.avals),
            equations=tuple(self.equations),
            outputs=self.program.outputs_as(replaced),
        )

    def cast(self, equation: FlatEquation, value: int) -> int:
        """The value, cast as ``equation`` does it, or moved from a cast of what it is made of."""
        made_by = self.producer.get(value)
        aval = self.avals[value]
        varying = varying_axes(aval) | frozenset(equation.params["axes"])
        made = self.fresh(aval, varying)
        if made_by is not None and made_by.primitive in MOVES and len(made_by.inputs) == 1:
            (operand,) = made_by.inputs
            assert isinstance(operand, int)
            inputs: Sequence[Atom] = (self.cast(equation, operand),)
            self.add(dataclasses.replace(made_by, inputs=tuple(inputs), outputs=(made,)))
        else:
            self.add(dataclasses.replace(equation, inputs=(value,), outputs=(made,)))
        return made

    def add(self, equation: FlatEquation) -> None:
        self.equations.append(equation)
        self.producer.update((v, equation) for v in equation.outputs)
        if self.moving.intersection(equation.values):
            self.moving.update(equation.outputs)

    def fresh(self, aval: Any, axes: frozenset[str]) -> int:
        self.avals.append(struct(aval.shape, aval.dtype, axes))
        return len(self.avals) - 1


def with_casts_outside(
    program: FlatProgram, inputs: Sequence[Any], axes: Sequence[int | None]
) -> tuple[FlatProgram, tuple[Any, ...], tuple[int | None, ...]]:
    """The program without casts of its inputs, with inputs that are cast already, and their axes.

    Sums over devices of their gradients are then outside, once for each, behind all loops.
    """
    position = {v: i for i, v in enumerate(program.inputs)}
    casts = {e.outputs[0]: e for e in program.equations if is_cast(e) and e.inputs[0] in position}
    if not casts:
        return program, tuple(inputs), tuple(axes)
    made: dict[tuple[int, tuple[str, ...]], int] = {}  # (input, axes) -> its cast
    replaced = {}
    for v, equation in casts.items():
        assert isinstance(equation.inputs[0], int)
        replaced[v] = made.setdefault((equation.inputs[0], equation.params["axes"]), v)
    kept = [e.reading(replaced) for e in program.equations if casts.keys().isdisjoint(e.outputs)]
    outputs = program.outputs_as(replaced)
    used = {v for e in kept for v in e.values} | {v for v in outputs if isinstance(v, int)}
    entries = []
    for v in program.inputs:
        i = position[v]
        own = [(new, names) for (old, names), new in made.items() if old == v]
        if v in used or not own:
            entries.append((v, inputs[i], axes[i]))
        entries += [
            (new, varying_over(inputs[i], varying_axes(program.avals[new])), axes[i])
            for new, _ in own
        ]
    numbers, arrays, row_axes = zip(*entries, strict=True)
    changed = dataclasses.replace(program, equations=tuple(kept), inputs=numbers, outputs=outputs)
    return changed, arrays, row_axes


def body_outside(jaxpr: Any) -> Any:
    """A body as it is traced outside of ``jax.shard_map``, from one that was traced within."""
    if " pvary[" not in str(jaxpr):
        return jaxpr

    def run(eqn: Any, values: list[Any]) -> list[Any]:
        if eqn.primitive is _PVARY:
            return values
        params = {name: _param_outside(param) for name, param in eqn.params.items()}
        return bind(eqn.primitive, values, params)

    invars = open_jaxpr(jaxpr)[0].invars
    structs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in invars]
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return jax.make_jaxpr(lambda *values: evaluate_jaxpr(jaxpr, values, run))(*structs)


def without_meshes(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters without shardings that say no more than on which mesh a program was traced.

    Within a ``jax.shard_map`` over an axis of that mesh they would be wrong.
    """
    return {name: None if _is_undivided(param) else param for name, param in params.items()}


def _is_undivided(param: Any) -> bool:
    return isinstance(param, jax.sharding.NamedSharding) and not any(param.spec)


def _param_outside(param: Any) -> Any:
    if hasattr(param, "eqns"):
        return body_outside(param)
    return None if isinstance(param, jax.sharding.NamedSharding) else param
