"""The three orders as differentiable functions: stream, 2PS and OverL.

This module alone knows that there are two passes. Stream differentiates first and then tiles: the
forward and the backward program are two row graphs. 2PS and OverL (LR-CNN, arXiv 2401.11471) tile
first: one forward graph, whose step is differentiated by ``jax.vjp`` in a reverse loop.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lrjax.loop import engine
from lrjax.loop.blocks import read_rows, write_rows
from lrjax.loop.clock import Clock, clock_of
from lrjax.loop.full_after import full_after, full_like, latest_of
from lrjax.loop.line_buffers import Values, reader_of
from lrjax.loop.offload import instantiated, is_on_host, scaled, to_host
from lrjax.loop.rowloop import RowLoop, row_loop
from lrjax.program import linearity
from lrjax.program.comparisons import simpler_comparisons
from lrjax.program.compatibility import checkpoint
from lrjax.program.inline import (
    FlatEquation,
    FlatProgram,
    evaluate,
    flatten,
    function_of,
)
from lrjax.program.linearity import Dependence
from lrjax.program.varying import struct_like, varying_axes, varying_over
from lrjax.rowgraph import branches as _branches  # noqa: F401  registers its rule
from lrjax.rowgraph import calls as _calls  # noqa: F401  registers its rules
from lrjax.rowgraph.graph import RowGraph, build
from lrjax.rules.base import Array, RowOp
from lrjax.rules.masks import keep_rows
from lrjax.strategies.late import with_late_copies
from lrjax.strategies.one_pass import gradient_waits
from lrjax.strategies.residuals import residuals

Axes = Sequence[int | None]


@dataclasses.dataclass(frozen=True)
class RowProgram:
    """A function as a row graph with a row loop per stage, in one order."""

    graph: RowGraph
    loops: tuple[RowLoop | None, ...]

    def run(
        self,
        inputs: Sequence[Array],
        hosted: Mapping[int, int] | None = None,
        after: Sequence[Any] = (),
    ) -> list[Array]:
        """Outputs; those of the numbers ``hosted`` are put in the host's memory, by row axis.

        Nothing that loops start with exists before the arrays ``after``.
        """
        run = functools.partial(engine.run_loop, after=latest_of(after))
        return engine.run_graph(self.graph, self.loops, inputs, run, hosted)


def row_program(
    graph: RowGraph, order: str, num_blocks: int, recomputed: frozenset[int] = frozenset()
) -> RowProgram:
    """A row loop per stage; halo rows of ``recomputed`` values are computed again, not kept."""

    made: dict[tuple[int, int], RowLoop] = {}

    def loop_of(graph: RowGraph, stage: int) -> RowLoop:
        key = id(graph), stage  # a loop keeps its graph, so that no other has this identity
        if key not in made:
            made[key] = row_loop(
                graph,
                stage,
                order=order,
                num_blocks=num_blocks,
                is_differentiated=order != "stream",
                recomputed=recomputed,
            )
        return made[key]

    if order == "stream" and num_blocks > 1:
        for stage in graph.loops:
            graph = with_late_copies(graph, stage, loop_of)
    loops = [
        loop_of(graph, stage) if members else None
        for stage, members in enumerate(graph.stages.members)
    ]
    return RowProgram(graph, tuple(loops))


def traced_graph(
    function: Callable[..., Any], structs: Sequence[Any], axes: Axes, budget: float = math.inf
) -> RowGraph:
    """Trace any function of arrays at full shape, as a row graph."""
    program = simpler_comparisons(flatten(jax.make_jaxpr(function)(*structs)))
    return build(program, axes, budget=budget)


# --- Stream --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StreamPrograms:
    """Forward pass (outputs, then residuals) and backward pass; None where both are one pass."""

    forward: RowProgram
    backward: RowProgram | None


def stream_programs(
    program: FlatProgram, axes: Axes, num_blocks: int, wrt: Sequence[int]
) -> StreamPrograms:
    """The passes that give the gradient with respect to some of the inputs."""
    forward, backward = stream_graphs(program, axes, tuple(wrt))
    return StreamPrograms(
        row_program(forward, "stream", num_blocks),
        None if backward is None else row_program(backward, "stream", num_blocks),
    )


def stream_graphs(
    program: FlatProgram, axes: Axes, wrt: tuple[int, ...]
) -> tuple[RowGraph, RowGraph | None]:
    """The passes before they are divided into blocks; the same for every number of blocks."""
    key = id(program), tuple(axes), wrt
    if key not in _GRAPHS:
        one_pass = _value_and_gradient(program, axes, wrt)
        _GRAPHS[key] = _two_passes(program, axes, wrt) if one_pass is None else (one_pass, None)
        weakref.finalize(program, _GRAPHS.pop, key, None)
    return _GRAPHS[key]


# By the identity of a program, for as long as it lives.
_GRAPHS: dict[Any, tuple[RowGraph, RowGraph | None]] = {}


def stream(
    program: FlatProgram, axes: Axes, num_blocks: int, hosted: Mapping[int, int] | None = None
) -> Callable[..., list[Array]]:
    """The program as one top-down pass, and its gradient as another.

    The forward pass saves what ends a stage: reductions over rows and maps that column operations
    take whole. Everything else is recomputed as cotangents arrive. Where the only output is a
    scalar sum over rows, value and gradient are one pass and only late copies are done twice.

    Outputs of the numbers ``hosted`` (with their row axes), and gradients of inputs that come in
    the host's memory, are put there by blocks of rows.
    """
    structs = program.structs

    @jax.custom_vjp
    def call(*inputs: Array) -> list[Array]:
        graph = traced_graph(lambda *xs: evaluate(program, xs), structs, axes)
        return row_program(graph, "stream", num_blocks).run(inputs, hosted)

    def forward(*inputs: Any) -> Any:
        wrt = [
            i
            for i, (x, struct) in enumerate(zip(inputs, structs, strict=True))
            if x.perturbed and jnp.issubdtype(struct.dtype, jnp.inexact)
        ]
        programs = stream_programs(program, axes, num_blocks, wrt)
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
        return results[:count], _Residuals(tuple(results[count:]), static)

    def backward(residuals: _Residuals, cotangents: Sequence[Any]) -> tuple[Any, ...]:
        wrt, second, returned = residuals.static
        given = [instantiated(ct) for ct in cotangents]
        if second is None:
            (ct,) = given
            gradients = [
                scaled(g, ct, returned[k])
                if k in returned
                else (g * ct.astype(g.dtype)).astype(g.dtype)
                for k, g in enumerate(residuals.arrays)
            ]
        else:
            inexact = [ct for ct in given if ct.dtype != jax.dtypes.float0]
            gradients = second.run([*residuals.arrays, *inexact], returned, after=cotangents)
        bars: list[Any] = [None] * len(structs)
        for i, gradient in zip(wrt, gradients, strict=True):
            bars[i] = gradient
        return tuple(bars)

    call.defvjp(forward, backward, symbolic_zeros=True)
    return call


@jax.tree_util.register_pytree_node_class
class _Residuals:
    """Arrays from a forward rule to its backward rule, with static company."""

    def __init__(self, arrays: Any, static: Any):
        self.arrays, self.static = arrays, static

    def tree_flatten(self) -> tuple[tuple[Any], _ByIdentity]:
        return (self.arrays,), _ByIdentity(self.static)

    @classmethod
    def tree_unflatten(cls, static: _ByIdentity, children: tuple[Any]) -> _Residuals:
        return cls(children[0], static.value)


class _ByIdentity:
    """Static data of a pytree, compared by identity."""

    def __init__(self, value: Any):
        self.value = value


def _two_passes(program: FlatProgram, axes: Axes, wrt: Sequence[int]) -> tuple[RowGraph, RowGraph]:
    saved = residuals(program, axes, wrt)
    policy = jax.checkpoint_policies.save_only_these_names(*saved.names.values())
    tree: Any = None

    def forward(*inputs: Any) -> Any:
        nonlocal tree
        function, moving = function_of(program, wrt, inputs, saved.names)
        outputs, pull = jax.vjp(checkpoint(function, policy), *moving)
        leaves, tree = jax.tree.flatten(pull)
        return outputs, leaves

    try:
        graph = traced_graph(forward, program.structs, axes, saved.budget)
    except NotImplementedError as error:
        _explain_effects(program, error)
        raise
    count = len(program.outputs)
    outputs = [program.aval(v) for v in program.outputs]
    structs = [
        struct_like(a) for a in (graph.program.aval(v) for v in graph.program.outputs[count:])
    ]
    inexact = [i for i, out in enumerate(outputs) if jnp.issubdtype(out.dtype, jnp.inexact)]

    def backward(*arrays: Any) -> Any:
        leaves, moving = list(arrays[: len(structs)]), arrays[len(structs) :]
        # Indices that the function closes over stay known, so that rules may look at them.
        known = graph.program.constants
        for i, v in enumerate(graph.program.outputs[count:]):
            leaves[i] = known.get(v, leaves[i]) if isinstance(v, int) else leaves[i]
        cotangents = [np.zeros(out.shape, jax.dtypes.float0) for out in outputs]
        for i, ct in zip(inexact, moving, strict=True):
            cotangents[i] = ct
        return jax.tree.unflatten(tree, leaves)(cotangents)

    out_axes = _out_axes(graph)
    second = traced_graph(
        backward,
        [*structs, *(outputs[i] for i in inexact)],
        [*out_axes[count:], *(out_axes[i] for i in inexact)],
        saved.budget,
    )
    return graph, second


def _explain_effects(program: FlatProgram, error: Exception) -> None:
    names = sorted({e.primitive.name for e in program.equations if e.has_effects})
    if names:
        raise ValueError(
            f"strategy 'stream' recomputes the forward pass, and {', '.join(names)} in fun has an "
            f"effect that must not happen twice ({error}). Use strategy '2ps', 'overl' or 'column' "
            "for its segment, or call it outside of fun."
        ) from error


def _out_axes(graph: RowGraph) -> list[int | None]:
    outputs = graph.program.outputs
    return [graph.row_axis.get(v) if isinstance(v, int) else None for v in outputs]


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
    return found if len(found.loops) == 1 else None


def _has_linear_gradient(
    program: FlatProgram, value_and_gradient: Callable[..., Any], out: Any
) -> bool:
    """Whether the gradient of a scalar is that for a cotangent of 1, times the cotangent.

    JAX's own derivatives are linear. A rule of a ``custom_vjp`` need not be (gradient clipping).
    """
    if not linearity.has_custom_vjp(program):
        return True
    struct = struct_like(out)
    traced = flatten(jax.make_jaxpr(value_and_gradient)(struct, *program.structs))
    _, *gradients = linearity.output_dependences(traced, traced.inputs[:1])
    return all(one in (Dependence.ADDITIVE, Dependence.ZERO) for one in gradients)


# --- 2PS and OverL -------------------------------------------------------------------------------


def _differentiable_in_blocks(equation: FlatEquation, op: RowOp) -> str | None:
    if op.reduction in ("max", "min", "prod"):
        return f"{equation.primitive.name} over rows has no gradient block by block"
    return op.undifferentiable


def differentiable_program(
    program: FlatProgram, axes: Axes, order: str, num_blocks: int
) -> RowProgram:
    """The forward program of 2PS or OverL, whose steps can be differentiated one by one."""
    return row_program(build(program, axes, _differentiable_in_blocks), order, num_blocks)


def two_phase_or_overlap(
    program: FlatProgram,
    axes: Axes,
    order: str,
    num_blocks: int,
    hosted: Mapping[int, int] | None = None,
) -> Callable[..., list[Array]]:
    """The paper's orders: row loops that are differentiated step by step, in reverse."""
    rows = differentiable_program(program, axes, order, num_blocks)

    def call(*inputs: Array) -> list[Array]:
        return engine.run_graph(
            rows.graph, rows.loops, inputs, run=_differentiable_loop, hosted=hosted
        )

    return call


