"""``lrjax.frontier``: memory against operations and time, with the alternatives beside it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lrjax import memory
from lrjax.memory.compile import device_of
from lrjax.plan import MIB, Plan
from lrjax.planner.candidates import Kind
from lrjax.planner.mesh import PlannedMesh, planned_row_mesh
from lrjax.planner.problem import Problem, problem_of
from lrjax.planner.progress import OnProgress
from lrjax.planner.proof import Prover, planned, prover_of
from lrjax.planner.search import Limits
from lrjax.planner.timing import median_seconds
from lrjax.program.interpreter import collected_seldom
from lrjax.strategies import Checkpoint, Column
from lrjax.text import aligned, shortened

MOST_COMPILATIONS = 5
_WHOLE_MAPS = (Kind(Column()), Kind(Checkpoint()))


@dataclasses.dataclass(frozen=True)
class Point:
    """One way to run the gradient.

    Attributes:
      method: "column", "checkpoint", "accumulation" or "lrjax".
      budget_bytes: what it had to fit in; None where there was no choice.
      peak_bytes: XLA's peak; of a "column" for which a TPU's compiler finds no room, a prediction.
      operations: as a multiple of column's.
      detail: strategies of the segments, or the number of micro-batches; of a predicted peak, that
        it is one.
      plan: what ``lrjax.rowwise`` takes; None for "accumulation".
      micro_batches: of "accumulation"; else 1.
      seconds: measured on the device at hand, infinity where it did not fit; None if not asked.
    """

    method: str
    budget_bytes: int | None
    peak_bytes: int
    operations: float
    detail: str
    plan: Plan | None = None
    micro_batches: int = 1
    seconds: float | None = None

    def __repr__(self) -> str:
        peak = f"peak {self.peak_bytes / MIB:,.1f} MiB"
        return f"Point({self.method}, {peak}, operations {self.operations:.3f}, {self.shown})"

    @property
    def shown(self) -> str:
        """The detail, with neighbours that are alike counted, short enough for a table."""
        groups = [(name, len(list(g))) for name, g in itertools.groupby(self.detail.split(" + "))]
        named = [name if count == 1 else f"{count} x {name}" for name, count in groups]
        return shortened(" + ".join(named), 60)


@dataclasses.dataclass(frozen=True)
class Frontier:
    """Memory against operations; print it for a table.

    Attributes:
      target: the device compiled for; None for JAX's default.
      points: column first, then the alternatives, then lrjax from much memory to little.
      devices: how many share the rows; peaks are those of one.
    """

    target: str | None
    points: tuple[Point, ...]
    devices: int = 1

    @property
    def where(self) -> str:
        """The devices, in words."""
        where = self.target or "the default device"
        return where if self.devices == 1 else f"{where} x {self.devices}, of one device"

    def __repr__(self) -> str:
        return f"Frontier({self.where}, {len(self.points)} points; print it for a table)"

    def of(self, method: str) -> list[Point]:
        """The points of a method, such as ``"column"`` or ``"lrjax"``, in order; [] of none."""
        return [point for point in self.points if point.method == method]

    def time_of(self, point: Point) -> float | None:
        """A point's time as a multiple of column's: measured, else by rooflines of both programs.

        None where one of the two is not known: rooflines are of plans for GPUs.
        """
        times = [(p.seconds, p.plan and p.plan.roofline_seconds) for p in (point, self.points[0])]
        for own, column in zip(*times, strict=True):
            if own is not None and column is not None:
                return None if math.isinf(column) else own / column
        return None

    def __str__(self) -> str:
        header = ("method", "budget MiB", "peak MiB", "of column", "operations", "time", "")
        column = self.points[0].peak_bytes
        rows = [
            (
                point.method,
                "" if point.budget_bytes is None else f"{point.budget_bytes / MIB:,.0f}",
                f"{point.peak_bytes / MIB:,.0f}",
                f"{point.peak_bytes / column:.3f}",
                f"{point.operations:.3f}",
                "" if self.time_of(point) is None else f"{self.time_of(point):.2f}",
                point.shown,
            )
            for point in self.points
        ]
        return "\n".join(aligned([header, *rows], left=(0, 6)))

    def to_json(self) -> str:
        """Points without their plans, as JSON text."""
        points = [
            {f.name: getattr(p, f.name) for f in dataclasses.fields(p) if f.name != "plan"}
            for p in self.points
        ]
        written = {"target": self.target, "devices": self.devices, "points": points}
        return json.dumps(written, indent=1) + "\n"

    def save_png(self, path: str | os.PathLike[str], title: str = "") -> None:
        """Draw the curves.

        Raises:
          ModuleNotFoundError: matplotlib is not installed; the message has the command.
        """
        draw(self, path, title)


@collected_seldom()
def frontier(
    fun: Callable[..., Any],
    *args: Any,
    in_axes: Any,
    target: str | None = None,
    wrt: int | Sequence[int] | None = None,
    steps: int = 8,
    timed: bool = False,
    on_progress: OnProgress | None = None,
    mesh: PlannedMesh = None,
    row_mesh_axis: str | None = None,
) -> Frontier:
    """What memory costs in time and operations, from ordinary execution to the least there is.

    Args:
      fun, args, in_axes, target, wrt, on_progress, mesh, row_mesh_axis: as for ``lrjax.plan``.
      steps: budgets, in equal ratios from column's peak to the smallest peak that was found.
      timed: run every program on the device at hand too, and measure its time; the arguments'
        values are made up. Wants ``target=None``, and no mesh.

    Returns:
      A ``Frontier``: lrjax's plans; column; ``jax.checkpoint`` around the best segments; and,
      where the batch (axis 0 of what carries rows) has several images, gradient accumulation over
      equal parts of it. Every peak is XLA's, except column's where a TPU's compiler finds no room
      for it: that is a prediction, as the point says.

    Raises:
      ValueError: an argument is wrong; nothing was compiled.
      BudgetTooSmallError: the target's compiler finds no room for any plan.

    Example:
      >>> curve = lrjax.frontier(loss, params, images, in_axes=(None, 1), target="h200")
      >>> print(curve)
      >>> curve.save_png("frontier.png")
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise ValueError(f"steps={steps!r}: a curve has at least 2 points.")
    if timed and target is not None:
        raise ValueError(
            f"timed=True measures on the device at hand, but target={target!r} names one to "
            "compile for; leave target out, or the times."
        )
    if timed and (mesh is not None or row_mesh_axis is not None):
        raise ValueError(
            "timed=True measures on one device; leave mesh and row_mesh_axis out, or the times."
        )
    device_of(target)
    row_mesh = planned_row_mesh(mesh, row_mesh_axis, target)
    problem = problem_of(fun, args, in_axes, target, wrt, row_mesh)
    prover, tell = prover_of(problem), on_progress or (lambda progress: None)
    column = prover.verify(prover.model.column, tell).peak
    everything = Limits(math.inf)
    own = _curve(prover, everything, column, steps, "lrjax", tell)
    if not own:
        raise prover.too_small(prover.model.column, column)
    whole = dataclasses.replace(everything, kinds=_WHOLE_MAPS)
    checkpoint = _curve(prover, whole, column, max(2, steps // 3), "checkpoint", tell)
    note = "no room; predicted" if prover.proofs[prover.model.column].is_refused else ""
    first = Point("column", None, column, 1.0, note, prover.plan(prover.model.column, column))
    points = [first, *checkpoint, *_accumulation(problem), *own]
    points = _timed(problem, points) if timed else points
    return Frontier(target, tuple(points), problem.devices)


def _timed(problem: Problem, points: Sequence[Point]) -> list[Point]:
    """The points with the seconds of a call; those of one program are measured once."""
    keys = [point.detail if point.plan is None else point.plan.segments for point in points]
    programs = {
        key: problem.gradient(planned(problem, point.plan))
        if point.plan is not None
        else accumulated(problem, _batch(problem), point.micro_batches)
        for key, point in zip(keys, points, strict=True)
    }
    found = median_seconds(list(programs.values()), problem.args)
    seconds = dict(zip(programs, found, strict=True))
    return [
        dataclasses.replace(point, seconds=seconds[key])
        for key, point in zip(keys, points, strict=True)
    ]


def budgets(most: int, least: int, steps: int) -> list[int]:
    """Budgets in equal ratios, falling."""
    ratio = (least / most) ** (1 / (steps - 1))
    return [most, *(math.ceil(most * ratio**k) for k in range(1, steps - 1)), least]


def _curve(
    prover: Prover, limits: Limits, most: int, steps: int, method: str, tell: OnProgress
) -> list[Point]:
    smallest = prover.smallest(limits, tell)
    if prover.proofs[smallest].is_refused:
        return []
    least = prover.proofs[smallest].peak
    most = max(most, least)  # column's peak, where it does not compile, is a prediction
    every = [dataclasses.replace(limits, budget=budget) for budget in budgets(most, least, steps)]
    # From little memory to much: what fits in little is known to fit in more.
    for own in reversed(every):
        prover.fastest(own, MOST_COMPILATIONS, tell)
    points = []
    for own in every:
        # A plan that failed under one budget may be the fastest under another.
        found, budget = prover.best_known(own), int(own.budget)
        assert found is not None
        made = prover.plan(found, budget)
        detail = " + ".join(str(step.kind) for step in found)
        assert made.verified_peak_bytes is not None
        points.append(
            Point(method, budget, made.verified_peak_bytes, made.operations, detail, made)
        )
    return points


# --- Gradient accumulation -----------------------------------------------------------------------


def _accumulation(problem: Problem) -> list[Point]:
    """Column on one part of the batch at a time, gradients added up."""
    batch, parts = _batch(problem), 2
    points: list[Point] = []
    while batch % parts == 0 and parts <= batch:
        by_parts = accumulated(problem, batch, parts)
        try:
            compiled = problem.compiled(by_parts)
        except memory.DoesNotFitError:
            parts *= 2
            continue
        except (TypeError, ValueError):  # fun knows its batch
            break
        peak = memory.peak_bytes(compiled)
        detail = f"{parts} micro-batches"
        points.append(Point("accumulation", None, peak, 1.0, detail, micro_batches=parts))
        parts *= 2
    return points


def _batch(problem: Problem) -> int:
    """Images of a batch, where axis 0 of what carries rows is one; else 1."""
    structs = jax.tree.leaves(problem.args)
    first = len(problem.traced.axes) - len(structs)
    axes = problem.traced.axes[first:]
    counts = {x.shape[0] for x, axis in zip(structs, axes, strict=True) if axis}
    return counts.pop() if len(counts) == 1 and 0 not in axes else 1


def accumulated(problem: Problem, batch: int, parts: int) -> Callable[..., Any]:
    """The problem's gradient over equal parts of the batch, added up.

    Arrays without gradients whose first axis is the batch's are divided with the images.
    """
    gradient, size = problem.gradient(problem.fun), batch // parts

    def run(*args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        divided = [
            i
            for i, x in enumerate(leaves)
            if i not in problem.leaves and x.ndim and x.shape[0] == batch
        ]

        def one(sums: list[jax.Array], part: jax.Array) -> tuple[list[jax.Array], None]:
            own = list(leaves)
            for i in divided:
                own[i] = lax.dynamic_slice_in_dim(leaves[i], part * size, size)
            found, _ = gradient(*jax.tree.unflatten(tree, own))
            return [s + g.astype(s.dtype) for s, g in zip(sums, found, strict=True)], None

        zeros = [
            jnp.zeros(leaves[i].shape, jnp.promote_types(leaves[i].dtype, jnp.float32))
            for i in problem.leaves
        ]
        sums, _ = lax.scan(one, zeros, jnp.arange(parts))
        return [
            (s / parts).astype(leaves[i].dtype) for i, s in zip(problem.leaves, sums, strict=True)
        ]

    return run


# --- Picture -------------------------------------------------------------------------------------

_STYLES = {
    "column": ("#444444", "s", "none"),
    "checkpoint": ("#c77c02", "^", ":"),
    "accumulation": ("#7a5195", "D", ":"),
    "lrjax": ("#0b6e99", "o", "-"),
}


def draw(curves: Frontier, path: str | os.PathLike[str], title: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pictures need matplotlib: pip install 'lrjax[pictures]'"
        ) from error
    panels: dict[str, Callable[[Point], float | None]] = {"operations": lambda p: p.operations}
    if any(curves.time_of(point) is not None for point in curves.points):
        panels["time"] = curves.time_of
    figure = Figure(figsize=(7.2, 1.4 + 3.0 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), squeeze=False, sharex=True)[:, 0]
    for axes, (name, height) in zip(rows, panels.items(), strict=True):
        _draw_panel(axes, curves, height)
        axes.set_ylabel(f"{name}, times column's")
    rows[-1].set_xlabel(f"peak memory, MiB ({curves.where}, XLA)")
    rows[0].legend(frameon=False)
    if title:
        rows[0].set_title(title)
    figure.savefig(path, dpi=150)


def _draw_panel(axes: Any, curves: Frontier, height: Callable[[Point], float | None]) -> None:
    for method, (colour, marker, line) in _STYLES.items():
        points = sorted(curves.of(method), key=lambda point: point.peak_bytes)
        drawn = [(point.peak_bytes / MIB, height(point)) for point in points]
        drawn = [(x, y) for x, y in drawn if y is not None and math.isfinite(y)]
        if drawn:
            label = {"lrjax": "lrjax.plan", "accumulation": "gradient accumulation"}
            axes.plot(
                *zip(*drawn, strict=True),
                color=colour,
                marker=marker,
                linestyle=line,
                label=label.get(method, method),
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
