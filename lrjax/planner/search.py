"""The fastest plan whose predicted peak is within a limit: dynamic programming over the cuts.

A label at a cut is what has been chosen from the input up to it: the bytes that those segments hold
until their backward passes, and their seconds. A segment fits where fixed bytes, what the segments
before it hold, and the most that is alive in its own passes are within the limit; what follows it
does not matter, because its own passes enclose theirs. Of two labels at a cut, one that neither
holds less nor is faster is dropped (label setting, as for shortest paths under a constraint).

Numbers of blocks are searched in steps of four, and then refined in steps of two.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator

from lrjax.plan import Choice
from lrjax.planner.candidates import CHECKPOINT, COLUMN, Candidates, Kind, every_kind

# Labels that hold about as much are one.
_ALIKE_BYTES = 1.002


@dataclasses.dataclass(frozen=True)
class Step:
    """One segment of a plan under construction, between two bounds by their numbers.

    ``arriving_bytes`` of what enters it wait in the host's memory.
    """

    start: int
    stop: int
    choice: Choice
    arriving_bytes: float = 0.0

    @property
    def kind(self) -> Kind:
        return Kind.of(self.choice)

    @property
    def shape(self) -> Shape:
        """What corrections are kept by: the span and how it runs, whatever the blocks."""
        return self.start, self.stop, self.kind


Shape = tuple[int, int, Kind]
Steps = tuple[Step, ...]


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
            self.candidates.cost(s.start, s.stop, s.choice).seconds
            * self.time_factors.get(s.shape, usual)
            for s in steps
        )

    def passes(self, steps: Steps) -> list[Pass]:
        result, held = [], self.fixed_bytes
        for step in steps:
            result += [Pass(step, i, held, own) for i, own in enumerate(self.own_bytes(step))]
            held += self.candidates.cost(step.start, step.stop, step.choice).saved_bytes
        return result

    def peak_bytes(self, steps: Steps) -> float:
        return max(one.peak for one in self.passes(steps))

    # --- What compilations teach -----------------------------------------------------------------

    def learn_seconds(self, steps: Steps, seconds: float) -> None:
        """All steps of a plan are corrected by what it takes as a whole."""
        costs = (self.candidates.cost(s.start, s.stop, s.choice) for s in steps)
        ratio = seconds / sum(cost.seconds for cost in costs)
        self.time_ratios.append(ratio)
        self.time_factors.update((step.shape, ratio) for step in steps)

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


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a search may use: bytes, and kinds to choose from."""

    budget: float
    kinds: tuple[Kind, ...] = dataclasses.field(default_factory=every_kind)


@dataclasses.dataclass(frozen=True)
class _Label:
    """What was chosen up to a cut."""

    held: float
    seconds: float
    steps: Steps

    @property
    def offloads(self) -> bool:
        return bool(self.steps) and self.steps[-1].choice.offload


def search(model: Model, limits: Limits) -> Steps | None:
    """The fastest plan within the limits, or None."""
    steps = [step for kind in limits.kinds if kind.is_plain for step in model.steps(kind)]
    best = _cheapest(model, limits, steps)
    others = (kind for kind in limits.kinds if not kind.is_plain)
    # Rows take long to trace, and never less time than whole maps that are computed again.
    bound = math.inf if best is None else best.seconds
    more = [
        step for kind in others for step in model.steps(kind, lambda *at: model.least(*at) < bound)
    ]
    if more:
        best = _cheapest(model, limits, steps + more)
    return None if best is None else refined(model, limits, best.steps)


def _cheapest(model: Model, limits: Limits, steps: Iterable[Step]) -> _Label | None:
    labels: list[list[_Label]] = [[] for _ in model.candidates.bounds]
    labels[0].append(_Label(0.0, 0.0, ()))
    options: list[list[tuple[Step, float]]] = [[] for _ in model.candidates.bounds]
    for step in steps:
        options[step.start].append((step, model.seconds(step)))
    for node in range(model.candidates.last):
        for label in _best(labels[node]):
            for step, seconds in options[node]:
                found = _extended(model, limits, label, step, seconds)
                if found is not None:
                    labels[step.stop].append(found)
    return min(labels[-1], key=lambda label: label.seconds, default=None)


def _best(labels: Iterable[_Label]) -> list[_Label]:
    """Labels of which none is both faster and holds less than another."""
    found: list[_Label] = []
    least = {True: math.inf, False: math.inf}
    for label in sorted(labels, key=lambda label: (label.seconds, label.held)):
        if label.held * _ALIKE_BYTES < least[label.offloads]:
            least[label.offloads] = label.held
            found.append(label)
    return found


def _extended(
    model: Model, limits: Limits, label: _Label, step: Step, seconds: float
) -> _Label | None:
    if label.steps:
        before, strategy = label.steps[-1], step.choice.strategy
        # Two segments that keep all their maps, behind each other, are one.
        if before.kind == step.kind and not strategy.recomputes:
            return None
        if before.choice.offload:
            # What does not start from its inputs keeps a copy of what arrives from the host.
            if not strategy.starts_from_inputs:
                return None
            arriving = model.candidates.offloadable_bytes(before.start, before.stop)
            step = dataclasses.replace(step, arriving_bytes=arriving)
    if model.fixed_bytes + label.held + max(model.own_bytes(step)) > limits.budget:
        return None
    saved = model.candidates.cost(step.start, step.stop, step.choice).saved_bytes
    return _Label(label.held + saved, label.seconds + seconds, (*label.steps, step))


def refined(model: Model, limits: Limits, steps: Steps) -> Steps:
    """The plan with numbers of blocks that were not searched, as long as that makes it faster."""
    while True:
        best = steps
        for i, step in enumerate(steps):
            span = model.candidates.span(step.start, step.stop)
            for choice in span.choices(step.kind, ratio=2):
                count = choice.num_blocks
                if count in (2 * step.choice.num_blocks, step.choice.num_blocks // 2):
                    other = dataclasses.replace(step, choice=choice)
                    changed = (*steps[:i], other, *steps[i + 1 :])
                    is_faster = model.seconds(*changed) < model.seconds(*best)
                    if is_faster and model.peak_bytes(changed) <= limits.budget:
                        best = changed
        if best == steps:
            return steps
        steps = best
