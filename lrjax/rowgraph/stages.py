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
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

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
      has_effects: it runs behind all earlier operations with effects: what is read of a reference
        is what was written to it before.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    by_rows: bool
    is_reduction: bool
    flops: float
    has_effects: bool = False


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
    def boundaries(self) -> _Boundaries:
        """What is known of the boundaries between stages, shared by all budgets."""
        return _Boundaries(self)

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
    boundaries = problem.boundaries
    count = boundaries.count
    crossing: list[frozenset[int]] = [frozenset()] * count
    for stage in reversed(range(count - 1)):
        crossing[stage] = boundaries.crossing(stage, crossing[stage + 1], budget)
    members, made_whole = [], []
    for stage in range(count):
        before = crossing[stage - 1] if stage else frozenset()
        targets = (crossing[stage] - before) | boundaries.outputs_at[stage]
        members.append(boundaries.members(stage, targets, before))
        made_whole.append(targets)
    return Stages(problem.home, tuple(members), tuple(crossing), tuple(made_whole))


@dataclasses.dataclass(frozen=True)
class _Demand:
    """What a boundary must offer whatever is held behind it.

    Attributes:
      whole: values that column operations behind it take.
      wanted: values that the stage behind it reads.
      free: values that exist whole in any case.
      outputs: outputs of the program that are made up to the stage behind it.
      input_bytes: bytes of the inputs that are read behind it.
    """

    whole: frozenset[int]
    wanted: frozenset[int]
    free: frozenset[int]
    outputs: frozenset[int]
    input_bytes: int


class _Boundaries:
    """What every boundary between stages must offer, and what it holds under a budget."""

    def __init__(self, problem: Problem):
        self.problem, self.home = problem, problem.home
        self.count = count = 1 + max(self.home, default=0)
        size = problem.size
        located = list(zip(self.home, problem.operations, strict=True))
        self.made_in = {v: stage for stage, o in located for v in o.outputs if v in size}
        self.read: list[set[int]] = [set() for _ in range(count)]
        self.read_whole: list[set[int]] = [set() for _ in range(count)]
        self.last_use = dict.fromkeys(problem.input_size, 0)
        self.producer: dict[int, int] = {}  # of what row operations make, reductions excluded
        self.reductions: list[list[int]] = [[] for _ in range(count)]
        for i, (stage, operation) in enumerate(located):
            (self.read if operation.by_rows else self.read_whole)[stage].update(operation.inputs)
            self.last_use.update((v, stage) for v in operation.inputs if v in self.last_use)
            if operation.by_rows and operation.is_reduction:
                self.reductions[stage].append(i)
            elif operation.by_rows:
                self.producer.update(dict.fromkeys(operation.outputs, i))
        outputs: list[set[int]] = [set() for _ in range(count)]
        for v in problem.outputs & self.made_in.keys():
            outputs[self.made_in[v]].add(v)
        self.outputs_at = tuple(map(frozenset, outputs))
        self.members = functools.cache(self._members)  # several budgets ask the same

    @functools.cached_property
    def cuts(self) -> MinimumCuts:
        return MinimumCuts(self.problem, self.home)

    def _made_by(self, values: Collection[int], stage: int) -> set[int]:
        made_in, later = self.made_in, self.count
        return {v for v in values if made_in.get(v, later) <= stage}

    @functools.cached_property
    def demands(self) -> list[_Demand]:
        """Per boundary, what it must offer whatever is held behind it."""
        found = []
        for stage in range(self.count - 1):
            whole = self._made_by(self.read_whole[stage + 1], stage)
            inputs = [v for v, last in self.last_use.items() if last > stage]
            found.append(
                _Demand(
                    whole=frozenset(whole),
                    wanted=frozenset(self._made_by(self.read[stage + 1], stage) | whole),
                    free=frozenset(self._made_by(self.problem.outputs, stage) | whole),
                    outputs=frozenset(self._made_by(self.problem.outputs, stage + 1)),
                    input_bytes=sum(self.problem.input_size[v] for v in inputs),
                )
            )
        return found

    def crossing(self, stage: int, after: frozenset[int], budget: float) -> frozenset[int]:
        """Values to hold between ``stage`` and the next, behind which ``after`` are held."""
        demand = self.demands[stage]
        wanted = demand.wanted | self._made_by(after, stage)

        def at(rate: int) -> frozenset[int]:
            found = self.cuts.cheapest(stage, wanted, demand.free, EXCHANGE_RATES[rate])
            return found | demand.whole

        def fits(held: frozenset[int]) -> bool:
            known = self.problem.bytes_of(held | after | demand.outputs)
            return known + demand.input_bytes <= budget

        last = len(EXCHANGE_RATES) - 1
        if not fits(demand.whole):
            return at(last)  # no cut holds less
        return at(_first(lambda rate: fits(at(rate)), last))

    def _members(
        self, stage: int, targets: frozenset[int], whole: frozenset[int]
    ) -> tuple[int, ...]:
        """Row operations that give the own reductions and ``targets`` from what is ``whole``."""
        found = set(self.reductions[stage])
        stack = [*found]
        stack += {self.producer[v] for v in targets if v in self.producer}
        found.update(stack)
        while stack:
            for v in self.problem.operations[stack.pop()].inputs:
                if v not in whole and v in self.producer and self.producer[v] not in found:
                    found.add(self.producer[v])
                    stack.append(self.producer[v])
        return tuple(sorted(found))


