"""2PS and OverL: run by rows first, then differentiate every step (LR-CNN, arXiv 2401.11471).

One forward row graph, whose step is differentiated by ``jax.vjp`` in a reverse loop. Under 2PS
neighbouring blocks share their boundary rows, and the cotangents of those flow to the step above;
under OverL every block computes its halo itself, though not in the forward pass, where nothing is
saved but the inputs and no row is computed twice. The line buffers that a step starts with are
saved for all steps, so 2PS holds more the more blocks there are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lrjax.loop import devices, engine
from lrjax.loop.blocks import read_rows, write_rows
from lrjax.loop.clock import Clock, clock_of
from lrjax.loop.dependent_fill import full_depending_on, full_like, zero_behind
from lrjax.loop.heights import Order
from lrjax.loop.line_buffers import SavedLines, Values, no_saved_lines, reader_of, saved_line_specs
from lrjax.loop.offload import instantiated, is_on_host, to_host
from lrjax.loop.rowloop import RowLoop, Source
from lrjax.loop.shards import WithHalo
from lrjax.loop.small_sums import SmallSums
from lrjax.loop.stage_by_stage import run_graph
from lrjax.program.inline import FlatEquation, FlatProgram, values_of
from lrjax.program.names import without_names
from lrjax.program.varying import is_inexact
from lrjax.rowgraph.graph import build
from lrjax.rowgraph.row_mesh import RowMesh
from lrjax.rowgraph.segments import Segment
from lrjax.rules.base import Array, RowOp
from lrjax.rules.block_sums import accumulator_dtype
from lrjax.rules.masks import keep_rows
from lrjax.strategies.base import NOTHING_HOSTED, Function, Strategy
from lrjax.strategies.frozen import Division, division
from lrjax.strategies.programs import Axes, DifferentiatedRows, Residuals, RowProgram, row_program


class _Tiled(Strategy):
    """Row loops that are differentiated step by step, in reverse."""

    order: Order

    def function(
        self,
        segment: Segment,
        num_blocks: int,
        given: Mapping[int, int] = NOTHING_HOSTED,
        taken: Mapping[int, int] = NOTHING_HOSTED,
    ) -> Function:
        again = functools.partial(
            differentiable_program,
            order=self.order,
            num_blocks=num_blocks,
            row_mesh=segment.row_mesh,
        )
        rows = again(segment.program, segment.axes)
        run = functools.partial(_differentiable_loop, program_of=again)

        def call(*inputs: Array) -> list[Array]:
            return run_graph(rows.graph, rows.loops, inputs, run=run, hosted=given)

        return call

    def execution(
        self, segment: Segment, num_blocks: int, wrt: Sequence[int]
    ) -> DifferentiatedRows:
        del wrt
        program, axes, row_mesh = segment.program, segment.axes, segment.row_mesh
        return DifferentiatedRows(
            differentiable_program(program, axes, self.order, num_blocks, row_mesh)
        )


class TwoPhase(_Tiled):
    """The paper's 2PS: neighbouring blocks share their boundary rows."""

    name = "2ps"
    label = "2PS"
    fate = "inputs and rows between blocks kept, blocks computed again"
    order = Order(divides_output=True)


class Overlap(_Tiled):
    """The paper's OverL: independent blocks, each of which computes its halo."""

    name = "overl"
    label = "OverL"
    fate = "inputs kept, blocks computed again with their halos"
    order = Order(divides_output=True, recomputes_halos=True)


def _differentiable_in_blocks(equation: FlatEquation, op: RowOp) -> str | None:
    if op.reduction in ("max", "min", "prod"):
        return f"{equation.primitive.name} over rows has no gradient block by block"
    return op.undifferentiable()


def differentiable_program(
    program: FlatProgram,
    axes: Axes,
    order: Order,
    num_blocks: int,
    row_mesh: RowMesh | None = None,
) -> RowProgram:
    """The forward program as row loops whose steps can be differentiated one by one."""
    graph = build(without_names(program), axes, _differentiable_in_blocks)
    rows = row_program(graph, order, num_blocks, is_differentiated=True, row_mesh=row_mesh)
    if not order.recomputes_halos or num_blocks == 1:
        return rows
    order = dataclasses.replace(order, recomputes_halos=False)
    once = row_program(graph, order, num_blocks, is_differentiated=True, row_mesh=row_mesh)
    pairs = zip(rows.loops, once.loops, strict=True)
    return RowProgram(graph, tuple(a and dataclasses.replace(a, forward=b) for a, b in pairs))


