"""A function and its arguments -> a flat program with the row axis of every input."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lrjax.program.batched_gathers import with_batched_gathers
from lrjax.program.constant_slices import with_constant_slices
from lrjax.program.inline import (
    Atom,
    FlatEquation,
    FlatProgram,
    flatten,
    is_moving,
    replaced_at,
)
from lrjax.program.interpreter import collection_paused
from lrjax.program.manual_axes import with_casts_outside
from lrjax.program.references import NEW as NEW_REFERENCE
from lrjax.program.varying import is_inexact, is_reference
from lrjax.rowgraph.graph import build
from lrjax.rowgraph.merged_axes import with_axes_apart

# True while the function of a row-wise one is traced. It is part of the keys of JAX's caches, so
# that what is traced within one is not used outside, nor the other way round.
_IS_TRACING = jax.make_user_context(False)


def is_within_rowwise() -> bool:
    """Whether a function is called by one that runs row by row itself, and decides for both."""
    return bool(_IS_TRACING.value)


def full_trace(fun: Callable[..., Any], arrays: Sequence[Any]) -> tuple[Any, Any]:
    """The jaxpr and the result's types; row-wise functions in ``fun`` are what they are made of."""
    with _IS_TRACING(True), collection_paused():
        return jax.make_jaxpr(fun, return_shape=True)(*arrays)


@dataclasses.dataclass(frozen=True)
class Traced:
    """A traced call.

    Attributes:
      program: custom derivatives kept; inputs are closed-over arrays, then the call's arrays;
        outputs are the leaves of the result, then what ``effects`` read.
      inputs: the arrays of those inputs.
      axes: their row axes.
      out_tree: structure of the call's result.
      effects: callbacks without results, which run on whole values after the program.
      weak: numbers of the outputs whose types are weak, as Python's scalars have them.
      closed_over: how many of the inputs are closed-over arrays.
    """

    program: FlatProgram
    inputs: tuple[Any, ...]
    axes: tuple[int | None, ...]
    out_tree: Any
    effects: tuple[FlatEquation, ...] = ()
    weak: frozenset[int] = frozenset()
    closed_over: int = 0

    @property
    def outputs(self) -> tuple[Atom, ...]:
        """The leaves of the call's result."""
        return self.program.outputs[: self.out_tree.num_leaves]


def trace(
    fun: Callable[..., Any], in_axes: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Traced:
    """Trace ``fun(*args, **kwargs)`` at full shape.

    Keyword arguments that are not arrays (flags, strings, None) stay as they are.

    Raises:
      ValueError: where ``in_axes`` does not fit the arguments.
    """
    axes = flat_axes(in_axes, args)
    leaves, tree = jax.tree.flatten(args)
    _check_arrays(args)
    keyword_arrays, keywords_of = arrays_in(kwargs)
    out_tree: Any = None

    def flat(*arrays: Any) -> list[Any]:
        nonlocal out_tree
        positional = jax.tree.unflatten(tree, arrays[: len(leaves)])
        result = fun(*positional, **keywords_of(arrays[len(leaves) :]))
        outputs, out_tree = jax.tree.flatten(result)
        return outputs

    arrays = [*leaves, *keyword_arrays]
    try:
        closed, _ = full_trace(flat, arrays)
    except (TypeError, ValueError) as error:
        _explain_heights(leaves, axes, error)
        raise
    program = flatten(
        closed,
        keep_custom_rules=True,
        constants_are_inputs=True,
        row_axes=axes,
        typed=row_axes_of,
    )
    program = with_batched_gathers(with_constant_slices(program))
    consts = tuple(filter(is_moving, closed.consts))
    all_axes = (*(None,) * len(consts), *axes, *(None,) * len(keyword_arrays))
    program, inputs, input_axes = with_casts_outside(program, (*consts, *arrays), all_axes)
    program = with_axes_apart(program, input_axes)
    program, effects = _lifted_effects(program, inputs)
    weak = frozenset(
        i for i, aval in enumerate(closed.out_avals) if getattr(aval, "weak_type", False)
    )
    return Traced(program, inputs, input_axes, out_tree, effects, weak, len(consts))


def _lifted_effects(
    program: FlatProgram, inputs: Sequence[Any]
) -> tuple[FlatProgram, tuple[FlatEquation, ...]]:
    """A program without the equations that have an effect and no result, and these equations.

    What they read becomes an output, so that a callback runs once, on whole values, after the
    program: inside, each pass over a recomputed forward would call it again.

    Raises:
      ValueError: one writes to a mutable array, which may be read before the end; or ordered ones
        come before an ordered one with a result.
    """
    effects = tuple(e for e in program.equations if e.has_effects and not e.outputs)
    mutable = {v for e in program.equations if e.primitive is NEW_REFERENCE for v in e.outputs}
    mutable |= {v for v, x in zip(program.inputs, inputs, strict=True) if is_reference(x)}
    for equation in effects:
        if mutable.intersection(equation.values):
            raise ValueError(
                f"fun has a {equation.primitive.name} without results that writes to a mutable "
                "array (jax.new_ref), so it cannot be put in order with what reads the array; "
                "let it return what it writes, and write that outside of it."
            )
    ordered = [not e.outputs for e in program.equations if e.params.get("ordered")]
    if ordered != sorted(ordered):
        raise ValueError(
            "fun has an ordered io_callback without a result before one with a result; those "
            "without run after the rest of fun, so give it a result, or move it behind."
        )
    read = (v for equation in effects for v in equation.values)
    lean = dataclasses.replace(
        program,
        equations=tuple(e for e in program.equations if e not in effects),
        outputs=(*program.outputs, *dict.fromkeys(read)),
    )
    return lean if effects else program, effects


def flat_axes(in_axes: Any, args: tuple[Any, ...]) -> tuple[int | None, ...]:
    """Row axis of every leaf of the positional arguments, checked and non-negative."""
    if isinstance(in_axes, list):
        in_axes = tuple(in_axes)
    if isinstance(in_axes, tuple) and len(in_axes) != len(args):
        raise ValueError(
            f"in_axes has {len(in_axes)} entries for {len(args)} positional arguments; give one "
            "entry per argument (an int, None, or a pytree of them)."
        )

    def spread(axis: Any, subtree: Any) -> _Spread:
        return _Spread([axis] * len(jax.tree.leaves(subtree)))

    try:
        spreads = jax.tree.map(spread, in_axes, args, is_leaf=lambda axis: axis is None)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"in_axes={in_axes!r} is not a pytree prefix of the positional arguments; give an int "
            f"or None for each, or a tree of them that fits the argument's own. JAX says: {error}"
        ) from error
    if isinstance(in_axes, int) or in_axes is None:
        flat: list[Any] = spread(in_axes, args)
    else:
        flat = list(itertools.chain.from_iterable(jax.tree.leaves(spreads)))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(args)]
    leaves = jax.tree.leaves(args)
    checked = tuple(
        _checked_axis(axis, leaf, f"args{path}")
        for axis, leaf, path in zip(flat, leaves, paths, strict=True)
    )
    if not args:
        raise ValueError(
            "in_axes: there are no positional arguments, and keyword arguments carry no rows; pass "
            "what carries rows by position."
        )
    if all(axis is None for axis in checked):
        raise ValueError(
            f"in_axes={in_axes!r}: no argument carries rows; name the row axis of at least one "
            "argument, e.g. in_axes=(None, 1) for fun(params, images) with images in NHWC order."
        )
    return checked


