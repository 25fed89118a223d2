"""Flat program -> row graph: which values carry rows, and what is local in rows.

A value with a row axis is *streamed* where a row operation makes it, and *exists whole* where it
is an input or a column operation makes it. ``stages`` says where everything runs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np

from lrjax.program.comparisons import compared_extremes
from lrjax.program.constants import Constants
from lrjax.program.inline import Atom, FlatEquation, FlatProgram, Literal
from lrjax.program.varying import varying_axes
from lrjax.rowgraph.alignment import Alignment
from lrjax.rowgraph.stages import Operation, Problem, Stages, cut_into_stages
from lrjax.rules.base import (
    Equation,
    NotRowLocal,
    Operand,
    RowOp,
    constant_along_rows,
    row_op,
    traits_of,
)
from lrjax.rules.geometry import IDENTITY


@dataclasses.dataclass(frozen=True)
class Node:
    """An equation of the graph.

    Attributes:
      equation: the equation.
      op: its row-wise form, None for a column operation.
      reason: why it fell back to column though it has row operands.
    """

    equation: FlatEquation
    op: RowOp | None
    reason: str | None = None

    @property
    def is_reduction(self) -> bool:
        return self.op is not None and self.op.reduction is not None

    def row_inputs(self) -> list[int]:
        """Values that are read by rows."""
        assert self.op is not None
        pairs = zip(self.equation.inputs, self.op.reads, strict=True)
        return [v for v, read in pairs if read is not None and isinstance(v, int)]


@dataclasses.dataclass(frozen=True)
class RowGraph:
    """Nodes in topological order with their stages.

    Attributes:
      program: types, inputs and outputs; its equations are those of ``nodes``.
      nodes: the operations.
      row_axis: axis of every value that carries rows.
      streamed: values that row operations make (reductions excluded).
      rate: rows of a value per row of its component's root, and the root.
      stages: where the operations run, and what exists whole in between.
      compared: results of extremes that are compared with what they were taken of.
    """

    program: FlatProgram
    nodes: tuple[Node, ...]
    row_axis: dict[int, int]
    streamed: frozenset[int]
    rate: dict[int, tuple[int, Fraction]]
    stages: Stages
    compared: frozenset[int] = frozenset()

    @functools.cached_property
    def moving(self) -> frozenset[int]:
        """Values that may have tangents: floating-point ones that depend on such inputs by more
        than functions without a derivative."""
        avals = self.program.avals
        found = {v for v in self.program.inputs if jnp.issubdtype(avals[v].dtype, np.inexact)}
        for node in self.nodes:
            has_derivative = traits_of(node.equation.primitive).has_derivative
            if has_derivative and found.intersection(_values(node.equation.inputs)):
                outputs = node.equation.outputs
                found.update(v for v in outputs if jnp.issubdtype(avals[v].dtype, np.inexact))
        return frozenset(found)

    @property
    def loops(self) -> list[int]:
        """Stages that have row operations."""
        return [stage for stage, members in enumerate(self.stages.members) if members]

    def stage_nodes(self, stage: int) -> list[Node]:
        """Operations of a stage's row loop, those that are done again included."""
        return [self.nodes[i] for i in self.stages.members[stage]]

    def column_nodes(self, stage: int) -> list[Node]:
        """Operations on whole values before a stage's row loop."""
        return self._column_nodes.get(stage, [])

    @functools.cached_property
    def _column_nodes(self) -> dict[int, list[Node]]:
        found: dict[int, list[Node]] = {}
        for node, home in zip(self.nodes, self.stages.home, strict=True):
            if node.op is None:
                found.setdefault(home, []).append(node)
        return found

    @functools.cached_property
    def made_at(self) -> dict[int, int]:
        """The stage in which every value is made first."""
        homes = zip(self.nodes, self.stages.home, strict=True)
        return {v: home for node, home in homes for v in node.equation.outputs}

    @property
    def fallbacks(self) -> list[Node]:
        return [node for node in self.nodes if node.reason is not None]

    def operations(self, *, once: bool = False) -> float:
        """Arithmetic operations of the row loops; ``once``: as if none were done again."""
        done = [self.nodes] if once else [self.stage_nodes(stage) for stage in self.loops]
        return sum(n.op.flops * n.op.height for nodes in done for n in nodes if n.op is not None)

    def height(self, value: int) -> int:
        return self.program.avals[value].shape[self.row_axis[value]]


Accepts = Callable[[FlatEquation, RowOp], str | None]


def accept_all(equation: FlatEquation, op: RowOp) -> str | None:
    """Every row operation runs by rows."""
    del equation, op
    return None