def _differentiable_loop(loop: RowLoop, values: Values, hosted: Collection[int] = ()) -> Values:
    """A row loop whose row outputs exist whole on the device, whatever is ``hosted`` later."""
    del hosted
    names = tuple(dict.fromkeys((*loop.arrays, *loop.wholes)))

    @jax.custom_vjp
    def call(inputs: Values) -> Values:
        return engine.run_loop(dataclasses.replace(loop, is_differentiated=False), inputs)

    def forward(inputs: dict[int, Any]) -> Any:
        perturbed = frozenset(v for v in names if inputs[v].perturbed)
        plain = {v: inputs[v].value for v in names}
        outputs, lines = _run_and_save_lines(loop, plain)
        return outputs, _Residuals((plain, lines), perturbed)

    def backward(residuals: _Residuals, cotangents: Values) -> tuple[dict[int, Any]]:
        inputs, lines = residuals.arrays
        bars = _reverse_loop(loop, inputs, lines, cotangents, residuals.static)
        return ({v: bars.get(v) for v in names},)

    call.defvjp(forward, backward, symbolic_zeros=True)
    found, moving = call({v: values[v] for v in names}), loop.graph.moving
    return {v: x if v in moving else _without_tangent(x) for v, x in found.items()}


def _without_tangent(value: Array) -> Array:
    """Give a value the symbolic zero tangent that it has in column.

    A ``custom_vjp`` gives its outputs tangents (integers a float0 array), on which a primitive
    without a differentiation rule fails. ``x | x`` has a rule, and XLA removes it.
    """
    is_integer = jnp.issubdtype(value.dtype, np.integer) or value.dtype == np.bool_
    return lax.bitwise_or(value, value) if is_integer else lax.stop_gradient(value)