def _first(is_enough: Callable[[int], bool], last: int) -> int:
    """The first number that is enough, or ``last``; low ones are tried first, as most often do."""
    low, high = 0, 0  # all below ``low`` are not enough
    while high < last and not is_enough(high):
        low, high = high + 1, min(2 * high + 1, last)
    return low + bisect.bisect_left(range(low, high), True, key=is_enough)


def _earliest_stages(problem: Problem) -> list[int]:
    """Everything in the first stage that it can run in (scheduling as soon as possible).

    A value made whole by stage ``s`` can be used whole from stage ``s + 1`` on.
    """
    whole_from = dict(problem.available)
    rows_from: dict[int, int] = {}
    stages = []
    last_effect = 0
    for operation in problem.operations:
        if operation.by_rows:
            ready = (rows_from.get(v, whole_from.get(v, 0)) for v in operation.inputs)
        else:
            ready = (whole_from.get(v, 0) for v in operation.inputs)
        stage = max(ready, default=0)
        if operation.has_effects:
            stage = last_effect = max(stage, last_effect)
        stages.append(stage)
        for v in operation.outputs:
            if v in problem.size:
                rows_from[v] = stage
            whole_from[v] = stage + 1 if operation.by_rows else stage
    return stages


def _latest_stages(problem: Problem, earliest: Sequence[int]) -> tuple[int, ...]:
    """Everything in the first stage that needs it (scheduling as late as possible).

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
    """Minimum cuts at the boundaries of one program, by maximum flows (Ford & Fulkerson 1956).

    A flow network with two kinds of vertices: a value is *wanted* behind the boundary, an operation
    is *done again* there. Edges cost what it costs if their tail is so and their head is not: a
    wanted value whose operation is not done again is held (its bytes); an operation that is done
    again wants its inputs (never violated) and costs its price.
    """

    def __init__(self, problem: Problem, home: Sequence[int]):
        self.problem = problem
        # Vertices are numbered by stages, so that a boundary's network is the first of them.
        self.vertex: dict[int, int] = {}
        self.again: dict[int, int] = {}
        self.vertices: list[int] = []  # how many there are up to each stage
        operations: list[list[int]] = [[] for _ in range(1 + max(home, default=0))]
        for i, stage in enumerate(home):
            operations[stage].append(i)
        number = itertools.count(2)
        for own in operations:
            for i in own:
                made = [v for v in problem.operations[i].outputs if v in problem.size]
                if made:
                    self.again[i] = next(number)
                    self.vertex.update((v, next(number)) for v in made)
            self.vertices.append(2 + len(self.again) + len(self.vertex))
        edges = np.array([*self._edges(home)]).reshape(-1, 6)
        order = np.lexsort((edges[:, 1], edges[:, 0]))
        tail, head, self.bytes, self.flops, stage, held = edges[order].T
        self.tail, self.head = tail.astype(np.int32), head.astype(np.int32)
        self.stage, self.held = stage.astype(int), held.astype(int)
        self.cheapest = functools.cache(self._cheapest)  # several budgets ask the same
        self._network = functools.lru_cache(maxsize=1)(self._network_of)  # of the last boundary

    def _edges(self, home: Sequence[int]) -> Iterator[tuple[int, int, float, float, int, int]]:
        """Tail, head, cost in bytes and in operations, stage, and the value held."""
        for i, operation in enumerate(self.problem.operations):
            if i not in self.again:
                continue
            again = self.again[i]
            made = [v for v in operation.outputs if v in self.vertex]
            # A unit cost breaks ties against recomputation.
            never = math.inf if self.problem.kept.intersection(made) else 0.0
            yield again, SINK, never, 1.0 + operation.flops, home[i], -1
            for v in made:
                yield self.vertex[v], again, float(self.problem.size[v]), 0.0, home[i], v
            for v in dict.fromkeys(operation.inputs):
                if v in self.vertex:
                    yield again, self.vertex[v], math.inf, 0.0, home[i], -1

    def _cheapest(
        self,
        stage: int,
        wanted: frozenset[int],
        free: frozenset[int],
        operations_per_byte: float,
    ) -> frozenset[int]:
        """Values to hold across the boundary behind ``stage``; those in ``free`` cost nothing."""
        if not wanted:
            return frozenset()
        return frozenset(self._network(stage, wanted, free).cut(operations_per_byte))

    def _network_of(self, stage: int, wanted: frozenset[int], free: frozenset[int]) -> _Network:
        """The flow network of a boundary, for all exchange rates."""
        pinned = self.problem.never_held.union(self.problem.pinned.get(stage, ()))
        in_bytes = np.where(self._is_one_of(pinned), math.inf, self.bytes)
        in_bytes[self._is_one_of(free)] = 0.0
        kept = self.stage <= stage
        demand = sorted(self.vertex[v] for v in wanted)

        def edges(demanded: float, others: np.ndarray) -> np.ndarray:
            return np.concatenate([np.full(len(demand), demanded, others.dtype), others[kept]])

        return _Network(
            self.vertices[stage],
            tail=edges(SOURCE, self.tail),
            head=np.concatenate([np.array(demand, self.head.dtype), self.head[kept]]),
            in_bytes=edges(math.inf, in_bytes),
            in_operations=edges(0.0, self.flops),
            held=edges(-1, self.held),
        )

    def _is_one_of(self, values: Collection[int]) -> np.ndarray:
        """Whether the value held at each edge (-1 for none) is among ``values``."""
        found = np.zeros(self.largest + 2, bool)
        found[[v for v in values if v in self.vertex]] = True
        return found[self.held]

    @functools.cached_property
    def largest(self) -> int:
        """The largest number of a value."""
        return max(self.vertex, default=0)


INFINITE = 2**30
SOURCE, SINK = 0, 1


@dataclasses.dataclass(frozen=True, eq=False)
class _Network:
    """A flow network whose edges cost bytes and operations: a minimum cut for every exchange rate.

    Attributes:
      vertices: how many.
      tail, head: of every edge, in this order.
      in_bytes, in_operations: what it costs.
      held: the value that is held where the cut crosses it, or -1.
    """

    vertices: int
    tail: np.ndarray
    head: np.ndarray
    in_bytes: np.ndarray
    in_operations: np.ndarray
    held: np.ndarray

    @functools.cached_property
    def is_finite(self) -> np.ndarray:
        return np.isfinite(self.in_bytes + self.in_operations)

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """Number of the first edge of every vertex."""
        return np.searchsorted(self.tail, np.arange(self.vertices + 1)).astype(np.int32)

    def cut(self, operations_per_byte: float) -> list[int]:
        """The values held on the minimum cut nearest to the source.

        A maximum flow (SciPy's, by Dinic's algorithm); what its residual network reaches from the
        source is one side of the cut.
        """
        costs = np.where(
            self.is_finite, self.in_bytes + self.in_operations / operations_per_byte, 0
        )
        scale = INFINITE / 4 / max(float(np.sum(costs)), 1.0)
        least = np.minimum(np.ceil(costs), 1)  # what costs something costs a unit
        capacity = np.where(self.is_finite, np.maximum(costs * scale, least), INFINITE)
        structure = self.head, self.starts
        network = csr_array((capacity.astype(np.int32), *structure), shape=(self.vertices,) * 2)
        residual = network - maximum_flow(network, SOURCE, SINK).flow
        residual.data[residual.data < 0] = 0
        residual.eliminate_zeros()
        reached = np.zeros(self.vertices, bool)
        reached[breadth_first_order(residual, SOURCE, return_predecessors=False)] = True
        crosses = (self.held >= 0) & reached[self.tail] & ~reached[self.head]
        return self.held[crosses].tolist()
