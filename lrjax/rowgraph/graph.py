"""Flat program -> row graph: which values carry rows, and what is local in rows.

A value with a row axis is *streamed* where a row operation makes it, and *exists whole* where it
is an input or a column operation makes it. ``stages`` says where everything runs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction
from typing import Any, ClassVar

from lrjax.program.comparisons import compared_extremes
from lrjax.program.constants import Constants
from lrjax.program.inline import (
    Atom,
    FlatEquation,
    FlatProgram,
    Literal,
    dependents,
    values_of,
    without_dead_equations,
)
from lrjax.program.varying import is_inexact, varying_axes
from lrjax.rowgraph.alignment import Alignment
from lrjax.rowgraph.stages import Operation, Problem, Stages, cut_into_stages
from lrjax.rules.base import (
    Equation,
    NotRowLocal,
    Operand,
    RowOp,
    RowRead,
    constant_along_rows,
    row_op,
    traits_of,
)
from lrjax.rules.geometry import IDENTITY


@dataclasses.dataclass(frozen=True)
class RowNode:
    """An equation that runs by rows.

    Attributes:
      equation: the equation.
      op: its row-wise form.
    """

    equation: FlatEquation
    op: RowOp
    reason: ClassVar[None] = None

    @property
    def is_reduction(self) -> bool:
        return self.op.reduction is not None

    @property
    def operations(self) -> float:
        """To do it once, on all rows."""
        return self.op.flops * self.op.height

    @functools.cached_property
    def row_reads(self) -> tuple[tuple[int, int, RowRead], ...]:
        """Number and value of every operand that is read by rows, and how."""
        triples = zip(itertools.count(), self.equation.inputs, self.op.reads, strict=False)
        return tuple(
            (i, v, read) for i, v, read in triples if read is not None and isinstance(v, int)
        )

    def row_inputs(self) -> list[int]:
        """Values that are read by rows."""
        return [v for _, v, _ in self.row_reads]

    def whole_inputs(self) -> list[int]:
        """Values that every step takes whole."""
        pairs = zip(self.equation.inputs, self.op.reads, strict=True)
        return values_of(v for v, read in pairs if read is None)


@dataclasses.dataclass(frozen=True)
class ColumnNode:
    """An equation that runs on whole values.

    Attributes:
      equation: the equation.
      reason: why it fell back to column though it has row operands.
    """

    equation: FlatEquation
    reason: str | None = None
    op: ClassVar[None] = None
    is_reduction: ClassVar[bool] = False


Node = RowNode | ColumnNode


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
        """Values that may have tangents."""
        return moving_values(self.program)

    @functools.cached_property
    def wanted(self) -> frozenset[int]:
        """Values that may have cotangents."""
        return wanted_values(self.program)

    @functools.cached_property
    def made_of_rows(self) -> frozenset[int]:
        """Values with rows, and all that is made of them."""
        return frozenset(dependents(self.program.equations, self.row_axis))

    @property
    def loops(self) -> list[int]:
        """Stages that have row operations."""
        return [stage for stage, members in enumerate(self.stages.members) if members]

    @property
    def row_nodes(self) -> list[RowNode]:
        """Operations that run by rows."""
        return [node for node in self.nodes if isinstance(node, RowNode)]

    def stage_nodes(self, stage: int) -> list[RowNode]:
        """Operations of a stage's row loop, those that are done again included."""
        nodes = (self.nodes[i] for i in self.stages.members[stage])
        return [node for node in nodes if isinstance(node, RowNode)]

    def column_nodes(self, stage: int) -> list[ColumnNode]:
        """Operations on whole values before a stage's row loop."""
        return self._column_nodes.get(stage, [])

    @functools.cached_property
    def _column_nodes(self) -> dict[int, list[ColumnNode]]:
        found: dict[int, list[ColumnNode]] = {}
        for node, home in zip(self.nodes, self.stages.home, strict=True):
            if isinstance(node, ColumnNode):
                found.setdefault(home, []).append(node)
        return found

    @functools.cached_property
    def made_at(self) -> dict[int, int]:
        """The stage in which every value is made first."""
        homes = zip(self.nodes, self.stages.home, strict=True)
        return {v: home for node, home in homes for v in node.equation.outputs}

    def operations(self, *, once: bool = False) -> float:
        """Arithmetic operations of the row loops; ``once``: as if none were done again."""
        done = [self.row_nodes] if once else [self.stage_nodes(stage) for stage in self.loops]
        return sum(node.operations for nodes in done for node in nodes)

    def axis_of(self, atom: Atom) -> int | None:
        """The row axis of a value; None for one without rows, and for a literal."""
        return self.row_axis.get(atom) if isinstance(atom, int) else None

    def height(self, value: int) -> int:
        return self.program.avals[value].shape[self.row_axis[value]]

    def row_bytes(self, value: int) -> int:
        """Bytes of one row."""
        return size_bytes(self.program.avals[value]) // max(self.height(value), 1)


def moving_values(program: FlatProgram) -> frozenset[int]:
    """Values that may have tangents: floating-point ones that depend on such inputs by more than
    functions without a derivative."""
    avals = program.avals
    found = {v for v in program.inputs if is_inexact(avals[v])}
    for equation in program.equations:
        has_derivative = traits_of(equation.primitive).has_derivative
        if has_derivative and found.intersection(equation.values):
            # What is written to a mutable array is read of it later.
            written = equation.values if equation.has_effects else ()
            found.update(v for v in (*equation.outputs, *written) if is_inexact(avals[v]))
    return frozenset(found)


