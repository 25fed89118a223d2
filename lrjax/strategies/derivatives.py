"""Derivatives of every order, forward and reverse, of functions that have a backward pass.

JAX cannot push tangents through a ``custom_vjp`` function, and differentiates a second time through
whatever its backward pass does. Here both modes meet in one linear operation: evaluated, it runs
the tangents as a program of its own; transposed, it is the function's backward pass. That pass in
turn has the derivative of the gradient as a program of its own. So ``jvp``, Hessians and gradients
of gradients are row programs like any other, and a first gradient is what it is without them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, zero_from_primal
from jax.extend.core import Primitive
from jax.extend.core import primitives as public
from jax.interpreters import ad, batching, mlir

from lrjax.program.inline import FlatProgram, flatten, function_of, replaced_at
from lrjax.program.interpreter import with_room_for_calls
from lrjax.program.varying import is_inexact, struct, struct_like, varying_axes
from lrjax.rowgraph.graph import build
from lrjax.rowgraph.row_mesh import RowMesh
from lrjax.rules.base import Array
from lrjax.strategies.stream import stream_function

Function = Callable[..., Sequence[Array]]


@dataclasses.dataclass(frozen=True)
class Programs:
    """A function's derivatives as functions; each is given numbers of inputs, those that move.

    Attributes:
      tangents: gives the function of all inputs, then tangents of those that move, for the tangents
        of the outputs that are not integers.
      gradients: gives the function of all inputs, then cotangents of the outputs that are not
        integers, for the cotangents of the inputs that move.
      primals: gives the function of all inputs for the outputs as a forward pass computes them.
        A custom rule may compute them otherwise than the function, and their derivative is then
        that of what it does. None where it calls what the function calls.
    """

    tangents: Callable[[tuple[int, ...]], Function]
    gradients: Callable[[tuple[int, ...]], Function]
    primals: Callable[[tuple[int, ...]], Function | None]


# --- Derivatives by rows -------------------------------------------------------------------------


def by_rows(
    function: Function,
    program: FlatProgram,
    axes: Sequence[int | None],
    num_blocks: int,
    given: Mapping[int, int],
    taken: Mapping[int, int],
    row_mesh: RowMesh | None = None,
) -> Function:
    """A function that runs ``program``, with derivatives that are streamed.

    Args:
      function: of the program's inputs; differentiable in reverse mode.
      program: what it computes.
      axes: row axes of the inputs.
      num_blocks: steps in which the rows of the derivatives are admitted.
      given, taken: numbers of the outputs and of the inputs that are in the host's memory, with
        their row axes.
      row_mesh: the devices that the rows are divided among.

    A program with effects (references that are written) keeps its reverse mode alone.
    """
    if any(equation.has_effects for equation in program.equations):
        return function  # JAX runs effects within no function that has derivatives of its own
    inexact = [i for i, v in enumerate(program.outputs) if is_inexact(program.aval(v))]
    all_given, given = given, {k: given[i] for k, i in enumerate(inexact) if i in given}

    def streamed(
        derivative: FlatProgram, own_axes: Any, own_given: Any, own_taken: Any
    ) -> Function:
        function = stream_function(derivative, own_axes, num_blocks, own_given, row_mesh)
        return by_rows(function, derivative, own_axes, num_blocks, own_given, own_taken, row_mesh)

    @functools.cache
    def tangents(moving: tuple[int, ...]) -> Function:
        own_axes = [*axes, *(axes[i] for i in moving)]
        own_taken = {**taken} | {
            len(axes) + k: taken[i] for k, i in enumerate(moving) if i in taken
        }
        return streamed(_tangent_program(program, moving), own_axes, given, own_taken)

    @functools.cache
    def gradients(moving: tuple[int, ...]) -> Function:
        graph = build(program, axes)
        out_axes = [graph.axis_of(graph.program.outputs[i]) for i in inexact]
        own_taken = {**taken} | {len(axes) + k: axis for k, axis in given.items()}
        own_given = {k: taken[i] for k, i in enumerate(moving) if i in taken}
        derivative = _gradient_program(program, moving, inexact)
        return streamed(derivative, [*axes, *out_axes], own_given, own_taken)

    @functools.cache
    def primals(moving: tuple[int, ...]) -> Function | None:
        forward = _forward_program(program, moving)
        is_same = _calls(forward) == _calls(program)
        return None if is_same else streamed(forward, axes, all_given, taken)

    return with_derivatives(function, Programs(tangents, gradients, primals))


def _tangent_program(program: FlatProgram, moving: Sequence[int]) -> FlatProgram:
    def tangents(*arrays: Array) -> list[Array]:
        inputs, given = arrays[: len(program.inputs)], arrays[len(program.inputs) :]
        function, primals = function_of(program, moving, inputs)
        outputs, found = jax.jvp(function, primals, list(given))
        return [t for out, t in zip(outputs, found, strict=True) if is_inexact(out)]

    structs = [*program.structs, *(program.structs[i] for i in moving)]
    return flatten(jax.make_jaxpr(tangents)(*structs), keep_custom_rules=True)


def _forward_program(program: FlatProgram, moving: Sequence[int]) -> FlatProgram:
    """The outputs as the forward pass of a gradient computes them."""

    def forward(*inputs: Array) -> list[Array]:
        function, primals = function_of(program, moving, inputs)
        return list(jax.vjp(function, *primals)[0])

    return flatten(jax.make_jaxpr(forward)(*program.structs), keep_custom_rules=True)


def _calls(program: FlatProgram) -> list[str]:
    """The bodies of the calls with derivatives of their own."""
    calls = (public.custom_jvp_call_p, public.custom_vjp_call_p)
    return [
        f"{equation.primitive} {equation.params['call_jaxpr']}"
        for equation in program.equations
        if equation.primitive in calls
    ]


def _gradient_program(
    program: FlatProgram, moving: Sequence[int], inexact: Sequence[int]
) -> FlatProgram:
    def gradients(*arrays: Array) -> list[Array]:
        inputs, given = arrays[: len(program.inputs)], arrays[len(program.inputs) :]
        function, primals = function_of(program, moving, inputs)
        outputs, pull = jax.vjp(function, *primals)
        return list(pull(_with_zeros(given, outputs)))

    cotangents = [struct_like(program.aval(program.outputs[i])) for i in inexact]
    closed = jax.make_jaxpr(gradients)(*program.structs, *cotangents)
    return flatten(closed, keep_custom_rules=True)


# --- Functions of arrays -------------------------------------------------------------------------


def with_derivatives(function: Function, programs: Programs) -> Function:
    """A function that can be differentiated once in reverse mode, with the given derivatives."""
    call = jax.custom_jvp(function)

    def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        passes = _Passes(function, programs, _moving(tangents))
        outputs, saved = passes.forward(*primals)
        return outputs, passes.tangents(outputs, saved, primals, tangents)

    call.defjvp(rule, symbolic_zeros=True)
    return call


class _Passes:
    """Forward and backward pass of a function. What the one saves for the other moves with nothing:
    the derivative of the backward pass is that of the gradient, a function of the inputs."""

    def __init__(self, function: Function, programs: Programs, moving: tuple[int, ...]):
        self.function, self.programs, self.moving = function, programs, moving
        # Of the forward pass, which always runs first: what it saves, and the outputs' types.
        # Whether an output is on the host is a part of its type that structs do not have.
        tree: Any = None
        types: list[Any] = []

        def forward(*inputs: Array) -> tuple[Sequence[Array], Sequence[Array]]:
            nonlocal tree, types
            outputs, pull = jax.vjp(_of_some(function, inputs, moving), *_some(inputs, moving))
            types = list(map(jax.typeof, outputs))
            saved, tree = jax.tree.flatten(pull)
            return outputs, saved

        def backward(
            saved: Sequence[Array], inputs: Sequence[Array], cotangents: Sequence[Array]
        ) -> Sequence[Array]:
            del inputs
            return list(jax.tree.unflatten(tree, saved)(_with_zeros(cotangents, types)))

        self.forward = jax.custom_jvp(forward)
        self.forward.defjvp(self.forward_rule, symbolic_zeros=True)
        self.backward = jax.custom_jvp(backward)
        self.backward.defjvp(self.backward_rule, symbolic_zeros=True)

    def tangents(
        self,
        outputs: Sequence[Array],
        saved: Sequence[Array],
        primals: Sequence[Any],
        tangents: Sequence[Any],
    ) -> list[Any]:
        """Tangents of the outputs, from those of the inputs that move."""
        types = list(map(jax.typeof, outputs))
        linear = Linear(
            lambda inputs, given: self.programs.tangents(self.moving)(*inputs, *given),
            self.backward,
            len(saved),
            len(primals),
            tuple(filter(is_inexact, types)),
        )
        found = linear_p.bind(*saved, *primals, *_some(tangents, self.moving), linear=linear)
        return _with_zeros(found, types, symbolic=True)

    def forward_rule(self, primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        outputs, saved = self.forward(*primals)
        moving = _moving(tangents)
        otherwise = self.programs.primals(self.moving)
        if otherwise is not None:
            function = _of_some(otherwise, primals, moving)
            _, dots = jax.jvp(function, _some(primals, moving), _some(tangents, moving))
            inexact = [dot for out, dot in zip(outputs, dots, strict=True) if is_inexact(out)]
            found = _with_zeros(inexact, outputs, symbolic=True)
        elif moving == self.moving:
            found = self.tangents(outputs, saved, primals, tangents)
        else:
            passes = _Passes(self.function, self.programs, moving)
            found = passes.tangents(*passes.forward(*primals), primals, tangents)
        return (outputs, saved), (found, zero_from_primal(saved, symbolic_zeros=True))

    def backward_rule(self, primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        points, directions = [[*group[1], *group[2]] for group in (primals, tangents)]
        moving = _moving(directions)
        gradient = _of_some(self.programs.gradients(self.moving), points, moving)
        _, found = jax.jvp(gradient, _some(points, moving), _some(directions, moving))
        return self.backward(*primals), found


def _moving(tangents: Sequence[Any]) -> tuple[int, ...]:
    return tuple(i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero))


def _some(values: Sequence[Any], numbers: Sequence[int]) -> list[Any]:
    return [values[i] for i in numbers]


def _of_some(function: Function, values: Sequence[Any], numbers: Sequence[int]) -> Function:
    """The function of the values of some numbers, at the others."""

    def call(*moving: Array) -> list[Array]:
        return list(function(*replaced_at(values, numbers, moving)))

    return call


def _with_zeros(values: Sequence[Any], outputs: Sequence[Any], symbolic: bool = False) -> list[Any]:
    """Tangents or cotangents of all outputs from those of outputs that are not integers."""
    given = iter(values)
    return [next(given) if is_inexact(out) else _zero(out, symbolic) for out in outputs]


def _zero(out: Any, symbolic: bool) -> Any:
    """The tangent or cotangent of an integer output, given or its type."""
    aval = out if hasattr(out, "to_tangent_aval") else jax.typeof(out)
    tangent = aval.to_tangent_aval()
    return SymbolicZero(tangent) if symbolic else ad.zeros_like_aval(tangent)


# --- The linear operation ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Linear:
    """A linear function of tangents, with its transpose.

    Its operands are arrays that the transpose needs, the inputs, and the tangents.

    Attributes:
      forward: (inputs, tangents) -> tangents of the outputs; differentiable.
      transposed: (saved, inputs, cotangents of the outputs) -> cotangents of the tangents.
      saved, inputs: numbers of operands.
      outputs: types of the results.
    """

    forward: Callable[[Sequence[Array], Sequence[Array]], Sequence[Array]]
    transposed: Callable[[Sequence[Array], Sequence[Array], Sequence[Array]], Sequence[Array]]
    saved: int
    inputs: int
    outputs: tuple[Any, ...]

    def parts(self, operands: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        stop = self.saved + self.inputs
        return operands[: self.saved], operands[self.saved : stop], operands[stop:]


linear_p = Primitive("rowwise_tangents")
linear_p.multiple_results = True


@linear_p.def_impl
def _evaluated(*operands: Any, linear: Linear) -> list[Array]:
    _, inputs, tangents = linear.parts(operands)
    return list(linear.forward(inputs, tangents))


@linear_p.def_abstract_eval
def _types(*operands: Any, linear: Linear) -> list[Any]:
    return [
        jax.typeof(out) if isinstance(out, jax.ShapeDtypeStruct) else out for out in linear.outputs
    ]


@with_room_for_calls
def _transpose(cotangents: Sequence[Any], *operands: Any, linear: Linear) -> list[Any]:
    saved, inputs, tangents = linear.parts(operands)
    found = linear.transposed(saved, inputs, [ad.instantiate_zeros(ct) for ct in cotangents])
    bars = [
        bar if ad.is_undefined_primal(t) else None for bar, t in zip(found, tangents, strict=True)
    ]
    return [None] * (linear.saved + linear.inputs) + bars


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, linear: Linear) -> tuple[Any, Any]:
    outputs = linear_p.bind(*primals, linear=linear)
    saved, inputs, given = linear.parts(primals)
    _, input_dots, dots = linear.parts(tangents)
    dots = [ad.instantiate_zeros(dot) for dot in dots]
    moving = [i for i, dot in enumerate(input_dots) if not isinstance(dot, ad.Zero)]
    if not moving:
        return outputs, linear_p.bind(*saved, *inputs, *dots, linear=linear)

    def of_moving(values: Sequence[Array], given: Sequence[Array]) -> Sequence[Array]:
        return list(linear.forward(replaced_at(inputs, moving, values), given))

    points = _some(inputs, moving), list(given)
    return outputs, jax.jvp(of_moving, points, (_some(input_dots, moving), dots))[1]


def _batch(operands: Sequence[Any], axes: Sequence[Any], *, linear: Linear) -> tuple[Any, Any]:
    pairs = list(zip(operands, axes, strict=True))
    size = next(x.shape[a] for x, a in pairs if a is not None)
    first = [x if a is None else jnp.moveaxis(x, a, 0) for x, a in pairs]
    saved, inputs, tangents = linear.parts(first)
    mapped = [None if a is None else 0 for a in axes]
    saved_axes, input_axes, tangent_axes = map(tuple, linear.parts(mapped))
    spread = [
        jnp.broadcast_to(t, (size, *t.shape)) if a is None else t
        for t, a in zip(tangents, tangent_axes, strict=True)
    ]
    forward = jax.vmap(linear.forward, (input_axes, 0))
    transposed = jax.vmap(linear.transposed, (saved_axes, input_axes, 0))
    batched = dataclasses.replace(
        linear,
        forward=lambda *groups: forward(*map(tuple, groups)),
        transposed=lambda *groups: transposed(*map(tuple, groups)),
        outputs=tuple(
            struct((size, *out.shape), out.dtype, varying_axes(out)) for out in linear.outputs
        ),
    )
    results = linear_p.bind(*saved, *inputs, *spread, linear=batched)
    return results, [0] * len(results)


ad.primitive_jvps[linear_p] = _jvp
ad.primitive_transposes[linear_p] = _transpose
batching.primitive_batchers[linear_p] = _batch
mlir.register_lowering(linear_p, mlir.lower_fun(_evaluated, multiple_results=True))
