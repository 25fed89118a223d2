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
# What each such program must save of all operations, and what all must save in operations (0.2 ms
# on an H200): compiling each takes seconds, and the peak of a loop of small maps may rise (U-Net
# at 512x512 in 16 blocks: 9%), as it does where much of a step is inside (U-Net's second step at
# 32768x4096 in 16 blocks on each of eight devices, three quarters inside: 16%).
LEAST_SAVED = 0.015
LEAST_OPERATIONS = 1e11


def repeated_steps(steps: int, work: float, inside: Callable[[int], float]) -> tuple[int, int]:
    """The first of the steps that one program repeats, and one past the last.

    Args:
      steps: how many there are.
      work: operations of a step.
      inside: of a step, operations on rows of the image.
    """

    least = max(LEAST_OUTSIDE, LEAST_SAVED * steps)

    def outside(step: int) -> float:
        return 1 - inside(step) / max(work, 1.0)

    first, stop = 0, steps
    while first < min(MOST, steps) and outside(first) > least:
        first += 1
    while stop > max(first, steps - MOST) and outside(stop - 1) > least:
        stop -= 1
    saved = work * sum(map(outside, (*range(first), *range(stop, steps))))
    return (first, stop) if saved >= LEAST_OPERATIONS else (0, steps)
