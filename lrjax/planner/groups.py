"""Groups of segments, each under one checkpoint, and groups within groups.

Whatever runs by whole maps is a chain, and which of its maps are kept, how often the others are
made again, is the question of checkpointing with nested checkpoints (Griewank and Walther's
revolve, https://doi.org/10.1145/347837.347846; for chains of unlike layers Beaumont et al., arXiv
1911.13214). The answer here is not theirs: a group's segments are kept from its second forward pass
on until its own backward pass, and which those are is found by dynamic programming over spans,
shortest first, with all of them that neither need less nor are faster dropped.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable

from lrjax.planner.candidates import CHECKPOINT, COLUMN, GROUP, Kind
from lrjax.planner.model import Model, Step, Steps

# Chains of which one needs so little more than another are one.
_ALIKE_BYTES = 1.05


@dataclasses.dataclass(frozen=True)
class _Chain:
    """Segments behind each other: their most bytes, and their seconds."""

    peak: float
    seconds: float
    steps: Steps


@dataclasses.dataclass(frozen=True)
class _Option:
    """One segment, or a group, with its numbers at hand."""

    own: float
    saved: float
    seconds: float
    step: Step


def groups(model: Model, kinds: Collection[Kind], budget: float) -> list[Step]:
    """Groups of segments that run by whole maps, of these kinds, within a budget."""
    plain = [kind for kind in kinds if kind.is_plain]
    last, room = model.candidates.last, budget - model.fixed_bytes
    if GROUP not in kinds or model.candidates.target == "cpu":
        return []  # XLA:CPU keeps what should be done again
    options: dict[tuple[int, int], list[_Option]] = {}
    for kind in plain:
        for step in model.steps(kind):
            options.setdefault((step.start, step.stop), []).append(_option(model, step))
    chains: dict[tuple[int, int], list[_Chain]] = {}
    found: list[Step] = []
    for length in range(1, last + 1):
        for start in range(last + 1 - length):
            stop = start + length
            own = options.setdefault((start, stop), [])
            whole = [_Chain(o.own, o.seconds, (o.step,)) for o in own]
            parts = (
                _joined(option, rest)
                for middle in range(start + 1, stop)
                for option in options[start, middle]
                for rest in chains[middle, stop]
                if not _keep_all(option.step, rest.steps[0])
            )
            chains[start, stop] = _best(itertools.chain(whole, parts), room)
            if length < last:
                inner = (c.steps for c in chains[start, stop] if len(c.steps) > 1)
                made = [Step(start, stop, CHECKPOINT, inner=steps) for steps in inner]
                own.extend(_option(model, step) for step in made)
                found += made
    return found


def _option(model: Model, step: Step) -> _Option:
    own = max(model.own_bytes(step))
    return _Option(own, model.saved_bytes(step), model.seconds(step), step)


def _joined(first: _Option, rest: _Chain) -> _Chain:
    peak = max(first.own, first.saved + rest.peak)
    return _Chain(peak, first.seconds + rest.seconds, (first.step, *rest.steps))


def _keep_all(first: Step, second: Step) -> bool:
    """Two segments that keep all their maps, behind each other, are one."""
    return first.choice == second.choice == COLUMN


def _best(chains: Iterable[_Chain], room: float) -> list[_Chain]:
    """The chains of which none is both faster and smaller than another."""
    found: list[_Chain] = []
    least = room
    for chain in sorted(chains, key=lambda chain: (chain.seconds, chain.peak)):
        if chain.peak <= least:
            found.append(chain)
            least = chain.peak / _ALIKE_BYTES
    return found
