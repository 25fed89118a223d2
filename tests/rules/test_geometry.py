"""Row maps against windows written out position by position."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrjax.rules.geometry import (
    IDENTITY,
    BandMap,
    ChainedMap,
    RowMap,
    ceil_div,
    round_down,
    round_up,
)

row_maps = st.builds(
    RowMap,
    stride=st.integers(1, 4),
    extent=st.integers(1, 7),
    pad=st.integers(-3, 5),
    base=st.integers(1, 4),
)
chains = st.lists(row_maps, min_size=1, max_size=4).map(lambda maps: ChainedMap(tuple(maps)))
bands = st.builds(
    BandMap,
    stride=st.integers(1, 40),
    base=st.integers(1, 40),
    low=st.integers(-5, 5),
    extent=st.integers(1, 6),
)
any_maps = st.one_of(row_maps, chains, bands)
rows = st.integers(-30, 30)
counts = st.integers(1, 12)


def touched(row_map, start, stop):
    """Input rows under the windows of output rows ``[start, stop)``, one position at a time."""
    positions = (
        i * row_map.stride - row_map.pad + k
        for i in range(start, stop)
        for k in range(row_map.extent)
    )
    return [p // row_map.base for p in positions if p % row_map.base == 0]


@given(row_maps, rows, counts)
def test_range_holds_every_touched_row(row_map, start, count):
    found = touched(row_map, start, start + count)
    assert all(row_map.first(start) <= row < row_map.end(start + count) for row in found)


@given(row_maps, rows, counts)
def test_range_is_tight_where_windows_meet_rows(row_map, start, count):
    first, last = (touched(row_map, i, i + 1) for i in (start, start + count - 1))
    if first:
        assert row_map.first(start) == min(first)
    if last:
        assert row_map.end(start + count) == max(last) + 1


@given(any_maps, rows, rows)
def test_frontier_is_the_furthest_stop(row_map, stop, available):
    """``end`` and ``frontier`` form a Galois connection."""
    assert (row_map.end(stop) <= available) == (stop <= row_map.frontier(available))


@given(any_maps, rows, counts)
def test_maps_are_monotone(row_map, start, count):
    assert row_map.first(start) <= row_map.first(start + count)
    assert row_map.end(start) <= row_map.end(start + count)
    assert row_map.frontier(start) <= row_map.frontier(start + count)


@given(any_maps, rows, counts)
def test_window_lies_within_its_range(row_map, start, count):
    """Windows of one size hold what their rows need, and stop where the range does."""
    if not isinstance(row_map, BandMap):
        start, count = (rows * row_map.quantum for rows in (start, count))
    elif row_map.quantum > 1:
        start *= row_map.quantum
    stop = row_map.first(start) + row_map.size(count)
    last_needed = row_map.end(start + count) - getattr(row_map, "_slack", 0)
    assert last_needed <= stop <= row_map.end(start + count)


@given(any_maps, rows, st.integers(-5, 5))
def test_shift_by_the_quantum_moves_everything_alike(row_map, start, times):
    period = row_map.base if isinstance(row_map, BandMap) else row_map.quantum
    shift = times * period
    moved = shift * row_map.rate
    assert moved.denominator == 1
    assert row_map.first(start + shift) == row_map.first(start) + moved
    assert row_map.end(start + shift) == row_map.end(start) + moved


@given(row_maps)
def test_quantum_is_the_least_whole_shift(row_map):
    least = next(q for q in range(1, 20) if (q * row_map.rate).denominator == 1)
    assert row_map.quantum == least


@given(row_maps, row_maps, rows, counts)
def test_chain_covers_what_its_windows_touch(inner, outer, start, count):
    chain = inner.then(outer)
    for row in touched(inner, start, start + count):
        for source in touched(outer, row, row + 1):
            assert chain.first(start) <= source < chain.end(start + count)
    assert chain.rate == inner.rate * outer.rate


@given(row_maps, row_maps, row_maps, rows)
def test_chains_nest(a, b, c, start):
    flat, nested = ChainedMap((a, b, c)), a.then(b.then(c))
    assert flat.first(start) == nested.first(start)
    assert flat.end(start) == nested.end(start)
    assert flat.frontier(start) == nested.frontier(start)
    assert flat.rate == nested.rate


@settings(max_examples=30)
@given(rows, counts)
def test_identity(start, count):
    assert (IDENTITY.first(start), IDENTITY.end(start + count)) == (start, start + count)
    assert IDENTITY.frontier(start) == start
    assert (IDENTITY.quantum, IDENTITY.rate) == (1, Fraction(1))


@given(rows, counts)
def test_rounding(value, quantum):
    assert round_down(value, quantum) <= value <= round_up(value, quantum)
    assert round_up(value, quantum) - round_down(value, quantum) in (0, quantum)
    assert ceil_div(value, quantum) == round_up(value, quantum) // quantum


@pytest.mark.parametrize(
    ("row_map", "rows", "expected"),
    [
        (RowMap(extent=3, pad=1), (0, 4), (-1, 5)),  # 3x3, SAME
        (RowMap(stride=2, extent=2), (0, 4), (0, 8)),  # 2x2 pooling
        (RowMap(stride=2, extent=7, pad=3), (4, 6), (5, 14)),  # ResNet's first
        (RowMap(extent=5, pad=2), (0, 1), (-2, 3)),
        (RowMap(extent=2, pad=1, base=2), (0, 4), (0, 2)),  # input gradient of a strided one
        (RowMap(pad=-2), (0, 3), (2, 5)),  # rows[2:]
    ],
)
def test_known_operations(row_map, rows, expected):
    assert (row_map.first(rows[0]), row_map.end(rows[1])) == expected


@given(any_maps, rows)
def test_what_is_shifted_is_so_at_every_row(row_map, row):
    if row_map.shift is not None:
        assert row_map.end(row) == row + row_map.shift
        assert row_map.frontier(row) == row - row_map.shift


@given(row_maps, st.integers(-5, 5), st.integers(1, 6))
def test_windows_of_stride_one_are_shifted(row_map, low, extent):
    assert (row_map.shift is None) == (row_map.stride > 1 or row_map.base > 1)
    assert BandMap(1, 1, low, extent).shift == low + extent - 1
    assert BandMap(2, 1, low, extent).shift is None
