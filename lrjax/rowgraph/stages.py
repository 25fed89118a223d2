"""Where operations run: the stages of a program, and which values cross from one to the next.

A reduction over rows, and everything that needs a whole map, ends a stage. What a later stage
reads of an earlier one either exists whole in between or is computed again in the later stage. The
choice at every boundary is a minimum cut: the bytes of the values held against the price of the
operations done again, so that of a convolution and the four maps made from it one is kept, and the
narrow map before a 1x1 convolution instead of the wide one after it. Memory is as dear at a
boundary as a budget of bytes makes it: where more exists whole, more is done again.

Plain Python on numbers, without JAX.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

# Operations worth doing again to hold one byte less across a boundary. The first is the choice
# without a budget: elementwise operations, and convolutions of very few channels. Beyond the last,
# operations explode where a budget cannot be met.
EXCHANGE_RATES = tuple(2.0 ** (k / 4) for k in range(16, 45))


@dataclasses.dataclass(frozen=True)
class Operation:
    """What the stages need to know of an equation.

    Attributes:
      inputs, outputs: values.
      by_rows: it runs in a row loop; a column operation runs before its stage's loop.
      is_reduction: its outputs are whole after the loop.
      flops: to do it once, on all rows; infinite if it must not be done again.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    by_rows: bool
    is_reduction: bool
    flops: float


@dataclasses.dataclass(frozen=True)
class Stages:
    """The stages of a program.

    Attributes:
      home: the first stage in which each operation runs.
      members: per stage, the operations of its row loop in order: those at home and those done
        again.
      crossing: per stage, values made by rows that exist whole after it because a later one reads
        them.
      made_whole: per stage, values that its row loop gives as whole arrays.
    """

    home: tuple[int, ...]
    members: tuple[tuple[int, ...], ...]
    crossing: tuple[frozenset[int], ...]
    made_whole: tuple[frozenset[int], ...]

    def flops(self, problem: Problem) -> float:
        """Operations of all row loops."""
        return sum(problem.operations[i].flops for members in self.members for i in members)

    def peak_bytes(self, problem: Problem) -> int:
        """The most row values made by the program that exist whole while one of its loops runs."""
        around = zip((frozenset(), *self.crossing), self.crossing, strict=False)
        return max(problem.bytes_of(before | after) for before, after in around)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A program to be cut into stages.

    Attributes:
      operations: in topological order.
      outputs: values that must exist whole in the end.
      size: bytes of every value that carries rows and is made by a row operation.
      input_size: bytes of every input that carries rows.
      available: inputs that are there only from a later stage on (cotangents).
      pinned: per stage, values that may not cross the boundary behind it.
      kept: values that are held for as long as they are read, never computed again.
      never_held: values that are computed again in every stage that reads them.
    """

    operations: tuple[Operation, ...]
    outputs: frozenset[int]
    size: Mapping[int, int]
    input_size: Mapping[int, int] = dataclasses.field(default_factory=dict)
    available: Mapping[int, int] = dataclasses.field(default_factory=dict)
    pinned: Mapping[int, Collection[int]] = dataclasses.field(default_factory=dict)
    kept: frozenset[int] = frozenset()
    never_held: frozenset[int] = frozenset()

    @functools.cached_property
    def home(self) -> tuple[int, ...]:
        """The stage of every operation."""
        return _latest_stages(self, _earliest_stages(self))

    @functools.cached_property
    def cuts(self) -> MinimumCuts:
        return MinimumCuts(self, self.home)

    def bytes_of(self, values: Collection[int]) -> int:
        """Bytes of row values."""
        return sum(self.size[v] for v in values)


def cut_into_stages(problem: Problem, budget: float = math.inf) -> Stages:
    """Stages as late as possible, and the cheapest values across every boundary.

    Args:
      problem: the program.
      budget: bytes that may exist whole while a row loop runs: what it reads, what it gives and
        what later ones read. More is held only where no exchange rate helps.
    """
    home = problem.home
    boundaries = _Boundaries(problem, home, budget)
    count = 1 + max(home, default=0)
    crossing: list[frozenset[int]] = [frozenset()] * count
    for stage in reversed(range(count - 1)):
        crossing[stage] = boundaries.crossing(stage, crossing[stage + 1])
    members, made_whole = [], []
    for stage in range(count):
        before = crossing[stage - 1] if stage else frozenset()
        targets = (crossing[stage] - before) | boundaries.outputs_at(stage)
        members.append(_members(problem.operations, home, stage, targets, before))
        made_whole.append(targets)
    return Stages(home, tuple(members), tuple(crossing), tuple(made_whole))


class _Boundaries:
    """What every boundary must offer, and what it holds."""

    def __init__(self, problem: Problem, home: Sequence[int], budget: float):
        self.problem, self.budget = problem, budget
        self.cuts = problem.cuts
        size = problem.size
        count = 1 + max(home, default=0)
        located = list(zip(home, problem.operations, strict=True))
        self.made_in = {v: stage for stage, o in located for v in o.outputs if v in size}
        self.read: list[set[int]] = [set() for _ in range(count)]
        self.read_whole: list[set[int]] = [set() for _ in range(count)]
        self.last_use = dict.fromkeys(problem.input_size, 0)
        for stage, operation in located:
            (self.read if operation.by_rows else self.read_whole)[stage].update(operation.inputs)
            self.last_use.update((v, stage) for v in operation.inputs if v in self.last_use)

    def _made_by(self, values: Collection[int], stage: int) -> set[int]:
        return {v for v in values if v in self.made_in and self.made_in[v] <= stage}

    def outputs_at(self, stage: int) -> frozenset[int]:
        return frozenset(v for v in self.problem.outputs if self.made_in.get(v) == stage)

    def crossing(self, stage: int, after: frozenset[int]) -> frozenset[int]:
        """Values to hold between ``stage`` and the next, behind which ``after`` are held."""
        whole = self._made_by(self.read_whole[stage + 1], stage)
        wanted = self._made_by(self.read[stage + 1] | after, stage) | whole
        free = self._made_by(self.problem.outputs, stage) | whole
        outputs = self._made_by(self.problem.outputs, stage + 1)
        inputs = [v for v, last in self.last_use.items() if last > stage]
        others = sum(self.problem.input_size[v] for v in inputs)

        def at(rate: float) -> frozenset[int]:
            return self.cuts.cheapest(stage, wanted, free, rate) | whole

        def fits(rate: float) -> bool:
            return self.problem.bytes_of(at(rate) | after | outputs) + others <= self.budget

        return at(EXCHANGE_RATES[bisect.bisect_left(EXCHANGE_RATES[:-1], True, key=fits)])


def _members(
    operations: Sequence[Operation],
    home: Sequence[int],
    stage: int,
    targets: Collection[int],
    whole: Collection[int],
) -> tuple[int, ...]:
    """Row operations that give the stage's reductions and ``targets`` from what is ``whole``."""
    needed, found = set(targets), []
    for i in reversed(range(len(operations))):
        operation = operations[i]
        if not operation.by_rows:
            continue
        own_reduction = operation.is_reduction and home[i] == stage
        if own_reduction or (not operation.is_reduction and needed.intersection(operation.outputs)):
            found.append(i)
            needed.update(v for v in operation.inputs if v not in whole)
    return tuple(reversed(found))


