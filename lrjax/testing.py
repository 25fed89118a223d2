"""The checker: does ``fun`` give the same values and gradients by rows as it does whole?

Every rule, strategy and model goes through :func:`assert_same_as_column`, here and in code that
uses lrjax. What is compared is exact arithmetic in another order, so that only rounding may differ.
How much, is decided for every array by itself (`n` roundings: `n` times the dtype's ``eps`` times
the array's largest magnitude):

* Within 8 roundings of column, or 1e-11 in float64: the same.
* Else, in float32, column is run in float64 as well, and thrice on arguments that are moved by one
  rounding. Its own error is its distance from float64, or the median of the three if that is more.
  A result may be 4 times as far from float64, and 8 roundings.
* In float64, and where a function has no float64 form (it casts to float32, or draws other random
  numbers then), the result may be 16 times as far from column as the three are, and 8 roundings
  (1e-11).
* In half precision Euclidean distances count (single elements jump at a ReLU's zero). An array may
  be twice as far from float64 as column, and 2 roundings; all together 1.1 times as far as
  column, and a quarter rounding. Programs are compiled to round where they say so; see
  ``gradient_program``.

An array of which less than half the digits are right in column can hide an error. It is compared
only if it is what cancellation leaves over (below a thousand roundings of the largest beside it);
else the check fails and says so. The factors were measured with ``lrjax.models`` and generated
networks: the largest were 2.2 (for 4), 6.1 (for 16), 1.005 (for 1.1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrjax.gradient_program import HALF_PRECISION, GradientProgram, is_inexact, leaves_of, wide
from lrjax.options import Cuts, MeshOption, StrategyOption, checked_options
from lrjax.rowgraph.calls import watched
from lrjax.rowgraph.proofs import assert_proofs_hold
from lrjax.transform import rowwise_with

__all__ = [
    "HALF_PRECISION",
    "Results",
    "assert_same_as_column",
    "check",
    "max_error",
    "norm_error",
    "results",
]

# What is always accepted, relative to an array's own largest magnitude.
_ROUNDINGS = 8
_FLOAT64_TOLERANCE = 1e-11
_EPS_FLOAT64 = float(np.finfo(np.float64).eps)
# Times column's own error, where float64 tells it; else times how far moved arguments take column.
_OF_OWN_ERROR = 4
_OF_MOVEMENT = 16
# In half precision: of an array, and of all together.
_HALF_ROUNDINGS = 2
_HALF_OF_OWN_ERROR = 2
_HALF_OF_MOVEMENT = 1
_HALF_TOGETHER = 1.1
# Column this much further from float64 than moved arguments take it: that is another function.
_MOST_MOVEMENTS = 30
# Below this many roundings of the largest array beside it, an array is what cancellation left over.
_CANCELLED = 1e3


@dataclasses.dataclass(frozen=True)
class Results:
    """What a function gives: its outputs, and the gradients of their random contraction.

    Attributes:
      outputs: the function's result.
      gradients: path of an argument's array -> gradient of ``sum(output * cotangent)``.
      program: what gave them, and can be run again to see how far rounding takes it. Without one,
        arrays are only compared with column.
    """

    outputs: Any
    gradients: dict[str, Any] = dataclasses.field(default_factory=dict)
    program: GradientProgram | None = dataclasses.field(default=None, repr=False, compare=False)


def results(
    fun: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    argnums: Sequence[int] | None = None,
    seed: int = 0,
) -> Results:
    """Outputs and gradients of a function, from one compiled program.

    Args:
      fun: the function.
      args: its positional arguments.
      kwargs: its keyword arguments.
      argnums: arguments to differentiate; all by default. Integer arrays are left out.
      seed: of the cotangents that the outputs are contracted with.
    """
    program = GradientProgram(fun, args, kwargs, argnums, seed)
    return Results(*program(), program)


def assert_same_as_column(
    fun: Callable[..., Any],
    args: Sequence[Any],
    in_axes: Any,
    *,
    num_blocks: int | Sequence[int] | None = None,
    strategy: StrategyOption = "stream",
    cuts: Cuts = (),
    plan: Any = None,
    offload: bool = False,
    mesh: MeshOption = None,
    row_mesh_axis: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    argnums: Sequence[int] | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    expected: Results | None = None,
) -> Results:
    """Assert that ``lrjax.rowwise(fun, ...)`` gives ``fun``'s outputs and gradients.

    Outputs are contracted with fixed random cotangents and differentiated with respect to every
    floating-point array among the arguments. Shapes, dtypes and integers must be equal; values
    differ by rounding, of which the module's docstring says how it is measured.

    Args:
      fun: the function.
      args: its positional arguments.
      in_axes, num_blocks, strategy, cuts, plan, offload, mesh, row_mesh_axis: as for
        :func:`lrjax.rowwise`.
      kwargs: keyword arguments of ``fun``.
      argnums: arguments to differentiate, all by default.
      tolerance: instead of 8 roundings or 1e-11, relative to an array's largest magnitude.
      seed: of the cotangents.
      expected: what an earlier check of the same function with the same seed returned; saves
        running column again, and its errors too.

    Returns:
      Column's results.

    Raises:
      AssertionError: naming every array that differs, by how much and where; or a custom
        derivative that was tiled and is not what was proved of it.
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
    row_fun = rowwise_with(fun, in_axes, options)
    given = expected.program if expected else None
    column = given or GradientProgram(fun, args, kwargs, argnums, seed)
    # First, so that options that do not fit are refused before anything is compiled. With column's
    # cotangents, so that it is not traced for its shapes and again for its gradients.
    with watched() as calls:
        by_rows = GradientProgram(row_fun, args, kwargs, argnums, column.cotangents)
        found = Results(*by_rows(), by_rows)
    assert_proofs_hold(calls.values(), seed)
    expected = expected or Results(*column(), column)
    check(found, expected, tolerance=tolerance)
    return expected


