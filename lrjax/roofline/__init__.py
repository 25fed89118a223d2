"""How long a program takes on a device that need not be there, from what XLA compiles for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lrjax.memory.compile import compile_for, target_name
from lrjax.memory.targets import GpuTarget, find
from lrjax.roofline.model import Kernel, Roofline, check_trip_count, roofline_of
from lrjax.roofline.rates import Rates, rates_of

__all__ = ["Kernel", "Rates", "Roofline", "estimate", "rates_of", "roofline_of"]


def estimate(
    fun: Callable[..., Any],
    *args: Any,
    target: str | None = "h200",
    rates: Rates | None = None,
    unknown_trip_count: int | None = None,
    **options: Any,
) -> Roofline:
    """The time of one run of ``fun`` by a roofline of its compiled program. Nothing runs.

    Args:
      fun: a function JAX can trace, such as ``jax.value_and_grad(loss)``.
      *args: its arguments, or pytrees of ``jax.ShapeDtypeStruct``.
      target: a GPU in ``lrjax.memory.TARGETS``, present or not; None for the one at hand.
      rates: what is assumed of the device instead of ``rates_of(target)``.
      unknown_trip_count: how often a loop runs of which XLA does not know it.
      **options: those of ``lrjax.memory.compile_for``.

    Raises:
      ValueError: nothing is known of the target's rates, a loop's trip count is not known, or
        ``unknown_trip_count`` is no whole number of at least 0.
      ImportError: XLA's plugin for the target is not installed; the message has the command.

    Example::

        print(lrjax.roofline.estimate(jax.grad(loss), params, images, target="h200"))
    """
    check_trip_count(unknown_trip_count)
    name = target_name(target)
    if rates is None and not isinstance(find(name), GpuTarget):
        raise ValueError(
            f"target={name!r}: programs for GPUs alone are read, by names in lrjax.memory.TARGETS "
            "such as 'h200'. lrjax.memory.profile tells its memory."
        )
    own = rates or rates_of(name)
    compiled = compile_for(fun, *args, target=target, **options)
    return roofline_of(str(compiled.as_text()), own, unknown_trip_count=unknown_trip_count)