def _run_and_save_lines(loop: RowLoop, values: Values) -> tuple[Values, Values]:
    """The forward loop, keeping the line buffers that every step starts with."""
    clock = clock_of(loop)

    def step(carry: Any, row: Any) -> Any:
        lines, outputs, sums = carry
        now = clock.at(row)
        windows = engine.slice_windows(loop, now, values)
        result = engine.run_step(loop, now, lines, windows, values)
        outputs = engine.write_outputs(loop, now, outputs, result.rows)
        return (result.lines, outputs, engine.add_partial(loop, sums, result.partial)), lines

    start = engine.start_of(loop, values)
    (_, outputs, sums), saved = lax.scan(step, start, clock.table())
    return {**outputs, **engine.finished_sums(loop, sums)}, saved


def _inexact(values: dict[Any, Any]) -> dict[Any, Any]:
    return {k: v for k, v in values.items() if jnp.issubdtype(v.dtype, jnp.inexact)}


def _reverse_loop(
    loop: RowLoop, values: Values, saved: Values, cotangents: Values, perturbed: frozenset[int]
) -> Values:
    """Walk the steps in reverse: halo gradients flow to the step above through the line buffers."""
    clock = clock_of(loop)
    avals = loop.graph.program.avals
    moving_arrays = [v for v in _inexact(values) if v in loop.arrays and v in perturbed]
    full = full_after(cotangents.values())
    cotangents = {v: instantiated(ct) for v, ct in cotangents.items()}
    array_bars = {v: full_like(full, values[v]) for v in moving_arrays}
    wholes = {v: values[v] for v in loop.wholes}
    moving_wholes = {v: a for v, a in _inexact(wholes).items() if v in perturbed}
    readers = {v: reader_of(loop, v) for v in moving_wholes}
    whole_bars = {}
    for v, a in moving_wholes.items():
        with readers[v].origin():
            whole_bars[v] = full_like(full, a, dtype=engine.accumulator_dtype(a.dtype))
    moving_windows = {(s.node, s.operand): s for s in loop.sliced if s.value in array_bars}

    def step(carry: Any, row_and_lines: Any) -> Any:
        line_bars, array_bars, whole_bars = carry
        row, lines = row_and_lines
        now = clock.at(row)
        windows = engine.slice_windows(loop, now, values)

        def function(lines_in: Values, windows_in: Any, wholes_in: Values) -> Any:
            result = engine.run_step(
                loop, now, {**lines, **lines_in}, {**windows, **windows_in}, {**wholes, **wholes_in}
            )
            return _inexact(result.lines), _inexact(result.rows), _inexact(result.partial)

        moving = {name: windows[name] for name in moving_windows}
        outputs, pull = jax.vjp(function, _inexact(lines), moving, moving_wholes)
        row_bars = {v: _owned_rows(loop, now, v, cotangents[v]) for v in outputs[1]}
        sum_bars = {v: cotangents[v].astype(x.dtype) for v, x in outputs[2].items()}
        line_bars, window_bars, partial = pull((line_bars, row_bars, sum_bars))
        for name, source in moving_windows.items():
            array_bars = {
                **array_bars,
                source.value: write_rows(
                    array_bars[source.value],
                    window_bars[name],
                    now["window", *name],
                    source.read.axis,
                    now.bounds(("window", *name)),
                    jnp.add,
                ),
            }
        added = {}
        for v, bar in whole_bars.items():
            with readers[v].origin():
                added[v] = bar + partial[v].astype(bar.dtype)
        return (line_bars, array_bars, added), None

    start = (
        {v: full_like(full, x, shape=x.shape[1:]) for v, x in _inexact(saved).items()},
        array_bars,
        whole_bars,
    )
    scanned = (clock.table(), saved)
    (_, array_bars, whole_bars), _ = lax.scan(step, start, scanned, reverse=True)
    bars = {}
    for v, bar in whole_bars.items():
        with readers[v].origin():
            bars[v] = bar.astype(avals[v].dtype)
    for v, bar in array_bars.items():
        bars[v] = bars[v] + bar if v in bars else bar
        if is_on_host(values[v]):
            bars[v] = to_host(bars[v], loop.graph.row_axis[v])
    return bars


def _owned_rows(loop: RowLoop, clock: Clock, value: int, cotangent: Array) -> Array:
    """The cotangent of the rows that this step gives; rows given again elsewhere get none."""
    producer, axis = loop.producer[value], loop.graph.row_axis[value]
    track = loop.schedule.tracks[producer]
    name = ("start", producer)
    rows = read_rows(cotangent, clock[name], track.rows, axis, 0, clock.bounds(name))
    if track.is_steady:
        return rows
    low, high = clock["owned", producer], clock["stop", producer]
    return keep_rows(rows, clock[name], axis, low, high, 0)