def _earliest_stages(problem: Problem) -> list[int]:
    """A value made whole by stage ``s`` can be used whole from stage ``s + 1`` on."""
    whole_from = dict(problem.available)
    rows_from: dict[int, int] = {}
    stages = []
    for operation in problem.operations:
        if operation.by_rows:
            ready = (rows_from.get(v, whole_from.get(v, 0)) for v in operation.inputs)
        else:
            ready = (whole_from.get(v, 0) for v in operation.inputs)
        stage = max(ready, default=0)
        stages.append(stage)
        for v in operation.outputs:
            if v in problem.size:
                rows_from[v] = stage
            whole_from[v] = stage + 1 if operation.by_rows else stage
    return stages


def _latest_stages(problem: Problem, earliest: Sequence[int]) -> tuple[int, ...]:
    """Everything in the first stage that needs it.

    Late is lean: a recomputed forward map belongs in the stage of the gradient that reads it, not
    in an earlier one from where it would have to be kept whole.
    """
    operations, stages = problem.operations, list(earliest)
    users: dict[int, list[int]] = {}
    for i, operation in enumerate(operations):
        for v in operation.inputs:
            users.setdefault(v, []).append(i)
    for i in reversed(range(len(operations))):
        operation = operations[i]
        if not operation.by_rows or problem.outputs.intersection(operation.outputs):
            continue
        limits = [
            stages[user] - (operation.is_reduction or not operations[user].by_rows)
            for v in operation.outputs
            for user in users.get(v, [])
        ]
        if limits:
            stages[i] = max(stages[i], min(limits))
    return tuple(stages)


