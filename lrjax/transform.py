"""``rowwise``: the public transformation."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lrjax.groups import Tree, leaves
from lrjax.meshes import check_callbacks, check_heights, on_auto_axes, row_mesh_at_hand
from lrjax.options import (
    Cuts,
    MeshOption,
    Options,
    StrategyOption,
    check_callable,
    checked_options,
    checked_segments,
)
from lrjax.plan import Choice, PlanMismatchError
from lrjax.program.compatibility import checkpoint, strongly_typed, weakly_typed
from lrjax.program.inline import array_of, values_of
from lrjax.program.interpreter import with_room_for_calls
from lrjax.program.varying import is_inexact
from lrjax.rowgraph.graph import moving_values
from lrjax.rowgraph.row_mesh import RowMesh
from lrjax.rowgraph.segments import Segment, split, split_at
from lrjax.rowgraph.tracing import Traced, is_within_rowwise, trace
from lrjax.strategies import derivatives


def rowwise(
    fun: Callable[..., Any],
    *,
    in_axes: Any,
    num_blocks: int | Sequence[int] | None = None,
    strategy: StrategyOption = "stream",
    cuts: Cuts = (),
    plan: Any = None,
    offload: bool = False,
    mesh: MeshOption = None,
    row_mesh_axis: str | None = None,
) -> Callable[..., Any]:
    """Run ``fun`` by blocks of rows, forward and backward: same values, same gradients.

    Args:
      fun: a JAX function of arrays (pytrees). Convolutions, pooling and whatever else is local in
        rows runs block by block; the rest runs column-wise, on whole maps, and is reported by
        ``lrjax.explain``.
      in_axes: as in ``jax.vmap``, a pytree prefix of the positional arguments: the row axis of an
        argument, or None for one that carries no rows. Keyword arguments carry no rows.
      num_blocks: steps in which the rows are admitted: rows of the tallest input for "stream", of
        the output for "2ps" and "overl" (the lowest one, maps of less than half the rows of
        another at its rate left out). A step admits at most ``ceil(rows / num_blocks)`` rows
        (fewer where some rows of lag cost a step more anyway), and there may be at most as many
        blocks as rows; what has fewer rows than that beside them takes fewer steps. One number, or
        one per segment. Default: steps of about 64 rows.
      strategy: "stream" (differentiate first, then tile; least memory), "2ps" or "overl" (LR-CNN,
        arXiv 2401.11471), "checkpoint" (whole maps, the forward pass done again), "selective" or
        "selective-narrow" (whole maps, elementwise operations done again, and of the second those
        that widen a map), "column" (whole maps, the baseline), or an object of
        ``lrjax.strategies``, such as ``MicroBatches("stream", 4)``; one, or one per segment.
      cuts: where to keep a whole map and start a new segment: names given by
        ``jax.ad_checkpoint.checkpoint_name`` in ``fun``, or a number of segments. A tuple of names
        is a group: in ``[("a", "b"), "c"]`` only ``c`` is kept from forward to backward, and ``a``
        and ``b`` are made again, and kept, while the backward pass is between the start and ``c``.
        With groups, names are given in ``fun``'s order.
      plan: what ``lrjax.plan`` made for this function and these shapes, instead of the three
        above and ``offload``. One for a mesh says along which axis rows are divided, and wants
        ``mesh``, or the mesh at hand, of as many devices along it.
      offload: the maps at the cuts, and their gradients, wait in the host's memory. Row loops write
        and read them there block by block, so that they never exist whole on the device; "column"
        and "checkpoint" copy them. A map that several segments read, or that ``fun`` returns,
        stays on the device. On a CPU, whose memory is the host's, nothing moves. Not under
        ``vmap``: JAX has no rule for reading rows of a batch of arrays on the host.
      mesh: a mesh of devices; default: the one of ``jax.set_mesh``.
      row_mesh_axis: divide the rows of each image among the devices along this axis of the mesh:
        every device runs ``num_blocks`` steps on its share of them, with the rows that it needs of
        its neighbours'. ``fun``, arguments and results keep their shapes; any height will do. Under
        "column" and "checkpoint" XLA divides the work. See docs/meshes.md.

    Returns:
      A function with ``fun``'s signature, outputs and dtypes, to be used under ``jit``, ``grad``,
      ``vmap`` and inside other transformations. Within another row-wise function it is ``fun``: the
      outer one's options hold for all of it.

    Raises:
      ValueError: for arguments that do not fit; raised when the returned function is called, before
        anything is compiled.

    Example:
      >>> loss = lrjax.rowwise(loss_fn, in_axes=(None, 1), num_blocks=64)
      >>> value, grads = jax.jit(jax.value_and_grad(loss))(params, images)
    """
    options = checked_options(
        num_blocks=num_blocks,
        strategy=strategy,
        cuts=cuts,
        plan=plan,
        offload=offload,
        mesh=mesh,
        row_mesh_axis=row_mesh_axis,
    )
    return rowwise_with(fun, in_axes, options)


def rowwise_with(fun: Callable[..., Any], in_axes: Any, options: Options) -> Callable[..., Any]:
    """``rowwise`` with options that are checked already."""
    check_callable(fun)

    @functools.wraps(fun)
    def rowwise_fun(*args: Any, **kwargs: Any) -> Any:
        if is_within_rowwise():
            return fun(*args, **kwargs)

        @with_room_for_calls
        def by_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return run(trace(fun, in_axes, args, kwargs), options)

        return on_auto_axes(by_rows, fun, in_axes, args, kwargs, options.row_mesh_axis)

    return rowwise_fun


def run(traced: Traced, options: Options) -> Any:
    """A traced call under checked options: segment by segment, each under its strategy."""
    segments, choices = segments_and_choices(traced, options, row_mesh_of(options))
    hosted = hosted_values(traced, segments, choices)
    moving = moving_values(traced.program) | hosted.keys()
    values = dict(zip(traced.program.inputs, traced.inputs, strict=True))
    values.update(traced.program.constants)
    parts = list(zip(segments, choices, strict=True))
    for tree in options.groups(len(segments)):
        made = _run_tree(tree, parts, values, hosted, moving, traced.program.outputs)
        # What no gradient goes through has no tangents behind a row loop either.
        values.update((v, _without_tangent(x, v in moving)) for v, x in made.items())

    for equation in traced.effects:
        # No callback takes tangents, and what a row loop gives always has one.
        operands = [array_of(v, values) for v in equation.inputs]
        equation.evaluate(list(map(jax.lax.stop_gradient, operands)))
    # NumPy's arrays among the results are constants of the program, of a type of JAX's own.
    outputs = [jnp.asarray(array_of(v, values)) for v in traced.outputs]
    outputs = [weakly_typed(x) if i in traced.weak else x for i, x in enumerate(outputs)]
    return jax.tree.unflatten(traced.out_tree, outputs)


def _without_tangent(array: Any, is_moving: bool) -> Any:
    return array if is_moving or not is_inexact(array) else jax.lax.stop_gradient(array)


def _run_tree(
    tree: Tree,
    parts: Sequence[tuple[Segment, Choice]],
    values: Mapping[int, Any],
    hosted: Mapping[int, int],
    moving: Collection[int],
    outputs: Sequence[Any],
) -> dict[int, Any]:
    """What a segment, or a group of them, makes for later use; maps between them live in it alone.

    Args:
      tree: the segment, or the group.
      parts: all segments.
      values: all that was made before.
      hosted: maps that wait in the host's memory, with their row axes.
      moving: values through which gradients flow.
      outputs: what the caller gets.
    """
    if isinstance(tree, int):
        segment, choice = parts[tree]
        function = _with_derivatives(segment, choice, hosted)
        made = function(*(strongly_typed(values[v]) for v in segment.program.inputs))
        return dict(zip(segment.made, made, strict=True))
    members = leaves(tree)
    later = {v for segment, _ in parts[members[-1] + 1 :] for v in segment.program.inputs}
    later.update(values_of(outputs))
    made = [v for i in members for v in parts[i][0].made]
    taken = dict.fromkeys(v for i in members for v in parts[i][0].program.inputs)
    inputs = [v for v in taken if v not in made]
    kept = [v for v in made if v in later]

    def call(*arrays: Any) -> list[Any]:
        own = dict(zip(inputs, arrays, strict=True))
        for one in tree:
            made_here = _run_tree(one, parts, own, hosted, moving, outputs)
            own.update((v, _without_tangent(x, v in moving)) for v, x in made_here.items())
        return [own[v] for v in kept]

    results = checkpoint(call)(*(strongly_typed(values[v]) for v in inputs))
    return dict(zip(kept, results, strict=True))


def _with_derivatives(
    segment: Segment, choice: Choice, hosted: Mapping[int, int]
) -> Callable[..., Sequence[Any]]:
    """A segment as chosen, with its derivatives of every order."""
    given = {i: hosted[v] for i, v in enumerate(segment.made) if v in hosted}
    taken = {i: hosted[v] for i, v in enumerate(segment.program.inputs) if v in hosted}
    function = choice.runner.function(segment, choice.num_blocks, given, taken)
    if choice.runner.has_every_derivative and not given and not taken:
        return function
    program, axes = segment.program, segment.axes
    return derivatives.by_rows(
        function, program, axes, choice.num_blocks, given, taken, segment.row_mesh
    )


def row_mesh_of(options: Options) -> RowMesh | None:
    """The devices that share the rows of a call; None for one device.

    Raises:
      ValueError: there is no such mesh, or the plan is for another.
    """
    plan, axis = options.plan, options.row_mesh_axis
    if plan is None:
        return row_mesh_at_hand(options.mesh, axis)
    if axis is not None and options.mesh is None and jax.sharding.get_abstract_mesh().empty:
        raise PlanMismatchError(
            f"plan: it was made for {plan.devices} devices that share rows along the mesh axis "
            f"{axis!r}, and there is no mesh; give mesh=jax.make_mesh(({plan.devices},), "
            f"({axis!r},)), or make a plan for one device."
        )
    row_mesh = row_mesh_at_hand(options.mesh, axis)
    plan.check_mesh(axis, None if row_mesh is None else row_mesh.count)
    return row_mesh


def segments_and_choices(
    traced: Traced, options: Options, row_mesh: RowMesh | None
) -> tuple[list[Segment], Sequence[Choice]]:
    """The segments of a call and how each runs, with rows on one device or divided.

    Raises:
      ValueError: the options, or the plan, do not fit the call.
    """
    plan = options.plan
    if plan is None:
        segments = split(
            traced.program, traced.axes, options.flat_cuts, in_order=options.has_groups
        )
    else:
        plan.check(traced)
        segments = split_at(traced.program, traced.axes, plan.cuts)
    if row_mesh is not None:
        check_heights(traced.inputs, traced.axes, row_mesh)
        check_callbacks(traced, row_mesh)
        segments = [dataclasses.replace(one, row_mesh=row_mesh) for one in segments]
    return segments, checked_segments(options, segments) if plan is None else plan.choices


def hosted_values(
    traced: Traced, segments: Sequence[Segment], choices: Sequence[Choice]
) -> dict[int, int]:
    """Maps that wait in the host's memory, with their row axes.

    They are made by a segment that offloads and read by one other: gradients from several would
    have to be added there.
    """
    read = [entry for s in segments for entry in zip(s.program.inputs, s.axes, strict=True)]
    readers, axis_of = Counter(v for v, _ in read), dict(read)
    made = {
        v
        for segment, choice in zip(segments, choices, strict=True)
        for v in segment.made
        if choice.offload and v not in traced.program.outputs
    }
    return {
        v: axis
        for v, axis in axis_of.items()
        if axis is not None
        and v in made
        and readers[v] == 1
        and is_inexact(traced.program.avals[v])
    }
