"""The fastest plan whose predicted peak is within a limit: dynamic programming over the cuts.

A label at a cut is what has been chosen from the input up to it: the bytes that those segments hold
until their backward passes, and their seconds. A segment fits where fixed bytes, what the segments
before it hold, and the most that is alive in its own passes are within the limit; what follows it
does not matter, because its own passes enclose theirs. A group of segments under one checkpoint is
one of the segments to choose from (``groups``). Of two labels at a cut, one that neither
holds less nor is faster is dropped (label setting, as for shortest paths under a constraint).

Numbers of blocks are searched in steps of four, then refined in steps of two, and then to steps of
a quarter more rows, half as many again and three quarters more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator

from lrjax.plan import Choice
from lrjax.planner.candidates import Kind, every_kind
from lrjax.planner.groups import groups
from lrjax.planner.model import Model, Step, Steps
from lrjax.rules.geometry import ceil_div

__all__ = [
    "Kind",
    "Limits",
    "Model",
    "Step",
    "Steps",
    "every_kind",
    "neighbours",
    "refined",
    "search",
]

# Labels that hold about as much are one.
_ALIKE_BYTES = 1.002
# Blocks from which on numbers between powers of two are worth a search.
_FINE_BLOCKS = 8


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a search may use: bytes, and kinds to choose from."""

    budget: float
    kinds: tuple[Kind, ...] = dataclasses.field(default_factory=every_kind)

    @property
    def plain(self) -> Limits:
        """Without groups and offloading, whose peaks are the hardest to predict."""
        kinds = tuple(kind for kind in self.kinds if not (kind.is_group or kind.offload))
        return dataclasses.replace(self, kinds=kinds)


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
    steps += groups(model, limits.kinds, limits.budget)
    best = _cheapest(model, limits, steps)
    others = (kind for kind in limits.kinds if not (kind.is_plain or kind.is_group))
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
    options: list[list[_Option]] = [[] for _ in model.candidates.bounds]
    for step in steps:
        options[step.start].append(_Option.of(model, step))
    for node in range(model.candidates.last):
        for label in _best(labels[node]):
            for option in options[node]:
                found = _extended(model, limits, label, option)
                if found is not None:
                    labels[option.step.stop].append(found)
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


@dataclasses.dataclass(frozen=True)
class _Option:
    """A step with its numbers at hand."""

    step: Step
    seconds: float
    own: float
    saved: float

    @classmethod
    def of(cls, model: Model, step: Step) -> _Option:
        own, saved = max(model.own_bytes(step)), model.saved_bytes(step)
        return cls(step, model.seconds(step), own, saved)


def _extended(model: Model, limits: Limits, label: _Label, option: _Option) -> _Label | None:
    step, own = option.step, option.own
    if label.steps:
        before, strategy = label.steps[-1], step.choice.strategy
        # Two segments that keep all their maps, behind each other, are one.
        if before.kind == step.kind and not strategy.recomputes:
            return None
        if before.choice.offload:
            # What does not start from its inputs keeps a copy of what arrives from the host.
            if not strategy.starts_from_inputs or step.inner:
                return None
            arriving = model.candidates.offloadable_bytes(before.start, before.stop)
            step = dataclasses.replace(step, arriving_bytes=arriving)
            own = max(model.own_bytes(step))
    if model.fixed_bytes + label.held + own > limits.budget:
        return None
    held, seconds = label.held + option.saved, label.seconds + option.seconds
    return _Label(held, seconds, (*label.steps, step))


def refined(model: Model, limits: Limits, steps: Steps) -> Steps:
    """The plan with numbers of blocks that were not searched, as long as that makes it faster."""
    while True:
        best = steps
        for changed in neighbours(model, steps):
            is_faster = model.seconds(*changed) < model.seconds(*best)
            if is_faster and model.peak_bytes(changed) <= limits.budget:
                best = changed
        if best == steps:
            return steps
        steps = best


def neighbours(model: Model, steps: Steps) -> Iterator[Steps]:
    """Plans of which one segment runs in another number of blocks."""
    for i, step in enumerate(steps):
        for choice in () if step.inner else _other_blocks(model, step):
            yield (*steps[:i], dataclasses.replace(step, choice=choice), *steps[i + 1 :])


def _other_blocks(model: Model, step: Step) -> Iterable[Choice]:
    """The choice in twice and half as many blocks, and in blocks of a few more rows."""
    count, strategy = step.choice.num_blocks, step.choice.strategy
    if not strategy.by_rows:
        return
    span = model.candidates.span(step.start, step.stop)
    for choice in span.choices(step.kind, ratio=2):
        if choice.num_blocks in (2 * count, count // 2):
            yield choice
    if count >= _FINE_BLOCKS and strategy.streams:
        for quarters in (5, 6, 7):
            fewer = ceil_div(4 * count, quarters)
            yield dataclasses.replace(step.choice, num_blocks=fewer)
