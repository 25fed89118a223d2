"""The largest size whose peak is within a budget, in few compilations.

Peaks are affine in the batch and of second degree in the image's side, up to what XLA decides
otherwise for some sizes. So sizes are guessed from a polynomial through the peaks that are known,
and each guess is compiled: what is returned did fit. The search ends when the next size is known to
be too large, or when the peak is within a hundredth of the budget.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Of the budget: what a further compilation is not worth.
_NEAR = 0.01
MOST_GUESSES = 6
# Times the largest size whose peak is known: what a guess is trusted for.
_FARTHEST = 8


@dataclass(frozen=True)
class Largest:
    """What fits.

    Attributes:
      size: the largest that was compiled and fits; 0: not even the smallest does.
      peak_bytes: its peak.
      too_large: the smallest size that was compiled and does not fit; None: none was.
    """

    size: int
    peak_bytes: int
    too_large: int | None


def largest(
    peak: Callable[[int], int],
    budget: int,
    *,
    step: int,
    known: dict[int, int],
    degree: int,
    most_guesses: int = MOST_GUESSES,
) -> Largest:
    """The largest multiple of ``step`` whose peak is at most ``budget``.

    Args:
      peak: compiles a size, and gives the bytes.
      budget: bytes.
      step: sizes are its multiples.
      known: peaks of sizes that were compiled; new ones are added. At least ``degree`` + 1 of them.
      degree: of the polynomial that guesses: 1 for batches, 2 for sides.
      most_guesses: compilations, at most.

    Raises:
      ValueError: too few sizes are known, or there is no budget.
    """
    if budget <= 0:
        raise ValueError(f"budget={budget}: give a positive number of bytes")
    if len(known) <= degree:
        raise ValueError(f"known: {len(known)} peaks; give {degree + 1} for degree={degree}")
    for _ in range(most_guesses):
        low = max((size for size, own in known.items() if own <= budget), default=0)
        high = min(
            (size for size, own in known.items() if own > budget and size > low), default=None
        )
        is_near = low > 0 and known[low] >= (1 - _NEAR) * budget
        if (high is not None and high - low <= step) or is_near:
            break
        guess = _guess(known, budget, step, degree)
        guess = max(guess, low + step)
        if high is not None:
            guess = min(guess, high - step)
        known[guess] = peak(guess)
    low = max((size for size, own in known.items() if own <= budget), default=0)
    high = min((size for size, own in known.items() if own > budget and size > low), default=None)
    return Largest(low, known.get(low, 0), high)


def _guess(known: dict[int, int], budget: int, step: int, degree: int) -> int:
    """Where the polynomial through the peaks nearest to the budget first reaches it.

    First: a polynomial of third degree may come back to the budget far away. And at most
    ``_FARTHEST`` times the largest size that is known.
    """
    nearest = sorted(known, key=lambda size: abs(np.log(known[size] / budget)))[: degree + 1]
    curve = np.polynomial.Polynomial.fit(nearest, [known[s] for s in nearest], degree)
    fitting = max((size for size, own in known.items() if own <= budget), default=0)
    roots = [r.real for r in (curve - budget).roots() if abs(r.imag) < 1e-6 * abs(r)]
    beyond = [root for root in roots if root > fitting]
    if not beyond:  # peaks that do not grow as they should: scale from the nearest
        beyond = [nearest[0] * (budget / known[nearest[0]]) ** (1 / degree)]
    guess = min(*beyond, _FARTHEST * max(known))
    return max(step, int(guess // step) * step)
