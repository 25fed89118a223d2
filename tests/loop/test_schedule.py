"""Schedules of random row loops keep their promises; integers only."""

from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lrjax.loop.schedule import Read, Task, brought_forward, overlap_schedule, shared_schedule
from lrjax.rules.geometry import IDENTITY, RowMap

MAKERS = {
    "shared": shared_schedule,
    "brought forward": lambda tasks: brought_forward(shared_schedule(tasks)),
    "overlap": overlap_schedule,
}
same_rate = [RowMap(extent=k, pad=p) for k in (1, 2, 3, 5) for p in (-1, 0, 1, 2)]
other_rate = [
    RowMap(stride=s, extent=k, pad=p, base=b)
    for s, b in ((2, 1), (3, 1), (1, 2), (1, 3), (2, 3))
    for k in (1, 2, 3, 4)
    for p in (0, 1)
]


@st.composite
def row_loops(draw):
    """Tasks in topological order that read a whole input and each other, at consistent rates."""
    height, rows = draw(st.integers(1, 40)), draw(st.integers(1, 12))
    made = [(None, height, Fraction(1))]  # (task, height, rows per row of the input)
    tasks = []
    for index in range(draw(st.integers(1, 7))):
        source, size, rate = draw(st.sampled_from(made[-3:]))
        row_map = draw(st.sampled_from(same_rate + other_rate))
        reads = [Read(source, row_map)]
        rate = rate / row_map.rate
        out = max(row_map.frontier(size + draw(st.integers(0, 1))), 1)
        partners = [m for m in made if m[2] == rate and m[0] is not None]
        if partners and draw(st.booleans()):
            reads.append(Read(draw(st.sampled_from(partners))[0], draw(st.sampled_from(same_rate))))
        width = draw(st.sampled_from([1.0, 2.0, 8.0]))
        tasks.append(Task(tuple(reads), out, rows * rate, draw(st.booleans()), width=width))
        made.append((index, out, rate))
    last = tasks.pop()
    return [*tasks, Task(last.reads, last.height, last.speed, is_sink=True)]


def window(track, read, step):
    """Input rows of a read in a step."""
    start = read.row_map.first(track.start(step))
    return start, start + read.row_map.size(track.rows)


def read_by_others(tasks):
    return {read.task for task in tasks for read in task.reads if read.task is not None}


@pytest.mark.parametrize("order", MAKERS)
class TestPromises:
    @settings(max_examples=150, deadline=None)
    @given(tasks=row_loops())
    def test_windows_lie_in_what_is_at_hand(self, order, tasks):
        schedule = MAKERS[order](tasks)
        for task, track in zip(tasks, schedule.tracks, strict=True):
            for read in task.reads:
                if read.task is None:
                    continue
                source = schedule.tracks[read.task]
                for step in range(schedule.steps):
                    start, stop = window(track, read, step)
                    assert source.stop(step) - source.depth <= start
                    assert stop <= source.stop(step)

    @settings(max_examples=150, deadline=None)
    @given(tasks=row_loops())
    def test_windows_have_one_size(self, order, tasks):
        """One compiled step serves all."""
        schedule = MAKERS[order](tasks)
        for task, track in zip(tasks, schedule.tracks, strict=True):
            for read in task.reads:
                windows = (window(track, read, step) for step in range(schedule.steps))
                assert len({stop - start for start, stop in windows}) == 1

    @settings(max_examples=150, deadline=None)
    @given(tasks=row_loops())
    def test_frontiers_only_advance(self, order, tasks):
        schedule = MAKERS[order](tasks)
        for track in schedule.tracks:
            assert len(track.frontier) == schedule.steps + 1
            assert all(advance >= 0 for advance in track.advances)
            assert all(advance <= track.rows <= track.depth for advance in track.advances)

    @settings(max_examples=150, deadline=None)
    @given(tasks=row_loops())
    def test_every_row_of_a_sink_is_owned_once(self, order, tasks):
        schedule = MAKERS[order](tasks)
        for task, track in zip(tasks, schedule.tracks, strict=True):
            if not task.is_sink:
                continue
            owned = [row for t in range(schedule.steps) for row in range(*track.owned(t))]
            in_image = [row for row in owned if 0 <= row < task.height]
            assert in_image == list(range(task.height))

    @settings(max_examples=150, deadline=None)
    @given(tasks=row_loops())
    def test_blocks_start_at_multiples_of_the_quantum(self, order, tasks):
        """Then every block meets a dilated input at the same alignment."""
        schedule = MAKERS[order](tasks)
        for task, track in zip(tasks, schedule.tracks, strict=True):
            assert track.rows % task.quantum == 0
            assert all(row % task.quantum == 0 for row in track.frontier)