def build(
    program: FlatProgram,
    in_axes: Sequence[int | None],
    accepts: Accepts = accept_all,
    *,
    budget: float = math.inf,
) -> RowGraph:
    """Type the program and cut it into stages; done once for as long as the program lives.

    Args:
      program: the flat program.
      in_axes: row axis of every input, None for one without rows.
      accepts: names a reason to run a row operation column-wise all the same, or None.
      budget: bytes that may exist whole while a row loop runs; see ``cut_into_stages``.
    """
    known = _BUILT.setdefault(program, {})
    key = tuple(in_axes), accepts, budget
    if key not in known:
        known[key] = _built(program, *key)
    return known[key]


# A graph does not refer to the program that it was built from.
_BUILT: weakref.WeakKeyDictionary[FlatProgram, dict[Any, RowGraph]] = weakref.WeakKeyDictionary()


def _built(
    program: FlatProgram, in_axes: Sequence[int | None], accepts: Accepts, budget: float
) -> RowGraph:
    typer = _Typer(program, in_axes, accepts)
    for equation in program.equations:
        typer.add(equation)
    program, nodes = typer.finish()
    streamed = frozenset(typer.streamed)
    problem = stage_problem(program, nodes, streamed, typer.row_axis, typer.compared)
    return RowGraph(
        program=program,
        nodes=tuple(nodes),
        row_axis=typer.row_axis,
        streamed=streamed,
        rate={v: typer.rates.rate(v) for v in typer.row_axis},
        stages=cut_into_stages(problem, budget),
        compared=typer.compared,
    )


def stage_problem(
    program: FlatProgram,
    nodes: Sequence[Node],
    streamed: frozenset[int],
    row_axis: Collection[int],
    compared: frozenset[int],
    **known: Any,
) -> Problem:
    """A program as ``stages`` sees it; ``known`` are further fields of the ``Problem``."""
    extremes = (n.equation for n in nodes if n.op is None and compared & set(n.equation.outputs))

    def operation(node: Node) -> Operation:
        equation, op = node.equation, node.op
        flops = 0.0 if op is None else op.flops * op.height
        return Operation(
            inputs=tuple(_values(equation.inputs)),
            outputs=equation.outputs,
            by_rows=op is not None,
            is_reduction=node.is_reduction,
            flops=math.inf if equation.has_effects else flops,
        )

    return Problem(
        operations=tuple(map(operation, nodes)),
        outputs=frozenset(_values(program.outputs)),
        size={v: size_bytes(program.avals[v]) for v in sorted(streamed)},
        input_size={v: size_bytes(program.avals[v]) for v in program.inputs if v in row_axis},
        kept=frozenset(v for equation in extremes for v in _values(equation.inputs)),
        never_held=compared,
        **known,
    )


def size_bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize


