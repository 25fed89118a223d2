"""Jaxpr -> a flat list of equations with fresh values at each call.

JAX shares sub-jaxprs between call sites, so that the same variable may stand for two values; here
every value has a number of its own. Calls (``jit``, ``checkpoint``, custom derivatives, ...) are
inlined, and short scans over rows (layers of a network) are unrolled; other loops and branches stay
whole.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import source_info_util
from jax.extend.core import Literal as JaxLiteral
from jax.extend.core import Primitive
from jax.extend.core import primitives as public

from lrjax.program.compatibility import (
    bind,
    open_jaxpr,
    primitives,
    scan_arity,
)
from lrjax.program.extremes import evaluate_differentiably
from lrjax.program.manual_axes import with_early_casts, without_meshes
from lrjax.program.references import ADD_UPDATE, GET, SWAP
from lrjax.program.varying import struct_like, varying_axes, varying_over

# The parameter that holds the body of a call, by primitive.
_CALLS = {
    public.jit_p: "jaxpr",
    public.remat_p: "jaxpr",
    **dict.fromkeys(primitives("closed_call"), "call_jaxpr"),
}
_CUSTOM_CALLS = {public.custom_jvp_call_p: "call_jaxpr", public.custom_vjp_call_p: "call_jaxpr"}


# Equations that the unrolled form of one scan may have, calls in its body counted as one.
MOST_UNROLLED = 2048
# Copies of one row that are joined one by one.
MOST_COPIES = 16


@dataclasses.dataclass(frozen=True)
class Literal:
    """A constant operand."""

    value: Any
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return np.shape(self.value)

    @property
    def scalar(self) -> Any:
        return self.value if np.ndim(self.value) == 0 else None


Atom = int | Literal


def values_of(atoms: Iterable[Atom]) -> list[int]:
    """The values among operands or outputs; literals are none."""
    return [v for v in atoms if isinstance(v, int)]


def array_of(atom: Atom, values: Mapping[int, Any]) -> Any:
    """The array that an operand or output stands for."""
    return jnp.asarray(atom.value, atom.dtype) if isinstance(atom, Literal) else values[atom]


@dataclasses.dataclass(frozen=True)
class FlatEquation:
    primitive: Any
    params: dict[str, Any]
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]
    source: Any = dataclasses.field(compare=False, repr=False)
    has_effects: bool = False

    @property
    def values(self) -> list[int]:
        """The values that it reads."""
        return values_of(self.inputs)

    def reading(self, replaced: Mapping[int, Atom]) -> FlatEquation:
        """The equation with other operands in the place of some."""
        return dataclasses.replace(self, inputs=_renamed(self.inputs, replaced))

    def origin(self) -> AbstractContextManager[None]:
        """Operations within carry this equation's named scopes and source line.

        A memory profile tells layers apart by them.
        """
        scopes = source_info_util.current_name_stack() + self.source.name_stack
        return source_info_util.user_context(self.source.traceback, name_stack=scopes)

    def evaluate(self, values: Sequence[Any], is_tiled_later: bool = False) -> list[Any]:
        with self.origin():
            made = None
            if is_tiled_later:
                made = evaluate_differentiably(self.primitive, self.params, values)
            return bind(self.primitive, values, self.params) if made is None else made


def _renamed(atoms: Iterable[Atom], replaced: Mapping[int, Atom]) -> tuple[Atom, ...]:
    return tuple(replaced.get(v, v) if isinstance(v, int) else v for v in atoms)


def dependents(equations: Iterable[FlatEquation], values: Iterable[int]) -> set[int]:
    """These values, and all that is made of them."""
    found = set(values)
    for equation in equations:
        if not found.isdisjoint(equation.values):
            found.update(equation.outputs)
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class FlatProgram:
    """Equations in topological order; ``avals[v]`` is the type of value ``v``.

    ``constants`` are arrays that the program closes over, by value. Programs are compared by
    identity, so that what is found out of one is kept with it.
    """

    avals: tuple[jax.ShapeDtypeStruct, ...]
    equations: tuple[FlatEquation, ...]
    inputs: tuple[int, ...]
    outputs: tuple[Atom, ...]
    constants: Mapping[int, Any] = dataclasses.field(default_factory=dict)

    def aval(self, atom: Atom) -> Any:
        return atom if isinstance(atom, Literal) else self.avals[atom]

    def outputs_as(self, replaced: Mapping[int, Atom]) -> tuple[Atom, ...]:
        """The outputs with others in the place of some."""
        return _renamed(self.outputs, replaced)

    @property
    def structs(self) -> list[jax.ShapeDtypeStruct]:
        """Types of the inputs."""
        return [self.avals[v] for v in self.inputs]


def flatten(
    closed: Any,
    *,
    keep_custom_rules: bool = False,
    constants_are_inputs: bool = False,
    row_axes: Sequence[int | None] = (),
    typed: Callable[[FlatProgram, Sequence[int | None]], Mapping[int, int]] | None = None,
) -> FlatProgram:
    """Inline every call.

    Args:
      closed: the traced function.
      keep_custom_rules: leave ``custom_jvp`` and ``custom_vjp`` calls as single equations, so that
        a program that is differentiated later keeps its own derivatives.
      constants_are_inputs: closed-over arrays that may be differentiated (``is_moving``) become
        leading inputs instead of constants.
      row_axes: row axis of each argument, None for one without rows; scans over layers of what
        depends on such are unrolled.
      typed: gives the row axes of a program's values from those of its inputs, to tell scans along
        rows, which stay loops, from scans over layers.
    """
    flattener = _Flattener(dict(_CALLS) if keep_custom_rules else {**_CALLS, **_CUSTOM_CALLS})
    jaxpr, given = open_jaxpr(closed)
    leading = [constants_are_inputs and is_moving(c) for c in given]
    consts = [
        flattener.fresh(v.aval) if moves else flattener.constant(c)
        for v, c, moves in zip(jaxpr.constvars, given, leading, strict=True)
    ]
    arguments = [flattener.fresh(v.aval) for v in jaxpr.invars]
    flattener.give_rows(arguments, row_axes, typed)
    outputs = flattener.inline(jaxpr, [*consts, *arguments])
    program = FlatProgram(
        tuple(flattener.avals),
        tuple(flattener.equations),
        tuple([*itertools.compress(consts, leading), *arguments]),
        tuple(outputs),
        flattener.constants,
    )
    return without_dead_equations(with_early_casts(program))


def is_moving(constant: Any) -> bool:
    """A closed-over array that may be a tracer or have a gradient; indices known now are not."""
    is_fixed = jnp.issubdtype(constant.dtype, np.integer) or constant.dtype == np.bool_
    return isinstance(constant, jax.core.Tracer) or not is_fixed


class _Flattener:
    def __init__(self, calls: dict[Primitive, str]):
        self.calls = calls
        self.avals: list[jax.ShapeDtypeStruct] = []
        self.equations: list[FlatEquation] = []
        self.constants: dict[int, Any] = {}
        self.rows: set[int] = set()  # values that depend on rows
        self.axes: dict[int, int] = {}  # of the inputs that carry rows
        self.typed: Callable[..., Mapping[int, int]] | None = None
        self.broadcasts: dict[int, tuple[int, Sequence[int]]] = {}  # their operands and dimensions
        self.pieces: dict[int, list[Atom]] = {}  # of stacked results of unrolled scans
        self.source = source_info_util.new_source_info()  # of the equation at hand

    def give_rows(self, arguments: Sequence[int], axes: Sequence[int | None], typed: Any) -> None:
        self.axes = {v: a for v, a in zip(arguments, axes, strict=False) if a is not None}
        self.rows.update(self.axes)
        self.typed = typed

    def constant(self, value: Any) -> int:
        made = self.fresh(jax.typeof(value))
        self.constants[made] = value
        return made

    def fresh(self, aval: Any) -> int:
        self.avals.append(struct_like(aval))
        return len(self.avals) - 1

    def inline(self, jaxpr: Any, arguments: Sequence[Atom]) -> list[Atom]:
        """Emit the equations of a jaxpr whose constvars and invars are ``arguments``.

        The names within a jaxpr start from the name stack of the equation that calls it.
        """
        caller = self.source
        known: dict[Any, Atom] = dict(
            zip((*jaxpr.constvars, *jaxpr.invars), arguments, strict=True)
        )

        def atom(v: Any) -> Atom:
            is_literal = isinstance(v, JaxLiteral)
            return Literal(v.val, v.aval.dtype) if is_literal else known[v]

        for eqn in jaxpr.eqns:
            inputs = tuple(atom(v) for v in eqn.invars)
            stack = caller.name_stack + eqn.source_info.name_stack
            self.source = eqn.source_info.replace(name_stack=stack)
            body = self.calls.get(eqn.primitive)
            if body is not None:
                outputs = self.call(eqn.params[body], inputs)
            elif eqn.primitive is lax.optimization_barrier_p:
                # One each: values with and without rows, or at several heights, may share one.
                outputs = [
                    self.emit(eqn, (value,), (v,))[0]
                    for value, v in zip(inputs, eqn.outvars, strict=True)
                ]
            elif eqn.primitive is lax.scan_p and self.is_unrolled(eqn, inputs):
                outputs = self.unrolled(eqn, inputs)
            elif eqn.primitive is ADD_UPDATE:
                outputs = self.updated(eqn, inputs)
            elif eqn.primitive is lax.split_p:
                outputs = self.slices(eqn, inputs[0])
            elif eqn.primitive is lax.concatenate_p:
                outputs = self.joined(eqn, inputs)
            elif eqn.primitive is lax.reshape_p and (copies := self.copied_rows(eqn, inputs[0])):
                outputs = self.joined_copies(eqn, copies)
            else:
                outputs = [*self.emit(eqn, inputs, eqn.outvars)]
            known.update(zip(eqn.outvars, outputs, strict=True))
        self.source = caller
        return [atom(v) for v in jaxpr.outvars]

    def emit(self, eqn: Any, inputs: tuple[Atom, ...], outvars: Sequence[Any]) -> list[int]:
        return self.add(eqn.primitive, eqn.params, inputs, outvars, bool(eqn.effects))

    def add(
        self,
        primitive: Any,
        params: dict[str, Any],
        inputs: tuple[Atom, ...],
        outvars: Sequence[Any],
        has_effects: bool = False,
    ) -> list[int]:
        made = tuple(self.fresh(getattr(v, "aval", v)) for v in outvars)
        params = without_meshes(params)
        if primitive is lax.broadcast_in_dim_p and len(inputs) == 1 and isinstance(inputs[0], int):
            self.broadcasts[made[0]] = inputs[0], params["broadcast_dimensions"]
        self.equations.append(
            FlatEquation(primitive, params, inputs, made, self.source, has_effects)
        )
        if self.rows.intersection(values_of(inputs)):
            self.rows.update(made)
        return list(made)

    def updated(self, eqn: Any, inputs: Sequence[Atom]) -> list[Atom]:
        """What is added to a reference, as read, added and written: these have results."""
        (reference, value, *indices), one = inputs, [eqn.invars[1].aval]
        old = self.add(GET, eqn.params, (reference, *indices), one, has_effects=True)
        new = self.add(lax.add_p, {}, (*old, value), one)
        self.add(SWAP, eqn.params, (reference, *new, *indices), one, has_effects=True)
        return []

    def slices(self, eqn: Any, operand: Atom) -> list[Atom]:
        """A split as slices: each of its pieces may have rows of its own."""
        axis = eqn.params["axis"]
        starts = [0, *itertools.accumulate(eqn.params["sizes"])]
        return [
            self.slice(operand, eqn.invars[0].aval.shape, axis, start, v.aval)
            for start, v in zip(starts, eqn.outvars, strict=False)
        ]

    def joined(self, eqn: Any, inputs: Sequence[Atom]) -> list[Atom]:
        """A concatenation without its empty pieces, whose axes would be anyone's guess."""
        axis = eqn.params["dimension"]
        pairs = zip(inputs, eqn.invars, strict=True)
        filled = tuple(piece for piece, v in pairs if v.aval.shape[axis]) or tuple(inputs[:1])
        return [*filled] if len(filled) == 1 else [*self.emit(eqn, filled, eqn.outvars)]

    def copied_rows(self, eqn: Any, operand: Atom) -> tuple[int, int, int] | None:
        """One row made several, as ``jnp.pad`` repeats an edge: ``[.., 1, ..]`` was broadcast to
        ``[.., 1, copies, ..]`` and becomes ``[.., copies, ..]``. The row, their number and axis."""
        if not isinstance(operand, int) or operand not in self.broadcasts:
            return None
        source, dims = self.broadcasts[operand]
        shape, spread = self.avals[source].shape, self.avals[operand].shape
        new = [a for a in range(len(spread)) if a not in dims]
        if len(new) != 1 or new[0] == 0 or not 1 <= spread[new[0]] <= MOST_COPIES:
            return None
        axis, copies = new[0] - 1, spread[new[0]]
        merged = (*shape[:axis], copies, *shape[axis + 1 :])
        inserted = (*shape[: axis + 1], copies, *shape[axis + 1 :])
        is_copied = shape[axis] == 1 and spread == inserted and eqn.params["new_sizes"] == merged
        return (source, copies, axis) if is_copied else None

    def joined_copies(self, eqn: Any, copied: tuple[int, int, int]) -> list[Atom]:
        """Copies one after the other: their gradient is a few shifted rows, no sum over rows."""
        source, copies, axis = copied
        if copies == 1:
            return [source]
        pieces = (source,) * copies
        return [*self.add(lax.concatenate_p, {"dimension": axis}, pieces, eqn.outvars)]

    def slice(
        self, operand: Atom, shape: Sequence[int], axis: int, start: int, out_aval: Any
    ) -> Atom:
        starts, limits = [0] * len(shape), list(shape)
        starts[axis], limits[axis] = start, start + out_aval.shape[axis]
        bounds = {"start_indices": tuple(starts), "limit_indices": tuple(limits)}
        params = {**bounds, "strides": None}
        return self.add(lax.slice_p, params, (operand,), [out_aval])[0]

    def is_unrolled(self, eqn: Any, inputs: Sequence[Atom]) -> bool:
        """A scan over layers: it takes rows, its steps are few, and they are not rows."""
        jaxpr, _ = open_jaxpr(eqn.params["jaxpr"])
        size = eqn.params["length"] * len(jaxpr.eqns)
        takes_rows = [isinstance(v, int) and v in self.rows for v in inputs]
        if not any(takes_rows) or size > MOST_UNROLLED or eqn.effects:
            return False
        is_along = self.is_along_rows(inputs[sum(scan_arity(eqn)) :])
        return not (is_along or _slices_at_run_time(jaxpr, takes_rows))

    def is_along_rows(self, scanned: Sequence[Atom]) -> bool:
        """Whether rows of one of these values run along its first axis."""
        asked = self.rows.intersection(values_of(scanned)) - self.pieces.keys()
        if not asked or self.typed is None:
            return False
        inputs = tuple(set(range(len(self.avals))) - {v for e in self.equations for v in e.outputs})
        program = FlatProgram(
            tuple(self.avals),
            tuple(self.equations),
            tuple(v for v in sorted(inputs) if v not in self.constants),
            tuple(asked),
            self.constants,
        )
        axes = self.typed(
            without_dead_equations(program), [self.axes.get(v) for v in program.inputs]
        )
        return any(axes.get(v) == 0 for v in asked)

    def unrolled(self, eqn: Any, inputs: Sequence[Atom]) -> list[Atom]:
        params = eqn.params
        length, (consts, carries) = params["length"], scan_arity(eqn)
        fixed, carry = list(inputs[:consts]), list(inputs[consts : consts + carries])
        slices = [
            self.unstacked(x, v.aval, length)
            for x, v in zip(inputs[consts + carries :], eqn.invars[consts + carries :], strict=True)
        ]
        made: list[list[Atom]] = [[] for _ in eqn.outvars[carries:]]
        for step in reversed(range(length)) if params["reverse"] else range(length):
            results = self.call(params["jaxpr"], [*fixed, *carry, *(x[step] for x in slices)])
            carry = results[:carries]
            for pieces, result in zip(made, results[carries:], strict=True):
                pieces.append(result)
        stacked = [
            self.stacked(pieces[::-1] if params["reverse"] else pieces, v.aval)
            for pieces, v in zip(made, eqn.outvars[carries:], strict=True)
        ]
        return [*carry, *stacked]

    def unstacked(self, operand: Atom, aval: Any, length: int) -> list[Atom]:
        """The slices of a scanned operand along its first axis."""
        if isinstance(operand, int) and operand in self.pieces:
            return self.pieces[operand]
        found: list[Atom] = []
        one, flat = (struct_like(aval, (*own, *aval.shape[1:])) for own in ((1,), ()))
        for step in range(length):
            row = self.slice(operand, aval.shape, 0, step, one)
            found += self.add(lax.squeeze_p, {"dimensions": (0,)}, (row,), [flat])
        return found

    def stacked(self, pieces: Sequence[Atom], aval: Any) -> Atom:
        """The stack of a scan's results; a scan that takes it finds the pieces again."""
        if not pieces:
            return self.constant(np.zeros(aval.shape, aval.dtype))
        rows: list[Atom] = []
        one = struct_like(aval, (1, *aval.shape[1:]))
        dimensions = tuple(range(1, len(aval.shape)))
        params = {"shape": one.shape, "broadcast_dimensions": dimensions, "sharding": None}
        for piece in pieces:
            rows += self.add(lax.broadcast_in_dim_p, params, (piece,), [one])
        (whole,) = self.add(lax.concatenate_p, {"dimension": 0}, tuple(rows), [aval])
        self.pieces[whole] = list(pieces)
        return whole

    def call(self, body: Any, inputs: Sequence[Atom]) -> list[Atom]:
        jaxpr, consts = open_jaxpr(body)
        return self.inline(jaxpr, [*map(self.constant, consts), *inputs])


