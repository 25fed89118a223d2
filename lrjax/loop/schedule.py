"""Row graph -> steps: how far every value has come after each step, and what is kept.

Integers alone, no JAX. The rows that task ``v`` owns in step ``t`` are
``frontier[v][t - 1] : frontier[v][t]`` in virtual coordinates (see ``geometry``): frontiers
start at or below row 0 and end at or beyond the height, so that every step has the same shape.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from lrjax.rules.geometry import AnyMap, Frontier, ceil_div, round_down, round_up

# Below every row: a frontier that nothing has asked for yet.
_NOWHERE = -(1 << 40)


@dataclasses.dataclass(frozen=True)
class Read:
    """A task's read of another task's rows (``task``), or of a value that exists whole (None).

    ``is_copied``: a window that is not the slab as it is, is a copy (a library reads it).
    """

    task: int | None
    row_map: AnyMap
    is_copied: bool = False


@dataclasses.dataclass(frozen=True)
class Task:
    """One operation of a row loop, in topological order.

    Attributes:
      reads: what it reads by rows.
      height: rows of its output, or of the operand that drives a reduction.
      speed: rows that the steady state gives per step.
      is_sink: its rows leave the loop (an output or a reduction).
      most_halo: rows beyond its share that a step may compute again, so that a reader's window is
        the slab as it is.
      width: bytes of a row of what it gives; 0 if not known.
    """

    reads: tuple[Read, ...]
    height: int
    speed: Fraction
    is_sink: bool = False
    most_halo: int = 0
    width: float = 0.0

    @functools.cached_property
    def quantum(self) -> int:
        quantum = 1
        for read in self.reads:
            quantum = math.lcm(quantum, read.row_map.quantum)
        return quantum

    @functools.cached_property
    def pace(self) -> tuple[int, int, int]:
        """So many rows in so many steps, in multiples of the last."""
        return *self.speed.as_integer_ratio(), self.quantum


@dataclasses.dataclass(frozen=True)
class Track:
    """What one task does over the steps.

    Attributes:
      frontier: one past its last row after step ``t``; entry 0 is the state before step 0.
      rows: rows computed in a step, ``frontier - rows : frontier``; more than the step owns
        where halo rows are recomputed or the speed is fractional.
      depth: rows that must be at hand after the step's own are there, counted from the frontier
        back; ``rows`` if nothing older is read.
    """

    frontier: tuple[int, ...]
    rows: int
    depth: int

    def stop(self, step: int) -> int:
        return self.frontier[step + 1]

    def start(self, step: int) -> int:
        """The first row computed in ``step``."""
        return self.frontier[step + 1] - self.rows

    def owned(self, step: int) -> tuple[int, int]:
        return self.frontier[step], self.frontier[step + 1]

    @functools.cached_property
    def stops(self) -> Frontier:
        """One past the last row, after every step."""
        return np.array(self.frontier[1:])

    @functools.cached_property
    def advances(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in itertools.pairwise(self.frontier))

    @functools.cached_property
    def is_steady(self) -> bool:
        """Every step gives exactly the rows it owns."""
        return all(advance == self.rows for advance in self.advances)

    @property
    def carried(self) -> int:
        """Rows kept between steps (the line buffer)."""
        return 0 if self.depth <= self.rows else self.depth - min(self.advances)


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The steps of one row loop.

    Attributes:
      tasks: what runs.
      frontiers: of every task, one past its last row before the first step and after every step.
      recomputes_halos: steps compute all rows that they need, and nothing is kept.
      before: steps before the one that begins at row 0 without a lag.
      needed: where the rows are one device's share, the rows of every task that must be made.
    """

    tasks: tuple[Task, ...]
    frontiers: tuple[Frontier, ...]
    recomputes_halos: bool = False
    before: int = 0
    needed: tuple[tuple[int, int], ...] = ()

    @property
    def steps(self) -> int:
        return len(self.frontiers[0]) - 1

    @functools.cached_property
    def tracks(self) -> tuple[Track, ...]:
        """What every task does; not asked for where a schedule is tried for its steps alone."""
        return _tracks(self.tasks, self.frontiers, recomputes_halos=self.recomputes_halos)


