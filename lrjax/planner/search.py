"""The fastest plan whose predicted peak is within a limit: dynamic programming over the cuts.

A label at a cut is what has been chosen from the input up to it: the bytes that those segments hold
until their backward passes, and a score, their operations. A segment fits where fixed bytes, what
the segments before it hold, and the most that is alive in its own passes are within the limit; what
follows it does not matter, because its own passes enclose theirs. Of two labels at a cut, one that
neither holds less nor scores lower (by more than a trifle) is dropped.

Labels are taken up in the order of their score plus a lower bound of what is to come (every
operation once: column), so the first to reach the end is the best. Costs are asked for only when a
label is taken up, and only where cheap lower bounds leave hope.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import heapq
import itertools
import math
from collections.abc import Iterator

from lrjax.plan import Choice
from lrjax.planner.candidates import COLUMN, Candidates, Span
from lrjax.strategies import Strategy, registered

# Of equal operations, the simpler: fractions of a segment's operations, for a row loop, for every
# doubling of its blocks, and for doing operations again. Too small to outweigh real operations.
_LOOP, _DOUBLING, _AGAIN = 2e-4, 1e-4, 1e-4
# Labels that hold about as much for about as many operations are one.
_ALIKE_BYTES, _ALIKE_SCORE = 1.002, 1.0005


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a segment may run, whatever the number of its blocks and micro-batches.

    Attributes:
      strategy: that runs it, or one part of its batch after the other.
      is_divided: in micro-batches.
      offload: what it gives waits in the host's memory.
    """

    strategy: Strategy
    is_divided: bool = False
    offload: bool = False

    @classmethod
    def of(cls, choice: Choice) -> Kind:
        return cls(choice.strategy, choice.micro_batches > 1, choice.offload)

    def __str__(self) -> str:
        notes = ["micro-batches"] * self.is_divided + ["offload"] * self.offload
        return self.strategy.name + (f" ({', '.join(notes)})" if notes else "")


def every_kind() -> tuple[Kind, ...]:
    """All ways to run a segment, under the strategies that have a name.

    Only what starts from a segment's inputs is divided or offloaded: all else keeps maps of all
    images, or copies of what waits on the host.
    """
    plain = [Kind(strategy) for strategy in registered()]
    from_inputs = [kind.strategy for kind in plain if kind.strategy.starts_from_inputs]
    divided = [Kind(strategy, is_divided=True) for strategy in from_inputs]
    hosted = [
        Kind(strategy, is_divided, offload=True)
        for is_divided in (False, True)
        for strategy in from_inputs
    ]
    return (*plain, *divided, *hosted)


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


@dataclasses.dataclass(frozen=True)
class Found:
    """A plan as the search sees it."""

    steps: tuple[Step, ...]
    score: float