ProgramOf = Callable[[FlatProgram, Axes], RowProgram]


def _differentiable_loop(
    loop: RowLoop,
    values: Values,
    hosted: Collection[int] = (),
    *,
    program_of: ProgramOf | None = None,
) -> Values:
    """A row loop whose row outputs exist whole on the device, whatever is ``hosted`` later.

    With ``program_of``, which makes a part of it a differentiable row program, what is frozen runs
    once (see ``frozen.division``).
    """
    del hosted
    names = tuple(dict.fromkeys((*loop.arrays, *loop.wholes)))

    @jax.custom_vjp
    def call(inputs: Values) -> Values:
        once = dataclasses.replace(loop.forward or loop, is_differentiated=False)
        return engine.run_loop(once, inputs)

    def forward(inputs: dict[int, Any]) -> Any:
        perturbed = frozenset(v for v in names if inputs[v].perturbed)
        plain = {v: inputs[v].value for v in names}
        divided = division(loop, perturbed) if program_of else None
        if divided is not None and program_of is not None:
            outputs, pull = _divided_loop(loop, divided, plain, perturbed, program_of)
            return outputs, Residuals(pull, None)
        if loop.forward is None:
            outputs, lines = engine.run_steps(loop, plain, saves_lines=True)
        else:
            outputs, lines = engine.run_loop(loop.forward, plain), no_saved_lines(loop)
        return outputs, Residuals((plain, lines), perturbed)

    def backward(residuals: Residuals, cotangents: Values) -> tuple[dict[int, Any]]:
        given = {v: instantiated(ct) for v, ct in cotangents.items()}
        if residuals.static is None:
            (bars,) = residuals.arrays(given)
        else:
            inputs, lines = residuals.arrays
            reverse = _reverse if loop.shards is None else _reverse_over_devices
            bars = reverse(loop, inputs, given, residuals.static, lines)
        return ({v: bars.get(v) for v in names},)

    call.defvjp(forward, backward, symbolic_zeros=True)
    found, moving = call({v: values[v] for v in names}), loop.graph.moving
    return {v: x if v in moving else _without_tangent(x) for v, x in found.items()}


def _divided_loop(
    loop: RowLoop,
    divided: Division,
    values: Values,
    perturbed: Collection[int],
    program_of: ProgramOf,
) -> Any:
    """What a loop gives, and the function from its cotangents to those of ``perturbed`` values."""
    frozen, trained, graph = divided.frozen, divided.trained, divided.graph
    first = program_of(frozen, [graph.axis_of(v) for v in frozen.inputs])
    images = devices.images(loop, values)
    held = first.run([images[v] for v in frozen.inputs])
    known = {**images, **dict(zip(values_of(frozen.outputs), held, strict=True))}
    second = program_of(trained, [graph.axis_of(v) for v in trained.inputs])

    def behind(moving: Values) -> Values:
        own = devices.images(loop, moving)
        inputs = [own.get(v, known[v]) for v in trained.inputs]
        outputs = run_graph(second.graph, second.loops, inputs, run=_differentiable_loop)
        made = (*loop.row_outputs, *loop.reductions)
        return devices.shared(loop, dict(zip(made, outputs, strict=True)))

    return jax.vjp(behind, {v: values[v] for v in perturbed})


def _without_tangent(value: Array) -> Array:
    """Give a value the symbolic zero tangent that it has in column.

    A ``custom_vjp`` gives its outputs tangents (integers a float0 array), on which a primitive
    without a differentiation rule fails. ``x | x`` has a rule, and XLA removes it.
    """
    is_integer = jnp.issubdtype(value.dtype, np.integer) or value.dtype == np.bool_
    return lax.bitwise_or(value, value) if is_integer else lax.stop_gradient(value)


