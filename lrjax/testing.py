"""The checker: does ``fun`` give the same values and gradients by rows as it does whole?

Every rule, strategy and model goes through :func:`assert_same_as_column`, here and in code that
uses lrjax. What is compared is exact arithmetic in another order, so the bounds are those of
rounding: 1e-11 in float64, 1e-5 in float32, and in half precision a few times column's own distance
from the truth.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrjax.options import Cuts, checked_options
from lrjax.transform import rowwise_with

TOLERANCES = {"float64": 1e-11, "complex128": 1e-11, "float32": 1e-5, "complex64": 1e-5}
HALF_PRECISION = ("bfloat16", "float16")
BFLOAT16_ROUNDING = 2.0**-8
# On average row-wise is as far from the truth as column; a bias of two elements scatters this much.
_HALF_PRECISION_EXCESS = 3.0
# Below this many roundings of the largest array beside it, an array is what cancellation left over.
_CANCELLED = 1e3

# A check runs a small program once; without LLVM's optimisations it compiles in half the time.
_QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True)
class Results:
    """What a function gives: its outputs, and the gradients of their random contraction.

    Attributes:
      outputs: the function's result.
      gradients: path of an argument's array -> gradient of ``sum(output * cotangent)``.
    """

    outputs: Any
    gradients: dict[str, Any]


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
    kwargs = dict(kwargs or {})
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tuple(args)), strict=True)
    tree = jax.tree.structure(tuple(args))
    wrt = [
        i
        for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True))
        if (argnums is None or path[0].idx in argnums)
        and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    ]
    struct = jax.eval_shape(lambda *xs: fun(*xs, **kwargs), *args)
    cotangents = _cotangents(struct, seed)

    on_cpu = jax.default_backend() == "cpu"

    @functools.partial(jax.jit, compiler_options=_QUICK_COMPILE if on_cpu else None)
    def outputs_and_gradients(arrays: list[Any], cotangents: Any) -> Any:
        def function(*moving: Any) -> Any:
            full = list(arrays)
            for i, value in zip(wrt, moving, strict=True):
                full[i] = value
            return fun(*jax.tree.unflatten(tree, full), **kwargs)

        outputs, pull = jax.vjp(function, *(arrays[i] for i in wrt))
        return outputs, pull(_with_integer_cotangents(cotangents, outputs))

    outputs, gradients = outputs_and_gradients(list(leaves), cotangents)
    names = [f"args{jax.tree_util.keystr(paths[i])}" for i in wrt]
    return Results(outputs, dict(zip(names, gradients, strict=True)))


def assert_same_as_column(
    fun: Callable[..., Any],
    args: Sequence[Any],
    in_axes: Any,
    *,
    num_blocks: int | Sequence[int] | None = None,
    strategy: str | Sequence[str] = "stream",
    cuts: Cuts = (),
    plan: Any = None,
    offload: bool = False,
    kwargs: Mapping[str, Any] | None = None,
    argnums: Sequence[int] | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    expected: Results | None = None,
) -> Results:
    """Assert that ``lrjax.rowwise(fun, ...)`` gives ``fun``'s outputs and gradients.

    Outputs are contracted with fixed random cotangents and differentiated with respect to every
    floating-point array among the arguments. Shapes and dtypes must be equal, values within a
    tolerance of their dtype, relative to the largest magnitude of the same array of ``fun``'s
    (both may be anything below a thousand roundings of the largest of all gradients: what is left
    where a gradient cancels, as that of a bias before BatchNorm).
    Where arguments are in half precision, all may be three times as far as column's worst array is
    from what ``fun`` gives for the same arguments in float32.

    Args:
      fun: the function.
      args: its positional arguments.
      in_axes, num_blocks, strategy, cuts, plan, offload: as for :func:`lrjax.rowwise`.
      kwargs: keyword arguments of ``fun``.
      argnums: arguments to differentiate, all by default.
      tolerance: instead of the dtype's.
      seed: of the cotangents.
      expected: what an earlier check of the same function with the same seed returned; saves
        running column again.

    Returns:
      Column's results.

    Raises:
      AssertionError: naming every array that differs, by how much and where.
    """
    options = checked_options(
        num_blocks=num_blocks, strategy=strategy, cuts=cuts, plan=plan, offload=offload
    )
    row_fun = rowwise_with(fun, in_axes, options)
    # First, so that options that do not fit are refused before anything is compiled.
    found = results(row_fun, args, kwargs, argnums=argnums, seed=seed)
    expected = expected or results(fun, args, kwargs, argnums=argnums, seed=seed)
    truth = None
    if tolerance is None and _in_half_precision(args):
        truth = results(fun, _widened(args), kwargs, argnums=argnums, seed=seed)
    check(found, expected, truth=truth, tolerance=tolerance)
    return expected


def check(
    found: Results,
    expected: Results,
    *,
    truth: Results | None = None,
    tolerance: float | None = None,
) -> None:
    """Compare results; ``truth`` is what half precision is measured against.

    Raises:
      AssertionError: naming every array that differs, by how much and where; also where nothing
        could have differed, because all gradients are zero.
    """
    structures: list[Any] = [jax.tree.structure(r.outputs) for r in (found, expected)]
    assert structures[0] == structures[1], f"{structures[0]} is not column's {structures[1]}"
    pairs = {
        f"output{jax.tree_util.keystr(path)}": leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(expected.outputs)
    }
    gradients = [f"gradient of {name}" for name in expected.gradients]
    trees = [r or Results(None, {}) for r in (found, expected, truth)]
    complaints = [
        *_differences(list(pairs), [jax.tree.leaves(r.outputs) for r in trees], tolerance),
        *_differences(gradients, [list(r.gradients.values()) for r in trees], tolerance),
    ]
    assert not complaints, "row by row is not column:\n  " + "\n  ".join(complaints)
    if expected.gradients:
        moving = any(np.any(_wide(g) != 0) for g in expected.gradients.values())
        assert moving, "every gradient is zero, so the comparison says nothing"


def max_error(value: Any, reference: Any) -> float:
    """The largest difference of two arrays, relative to the reference's largest magnitude."""
    value, reference = _wide(value), _wide(reference)
    return _magnitude(value - reference) / (_magnitude(reference) or 1.0)


