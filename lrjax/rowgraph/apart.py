"""How operations are written where an axis of their operands is several in a row.

``merged_axes`` says when that is wanted. A rule takes an equation and answers with its parameters
for such operands, and with the axes of its results that are several then. It raises ``Cannot``
where the operation needs the axis as one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax import lax

from lrjax.program.inline import FlatEquation
from lrjax.rules.base import removed_axes
from lrjax.rules.traits import Traits

Shape = tuple[int, ...]


class Cannot(Exception):
    """An operation that needs the axis as one."""


@dataclasses.dataclass(frozen=True)
class Written:
    """An equation for operands with several axes in the place of one.

    Attributes:
      operands: the axis of every operand that is to be several, None for one that stays.
      outputs: the axis of every result that is several then.
      params: the parameters.
    """

    operands: tuple[int | None, ...]
    outputs: tuple[int | None, ...]
    params: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """An equation, an axis of which is to be several.

    Attributes:
      equation: the equation.
      axes: the axis of every operand that is several already, None for the others.
      shapes: of the operands, as the equation has them.
      outputs: shapes of the results, as the equation has them.
      sizes: of the several.
    """

    equation: FlatEquation
    axes: tuple[int | None, ...]
    shapes: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    sizes: Shape

    @property
    def params(self) -> dict[str, Any]:
        return self.equation.params

    @property
    def axis(self) -> int:
        """Of the first operand that has one."""
        return next(axis for axis in self.axes if axis is not None)

    def moved(self, axes: Sequence[int], axis: int) -> tuple[int, ...]:
        """Where axes come to lie when ``axis``, which may be among them, is several."""
        found: list[int] = []
        for other in axes:
            last = other + len(self.sizes) - 1
            found += range(axis, last + 1) if other == axis else [last if other > axis else other]
        return tuple(found)

    def spread(self, entries: Sequence[Any], axis: int, several: Sequence[Any]) -> tuple[Any, ...]:
        """What there is of every axis, with ``several`` in the place of one."""
        return (*entries[:axis], *several, *entries[axis + 1 :])

    def written(
        self, operands: Sequence[int | None], outputs: Sequence[int | None], **changed: Any
    ) -> Written:
        return Written(tuple(operands), tuple(outputs), {**self.params, **changed})


Rule = Callable[[Case], Written]


def rule_of(equation: FlatEquation, traits: Traits) -> Rule:
    """The rule of an equation's primitive.

    Raises:
      Cannot: it has none.
    """
    found = _all_alike if traits.is_elementwise else _RULES.get(equation.primitive)
    if found is None:
        raise Cannot
    return found


def _all_alike(case: Case, **changed: Any) -> Written:
    """Operands and results of one rank, scalars apart, each with the axis at the same place."""
    axis, rank = case.axis, len(case.outputs[0])
    if any(len(shape) not in (0, rank) for shape in case.shapes):
        raise Cannot
    if any(own not in (None, axis) for own in case.axes):
        raise Cannot
    operands = [axis if shape else None for shape in case.shapes]
    return case.written(operands, [axis] * len(case.outputs), **changed)


def _along_another(name: str) -> Rule:
    """Operations along one axis, which the parameter names."""

    def rule(case: Case) -> Written:
        if case.params[name] == case.axis:
            raise Cannot
        return _all_alike(case, **{name: case.moved([case.params[name]], case.axis)[0]})

    return rule


def reduce(case: Case) -> Written:
    axis, axes = case.axis, case.params["axes"]
    left = None if axis in axes else removed_axes(axis, axes)
    return case.written([axis], [left], axes=case.moved(axes, axis))


def arg_reduce(case: Case) -> Written:
    if case.axis in case.params["axes"]:
        raise Cannot
    return reduce(case)


def broadcast_in_dim(case: Case) -> Written:
    axis, dims = case.axis, case.params["broadcast_dimensions"]
    shape, target = case.params["shape"], dims[case.axis]
    return case.written(
        [axis],
        [target],
        shape=case.spread(shape, target, case.sizes),
        broadcast_dimensions=case.moved(dims, target),
    )


def squeeze(case: Case) -> Written:
    axis, dims = case.axis, case.params["dimensions"]
    return case.written([axis], [removed_axes(axis, dims)], dimensions=case.moved(dims, axis))


def transpose(case: Case) -> Written:
    axis, order = case.axis, case.params["permutation"]
    return case.written([axis], [order.index(axis)], permutation=case.moved(order, axis))


def rev(case: Case) -> Written:
    axis, dims = case.axis, case.params["dimensions"]
    if axis in dims:
        raise Cannot
    return case.written([axis], [axis], dimensions=case.moved(dims, axis))


def slice_(case: Case) -> Written:
    axis, params, count = case.axis, case.params, len(case.sizes)
    size, strides = case.shapes[0][axis], params["strides"]
    if (params["start_indices"][axis], params["limit_indices"][axis]) != (0, size):
        raise Cannot
    if strides is not None and strides[axis] != 1:
        raise Cannot
    return case.written(
        [axis],
        [axis],
        start_indices=case.spread(params["start_indices"], axis, (0,) * count),
        limit_indices=case.spread(params["limit_indices"], axis, case.sizes),
        strides=None if strides is None else case.spread(strides, axis, (1,) * count),
    )


def pad(case: Case) -> Written:
    axis, config = case.axis, case.params["padding_config"]
    if case.axes[0] is None or tuple(config[axis]) != (0, 0, 0):
        raise Cannot
    several = [(0, 0, 0)] * len(case.sizes)
    return case.written([axis, None], [axis], padding_config=case.spread(config, axis, several))


def dot_general(case: Case) -> Written:
    """The axis is one of examples, of one operand's own, or, of both, summed over."""
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = case.params["dimension_numbers"]
    sides = [[*lhs_sum], [*rhs_sum]], [[*lhs_batch], [*rhs_batch]]
    place: list[int | None] = [*case.axes]
    for lhs, rhs in sides:
        for a, b in zip(lhs, rhs, strict=True):
            if a == case.axes[0] or b == case.axes[1]:
                place = [a, b]
    if any(own not in (None, at) for own, at in zip(case.axes, place, strict=True)):
        raise Cannot
    if None not in place and place[0] not in (*lhs_sum, *lhs_batch):
        raise Cannot  # every element of one meets every element of the other
    if place[0] in lhs_sum and None in case.axes:
        raise Cannot  # a dense layer on a flattened map
    numbers = tuple(
        tuple(
            tuple(dims) if at is None else case.moved(dims, at)
            for dims, at in zip(pair, place, strict=True)
        )
        for pair in sides
    )
    return case.written(place, [_place_in_product(case, place)], dimension_numbers=numbers)


