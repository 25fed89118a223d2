"""Seconds that a sequence of operations takes on a device: a roofline of the kernels it becomes.

The terms are those of ``lrjax.roofline``, which reads compiled programs; here kernels are guessed
from what fuses. Every buffer that is made is a kernel, which reads the buffers behind it.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lrjax.planner.compilers import WINDOW
from lrjax.planner.liveness import Kind, Liveness, Operation
from lrjax.roofline import Rates

# Copies, transposes and small fusions that XLA makes for every kernel that is predicted. Fitted to
# the programs of experiments/results/plan_costs.md.
_LAUNCHES_BESIDE = 0.45
_NAMES = {2: "bf16", 4: "f32", 8: "f64"}


def kernel_seconds(rates: Rates, flops: float, moved: float, dtype: Any = None) -> float:
    """The longest of three times, and what is launched beside it."""
    rate = rates.operations_rate(_NAMES.get(np.dtype(dtype or jnp.bfloat16).itemsize, "bf16"))
    longest = max(flops / rate, moved / rates.bytes_per_s, rates.launch_s)
    return longest + _LAUNCHES_BESIDE * rates.launch_s


def seconds(lives: Liveness, rates: Rates) -> float:
    """Of all operations, one after the other."""
    return sum(s for _, s in kernels(lives, rates))


@dataclasses.dataclass
class _Kernel:
    """Operations that become one kernel.

    Attributes:
      first: of the operations.
      read: buffers, and the bytes of each that are read.
      written: bytes.
      at_hand: buffers of which an element is there when another operation of the kernel asks.
      complete_last: of these, results of reductions and windows.
      number: its bit among the kernels that buffers wait for.
    """

    first: Operation
    read: dict[int, float]
    written: float
    at_hand: set[int]
    number: int
    complete_last: set[int] = dataclasses.field(default_factory=set)


def kernels(lives: Liveness, rates: Rates) -> Iterator[tuple[Operation, float]]:
    """The first operations of all kernels, and how long each takes."""
    found: list[_Kernel] = []
    users: dict[tuple[int, bool], list[_Kernel]] = {}
    # Per buffer, the bits of the kernels that must have run before it is there.
    awaited: dict[int, int] = {}
    for operation, read, made in _buffers(lives):
        if operation.seconds:
            yield operation, operation.seconds
            continue
        written = sum(made.values())
        before = functools.reduce(operator.or_, (awaited.get(v, 0) for v in read), 0)
        awaited.update(dict.fromkeys(made, before))
        if operation.kind is Kind.LIBRARY:
            moved = sum(read.values()) + written
            dtype = getattr(operation.like, "dtype", None)
            yield operation, kernel_seconds(rates, operation.flops, moved, dtype)
            continue
        most = max((*read.values(), 0.0))
        large = [v for v, count in read.items() if count >= most / 2]
        backward = operation.is_backward
        shared = users.get((large[0], backward), ()) if large else ()
        kernel = next((k for k in shared if _may_join(k, large, read, awaited)), None)
        if kernel is None and operation.kind is Kind.ROOT:
            others = (k for v in large for k in users.get((v, backward), ()))
            kernel = next((k for k in others if _are_siblings(k, large, read, awaited)), None)
        if kernel is None:
            kernel = _Kernel(operation, dict(read), written, set(), 1 << len(found))
            found.append(kernel)
        else:
            kernel.read.update((v, n) for v, n in read.items() if v not in kernel.at_hand)
            kernel.written += written
        awaited.update(dict.fromkeys(made, before | kernel.number))
        if operation.kind is Kind.ROOT:
            kernel.complete_last.update(made)
        for v in {*large, *made} - kernel.at_hand:
            kernel.at_hand.add(v)
            users.setdefault((v, backward), []).append(kernel)
    for kernel in found:
        moved = sum(kernel.read.values()) + kernel.written
        if moved:
            yield kernel.first, kernel_seconds(rates, 0.0, moved)


def _may_join(
    kernel: _Kernel, large: Sequence[int], read: Collection[int], awaited: Mapping[int, int]
) -> bool:
    """What an operation reads is at hand, or there before the kernel starts.

    A map is normalised by another kernel than the one that reads it for its statistics.
    """
    if not kernel.at_hand.issuperset(large):
        return False
    others = set(read).difference(large, kernel.at_hand - kernel.complete_last)
    return not any(awaited.get(v, 0) & kernel.number for v in others)


def _are_siblings(
    kernel: _Kernel, large: Sequence[int], read: Collection[int], awaited: Mapping[int, int]
) -> bool:
    """Sums over rows that share something large are one kernel."""
    if kernel.first.kind is not Kind.ROOT:
        return False
    shared = kernel.at_hand.intersection(large)
    return 2 * len(shared) >= len(large) and _may_join(kernel, [*shared], read, awaited)


def _buffers(lives: Liveness) -> Iterator[tuple[Operation, dict[int, float], dict[int, float]]]:
    """Operations that make buffers, and bytes of the buffers that each reads and makes."""

    def size(v: int) -> float:
        return lives.moved.get(v, lives.size.get(v, 0.0))

    behind: dict[int, dict[int, float]] = {}
    for operation in lives.operations:
        read: dict[int, float] = {}
        for v in operation.inputs:
            found = {v: size(v)} if v in lives.existing else behind.get(v, {v: size(v)})
            for source, count in found.items():
                read[source] = max(read.get(source, 0.0), count)
        if operation.what == WINDOW:
            (made,) = operation.outputs
            read = {v: min(count, size(made)) for v, count in read.items()}
        behind.update((v, read) for v in operation.outputs)
        existing = {v: size(v) for v in operation.outputs if v in lives.existing}
        if existing or operation.seconds:
            yield operation, read, existing
