"""Prologue and epilogue: the first and last steps as programs of their own.

All steps have one shape, so the first and the last compute rows outside the image: operations lag
behind each other, by a round trip in a gradient. Where that is much, those steps are compiled by
themselves, for the rows of the image alone, as compilers peel loops (software pipelining). The
steps between them then read and write no row outside the image, and mask nothing. Where devices
share the rows, the same is done for the rows that a share depends on. Numbers only.
"""

from __future__ import annotations

from collections.abc import Callable

# Steps at either end that may be programs of their own: every one is compiled.
MOST = 2
# The share of a step's operations outside the image above which it is one.
LEAST_OUTSIDE = 0.1
# What such programs must save of all operations, each of them on average, and what all must save in
# operations (0.2 ms on an H200): compiling each takes seconds, and the peak of a loop of small maps
# may rise (U-Net at 512x512 in 16 blocks: 9%).
LEAST_SAVED = 0.025
LEAST_OPERATIONS = 1e11
# What the second at an end must save by itself where devices share the rows: all steps mask there,
# whatever is done at the ends, and where much of a step is inside the peak may be its own (U-Net at
# 32768x4096 in 16 blocks on each of eight devices, three quarters inside: 16% more).
LEAST_OF_SECOND = 0.015


def repeated_steps(
    steps: int, work: float, inside: Callable[[int], float], *, is_shared: bool = False
) -> tuple[int, int]:
    """The first of the steps that one program repeats, and one past the last.

    Args:
      steps: how many there are.
      work: operations of a step.
      inside: of a step, operations on rows of the image.
      is_shared: devices share the rows.
    """

    def outside(step: int) -> float:
        return 1 - inside(step) / max(work, 1.0)

    def is_apart(step: int, place: int) -> bool:
        of_second = LEAST_OF_SECOND * steps if is_shared and place else 0
        return outside(step) > max(LEAST_OUTSIDE, of_second)

    for most in range(MOST, 0, -1):
        first, stop = 0, steps
        while first < min(most, steps) and is_apart(first, first):
            first += 1
        while stop > max(first, steps - most) and is_apart(stop - 1, steps - stop):
            stop -= 1
        saved = work * sum(map(outside, (*range(first), *range(stop, steps))))
        count = first + steps - stop
        if saved >= max(LEAST_SAVED * count * work * steps, LEAST_OPERATIONS):
            return first, stop
    return 0, steps
