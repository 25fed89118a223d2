"""Is a network the same by rows? Judged through ``lrjax.testing``, rounding told from errors."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

import lrjax
from generated.spec import Case, Spec, case_of
from lrjax.testing import HALF_PRECISION, Results, max_error, results
from lrjax.testing import check as check_results

TOLERANCE = 1e-10
# Devices add up sums over rows in another order, and differ in nothing else.
TOLERANCE_OVER_DEVICES = 1e-11
# An array whose own column moves by this much when inputs, and the maps between layers, move by one
# unit in the last place is judged against that movement.
ILL_CONDITIONED = 1e-12
MOVEMENTS = 50.0
# Where a unit in the last place moves a result by this much, no comparison says anything.
CHAOTIC = 1e-4


class Unsuitable(Exception):
    """A network that says nothing: column itself is not finite, or nothing has a gradient."""


class Wrong(AssertionError):
    """By rows is not column, or was refused."""


@dataclasses.dataclass(frozen=True)
class Report:
    """How a network was judged.

    Attributes:
      ill_conditioned: arrays that were judged against column's own movement, with the movement.
      num_blocks: what was run, after the limit.
    """

    ill_conditioned: dict[str, float]
    num_blocks: Any


# Refusals that are right: there is nothing to run by rows, or nothing to cut.
_REFUSALS = (
    ("no operation that is local in rows", "nothing by rows"),
    ("no operation on an argument that carries rows", "nothing by rows"),
    ("operations on rows; ask for at most", "too many segments"),
    ("entries for", "segments merged"),
    ("rows cannot be divided among", "fewer rows than devices"),
    ("keeps no order on several devices", "ordered callbacks"),
    ("the examples of this segment are not independent", "images that depend on each other"),
    ("cuts:", "names do not cut"),
    ("cuts=", "names do not cut"),
)


def check(spec: Spec, phase: Any = lambda name: None) -> Report:
    """Assert that a network by rows is column.

    Args:
      spec: the network.
      phase: is told what begins: "column", "rows", "conditioning".

    Raises:
      Wrong: it is not.
      Unsuitable: the network says nothing.
    """
    with jax.enable_x64(True):
        return _checked(spec, phase)


def _checked(spec: Spec, phase: Any) -> Report:
    phase("build")
    case = case_of(spec)
    phase("column")
    try:
        expected = results(case.fun, case.args, case.kwargs, argnums=spec.argnums)
    except Exception as error:
        raise Unsuitable(f"column itself fails: {type(error).__name__}") from error
    _check_suitable(expected)
    phase("rows")
    blocks, found = by_rows(spec, case)
    if spec.dtype != "float64":
        truth = None
        if spec.dtype in HALF_PRECISION:
            wide = jax.tree.map(_widened, case.args)
            precise = case_of(dataclasses.replace(spec, dtype="float64"))
            truth = results(precise.fun, wide, precise.kwargs, argnums=spec.argnums)
        check_results(found, expected, truth=truth)
        return Report({}, blocks)
    # Without their programs the checker takes nothing but the tolerance: what rounding explains is
    # told here, and counted.
    found, expected = (dataclasses.replace(r, program=None) for r in (found, expected))
    try:
        check_results(found, expected, tolerance=tolerance_of(spec))
    except AssertionError as error:
        phase("conditioning")
        return Report(_judged(spec, case, found, expected, error), blocks)
    return Report({}, blocks)


def tolerance_of(spec: Spec) -> float:
    """What float64 may differ by without a word about conditioning."""
    return TOLERANCE if spec.devices == 1 else TOLERANCE_OVER_DEVICES


def _widened(array: Any) -> Any:
    is_half = jnp.result_type(array).name in HALF_PRECISION
    return np.asarray(array, np.float64) if is_half else array


def _check_suitable(expected: Results) -> None:
    arrays = [*jax.tree.leaves(expected.outputs), *expected.gradients.values()]
    if not expected.gradients:
        raise Unsuitable("nothing to differentiate")
    if not all(np.all(np.isfinite(np.asarray(a))) for a in arrays):
        raise Unsuitable("column is not finite")
    if not any(np.any(np.asarray(g) != 0) for g in expected.gradients.values()):
        raise Unsuitable("all gradients are zero")


def by_rows(spec: Spec, case: Case) -> tuple[Any, Results]:
    """The results by rows, with fewer blocks where so many are not allowed."""
    blocks = spec.num_blocks
    while True:
        fun = lrjax.rowwise(
            case.fun,
            in_axes=case.in_axes,
            num_blocks=blocks,
            strategy=spec.strategy,
            cuts=spec.cuts,
            **_mesh_options(spec.devices),
        )
        # Under jit it is traced once, not for its shapes and again for its gradients.
        once = jax.jit(functools.partial(fun, **case.kwargs))
        try:
            return blocks, results(once, case.args, argnums=spec.argnums)
        except ValueError as error:
            most = re.search(r"largest allowed is (\d+)", str(error))
            if most is not None and isinstance(blocks, int) and int(most[1]) < blocks:
                blocks = int(most[1])
                continue
            for words, reason in _REFUSALS:
                if words in str(error):
                    raise Unsuitable(reason) from error
            raise


def _mesh_options(devices: int) -> dict[str, Any]:
    if devices == 1:
        return {}
    there = jax.devices()
    if len(there) < devices:
        raise ValueError(
            f"devices={devices}: there are {len(there)}; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={devices} before JAX starts."
        )
    mesh = jax.make_mesh((devices,), ("rows",), (AxisType.Auto,), devices=there[:devices])
    return {"mesh": mesh, "row_mesh_axis": "rows"}


def _judged(
    spec: Spec, case: Case, found: Results, expected: Results, error: AssertionError
) -> dict[str, float]:
    """Arrays that differ by no more than column does when its numbers move by one last place.

    Maps move too, not inputs alone: a tie that inputs cannot break (a maximum of two rows that a
    resize made of the same row) is decided by the rounding of the layer that made it.

    Raises:
      Wrong: at least one differs by more.
    """
    named = _named(found), _named(expected)
    if any(
        np.shape(named[0].get(name)) != np.shape(value)
        or jnp.result_type(named[0][name]) != jnp.result_type(value)
        or not np.all(np.isfinite(np.asarray(named[0][name])))
        for name, value in named[1].items()
    ):
        raise Wrong(str(error)) from error
    moved: dict[str, float] = dict.fromkeys(named[1], 0.0)
    for seed in range(3):
        other = _named(
            results(case.moved(seed), _moved(case.args, seed), case.kwargs, argnums=spec.argnums)
        )
        for name, value in named[1].items():
            moved[name] = max(moved[name], max_error(other[name], value))
    wrong, excused = [], {}
    for name, value in named[1].items():
        difference = max_error(named[0][name], value)
        if difference <= tolerance_of(spec):
            continue
        if moved[name] > CHAOTIC:
            raise Unsuitable("chaotic") from error
        if moved[name] > ILL_CONDITIONED and difference <= MOVEMENTS * moved[name]:
            excused[name] = moved[name]
        else:
            wrong.append(f"{name}: {difference:.2e}, column itself moves by {moved[name]:.2e}")
    if wrong:
        raise Wrong(f"{error}\n  " + "\n  ".join(wrong)) from error
    return excused


def _named(found: Results) -> dict[str, Any]:
    outputs = {
        f"output{jax.tree_util.keystr(path)}": leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(found.outputs)
    }
    return {**outputs, **{f"gradient of {k}": v for k, v in found.gradients.items()}}


def _moved(args: Any, seed: int) -> Any:
    """Arguments of which every number moves up or down by one unit in the last place."""
    generator = np.random.default_rng(seed)

    def move(leaf: Any) -> Any:
        leaf = np.asarray(leaf)
        if not np.issubdtype(leaf.dtype, np.floating):
            return leaf
        return np.nextafter(leaf, np.where(generator.random(leaf.shape) < 0.5, -np.inf, np.inf))

    return jax.tree.map(move, args)
