"""Search, compile, correct: the returned plan fits because XLA says so."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax

from lrjax import memory
from lrjax.plan import Plan, SegmentPlan
from lrjax.planner.candidates import COLUMN, Candidates
from lrjax.planner.problem import Problem
from lrjax.planner.search import Found, Limits, Model, Step, search
from lrjax.transform import rowwise

MIB = 2**20
# A plan that uses this much of the budget is not improved further.
WELL_USED = 0.85
# How far above a plan's peak its prediction may lie, for the plan to be tried all the same.
MOST_OVERPREDICTED = 1.4
_OVERPREDICTION_STEP = 1.04
# Compilations that may fail while a plan that fits is improved, but for plans that are much faster
# than one that leaves much of the budget.
_MOST_FAILURES = 2
# Operations that a faster plan must save, as a fraction.
_WORTHWHILE = 2e-3
# Where the budget is well used, plans are tried that save this fraction of all operations; last,
# one that is predicted to exceed the budget by no more than this factor.
_MUCH_FASTER, _BOLD = 0.08, 1.25


class BudgetTooSmallError(memory.DoesNotFitError):
    """No plan fits in the budget.

    Attributes:
      smallest_bytes: the smallest budget that works; None if none was found.
    """

    def __init__(self, message: str, smallest_bytes: int | None = None):
        super().__init__(message)
        self.smallest_bytes = smallest_bytes


@dataclasses.dataclass(frozen=True)
class Progress:
    """What the planner tells while it works.

    Attributes:
      compilations: programs compiled so far, this one included.
      strategies: of the plan's segments.
      operations: as a multiple of column's.
      predicted_bytes: the cost model's peak.
      verified_bytes: XLA's; None before it is compiled.
    """

    compilations: int
    strategies: tuple[str, ...]
    operations: float
    predicted_bytes: int
    verified_bytes: int | None


OnProgress = Callable[[Progress], None]


class Prover:
    """Everything known about one problem, in this process: costs, corrections, peaks.

    Attributes:
      model: the cost model, corrected.
      verified: XLA's peaks of plans that were compiled.
      refused: those for which the compiler found no room; their peaks are predictions.
      host: bytes of the host's memory that they take.
      predicted: the cost model's, before.
      compilations: programs compiled.
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        program, axes = problem.traced.program, problem.traced.axes
        candidates = Candidates(program, axes, problem.wrt, problem.target)
        self.model = Model(candidates, problem.fixed_bytes)
        self.verified: dict[tuple[Step, ...], int] = {}
        self.refused: set[tuple[Step, ...]] = set()
        self.host: dict[tuple[Step, ...], int] = {}
        self.predicted: dict[tuple[Step, ...], int] = {}
        self.compilations = 0

    @functools.cached_property
    def column(self) -> Found:
        candidates = self.model.candidates
        return Found((Step(0, candidates.last, COLUMN),), self.model.column_ahead[0])

    # --- Verification ----------------------------------------------------------------------------

    def verify(self, found: Found, on_progress: OnProgress) -> int:
        """XLA's peak of a plan; teaches the model."""
        if found.steps not in self.verified:
            self.predicted[found.steps] = math.ceil(self.model.peak_bytes(found))
            self.compilations += 1
            on_progress(self.progress(found))
            self.verified[found.steps] = self.compiled_peak(found)
            on_progress(self.progress(found))
        peak = self.verified[found.steps]
        self.model.learn(found, peak)
        return peak

    def compiled_peak(self, found: Found) -> int:
        problem, draft = self.problem, self.plan(found, 0)
        by_rows = planned(problem, draft)
        try:
            compiled = memory.compile_for(
                problem.gradient(by_rows), *problem.args, target=problem.target
            )
        except memory.DoesNotFitError:
            # The compiler gave up and does not say by how much.
            self.refused.add(found.steps)
            capacity = memory.device_memory_bytes(problem.target) or 0
            return max(self.predicted[found.steps], math.ceil(1.1 * capacity))
        self.host[found.steps] = memory.host_bytes(compiled)
        return memory.peak_bytes(compiled)

    @property
    def room(self) -> float:
        """Bytes beyond which the compiler finds no room, once it has said so."""
        capacity = memory.device_memory_bytes(self.problem.target)
        return capacity if self.refused and capacity else math.inf

    def fits(self, found: Found, budget: float) -> bool:
        """Whether XLA said so of a plan that was compiled."""
        return found.steps not in self.refused and self.verified[found.steps] <= budget

    def progress(self, found: Found) -> Progress:
        return Progress(
            compilations=self.compilations,
            strategies=tuple(str(step.kind) for step in found.steps),
            operations=self.operations(found),
            predicted_bytes=self.predicted[found.steps],
            verified_bytes=self.verified.get(found.steps),
        )

    def operations(self, found: Found) -> float:
        """As a multiple of column's."""
        costs = (self.model.candidates.cost(s.start, s.stop, s.choice) for s in found.steps)
        return sum(cost.operations for cost in costs) / max(self.column_operations, 1.0)

    @functools.cached_property
    def column_operations(self) -> float:
        return self.model.candidates.cost(0, self.model.candidates.last, COLUMN).operations

    # --- Plans under a budget --------------------------------------------------------------------

    def fastest(self, limits: Limits, most_compilations: int, on_progress: OnProgress) -> Found:
        """The fastest plan that XLA confirms to fit in ``limits.budget``.

        Raises:
          BudgetTooSmallError: there is none.
        """
        budget = min(limits.budget, self.room)
        is_close = self.model.peak_bytes(self.column) <= MOST_OVERPREDICTED * budget
        if is_close:
            self.verify(self.column, on_progress)
            if self.fits(self.column, budget):
                return self.column
            budget = min(budget, self.room)
        best = self.best_known(limits)
        # A plan that another budget left here may be more frugal than it must.
        worthwhile = 0.0
        hoped, failures, last = budget, 0, self.compilations + most_compilations
        is_bold = False
        while self.compilations < last and failures < _MOST_FAILURES:
            budget = min(budget, self.room)
            limits = dataclasses.replace(limits, budget=budget)
            is_well_used = best is not None and self.verified[best.steps] >= WELL_USED * budget
            if is_well_used:
                worthwhile = _MUCH_FASTER
            below = best.score * (1 - worthwhile) if best else math.inf
            worthwhile = _WORTHWHILE
            found = search(self.model, dataclasses.replace(limits, hoped=hoped, below=below))
            if found is None or (found.steps in self.verified and not self.fits(found, budget)):
                # Corrections may have been too harsh.
                if is_well_used and is_bold:
                    break
                is_bold = is_well_used
                hoped = _BOLD * budget if is_well_used else hoped * _OVERPREDICTION_STEP
                if hoped > MOST_OVERPREDICTED * budget:
                    break
                continue
            peak = self.verify(found, on_progress)
            if self.fits(found, budget):
                best, hoped, failures, is_bold = found, budget, 0, False
            elif is_bold:
                break
            else:
                is_much_faster = best is None or found.score < (1 - _MUCH_FASTER) * best.score
                if is_much_faster:
                    # Until something as fast fits, what has not been tried is believed to be as
                    # far off.
                    hoped = min(hoped, budget * max(self.predicted[found.steps] / peak, 0.5))
                failures += is_well_used or not is_much_faster
        if best is None:
            best = self.smallest(limits, on_progress)
            if not self.fits(best, budget):
                raise self.too_small(best, budget)
        return best

    def best_known(self, limits: Limits) -> Found | None:
        """The fastest of the plans compiled so far that fits."""
        fitting = [found for found in self.known(limits) if self.fits(found, limits.budget)]
        return min(fitting, key=lambda found: found.score, default=None)

    def known(self, limits: Limits) -> list[Found]:
        """The plans compiled so far, of these strategies."""
        return [
            Found(steps, self.model.score(steps))
            for steps in self.verified
            if all(step.kind in limits.kinds for step in steps)
        ]

    # --- Without a budget ------------------------------------------------------------------------

    def smallest(self, limits: Limits, on_progress: OnProgress, attempts: int = 3) -> Found:
        """About the smallest peak that any plan reaches, confirmed by XLA."""
        for _ in range(attempts):
            found = self.smallest_predicted(limits)
            if found is None or found.steps in self.verified:
                break
            self.verify(found, on_progress)
        if not self.known(limits):
            self.verify(self.column, on_progress)
        return min(
            self.known(limits),
            key=lambda found: (found.steps in self.refused, self.verified[found.steps]),
        )

    def smallest_predicted(self, limits: Limits) -> Found | None:
        low, high = self.model.fixed_bytes, 1.5 * self.model.peak_bytes(self.column)
        best = None
        while high > 1.02 * low:
            middle = math.sqrt(low * high) if low else high / 2
            found = search(self.model, dataclasses.replace(limits, budget=middle, hoped=middle))
            if found is None:
                low = middle
            else:
                best, high = found, min(middle, self.model.peak_bytes(found))
        return best

    def too_small(self, found: Found, budget: float) -> BudgetTooSmallError:
        """The error that names the smallest plan's peak, and what holds it."""
        if found.steps in self.refused:
            return BudgetTooSmallError(
                f"budget={budget / MIB:,.1f} MiB: XLA found no room for any plan on "
                f"{self.problem.target or 'the device'}. Give smaller images or a smaller batch."
            )
        peak = self.verified[found.steps]
        step, number, held, own = max(
            self.model.passes(found), key=lambda entry: entry[2] + entry[3]
        )
        segment = 1 + found.steps.index(step)
        name = ("forward", "backward")[number]
        fixed = self.problem.fixed_bytes
        return BudgetTooSmallError(
            f"budget={budget / MIB:,.1f} MiB: no plan fits. The smallest budget that works "
            f"is {peak / MIB:,.1f} MiB ({peak:,} bytes). There the peak is in the {name} pass of "
            f"segment {segment} of {len(found.steps)} ({step.choice.strategy.name}), which takes "
            f"{own / MIB:,.1f} MiB; arguments and gradients are {fixed / MIB:,.1f} MiB, and what "
            f"earlier segments hold {(held - fixed) / MIB:,.1f} MiB. Give that budget, smaller "
            "images or a smaller batch.",
            peak,
        )

    # --- Plans -----------------------------------------------------------------------------------

    def plan(self, found: Found, budget: int) -> Plan:
        """A plan as a value."""
        steps = found.steps
        peak = None if steps in self.refused else self.verified.get(steps)
        return Plan(
            fingerprint=self.problem.fingerprint,
            wrt=self.problem.wrt,
            segments=tuple(map(self.segment_plan, steps)),
            target=self.problem.target,
            jax_version=jax.__version__,
            budget_bytes=budget,
            fixed_bytes=self.problem.fixed_bytes,
            predicted_peak_bytes=self.predicted.get(steps) or int(self.model.peak_bytes(found)),
            verified_peak_bytes=peak,
            column_operations=self.column_operations,
            compilations=self.compilations,
            host_bytes=self.host.get(steps, 0),
        )

    def segment_plan(self, step: Step) -> SegmentPlan:
        candidates = self.model.candidates
        cost = candidates.cost(step.start, step.stop, step.choice)
        span = candidates.span(step.start, step.stop)
        program, axes = span.segment.program, span.segment.axes
        forward, backward = self.model.own_bytes(step)
        strategy = step.choice.strategy
        return SegmentPlan(
            start=candidates.bounds[step.start],
            stop=candidates.bounds[step.stop],
            choice=step.choice,
            inputs=tuple(
                f"{aval.dtype}{list(aval.shape)}"
                for aval, axis in zip(program.structs, axes, strict=True)
                if axis is not None
            ),
            height=strategy.most_blocks(span.graph) if strategy.by_rows else 0,
            operations=cost.operations,
            saved_bytes=cost.saved_bytes,
            forward_bytes=forward,
            backward_bytes=backward,
            offloaded_bytes=cost.offloaded_bytes,
        )


def planned(problem: Problem, plan: Plan) -> Callable[..., Any]:
    """The problem's function under a plan."""
    return rowwise(problem.fun, in_axes=problem.in_axes, plan=plan)


_MOST_PROVERS = 4
_PROVERS: OrderedDict[Any, Prover] = OrderedDict()


def prover_of(problem: Problem) -> Prover:
    """The prover of a problem; one that was asked for before knows what it learned then.

    So a second plan for the same function compiles little, and plans for rising budgets never
    become slower.
    """
    key = (problem.fingerprint.digest, problem.wrt, problem.target, problem.scalar)
    if key not in _PROVERS:
        _PROVERS[key] = Prover(problem)
    _PROVERS.move_to_end(key)
    while len(_PROVERS) > _MOST_PROVERS:
        _PROVERS.popitem(last=False)
    return _PROVERS[key]
