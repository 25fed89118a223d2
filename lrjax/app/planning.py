"""What ``lrjax plan`` does: a network's training step, planned; or the largest that fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from lrjax import memory
from lrjax.app.strategy import ROWS
from lrjax.planner.budget import parse_budget
from lrjax.planner.inverse import Largest, Question, largest_by_methods
from lrjax.planner.mesh import planned_row_mesh
from lrjax.planner.problem import Problem, problem_of
from lrjax.planner.progress import OnProgress

SIDE_STEP = 256
START_SIDE = 2048
START_BATCH = 4
QUESTIONS = ("image", "batch")


def training_call(
    network: Any, image: tuple[int, int], batch: int, dtype: Any, *, labels_pixels: bool
) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[int | None, ...]]:
    """A classifier's loss, its arguments and their row axes; parameters come first.

    Args:
      network: a Flax Linen module that takes ``[B, H, W, 3]``.
      image: height and width.
      batch: images at a time.
      dtype: of the images; the parameters are float32.
      labels_pixels: the network classifies every pixel.
    """
    from lrjax.app.training import classification_loss, loss_in_axes, loss_structs

    images = jax.ShapeDtypeStruct((batch, *image, 3), dtype)
    args = loss_structs(network, images, labels_pixels=labels_pixels)
    return classification_loss(network), args, loss_in_axes(labels_pixels=labels_pixels)


def mesh_of(devices: int) -> dict[str, int] | None:
    """The mesh of so many devices that share rows, none of which need be there."""
    return {ROWS: devices} if devices > 1 else None


def largest_by_method(
    network: Any,
    maximise: str,
    image: tuple[int, int],
    batch: int,
    dtype: Any,
    budget: str | float | None,
    target: str | None,
    *,
    labels_pixels: bool,
    on_progress: OnProgress,
    devices: int = 1,
) -> list[Largest]:
    """The largest square image, or batch, by every method, on devices that share the rows.

    Raises:
      ValueError: for another question, or a bad budget.
    """
    if maximise not in QUESTIONS:
        raise ValueError(f"maximise: got {maximise!r}; use {' or '.join(QUESTIONS)}")

    row_mesh = planned_row_mesh(mesh_of(devices), None, target)

    def problem(size: int) -> Problem:
        own_image, own_batch = ((size, size), batch) if maximise == "image" else (image, size)
        fun, args, in_axes = training_call(
            network, own_image, own_batch, dtype, labels_pixels=labels_pixels
        )
        return problem_of(fun, args, in_axes, target, 0, row_mesh)

    capacity = memory.device_memory_bytes(target)
    if budget is None and capacity is None:
        raise ValueError("budget: the device does not say how much memory it has; give one")
    question = Question(
        problem,
        step=math.lcm(SIDE_STEP, devices) if maximise == "image" else 1,
        start=START_SIDE if maximise == "image" else START_BATCH,
        memory_bytes=capacity if budget is None else parse_budget(budget, target),  # type: ignore[arg-type]
        grows_rows=maximise == "image",
    )
    return largest_by_methods(question, on_progress)