def _slices_at_run_time(jaxpr: Any, takes_rows: Sequence[bool]) -> bool:
    """Whether a loop's body picks or writes parts of what depends on rows: it runs along them."""
    depends = set(itertools.compress(jaxpr.invars, takes_rows))
    for eqn in jaxpr.eqns:
        inputs = [v for v in eqn.invars if not isinstance(v, JaxLiteral)]
        is_slice = eqn.primitive in (lax.dynamic_slice_p, lax.dynamic_update_slice_p)
        if is_slice and eqn.invars[0] in depends:
            return True
        if depends.intersection(inputs):
            depends.update(eqn.outvars)
    return False


def without_dead_equations(program: FlatProgram) -> FlatProgram:
    """Drop equations that no output and no effect depends on."""
    alive = set(values_of(program.outputs))
    kept = []
    for equation in reversed(program.equations):
        if equation.has_effects or alive.intersection(equation.outputs):
            kept.append(equation)
            alive.update(equation.values)
    return dataclasses.replace(program, equations=tuple(reversed(kept)))


# --- Evaluation ----------------------------------------------------------------------------------


def evaluate(
    program: FlatProgram,
    inputs: Sequence[Any],
    *,
    is_tiled_later: bool = False,
    seen: Callable[[int, Any], Any] = lambda value, result: result,
) -> list[Any]:
    """Column execution of a flat program.

    Args:
      program: the program.
      inputs: its inputs.
      is_tiled_later: it is differentiated here and the gradient is tiled: see ``extremes``.
      seen: what stands for every value and its result, such as the result with a name.
    """
    values: dict[int, Any] = dict(program.constants)
    values.update(zip(program.inputs, inputs, strict=True))

    for equation in program.equations:
        operands = [array_of(v, values) for v in equation.inputs]
        results = equation.evaluate(operands, is_tiled_later)
        for v, result in zip(equation.outputs, results, strict=True):
            values[v] = seen(v, varying_over(result, varying_axes(program.avals[v])))
    return [array_of(v, values) for v in program.outputs]


def replaced_at(values: Sequence[Any], numbers: Sequence[int], others: Sequence[Any]) -> list[Any]:
    """The values, with others at some numbers."""
    found = list(values)
    for i, other in zip(numbers, others, strict=True):
        found[i] = other
    return found


def function_of(
    program: FlatProgram,
    wrt: Sequence[int],
    inputs: Sequence[Any],
) -> tuple[Callable[..., list[Any]], list[Any]]:
    """The program as a function of the inputs that are differentiated, and those inputs."""

    def function(*moving: Any) -> list[Any]:
        return evaluate(program, replaced_at(inputs, wrt, moving), is_tiled_later=True)

    return function, [inputs[i] for i in wrt]
