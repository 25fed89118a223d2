"""The contract of a rule: how one primitive runs on a block of rows.

A rule looks at an equation whose operands carry rows along known axes and answers with a
``RowOp``: which rows each operand must supply, which axis of each output carries rows, and how to
evaluate one block. A rule raises ``NotRowLocal`` where an equation cannot run row by row, and the
operation falls back to column. A ``Rule`` is registered for primitives, like batching rules, with
all else that is known of them: their ``Traits``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive

from lrjax.program.compatibility import bind
from lrjax.program.constants import Constant
from lrjax.program.varying import struct
from lrjax.rules.geometry import IDENTITY, AnyMap
from lrjax.rules.traits import UNKNOWN_PRIMITIVE, Traits

Shape = tuple[int, ...]
Array = jax.Array

# Elements of the largest constant whose every element is looked at.
LARGEST_CHECKED = 2**16


class NotRowLocal(Exception):
    """The equation mixes rows in a way that no row map describes; the reason is the message.

    Attributes:
      out_axes: along which its results carry rows all the same, as far as a rule knows.
    """

    def __init__(self, reason: str, out_axes: Sequence[int | None] = ()):
        super().__init__(reason)
        self.out_axes = out_axes


@dataclasses.dataclass(frozen=True)
class Operand:
    """What a rule knows of an operand.

    Attributes:
      shape, dtype: of the whole value.
      row_axis: the axis that carries rows, None for a value that only exists whole.
      constant: the value, computed on demand, if no input of the program changes it; literals too.
      varying: axes of an enclosing ``jax.shard_map`` over which it may differ between devices.
    """

    shape: Shape
    dtype: Any
    row_axis: int | None
    constant: Constant | None = None
    varying: frozenset[str] = frozenset()

    @property
    def struct(self) -> jax.ShapeDtypeStruct:
        """The type of the whole value."""
        return struct(self.shape, self.dtype, self.varying)

    @property
    def height(self) -> int:
        assert self.row_axis is not None
        return self.shape[self.row_axis]

    @property
    def is_finite(self) -> bool:
        """No infinity and no NaN among the elements, where the program makes them of no input."""
        if self.constant is None or not jnp.issubdtype(self.dtype, np.inexact):
            return True
        return math.prod(self.shape) <= LARGEST_CHECKED and bool(
            np.all(np.isfinite(self.constant.value()))
        )


@dataclasses.dataclass(frozen=True)
class Equation:
    """A primitive applied to operands; ``outputs`` are (shape, dtype) of the whole results."""

    primitive: Any
    params: dict[str, Any]
    operands: tuple[Operand, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]

    @property
    def structs(self) -> list[jax.ShapeDtypeStruct]:
        """Types of the whole operands."""
        return [operand.struct for operand in self.operands]

    @property
    def row_operand(self) -> int:
        """Index of the first operand that carries rows."""
        return next(i for i, operand in enumerate(self.operands) if operand.row_axis is not None)

    @property
    def row_axis(self) -> int:
        axis = self.operands[self.row_operand].row_axis
        assert axis is not None
        return axis

    @property
    def height(self) -> int:
        return self.operands[self.row_operand].height

    def bind(self, *values: Array, **changed: Any) -> list[Array]:
        """Apply the primitive to ``values``, with some parameters ``changed``."""
        return bind(self.primitive, values, {**self.params, **changed})

    def bind_block(self, windows: Sequence[Array], rows: Rows) -> Sequence[Array]:
        """Apply the primitive to windows as to whole operands; an ``Evaluate``."""
        del rows
        return self.bind(*windows)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["start"],
    meta_fields=["count", "is_differentiated", "keeps_rules"],
)
@dataclasses.dataclass(frozen=True)
class Rows:
    """The output rows of a block.

    Attributes:
      start: the first row; may be traced.
      count: how many, never traced.
      is_differentiated: the block will be differentiated (2PS, OverL).
      keeps_rules: custom derivatives stay what they are, nothing else is changed: the block becomes
        a program that a strategy differentiates (micro-batches).
    """

    start: Any
    count: int
    is_differentiated: bool = False
    keeps_rules: bool = False


@dataclasses.dataclass(frozen=True)
class RowRead:
    """How an operand supplies rows.

    Attributes:
      row_map: the rows needed for a range of output rows.
      axis: the operand's row axis.
      fill: what rows outside the image must hold when they are read; None if they only reach
        output rows that are outside too.
      slack: rows behind the window that a block may be given too, and ignores: where they are
        there, the window need not be cut from them.
    """

    row_map: AnyMap
    axis: int
    fill: Any = None
    slack: int = 0


Evaluate = Callable[[Sequence[Array], Rows], Sequence[Array]]


@dataclasses.dataclass(frozen=True)
class RowOp:
    """How an equation runs on rows.

    Attributes:
      reads: per operand, None for one that is used whole.
      out_axes: the row axis of every output; ignored for a reduction, whose outputs are whole.
      height: rows of the outputs, or of the operand that drives a reduction.
      evaluate: windows of the operands and the output rows -> blocks of the outputs. A window
        holds exactly the rows of its map, those outside the image included.
      reduction: "sum", "max", "min", "prod", "and" or "or": blocks are combined over steps.
      drivers: operands of a reduction whose rows are masked to those that the step owns.
      flops: operations per output row, to judge what is cheap to run again.
      preserves_finiteness: finite rows give finite rows and finite derivatives.
      is_positional: a row's values depend on its number, not on what is read alone.
      undifferentiable: why blocks cannot be differentiated one by one (2PS, OverL), or None; asked
        for where they are.
    """

    reads: tuple[RowRead | None, ...]
    out_axes: tuple[int | None, ...]
    height: int
    evaluate: Evaluate
    reduction: str | None = None
    drivers: tuple[int, ...] = ()
    flops: float = 0.0
    preserves_finiteness: bool = True
    is_positional: bool = False
    undifferentiable: Callable[[], str | None] = lambda: None


def reads_along(axes: Iterable[int | None], fill: Any = None) -> tuple[RowRead | None, ...]:
    """Operands read row for row along these axes; None for one that is used whole."""
    return tuple(None if axis is None else RowRead(IDENTITY, axis, fill) for axis in axes)


def row_for_row(
    equation: Equation,
    axes: Iterable[int | None],
    out_axis: int,
    *,
    flops: float = 0.0,
    preserves_finiteness: bool = True,
) -> RowOp:
    """The equation with its own parameters on blocks of its operands, row for row.

    Args:
      equation: the equation.
      axes: row axis of every operand, None for one that is used whole.
      out_axis: of every result.
      flops: operations on all rows.
      preserves_finiteness: as of a ``RowOp``.
    """
    return RowOp(
        reads=reads_along(axes),
        out_axes=(out_axis,) * len(equation.outputs),
        height=equation.height,
        evaluate=equation.bind_block,
        flops=flops / max(equation.height, 1),
        preserves_finiteness=preserves_finiteness,
    )


@dataclasses.dataclass(frozen=True)
class Rule:
    """All that is known of a family of primitives.

    Attributes:
      primitives: the primitives themselves, not their names.
      on_rows: an equation with an operand that carries rows -> how it runs on blocks of rows. It
        raises ``NotRowLocal`` where the equation cannot run row by row. None: it never can.
      traits: what is true of every equation of the primitives.
      without_rows: an equation none of whose operands carries rows, and an axis of its result ->
        how rows along that axis are made block by block, or None where the result must be whole.
    """

    primitives: tuple[Primitive, ...]
    on_rows: Callable[[Equation], RowOp] | None
    traits: Traits = UNKNOWN_PRIMITIVE
    without_rows: Callable[[Equation, int], RowOp | None] | None = None


_REGISTRY: dict[Primitive, Rule] = {}


def register(*rules: Rule) -> None:
    """Make rules known.

    A primitive without a rule runs column-wise, and nothing is assumed of it
    (``UNKNOWN_PRIMITIVE``). lrjax's own modules list theirs under ``RULES``; a rule for a primitive
    of your own is registered where you define it, before a function is traced:

      >>> scale_p = jax.extend.core.Primitive("scale")  # and its lowering, derivative, ...
      >>> def scale(equation: Equation) -> RowOp:
      ...     axis = equation.row_axis
      ...     return RowOp(
      ...         reads=(RowRead(IDENTITY, axis),),
      ...         out_axes=(axis,),
      ...         height=equation.height,
      ...         evaluate=lambda windows, rows: equation.bind(*windows),
      ...     )
      >>> register(Rule((scale_p,), scale, Traits(Kind.FUSED, preserves_finiteness=True)))

    Raises:
      ValueError: for a primitive that has a rule.
    """
    for rule in rules:
        for primitive in rule.primitives:
            if primitive in _REGISTRY:
                raise ValueError(
                    f"{primitive.name} has a rule already; register one per primitive."
                )
            _REGISTRY[primitive] = rule


def registered() -> Mapping[Primitive, Rule]:
    """The rule of every primitive that has one."""
    return MappingProxyType(_REGISTRY)


def traits_of(primitive: Any) -> Traits:
    """What is known of a primitive."""
    rule = _REGISTRY.get(primitive)
    return UNKNOWN_PRIMITIVE if rule is None else rule.traits


def row_op(equation: Equation) -> RowOp:
    """The row-wise form of an equation with a row operand.

    Raises:
      NotRowLocal: if it has none.
    """
    rule = _REGISTRY.get(equation.primitive)
    if rule is None or rule.on_rows is None:
        raise NotRowLocal(f"no rule for {equation.primitive.name}")
    return _with_finiteness(rule.on_rows(equation), rule.traits)


def constant_along_rows(equation: Equation, axis: int) -> RowOp | None:
    """The row form of an equation without row operands whose rows are alike, counted or random.

    Returns None where the equation is neither; its output must then exist whole.
    """
    rule = _REGISTRY.get(equation.primitive)
    made = None if rule is None or rule.without_rows is None else rule.without_rows(equation, axis)
    return None if rule is None or made is None else _with_finiteness(made, rule.traits)


def _with_finiteness(op: RowOp, traits: Traits) -> RowOp:
    """The operation, which keeps numbers finite only if every equation of its primitive does."""
    if traits.preserves_finiteness:
        return op
    return dataclasses.replace(op, preserves_finiteness=False)


def with_at(entries: Sequence[Any], position: int, entry: Any) -> tuple[Any, ...]:
    """Sizes, or whatever there is of every axis, with another at one position."""
    return tuple(entry if i == position else own for i, own in enumerate(entries))


def removed_axes(axis: int, removed: Sequence[int]) -> int:
    """Where ``axis`` lands after other axes were removed."""
    return axis - sum(1 for other in removed if other < axis)


def lowest(dtype: Any) -> Any:
    """The identity of max; of complex numbers too, whose real parts are compared first."""
    if jnp.issubdtype(dtype, np.inexact):
        return -_largest(dtype)
    return False if dtype == np.bool_ else int(jnp.iinfo(dtype).min)


def highest(dtype: Any) -> Any:
    """The identity of min."""
    if jnp.issubdtype(dtype, np.inexact):
        return _largest(dtype)
    return True if dtype == np.bool_ else int(jnp.iinfo(dtype).max)


def _largest(dtype: Any) -> float:
    """Infinity, or the largest number of an 8-bit type without infinities."""
    has_infinity = bool(np.isinf(np.asarray(np.inf, dtype)))
    return np.inf if has_infinity else float(jnp.finfo(dtype).max)
