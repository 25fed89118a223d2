"""A segment on a few images at a time: micro-batches around whatever runs the segment.

Only where images are independent, which is not assumed but read off the program: with the batch as
the axis of rows, every operation must be a row operation that maps examples one to one, without
reductions. Batch statistics are refused so, and so is what merges the batch with another axis, or
depends on an example's number (random bits, ``iota`` along the batch).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as public

from lrjax.loop.dependent_fill import full_depending_on, full_like
from lrjax.loop.offload import (
    beside,
    empty_on_host,
    instantiated,
    is_on_host,
    on_device,
    with_hosted_outputs,
)
from lrjax.program.inline import flatten, values_of
from lrjax.program.varying import is_inexact, struct_like
from lrjax.rowgraph.bodies import run_on_block
from lrjax.rowgraph.calls import has_additive_derivative
from lrjax.rowgraph.graph import ColumnNode, Node, RowGraph, build
from lrjax.rowgraph.segments import Cuttable, Segment
from lrjax.rules.base import Array, Rows
from lrjax.rules.dependence import needs_whole_cotangent
from lrjax.rules.geometry import IDENTITY
from lrjax.strategies.base import NOTHING_HOSTED, Function, Strategy, named
from lrjax.strategies.programs import Execution

BATCH_AXIS = 0


class MicroBatches(Strategy):
    """Another strategy on one part of the batch after the other.

    Args:
      strategy: what runs a part, by name or as an object.
      parts: their number; it must divide the images of the batch. One part is the batch, and the
        other strategy by itself.

    Example:
      The network by parts of the batch; a loss that is a mean over images stays outside.

      >>> lrjax.rowwise(apply, in_axes=(None, 1), strategy=MicroBatches("stream", 4))
    """

    strategy: Strategy
    parts: int

    def __init__(self, strategy: Strategy | str, parts: int):
        found = named(strategy)
        if isinstance(parts, bool) or not isinstance(parts, int) or parts < 1:
            raise ValueError(f"parts={parts!r:.80} must be an int of at least 1.")
        if isinstance(found, MicroBatches):
            parts *= found.parts
            found = found.strategy
        self.strategy, self.parts = found, parts
        self.name = f"{found.name} x {parts} micro-batches"
        self.fate, self.order = found.fate, found.order

    def function(
        self,
        segment: Segment,
        num_blocks: int,
        given: Mapping[int, int] = NOTHING_HOSTED,
        taken: Mapping[int, int] = NOTHING_HOSTED,
    ) -> Function:
        own = micro_batches(segment, self.parts)
        function = by_micro_batches(own, self.strategy.function(own.part, num_blocks))
        return with_hosted_outputs(function, given) if given else function

    def execution(self, segment: Segment, num_blocks: int, wrt: Sequence[int]) -> Execution:
        part = micro_batches(segment, self.parts).part
        return self.strategy.execution(part, num_blocks, wrt)

    def refusal(self, segment: Segment) -> str | None:
        """Its examples must not depend on each other, and be a multiple of ``parts``."""
        try:
            _divisible_batch(segment, self.parts)
        except ValueError as error:
            return str(error)
        return self.strategy.refusal(segment)

    def most_blocks(self, graph: RowGraph) -> int:
        return self.strategy.most_blocks(graph)

    def __repr__(self) -> str:
        return f"MicroBatches({self.strategy!r}, {self.parts})"


@dataclasses.dataclass(frozen=True)
class DividedSegment:
    """A segment and the same on one part of its batch.

    Attributes:
      segment: on all images.
      part: on ``size`` images.
      parts: their number.
      size: images of a part.
      divided: inputs that are divided among the parts; all others go whole into each.
    """

    segment: Segment
    part: Segment
    parts: int
    size: int
    divided: tuple[int, ...]


def independent_operations(whole: Cuttable, axes: Sequence[int | None]) -> list[bool]:
    """Whether each operation on rows maps examples one to one, as far as the program tells."""
    if BATCH_AXIS in axes:
        return [False] * len(whole.operations)
    graph = build(whole.program, [None if axis is None else BATCH_AXIS for axis in axes])
    check = _is_one_to_one(graph)
    found = {
        v: check(node) and graph.row_axis.get(v) == BATCH_AXIS
        for node in graph.nodes
        for v in node.equation.outputs
    }
    return [found.get(equation.outputs[0], False) for equation in whole.operations]


def batch_graph(segment: Segment) -> RowGraph | None:
    """The segment with examples for rows; None where they are not independent."""
    found = _examples(segment)
    return None if isinstance(found, str) else found


def _examples(segment: Segment) -> RowGraph | str:
    """The segment with examples for rows, or why they are not independent."""
    maps = [axis is not None for axis in segment.axes]
    if BATCH_AXIS in segment.axes or not any(maps):
        return "their axis is that of the rows, or no input has any"
    avals = segment.program.avals
    sizes = {
        avals[v].shape[BATCH_AXIS]
        for v, is_map in zip(segment.program.inputs, maps, strict=True)
        if is_map
    }
    graph = build(segment.program, [BATCH_AXIS if is_map else None for is_map in maps])
    is_alone, outputs = _is_one_to_one(graph), graph.program.outputs
    for node in graph.nodes:
        if not is_alone(node):
            return f"{node.equation.primitive.name} mixes or numbers them"
        if isinstance(node, ColumnNode) and not _may_be_repeated(graph, node):
            name = node.equation.primitive.name
            return f"the derivative of {name} must see the cotangents of all of them at once"
    if not all(graph.row_axis.get(v) == BATCH_AXIS for v in values_of(outputs)):
        return "a result has none of them"
    sizes |= {graph.program.aval(v).shape[BATCH_AXIS] for v in outputs}
    return graph if len(sizes) == 1 else f"there are {sorted(sizes)} of them"


def _may_be_repeated(graph: RowGraph, node: ColumnNode) -> bool:
    """Whether what no example touches may be differentiated for some of them at a time."""
    equation = node.equation
    if not needs_whole_cotangent(graph.program, equation):
        return True
    is_call = equation.primitive is public.custom_vjp_call_p
    return is_call and has_additive_derivative(graph.program, equation)


def _is_one_to_one(graph: RowGraph) -> Callable[[Node], bool]:
    def check(node: Node) -> bool:
        if isinstance(node, ColumnNode):
            return graph.row_axis.keys().isdisjoint(node.equation.values)
        pairs = zip(node.equation.inputs, node.op.reads, strict=True)
        is_alone = not (node.is_reduction or node.op.is_positional or node.op.undifferentiable())
        return is_alone and all(
            read is None or (read.row_map == IDENTITY and v in graph.row_axis) for v, read in pairs
        )

    return check


def micro_batches(segment: Segment, parts: int) -> DividedSegment:
    """The segment in parts of its batch.

    Raises:
      ValueError: its examples are not independent, or their number is no multiple of ``parts``.
    """
    graph, batch = _divisible_batch(segment, parts)
    size = batch // parts
    divided = tuple(i for i, axis in enumerate(segment.axes) if axis is not None)
    structs = [
        struct_like(struct, (size, *struct.shape[1:])) if i in divided else struct
        for i, struct in enumerate(segment.program.structs)
    ]
    rows = Rows(0, size, keeps_rules=True)
    closed = jax.make_jaxpr(lambda *inputs: run_on_block(graph, inputs, rows, size))(*structs)
    program = flatten(closed, keep_custom_rules=True)
    part = Segment(program, segment.axes, tuple(values_of(program.outputs)), segment.row_mesh)
    return DividedSegment(segment, part, parts, size, divided)


def _divisible_batch(segment: Segment, parts: int) -> tuple[RowGraph, int]:
    """The segment with examples for rows, and their number, which ``parts`` divides."""
    graph = _examples(segment)
    if isinstance(graph, str):
        raise ValueError(
            f"micro_batches: the examples of this segment are not independent: {graph}. Leave "
            "that out of the function (a loss over the batch, statistics of it), cut the segment "
            "off from it, or run it on the whole batch."
        )
    batch = next(graph.height(v) for v in graph.program.inputs if v in graph.row_axis)
    if batch % parts:
        raise ValueError(f"micro_batches={parts} does not divide the batch of {batch} images.")
    return graph, batch


def by_micro_batches(own: DividedSegment, function: Function) -> Function:
    """``function``, which runs ``own.part``, on one part of the batch after the other.

    The backward pass starts each part anew from the inputs; gradients of what is not divided are
    added up in float32 or wider.
    """
    structs = own.segment.program.structs
    outputs = [own.segment.program.aval(v) for v in own.segment.program.outputs]

    def inputs_of(inputs: Sequence[Array], index: Array) -> list[Array]:
        return [_part(x, own, index) if i in own.divided else x for i, x in enumerate(inputs)]

    @jax.custom_vjp
    def call(*inputs: Array) -> list[Array]:
        def one(arrays: list[Array], index: Array) -> tuple[list[Array], None]:
            results = function(*inputs_of(inputs, index))
            return [_put(a, r, own, index) for a, r in zip(arrays, results, strict=True)], None

        full = full_depending_on(inputs[i] for i in own.divided)
        empty = [full_like(full, out) for out in outputs]
        return lax.scan(one, empty, jnp.arange(own.parts))[0]

    def forward(*inputs: Any) -> Any:
        moving = [i for i, x in enumerate(inputs) if x.perturbed and is_inexact(structs[i])]
        plain = [x.value for x in inputs]
        return call(*plain), (plain, {i: None for i in moving})

    def backward(residuals: Any, cotangents: Sequence[Any]) -> tuple[Any, ...]:
        inputs, moving = residuals
        given = {
            k: instantiated(ct) for k, ct in enumerate(cotangents) if ct.dtype != jax.dtypes.float0
        }

        def one(sums: dict[int, Array], index: Array) -> tuple[dict[int, Array], None]:
            own_inputs = inputs_of(inputs, index)

            def of_moving(values: dict[int, Array]) -> list[Array]:
                results = function(*[values.get(i, x) for i, x in enumerate(own_inputs)])
                return [results[k] for k in given]

            _, pull = jax.vjp(of_moving, {i: own_inputs[i] for i in moving})
            (bars,) = pull([_part(ct, own, index) for ct in given.values()])
            added = {
                i: _put(sums[i], bar, own, index)
                if i in own.divided
                else sums[i] + bar.astype(sums[i].dtype)
                for i, bar in bars.items()
            }
            return added, None

        full = full_depending_on(cotangents)
        start = {}
        for i in moving:
            struct, dtype = structs[i], _sum_dtype(own, i)
            if is_on_host(inputs[i]):
                start[i] = empty_on_host(struct.shape, dtype)
            else:
                start[i] = full_like(full, struct, dtype=dtype)
        sums, _ = lax.scan(one, start, jnp.arange(own.parts))
        return tuple(
            sums[i].astype(struct.dtype) if i in sums else None for i, struct in enumerate(structs)
        )

    call.defvjp(forward, backward, symbolic_zeros=True)
    return call


def _sum_dtype(own: DividedSegment, index: int) -> Any:
    dtype = own.segment.program.structs[index].dtype
    return dtype if index in own.divided else jnp.promote_types(dtype, jnp.float32)


def _part(array: Array, own: DividedSegment, index: Array) -> Array:
    return on_device(lax.dynamic_slice_in_dim(array, index * own.size, own.size, BATCH_AXIS))


def _put(array: Array, part: Array, own: DividedSegment, index: Array) -> Array:
    part = beside(part, array)
    return lax.dynamic_update_slice_in_dim(array, part, index * own.size, BATCH_AXIS)
