"""The search for the largest size that fits compiles few sizes."""

import pytest

from experiments.paper.search import largest


@pytest.mark.parametrize(
    ("peak", "degree", "samples", "step"),
    [
        (lambda n: 100 + 7 * n, 1, (2, 8), 1),
        (lambda n: 1000 + 3 * n * n, 2, (64, 128, 192), 32),
        # What XLA decides for a size may add to any curve.
        (lambda n: 100 + 7 * n + (n % 5) * 3, 1, (2, 8), 1),
        (lambda n: 10 + n**3, 3, (4, 8, 12, 16), 4),
    ],
)
@pytest.mark.parametrize("budget", [5_000, 100_000])
def test_finds_the_largest_in_few_compilations(peak, degree, samples, step, budget):
    asked = []

    def counted(size):
        asked.append(size)
        return peak(size)

    found = largest(counted, budget, step=step, known={n: peak(n) for n in samples}, degree=degree)
    assert found.size % step == 0
    assert found.peak_bytes == peak(found.size) <= budget
    is_last = peak(found.size + step) > budget
    assert is_last or found.peak_bytes >= 0.99 * budget
    assert len(asked) == len(set(asked)) <= 6


def test_the_first_size_that_reaches_the_budget_is_guessed():
    """Peaks of a small 3-D U-Net by rows: the cubic through them falls again beyond."""
    peaks = {32: 37, 48: 65, 64: 105, 80: 158}
    asked = []

    def peak(side):
        asked.append(side)
        return 158 + 4 * (side - 80)

    found = largest(peak, 256, step=16, known=peaks, degree=3)
    assert found.size == 96
    assert max(asked) <= 112


def test_a_guess_is_no_farther_than_eight_times_what_is_known():
    """All but flat peaks tell little of where the budget is reached."""
    asked = []

    def peak(batch):
        asked.append(batch)
        return 1000 + batch

    known = {1: 1001, 2: 1002}
    assert largest(peak, 10**6, step=1, known=known, degree=1, most_guesses=2).size == 128
    assert asked == [16, 128]


def test_nothing_fits():
    found = largest(lambda n: 100 * n, 50, step=1, known={1: 100, 2: 200}, degree=1)
    assert (found.size, found.peak_bytes) == (0, 0)


def test_no_budget_is_refused():
    with pytest.raises(ValueError, match="budget=0: give a positive number of bytes"):
        largest(lambda n: n, 0, step=1, known={1: 1, 2: 2}, degree=1)


def test_a_curve_needs_points():
    with pytest.raises(ValueError, match="known: 1 peaks; give 2 for degree=1"):
        largest(lambda n: n, 5, step=1, known={1: 1}, degree=1)