def check(
    found: Results,
    expected: Results,
    *,
    truth: Results | None = None,
    tolerance: float | None = None,
) -> None:
    """Compare results with column's.

    Args:
      found: those by rows.
      expected: column's.
      truth: column's in float64 for the same arguments and cotangents, where the function itself
        says in which dtype it computes; else it is run on float64 arguments where that is needed.
      tolerance: instead of 8 roundings or 1e-11, relative to an array's largest magnitude.

    Raises:
      AssertionError: naming every array that differs, by how much and where; also where nothing
        could have differed, because all gradients are zero.
    """
    structures: list[Any] = [jax.tree.structure(r.outputs) for r in (found, expected)]
    assert structures[0] == structures[1], f"{structures[0]} is not column's {structures[1]}"
    pairs = list(_pairs(found, expected))
    complaints = [_named(p, _mismatch(p.found, p.column)) for p in pairs]
    if not any(complaints):
        complaints = [_named(p, _integer_error(p)) for p in pairs if not p.is_inexact]
        inexact = [p for p in pairs if p.is_inexact]
        complaints += _rounding_errors(inexact, expected.program, truth, tolerance)
    listed = "\n  ".join(complaint for complaint in complaints if complaint)
    assert not listed, "row by row is not column:\n  " + listed
    if expected.gradients:
        moving = any(np.any(wide(g) != 0) for g in expected.gradients.values())
        assert moving, "every gradient is zero, so the comparison says nothing"


def max_error(value: Any, reference: Any) -> float:
    """The largest difference of two arrays, relative to the reference's largest magnitude."""
    value, reference = wide(value), wide(reference)
    return _largest(value - reference) / (_largest(reference) or 1.0)


def norm_error(value: Any, reference: Any) -> float:
    """The Euclidean distance of two arrays, relative to the reference's norm."""
    value, reference = wide(value), wide(reference)
    return _norm(value - reference) / (_norm(reference) or 1.0)


# --- Arrays in pairs -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Pair:
    """An array by rows and column's.

    Attributes:
      name: what it is.
      number: among all outputs and gradients.
      kind: "output" or "gradient".
      found: by rows.
      column: what it is compared with.
    """

    name: str
    number: int
    kind: str
    found: Any
    column: Any

    @property
    def is_inexact(self) -> bool:
        return is_inexact(self.column)


