"""What is true of every equation of a primitive, whatever its parameters: stated by its rule.

Whoever treats primitives differently asks for these: linearity proofs, the row graph, the planner's
model of compilers. So a primitive is described in one place, and no other module lists primitives
by what they are like. What concerns one primitive alone, as part of a pattern (a ReLU, a scan that
is unrolled), compares with the object.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import TYPE_CHECKING

from lrjax.rules.linearity import Linearity, not_additive

if TYPE_CHECKING:
    from lrjax.rules.base import Equation


class Kind(enum.Enum):
    """How a compiler runs an operation.

    Attributes:
      FUSED: it is computed again wherever its result is read, unless a library reads that
        (elementwise operations, moves).
      ROOT: what it reads may be fused into it, but its result exists (reductions, windows).
      LIBRARY: what it reads and what it gives exist (convolutions, matrix products, loops).
    """

    FUSED = "fused"
    ROOT = "root"
    LIBRARY = "library"


def no_operations(equation: Equation) -> float:
    """Of what moves elements only."""
    return 0.0


@dataclasses.dataclass(frozen=True)
class Traits:
    """Properties of a primitive. The defaults are safe for one of which nothing is known.

    Attributes:
      kind: how compilers run it.
      is_kept: compilers keep its result for the backward pass, though it is fused, as it takes long
        to compute a second time.
      is_elementwise: an element of the result is made of the operands' elements at its place.
      is_contraction: sums of products of its operands, so that the derivative with respect to each
        of them takes as many operations again.
      preserves_finiteness: finite operands give finite results and finite derivatives. A rule may
        deny it of an equation; it cannot claim it for a primitive that has not this property.
      has_derivative: False where JAX's derivative is zero.
      linearity: which results are additive in which operands.
      reverse_reads_operands: False where the cotangents of its operands are made from the result's
        cotangent alone, so that no operand is kept for them.
      divides_unevenly: run by whole maps, XLA's partitioner may divide its rows, and those of its
        derivatives, among devices that they do not divide evenly. It aborts on some scatters of
        such, as the gradient of a sort is one (jaxlib 0.10 to 0.12).
      operations: floating-point operations of an equation on whole maps, as column runs it.
    """

    kind: Kind = Kind.ROOT
    is_kept: bool = False
    is_elementwise: bool = False
    is_contraction: bool = False
    preserves_finiteness: bool = False
    has_derivative: bool = True
    linearity: Linearity = not_additive
    reverse_reads_operands: bool = True
    divides_unevenly: bool = True
    operations: Callable[[Equation], float] = no_operations


UNKNOWN_PRIMITIVE = Traits()
