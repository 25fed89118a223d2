"""How many rows of a loop's maps make a block, and how many rows of each that is in a step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from lrjax.rowgraph.graph import RowGraph, RowNode, root_of


@dataclasses.dataclass(frozen=True)
class Order:
    """How the rows of a loop are divided into steps.

    Attributes:
      divides_output: blocks are blocks of the main output's rows, not of the tallest map's.
      recomputes_halos: a step computes all the rows it reads; none is kept from the step before.
    """

    divides_output: bool
    recomputes_halos: bool = False


# A map of fewer rows than this share of the tallest beside it, counted at one rate, is a piece of a
# map: what a slice took of it, such as the edges that wrap padding copies.
PIECE = Fraction(1, 2)
# Windows without padding shrink a map too. Only if all that leaves a loop has fewer rows than this
# share of the maps within, those maps are divided instead.
SHRUNK = Fraction(1, 4)


def reference_height(graph: RowGraph, stage: int, order: Order) -> int:
    """Rows that ``num_blocks`` divides: the tallest map's, or the main output's.

    The main output is the lowest of the maps and reductions that leave the loop, pieces left
    out. What has fewer rows than blocks takes fewer steps.
    """
    return max((height for height, _ in references_of(graph, stage, order).values()), default=1)


def is_sink(graph: RowGraph, node: RowNode, stage: int) -> bool:
    """Its rows leave the loop."""
    made_whole = graph.stages.made_whole[stage]
    return node.is_reduction or not made_whole.isdisjoint(node.equation.outputs)


def references_of(graph: RowGraph, stage: int, order: Order) -> dict[int, tuple[int, Fraction]]:
    """Per component's root: height and rate of the value whose rows are divided into blocks."""
    nodes = graph.stage_nodes(stage)
    maps = _by_root(graph, nodes)
    if order.divides_output:
        leaving = _by_root(graph, [node for node in nodes if is_sink(graph, node, stage)])
        return {root: _main_output(found, maps[root]) for root, found in leaving.items()}
    for node in nodes:
        for v in node.row_inputs():
            if v not in graph.streamed and v in graph.rate and graph.rate[v][0] in maps:
                root, rate = graph.rate[v]
                maps[root].append((graph.height(v), rate))
    return {root: max(found) for root, found in maps.items()}


def _by_root(graph: RowGraph, nodes: Sequence[RowNode]) -> dict[int, list[tuple[int, Fraction]]]:
    """Height and rate of what the nodes make, or reduce, by the root of their component."""
    found: dict[int, list[tuple[int, Fraction]]] = {}
    for node in nodes:
        root, rate = root_of(graph, node)
        found.setdefault(root, []).append((node.op.height, rate))
    return found


def _main_output(
    leaving: list[tuple[int, Fraction]], maps: list[tuple[int, Fraction]]
) -> tuple[int, Fraction]:
    def tallest(found: list[tuple[int, Fraction]]) -> Fraction:
        return max(height / rate for height, rate in found)

    among = leaving if tallest(leaving) >= SHRUNK * tallest(maps) else maps
    return min(found for found in among if found[0] / found[1] >= PIECE * tallest(among))


def speeds_of(
    graph: RowGraph,
    nodes: Sequence[RowNode],
    references: Mapping[int, tuple[int, Fraction]],
    blocks: Fraction,
) -> list[Fraction]:
    """Rows that every node gives per step, of as many as make so many blocks (or a few more)."""
    per_root = {}
    for root, (height, rate) in references.items():
        tall = Fraction(max(height, 1))
        per_root[root] = math.ceil(tall / min(blocks, tall)) / rate
    at = [root_of(graph, node) for node in nodes]
    speeds = {(root, rate): per_root[root] * rate for root, rate in set(at)}
    return [speeds[own] for own in at]