def norm_error(value: Any, reference: Any) -> float:
    """The Euclidean distance of two arrays, relative to the reference's norm."""
    value, reference = _wide(value).ravel(), _wide(reference).ravel()
    return float(np.linalg.norm(value - reference)) / (float(np.linalg.norm(reference)) or 1.0)


def _differences(
    names: Sequence[str], arrays: Sequence[Sequence[Any]], tolerance: float | None
) -> list[str]:
    """Complaints about arrays of the same kind; ``arrays`` are those found, expected and true."""
    found, expected, truth = arrays
    complaints = [*map(_mismatch, found, expected)]
    if any(complaints):
        return [f"{name}: {c}" for name, c in zip(names, complaints, strict=True) if c]
    inexact = [i for i, array in enumerate(expected) if _is_inexact(array)]
    largest = max((_magnitude(expected[i]) for i in inexact), default=0.0)
    columns_own = max((norm_error(expected[i], truth[i]) for i in inexact if truth), default=0.0)
    for i, name in enumerate(names):
        if not _is_inexact(expected[i]):
            error = _integer_error(found[i], expected[i])
        elif truth:
            error = _half_precision_error(found[i], truth[i], columns_own)
        else:
            error = _error(found[i], expected[i], tolerance, largest)
        if error is not None:
            complaints.append(f"{name}: {error}")
    return [complaint for complaint in complaints if complaint is not None]


def _mismatch(found: Any, expected: Any) -> str | None:
    """What is wrong with an array besides its values."""
    if np.shape(found) != np.shape(expected):
        return f"shape {np.shape(found)}, column's is {np.shape(expected)}"
    if jnp.result_type(found) != jnp.result_type(expected):
        return f"dtype {jnp.result_type(found)}, column's is {jnp.result_type(expected)}"
    if not np.all(np.isfinite(_wide(expected))):
        return "column's has values that are not finite"
    if not np.all(np.isfinite(_wide(found))):
        return "has values that are not finite, column's has none"
    return None


def _integer_error(found: Any, expected: Any) -> str | None:
    wrong = np.count_nonzero(np.asarray(found) != np.asarray(expected))
    return f"{wrong} of {np.size(expected)} elements differ" if wrong else None


def _error(found: Any, expected: Any, tolerance: float | None, largest: float) -> str | None:
    dtype = jnp.result_type(expected)
    allowed = TOLERANCES[dtype.name] if tolerance is None else tolerance
    noise = _CANCELLED * float(jnp.finfo(dtype).eps) * largest
    error = max_error(found, expected)
    if error <= allowed or max(map(_magnitude, (found, expected))) <= noise:
        return None
    off = np.abs(_wide(found) - _wide(expected))
    wrong = np.argwhere(off > allowed * _magnitude(expected))
    return (
        f"relative error {error:.2e} (allowed {allowed:.0e}) in {len(wrong)} of {off.size} "
        f"elements of shape {off.shape}, the first at {tuple(map(int, wrong[0]))}"
    )


def _half_precision_error(found: Any, truth: Any, columns_own: float) -> str | None:
    """Judged against column's worst array: on one of few elements its error is a matter of luck."""
    error = norm_error(found, truth)
    if error <= _HALF_PRECISION_EXCESS * columns_own + BFLOAT16_ROUNDING:
        return None
    return f"error {error:.2e}, column's own at most {columns_own:.2e}"


def _is_inexact(array: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(array), jnp.inexact)


def _cotangents(struct: Any, seed: int) -> Any:
    generator = np.random.default_rng(seed)

    def cotangent(out: Any) -> Any:
        if not jnp.issubdtype(out.dtype, jnp.inexact):
            return None
        values = generator.standard_normal(out.shape)
        if jnp.issubdtype(out.dtype, jnp.complexfloating):
            values = values + 1j * generator.standard_normal(out.shape)
        return jnp.asarray(values, out.dtype)

    return [cotangent(out) for out in jax.tree.leaves(struct)]


def _with_integer_cotangents(cotangents: Sequence[Any], outputs: Any) -> Any:
    leaves, tree = jax.tree.flatten(outputs)
    full = [
        np.zeros(np.shape(out), jax.dtypes.float0)
        if ct is None
        else ct.astype(jnp.result_type(out))
        for ct, out in zip(cotangents, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, full)


def _in_half_precision(args: Any) -> bool:
    return any(jnp.result_type(x).name in HALF_PRECISION for x in jax.tree.leaves(args))


def _widened(args: Any) -> Any:
    def widen(leaf: Any) -> Any:
        is_half = jnp.result_type(leaf).name in HALF_PRECISION
        return jnp.asarray(leaf, jnp.float32) if is_half else leaf

    return jax.tree.map(widen, args)


def _magnitude(array: Any) -> float:
    return float(np.max(np.abs(_wide(array)), initial=0.0))


def _wide(array: Any) -> np.ndarray:
    array = np.asarray(array)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)
