"""What ``lrjax.linen`` and ``lrjax.nnx`` share: a module's call as a function of arrays, by rows.

A module's variables and random keys go in beside the arguments, as arrays without rows, and the
variables that the call changes come out beside its result. The call is traced once, at full shape:
random numbers are drawn as the module draws them, whatever the number of blocks, so no key is used
twice and dropout's masks are those of column execution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from lrjax.meshes import on_auto_axes
from lrjax.options import Options
from lrjax.program.inline import replaced_at
from lrjax.rowgraph.fallbacks import Fallback, counted, fallbacks_of, made_by
from lrjax.rowgraph.graph import RowGraph, RowNode, build
from lrjax.rowgraph.tracing import Traced, flat_axes, is_array, is_within_rowwise, trace
from lrjax.rules.base import traits_of
from lrjax.rules.windows import POOLINGS
from lrjax.transform import run

StatefulCall = Callable[..., tuple[Any, Any]]


def call_rowwise(
    fun: StatefulCall,
    state: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    in_axes: Any,
    options: Options,
    name: str,
) -> tuple[Any, Any]:
    """``fun(state, *args, **kwargs)`` by blocks of rows.

    Args:
      fun: gives ``(outputs, changed)``; ``changed`` is a pytree whose dictionary keys name the
        variables.
      state: pytree of arrays without rows.
      args: positional arguments; what is no array in them (flags, strings, None) stays as it is.
      kwargs: keyword arguments, likewise; they carry no rows.
      in_axes: of ``args``.
      options: of ``lrjax.rowwise``.
      name: of the module, for messages.

    Raises:
      ValueError: where the call has nothing to run by rows, or changes a variable that carries
        rows, or where the options do not fit it.
    """
    if is_within_rowwise():
        return fun(state, *args, **kwargs)
    leaves, tree = jax.tree.flatten(args)
    axes = flat_axes(in_axes, args)
    moving = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

    def flat(state: Any, arrays: list[Any], **keywords: Any) -> tuple[Any, Any]:
        full = replaced_at(leaves, moving, arrays)
        return fun(state, *jax.tree.unflatten(tree, full), **keywords)

    arrays = [leaves[i] for i in moving]
    in_axes = (None, [axes[i] for i in moving])

    def by_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        traced = trace(flat, in_axes, args, kwargs)
        graph = build(traced.program, traced.axes)
        _check_windows(graph, name)
        _check_changed(traced, graph, name)
        return run(traced, options)

    return on_auto_axes(by_rows, flat, in_axes, (state, arrays), kwargs, options.row_mesh_axis)


def _check_windows(graph: RowGraph, name: str) -> None:
    """Refuse a module in which no layer that mixes channels or neighbours runs by rows."""
    reductions = []
    # What makes a network convolutional; all else that is local in rows could run whole as well.
    for node in graph.nodes:
        primitive = node.equation.primitive
        is_layer = traits_of(primitive).is_contraction or primitive in POOLINGS
        if isinstance(node, RowNode) and is_layer:
            if not node.is_reduction:
                return
            made = made_by(graph, node.equation)
            reductions.append(Fallback(primitive.name, made, "sums over the rows"))
    reasons = counted([*reductions, *fallbacks_of(graph)])
    touched = reasons or graph.row_nodes
    raise ValueError(
        f"{name} has no convolution, pooling or dense layer over channels that keeps the rows of "
        "its arguments apart, so there is nothing to run row by row"
        + (f": {'; '.join(reasons)}" if reasons else "")
        + (". Keep" if touched else "; check in_axes, which says what carries rows, keep")
        + " rows on an axis of their own up to the last convolution, or use the module as it is."
    )


def _check_changed(traced: Traced, graph: RowGraph, name: str) -> None:
    _, changed = jax.tree.unflatten(traced.out_tree, traced.outputs)
    for path, value in jax.tree_util.tree_leaves_with_path(changed):
        if isinstance(value, int) and value in graph.row_axis:
            keys = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
            raise ValueError(
                f"{name} writes the variable {'/'.join(keys)!r}, of shape "
                f"{graph.program.aval(value).shape}, which carries rows: it would exist whole, "
                "which row blocks avoid. Store or sow a reduction over rows instead (a mean), "
                "return the map as an output, or, in Linen, leave its collection out of `mutable`."
            )
