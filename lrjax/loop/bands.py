"""Bands: neighbouring operations that have rows of the image in the same steps, behind a branch
where that pays. Integers only."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

# Bands are worth a branch where running everything in every step would waste more than this.
SKIP_ABOVE = 0.1
# What a branch costs, as a fraction of all work: on a GPU the host waits for its predicate in every
# step, and nothing is fused across it (ConvNeXt-T at 4096x4096 in 8 blocks had 71 a step).
BRANCH = 0.003


@dataclasses.dataclass(frozen=True)
class Band:
    """Neighbouring operations that have rows of the image in the same steps.

    Attributes:
      nodes: their indices.
      first, last: the steps in which they run, of those that one program repeats; the first and
        the last of all where it is in every such step.
      exports: values that operations outside the band read.
    """

    nodes: tuple[int, ...]
    first: int
    last: int
    exports: frozenset[int]


def joined_spans(
    spans: Sequence[tuple[int, int]], work: Sequence[float], steps: int
) -> list[tuple[int, int, int, int]]:
    """Neighbouring operations that run in the same steps, behind a branch where it pays.

    The cheapest division of the operations into bands, by dynamic programming: a band runs from the
    first to the last step of any of its operations.

    Args:
      spans: first and last step of every operation.
      work: of every operation, in a step.
      steps: how many there are.

    Returns:
      Of every band its first operation, one past its last, and its first and last step.
    """
    everything = steps * sum(work)
    busy = sum(w * (last - first + 1) for w, (first, last) in zip(work, spans, strict=True))
    whole = (0, steps - 1)
    if everything - busy <= SKIP_ABOVE * everything:
        return [(0, len(spans), *whole)]
    starts = [0, *(i for i in range(1, len(spans)) if spans[i] != spans[i - 1]), len(spans)]
    groups = [(i, j, spans[i], sum(work[i:j])) for i, j in itertools.pairwise(starts)]
    best: list[tuple[float, list[tuple[int, int, int, int]]]] = [(0.0, [])]
    for k in range(len(groups)):
        found = math.inf, groups[k][0], whole, 0
        first, last, own = *groups[k][2], 0.0
        for at in range(k, -1, -1):
            start, _, (low, high), more = groups[at]
            first, last, own = min(first, low), max(last, high), own + more
            cost = best[at][0] + own * (last - first + 1)
            cost += 0.0 if (first, last) == whole else BRANCH * everything
            if cost < found[0]:
                found = cost, start, (first, last), at
        cost, start, span, at = found
        best.append((cost, [*best[at][1], (start, groups[k][1], *span)]))
    return best[-1][1]