def _pairs(found: Results, expected: Results) -> Iterator[_Pair]:
    outputs = jax.tree_util.tree_leaves_with_path(expected.outputs)
    names = [("output", f"output{jax.tree_util.keystr(path)}") for path, _ in outputs]
    names += [("gradient", f"gradient of {name}") for name in expected.gradients]
    arrays = [[*jax.tree.leaves(r.outputs), *r.gradients.values()] for r in (found, expected)]
    for number, ((kind, name), *both) in enumerate(zip(names, *arrays, strict=True)):
        yield _Pair(name, number, kind, *map(_numbers, both))


def _numbers(array: Any) -> Any:
    is_keys = jnp.issubdtype(jnp.result_type(array), jax.dtypes.prng_key)
    return jax.random.key_data(array) if is_keys else array


def _named(pair: _Pair, complaint: str | None) -> str | None:
    return complaint and f"{pair.name}: {complaint}"


def _mismatch(found: Any, expected: Any) -> str | None:
    """What is wrong with an array besides its values."""
    if np.shape(found) != np.shape(expected):
        return f"shape {np.shape(found)}, column's is {np.shape(expected)}"
    if jnp.result_type(found) != jnp.result_type(expected):
        return f"dtype {jnp.result_type(found)}, column's is {jnp.result_type(expected)}"
    if not np.all(np.isfinite(wide(expected))):
        return "column's has values that are not finite"
    if not np.all(np.isfinite(wide(found))):
        return "has values that are not finite, column's has none"
    return None


def _integer_error(pair: _Pair) -> str | None:
    wrong = np.count_nonzero(np.asarray(pair.found) != np.asarray(pair.column))
    return f"{wrong} of {np.size(pair.column)} elements differ" if wrong else None


# --- Rounding ------------------------------------------------------------------------------------


def _rounding_errors(
    pairs: Sequence[_Pair],
    program: GradientProgram | None,
    truth: Results | None,
    tolerance: float | None,
) -> list[str | None]:
    """Complaints about arrays that differ by more than rounding."""
    if program is not None and program.is_in_half_precision:
        return _half_precision_errors(pairs, _Yardstick(program, truth, pairs, _norm))
    limits = [(p, _accepted(p) if tolerance is None else tolerance) for p in pairs]
    far = [(p, limit) for p, limit in limits if max_error(p.found, p.column) > limit]
    if program is None:
        wide_pairs = [(p, wide(p.column), limit) for p, limit in far]
        return [_named(p, _difference(p, c, limit * _largest(c))) for p, c, limit in wide_pairs]
    if not far:
        return []
    yardstick = _Yardstick(program, truth, pairs, _largest)
    largest = {p.kind: 0.0 for p in pairs}
    for p in pairs:
        largest[p.kind] = max(largest[p.kind], _largest(wide(p.column)))
    return [_named(p, _error(p, yardstick, largest[p.kind], tolerance)) for p, _ in far]


def _accepted(pair: _Pair) -> float:
    """The relative error that needs no further look."""
    eps = _eps(pair)
    return _FLOAT64_TOLERANCE if eps <= _EPS_FLOAT64 else _ROUNDINGS * eps


class _Yardstick:
    """How far column is from the truth by rounding, array by array.

    Args:
      program: column's.
      truth: its results in float64, where the program does not give them itself.
      pairs: all arrays in floating point.
      size: of an array, or of a difference.
    """

    def __init__(
        self,
        program: GradientProgram,
        truth: Results | None,
        pairs: Sequence[_Pair],
        size: Callable[[np.ndarray], float],
    ):
        self._moved, self._size = program.moved, size
        self.eps = float(jnp.finfo(program.precision).eps)
        true = program.truth if truth is None else leaves_of(truth.outputs, truth.gradients)
        is_told = true is not None and all(self._is_of(p, true[p.number]) for p in pairs)
        self.truth = true if is_told else None

    def _is_of(self, pair: _Pair, true: np.ndarray) -> bool:
        """Whether a result in float64 is that of the same function."""
        column = wide(pair.column)
        accepted = _MOST_MOVEMENTS * self._movement(pair, column)
        accepted += _ROUNDINGS * self.eps * self._size(true)
        return self._size(column - true) <= accepted

    def _movement(self, pair: _Pair, reference: np.ndarray) -> float:
        off = [self._size(moved[pair.number] - reference) for moved in self._moved]
        return float(np.median(np.nan_to_num(off, nan=np.inf)))

    def reference(self, pair: _Pair) -> np.ndarray:
        """What both are compared with: float64's result, or column's."""
        return wide(pair.column) if self.truth is None else self.truth[pair.number]

    def movement(self, pair: _Pair) -> float:
        """How far moved arguments take column from the reference."""
        return self._movement(pair, self.reference(pair))

    def columns_error(self, pair: _Pair) -> float:
        """Column's distance from the reference; nothing where column is the reference."""
        return self._size(wide(pair.column) - self.reference(pair))

    def error(self, pair: _Pair) -> float:
        """The distance by rows."""
        return self._size(wide(pair.found) - self.reference(pair))

    def size(self, pair: _Pair) -> float:
        return self._size(self.reference(pair))


