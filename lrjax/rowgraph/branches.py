"""Branches (``lax.cond``, ``lax.switch``) whose bodies are row by row: chosen in every step."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import jaxpr_as_fun

from lrjax.program.inline import FlatEquation, flatten
from lrjax.program.varying import varying_axes, varying_over
from lrjax.rowgraph.bodies import (
    is_positional,
    operations_per_row,
    pointwise_graph,
    preserves_finiteness,
    reducing_primitive,
    run_on_block,
)
from lrjax.rowgraph.graph import RowGraph
from lrjax.rules.base import (
    Array,
    Equation,
    NotRowLocal,
    RowOp,
    Rows,
    Rule,
    reads_along,
    with_at,
)
from lrjax.rules.dependence import output_dependences
from lrjax.rules.linearity import ADDITIVE, FIXED, UNKNOWN, ZERO, Dependence, of_sum
from lrjax.rules.traits import Kind, Traits


def branches(equation: Equation) -> RowOp:
    """Branches on a scalar whose bodies are all row by row: chosen anew in every step."""
    index, *operands = equation.operands
    if index.row_axis is not None:
        raise NotRowLocal("a branch that is chosen by rows")
    axes = [o.row_axis for o in operands]
    bodies, out_axes = _bodies(equation)

    def evaluate(windows: Sequence[Array], rows: Rows) -> Sequence[Array]:
        values = [jnp.asarray(w, o.dtype) for w, o in zip(windows[1:], operands, strict=True)]
        pairs = zip(equation.outputs, out_axes, strict=True)
        kept = [jnp.ones(with_at(out.shape, a, rows.count), np.bool_) for out, a in pairs]

        axes = frozenset[str]().union(*map(varying_axes, windows))  # results have equal types

        def run(body: RowGraph) -> Any:
            extra = kept if len(body.program.inputs) > len(values) else []

            def branch(*operands: Array) -> list[Array]:
                made = run_on_block(body, [*extra, *operands], rows, equation.height)
                return [varying_over(out, axes) for out in made]

            return branch

        return jax.lax.switch(windows[0], [run(body) for body in bodies], *values)

    def undifferentiable() -> str | None:
        reasons = (node.op.undifferentiable() for body in bodies for node in body.row_nodes)
        return next((reason for reason in reasons if reason is not None), None)

    return RowOp(
        reads_along((None, *axes)),
        out_axes,
        equation.height,
        evaluate,
        flops=max(map(operations_per_row, bodies)),
        preserves_finiteness=all(map(preserves_finiteness, bodies)),
        is_positional=any(map(is_positional, bodies)),
        undifferentiable=undifferentiable,
    )


def _bodies(equation: Equation) -> tuple[list[RowGraph], tuple[int, ...]]:
    """The branches with the row axis of every output.

    A branch some of whose outputs do not depend on rows takes an array of ones more for each
    output, which gives them rows.
    """
    operands = equation.operands[1:]
    structs = equation.structs[1:]
    axes = [o.row_axis for o in operands]
    functions = [jaxpr_as_fun(branch) for branch in equation.params["branches"]]
    found = [_branch_graph(function, structs, axes) for function in functions]
    out_axes = _out_axes(equation, found)
    masks = [jax.ShapeDtypeStruct(out.shape, np.bool_) for out in equation.outputs]
    bodies = [
        graph
        if all(graph.axis_of(v) is not None for v in graph.program.outputs)
        else _branch_graph(
            functools.partial(_with_rows, function, len(masks)),
            [*masks, *structs],
            [*out_axes, *axes],
        )
        for function, graph in zip(functions, found, strict=True)
    ]
    for body in bodies:
        _check_one_row(equation, body, out_axes)
    return bodies, out_axes


def _check_one_row(equation: Equation, body: RowGraph, out_axes: Sequence[int]) -> None:
    """A branch must make a row from a row; one may give a map that is whole in it."""
    inputs = [
        jax.ShapeDtypeStruct(
            struct.shape if axis is None else with_at(struct.shape, axis, 1), struct.dtype
        )
        for v, struct in zip(body.program.inputs, body.program.structs, strict=True)
        for axis in [body.row_axis.get(v)]
    ]
    try:
        made = jax.eval_shape(lambda *xs: run_on_block(body, xs, Rows(0, 1), 1), *inputs)
    except TypeError as error:
        raise NotRowLocal(f"a branch takes rows of a whole map ({error})") from None
    if any(out.shape[axis] != 1 for out, axis in zip(made, out_axes, strict=True)):
        raise NotRowLocal("a branch gives a map that exists whole")


def _out_axes(equation: Equation, found: Sequence[RowGraph]) -> tuple[int, ...]:
    out_axes: list[int] = []
    per_output = zip(*(graph.program.outputs for graph in found), strict=True)
    for out, outputs in zip(equation.outputs, per_output, strict=True):
        axes = (graph.axis_of(v) for graph, v in zip(found, outputs, strict=True))
        named = {axis for axis in axes if axis is not None}
        if not named and equation.height in out.shape[equation.row_axis : equation.row_axis + 1]:
            named = {equation.row_axis}  # the same for all rows in every branch
        if len(named) != 1:
            raise NotRowLocal("an output of a branch carries no rows, or on different axes")
        out_axes.append(named.pop())
    return tuple(out_axes)


def _branch_graph(function: Any, structs: Sequence[Any], axes: Sequence[int | None]) -> RowGraph:
    try:
        graph = pointwise_graph(function, structs, axes, keep_custom_rules=True)
    except NotRowLocal as reason:
        raise NotRowLocal(f"a branch is not row-local: {reason}") from None
    if reducing_primitive(graph) is not None:
        raise NotRowLocal("a branch reduces over rows")
    return graph


def _with_rows(function: Any, count: int, *arrays: Array) -> list[Array]:
    """The function's results as row values, where some do not depend on rows."""
    pairs = zip(arrays[:count], function(*arrays[count:]), strict=True)
    return [jax.lax.select(keep, out, jnp.zeros_like(out)) for keep, out in pairs]


def _linearity(equation: FlatEquation, given: Sequence[Dependence]) -> list[Dependence]:
    """Additive where every branch is."""
    index, *operands = given
    if index not in (FIXED, ZERO) or UNKNOWN in operands:
        return [UNKNOWN] * len(equation.outputs)
    per_branch = []
    for branch in equation.params["branches"]:
        program = flatten(branch)
        moving = [v for v, d in zip(program.inputs, operands, strict=True) if d is ADDITIVE]
        per_branch.append(output_dependences(program, moving))
    return [of_sum(choices, ()) for choices in zip(*per_branch, strict=True)]


RULES = (
    Rule(
        (lax.cond_p,),
        branches,
        Traits(Kind.LIBRARY, preserves_finiteness=True, linearity=_linearity),
    ),
)
