"""Equations with bodies on row blocks: own derivatives (``custom_jvp``, ``custom_vjp``), branches.

A program that is differentiated first never shows them: the traced gradient has their rules
inside. 2PS and OverL differentiate a step instead, so a call must stay one operation there, with
its own derivative on every block (``jax.nn.relu`` has slope 0 at 0, ``jnp.maximum`` 1/2).
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from lrjax.geometry import IDENTITY
from lrjax.graph import RowGraph, build
from lrjax.inline import Literal, flatten
from lrjax.rules.base import Array, Equation, NotRowLocal, RowOp, RowRead, Rows, rule

_MOST_KNOWN = 1024
_KNOWN: OrderedDict[Any, tuple[Equation, RowOp]] = OrderedDict()


@rule("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
def custom_call(equation: Equation) -> RowOp:
    """A call whose body and derivative are both row by row, operand row for output row.

    A planner asks for the same calls again and again, and each answer takes two traces: they are
    remembered, by the identity of the parameters (which an entry keeps alive).
    """
    key = (
        equation.primitive,
        tuple((name, id(value)) for name, value in sorted(equation.params.items())),
        tuple((o.shape, o.dtype, o.row_axis) for o in equation.operands),
        tuple((out.shape, out.dtype) for out in equation.outputs),
    )
    if key not in _KNOWN:
        _KNOWN[key] = equation, _custom_call(equation)
    _KNOWN.move_to_end(key)
    while len(_KNOWN) > _MOST_KNOWN:
        _KNOWN.popitem(last=False)
    return _KNOWN[key][1]


def _custom_call(equation: Equation) -> RowOp:
    operands = equation.operands
    structs = [jax.ShapeDtypeStruct(o.shape, o.dtype) for o in operands]
    axes = [o.row_axis for o in operands]
    body = _pointwise_graph(equation.bind, structs, axes)
    out_axes = tuple(_axis_of(body, v) for v in body.program.outputs)
    if any(axis is None for axis in out_axes):
        raise NotRowLocal("an output of the call does not carry rows")
    wrt = [i for i, o in enumerate(operands) if jnp.issubdtype(o.dtype, jnp.inexact)]
    if not all(jnp.issubdtype(out.dtype, jnp.inexact) for out in equation.outputs):
        raise NotRowLocal("an integer output of a function with its own derivative")
    derivative = _pointwise_graph(
        functools.partial(_pull_back, equation, wrt),
        [*structs, *equation.outputs],
        [*axes, *out_axes],
    )

    @jax.custom_vjp
    def call(rows: Any, values: tuple[Array, ...]) -> list[Array]:
        return _run_block(body, values, Rows(*rows))

    def forward(rows: Any, values: tuple[Array, ...]) -> Any:
        return call(rows, values), (rows, values)

    def backward(residuals: Any, cotangents: Sequence[Array]) -> Any:
        rows, values = residuals
        found = _run_block(derivative, [*values, *cotangents], Rows(*rows))
        bars: list[Any] = [None] * len(values)
        for i, bar in zip(wrt, found, strict=True):
            bars[i] = bar
        return None, tuple(bars)

    call.defvjp(forward, backward)

    def evaluate(windows: Sequence[Array], rows: Rows) -> Sequence[Array]:
        values = tuple(jnp.asarray(w, o.dtype) for w, o in zip(windows, operands, strict=True))
        return call(_StaticRows(rows.start, rows.count), values)

    reads = tuple(None if axis is None else RowRead(IDENTITY, axis) for axis in axes)
    flops = sum(node.op.flops for node in body.nodes if node.op is not None)
    bodies = body, derivative
    return RowOp(
        reads,
        out_axes,
        equation.height,
        evaluate,
        flops=flops,
        is_tame=_is_tame(bodies),
        is_positional=_is_positional(bodies),
    )


@rule("cond")
def branches(equation: Equation) -> RowOp:
    """Branches on a scalar whose bodies are all row by row: chosen anew in every step."""
    index, *operands = equation.operands
    if index.row_axis is not None:
        raise NotRowLocal("a branch that is chosen by rows")
    structs = [jax.ShapeDtypeStruct(o.shape, o.dtype) for o in operands]
    axes = [o.row_axis for o in operands]
    functions = [jaxpr_as_fun(branch) for branch in equation.params["branches"]]
    found = [_branch_graph(function, structs, axes) for function in functions]
    out_axes: list[int] = []
    per_output = zip(*(graph.program.outputs for graph in found), strict=True)
    for out, outputs in zip(equation.outputs, per_output, strict=True):
        pairs = zip(found, outputs, strict=True)
        axes_of_output = (_axis_of(graph, v) for graph, v in pairs)
        named = {axis for axis in axes_of_output if axis is not None}
        if not named and equation.height in out.shape[equation.row_axis : equation.row_axis + 1]:
            named = {equation.row_axis}  # the same for all rows in every branch
        if len(named) != 1:
            raise NotRowLocal("an output of a branch carries no rows, or on different axes")
        out_axes.append(named.pop())
    outs = equation.outputs
    bodies = [
        graph
        if all(_axis_of(graph, v) is not None for v in graph.program.outputs)
        else _branch_graph(
            functools.partial(_with_rows, function),
            [[jax.ShapeDtypeStruct(out.shape, np.bool_) for out in outs], *structs],
            [*out_axes, *axes],
        )
        for function, graph in zip(functions, found, strict=True)
    ]

    def evaluate(windows: Sequence[Array], rows: Rows) -> Sequence[Array]:
        values = [jnp.asarray(w, o.dtype) for w, o in zip(windows[1:], operands, strict=True)]
        shapes = (
            _with_size(out.shape, a, rows.count) for out, a in zip(outs, out_axes, strict=True)
        )
        kept = [jnp.ones(shape, np.bool_) for shape in shapes]

        def run(body: RowGraph, plain: RowGraph) -> Any:
            extra = [] if body is plain else kept
            return lambda *operands: _run_block(body, [*extra, *operands], rows)

        choices = [run(body, plain) for body, plain in zip(bodies, found, strict=True)]
        return jax.lax.switch(windows[0], choices, *values)

    flops = max(sum(n.op.flops for n in g.nodes if n.op is not None) for g in bodies)
    reads = tuple(None if axis is None else RowRead(IDENTITY, axis) for axis in axes)
    return RowOp(
        (None, *reads),
        tuple(out_axes),
        equation.height,
        evaluate,
        flops=flops,
        is_tame=_is_tame(bodies),
        is_positional=_is_positional(bodies),
    )


def _is_tame(bodies: Sequence[RowGraph]) -> bool:
    return all(n.op is None or n.op.is_tame for body in bodies for n in body.nodes)


def _is_positional(bodies: Sequence[RowGraph]) -> bool:
    return any(n.op is not None and n.op.is_positional for body in bodies for n in body.nodes)


def _branch_graph(function: Any, structs: Sequence[Any], axes: Sequence[int | None]) -> RowGraph:
    graph = _pointwise_graph(function, structs, axes, keep_custom_rules=True)
    if any(node.is_reduction for node in graph.nodes):
        raise NotRowLocal("a branch reduces over rows")
    return graph


def _with_rows(function: Any, kept: Sequence[Array], *operands: Array) -> list[Array]:
    """The function's results as row values, where some do not depend on rows."""
    pairs = zip(kept, function(*operands), strict=True)
    return [jax.lax.select(keep, out, jnp.zeros_like(out)) for keep, out in pairs]