def _inexact(values: dict[Any, Any]) -> dict[Any, Any]:
    return {k: v for k, v in values.items() if is_inexact(v)}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["lines", "arrays", "wholes"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Cotangents:
    """What a reverse loop has when a step is done, and gives to the step above.

    Attributes:
      lines: of rows that this step found in line buffers.
      arrays: of arrays that are read by rows, as far as steps have read them.
      wholes: of values that every step reads whole, summed over steps.
    """

    lines: Values
    arrays: Mapping[Any, Array | WithHalo]
    wholes: Values


def _reverse(
    loop: RowLoop, values: Values, cotangents: Values, perturbed: frozenset[int], lines: SavedLines
) -> Values:
    """Cotangents of what the loop reads, from the line buffers that every step started with."""
    arrays = {v: values[v] for v in loop.arrays}
    wholes = {v: values[v] for v in loop.wholes}
    reverse = _ReverseLoop(loop, arrays, wholes, cotangents, perturbed)
    found = reverse.run(lines)
    bars = reverse.finished_wholes(found.wholes)
    for v, bar in found.arrays.items():
        assert not isinstance(bar, WithHalo)
        bars[v] = bars[v] + bar if v in bars else bar
        if is_on_host(values[v]):
            bars[v] = to_host(bars[v], loop.graph.row_axis[v])
    return bars


def _reverse_over_devices(
    loop: RowLoop, values: Values, cotangents: Values, perturbed: frozenset[int], lines: SavedLines
) -> Values:
    """``_reverse`` on every device's share: what a device reads of others' rows, it sends back."""
    shards = devices.shards_of_loop(loop)
    moving = {v: ct for v, ct in cotangents.items() if is_inexact(ct)}
    is_sum = {v: v in loop.reductions for v in moving}

    def on_device(own: Any, wholes: Values, cotangents: Values, lines: SavedLines) -> Any:
        arrays, wholes = devices.with_halos(loop, own), devices.varying(loop, wholes)
        sums = devices.varying(loop, {v: ct for v, ct in cotangents.items() if is_sum[v]})
        reverse = _ReverseLoop(loop, arrays, wholes, {**cotangents, **sums}, perturbed)
        found = reverse.run(lines)
        added = shards.combined("sum", found.wholes)
        bars: Any = found.arrays
        returned = devices.with_returned_halos(loop, bars)
        return returned, reverse.finished_wholes(added)

    array_specs, whole_specs = devices.read_specs(loop)
    rows = devices.row_specs(loop, (v for v in moving if not is_sum[v]))
    arrays, bars = shards.run(
        on_device,
        (*devices.read_values(loop, values), moving, lines),
        (
            array_specs,
            whole_specs,
            {v: rows.get(v, jax.P()) for v in moving},
            saved_line_specs(loop),
        ),
        ({d: array_specs[d] for d in _moving_arrays(loop, perturbed)}, jax.P()),
    )
    for (v, axis, _), bar in arrays.items():
        whole = _with_height(bar, values[v].shape[axis], axis)
        bars[v] = bars[v] + whole if v in bars else whole
    return bars


def _with_height(array: Array, height: int, axis: int) -> Array:
    """An array with rows behind the image cut off, or more of them, which are zero."""
    edges = [(0, (height - array.shape[axis]) * (a == axis), 0) for a in range(array.ndim)]
    return lax.pad(array, jnp.zeros((), array.dtype), edges) if any(map(any, edges)) else array


def _moving_arrays(loop: RowLoop, perturbed: frozenset[int]) -> list[Any]:
    """Keys of the arrays that are read by rows and whose cotangents are wanted."""
    avals = loop.graph.program.avals
    moving = [s for s in loop.sliced if s.value in perturbed and is_inexact(avals[s.value])]
    return [*dict.fromkeys(devices.array_key(loop, s) for s in moving)]


class _ReverseLoop:
    """Walks the steps in reverse: halo gradients flow to the step above through the line buffers.

    Args:
      loop: whose steps are differentiated.
      arrays: that it reads by rows.
      wholes: that it reads whole.
      cotangents: of its outputs.
      perturbed: the values whose cotangents are wanted.
    """

    def __init__(
        self,
        loop: RowLoop,
        arrays: Mapping[Any, Array | WithHalo],
        wholes: Values,
        cotangents: Values,
        perturbed: frozenset[int],
    ):
        self.loop, self.clock = loop, clock_of(loop)
        self.arrays, self.wholes = arrays, wholes
        self.full = full_depending_on(cotangents.values())
        self.cotangents = cotangents
        self.moving_arrays = _moving_arrays(loop, perturbed)
        self.moving_wholes = {v: a for v, a in _inexact(wholes).items() if v in perturbed}
        self.readers = {v: reader_of(loop, v) for v in self.moving_wholes}
        self.small = SmallSums(
            (v, x, accumulator_dtype(x.dtype)) for v, x in self.moving_wholes.items()
        )
        read = [s for s in loop.sliced if devices.array_key(loop, s) in self.moving_arrays]
        self.moving_windows = {(s.node, s.operand): s for s in read}

    def run(self, saved: SavedLines) -> Cotangents:
        """What the first step gives, from the line buffers that every step started with."""
        first, stop = self.loop.repeated
        found = self.start(saved)
        for t in reversed(range(stop, self.loop.steps)):
            found = self.alone(t, found, saved.behind[t - stop])
        if stop > first:
            clock = self.clock.of_steps(first, stop)

            def step(below: Cotangents, row_and_lines: Any) -> tuple[Cotangents, None]:
                row, lines = row_and_lines
                return self.step(clock.at(row), below, lines), None

            scanned = clock.table(), saved.repeated
            found, _ = lax.scan(step, found, scanned, reverse=True)
        for t in reversed(range(first)):
            found = self.alone(t, found, saved.before[t])
        return found

    def start(self, saved: SavedLines) -> Cotangents:
        arrays = {
            v: jax.tree.map(lambda part: full_like(self.full, part), self.arrays[v])
            for v in self.moving_arrays
        }
        wholes = {}
        for v, a in self.moving_wholes.items():
            with self.readers[v].origin():
                wholes[v] = full_like(self.full, a, dtype=accumulator_dtype(a.dtype))
        some, leading = saved.repeated, 1
        if saved.before or saved.behind:
            some, leading = (*saved.before, *saved.behind)[-1], 0
        lines = {
            v: full_like(self.full, x, shape=x.shape[leading:]) for v, x in _inexact(some).items()
        }
        return Cotangents(lines, arrays, self.small.packed(wholes))

    def alone(self, t: int, below: Cotangents, lines: Values) -> Cotangents:
        """A step that is a program of its own; it begins when the one below it is done."""
        return self.step(self.clock.alone(t), below, lines, zero_behind(below))

    def step(self, now: Clock, below: Cotangents, lines: Values, zero: Any = 0) -> Cotangents:
        loop = self.loop
        windows = {
            (s.node, s.operand): engine.window_of_array(loop, now, self.arrays, s, zero)
            for s in loop.sliced
            if not (now.is_alone and loop.rows_inside(s.node, now["step"]) == (0, 0))
        }

        def function(lines_in: Values, windows_in: Any, wholes_in: Values) -> Any:
            given, wholes = {**windows, **windows_in}, {**self.wholes, **wholes_in}

            def read(clock: Clock, source: Source, zero: Any) -> Array:
                del clock, zero
                return given[source.node, source.operand]

            result = engine.run_step(loop, now, {**lines, **lines_in}, read, wholes)
            return _inexact(result.lines), _inexact(result.rows), _inexact(result.partial)

        moving = {name: windows[name] for name in self.moving_windows if name in windows}
        outputs, pull = jax.vjp(function, _inexact(lines), moving, self.moving_wholes)
        row_bars = {v: _owned_rows(loop, now, v, self.cotangents[v]) for v in outputs[1]}
        sum_bars = {v: self.cotangents[v].astype(x.dtype) for v, x in outputs[2].items()}
        line_bars, window_bars, partial = pull((below.lines, row_bars, sum_bars))
        arrays = self.with_windows(below.arrays, window_bars, now)
        wide = {v: x.astype(accumulator_dtype(x.dtype)) for v, x in partial.items()}
        added = {}
        for v, bar in self.small.packed(wide).items():
            with self.readers[v].origin() if v in self.readers else contextlib.nullcontext():
                added[v] = below.wholes[v] + bar
        return Cotangents(line_bars, arrays, added)

    def with_windows(
        self, arrays: Mapping[Any, Array | WithHalo], window_bars: Any, now: Clock
    ) -> dict[Any, Array | WithHalo]:
        """The cotangents of whole arrays with those of a step's windows added."""
        found = {**arrays}
        for name, bar in window_bars.items():
            source = self.moving_windows[name]
            key = devices.array_key(self.loop, source)
            own = found[key]
            start, _, bounds = engine.place_of_window(self.loop, now, source)
            if isinstance(own, WithHalo):
                found[key] = own.plus(bar, start, bounds)
            else:
                found[key] = write_rows(own, bar, start, source.read.axis, bounds, jnp.add)
        return found

    def finished_wholes(self, sums: Values) -> Values:
        """Cotangents of what is read whole, in the values' own precision."""
        avals = self.loop.graph.program.avals
        bars = {}
        for v, bar in self.small.unpacked(sums).items():
            with self.readers[v].origin():
                bars[v] = bar.astype(avals[v].dtype)
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
