"""Halos that a step computes again, so that windows are slabs and no copies.

A window that reaches above a step's slab is put together from rows of the step before and the
slab: a copy, which on a GPU may take as long as a convolution of few channels. If the step
computes those few rows again, the slab is the window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from lrjax.rowgraph.graph import RowGraph, RowNode
from lrjax.rules.base import traits_of
from lrjax.rules.traits import Kind

# Operations that a device does while it moves a byte of its memory: convolutions in bfloat16 on an
# H200, by the rates of ``lrjax.roofline``.
OPERATIONS_PER_BYTE = 124
# The largest halo, as a share of a step's rows.
LARGEST_HALO = 1 / 8


def kind_of(node: RowNode) -> Kind:
    """How a compiler runs a node."""
    return traits_of(node.equation.primitive).kind


class Halos:
    """What to compute again in every step of one row loop's nodes, in however many blocks."""

    def __init__(self, graph: RowGraph, nodes: Sequence[RowNode]):
        self._nodes = [
            (node.equation.outputs, node.row_inputs(), kind_of(node), _rows_per_copy(graph, node))
            for node in nodes
        ]

    def most(self, speeds: Sequence[Fraction]) -> list[int]:
        """Of every node, the most rows that are worth computing again in every step.

        What is fused into a library's kernel (a bias, a ReLU) has no more than the library's.

        Args:
          speeds: rows that each gives in a step.
        """
        found: list[int] = []
        fused: dict[int, int] = {}  # of what a library gave, and of what was fused into its kernel
        for (outputs, inputs, kind, per_row), speed in zip(self._nodes, speeds, strict=True):
            rows, read = float(speed), [v for v in inputs if v in fused]
            most = int(min(math.sqrt(per_row * rows), rows * LARGEST_HALO))
            if kind is Kind.FUSED:
                most = min([most, *(fused[v] for v in read)])
            if kind is Kind.LIBRARY or (kind is Kind.FUSED and read):
                fused.update(dict.fromkeys(outputs, most))
            found.append(most)
        return found


def _rows_per_copy(graph: RowGraph, node: RowNode) -> float:
    """Rows that are computed in the time in which one row is copied; 0 for what is done once.

    Along a chain of convolutions halos grow: the last computes ``h`` rows again, the one before it
    ``2 h`` and so on, until one is put together by a copy. With ``C`` the time of a copy and ``F``
    that of a row, chains of ``sqrt(C / F)`` convolutions take the least time in sum, of which half
    are allowed: time is the same within 1%, and slabs are lower (VGG-16 at 2048x2048 in 8 blocks:
    772 MiB instead of 795).
    """
    if node.is_reduction or node.equation.has_effects:
        return 0.0
    made = sum(graph.row_bytes(v) for v in node.equation.outputs if v in graph.row_axis)
    return 2 * made * OPERATIONS_PER_BYTE / max(node.op.flops, 1.0)
