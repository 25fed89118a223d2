"""The collector pauses and comes back; calls cost the same at every depth of the stack."""

import gc
import resource

import pytest

from lrjax.program.interpreter import collected_seldom, collection_paused, with_room_for_calls


@pytest.fixture
def collecting():
    yield
    gc.enable()


@pytest.mark.parametrize("is_on", [True, False])
def test_the_collector_is_afterwards_as_it_was(collecting, is_on):
    (gc.enable if is_on else gc.disable)()
    with collection_paused():
        assert not gc.isenabled()
        with collection_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled() is is_on


def test_the_collector_comes_back_after_an_error(collecting):
    with pytest.raises(ZeroDivisionError), collection_paused():
        _ = 1 / 0
    assert gc.isenabled()


@pytest.mark.parametrize("before", [(700, 10, 10), (0, 10, 10), (1_000_000, 20, 20)])
def test_the_collector_runs_seldom_and_afterwards_as_often_as_before(before):
    usual, within = gc.get_threshold(), []

    @collected_seldom()
    def failing():
        within.append(gc.get_threshold())
        raise ZeroDivisionError

    try:
        gc.set_threshold(*before)
        with pytest.raises(ZeroDivisionError):
            failing()
        assert gc.get_threshold() == before
    finally:
        gc.set_threshold(*usual)
    # One that is off, or runs less often still, stays so.
    assert within == [before if before[0] == 0 else tuple(map(max, before, (100_000, 50, 100)))]


def test_a_function_with_room_is_the_function():
    @with_room_for_calls
    def divided(x, *, by):
        """A quotient."""
        return x / by

    assert divided(6, by=3) == 2
    assert (divided.__name__, divided.__doc__) == ("divided", "A quotient.")
    with pytest.raises(ZeroDivisionError):
        divided(6, by=0)


def leaf(a, b, c, d, e, f, g, h):
    return a, b, c, d, e, f, g, h, (a, b, c, d, e, f, g, h)


def most_faults(depth, calls=300):
    """The most page faults of a loop of calls at any depth of the stack."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        leaf(1, 2, 3, 4, 5, 6, 7, 8)
    found = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return max(found, most_faults(depth - 1)) if depth else found


def test_calls_with_room_take_no_memory_from_the_system():
    # Without room, a loop at the end of a piece of stack has a page fault a call.
    assert with_room_for_calls(most_faults)(200) < 100
