"""The adjoint of a sequence of operations, as far as bytes go: who reads what, and how large.

2PS and OverL differentiate one step of a row loop by ``jax.vjp``. Tracing that takes longer than a
plan search may; what its operations read and give follows from the operations themselves.
"""

from __future__ import annotations

from collections.abc import Collection, MutableMapping, Sequence
from typing import Any

from jax.extend.core import primitives as public

from lrjax.planner.compilers import EXTEND, WINDOW
from lrjax.planner.liveness import GradientOf, Kind, Operation
from lrjax.rules.base import traits_of

# What JAX adds cotangents by.
_SUM = public.add_jaxvals_p


class Adjoint:
    """Builds the operations of the reverse pass, with a cotangent for every moving value."""

    def __init__(self, size: MutableMapping[int, float], moving: Collection[int], fresh: int):
        self.size, self.moving = size, set(moving)
        self.next = fresh
        self.cotangent: dict[int, int] = {}
        self.pieces: dict[int, list[int]] = {}
        self.like: dict[int, Any] = {}
        self.operations: list[Operation] = []

    def fresh(self, size: float) -> int:
        self.size[self.next] = size
        self.next += 1
        return self.next - 1

    def seed(self, value: int, size: float | None = None) -> int:
        """A cotangent that is given; of the value's size unless told."""
        made = self.fresh(self.size.get(value, 0.0) if size is None else size)
        self.pieces.setdefault(value, []).append(made)
        return made

    def of(self, value: int) -> int | None:
        """The cotangent of a value, all its readers' shares added."""
        pieces = self.pieces.get(value, [])
        if len(pieces) > 1:
            total = self.fresh(self.size.get(value, 0.0))
            self.operations.append(
                Operation(_SUM, tuple(pieces), (total,), Kind.FUSED, is_backward=True)
            )
            self.pieces[value] = [total]
        return self.pieces[value][0] if pieces else None

    def reverse(self, operations: Sequence[Operation]) -> None:
        """Walk the operations backwards."""
        for operation in operations:
            self.like.update(dict.fromkeys(operation.outputs, operation.like))
            if self.moving.intersection(operation.inputs):
                self.moving.update(operation.outputs)
        for operation in reversed(operations):
            bars = [self.of(v) for v in operation.outputs if v in self.moving]
            given = tuple(bar for bar in bars if bar is not None)
            if given:
                self._share(operation, given)

    def _share(self, operation: Operation, given: tuple[int, ...]) -> None:
        """The shares of an operation's inputs in the cotangents of its outputs."""
        needed = operation.inputs if _reads_operands(operation) else ()
        separate = operation.kind is Kind.LIBRARY and len(operation.inputs) == 2
        for v in dict.fromkeys(operation.inputs):
            if v not in self.moving:
                continue
            share = self.fresh(self.size.get(v, 0.0))
            # Of a product, the share of one factor is made from the other.
            read = tuple(w for w in needed if w != v) if separate else needed
            kind = self._kind(operation, v)
            what, like = GradientOf(operation.what), self.like.get(v)
            flops = operation.flops
            self.operations.append(
                Operation(what, (*given, *read), (share,), kind, like, True, flops=flops)
            )
            self.pieces.setdefault(v, []).append(share)

    def _kind(self, operation: Operation, value: int) -> Kind:
        if operation.kind is Kind.LIBRARY:
            return Kind.LIBRARY
        largest = max((self.size.get(v, 0.0) for v in operation.outputs), default=0.0)
        is_sum = operation.kind is Kind.FUSED and self.size.get(value, 0.0) < largest / 8
        return Kind.ROOT if is_sum else Kind.FUSED


def _reads_operands(operation: Operation) -> bool:
    """The cotangents of its inputs depend on the inputs."""
    is_move = operation.what in (WINDOW, EXTEND)
    return not is_move and traits_of(operation.what).reverse_reads_operands