def needed_rows(tasks: Sequence[Task]) -> list[tuple[int, int]]:
    """Per task, the rows that the sinks' rows from 0 to their heights depend on."""
    needed = [(0, task.height) if task.is_sink else None for task in tasks]
    for i in reversed(range(len(tasks))):
        own = needed[i]
        for read in tasks[i].reads:
            if read.task is not None and own is not None:
                first, stop = int(read.row_map.first(own[0])), int(read.row_map.end(own[1]))
                known = needed[read.task] or (first, stop)
                needed[read.task] = min(known[0], first), max(known[1], stop)
    return [own or (0, 0) for own in needed]


def shared_schedule(tasks: Sequence[Task], *, is_share: bool = False) -> Schedule:
    """Every row is computed once, as late as its consumers allow (stream and 2PS).

    First every task gets the least lag that its inputs allow; then the largest that its consumers
    allow, so that nothing waits in a line buffer for no reason.

    Where the rows are one device's share of an image (``is_share``), there are rows before row 0
    too, and the first steps make those that the share's own rows depend on.
    """
    before, needed = 0, needed_rows(tasks) if is_share else []
    while True:
        even, eager = _least_lags(tasks, before)
        lags = _largest_lags(tasks, eager, even)
        lazy = [even.behind(task, lag) for task, lag in zip(tasks, lags, strict=True)]
        missing = [
            (int(rows[0]) - first) / task.speed
            for task, rows, (first, _) in zip(tasks, lazy, needed, strict=False)
            if rows[0] > first
        ]
        if not missing:
            return Schedule(tuple(tasks), tuple(lazy), before=before, needed=tuple(needed))
        before += max(1, math.ceil(max(missing)))


def overlap_schedule(tasks: Sequence[Task]) -> Schedule:
    """Steps own the sinks' rows and recompute every halo (OverL): nothing is kept."""
    sinks = [i for i, task in enumerate(tasks) if task.is_sink]
    steps = max([1, *(_steps_to_end(tasks[i]) for i in sinks)])
    frontiers = [np.full(steps + 1, _NOWHERE) for _ in tasks]
    for i in sinks:
        rows, per_steps = tasks[i].speed.as_integer_ratio()
        frontiers[i] = round_up(ceil_div(np.arange(steps + 1) * rows, per_steps), tasks[i].quantum)
    _raise_to_demand(tasks, frontiers)
    for i in sinks:
        # Rows that a later window reads ahead of would otherwise belong to no step.
        frontiers[i][0] = min(frontiers[i][0], 0)
    return Schedule(tuple(tasks), tuple(frontiers), recomputes_halos=True)


def _steps_to_end(task: Task) -> int:
    """Steps after which a task that rounds its share up has reached its height."""
    last_quantum = round_up(task.height, task.quantum) - task.quantum
    return math.floor(last_quantum / task.speed) + 1


@dataclasses.dataclass(frozen=True)
class _Even:
    """Frontiers that advance by a task's share in every step, so many rows behind it.

    Even frontiers keep steps alike: where a stride makes one operation advance in every other step
    only, following its demand to the letter would make all before it stop and go as well. Tasks of
    one pace and one lag have the same array.

    Attributes:
      steps: from the one on that begins at row 0 without a lag.
      before: steps before that.
    """

    steps: int
    before: int
    made: dict[tuple[tuple[int, int, int], int], Frontier] = dataclasses.field(default_factory=dict)

    def behind(self, task: Task, lag: int) -> Frontier:
        key = task.pace, lag
        if key not in self.made:
            found = self.made[key] = _advance(*task.pace, self.steps, self.before) - lag
            found.flags.writeable = False  # many tasks read it
        return self.made[key]