class Model:
    """The cost model with what compilations have taught about it.

    Attributes:
      candidates: spans and their costs.
      fixed_bytes: arguments and gradients.
      factors: per shape of a step, factors of the bytes of its forward and backward pass.
      tried: steps that were compiled with the pass of the peak in them.
    """

    def __init__(self, candidates: Candidates, fixed_bytes: float):
        self.candidates = candidates
        self.fixed_bytes = fixed_bytes
        self.factors: dict[Shape, tuple[float, float]] = {}
        self.tried: set[Step] = set()

    def own_bytes(self, step: Step) -> tuple[float, float]:
        """Bytes of a step's forward and backward pass, corrected."""
        cost = self.candidates.cost(step.start, step.stop, step.choice)
        forward, backward = self.factors.get(step.shape, (1.0, 1.0))
        forward, backward = cost.forward_bytes * forward, cost.backward_bytes * backward
        if step.choice.strategy.streams or step.choice.micro_batches > 1:
            # Gradients of what is read from the host go there too.
            return forward, max(backward - step.arriving_bytes, 0.0)
        return forward + step.arriving_bytes, backward + step.arriving_bytes

    def passes(self, found: Found) -> list[tuple[Step, int, float, float]]:
        """Step, pass, bytes held before, own bytes: of every pass, as predicted."""
        result, held = [], self.fixed_bytes
        for step in found.steps:
            for i, own in enumerate(self.own_bytes(step)):
                result.append((step, i, held, own))
            held += self.candidates.cost(step.start, step.stop, step.choice).saved_bytes
        return result

    def peak_bytes(self, found: Found) -> float:
        return max(held + own for _, _, held, own in self.passes(found))

    def learn(self, found: Found, peak: float) -> None:
        """Correct the passes that the verified peak contradicts.

        The pass of the predicted peak answers for what was missing; every pass whose prediction
        was above the peak is brought down to it.
        """
        passes = self.passes(found)
        top = max(passes, key=lambda entry: entry[2] + entry[3])
        self.tried.add(top[0])
        for entry in passes:
            step, i, held, own = entry
            if own <= 0 or (held + own <= peak and entry is not top):
                continue
            factors = list(self.factors.get(step.shape, (1.0, 1.0)))
            factors[i] *= max(peak - held, 0.05 * own) / own
            self.factors[step.shape] = (factors[0], factors[1])

    def score(self, steps: tuple[Step, ...]) -> float:
        """What the search minimises."""
        return sum(
            self.candidates.cost(s.start, s.stop, s.choice).operations * (1 + penalty(s.choice))
            for s in steps
        )

    @functools.cached_property
    def column_ahead(self) -> list[float]:
        """Operations of everything behind each bound, done once."""
        ahead = [0.0]
        for k in reversed(range(self.candidates.last)):
            ahead.append(ahead[-1] + self.candidates.cost(k, k + 1, COLUMN).operations)
        return ahead[::-1]

    @functools.cached_property
    def column_held(self) -> list[float]:
        """Bytes that column holds of everything before each bound."""
        saved = (
            self.candidates.cost(k, k + 1, COLUMN).saved_bytes for k in range(self.candidates.last)
        )
        return list(itertools.accumulate(saved, initial=0.0))

    def least_operations(self, start: int, stop: int, kind: Kind) -> float:
        """Operations of a span that no cost lies below, without asking for the cost."""
        once = self.column_ahead[start] - self.column_ahead[stop]
        if kind.offload:
            moved = self.candidates.transfer_operations(start, stop)
            kept = dataclasses.replace(kind, offload=False)
            return moved + self.least_operations(start, stop, kept)
        span, streams = self.candidates.span(start, stop), kind.strategy.streams
        is_one_pass = streams and span.is_scalar and not kind.is_divided
        if not kind.strategy.recomputes or is_one_pass:
            return once
        # What stream holds between stages need not be done again.
        return once + (0.9 if streams else 1.0) * span.flops

    def least_bytes(self, start: int, stop: int, kind: Kind) -> float:
        """Own bytes of a span that no cost lies far below, without asking for the cost."""
        if kind.offload:
            return 0.0
        span = self.candidates.span(start, stop)
        if not kind.strategy.by_rows and not kind.is_divided:
            kept = self.column_held[stop] - self.column_held[start]
            return max(span.output_bytes, 0.9 * kept)
        return span.output_bytes + span.moving_bytes


def penalty(choice: Choice) -> float:
    """What a choice costs beyond its operations, as a fraction of them."""
    if not choice.strategy.by_rows:
        return _AGAIN if choice.strategy.recomputes else 0.0
    return _LOOP + _DOUBLING * math.log2(choice.num_blocks * choice.micro_batches)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a search may use.

    Attributes:
      budget: bytes, for steps that held the peak of a plan that was compiled.
      hoped: bytes, for steps whose prediction has not been tried. Where it is less than the budget,
        predictions are thought to be too low; those of a shape that was corrected are not.
      below: scores of interest are lower than this.
      kinds: to choose from.
    """

    budget: float
    hoped: float
    below: float = math.inf
    kinds: tuple[Kind, ...] = dataclasses.field(default_factory=every_kind)

    @property
    def most(self) -> float:
        return max(self.budget, self.hoped)


def search(model: Model, limits: Limits) -> Found | None:
    """The plan of the lowest score within the limits, or None."""
    with _rare_collections():
        return _Search(model, limits).run()


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Costs trace segments: millions of objects, few of them garbage in cycles.

    Looking for that garbage as often as Python does takes a fifth of a search.
    """
    usual = gc.get_threshold()
    gc.set_threshold(200_000, 20, 50)
    try:
        yield
    finally:
        gc.set_threshold(*usual)


