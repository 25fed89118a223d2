"""``lrjax.plan``: a memory budget in, the fastest plan that fits out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lrjax.memory.compile import device_of
from lrjax.plan import Plan
from lrjax.planner.budget import parse_budget
from lrjax.planner.mesh import PlannedMesh, planned_row_mesh
from lrjax.planner.problem import Problem, problem_of
from lrjax.planner.progress import OnProgress, Progress
from lrjax.planner.proof import BudgetTooSmallError, prover_of
from lrjax.planner.search import Limits
from lrjax.program.interpreter import collected_seldom
from lrjax.text import size

MOST_COMPILATIONS = 5
OBJECTIVES = ("time",)


@collected_seldom()
def plan(
    fun: Callable[..., Any],
    *args: Any,
    in_axes: Any,
    budget: int | float | str,
    target: str | None = None,
    wrt: int | Sequence[int] | None = None,
    objective: str = "time",
    on_progress: OnProgress | None = None,
    mesh: PlannedMesh = None,
    row_mesh_axis: str | None = None,
) -> Plan:
    """The fastest way to train ``fun`` within a memory budget, proved by XLA.

    The budget is for the gradient: of ``fun`` if it gives a scalar, or a tuple whose first entry
    is one; else of the sum of its outputs' mean squares. Arguments and gradients count. What a
    training step holds besides, such as an optimizer's state, must be left out of the budget.

    Args:
      fun: a function of arrays (pytrees), as for ``lrjax.rowwise``.
      args: its arguments, arrays or ``jax.ShapeDtypeStruct``; only shapes and dtypes are read.
      in_axes: as for ``lrjax.rowwise``.
      budget: bytes; text such as ``"8GiB"``; or a fraction of the target's memory (a float of at
        most 1).
      target: the device, present or not: a name in ``lrjax.memory.TARGETS``; None for JAX's
        default.
      wrt: numbers of the positional arguments that are differentiated; by default those without
        rows. Arrays of integers are left out.
      objective: "time", the least of it: by a roofline of the compiled program for a GPU, by the
        cost model for other targets.
      on_progress: called with a ``Progress`` while tracing and searching, and before and after
        every compilation.
      mesh: the mesh whose devices share the rows, or the size of its axis by name, ``{"rows": 8}``:
        devices that need not be there. Default: the one of ``jax.set_mesh``, if ``row_mesh_axis``
        is given. Budget, peak and time are then those of one device. Other axes of a mesh divide
        nothing here: give the arguments of one part of the batch.
      row_mesh_axis: as for ``lrjax.rowwise``; may be left out for a mesh of one axis.

    Returns:
      A ``Plan``: print it, save it, run it with ``lrjax.rowwise(fun, in_axes=in_axes, plan=plan)``,
      and one for several devices with ``mesh=mesh`` besides.

    Raises:
      ValueError: an argument is wrong; nothing was compiled.
      BudgetTooSmallError: no plan fits; has the smallest budget that works, in bytes. It is the
        only ``lrjax.memory.DoesNotFitError`` that is raised: a program that a compiler finds no
        room for is a plan that does not fit.
      ImportError: XLA's plugin for the target is not installed.

    Example:
      >>> plan = lrjax.plan(loss, params, images, in_axes=(None, 1), budget="8GiB", target="h200")
      >>> print(plan)
      >>> step = jax.jit(jax.grad(lrjax.rowwise(loss, in_axes=(None, 1), plan=plan)))
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r} is unknown; choose one of {OBJECTIVES}.")
    device_of(target)
    row_mesh = planned_row_mesh(mesh, row_mesh_axis, target)
    allowed = parse_budget(budget, target)
    tell = on_progress or (lambda progress: None)
    problem = problem_of(fun, args, in_axes, target, wrt, row_mesh)
    check_floor(problem, allowed)
    tell(Progress("tracing", 0))
    prover = prover_of(problem)
    found = prover.fastest(Limits(allowed), MOST_COMPILATIONS, tell)
    return prover.plan(found, allowed)


def check_floor(problem: Problem, budget: int) -> None:
    """Refuse a budget that not even arguments and gradients fit in."""
    floor = problem.fixed_bytes
    if budget <= floor:
        raise BudgetTooSmallError(
            f"budget={size(budget)}: arguments and gradients alone take {size(floor)}; give "
            "more than that, smaller images or a smaller batch."
        )