@functools.lru_cache(maxsize=256)  # the operations of a network have few paces
def _advance(rows: int, per_steps: int, quantum: int, steps: int, before: int) -> Frontier:
    """``rows`` more after every ``per_steps`` steps, in multiples of ``quantum``."""
    return round_down(np.arange(-before, steps + 1) * rows // per_steps, quantum)


def _least_lags(tasks: Sequence[Task], before: int) -> tuple[_Even, list[int]]:
    """The least lag of every task with which its inputs are always there in time."""
    steps = 1
    while True:
        even, lags = _Even(steps, before), list[int]()
        for task in tasks:
            lag = 0
            for read in task.reads:
                if read.task is None:
                    continue
                source, row_map = tasks[read.task], read.row_map
                if row_map.shift is not None and source.pace == task.pace:
                    lag = max(lag, lags[read.task] + row_map.shift)
                else:
                    allowed = row_map.frontier(even.behind(source, lags[read.task]))
                    lag = max(lag, int((even.behind(task, 0) - allowed).max()))
            lags.append(round_up(lag, task.quantum))
        last = [int(even.behind(task, lag)[-1]) for task, lag in zip(tasks, lags, strict=True)]
        missing = [
            (task.height - row) / task.speed
            for task, row in zip(tasks, last, strict=True)
            if task.is_sink and row < task.height
        ]
        if not missing:
            return even, lags
        steps += max(1, math.ceil(max(missing)))


def _largest_lags(tasks: Sequence[Task], eager: list[int], even: _Even) -> list[int]:
    """The largest lag of every task with which its consumers are always served; sinks stay."""
    lags, spare = list(eager), dict[int, int]()
    for i in reversed(range(len(tasks))):
        task = tasks[i]
        if i in spare and not task.is_sink:
            lags[i] = round_down(spare[i], task.quantum)
        for read in task.reads:
            if read.task is None:
                continue
            source, row_map = tasks[read.task], read.row_map
            if row_map.shift is not None and source.pace == task.pace:
                own = lags[i] - row_map.shift
            else:
                needed = row_map.end(even.behind(task, lags[i]))
                own = int((even.behind(source, 0) - needed).min())
            spare[read.task] = min(spare.get(read.task, own), own)
    return lags


def brought_forward(schedule: Schedule) -> Schedule:
    """A shared schedule with the least lag for tasks that give less than what waits for them.

    So the gradient of a concatenation is divided at once where one part of it is read long after
    the other (U-Net's shortcuts), and that part waits, not all of it.
    """
    tasks = schedule.tasks
    frontiers = list(schedule.frontiers)
    readers: dict[int, list[int]] = {}
    for i, task in enumerate(tasks):
        for j in dict.fromkeys(read.task for read in task.reads):
            if j is not None:
                readers.setdefault(j, []).append(i)
    for j, others in readers.items():
        if any(tasks[i].width < tasks[j].width for i in others):
            for i, frontier in _moved(schedule, frontiers, j, others).items():
                frontiers[i] = frontier
    if all(map(np.array_equal, frontiers, schedule.frontiers)):
        return schedule
    return dataclasses.replace(schedule, frontiers=tuple(frontiers))


def _moved(
    schedule: Schedule, frontiers: list[Frontier], value: int, readers: Sequence[int]
) -> dict[int, Frontier]:
    """New frontiers of a task's latest readers, if less waits then in all."""
    tasks = schedule.tasks
    own = int(np.max(np.diff(frontiers[value])))
    back = {i: max(_back(tasks, frontiers, i, value), own) for i in readers}
    latest = sorted(readers, key=lambda i: back[i], reverse=True)
    moved: dict[int, Frontier] = {}
    cost = 0.0
    for k, i in enumerate(latest):
        frontier = _earliest(schedule, frontiers, i)
        if frontier is None or tasks[i].width >= tasks[value].width:
            return {}
        moved[i] = frontier
        cost += int(np.max(frontier - frontiers[i])) * tasks[i].width
        left = back[latest[k + 1]] if k + 1 < len(latest) else own
        if cost < (back[latest[0]] - left) * tasks[value].width:
            return moved
    return {}


def _back(tasks: Sequence[Task], frontiers: list[Frontier], reader: int, value: int) -> int:
    """How far before a task's frontier the rows begin that a reader takes, at most."""
    starts = frontiers[reader][1:] - int(np.max(np.diff(frontiers[reader])))
    maps = [read.row_map for read in tasks[reader].reads if read.task == value]
    return max(int(np.max(frontiers[value][1:] - one.first(starts))) for one in maps)


def _earliest(schedule: Schedule, frontiers: list[Frontier], index: int) -> Frontier | None:
    """The frontier of the least lag behind what a task reads, if that is one task's rows."""
    task, before = schedule.tasks[index], schedule.before
    reads = [read for read in task.reads if read.task is not None]
    if task.is_sink or len(reads) != 1 or reads[0].task is None:
        return None
    even = _Even(schedule.steps - before, before)
    allowed = reads[0].row_map.frontier(frontiers[reads[0].task])
    behind = int(np.max(even.behind(task, 0) - allowed))
    found = even.behind(task, round_up(max(behind, 0), task.quantum))
    if schedule.needed and int(found[0]) > schedule.needed[index][0]:
        return None
    return found


def _raise_to_demand(tasks: Sequence[Task], frontiers: list[Frontier]) -> None:
    """Every task as far as its consumers ask, from the last task to the first."""
    for i in reversed(range(len(tasks))):
        frontiers[i] = round_up(frontiers[i], tasks[i].quantum)
        for read in tasks[i].reads:
            if read.task is not None:
                needed = read.row_map.end(frontiers[i])
                frontiers[read.task] = np.maximum(frontiers[read.task], needed)


def _tracks(
    tasks: Sequence[Task], frontiers: Sequence[Frontier], *, recomputes_halos: bool
) -> tuple[Track, ...]:
    """Rows computed per step and kept between steps, from the last task to the first."""
    windows: list[list[_Window]] = [[] for _ in tasks]
    tracks: list[Track] = [Track((), 0, 0)] * len(tasks)
    # Many tasks have the same array (see ``_Even``).
    advanced: dict[int, tuple[tuple[int, ...], int]] = {}
    backs: dict[tuple[int, int, AnyMap, int], int] = {}
    for i in reversed(range(len(tasks))):
        task, frontier = tasks[i], frontiers[i]
        if id(frontier) not in advanced:
            advanced[id(frontier)] = tuple(frontier.tolist()), int(np.diff(frontier).max())
        stops, most = advanced[id(frontier)]
        rows = max(most, task.quantum)
        reach = max((window.back for window in windows[i]), default=0)
        if recomputes_halos:
            rows = max(rows, round_up(reach, task.quantum))
        else:
            rows = _slab_rows(rows, task, windows[i])
        tracks[i] = Track(stops, rows, max(reach, rows))
        for read in task.reads:
            if read.task is not None:
                source, row_map = frontiers[read.task], read.row_map
                key = id(source), id(frontier), row_map, rows
                if key not in backs:
                    backs[key] = int((source - row_map.first(frontier - rows))[1:].max())
                window = _Window(backs[key], row_map.size(rows), read.is_copied)
                windows[read.task].append(window)
    return tuple(tracks)


@dataclasses.dataclass(frozen=True)
class _Window:
    """What a reader takes in a step: rows, how far they begin before the frontier at most, and
    whether it takes a copy of them where they are not the slab."""

    back: int
    rows: int
    is_copied: bool


# From so many slabs on a line buffer is deep (see ``RowLoop.is_ring``).
_DEEP = 3


def _slab_rows(own: int, task: Task, windows: Sequence[_Window]) -> int:
    """Rows of a step's slab: its own, or with a halo that is computed again.

    With a halo the windows of most readers are the slab as it is, and not put together from it and
    from rows of the step before. Where rows wait for many steps, they do so in a ring of slabs,
    which a halo has no place in.
    """
    if any(window.back >= _DEEP * own for window in windows):
        return own
    candidates = [
        window.back
        for window in windows
        if own <= window.back == window.rows <= own + task.most_halo
        and window.back % task.quantum == 0
    ]

    def saved(rows: int) -> tuple[int, int]:
        same = [window for window in windows if window.back == window.rows == rows]
        return sum(window.is_copied for window in same), len(same)

    return max(sorted({own, *candidates}), key=saved)