def wanted_values(program: FlatProgram) -> frozenset[int]:
    """Values that may have cotangents: floating-point ones that such results, or effects, depend on
    by more than functions without a derivative."""
    avals = program.avals
    found = {v for v in values_of(program.outputs) if is_inexact(avals[v])}
    for equation in reversed(program.equations):
        has_derivative = traits_of(equation.primitive).has_derivative
        if equation.has_effects or (has_derivative and found.intersection(equation.outputs)):
            found.update(v for v in equation.values if is_inexact(avals[v]))
    return frozenset(found)


def root_of(graph: RowGraph, node: RowNode) -> tuple[int, Fraction]:
    """The root of a node's component, and the node's rows per row of it."""
    head = node.equation.outputs[0]
    if head in graph.rate:
        return graph.rate[head]
    for _, v, read in node.row_reads:
        if v in graph.rate:
            root, rate = graph.rate[v]
            return root, rate / read.row_map.rate
    raise AssertionError("a reduction that reads no rows")


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
    column = (n.equation for n in nodes if isinstance(n, ColumnNode))
    extremes = (equation for equation in column if compared.intersection(equation.outputs))

    def operation(node: Node) -> Operation:
        flops = node.operations if isinstance(node, RowNode) else 0.0
        return Operation(
            inputs=tuple(node.equation.values),
            outputs=node.equation.outputs,
            by_rows=isinstance(node, RowNode),
            is_reduction=node.is_reduction,
            flops=math.inf if node.equation.has_effects else flops,
            has_effects=node.equation.has_effects,
        )

    return Problem(
        operations=tuple(map(operation, nodes)),
        outputs=frozenset(values_of(program.outputs)),
        size={v: size_bytes(program.avals[v]) for v in sorted(streamed)},
        input_size={v: size_bytes(program.avals[v]) for v in program.inputs if v in row_axis},
        kept=frozenset(v for equation in extremes for v in equation.values),
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
        if self.row_axis.keys().isdisjoint(equation.values):
            self.add_column(equation, None)
            return
        op = None
        try:
            op = row_op(self.described(equation))
            self.add_rows(equation, op)
        except NotRowLocal as reason:
            axes = reason.out_axes if op is None or op.reduction is not None else op.out_axes
            self.add_column(equation, str(reason), axes)

    def add_column(
        self, equation: FlatEquation, reason: str | None, axes: Sequence[int | None] = ()
    ) -> None:
        """Run an equation on whole values; along ``axes`` its results carry rows all the same."""
        for v in equation.values:
            # Of one row, it is as likely a mean over rows.
            if v in self.row_axis and self.height(v) > 1:
                self.whole_maps[self.avals[v].shape] = self.row_axis[v]
        for v in equation.outputs:
            shape = self.avals[v].shape
            if len(shape) > 1 and shape in self.whole_maps and self.constants.of(v) is None:
                self.row_axis[v] = self.whole_maps[shape]
        for v, axis in zip(equation.outputs, axes, strict=False):
            if axis is not None and self.avals[v].shape[axis] > 1 and self.constants.of(v) is None:
                self.row_axis[v] = axis
        self.nodes.append(ColumnNode(equation, reason))

    def height(self, value: int) -> int:
        return self.avals[value].shape[self.row_axis[value]]

    def add_rows(self, equation: FlatEquation, op: RowOp) -> None:
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
        self.append(RowNode(dataclasses.replace(equation, inputs=tuple(inputs)), op))
        for v, axis in zip(equation.outputs, op.out_axes, strict=True):
            if op.reduction is None and axis is not None:
                self.row_axis[v] = axis
                self.streamed.add(v)

    def append(self, node: RowNode) -> None:
        """A further node, at one rate with what it reads.

        Raises:
          NotRowLocal: what it reads is at several rates.
        """
        head, *others = node.equation.outputs
        for _, v, read in node.row_reads:
            conflict = self.rates.join(head, v, read.row_map, self.avals[v].shape[read.axis])
            if conflict is not None and v in self.streamed:
                raise NotRowLocal(conflict)
        for v in others:
            self.rates.join(v, head, IDENTITY, node.op.height)
        self.nodes.append(node)

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
        op = constant_along_rows(self.described(equation), axis)
        if op is None:
            equation = self.of_repeated(equation, axis)
            if equation is None:
                return None
            op = row_op(self.described(equation))
        copy = len(self.avals)
        node = RowNode(dataclasses.replace(equation, outputs=(copy,)), op)
        if not self.streamed.isdisjoint(node.whole_inputs()):
            return None  # it takes whole what a row loop makes, a map of one row perhaps
        self.avals.append(self.avals[value])
        self.append(node)
        self.row_axis[copy] = axis
        self.streamed.add(copy)
        return copy

    def of_repeated(self, equation: FlatEquation, axis: int) -> FlatEquation | None:
        """An elementwise equation with row-wise copies of its operands, if there are any."""
        if not traits_of(equation.primitive).is_elementwise:
            return None
        height = self.avals[equation.outputs[0]].shape[axis]
        copies: dict[int, int] = {}
        for v in equation.values:
            # What has one row for all is read whole.
            if v not in copies and self.avals[v].shape[axis : axis + 1] == (height,):
                copy = self.repeat(v, axis)
                if copy is None:
                    return None
                copies[v] = copy
        found = equation.reading(copies)
        return None if self.row_axis.keys().isdisjoint(found.values) else found

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
        equations = tuple(node.equation for node in self.nodes)
        changed = dataclasses.replace(self.program, avals=tuple(self.avals), equations=equations)
        program = without_dead_equations(changed)
        alive = {id(equation) for equation in program.equations}
        return program, [node for node in self.nodes if id(node.equation) in alive]
