"""Search, compile, correct: the returned plan fits because XLA says so."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax

from lrjax import memory
from lrjax.memory.targets import GpuTarget, find
from lrjax.plan import Plan, SegmentPlan
from lrjax.planner.candidates import COLUMN, Candidates
from lrjax.planner.model import groups_of
from lrjax.planner.problem import Problem
from lrjax.planner.progress import OnProgress, Progress
from lrjax.planner.search import Kind, Limits, Model, Step, Steps, neighbours, search
from lrjax.roofline import roofline_of
from lrjax.text import size
from lrjax.transform import rowwise

MIB = 2**20
# How far above a plan's peak its prediction may lie, for the plan to be tried all the same; column,
# which everybody knows; and simple plans, where nothing else fits.
MOST_OVERPREDICTED, _OF_COLUMN, _OF_SIMPLE = 1.4, 1.8, 3.0
# Seconds that a faster plan must save, as a fraction; and by how much a plan that is searched may
# seem to be slower than an earlier budget's that leaves much of this one.
_WORTHWHILE, _SLIGHTLY = 0.02, 0.05
# Parts of the budget within which simple plans must be predicted: when nothing else fits; and when
# something does, the second for plans that would be much faster.
_LADDER, _BOLD = (0.85, 0.6, 0.4, 0.25), (1.0, 1.25)
_MUCH = 0.1
# Predicted to fit, a simple plan is compiled also where it seems to be slower by up to this part:
# predictions err by as much.
_DOUBT = 0.2
# Of the budget, what the best plan takes at least where nothing else is tried.
_ROOMY = 0.9
# XLA's peak over the predicted one: up to the first a plan that does not fit missed narrowly, from
# the second on plans besides the smallest one are tried.
_ABOVE, _FAR_ABOVE = 1.1, 1.2


class BudgetTooSmallError(memory.DoesNotFitError):
    """No plan fits in the budget.

    Attributes:
      smallest_bytes: the smallest budget that works; None if none was found.
    """

    def __init__(self, message: str, smallest_bytes: int | None = None):
        super().__init__(message)
        self.smallest_bytes = smallest_bytes


@dataclasses.dataclass(frozen=True)
class Proof:
    """What is known of a plan that was compiled.

    Attributes:
      peak: XLA's bytes; a prediction where it found no room.
      predicted: the cost model's bytes, before.
      predicted_seconds: the cost model's, before.
      roofline_seconds: of the compiled program, where it was read.
      host: bytes of the host's memory.
      is_refused: the compiler found no room.
    """

    peak: int
    predicted: int
    predicted_seconds: float
    roofline_seconds: float | None = None
    host: int = 0
    is_refused: bool = False

    @property
    def seconds(self) -> float:
        return self.predicted_seconds if self.roofline_seconds is None else self.roofline_seconds


class Prover:
    """Everything known about one problem, in this process: costs, corrections, proofs.

    Attributes:
      model: the cost model, corrected.
      proofs: of plans that were compiled.
      compilations: programs compiled.
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        program, axes = problem.traced.program, problem.traced.axes
        candidates = Candidates(program, axes, problem.wrt, problem.target, problem.row_mesh)
        self.model = Model(candidates, problem.fixed_bytes)
        self.proofs: dict[Steps, Proof] = {}
        self.compilations = 0

    # --- Verification ----------------------------------------------------------------------------

    def verify(self, steps: Steps, on_progress: OnProgress) -> Proof:
        """XLA's word on a plan; teaches the model how long it takes."""
        if steps not in self.proofs:
            self.compilations += 1
            on_progress(self.progress("compiling", steps))
            proof = self.proofs[steps] = self.compiled(steps)
            if proof.roofline_seconds is not None:
                self.model.learn_seconds(steps, proof.roofline_seconds)
            on_progress(self.progress("compiled", steps))
        return self.proofs[steps]

    def compiled(self, steps: Steps) -> Proof:
        problem, by_rows = self.problem, planned(self.problem, self.plan(steps, 0))
        seconds = self.model.seconds(*steps)
        proof = Proof(0, math.ceil(self.model.peak_bytes(steps)), seconds)
        try:
            found = problem.compiled(problem.gradient(by_rows))
        except memory.DoesNotFitError:
            # The compiler gave up and does not say by how much.
            capacity = memory.device_memory_bytes(problem.target) or 0
            peak = max(proof.predicted, math.ceil(1.1 * capacity))
            return dataclasses.replace(proof, peak=peak, is_refused=True)
        return dataclasses.replace(
            proof,
            peak=memory.peak_bytes(found),
            host=memory.host_bytes(found),
            roofline_seconds=self.roofline_seconds(found),
        )

    def roofline_seconds(self, compiled: jax.stages.Compiled) -> float | None:
        candidates = self.model.candidates
        if not isinstance(find(candidates.target), GpuTarget):
            return None
        try:
            return roofline_of(str(compiled.as_text()), candidates.rates).seconds
        except ValueError:  # a loop of the function's own, which may end at any time
            return None

    @property
    def room(self) -> float:
        """Bytes beyond which the compiler finds no room, once it has said so."""
        is_refused = any(proof.is_refused for proof in self.proofs.values())
        return (is_refused and memory.device_memory_bytes(self.problem.target)) or math.inf

    def fits(self, steps: Steps, budget: float) -> bool:
        """Whether XLA said so of a plan that was compiled."""
        return not self.proofs[steps].is_refused and self.proofs[steps].peak <= budget

    def progress(self, doing: str, steps: Steps = ()) -> Progress:
        if not steps:
            return Progress(doing, self.compilations)
        proof = self.proofs.get(steps)
        return Progress(
            doing=doing,
            compilations=self.compilations,
            strategies=tuple(str(step.kind) for step in steps),
            operations=self.operations(steps),
            predicted_bytes=proof.predicted if proof else int(self.model.peak_bytes(steps)),
            predicted_seconds=proof.predicted_seconds if proof else self.model.seconds(*steps),
            verified_bytes=proof.peak if proof else None,
            roofline_seconds=proof.roofline_seconds if proof else None,
        )

    def operations(self, steps: Steps) -> float:
        """As a multiple of column's."""
        return self.model.operations(*steps) / max(self.column_operations, 1.0)

    @property
    def column_operations(self) -> float:
        return self.model.candidates.cost(0, self.model.candidates.last, COLUMN).operations

    # --- Plans under a budget --------------------------------------------------------------------

    def fastest(self, limits: Limits, most_compilations: int, on_progress: OnProgress) -> Steps:
        """The fastest plan that XLA confirms to fit in ``limits.budget``.

        What the search does not find the simple plans may give.

        Raises:
          BudgetTooSmallError: there is none.
        """
        column, earlier = self.model.column, self.best_known(limits)
        on_progress(self.progress("searching"))
        if self.model.peak_bytes(column) <= MOST_OVERPREDICTED * limits.budget:
            self.verify(column, on_progress)
            if self.fits(column, limits.budget):
                return self.best_known(limits) or column
        if earlier is not None and not self.leaves_much(earlier, limits):
            earlier = None
        self.approach(limits, self.compilations + most_compilations, on_progress, earlier)
        if self.has_more_to_hope_for(limits) and limits.plain != limits:
            self.approach(limits.plain, self.compilations + most_compilations, on_progress)
        if self.is_disappointed(limits) and self.best_known(limits) is not None:
            self.approach(self.trusted(limits), self.compilations + most_compilations, on_progress)
        self.climb(limits, on_progress)
        self.polish(limits, on_progress)
        if self.model.peak_bytes(column) <= _OF_COLUMN * limits.budget:
            self.verify(column, on_progress)
        best = self.best_known(limits)
        if best is None:
            best = self.smallest(limits, on_progress)
            if not self.fits(best, limits.budget):
                raise self.too_small(best, limits.budget)
        return best

    def approach(
        self, limits: Limits, last: int, on_progress: OnProgress, earlier: Steps | None = None
    ) -> None:
        """Search within the bytes at which the last prediction's error meets the budget.

        It ends with the first plan that fits and is no improvement, or the second that does not fit
        when another does (the third where plans seem to be much faster than that). The first one is
        compiled also where it seems slightly slower than ``earlier``, which leaves much memory.
        """
        misses = 0
        fixed, too_much = self.problem.fixed_bytes, math.inf
        within = min([limits.budget, self.room, *self.narrow_misses(limits)])
        while self.compilations < last:
            found = search(self.model, dataclasses.replace(limits, budget=within))
            best = self.best_known(limits)
            by = -_SLIGHTLY if best is not None and best == earlier else _WORTHWHILE
            if found is None or found in self.proofs or not self.is_faster(found, best, by):
                return
            budget, proof = min(limits.budget, self.room), self.verify(found, on_progress)
            error = (proof.peak - fixed) / max(proof.predicted - fixed, 1)
            right = fixed + 0.99 * (min(budget, self.room) - fixed) / error
            if best is not None and self.best_known(limits) == best:
                misses += 1
                most = 2 if self.is_disappointed(limits) else 1
                if misses > most or self.fits(found, budget):
                    return
            if self.fits(found, budget):
                within = min(right, MOST_OVERPREDICTED * budget, 0.99 * too_much)
            else:
                too_much = min(too_much, proof.predicted)
                within = min(right, 0.99 * too_much)

    def narrow_misses(self, limits: Limits) -> list[float]:
        """Bytes below which plans must be predicted, after plans that nearly fitted."""
        missed = [self.proofs[s] for s in self.known(limits) if not self.fits(s, limits.budget)]
        near = [one for one in missed if one.peak <= _ABOVE * one.predicted]
        return [0.99 * limits.budget * one.predicted / one.peak for one in near]

    def is_disappointed(self, limits: Limits) -> bool:
        """Whether much faster plans than those that fit were predicted to fit, and do not.

        How fast they are is known where their programs were read.
        """
        best, budget = self.best_known(limits), limits.budget
        missed = [s for s in self.known(limits) if not self.fits(s, budget)]
        hoped = (s for s in missed if self.proofs[s].predicted <= budget)
        return best is None or any(
            self.proofs[s].seconds < (1 - _MUCH) * self.proofs[best].seconds for s in hoped
        )

    def has_more_to_hope_for(self, limits: Limits) -> bool:
        """Whether what fits is slow, or leaves much of the budget: what missed sent it too low."""
        best = self.best_known(limits)
        return self.is_disappointed(limits) or (
            best not in (None, self.model.column) and self.leaves_much(best, limits)
        )

    def leaves_much(self, steps: Steps, limits: Limits) -> bool:
        """Whether a plan that was compiled takes so little of the budget that others may."""
        return self.proofs[steps].peak < _ROOMY * limits.budget

    def trusted(self, limits: Limits) -> Limits:
        """Without kinds that only plans contain whose peaks are far above the predictions.

        Where no plan was predicted well, all kinds are as good.
        """
        doubtful: set[Kind] = set()
        trusted: set[Kind] = set()
        for steps, proof in self.proofs.items():
            kinds = doubtful if proof.peak > _ABOVE * proof.predicted else trusted
            kinds.update(step.kind for step in steps)
        kept = tuple(k for k in limits.kinds if k in trusted or k not in doubtful or not trusted)
        return dataclasses.replace(limits, kinds=kept)

    def climb(self, limits: Limits, on_progress: OnProgress) -> None:
        """Compile the simple plans that are faster than what is known to fit, and may fit."""
        parts = _LADDER if self.best_known(limits) is None else _BOLD
        for part in parts:
            by = {1.0: -_DOUBT, 1.25: _MUCH}.get(part, _WORTHWHILE)
            rung = self.rung(limits, part * min(limits.budget, self.room), by)
            if rung is not None:
                self.verify(rung, on_progress)
                if part < 1 and self.best_known(limits) is not None:
                    break

    def polish(self, limits: Limits, on_progress: OnProgress) -> None:
        """Compile what is next to the best plan, where that plan's own error says that it fits."""
        best = self.best_known(limits)
        if best is None:
            return
        error = self.proofs[best].peak / self.proofs[best].predicted
        fitting = (
            steps
            for steps in neighbours(self.model, best)
            if steps not in self.proofs
            and self.model.peak_bytes(steps) * error <= limits.budget
            and self.is_faster(steps, best)
        )
        found = min(fitting, key=lambda steps: self.model.seconds(*steps), default=None)
        if found is not None:
            self.verify(found, on_progress)

    def rung(self, limits: Limits, budget: float, by: float) -> Steps | None:
        """The fastest simple plan that was not compiled yet and is predicted to be worth it."""
        best = self.best_known(limits)
        simple = (
            steps
            for steps in self.simple(limits)
            if steps not in self.proofs
            and self.model.peak_bytes(steps) <= budget
            and self.is_faster(steps, best, by)
        )
        return min(simple, key=lambda steps: self.model.seconds(*steps), default=None)

    def simple(self, limits: Limits) -> list[Steps]:
        """The simple plans of these strategies."""
        plans = self.model.simple_plans
        return [steps for steps in plans if all(step.kind in limits.kinds for step in steps)]

    def is_faster(self, steps: Steps, other: Steps | None, by: float = _WORTHWHILE) -> bool:
        """Whether it is predicted to be faster than a plan that was compiled, by this part."""
        if other is None:
            return True
        return self.model.seconds(*steps) < (1 - by) * self.proofs[other].seconds

    def best_known(self, limits: Limits) -> Steps | None:
        """The fastest of the plans compiled so far that fits."""
        fitting = [steps for steps in self.known(limits) if self.fits(steps, limits.budget)]
        return min(fitting, key=lambda steps: self.proofs[steps].seconds, default=None)

    def known(self, limits: Limits) -> list[Steps]:
        """The plans compiled so far, of these strategies."""
        return [s for s in self.proofs if all(step.kind in limits.kinds for step in s)]

    # --- Without a budget ------------------------------------------------------------------------

    def smallest(self, limits: Limits, on_progress: OnProgress) -> Steps:
        """About the smallest peak that any plan reaches, confirmed by XLA.

        Where XLA's is far above the prediction, plans that are easier to predict have to show what
        they reach, and of every strategy the smallest simple plan, until one fits.
        """
        for own in (limits, limits.plain):
            found = self.smallest_predicted(own)
            if found is not None:
                proof = self.verify(found, on_progress)
                if proof.peak <= _FAR_ABOVE * proof.predicted:
                    break
        else:
            for steps in self.smallest_simple(limits):
                self.verify(steps, on_progress)
                if self.fits(steps, limits.budget):
                    break
        if not self.known(limits):
            self.verify(self.model.column, on_progress)
        return min(
            self.known(limits),
            key=lambda steps: (self.proofs[steps].is_refused, self.proofs[steps].peak),
        )

    def smallest_simple(self, limits: Limits) -> list[Steps]:
        """Of every strategy the simple plan with the smallest predicted peak, smallest first."""
        by_peak = sorted(self.simple(limits), key=self.model.peak_bytes)
        first = {s[0].choice.strategy: s for s in reversed(by_peak)}
        most = _OF_SIMPLE * limits.budget
        return [s for s in by_peak if s in first.values() and self.model.peak_bytes(s) <= most]

    def smallest_predicted(self, limits: Limits) -> Steps | None:
        low, high = self.model.fixed_bytes, 1.5 * self.model.peak_bytes(self.model.column)
        best = None
        while high > 1.02 * low:
            middle = math.sqrt(low * high) if low else high / 2
            found = search(self.model, dataclasses.replace(limits, budget=middle))
            if found is None:
                low = middle
            else:
                best, high = found, min(middle, self.model.peak_bytes(found))
        return best

    def too_small(self, steps: Steps, budget: float) -> BudgetTooSmallError:
        """The error that names the smallest plan's peak, and what holds it."""
        if self.proofs[steps].is_refused:
            return BudgetTooSmallError(
                f"budget={size(budget)}: XLA found no room for any plan on "
                f"{self.problem.target or 'the device'}. Give smaller images or a smaller batch."
            )
        peak = self.proofs[steps].peak
        top = max(self.model.passes(steps), key=lambda one: one.peak)
        name = ("forward", "backward")[top.number]
        fixed = self.problem.fixed_bytes
        return BudgetTooSmallError(
            f"budget={size(budget)}: no plan fits. The smallest budget that works "
            f"is {peak / MIB:,.1f} MiB ({peak:,} bytes). There the peak is in the {name} pass of "
            f"segment {1 + steps.index(top.step)} of {len(steps)} "
            f"({top.step.choice.strategy.name}), which takes about {top.own / MIB:,.1f} MiB; "
            f"arguments and gradients are {fixed / MIB:,.1f} MiB, and what earlier segments hold "
            f"{(top.held - fixed) / MIB:,.1f} MiB. Give that budget, smaller images or a smaller "
            "batch.",
            peak,
        )

    # --- Plans -----------------------------------------------------------------------------------

    def plan(self, steps: Steps, budget: int) -> Plan:
        """A plan as a value."""
        proof = self.proofs.get(steps) or Proof(
            0, int(self.model.peak_bytes(steps)), self.model.seconds(*steps), is_refused=True
        )
        problem = self.problem
        return Plan(
            fingerprint=problem.fingerprint,
            wrt=problem.wrt,
            segments=tuple(self.segment_plan(s) for step in steps for s in step.segments),
            groups=groups_of(steps),
            target=problem.target,
            jax_version=jax.__version__,
            budget_bytes=budget,
            fixed_bytes=problem.fixed_bytes,
            predicted_peak_bytes=proof.predicted,
            verified_peak_bytes=None if proof.is_refused else proof.peak,
            column_operations=self.column_operations,
            compilations=self.compilations,
            host_bytes=proof.host,
            predicted_seconds=proof.predicted_seconds,
            roofline_seconds=proof.roofline_seconds,
            row_mesh_axis=None if problem.row_mesh is None else problem.row_mesh.axis,
            devices=problem.devices,
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
            height=span.most_blocks(strategy) if strategy.by_rows else 0,
            operations=cost.operations,
            saved_bytes=cost.saved_bytes,
            forward_bytes=forward,
            backward_bytes=backward,
            seconds=self.model.seconds(step),
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
    mesh = None if problem.row_mesh is None else (problem.row_mesh.axis, problem.devices)
    key = (problem.fingerprint.digest, problem.wrt, problem.target, problem.scalar, mesh)
    if key not in _PROVERS:
        _PROVERS[key] = Prover(problem)
    _PROVERS.move_to_end(key)
    while len(_PROVERS) > _MOST_PROVERS:
        _PROVERS.popitem(last=False)
    return _PROVERS[key]