class MinimumCuts:
    """Minimum cuts at the boundaries of one program.

    A flow network with two kinds of vertices: a value is *wanted* behind the boundary, an operation
    is *done again* there. Edges cost what it costs if their tail is so and their head is not: a
    wanted value whose operation is not done again is held (its bytes); an operation that is done
    again wants its inputs (never violated) and costs its price.
    """

    INFINITE = 2**30
    SOURCE, SINK = 0, 1

    def __init__(self, problem: Problem, home: Sequence[int]):
        self.problem = problem
        self.vertex = {v: 2 + i for i, v in enumerate(problem.size)}
        self.first_operation = 2 + len(self.vertex)
        edges = list(self._edges(home))  # none where nothing that is made by rows is used
        columns = zip(*edges, strict=True) if edges else ((),) * 6
        self.known: dict[Any, frozenset[int]] = {}  # answers; several budgets ask the same
        self.tail, self.head, self.bytes, self.flops, self.stage, self.held = map(np.array, columns)

    def _edges(self, home: Sequence[int]) -> Iterator[tuple[int, int, float, float, int, int]]:
        """Tail, head, cost in bytes and in operations, stage, and the value held."""
        for i, operation in enumerate(self.problem.operations):
            again = self.first_operation + i
            made = [v for v in operation.outputs if v in self.vertex]
            if not made:
                continue
            # Something for every operation, so that nothing is done again for nothing.
            never = math.inf if self.problem.kept.intersection(made) else 0.0
            yield again, self.SINK, never, 1.0 + operation.flops, home[i], -1
            for v in made:
                yield self.vertex[v], again, float(self.problem.size[v]), 0.0, home[i], v
            for v in operation.inputs:
                if v in self.vertex:
                    yield again, self.vertex[v], math.inf, 0.0, home[i], -1

    def cheapest(
        self, stage: int, wanted: set[int], free: set[int], operations_per_byte: float
    ) -> frozenset[int]:
        """Values to hold across the boundary behind ``stage``; those in ``free`` cost nothing."""
        question = stage, frozenset(wanted), frozenset(free), operations_per_byte
        if question not in self.known:
            self.known[question] = self._cheapest(stage, wanted, free, operations_per_byte)
        return self.known[question]

    def _cheapest(
        self, stage: int, wanted: set[int], free: set[int], operations_per_byte: float
    ) -> frozenset[int]:
        if not wanted:
            return frozenset()
        cost = self.bytes + self.flops / operations_per_byte
        pinned = self.problem.never_held.union(self.problem.pinned.get(stage, ()))
        cost[np.isin(self.held, list(pinned))] = math.inf
        cost[np.isin(self.held, list(free))] = 0.0
        kept = (self.stage <= stage) & (cost > 0)
        demand = np.array([self.vertex[v] for v in wanted])
        tails = np.concatenate([self.tail[kept], np.full(len(demand), self.SOURCE)])
        heads = np.concatenate([self.head[kept], demand])
        costs = np.concatenate([cost[kept], np.full(len(demand), math.inf)])
        reached = self._behind_minimum_cut(tails, heads, costs)
        is_value = (self.held >= 0) & (self.stage <= stage)
        crosses = is_value & reached[self.tail] & ~reached[self.head]
        return frozenset(map(int, self.held[crosses]))

    def _behind_minimum_cut(
        self, tails: np.ndarray, heads: np.ndarray, costs: np.ndarray
    ) -> np.ndarray:
        """Vertices on the source's side of the minimum cut."""
        finite = np.isfinite(costs)
        scale = self.INFINITE / 4 / max(float(np.sum(costs[finite])), 1.0)
        scaled = np.maximum(np.where(finite, costs, 0.0) * scale, 1)
        capacity = np.where(finite, scaled, self.INFINITE).astype(np.int32)
        vertices = self.first_operation + len(self.problem.operations)
        network = csr_array((capacity, (tails, heads)), shape=(vertices, vertices))
        residual = network - maximum_flow(network, self.SOURCE, self.SINK).flow
        residual.data[residual.data < 0] = 0
        residual.eliminate_zeros()
        reached = np.zeros(vertices, bool)
        reached[breadth_first_order(residual, self.SOURCE, return_predecessors=False)] = True
        return reached