def _error(
    pair: _Pair, yardstick: _Yardstick, largest: float, tolerance: float | None
) -> str | None:
    """A complaint about an array that is further from column's than rounding explains.

    ``largest`` is the magnitude of the largest array beside it.
    """
    eps, size = yardstick.eps, yardstick.size(pair)
    own = max(yardstick.columns_error(pair), yardstick.movement(pair))
    factor = _OF_MOVEMENT if yardstick.truth is None else _OF_OWN_ERROR
    accepted = max(_accepted(pair), _ROUNDINGS * eps * (eps > _eps(pair)))
    allowed = factor * own + size * (accepted if tolerance is None else tolerance)
    if own > max(np.sqrt(eps) * size, _CANCELLED * eps * largest):
        return (
            f"column's own is off by {own:.2e} of {size:.2e} where arguments move by one rounding, "
            "which may hide anything: use float64, or other arguments"
        )
    if yardstick.error(pair) <= allowed:
        return None
    return _difference(pair, yardstick.reference(pair), allowed)


def _difference(pair: _Pair, reference: np.ndarray, allowed: float) -> str:
    off, size = np.abs(wide(pair.found) - reference), _largest(reference) or 1.0
    wrong = np.argwhere(off > allowed)
    first = tuple(map(int, wrong[0])) if len(wrong) else ()
    return (
        f"relative error {_largest(off) / size:.2e} (allowed {allowed / size:.0e}) in {len(wrong)} "
        f"of {off.size} elements of shape {off.shape}, the first at {first}"
    )


def _half_precision_errors(pairs: Sequence[_Pair], yardstick: _Yardstick) -> list[str | None]:
    complaints = [_named(p, _half_precision_error(p, yardstick)) for p in pairs]
    for kind in ("output", "gradient"):
        among = [p for p in pairs if p.kind == kind]
        error, own, size = (
            float(np.linalg.norm([measure(p) for p in among]))
            for measure in (yardstick.error, yardstick.columns_error, yardstick.size)
        )
        allowed = _HALF_TOGETHER * own + yardstick.eps / 4 * size
        if yardstick.truth is not None and error > allowed:
            complaints.append(f"all {kind}s: error {error:.2e}, column's own {own:.2e}")
    return complaints


def _half_precision_error(pair: _Pair, yardstick: _Yardstick) -> str | None:
    own, size = yardstick.columns_error(pair), yardstick.size(pair)
    allowed = _HALF_ROUNDINGS * yardstick.eps * size + _HALF_OF_OWN_ERROR * own
    if yardstick.truth is None or own > size:  # what cancellation leaves over is one draw of many
        allowed += _HALF_OF_MOVEMENT * yardstick.movement(pair)
    error = yardstick.error(pair)
    if error <= allowed:
        return None
    size = size or 1.0
    return f"error {error / size:.2e} (allowed {allowed / size:.2e}), column's own {own / size:.2e}"


def _eps(pair: _Pair) -> float:
    return float(jnp.finfo(jnp.result_type(pair.column)).eps)


def _largest(array: np.ndarray) -> float:
    return float(np.max(np.abs(array), initial=0.0))


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(np.ravel(array)))
