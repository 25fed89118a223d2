"""A training step within a memory budget: planned for its gradient, proved with its optimizer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lrjax
from lrjax.app.placement import ONE_DEVICE, planned
from lrjax.app.planning import mesh_of, training_call
from lrjax.app.step import CompiledStep, compile_step
from lrjax.plan import Plan
from lrjax.planner.budget import parse_budget
from lrjax.text import size

_ATTEMPTS = 3


def compile_within(
    budget: str | int | float,
    compile_arguments: dict[str, Any],
    on_plan: Callable[[Plan], None] = lambda plan: None,
) -> CompiledStep:
    """Plans for a budget and compiles the step by the plan, until XLA's peak is within the budget.

    `lrjax.plan` knows the gradient; what the optimizer holds is subtracted from the budget before,
    and what its update takes beyond that when it has been compiled.

    Args:
      budget: bytes, text such as `"8GiB"`, or a fraction of the device's memory.
      compile_arguments: of `compile_step`, all but the strategy.
      on_plan: called with each plan, before it is compiled.

    Raises:
      ValueError: for a budget that is no amount of memory.
      lrjax.BudgetTooSmallError: no plan fits.
    """
    allowed = bytes_of(budget)
    model, source = compile_arguments["model"], compile_arguments["source"]
    fun, args, in_axes = training_call(
        model,
        source.image_shape[:2],
        compile_arguments["batch_size"],
        jnp.uint8,
        labels_pixels=bool(source.label_shape),
    )
    placement = compile_arguments.get("placement", ONE_DEVICE)
    mesh = mesh_of(placement.rows)
    held = _bytes(jax.eval_shape(compile_arguments["optimizer"].init, args[0]))
    if held >= allowed:
        raise lrjax.BudgetTooSmallError(
            f"budget={size(allowed)}: the optimizer alone holds {size(held)}; give more than that, "
            "or another optimizer."
        )
    left = allowed - held
    for _ in range(_ATTEMPTS):
        plan = lrjax.plan(fun, *args, in_axes=in_axes, budget=max(left, 1), wrt=0, mesh=mesh)
        on_plan(plan)
        compiled = compile_step(strategy=planned(plan, placement), **compile_arguments)
        if compiled.xla_peak <= allowed:
            return compiled
        left -= compiled.xla_peak - allowed
    raise lrjax.BudgetTooSmallError(
        f"budget={size(allowed)}: the plan fits, but the whole step takes {compiled.xla_peak:,} "
        f"bytes with its optimizer; give --budget {compiled.xla_peak}, or another optimizer."
    )


def bytes_of(budget: str | int | float) -> int:
    """A budget in bytes.

    Raises:
      ValueError: it is no amount of memory.
    """
    return parse_budget(amount_of(budget), None)


def amount_of(text: str | int | float) -> str | int | float:
    """Without a unit: bytes where the text is a whole number, else a fraction."""
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _bytes(structs: Any) -> int:
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(structs))