def _place_in_product(case: Case, place: Sequence[int | None]) -> int | None:
    """Of the axis in a product's result: those of examples, the left operand's, the right's."""
    sums, batches = case.params["dimension_numbers"]
    if place[0] in sums[0] or place[1] in sums[1]:
        return None
    if place[0] in batches[0]:
        return batches[0].index(place[0])
    free: list[tuple[int, int | None]] = [
        (side, a)
        for side, shape in enumerate(case.shapes)
        for a in range(len(shape))
        if a not in (*sums[side], *batches[side])
    ]
    side = 0 if place[0] is not None else 1
    return len(batches[0]) + free.index((side, place[side]))


def gather(case: Case) -> Written:
    """The axis is one of examples (``take_along_axis``, ``table[labels]``), or all of it is taken
    (``x[:, i]``)."""
    numbers, sizes = case.params["dimension_numbers"], case.params["slice_sizes"]
    batches = [a for a in range(len(case.outputs[0])) if a not in numbers.offset_dims]
    examples = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    pair = next(((a, b) for a, b in examples if case.axes[0] == a or case.axes[1] == b), None)
    axis, of_indices = pair or case.axes
    if any(own not in (None, at) for own, at in zip(case.axes, (axis, of_indices), strict=True)):
        raise Cannot
    if pair is None and None not in (axis, of_indices):
        raise Cannot
    if of_indices is not None:
        target, taken = batches[of_indices], (1,) * len(case.sizes)
    else:
        kept = _dims_of_slices(numbers, len(sizes))
        if axis not in kept or sizes[axis] != case.shapes[0][axis]:
            raise Cannot
        if axis in numbers.start_index_map:
            raise Cannot  # where it begins is one coordinate
        target, taken = numbers.offset_dims[kept.index(axis)], case.sizes
    changed = {"offset_dims": case.moved(numbers.offset_dims, target)}
    if axis is not None:
        own = ("collapsed_slice_dims", "start_index_map", "operand_batching_dims")
        changed.update((name, case.moved(getattr(numbers, name), axis)) for name in own)
        sizes = case.spread(sizes, axis, taken)
    if of_indices is not None:
        dims = case.moved(numbers.start_indices_batching_dims, of_indices)
        changed["start_indices_batching_dims"] = dims
    return case.written(
        [axis, of_indices],
        [target],
        dimension_numbers=numbers._replace(**changed),
        slice_sizes=sizes,
    )


def _dims_of_slices(numbers: lax.GatherDimensionNumbers, rank: int) -> list[int]:
    """Axes of the operand that slices have."""
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    return [axis for axis in range(rank) if axis not in gone]


def scatter_add(case: Case) -> Written:
    """The axis is one of the numbers of a sum (``jax.ops.segment_sum``)."""
    numbers = case.params["dimension_numbers"]
    batches = [a for a in range(len(case.shapes[2])) if a not in numbers.update_window_dims]
    of_indices = case.axes[1]
    if of_indices is None and case.axes[2] in batches:
        of_indices = batches.index(case.axes[2])
    if of_indices is None or of_indices in numbers.scatter_indices_batching_dims:
        raise Cannot
    places = (None, of_indices, batches[of_indices])
    if any(own not in (None, at) for own, at in zip(case.axes, places, strict=True)):
        raise Cannot
    changed = numbers._replace(
        update_window_dims=case.moved(numbers.update_window_dims, places[2]),
        scatter_indices_batching_dims=case.moved(numbers.scatter_indices_batching_dims, of_indices),
    )
    return case.written(places, [None], dimension_numbers=changed)


_RULES: Mapping[Any, Rule] = {
    **dict.fromkeys(
        (
            lax.reduce_and_p,
            lax.reduce_max_p,
            lax.reduce_min_p,
            lax.reduce_or_p,
            lax.reduce_prod_p,
            lax.reduce_sum_p,
        ),
        reduce,
    ),
    **dict.fromkeys((lax.argmax_p, lax.argmin_p), arg_reduce),
    **dict.fromkeys(
        (lax.cumlogsumexp_p, lax.cummax_p, lax.cummin_p, lax.cumprod_p, lax.cumsum_p),
        _along_another("axis"),
    ),
    lax.top_k_p: _along_another("axis"),
    lax.sort_p: _along_another("dimension"),
    lax.concatenate_p: _along_another("dimension"),
    lax.broadcast_in_dim_p: broadcast_in_dim,
    lax.dot_general_p: dot_general,
    lax.gather_p: gather,
    lax.pad_p: pad,
    lax.rev_p: rev,
    lax.scatter_add_p: scatter_add,
    lax.slice_p: slice_,
    lax.squeeze_p: squeeze,
    lax.transpose_p: transpose,
}
