"""What a segment runs as: row programs, and what each kind of execution means for its two passes.

A strategy says which (``Strategy.execution``); ``lrjax.explain`` and the planner's cost model
need no more than that, so they know kinds of execution and no strategies.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lrjax.loop import engine
from lrjax.loop.dependent_fill import dependency_on
from lrjax.loop.heights import Order
from lrjax.loop.rowloop import RowLoop, row_loop, with_less_waiting
from lrjax.loop.shards import shards_of
from lrjax.loop.stage_by_stage import run_graph
from lrjax.program.comparisons import simpler_comparisons
from lrjax.program.inline import FlatProgram, dependents, flatten, values_of
from lrjax.program.interpreter import collection_paused
from lrjax.program.names import without_names
from lrjax.rowgraph.graph import RowGraph, build, size_bytes
from lrjax.rowgraph.row_mesh import RowMesh
from lrjax.rules.base import Array
from lrjax.strategies.rematerialisation import with_rematerialised_reads

Axes = Sequence[int | None]


@dataclasses.dataclass(frozen=True)
class RowProgram:
    """A function as a row graph with a row loop per stage, in one order."""

    graph: RowGraph
    loops: tuple[RowLoop | None, ...]

    @property
    def devices(self) -> int:
        """How many share the rows."""
        shards = (loop.shards for loop in self.loops if loop is not None)
        return max((one.count for one in shards if one is not None), default=1)

    def run(
        self,
        inputs: Sequence[Array],
        hosted: Mapping[int, int] | None = None,
        after: Sequence[Any] = (),
    ) -> list[Array]:
        """Outputs; those of the numbers ``hosted`` are put in the host's memory, by row axis.

        Nothing that loops start with exists before the arrays ``after``.
        """
        run = functools.partial(engine.run_loop, after=dependency_on(after))
        return run_graph(self.graph, self.loops, inputs, run, hosted)


@collection_paused()
def row_program(
    graph: RowGraph,
    order: Order,
    num_blocks: int,
    *,
    is_differentiated: bool = False,
    row_mesh: RowMesh | None = None,
) -> RowProgram:
    """A row loop per stage.

    Args:
      graph: what it computes.
      order: of the rows.
      num_blocks: steps.
      is_differentiated: steps are differentiated one by one.
      row_mesh: the devices that the rows are divided among, each of which takes so many steps.
    """
    shards = None if row_mesh is None else shards_of(graph, row_mesh)
    made: dict[tuple[int, int], RowLoop] = {}

    def loop_of(graph: RowGraph, stage: int) -> RowLoop:
        key = id(graph), stage  # a loop keeps its graph, so that no other has this identity
        if key not in made:
            made[key] = row_loop(
                graph,
                stage,
                order=order,
                num_blocks=num_blocks,
                is_differentiated=is_differentiated,
                shards=shards,
            )
        return made[key]

    # What a step that is differentiated reads again, it recomputes anyway.
    if not is_differentiated and num_blocks > 1:
        for stage in graph.loops:
            graph = with_rematerialised_reads(graph, stage, loop_of)
    loops = [
        loop_of(graph, stage) if members else None
        for stage, members in enumerate(graph.stages.members)
    ]
    if not order.recomputes_halos and num_blocks > 1:
        loops = [loop and with_less_waiting(loop) for loop in loops]
    return RowProgram(graph, tuple(loops))


def traced_graph(
    function: Callable[..., Any], structs: Sequence[Any], axes: Axes, budget: float = math.inf
) -> RowGraph:
    """Trace any function of arrays at full shape, as a row graph."""
    program = without_names(flatten(jax.make_jaxpr(function)(*structs)))
    program = simpler_comparisons(program)
    return build(program, axes, budget=budget)


# --- Kinds of execution --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RowPass:
    """One pass over a segment's rows, as ``lrjax.explain`` tells of it.

    Attributes:
      name: such as "forward".
      rows: what runs.
      saved_bytes: what it keeps for the backward pass besides the segment's inputs and outputs.
      first: first outputs of the operations that no pass did before; it does all others again.
      is_reversed: the loops of the pass before, step by step in reverse. What runs column-wise
        between them is left to JAX, which does not do it again.
    """

    name: str
    rows: RowProgram
    saved_bytes: int
    first: frozenset[int]
    is_reversed: bool = False


@dataclasses.dataclass(frozen=True)
class WholeMaps:
    """Operations on whole maps, one after the other, differentiated by JAX.

    Attributes:
      is_recomputed: only the segment's inputs are kept, and the backward pass begins with the
        forward pass; else every map is kept that a gradient reads.
      kept: of a program, or of its gradient's forward part, the values that are kept as well.
    """

    is_recomputed: bool
    kept: Callable[[FlatProgram], frozenset[int]] | None = None

    @property
    def passes(self) -> tuple[RowPass, ...]:
        return ()


@dataclasses.dataclass(frozen=True)
class RowPrograms:
    """The gradient as row programs of its own: differentiated first, then divided into blocks.

    Attributes:
      forward: gives the segment's outputs, then residuals; or gradients, where both are one pass.
      backward: takes residuals and cotangents; None where both are one pass.
      outputs: of the segment, their number.
      undivided: the graphs of both before operations were copied to run again in a later step.
    """

    forward: RowProgram
    backward: RowProgram | None
    outputs: int
    undivided: tuple[RowGraph, RowGraph | None]

    @property
    def passes(self) -> tuple[RowPass, ...]:
        first, second = self.undivided
        if self.backward is None or second is None:
            return (RowPass("forward and backward", self.forward, 0, _all_heads(first)),)
        program = self.forward.graph.program
        residuals, inputs = program.outputs[self.outputs :], set(program.inputs)
        saved = sum(size_bytes(program.avals[v]) for v in values_of(residuals) if v not in inputs)
        cotangents = second.program.inputs[len(residuals) :]
        return (
            RowPass("forward", self.forward, saved, _all_heads(first)),
            RowPass("backward", self.backward, 0, _heads_behind(second, cotangents)),
        )


@dataclasses.dataclass(frozen=True)
class DifferentiatedRows:
    """The forward pass as row loops, whose steps are differentiated one by one, in reverse."""

    rows: RowProgram

    @functools.cached_property
    def forward(self) -> RowProgram:
        """What runs first: where steps compute their halos, no halo is computed twice in it."""
        loops = (loop and (loop.forward or loop) for loop in self.rows.loops)
        return RowProgram(self.rows.graph, tuple(loops))

    @property
    def passes(self) -> tuple[RowPass, ...]:
        loops = [loop for loop in self.rows.loops if loop is not None]
        saved = sum(loop.steps * loop.line_bytes for loop in loops)
        name = "backward (every step again, in reverse)"
        return (
            RowPass("forward", self.forward, saved, _all_heads(self.rows.graph)),
            RowPass(name, self.rows, 0, frozenset(), is_reversed=True),
        )


Execution = WholeMaps | RowPrograms | DifferentiatedRows


def _all_heads(graph: RowGraph) -> frozenset[int]:
    return frozenset(n.equation.outputs[0] for n in graph.nodes if n.equation.outputs)


def _heads_behind(graph: RowGraph, cotangents: Sequence[int]) -> frozenset[int]:
    """First outputs of the operations that cotangents reach: no pass did them before."""
    if not cotangents:
        return _all_heads(graph)
    return frozenset(dependents((node.equation for node in graph.nodes), cotangents))


# --- From a forward rule to its backward rule ----------------------------------------------------


@jax.tree_util.register_pytree_node_class
class Residuals:
    """Arrays from a forward rule to its backward rule, with static company."""

    def __init__(self, arrays: Any, static: Any):
        self.arrays, self.static = arrays, static

    def tree_flatten(self) -> tuple[tuple[Any], _ByIdentity]:
        return (self.arrays,), _ByIdentity(self.static)

    @classmethod
    def tree_unflatten(cls, static: _ByIdentity, children: tuple[Any]) -> Residuals:
        return cls(children[0], static.value)


class _ByIdentity:
    """Static data of a pytree, compared by identity."""

    def __init__(self, value: Any):
        self.value = value