def differentiated_leaves(args: tuple[Any, ...], wrt: int | Sequence[int]) -> tuple[int, ...]:
    """Numbers of the floating-point leaves of some positional arguments.

    Raises:
      ValueError: there is no such argument, or none of them has any.
    """
    numbers = tuple(wrt) if isinstance(wrt, Sequence) else (wrt,)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            raise ValueError(f"wrt={wrt!r} must be numbers of positional arguments.")
        if not -len(args) <= number < len(args):
            raise ValueError(
                f"wrt={wrt!r}: there is no argument {number} among {len(args)}; count from 0."
            )
    chosen = {number % len(args) for number in numbers}
    leaves = jax.tree_util.tree_leaves_with_path(args)
    found = tuple(
        i
        for i, (path, leaf) in enumerate(leaves)
        if path[0].idx in chosen and is_inexact(jax.typeof(leaf) if np.isscalar(leaf) else leaf)
    )
    if not found:
        raise ValueError(
            f"wrt={wrt!r}: there is no floating-point array to differentiate by; name the "
            "arguments that hold the parameters."
        )
    return found


class _Spread(list[Any]):
    """One axis for each leaf of a subtree; a list of its own type is a leaf to JAX."""


def _checked_axis(axis: Any, leaf: Any, name: str) -> int | None:
    if axis is None:
        return None
    if isinstance(axis, bool) or not isinstance(axis, int | np.integer):
        raise ValueError(f"in_axes: the entry for {name} is {axis!r}; it must be an int or None.")
    shape = np.shape(leaf)
    if not -len(shape) <= axis < len(shape):
        allowed = f"are {-len(shape)} to {len(shape) - 1}, or None" if shape else "is only None,"
        raise ValueError(
            f"in_axes: axis {axis} of {name} does not exist, its shape is {shape}; allowed "
            f"{allowed} if it carries no rows."
        )
    axis = int(axis) % len(shape)
    if shape[axis] == 0:
        raise ValueError(
            f"{name} has shape {shape}: its row axis {axis} is empty; give at least one row."
        )
    return axis


def _check_arrays(args: tuple[Any, ...]) -> None:
    """Refuse what JAX cannot trace, by its name."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        if not hasattr(leaf, "dtype") and (isinstance(leaf, str | bytes) or callable(leaf)):
            raise ValueError(
                f"args{jax.tree_util.keystr(path)}={leaf!r:.80} is no array; pass it as a keyword "
                "argument, which stays as it is, or close over it."
            )


def _explain_heights(leaves: list[Any], axes: tuple[int | None, ...], error: Exception) -> None:
    heights = [np.shape(x)[a] for x, a in zip(leaves, axes, strict=True) if a is not None]
    if len(set(heights)) > 1:
        raise ValueError(
            f"the row arguments have {heights} rows and fun cannot be traced with them, so they "
            f"cannot be aligned: {error}. Give row arguments whose rows meet one to one, or at the "
            "strides that fun applies."
        ) from error


def row_axes_of(program: FlatProgram, axes: Sequence[int | None]) -> Mapping[int, int]:
    """The row axis of every value of a program that carries rows."""
    return build(program, axes).row_axis


def arrays_in(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays of a pytree, and the pytree as a function of them; all else stays as it is."""
    leaves, structure = jax.tree.flatten(tree)
    numbers = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

    def joined(arrays: Sequence[Any]) -> Any:
        return jax.tree.unflatten(structure, replaced_at(leaves, numbers, arrays))

    return [leaves[i] for i in numbers], joined


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, traced or described by its type; Python's numbers are none."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)
