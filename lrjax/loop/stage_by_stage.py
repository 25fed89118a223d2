"""Run a row graph, stage by stage: column operations on whole values, then the stage's row loop."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lrjax.loop import devices
from lrjax.loop.engine import run_loop
from lrjax.loop.line_buffers import Values
from lrjax.loop.offload import from_host, is_on_host, to_host
from lrjax.loop.rowloop import RowLoop
from lrjax.program.inline import Atom, FlatEquation, array_of, values_of
from lrjax.program.varying import is_inexact, varying_axes, varying_over
from lrjax.rowgraph.graph import RowGraph
from lrjax.rowgraph.row_mesh import RowMesh
from lrjax.rules.base import Array, traits_of

RunLoop = Callable[[RowLoop, Values, Collection[int]], Values]


def run_graph(
    graph: RowGraph,
    loops: Sequence[RowLoop | None],
    inputs: Sequence[Array],
    run: RunLoop = run_loop,
    hosted: Mapping[int, int] | None = None,
) -> list[Array]:
    """Column operations and row loops, stage by stage.

    Inputs in the host's memory are read there by blocks of rows; what takes them whole gets a copy.

    Args:
      graph: the row graph.
      loops: one row loop per stage, None for a stage without row operations.
      inputs: the program's inputs.
      run: how a row loop is run (``strategies.tiled`` gives a differentiable one).
      hosted: numbers of the outputs that are put in the host's memory, with their row axes.
    """
    hosted = hosted or {}
    wanted = set(values_of(graph.program.outputs[i] for i in hosted))
    copies: Values = {}
    values: Values = {v: jnp.asarray(c) for v, c in graph.program.constants.items()}
    values.update(zip(graph.program.inputs, inputs, strict=True))
    images: Values = {}  # of row outputs that have rows behind the image too
    whole = ChainMap(copies, images, values)
    shards = [loop.shards for loop in loops if loop is not None and loop.shards is not None]
    row_mesh = shards[0].row_mesh if shards else None
    for stage, loop in enumerate(loops):
        for node in graph.column_nodes(stage):
            copies.update(_copies(graph, whole, node.equation.values))
            taken = whole
            if not (node.equation.has_effects or graph.wanted.intersection(node.equation.outputs)):
                taken = ChainMap(_detached(whole, node.equation.values), whole)
            values.update(run_column(graph, node.equation, taken, row_mesh))
        if loop is not None:
            copies.update(_copies(graph, whole, loop.wholes))
            wholes = {v: whole[v] for v in loop.wholes}
            values.update(run(loop, {**values, **wholes}, wanted))
            images.update(devices.images(loop, {v: values[v] for v in loop.row_outputs}))
    results = [array_of(v, ChainMap(images, values)) for v in graph.program.outputs]
    for i, axis in hosted.items():
        if not is_on_host(results[i]):
            results[i] = to_host(results[i], axis)
    return results


def _detached(values: Mapping[int, Any], read: Sequence[int]) -> Values:
    """What is read, without tangents: of a loop that may end at any time JAX has no transpose, and
    rows made of its results have cotangents, though these are zero."""
    return {v: jax.lax.stop_gradient(values[v]) for v in read if is_inexact(values[v])}


def _copies(graph: RowGraph, values: Mapping[int, Any], taken: Sequence[int]) -> Values:
    """What is in the host's memory and is about to be taken whole, on the device."""
    return {v: from_host(values[v], graph.row_axis[v]) for v in taken if is_on_host(values[v])}


def run_column(
    graph: RowGraph,
    equation: FlatEquation,
    values: Mapping[int, Any],
    row_mesh: RowMesh | None = None,
) -> Values:
    """Evaluate one equation on whole values.

    With a ``row_mesh`` whose devices share rows, they are read and made whole on each, unless the
    operation is elementwise and its rows divide evenly: XLA's partitioner cuts some operations
    along rows wrongly (slices out of range, Fourier transforms, convolutions whose halo is higher
    than a share, what is behind interior padding; jaxlib 0.10 to 0.12).
    """

    is_elementwise = traits_of(equation.primitive).is_elementwise

    def placed(atom: Atom, array: Array) -> Array:
        axis = graph.axis_of(atom)
        if row_mesh is None or axis is None:
            return array
        if is_elementwise and row_mesh.divides(array.shape[axis]):
            return array
        return row_mesh.on_every_device(array, axis)

    operands = [placed(atom, array_of(atom, values)) for atom in equation.inputs]
    results = equation.evaluate(operands)
    avals = graph.program.avals
    found = {
        v: placed(v, varying_over(result, varying_axes(avals[v])))
        for v, result in zip(equation.outputs, results, strict=True)
    }
    read = [v for v in equation.values if v in graph.made_of_rows]
    if row_mesh is not None and read and not is_elementwise:
        for v in (v for v in found if v not in graph.row_axis):
            found[v] = row_mesh.whole(found[v], _batch_axis(graph, read, v))
    return found


def _batch_axis(graph: RowGraph, read: Sequence[int], value: int) -> int | None:
    """The first axis of a value made of others, where it is theirs too and has no rows."""
    shapes = [graph.program.avals[v].shape for v in (value, *read)]
    is_first = all(shape[:1] == shapes[0][:1] != () for shape in shapes)
    return 0 if is_first and all(graph.axis_of(v) != 0 for v in read) else None
