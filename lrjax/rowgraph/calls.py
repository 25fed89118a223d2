"""Calls with derivatives of their own (``custom_jvp``, ``custom_vjp``) on blocks of rows.

A program that is differentiated first never shows them: the traced gradient has their rules
inside. 2PS and OverL differentiate a step instead, so a call must stay one operation there, with
its own derivative on every block (``jax.nn.relu`` has slope 0 at 0, ``jnp.maximum`` 1/2). That is
exact only if the rule is row by row and additive in the cotangents, which is proved from its jaxpr
and never assumed; a call that cannot be proved runs on whole maps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import primitives as public

from lrjax.program.inline import FlatEquation, FlatProgram, flatten, replaced_at
from lrjax.program.varying import is_inexact, varying_axes, varying_over
from lrjax.rowgraph.bodies import (
    is_positional,
    masked_rows,
    operations_per_row,
    pointwise_graph,
    preserves_finiteness,
    reducing_primitive,
    run_on_block,
)
from lrjax.rowgraph.graph import RowGraph, RowNode
from lrjax.rules.base import Array, Equation, NotRowLocal, Operand, RowOp, Rows, Rule, reads_along
from lrjax.rules.dependence import dependences, output_dependences
from lrjax.rules.linearity import Dependence
from lrjax.rules.traits import Kind, Traits

_MOST_KNOWN = 1024
_KNOWN: OrderedDict[Any, tuple[Equation, RowOp]] = OrderedDict()


def custom_call(equation: Equation) -> RowOp:
    """A call whose body is row by row, operand row for output row.

    Where its derivative is not, or is not proved additive, the operation says so when it is asked
    (``undifferentiable``): 2PS and OverL differentiate blocks, stream does not.

    A planner asks for the same calls again and again, and each answer takes several traces: they
    are remembered, by the identity of the parameters (which an entry keeps alive).
    """
    key = (
        equation.primitive,
        tuple((name, id(value)) for name, value in sorted(equation.params.items())),
        tuple((o.struct, o.row_axis) for o in equation.operands),
        equation.outputs,
    )
    if key not in _KNOWN:
        _KNOWN[key] = equation, _custom_call(equation)
    _KNOWN.move_to_end(key)
    while len(_KNOWN) > _MOST_KNOWN:
        _KNOWN.popitem(last=False)
    if _WATCHED is not None and _KNOWN[key][1].undifferentiable() is None:
        _WATCHED[key] = _KNOWN[key]
    return _KNOWN[key][1]


_WATCHED: dict[Any, tuple[Equation, RowOp]] | None = None


@contextlib.contextmanager
def watched() -> Iterator[dict[Any, tuple[Equation, RowOp]]]:
    """Collects the calls that are met while it is open and whose derivatives are proved."""
    global _WATCHED
    outer, _WATCHED = _WATCHED, {}
    try:
        yield _WATCHED
    finally:
        _WATCHED = outer


def _custom_call(equation: Equation) -> RowOp:
    structs, axes = equation.structs, [o.row_axis for o in equation.operands]
    name = _name_of(equation)
    try:
        body = _body(equation.bind, structs, axes)
    except NotRowLocal as reason:
        raise NotRowLocal(f"{name} is not row-local: {reason}") from None
    out_axes = tuple(map(body.axis_of, body.program.outputs))
    if any(axis is None for axis in out_axes):
        raise NotRowLocal(f"an output of {name} does not carry rows")

    @functools.cache
    def derivative() -> _Derivative | NotRowLocal:
        try:
            return _derivative(equation, out_axes)
        except NotRowLocal as reason:
            return reason

    def undifferentiable() -> str | None:
        found = derivative()
        if isinstance(found, _Derivative):
            return None
        return f"the derivative of {name} cannot be tiled: {found}"

    def evaluate(windows: Sequence[Array], rows: Rows) -> Sequence[Array]:
        pairs = zip(windows, equation.operands, strict=True)
        values = tuple(jnp.asarray(w, o.dtype) for w, o in pairs)
        found = derivative() if rows.is_differentiated or rows.keeps_rules else None
        if not isinstance(found, _Derivative):
            return run_on_block(body, values, rows, equation.height)
        return found.call(rows, values)

    return RowOp(
        reads=reads_along(axes),
        out_axes=out_axes,
        height=equation.height,
        evaluate=evaluate,
        flops=operations_per_row(body),
        preserves_finiteness=preserves_finiteness(body),
        is_positional=is_positional(body),
        undifferentiable=undifferentiable,
    )


def _name_of(equation: Equation) -> str:
    """The name of the function with the rule, for messages."""
    for name in ("call_jaxpr", "fun_jaxpr", "jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd"):
        info = getattr(equation.params.get(name), "debug_info", None)
        found = getattr(info, "func_name", None)
        if found:
            return f"{equation.primitive.name} of {found}"
    return equation.primitive.name


def _body(function: Any, structs: Sequence[Any], axes: Sequence[int | None]) -> RowGraph:
    body = pointwise_graph(function, structs, axes)
    reduces = reducing_primitive(body)
    if reduces is not None:
        raise NotRowLocal(f"{reduces} over rows")
    return body


# --- The derivative ------------------------------------------------------------------------------


def _derivative(equation: Equation, out_axes: Sequence[int | None]) -> _Derivative:
    """The call's derivative on blocks.

    Raises:
      NotRowLocal: it is not proved that the cotangents of blocks add up to those of the whole.
    """
    if not all(map(is_inexact, equation.outputs)):
        raise NotRowLocal("an output is an integer")
    structs, axes = equation.structs, [o.row_axis for o in equation.operands]
    wrt = differentiable_operands(equation)
    pull_back = functools.partial(_pull_back, equation, wrt)
    taken = _body(lambda *primals: _differentiable(equation, wrt, primals)[0], structs, axes)
    if [*map(taken.axis_of, taken.program.outputs)] != list(out_axes):
        raise NotRowLocal("its forward rule gives rows on other axes")
    graph = pointwise_graph(pull_back, [*structs, *equation.outputs], [*axes, *out_axes])
    cotangents = graph.program.inputs[len(structs) :]
    found = dependences(graph.program, cotangents)
    _check_reductions(graph, found)
    given = output_dependences(graph.program, cotangents)
    for i, atom, dependence in zip(wrt, graph.program.outputs, given, strict=True):
        axis = graph.axis_of(atom)
        if dependence not in (Dependence.ADDITIVE, Dependence.ZERO):
            raise NotRowLocal(f"the cotangent of operand {i} is not proved linear")
        if dependence is Dependence.ADDITIVE and axis != axes[i]:
            raise NotRowLocal(f"the cotangent of operand {i} carries rows on axis {axis}")
    is_zero = tuple(dependence is Dependence.ZERO for dependence in given)
    return _Derivative(equation, taken, graph, tuple(wrt), is_zero)


def has_additive_derivative(program: FlatProgram, call: FlatEquation) -> bool:
    """Whether the cotangents that a call gives, on whole arrays, are additive in those it gets."""
    operands = (Operand(a.shape, a.dtype, None) for a in map(program.aval, call.inputs))
    outputs = tuple(program.avals[v] for v in call.outputs)
    if not all(map(is_inexact, outputs)):
        return False
    equation = Equation(call.primitive, call.params, tuple(operands), outputs)
    wrt, structs = differentiable_operands(equation), equation.structs
    pull_back = functools.partial(_pull_back, equation, wrt)
    traced = flatten(jax.make_jaxpr(pull_back)(*structs, *outputs))
    found = output_dependences(traced, traced.inputs[len(structs) :])
    return all(one in (Dependence.ADDITIVE, Dependence.ZERO) for one in found)


def differentiable_operands(equation: Equation) -> list[int]:
    """Their numbers. What a ``custom_vjp`` closes over has no cotangents."""
    first = equation.params.get("num_consts", 0)
    return [i for i, o in enumerate(equation.operands) if i >= first and is_inexact(o)]


def _check_reductions(graph: RowGraph, found: dict[int, Dependence]) -> None:
    """Sums of cotangents over rows may leave the rule, and nothing else."""
    from_reductions: set[int] = set()
    for node in graph.nodes:
        name = node.equation.primitive.name
        if from_reductions.intersection(node.equation.values):
            if isinstance(node, RowNode):
                raise NotRowLocal("a reduction over rows is fed back to rows")
            from_reductions.update(node.equation.outputs)
        if isinstance(node, RowNode) and node.is_reduction:
            if node.op.reduction != "sum":
                raise NotRowLocal(f"{name} over rows")
            if any(found[v] is not Dependence.ADDITIVE for v in node.equation.outputs):
                raise NotRowLocal(f"{name} over rows of what is not proved linear in cotangents")
            from_reductions.update(node.equation.outputs)


def _differentiable(equation: Equation, wrt: Sequence[int], primals: Sequence[Array]) -> Any:
    """Outputs of the call as its forward rule gives them, and the pull-back."""

    def function(*moving: Array) -> list[Array]:
        return equation.bind(*replaced_at(primals, wrt, moving))

    return jax.vjp(function, *(primals[i] for i in wrt))


def _pull_back(equation: Equation, wrt: Sequence[int], *values: Array) -> list[Array]:
    primals, cotangents = values[: len(equation.operands)], values[len(equation.operands) :]
    return list(_differentiable(equation, wrt, primals)[1](list(cotangents)))


@dataclasses.dataclass(frozen=True, eq=False)
class _Derivative:
    """A call as a differentiable function of blocks.

    Attributes:
      equation: the call.
      taken: the outputs, as the forward rule gives them.
      graph: the cotangents of the operands ``wrt``, from operands and cotangents.
      is_zero: which of them are zero.
    """

    equation: Equation
    taken: RowGraph
    graph: RowGraph
    wrt: tuple[int, ...]
    is_zero: tuple[bool, ...]

    def call(self, rows: Rows, values: tuple[Array, ...]) -> Sequence[Array]:
        height = self.equation.height

        @jax.custom_vjp
        def call(rows: Rows, values: tuple[Array, ...]) -> list[Array]:
            return run_on_block(self.taken, values, rows, height)

        def forward(rows: Rows, values: tuple[Array, ...]) -> Any:
            return call(rows, values), (rows, values)

        def backward(residuals: Any, cotangents: Sequence[Array]) -> Any:
            rows, values = residuals
            return None, tuple(self.cotangents(rows, values, cotangents))

        call.defvjp(forward, backward)
        # A cotangent must have its operand's type, and it varies as the results' cotangents do.
        axes = frozenset[str]().union(*map(varying_axes, values))
        return call(rows, tuple(varying_over(value, axes) for value in values))

    def cotangents(
        self, rows: Rows, values: Sequence[Array], cotangents: Sequence[Array]
    ) -> list[Array | None]:
        """Of the operands, None for those that have none.

        The cotangents of rows outside the image are zero, and so is what the rule makes of them;
        set to zero they stay so where the rule divides by what such rows hold.
        """
        height = self.equation.height
        found = run_on_block(self.graph, [*values, *cotangents], rows, height)
        bars: list[Array | None] = [None] * len(values)
        for i, bar, is_zero in zip(self.wrt, found, self.is_zero, strict=True):
            axis = self.equation.operands[i].row_axis
            if is_zero:
                bars[i] = jnp.zeros_like(values[i])
            elif axis is None or preserves_finiteness(self.graph):
                bars[i] = bar
            else:
                bars[i] = masked_rows(bar, rows, axis, height, 0)
        return bars


RULES = (
    Rule(
        (public.custom_jvp_call_p, public.custom_vjp_call_p),
        custom_call,
        Traits(Kind.FUSED, preserves_finiteness=True),  # where their bodies do
    ),
)