@settings(max_examples=150, deadline=None)
@given(tasks=row_loops())
def test_shared_frontiers_start_above_the_image(tasks):
    """No row is skipped that a consumer may read: nothing is done before the first step."""
    schedule = shared_schedule(tasks)
    assert all(track.frontier[0] <= 0 for track in schedule.tracks)


@settings(max_examples=150, deadline=None)
@given(tasks=row_loops())
def test_line_buffers_hold_what_the_next_step_lacks(tasks):
    schedule = shared_schedule(tasks)
    for track in schedule.tracks:
        for advance in track.advances:
            assert track.depth <= track.carried + max(advance, 0) or track.carried == 0


@settings(max_examples=150, deadline=None)
@given(tasks=row_loops())
def test_overlap_keeps_nothing(tasks):
    assert all(track.carried == 0 for track in overlap_schedule(tasks).tracks)


@settings(max_examples=100, deadline=None)
@given(tasks=row_loops())
def test_sharing_computes_no_row_twice_where_speeds_are_whole(tasks):
    assume(all(task.speed.denominator == 1 and task.quantum == 1 for task in tasks))
    for task, track in zip(tasks, shared_schedule(tasks).tracks, strict=True):
        assert track.rows <= task.speed or max(track.advances) == track.rows


def chain(*maps, height=32, rows=8):
    tasks, source, speed = [], None, Fraction(rows)
    for row_map in maps:
        speed = speed / row_map.rate
        height = max(row_map.frontier(height + row_map.pad), 1)
        tasks.append(Task((Read(source, row_map),), height, speed))
        source = len(tasks) - 1
    return [*tasks[:-1], Task(tasks[-1].reads, height, speed, is_sink=True)]


CONV = RowMap(extent=3, pad=1)
POOL = RowMap(stride=2, extent=2)


def test_two_convolutions_share_two_rows():
    first, second = shared_schedule(chain(CONV, CONV)).tracks
    assert (first.carried, first.rows, second.rows) == (2, 8, 8)


def divided(early, late, rows=4):
    """Two parts of a value, of which one is read at once and one behind a chain of windows."""
    speed, near = Fraction(rows), RowMap(extent=9, pad=4)

    def task(*sources, width=1.0, is_sink=False):
        reads = tuple(Read(source, row_map) for source, row_map in sources)
        return Task(reads, 64, speed, is_sink, width=width)

    return [
        task((None, IDENTITY), width=4.0),
        task((0, IDENTITY), width=early),
        task((1, near)),
        task((2, near)),
        task((0, IDENTITY), width=late),
        task((3, IDENTITY), (4, IDENTITY), is_sink=True),
    ]


def test_a_part_waits_instead_of_the_whole():
    before = shared_schedule(divided(2.0, 2.0))
    after = brought_forward(before)
    whole, part = before.tracks[0], before.tracks[4]
    assert (whole.carried, part.carried) == (8, 0)
    assert (after.tracks[0].carried, after.tracks[4].carried) == (0, 8)
    assert after.steps == before.steps
    assert after.tracks[1:4] == before.tracks[1:4]


@pytest.mark.parametrize("late", [4.0, 8.0])
def test_what_gives_as_much_as_it_takes_stays_behind(late):
    schedule = shared_schedule(divided(2.0, late))
    assert brought_forward(schedule) is schedule


def test_two_convolutions_overlap_by_two_rows():
    first, second = overlap_schedule(chain(CONV, CONV)).tracks
    assert (first.carried, first.rows, second.rows) == (0, 10, 8)


def test_pooling_alone_needs_no_buffer():
    tracks = shared_schedule(chain(POOL, POOL)).tracks
    assert [track.carried for track in tracks] == [0, 0]


def test_one_block_is_one_step():
    schedule = overlap_schedule(chain(CONV, POOL, CONV, rows=32))
    assert schedule.steps == 1


def test_a_step_may_have_nothing_new():
    """One input row a step: a value at an eighth of the rate gives one every eighth step."""
    schedule = shared_schedule(chain(POOL, POOL, POOL, height=16, rows=1))
    assert set(schedule.tracks[-1].advances) == {0, 1}


@pytest.mark.parametrize("order", MAKERS)
def test_a_sink_that_others_read_beyond(order):
    """An output that a later window reads ahead of: its own rows are still all owned."""
    tasks = [
        Task((Read(None, IDENTITY),), 12, Fraction(4), is_sink=True),
        Task((Read(0, RowMap(extent=5, pad=2)),), 12, Fraction(4), is_sink=True),
    ]
    track = MAKERS[order](tasks).tracks[0]
    assert track.frontier[0] <= 0
    assert track.frontier[-1] >= 12
