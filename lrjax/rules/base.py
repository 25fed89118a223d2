"""The contract of a rule: how one primitive runs on a block of rows.

A rule looks at an equation whose operands carry rows along known axes and answers with a
``RowOp``: which rows each operand must supply, which axis of each output carries rows, and how to
evaluate one block. Rules are registered by primitive name, like batching rules; a rule raises
``NotRowLocal`` where an equation cannot run row by row, and the operation falls back to column.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrjax.program.compatibility import bind
from lrjax.program.constants import Constant
from lrjax.program.varying import struct
from lrjax.rules.geometry import AnyMap

Shape = tuple[int, ...]
Array = jax.Array

# Elements of the largest constant whose every element is looked at.
LARGEST_CHECKED = 2**16


class NotRowLocal(Exception):
    """The equation mixes rows in a way that no row map describes; the reason is the message."""


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


@dataclasses.dataclass(frozen=True)
class Rows:
    """The output rows of a block.

    Attributes:
      start: the first row; may be traced.
      count: how many, never traced.
      is_differentiated: the block will be differentiated (2PS, OverL).
    """

    start: Any
    count: int
    is_differentiated: bool = False


@dataclasses.dataclass(frozen=True)
class RowRead:
    """How an operand supplies rows.

    Attributes:
      row_map: the rows needed for a range of output rows.
      axis: the operand's row axis.
      fill: what rows outside the image must hold when they are read; None if they only reach
        output rows that are outside too.
    """

    row_map: AnyMap
    axis: int
    fill: Any = None


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
      is_tame: finite rows give finite rows and finite derivatives.
      is_positional: a row's values depend on its number, not on what is read alone.
      undifferentiable: why blocks cannot be differentiated one by one (2PS, OverL), or None.
    """

    reads: tuple[RowRead | None, ...]
    out_axes: tuple[int | None, ...]
    height: int
    evaluate: Evaluate
    reduction: str | None = None
    drivers: tuple[int, ...] = ()
    flops: float = 0.0
    is_tame: bool = True
    is_positional: bool = False
    undifferentiable: str | None = None


Rule = Callable[[Equation], RowOp]
_REGISTRY: dict[str, Rule] = {}


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Register a rule for primitives, by name."""

    def register(function: Rule) -> Rule:
        for name in primitives:
            _REGISTRY[name] = function
        return function

    return register


def row_op(equation: Equation) -> RowOp:
    """The row-wise form of an equation with a row operand, or ``NotRowLocal``."""
    name = equation.primitive.name
    if name not in _REGISTRY:
        raise NotRowLocal(f"no rule for {name}")
    return _REGISTRY[name](equation)


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
