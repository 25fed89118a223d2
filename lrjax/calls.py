"""Functions with their own derivatives (``custom_jvp``, ``custom_vjp``) on row blocks.

A program that is differentiated first never shows them: the traced gradient has their rules
inside. 2PS and OverL differentiate a step instead, so a call must stay one operation there, with
its own derivative on every block (``jax.nn.relu`` has slope 0 at 0, ``jnp.maximum`` 1/2).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrjax.geometry import IDENTITY
from lrjax.graph import RowGraph, build
from lrjax.inline import Literal, flatten
from lrjax.rules.base import Array, Equation, NotRowLocal, RowOp, RowRead, Rows, rule


@rule("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
def custom_call(equation: Equation) -> RowOp:
    """A call whose body and derivative are both row by row, operand row for output row."""
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
    is_tame = all(n.op is None or n.op.is_tame for g in (body, derivative) for n in g.nodes)
    return RowOp(reads, out_axes, equation.height, evaluate, flops=flops, is_tame=is_tame)


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


def _pointwise_graph(function: Any, structs: Sequence[Any], axes: Sequence[int | None]) -> RowGraph:
    program = flatten(jax.make_jaxpr(function)(*structs))
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
