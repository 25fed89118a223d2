"""Whether value and gradient of a scalar can be one pass over the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lrjax.program.inline import FlatProgram, dependents, flatten, function_of, values_of
from lrjax.program.varying import is_inexact, varying_axes, varying_over
from lrjax.rowgraph.graph import RowGraph
from lrjax.rules.linearity import reduces_precision


def gradient_waits(graph: RowGraph, wrt: Sequence[int]) -> bool:
    """Whether the gradient's rows need something that takes all rows of the forward pass.

    So it is behind a loss that is no sum over rows: of a mean's square, the cotangents of the rows
    are multiples of the mean. Only what follows the last row loop is differentiated here, which is
    much less than the whole.

    Args:
      graph: a program whose only result is a real scalar.
      wrt: numbers of the inputs that are differentiated.
    """
    if len(graph.loops) > 1:
        return True
    stages = range(1 + min(graph.loops, default=0), len(graph.stages.members))
    tail = [node.equation for stage in stages for node in graph.column_nodes(stage)]
    by_rows = {v for node in graph.row_nodes for v in node.equation.outputs}
    made = {v for equation in tail for v in equation.outputs} | graph.program.constants.keys()
    given = tuple(dict.fromkeys(v for e in tail for v in e.values if v not in made))
    moving = dependents(graph.program.equations, {graph.program.inputs[i] for i in wrt})
    moving &= graph.moving  # a callback, say, takes no tangents of what it gets without any
    avals = graph.program.avals
    on = [i for i, v in enumerate(given) if v in by_rows]
    asked = [i for i in on if given[i] in moving and is_inexact(avals[given[i]])]
    program = FlatProgram(avals, tuple(tail), given, graph.program.outputs, graph.program.constants)
    return bool(asked) and _gradient_depends(program, asked, on)


def _gradient_depends(program: FlatProgram, wrt: Sequence[int], on: Sequence[int]) -> bool:
    """Whether the gradient with respect to some inputs depends on the values of others."""
    out = program.aval(program.outputs[0])
    one = np.ones((), out.dtype)

    def gradient(*inputs: Any) -> Any:
        function, moving = function_of(program, wrt, inputs)
        _, pull = jax.vjp(function, *moving)
        return pull([varying_over(one, varying_axes(out))])

    traced = flatten(jax.make_jaxpr(gradient)(*program.structs))
    found = dependents(traced.equations, (traced.inputs[i] for i in on))
    return not found.isdisjoint(values_of(traced.outputs))


def needs_scale(program: FlatProgram) -> bool:
    """Whether a gradient may overflow, or vanish, unless its cotangent is scaled.

    So in float16 and float8, whose exponents have fewer bits than float32's, and where
    ``reduce_precision`` rounds as if to these. Scaling a loss against that (arXiv 1710.03740)
    scales what comes between, which a factor afterwards does not.
    """
    rounded = (e for e in program.equations if e.primitive is lax.reduce_precision_p)
    if any(reduces_precision(e.params, program.avals[e.outputs[0]].dtype) for e in rounded):
        return True
    made = [program.aval(v) for equation in program.equations for v in equation.outputs]
    return any(
        jnp.finfo(aval.dtype).maxexp < jnp.finfo(jnp.float32).maxexp
        for aval in made
        if is_inexact(aval)
    )
