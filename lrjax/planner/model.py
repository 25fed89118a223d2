"""The cost model of whole plans: segments side by side and within each other."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterator

from lrjax.plan import Choice
from lrjax.planner.candidates import CHECKPOINT, COLUMN, Candidates, Kind, every_kind


@dataclasses.dataclass(frozen=True)
class Step:
    """One segment of a plan under construction, between two bounds by their numbers.

    Attributes:
      start, stop: the bounds.
      choice: how it runs.
      arriving_bytes: of what enters it, what waits in the host's memory.
      inner: segments of a group, which runs under one checkpoint: its backward pass first runs
        them forward, and keeps what they keep until their own backward passes.
    """

    start: int
    stop: int
    choice: Choice
    arriving_bytes: float = 0.0
    inner: Steps = ()

    @property
    def kind(self) -> Kind:
        kind = Kind.of(self.choice)
        return dataclasses.replace(kind, is_group=True) if self.inner else kind

    @property
    def shape(self) -> Shape:
        """What corrections are kept by: the span and how it runs, whatever the blocks."""
        return self.start, self.stop, self.kind

    @property
    def segments(self) -> Steps:
        """It, or the segments of the group, of groups within it too."""
        return tuple(s for one in self.inner for s in one.segments) or (self,)


Shape = tuple[int, int, Kind]
Steps = tuple[Step, ...]


def _with_inner(steps: Steps) -> Steps:
    """The steps, and those of all groups among them."""
    return tuple(s for step in steps for s in (step, *_with_inner(step.inner)))


def groups_of(steps: Steps, first: int = 0) -> tuple[tuple[int, int], ...]:
    """The groups of a plan, by numbers of segments; those within a group follow it."""
    found: list[tuple[int, int]] = []
    for step in steps:
        stop = first + len(step.segments)
        if step.inner:
            found += [(first, stop), *groups_of(step.inner, first)]
        first = stop
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Pass:
    """A segment's forward or backward pass: bytes that are held before it, and its own."""

    step: Step
    number: int
    held: float
    own: float

    @property
    def peak(self) -> float:
        return self.held + self.own


class Model:
    """The cost model of plans, with what compilations have taught about seconds.

    Attributes:
      candidates: spans and their costs.
      fixed_bytes: arguments and gradients.
      time_factors: of the seconds of a step, by its shape.
      time_ratios: compiled seconds over predicted ones, of all plans; 1 before there are any.
    """

    def __init__(self, candidates: Candidates, fixed_bytes: float):
        self.candidates = candidates
        self.fixed_bytes = fixed_bytes
        self.time_factors: dict[Shape, float] = {}
        self.time_ratios = [1.0]

    # --- Predictions -----------------------------------------------------------------------------

    def own_bytes(self, step: Step) -> tuple[float, float]:
        """Bytes of a step's forward and backward pass."""
        if step.inner:
            cost = self.candidates.cost(step.start, step.stop, step.choice)
            return cost.forward_bytes, self.peak_bytes(step.inner) - self.fixed_bytes
        cost = self.candidates.cost(step.start, step.stop, step.choice)
        forward, backward = cost.forward_bytes, cost.backward_bytes
        if step.choice.strategy.streams or step.choice.micro_batches > 1:
            # Gradients of what is read from the host go there too.
            return forward, max(backward - step.arriving_bytes, 0.0)
        return forward + step.arriving_bytes, backward + step.arriving_bytes

    def seconds(self, *steps: Step) -> float:
        """Of all steps, corrected."""
        usual = statistics.geometric_mean(self.time_ratios)
        return sum(
            self._own_seconds(step) * self.time_factors.get(step.shape, usual)
            for step in _with_inner(steps)
        )

    def _own_seconds(self, step: Step) -> float:
        """As predicted; of a group the forward pass alone, for its segments count as well."""
        found = self.candidates.cost(step.start, step.stop, step.choice).seconds
        if step.inner:
            found -= self.candidates.cost(step.start, step.stop, COLUMN).seconds
        return max(found, 0.0)

    def operations(self, *steps: Step) -> float:
        """Floating-point operations of all steps."""
        cost = self.candidates.cost
        found = 0.0
        for step in _with_inner(steps):
            found += cost(step.start, step.stop, step.choice).operations
            if step.inner:
                found -= cost(step.start, step.stop, COLUMN).operations
        return found

    def saved_bytes(self, step: Step) -> float:
        """Bytes that a step holds between its passes; of a group, what it gives."""
        return self.candidates.cost(step.start, step.stop, step.choice).saved_bytes

    def passes(self, steps: Steps) -> list[Pass]:
        result, held = [], self.fixed_bytes
        for step in steps:
            result += [Pass(step, i, held, own) for i, own in enumerate(self.own_bytes(step))]
            held += self.saved_bytes(step)
        return result

    def peak_bytes(self, steps: Steps) -> float:
        return max(one.peak for one in self.passes(steps))

    # --- What compilations teach -----------------------------------------------------------------

    def learn_seconds(self, steps: Steps, seconds: float) -> None:
        """All steps of a plan are corrected by what it takes as a whole."""
        every = _with_inner(steps)
        ratio = seconds / sum(map(self._own_seconds, every))
        self.time_ratios.append(ratio)
        self.time_factors.update((step.shape, ratio) for step in every)

    # --- What there is to choose -----------------------------------------------------------------

    def steps(
        self, kind: Kind, among: Callable[[int, int], bool] = lambda start, stop: True
    ) -> Iterator[Step]:
        """All segments of a kind, between such bounds."""
        for start, stop in self.candidates.spans(kind):
            if among(start, stop):
                for choice in self.candidates.span(start, stop).choices(kind):
                    yield Step(start, stop, choice)

    def least(self, start: int, stop: int) -> float:
        """Seconds of a plan that runs one segment by rows, at the least."""
        again = COLUMN if self.candidates.span(start, stop).is_scalar else CHECKPOINT
        once = self.seconds(Step(start, stop, COLUMN))
        return self.seconds(*self.column) - once + self.seconds(Step(start, stop, again))

    @functools.cached_property
    def simple_plans(self) -> list[Steps]:
        """Plans that people write by hand: one strategy for all, or checkpoints at few cuts."""
        last, rows = self.candidates.last, self.candidates.places.row_bounds
        every = range(last + 1)
        cuts = [every, every[:: max(round(math.sqrt(last)), 1)], rows, rows[::2]]
        plans = [self.column]
        for places in cuts:
            bounds = sorted({0, *places, last})
            plans.append(tuple(Step(a, b, CHECKPOINT) for a, b in itertools.pairwise(bounds)))
        whole = self.candidates.span(0, last)
        for kind in every_kind():
            if kind.strategy.by_rows and kind == Kind(kind.strategy):
                ratio = 2 if kind.strategy.streams else 4
                plans += [(Step(0, last, choice),) for choice in whole.choices(kind, ratio)]
        return list(dict.fromkeys(plans))

    @property
    def column(self) -> Steps:
        return (Step(0, self.candidates.last, COLUMN),)
