"""The inverse question: the largest image, or batch, whose gradient fits in a device.

Peaks grow like a polynomial of second degree in an image's side, where rows a step stay the
same, so three predictions give a curve, and the curve the size; a compilation there corrects it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from lrjax.planner.candidates import Kind, every_kind
from lrjax.planner.model import Model
from lrjax.planner.problem import Problem
from lrjax.planner.progress import OnProgress
from lrjax.planner.proof import MIB, Prover
from lrjax.planner.search import Limits, Steps
from lrjax.program.interpreter import collected_seldom
from lrjax.strategies import Checkpoint, Column

MOST_COMPILATIONS = 5
# Sizes at which the curve is known, as multiples of the one that plans were compared at.
_SAMPLES = (0.5, 1, 2)
_MOST_STEPS = 4096
# A plan that takes so many times what was predicted is none to grow; of those that offload, a whole
# map that a transfer needs on the device may be missing from the prediction.
_MOST_WRONG = 2.0
# A plan of another strategy is compiled where it is predicted to take no more of the memory.
_NEAR = 1.3
METHODS: dict[str, Callable[[], tuple[Kind, ...]]] = {
    "column": lambda: (Kind(Column()),),
    "best checkpoint": lambda: (Kind(Column()), Kind(Checkpoint())),
    "lrjax": every_kind,
}


@dataclasses.dataclass(frozen=True)
class Largest:
    """The largest size that fits by one method.

    Attributes:
      method: one of ``METHODS``.
      size: side of the image, or images of the batch; 0 if not even the smallest fits.
      peak_bytes: XLA's peak there.
      operations: as a multiple of column's.
      compilations: programs compiled to find it.
      strategies: of the segments.
    """

    method: str
    size: int
    peak_bytes: int
    operations: float
    compilations: int
    strategies: str

    @property
    def peak_mib(self) -> str:
        return f"{self.peak_bytes / MIB:,.0f}"


@dataclasses.dataclass(frozen=True)
class Question:
    """What is to grow.

    Attributes:
      problem: the problem of a size.
      step: sizes are multiples of it.
      start: the size at which plans are first compared.
      memory_bytes: what the peak must fit in.
      grows_rows: the size is the image's, so that blocks are added to keep rows per step.
    """

    problem: Callable[[int], Problem]
    step: int
    start: int
    memory_bytes: int
    grows_rows: bool


@collected_seldom()
def largest(question: Question, method: str, on_progress: OnProgress) -> Largest:
    """The largest size that fits by a method, confirmed by XLA."""
    return _Largest(question, method, on_progress).find()


@collected_seldom()
def largest_by_methods(question: Question, on_progress: OnProgress) -> list[Largest]:
    """The largest size by every method.

    Each may do what those before it do, so its answer is no smaller than theirs.
    """
    found: list[Largest] = []
    for method in METHODS:
        own = largest(question, method, on_progress)
        best = max([own, *found], key=lambda one: one.size)
        found.append(dataclasses.replace(best, method=method, compilations=own.compilations))
    return found


class _Largest:
    def __init__(self, question: Question, method: str, on_progress: OnProgress):
        self.question, self.method, self.on_progress = question, method, on_progress
        self.provers: dict[int, Prover] = {}
        self.limits = Limits(math.inf, kinds=METHODS[method]())
        self.least: dict[int, Steps] = {}
        self.fitting: dict[int, tuple[Prover, Steps]] = {}
        self.too_large = (_MOST_STEPS + 1) * question.step

    def prover(self, size: int) -> Prover:
        if size not in self.provers:
            self.provers[size] = Prover(self.question.problem(size))
        return self.provers[size]

    def find(self) -> Largest:
        step = self.question.step
        size = self.predicted_size(self.question.start, 1.0)
        # What is best depends on the size: once more, at the size found.
        reference = max(size, step)
        self.grow(reference, max(self.predicted_size(reference, 1.0), step))
        if self.fitting:
            self.grow_by_other_strategies()
        return self.answer()

    def grow_by_other_strategies(self) -> None:
        """By each strategy that the best plan is without, as far as it goes, if it fits at a larger
        size with all maps on the device: a prediction chose among them."""
        kinds = tuple(kind for kind in self.limits.kinds if not kind.offload)
        own = {step.kind.strategy.name for step in self.fitting[max(self.fitting)][1]}
        for name in dict.fromkeys(kind.strategy.name for kind in kinds if kind.strategy.by_rows):
            if name in own:
                continue
            kept = [k for k in kinds if not k.strategy.by_rows or k.strategy.name == name]
            self.limits = dataclasses.replace(self.limits, kinds=tuple(kept))
            self.least.clear()
            self.too_large = (_MOST_STEPS + 1) * self.question.step
            reference = max(self.fitting)
            size = reference + self.question.step
            if self.predicted(reference, size) <= _NEAR * self.question.memory_bytes:
                self.grow(reference, size)

    def grow(self, reference: int, size: int) -> None:
        """Compile at a size, and at those that what is found suggests."""
        step, first = self.question.step, max(self.fitting, default=0)
        for _ in range(MOST_COMPILATIONS):
            peak = self.tried(reference, size)
            error = peak / self.predicted(reference, size)
            if error > _MOST_WRONG and any(kind.offload for kind in self.limits.kinds):
                self.stop_offloading()
                size = max(self.predicted_size(reference, 1.0), step)
                continue
            if peak > self.question.memory_bytes:
                self.too_large = min(self.too_large, size)
                if size == first + step:
                    break
            low = max(self.fitting, default=0)
            size = self.predicted_size(reference, error)
            size = min(max(size, low + step), self.too_large - step)
            if size <= low:
                break

    def stop_offloading(self) -> None:
        """Look for plans that keep all maps on the device."""
        kept = tuple(kind for kind in self.limits.kinds if not kind.offload)
        self.limits = dataclasses.replace(self.limits, kinds=kept)
        self.least.clear()

    def answer(self) -> Largest:
        compilations = sum(prover.compilations for prover in self.provers.values())
        if not self.fitting:
            return Largest(self.method, 0, 0, 0.0, compilations, "")
        size = max(self.fitting)
        prover, found = self.fitting[size]
        return Largest(
            self.method,
            size,
            prover.proofs[found].peak,
            prover.operations(found),
            compilations,
            " + ".join(str(step.kind) for step in found),
        )

    def tried(self, reference: int, size: int) -> int:
        prover = self.prover(size)
        found = self.scaled(reference, size)
        peak = prover.verify(found, self.on_progress).peak
        if peak <= self.question.memory_bytes:
            self.fitting[size] = prover, found
        return peak

    def predicted(self, reference: int, size: int) -> float:
        return self.prover(size).model.peak_bytes(self.scaled(reference, size))

    def scaled(self, reference: int, size: int) -> Steps:
        """The plan of least memory at the reference, with as many rows a step at another size."""
        steps = []
        for step in self.reference_plan(reference):
            count = step.choice.num_blocks
            if self.question.grows_rows and count > 1:
                count = max(1, round(count * size / reference))
            parts = step.choice.micro_batches
            if not self.question.grows_rows and parts > 1:
                parts = _parts(size, reference // parts)
            choice = dataclasses.replace(step.choice, num_blocks=count, micro_batches=parts)
            steps.append(dataclasses.replace(step, choice=choice))
        return tuple(steps)

    def reference_plan(self, reference: int) -> Steps:
        prover = self.prover(reference)
        if self.method == "column":
            return prover.model.column
        if reference not in self.least:
            found = prover.smallest_predicted(self.limits) or prover.model.column
            self.least[reference] = _in_smallest_steps(prover.model, found)
        return self.least[reference]

    def predicted_size(self, reference: int, error: float) -> int:
        """The largest multiple of the step at which the curve, times ``error``, fits."""
        step, memory = self.question.step, self.question.memory_bytes
        sizes = sorted({self.on_grid(reference * k) for k in _SAMPLES})
        peaks = [error * self.predicted(reference, size) for size in sizes]
        curve = np.polynomial.Polynomial.fit(sizes, peaks, len(sizes) - 1)
        # Below its first point the curve may rise again.
        fitting = [own for own, peak in zip(sizes, peaks, strict=True) if peak <= memory]
        size = max(fitting, default=step)
        while size < _MOST_STEPS * step and curve(size + step) <= memory:
            size += step
        return size

    def on_grid(self, size: float) -> int:
        step = self.question.step
        return max(step, round(size / step) * step)


def _in_smallest_steps(model: Model, steps: Steps) -> Steps:
    """A plan whose streams are in as many blocks as can be, where that takes less memory."""
    best = steps
    for i, step in enumerate(steps):
        strategy = step.choice.strategy
        if strategy.streams and not step.inner:
            blocks = model.candidates.span(step.start, step.stop).smallest_steps(strategy)
            choice = dataclasses.replace(step.choice, num_blocks=max(blocks, 1))
            changed = (*best[:i], dataclasses.replace(step, choice=choice), *best[i + 1 :])
            best = min(best, changed, key=model.peak_bytes)
    return best


def _parts(batch: int, most: int) -> int:
    """The fewest equal parts of a batch of at most so many images each."""
    return next(n for n in range(1, batch + 1) if batch % n == 0 and batch // n <= most)