class _Typer:
    """Walks the equations once and decides what carries rows."""

    def __init__(
        self,
        program: FlatProgram,
        in_axes: Sequence[int | None],
        accepts: Accepts,
    ):
        self.program = program
        self.accepts = accepts
        self.compared = compared_extremes(program)
        self.constants = Constants(program)
        self.avals = list(program.avals)
        self.row_axis = {
            v: axis for v, axis in zip(program.inputs, in_axes, strict=True) if axis is not None
        }
        self.streamed: set[int] = set()
        self.rates = Alignment()
        self.nodes: list[Node] = []
        self.producer: dict[int, FlatEquation] = {}
        self.copies: dict[tuple[int, int], int | None] = {}
        # Row axes of maps that column operations took whole: what comes back from them in such a
        # shape (the cotangent of a flattened map, say) carries rows along the same axis.
        self.whole_maps: dict[tuple[int, ...], int] = {
            program.avals[v].shape: axis for v, axis in self.row_axis.items()
        }

    def add(self, equation: FlatEquation) -> None:
        self.producer.update((v, equation) for v in equation.outputs)
        if not any(v in self.row_axis for v in equation.inputs if isinstance(v, int)):
            self.add_column(equation, None)
            return
        try:
            self.add_rows(equation)
        except NotRowLocal as reason:
            self.add_column(equation, str(reason))

    def add_column(self, equation: FlatEquation, reason: str | None) -> None:
        for v in equation.inputs:
            # Of one row, it is as likely a mean over rows.
            if isinstance(v, int) and v in self.row_axis and self.height(v) > 1:
                self.whole_maps[self.avals[v].shape] = self.row_axis[v]
        for v in equation.outputs:
            shape = self.avals[v].shape
            if len(shape) > 1 and shape in self.whole_maps and self.constants.of(v) is None:
                self.row_axis[v] = self.whole_maps[shape]
        self.nodes.append(Node(equation, None, reason=reason))

    def height(self, value: int) -> int:
        return self.avals[value].shape[self.row_axis[value]]

    def add_rows(self, equation: FlatEquation) -> None:
        op = row_op(self.described(equation))
        if op.height == 0:
            raise NotRowLocal("its result has no rows")
        refused = self.accepts(equation, op)
        if op.reduction is not None and self.compared.intersection(equation.outputs):
            refused = "it is compared with what it is taken of, so both are of one map"
        if refused is not None:
            raise NotRowLocal(refused)
        inputs = list(equation.inputs)
        for i, (atom, read) in enumerate(zip(equation.inputs, op.reads, strict=True)):
            if isinstance(atom, Literal):
                if read is not None:
                    raise NotRowLocal("a constant array is read by rows")
                continue
            axis = self.row_axis.get(atom)
            if read is None and axis is not None:
                raise NotRowLocal("an operand that carries rows is needed whole")
            if read is None:
                continue
            if axis is not None and axis != read.axis:
                raise NotRowLocal(f"rows on axis {axis} are read along axis {read.axis}")
            if atom not in self.streamed:
                inputs[i] = self.repeated(atom, read.axis)
        equation = dataclasses.replace(equation, inputs=tuple(inputs))
        self.unite_rates(equation, op)
        self.nodes.append(Node(equation, op))
        for v, axis in zip(equation.outputs, op.out_axes, strict=True):
            if op.reduction is None and axis is not None:
                self.row_axis[v] = axis
                self.streamed.add(v)

    def unite_rates(self, equation: FlatEquation, op: RowOp) -> None:
        head = equation.outputs[0]
        for atom, read in zip(equation.inputs, op.reads, strict=True):
            if read is None or not isinstance(atom, int):
                continue
            conflict = self.rates.join(head, atom, read.row_map, self.avals[atom].shape[read.axis])
            if conflict is not None and atom in self.streamed:
                raise NotRowLocal(conflict)
        for v in equation.outputs[1:]:
            self.rates.join(v, head, IDENTITY, op.height)

    def repeated(self, value: int, axis: int) -> int:
        """A row-wise copy of a whole value that is constant along rows, else the value."""
        if (value, axis) not in self.copies:
            self.copies[value, axis] = self.repeat(value, axis)
        made = self.copies[value, axis]
        return value if made is None else made

    def repeat(self, value: int, axis: int) -> int | None:
        equation = self.producer.get(value)
        if equation is None or len(equation.outputs) != 1:
            return None
        inputs: list[Atom] = list(equation.inputs)
        op = constant_along_rows(self.described(equation), axis)
        if op is None:
            if not traits_of(equation.primitive).is_elementwise:
                return None
            height = self.avals[value].shape[axis]
            for i, atom in enumerate(inputs):
                # What has one row for all is read whole.
                if isinstance(atom, int) and self.avals[atom].shape[axis : axis + 1] == (height,):
                    copy = self.repeat(atom, axis)
                    if copy is None:
                        return None
                    inputs[i] = copy
            changed = dataclasses.replace(equation, inputs=tuple(inputs))
            if not any(v in self.row_axis for v in inputs if isinstance(v, int)):
                return None
            op = row_op(self.described(changed))
        pairs = zip(inputs, op.reads, strict=True)
        taken = {atom for atom, read in pairs if read is None and isinstance(atom, int)}
        if taken & self.streamed:
            return None  # it takes whole what a row loop makes, a map of one row perhaps
        self.avals.append(self.avals[value])
        copy = len(self.avals) - 1
        copied = dataclasses.replace(equation, inputs=tuple(inputs), outputs=(copy,))
        self.unite_rates(copied, op)
        self.nodes.append(Node(copied, op))
        self.row_axis[copy] = axis
        self.streamed.add(copy)
        return copy

    def described(self, equation: FlatEquation) -> Equation:
        def operand(atom: Atom) -> Operand:
            if isinstance(atom, Literal):
                return Operand(atom.shape, atom.dtype, None, self.constants.of(atom))
            aval, axis = self.avals[atom], self.row_axis.get(atom)
            constant, varying = self.constants.of(atom), varying_axes(aval)
            return Operand(aval.shape, aval.dtype, axis, constant, varying)

        return Equation(
            equation.primitive,
            equation.params,
            tuple(operand(v) for v in equation.inputs),
            tuple(self.avals[v] for v in equation.outputs),
        )

    def finish(self) -> tuple[FlatProgram, list[Node]]:
        """Drop nodes that nobody reads any more."""
        alive = {v for v in self.program.outputs if isinstance(v, int)}
        kept = []
        for node in reversed(self.nodes):
            if node.equation.has_effects or alive.intersection(node.equation.outputs):
                kept.append(node)
                alive.update(v for v in node.equation.inputs if isinstance(v, int))
        kept.reverse()
        program = dataclasses.replace(
            self.program,
            avals=tuple(self.avals),
            equations=tuple(node.equation for node in kept),
        )
        return program, kept


def _values(atoms: Iterable[Atom]) -> list[int]:
    return [v for v in atoms if isinstance(v, int)]