def _with_size(shape: Sequence[int], axis: int, size: int) -> tuple[int, ...]:
    return tuple(size if a == axis else s for a, s in enumerate(shape))


@jax.tree_util.register_pytree_node_class
class _StaticRows(tuple):
    """Rows of a block as an argument of a custom_vjp: the start is a leaf, the count is not."""

    def __new__(cls, start: Any, count: int) -> _StaticRows:
        return super().__new__(cls, (start, count))

    def tree_flatten(self) -> tuple[tuple[Any], int]:
        return (self[0],), self[1]

    @classmethod
    def tree_unflatten(cls, count: int, leaves: Sequence[Any]) -> _StaticRows:
        return cls(leaves[0], count)


def _pull_back(equation: Equation, wrt: Sequence[int], *values: Array) -> list[Array]:
    primals, cotangents = values[: len(equation.operands)], values[len(equation.operands) :]

    def function(*moving: Array) -> list[Array]:
        operands = list(primals)
        for i, value in zip(wrt, moving, strict=True):
            operands[i] = value
        return equation.bind(*operands)

    _, pull = jax.vjp(function, *(primals[i] for i in wrt))
    return list(pull(list(cotangents)))


def _pointwise_graph(
    function: Any,
    structs: Sequence[Any],
    axes: Sequence[int | None],
    keep_custom_rules: bool = False,
) -> RowGraph:
    traced = jax.make_jaxpr(function)(*structs)
    program = flatten(traced, keep_custom_rules=keep_custom_rules)
    if any(np.ndim(c) for c in program.constants.values()):
        raise NotRowLocal("the call closes over an array")
    graph = build(program, axes)
    for node in graph.nodes:
        if node.reason is not None:
            raise NotRowLocal(f"the call is not row-local: {node.reason}")
        if node.op is None:
            continue
        if node.op.reduction not in (None, "sum"):
            raise NotRowLocal("the call reduces over rows")
        if any(read is not None and read.row_map != IDENTITY for read in node.op.reads):
            raise NotRowLocal("the call mixes neighbouring rows")
        if any(v not in graph.row_axis for v in node.row_inputs()):
            raise NotRowLocal("the call makes a whole map and reads its rows")
    return graph


def _axis_of(graph: RowGraph, atom: Any) -> int | None:
    return graph.row_axis.get(atom) if isinstance(atom, int) else None


def _run_block(graph: RowGraph, inputs: Sequence[Array], rows: Rows) -> list[Array]:
    values: dict[int, Any] = dict(graph.program.constants)
    values.update(zip(graph.program.inputs, inputs, strict=True))

    def read(atom: Any) -> Any:
        return jnp.asarray(atom.value, atom.dtype) if isinstance(atom, Literal) else values[atom]

    for node in graph.nodes:
        operands = [read(v) for v in node.equation.inputs]
        if node.op is None:
            results: Sequence[Any] = node.equation.evaluate(operands)
        else:
            with node.equation.origin():
                results = node.op.evaluate(operands, rows)
        values.update(zip(node.equation.outputs, results, strict=True))
    return [read(v) for v in graph.program.outputs]