class _Search:
    def __init__(self, model: Model, limits: Limits):
        self.model, self.limits = model, limits
        self.candidates = model.candidates
        self.settled: list[list[tuple[float, float]]] = [[] for _ in self.candidates.bounds]
        self.count = itertools.count()
        self.queue: list[tuple] = []  # type: ignore[type-arg]

    def run(self) -> Found | None:
        self.push(0, 0.0, 0.0, (), None)
        while self.queue:
            _, _, node, held, score, steps, move = heapq.heappop(self.queue)
            if move is not None:
                self.try_step(node, held, score, steps, move)
                continue
            if self.is_dominated(node, held, score):
                continue
            self.settled[node].append((held, score))
            if node == self.candidates.last:
                return Found(steps, score)
            self.extend(node, held, score, steps)
        return None

    def push(
        self,
        node: int,
        held: float,
        score: float,
        steps: tuple[Step, ...],
        move: tuple[int, Kind] | None,
    ) -> None:
        """Queue a label, or with ``move`` a step from it to another bound."""
        if move is None:
            promise = score + self.model.column_ahead[node]
        else:
            stop, kind = move
            promise = score + self.model.least_operations(node, stop, kind)
            promise += self.model.column_ahead[stop]
        if promise < self.limits.below:
            entry = (promise, next(self.count), node, held, score, steps, move)
            heapq.heappush(self.queue, entry)

    def is_dominated(self, node: int, held: float, score: float) -> bool:
        return any(
            h <= held * _ALIKE_BYTES and s <= score * _ALIKE_SCORE for h, s in self.settled[node]
        )

    def extend(self, node: int, held: float, score: float, steps: tuple[Step, ...]) -> None:
        before = steps[-1].kind if steps else None
        arrives = bool(steps) and steps[-1].choice.offload
        for stop in reversed(range(node + 1, self.candidates.last + 1)):
            for kind in self.limits.kinds:
                # Two segments that keep all their maps, behind each other, are one.
                if kind == before and not kind.strategy.recomputes:
                    continue
                # What does not start from its inputs keeps a copy of what arrives from the host.
                if arrives and not kind.strategy.starts_from_inputs:
                    continue
                if kind.offload and not self.candidates.offloadable_bytes(node, stop):
                    continue
                least = self.model.least_bytes(node, stop, kind)
                if self.model.fixed_bytes + held + least <= self.limits.most:
                    self.push(node, held, score, steps, (stop, kind))

    def try_step(
        self,
        node: int,
        held: float,
        score: float,
        steps: tuple[Step, ...],
        move: tuple[int, Kind],
    ) -> None:
        """Take a step from a label, in as few blocks as fit."""
        stop, kind = move
        step = self.fewest_blocks(node, stop, kind, held, steps)
        if step is None:
            return
        cost = self.candidates.cost(node, stop, step.choice)
        score += cost.operations * (1 + penalty(step.choice))
        held += cost.saved_bytes
        if not self.is_dominated(stop, held, score):
            self.push(stop, held, score, (*steps, step), None)

    def fewest_blocks(
        self, start: int, stop: int, kind: Kind, held: float, before: tuple[Step, ...]
    ) -> Step | None:
        span = self.candidates.span(start, stop)
        # The paper's orders do the same operations again; they are asked where stream is too large.
        if kind.strategy.by_rows and not kind.strategy.streams:
            for other in self.limits.kinds:
                if other.strategy.streams and other == Kind(other.strategy):
                    streamed = step_choices(span, other)
                    if streamed and self.fits(Step(start, stop, streamed[-1]), held):
                        return None
        choices = step_choices(span, kind)
        arriving = self.arriving_bytes(before)
        steps = [Step(start, stop, choice, arriving) for choice in choices]
        # More blocks take less memory, up to some number: the most are judged first.
        if not steps or not self.fits(steps[-1], held):
            return None
        low, high = 0, len(steps) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.fits(steps[middle], held) else (middle + 1, high)
        return steps[high]

    def arriving_bytes(self, before: tuple[Step, ...]) -> float:
        """Of what a segment behind these takes, what waits in the host's memory."""
        if not before or not before[-1].choice.offload:
            return 0.0
        return self.candidates.offloadable_bytes(before[-1].start, before[-1].stop)

    def fits(self, step: Step, held: float) -> bool:
        limit = self.limits.hoped
        if step in self.model.tried:
            limit = self.limits.budget
        elif step.shape in self.model.factors:
            limit = self.limits.most
        return self.model.fixed_bytes + held + max(self.model.own_bytes(step)) <= limit


def step_choices(span: Span, kind: Kind) -> list[Choice]:
    """The choices of one kind for a span, from much memory to little."""
    parts = [1]
    if kind.is_divided:
        parts = [n for n in range(2, span.batch + 1) if span.batch % n == 0]
    if not kind.strategy.by_rows:
        return [Choice(kind.strategy, 1, n, kind.offload) for n in parts]
    # Row loops make a part as small as blocks are many: images one by one, if at all.
    counts = span.block_counts(kind.strategy) if parts else []
    return [Choice(kind.strategy, count, parts[-1], kind.offload) for count in counts]
