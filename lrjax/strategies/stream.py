"""Stream: differentiate first, then run by rows, in two top-down passes with line buffers.

JAX differentiates the whole function at full shape; its forward and its backward pass are two
programs that are local in rows, and each is a row graph of its own. Memory is then independent of
the image's height. The forward pass saves what ends a stage; all else is recomputed as cotangents
arrive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrjax.loop.offload import instantiated, is_on_host, scaled
from lrjax.program.inline import FlatProgram, evaluate, flatten, function_of, replaced_at
from lrjax.program.interpreter import collection_paused
from lrjax.program.references import reads_from_outside
from lrjax.program.varying import is_inexact, struct_like, varying_axes, varying_over
from lrjax.rowgraph.graph import RowGraph, build
from lrjax.rowgraph.row_mesh import RowMesh
from lrjax.rowgraph.segments import Segment
from lrjax.rules.base import Array
from lrjax.rules.dependence import has_custom_vjp, output_dependences
from lrjax.rules.linearity import Dependence
from lrjax.strategies.base import NOTHING_HOSTED, TOP_DOWN, Function, Strategy
from lrjax.strategies.one_pass import gradient_waits, needs_scale
from lrjax.strategies.programs import Axes, Residuals, RowPrograms, row_program, traced_graph
from lrjax.strategies.residuals import cotangent_axes, residuals


class Stream(Strategy):
    """Forward, then recompute and differentiate, each as one top-down pass: the least memory."""

    name = "stream"
    fate = "inputs kept, rows computed again in step with their gradients"
    order = TOP_DOWN
    starts_from_inputs = True

    def function(
        self,
        segment: Segment,
        num_blocks: int,
        given: Mapping[int, int] = NOTHING_HOSTED,
        taken: Mapping[int, int] = NOTHING_HOSTED,
    ) -> Function:
        return stream_function(segment.program, segment.axes, num_blocks, given, segment.row_mesh)

    def refusal(self, segment: Segment) -> str | None:
        if not reads_from_outside(segment.program.equations):
            return None
        return (
            "fun reads or writes a mutable array (jax.new_ref) that it does not make, and is "
            "traced again with its gradient; take the array's value as an argument and return the "
            "new one, or choose strategy '2ps'."
        )

    def execution(self, segment: Segment, num_blocks: int, wrt: Sequence[int]) -> RowPrograms:
        return stream_programs(segment.program, segment.axes, num_blocks, wrt, segment.row_mesh)


def stream_programs(
    program: FlatProgram,
    axes: Axes,
    num_blocks: int,
    wrt: Sequence[int],
    row_mesh: RowMesh | None = None,
) -> RowPrograms:
    """The passes that give the gradient with respect to some of the inputs."""
    undivided = forward, backward = stream_graphs(program, axes, tuple(wrt))
    return RowPrograms(
        row_program(forward, TOP_DOWN, num_blocks, row_mesh=row_mesh),
        None
        if backward is None
        else row_program(backward, TOP_DOWN, num_blocks, row_mesh=row_mesh),
        len(program.outputs),
        undivided,
    )


@collection_paused()
def stream_graphs(
    program: FlatProgram, axes: Axes, wrt: tuple[int, ...]
) -> tuple[RowGraph, RowGraph | None]:
    """The passes before they are divided into blocks; the same for every number of blocks."""
    known, key = _GRAPHS.setdefault(program, {}), (tuple(axes), wrt)
    if key not in known:
        one_pass = _value_and_gradient(program, axes, wrt)
        known[key] = _two_passes(program, axes, wrt) if one_pass is None else (one_pass, None)
    return known[key]


# For as long as the program lives, which is compared by identity.
_GRAPHS: weakref.WeakKeyDictionary[FlatProgram, dict[Any, tuple[RowGraph, RowGraph | None]]] = (
    weakref.WeakKeyDictionary()
)


def stream_function(
    program: FlatProgram,
    axes: Axes,
    num_blocks: int,
    hosted: Mapping[int, int] | None = None,
    row_mesh: RowMesh | None = None,
) -> Callable[..., list[Array]]:
    """The program as one top-down pass, and its gradient as another.

    The forward pass saves what ends a stage: reductions over rows and maps that column operations
    take whole. Everything else is recomputed as cotangents arrive. Where the only output is a
    scalar sum over rows, value and gradient are one pass and only late copies are done twice.

    Outputs of the numbers ``hosted`` (with their row axes), and gradients of inputs that come in
    the host's memory, are put there by blocks of rows.

    Of a ``row_mesh`` every device takes ``num_blocks`` steps on its share of the rows.
    """
    structs = program.structs

    @jax.custom_vjp
    def call(*inputs: Array) -> list[Array]:
        graph = traced_graph(lambda *xs: evaluate(program, xs), structs, axes)
        return row_program(graph, TOP_DOWN, num_blocks, row_mesh=row_mesh).run(inputs, hosted)

    def forward(*inputs: Any) -> Any:
        wrt = [
            i
            for i, (x, struct) in enumerate(zip(inputs, structs, strict=True))
            if x.perturbed and is_inexact(struct)
        ]
        programs = stream_programs(program, axes, num_blocks, wrt, row_mesh)
        count = len(program.outputs)
        returned = {
            k: axis
            for k, i in enumerate(wrt)
            if (axis := axes[i]) is not None and is_on_host(inputs[i].value)
        }
        own = dict(hosted or {})
        if programs.backward is None:
            own.update((count + k, axis) for k, axis in returned.items())
        results = programs.forward.run([x.value for x in inputs], own)
        static = wrt, programs.backward, returned
        return results[:count], Residuals(tuple(results[count:]), static)

    def backward(residuals: Residuals, cotangents: Sequence[Any]) -> tuple[Any, ...]:
        wrt, second, returned = residuals.static
        given = [instantiated(ct) for ct in cotangents]
        if second is None:
            (ct,) = given
            gradients = [
                scaled(g, ct, returned[k]) if k in returned else (g * ct).astype(g.dtype)
                for k, g in enumerate(residuals.arrays)
            ]
        else:
            inexact = [ct for ct in given if ct.dtype != jax.dtypes.float0]
            gradients = second.run([*residuals.arrays, *inexact], returned, after=cotangents)
        return tuple(replaced_at([None] * len(structs), wrt, gradients))

    call.defvjp(forward, backward, symbolic_zeros=True)
    return call


def _two_passes(program: FlatProgram, axes: Axes, wrt: Sequence[int]) -> tuple[RowGraph, RowGraph]:
    joint, saved, budget = residuals(program, axes, wrt)
    first, second = joint.divided(saved)
    forward = build(first, axes, budget=budget)
    taken = [*map(forward.axis_of, first.outputs[joint.count :])]
    given = cotangent_axes(build(program, axes))
    return forward, build(second, [*taken, *given], budget=budget)


def _value_and_gradient(program: FlatProgram, axes: Axes, wrt: Sequence[int]) -> RowGraph | None:
    """Value and gradient as one pass, where the program is a real scalar and nothing must wait."""
    if len(program.outputs) != 1 or not wrt:
        return None
    out = program.aval(program.outputs[0])
    if out.shape != () or not jnp.issubdtype(out.dtype, jnp.floating):
        return None
    if not all(varying_axes(out) <= varying_axes(program.structs[i]) for i in wrt):
        return None  # the gradient is a sum over devices, of products with a cotangent of each
    if gradient_waits(build(program, axes), wrt):
        return None

    def both(cotangent: Any, *inputs: Any) -> Any:
        function, moving = function_of(program, wrt, inputs)
        (value,), pull = jax.vjp(function, *moving)
        return value, *pull([cotangent])

    if not _has_linear_gradient(program, both, out):
        return None
    one, over = np.ones((), out.dtype), varying_axes(out)
    found = traced_graph(lambda *xs: both(varying_over(one, over), *xs), program.structs, axes)
    return None if len(found.loops) != 1 or needs_scale(found.program) else found


def _has_linear_gradient(
    program: FlatProgram, value_and_gradient: Callable[..., Any], out: Any
) -> bool:
    """Whether the gradient of a scalar is that for a cotangent of 1, times the cotangent.

    JAX's own derivatives are linear. A rule of a ``custom_vjp`` need not be (gradient clipping).
    """
    if not has_custom_vjp(program):
        return True
    struct = struct_like(out)
    traced = flatten(jax.make_jaxpr(value_and_gradient)(struct, *program.structs))
    _, *gradients = output_dependences(traced, traced.inputs[:1])
    return all(one in (Dependence.ADDITIVE, Dependence.ZERO) for one in gradients)
