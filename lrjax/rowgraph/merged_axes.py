"""Axes that a reshape merges with the rows, kept apart.

``logits.reshape(-1, classes)`` of a batch merges batch, rows and columns into one axis, in which an
image's rows lie scattered: no axis carries rows any more. What follows seldom minds: a softmax, a
cross-entropy and a mean treat every pixel alike. So the axes stay apart, and every operation is
written for them: an axis of its operands is then several in a row. Windows of an attention, which
are merged with the batch, are the same case, and so are a map's pixels as tokens.

An operation that cannot be written so (a sort along the merged axis, a convolution) gets its
operand merged, and runs on whole maps as before.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import primitives as public

from lrjax.program.compatibility import bind
from lrjax.program.inline import (
    Atom,
    FlatEquation,
    FlatProgram,
    Literal,
    evaluate,
    flatten,
    values_of,
    without_dead_equations,
)
from lrjax.program.varying import is_inexact, struct_like
from lrjax.rowgraph.apart import Cannot, Case, Written, rule_of
from lrjax.rowgraph.graph import ColumnNode, RowGraph, build
from lrjax.rules.base import traits_of

Shape = tuple[int, ...]

# Reshapes behind one another, each of which shows when the one before it is taken apart.
_MOST_ROUNDS = 8
# Programs that are compared in a round.
_MOST_TRIES = 8


def with_axes_apart(program: FlatProgram, axes: Sequence[int | None]) -> FlatProgram:
    """The program without merges of rows with other axes, where fewer operations lose rows then, or
    as many do later.

    Args:
      program: the flat program, custom derivatives kept or not.
      axes: row axis of every input, None for one without rows.
    """
    if not any(equation.primitive is lax.reshape_p for equation in program.equations):
        return program
    for _ in range(_MOST_ROUNDS):
        graph = build(program, axes)
        merges = _merges(graph)
        # All at once; where that gains nothing, the first that gains something alone.
        alone = [{v: axis} for v, axis in merges.items()] if len(merges) > 1 else []
        tries = [merges, *alone][:_MOST_TRIES] if merges else []
        written = (_written(program, some) for some in tries)
        known = _on_whole_maps(graph)
        better = next((one for one in written if _on_whole_maps(build(one, axes)) < known), None)
        if better is None:
            break
        program = better
    return program


@dataclasses.dataclass(frozen=True)
class Apart:
    """A value one of whose axes is kept as several.

    Attributes:
      value: the number of the value that has them.
      axis: the axis of the original, and the first of several of ``value``.
      sizes: of the several.
      rows: which of them carries rows.
    """

    value: int
    axis: int
    sizes: Shape
    rows: int

    @property
    def layout(self) -> tuple[int, Shape]:
        """What such values look like."""
        return self.axis, self.sizes

    def shape_of(self, merged: Shape) -> Shape:
        """The shape apart of what has the shape ``merged``."""
        return (*merged[: self.axis], *self.sizes, *merged[self.axis + 1 :])


def _on_whole_maps(graph: RowGraph) -> tuple[int, int]:
    """Operations that lose rows, and all that run on whole values; less is better."""
    column = [node for node in graph.nodes if isinstance(node, ColumnNode)]
    return sum(node.reason is not None for node in column), len(column)


def _merges(graph: RowGraph) -> dict[int, int]:
    """Results of reshapes that lose rows, and the row axes of their operands."""
    found = {}
    for node in graph.nodes:
        equation = node.equation
        if not isinstance(node, ColumnNode) or equation.primitive is not lax.reshape_p:
            continue
        axis = graph.axis_of(equation.inputs[0])
        if axis is not None and _kept_apart(graph.program, equation, axis) is not None:
            found[equation.outputs[0]] = axis
    return found


def _kept_apart(program: FlatProgram, equation: FlatEquation, rows: int) -> _Merge | None:
    if equation.params.get("dimensions") is not None:
        return None
    return merge_of(program.aval(equation.inputs[0]).shape, rows, equation.params["new_sizes"])


@dataclasses.dataclass(frozen=True)
class _Merge:
    """Sizes that a reshape merges into one axis, and which of them carries rows."""

    axis: int
    sizes: Shape
    rows: int


def merge_of(shape: Shape, rows: int, new_sizes: Shape) -> _Merge | None:
    """What a reshape of ``shape`` to ``new_sizes`` merges an axis with.

    Returns None where it merges it with nothing, or divides it.
    """
    ends = [*itertools.accumulate(shape, lambda a, b: a * b, initial=1)]
    new_ends = [*itertools.accumulate(new_sizes, lambda a, b: a * b, initial=1)]
    if shape[rows] < 2 or math.prod(shape) == 0:
        return None
    for axis, (start, end) in enumerate(itertools.pairwise(new_ends)):
        if not (start <= ends[rows] and ends[rows + 1] <= end):
            continue
        if start not in ends[: rows + 1] or end not in ends[rows + 1 :]:
            continue
        first = max(i for i in range(rows + 1) if ends[i] == start)
        last = min(i for i in range(rows + 1, len(ends)) if ends[i] == end)
        merged = [i for i in range(first, last) if shape[i] > 1]
        if len(merged) > 1:
            return _Merge(axis, tuple(shape[i] for i in merged), merged.index(rows))
    return None


def _written(program: FlatProgram, merges: Mapping[int, int]) -> FlatProgram:
    writer = _Writer(program, merges)
    for equation in program.equations:
        writer.add(equation)
    writer.merge(values_of(program.outputs))
    return writer.program_of(program.inputs, program.outputs)


def _written_through(closed: Any, forms: Sequence[Apart | None]) -> tuple[FlatProgram, list[Apart]]:
    """A traced function whose inputs are apart, and how its results are.

    Raises:
      Cannot: an operation within needs the axis as one.
    """
    program = flatten(closed, keep_custom_rules=True)
    writer = _Writer(program, {})
    inputs = []
    for v, form in zip(program.inputs, forms, strict=True):
        if form is not None:
            made = writer.fresh(v, form.shape_of(program.avals[v].shape))
            writer.remember(v, dataclasses.replace(form, value=made))
        inputs.append(v if form is None else writer.apart[v].value)
    for equation in program.equations:
        writer.source = equation.source
        if not writer.write(equation):
            writer.append(equation)
    if any(not isinstance(v, int) or v not in writer.apart for v in program.outputs):
        raise Cannot
    results = [writer.apart[v] for v in values_of(program.outputs)]
    return writer.program_of(inputs, [form.value for form in results]), results


def _rule_apart(
    equation: FlatEquation,
    structs: Sequence[Any],
    forms: Sequence[Apart | None],
    results: Sequence[Apart],
) -> Callable[..., Any]:
    """The derivative of a call whose operands and results are apart.

    Its rule may call the function again, so it is looked at where it is asked for, and not before.
    """

    def of_whole(*values: Any) -> list[Any]:
        primals, tangents = values[: len(structs)], values[len(structs) :]
        outputs, moved = jax.jvp(
            lambda *operands: bind(equation.primitive, operands, equation.params), primals, tangents
        )
        return [*outputs, *moved]

    def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
        values = [*primals, *tangents]
        try:
            closed = jax.make_jaxpr(of_whole)(*structs, *structs)
            program, found = _written_through(closed, [*forms] * 2)
            if any(a.layout != b.layout for a, b in zip(found, [*results] * 2, strict=True)):
                raise Cannot
            made = evaluate(program, values)
        except Cannot:
            merged = zip(values, [*structs] * 2, strict=True)
            whole = of_whole(*(lax.reshape(value, struct.shape) for value, struct in merged))
            pairs = zip(whole, [*results] * 2, strict=True)
            made = [lax.reshape(x, form.shape_of(x.shape)) for x, form in pairs]
        return made[: len(results)], made[len(results) :]

    return rule


def _is_sharded(equation: FlatEquation) -> bool:
    """Whether it says how the axes of its result are divided."""
    return any(equation.params.get(name) is not None for name in ("sharding", "out_sharding"))


class _Writer:
    """Writes a program again, with axes apart where that is possible.

    Args:
      program: the program.
      merges: results of reshapes at which it begins, and the row axes of their operands.
    """

    def __init__(self, program: FlatProgram, merges: Mapping[int, int]):
        self.program = program
        self.merges = merges
        self.avals = list(program.avals)
        self.equations: list[FlatEquation] = []
        self.producer: dict[int, FlatEquation] = {}
        self.apart: dict[int, Apart] = {}
        self.unmade: set[int] = set()  # values that exist apart alone
        self.asked: dict[tuple[int, int, Shape], int] = {}  # operands that were taken apart
        self.source: Any = None  # of the equation at hand

    def add(self, equation: FlatEquation) -> None:
        self.source = equation.source
        try:
            is_written = self.write(equation)
        except Cannot:
            is_written = False
        if not is_written:
            self.merge(equation.values)
            self.append(equation)

    def append(self, equation: FlatEquation) -> None:
        self.equations.append(equation)
        self.producer.update((v, equation) for v in equation.outputs)

    def write(self, equation: FlatEquation) -> bool:
        """Add an equation with axes apart; False where none of its operands has any."""
        forms = [self.apart.get(v) if isinstance(v, int) else None for v in equation.inputs]
        if equation.primitive is lax.reshape_p and (forms[0] or equation.outputs[0] in self.merges):
            return self.write_reshape(equation, forms[0])
        found = [form for form in forms if form is not None]
        if not found:
            return False
        if equation.has_effects or _is_sharded(equation):
            raise Cannot
        if any((form.sizes, form.rows) != (found[0].sizes, found[0].rows) for form in found):
            raise Cannot
        case = Case(
            equation,
            axes=tuple(None if form is None else form.axis for form in forms),
            shapes=tuple(self.program.aval(atom).shape for atom in equation.inputs),
            outputs=tuple(self.program.avals[v].shape for v in equation.outputs),
            sizes=found[0].sizes,
        )
        if equation.primitive is public.custom_jvp_call_p:
            self.append_call(case, found[0].rows)
        else:
            written = rule_of(equation, traits_of(equation.primitive))(case)
            self.append_written(case, written, found[0].rows)
        return True

    def append_written(
        self, case: Case, written: Written, rows: int, primitive: Any = None
    ) -> None:
        equation = case.equation
        inputs = tuple(
            atom if axis is None else self.taken_apart(atom, axis, case.sizes)
            for atom, axis in zip(equation.inputs, written.operands, strict=True)
        )
        outputs = [*equation.outputs]
        for i, axis in enumerate(written.outputs):
            if axis is not None:
                shape = case.spread(case.outputs[i], axis, case.sizes)
                made = self.fresh(outputs[i], shape)
                self.remember(outputs[i], Apart(made, axis, case.sizes, rows))
                outputs[i] = made
        self.append(
            dataclasses.replace(
                equation,
                primitive=primitive or equation.primitive,
                params=written.params,
                inputs=inputs,
                outputs=tuple(outputs),
            )
        )

    def append_call(self, case: Case, rows: int) -> None:
        """A call with a derivative of its own: its body, and its rule wherever JAX asks for it."""
        equation = case.equation
        operands = [self.program.aval(atom) for atom in equation.inputs]
        if equation.params["symbolic_zeros"] or not all(map(is_inexact, operands)):
            raise Cannot
        structs = [
            jax.ShapeDtypeStruct(o.shape, o.dtype) if isinstance(o, Literal) else struct_like(o)
            for o in operands
        ]
        forms = [None if axis is None else Apart(0, axis, case.sizes, rows) for axis in case.axes]
        body, results = _written_through(equation.params["call_jaxpr"], forms)
        if any((form.sizes, form.rows) != (case.sizes, rows) for form in results):
            raise Cannot  # its body merges other axes
        call = jax.custom_jvp(lambda *values: evaluate(body, values))
        call.defjvp(_rule_apart(equation, structs, forms, results))
        (made,) = jax.make_jaxpr(call)(*body.structs).eqns
        written = Written(case.axes, tuple(form.axis for form in results), dict(made.params))
        self.append_written(case, written, rows, made.primitive)

    def program_of(self, inputs: Sequence[int], outputs: Sequence[Atom]) -> FlatProgram:
        return without_dead_equations(
            dataclasses.replace(
                self.program,
                avals=tuple(self.avals),
                equations=tuple(self.equations),
                inputs=tuple(inputs),
                outputs=tuple(outputs),
            )
        )

    def write_reshape(self, equation: FlatEquation, form: Apart | None) -> bool:
        """A reshape of a reshape is one; what it merges rows with stays apart."""
        (operand,), (output,) = equation.inputs, equation.outputs
        assert isinstance(operand, int)
        if equation.params.get("dimensions") is not None:
            raise Cannot
        source, rows = operand, self.merges.get(output, 0)
        if form is not None:
            source, rows = form.value, form.axis + form.rows
        shape, new_sizes = self.avals[source].shape, equation.params["new_sizes"]
        merge = merge_of(shape, rows, new_sizes)
        if merge is None:
            self.append(dataclasses.replace(equation, inputs=(source,)))
            return True
        apart = (*new_sizes[: merge.axis], *merge.sizes, *new_sizes[merge.axis + 1 :])
        made = source if apart == shape else self.reshaped(source, apart)
        self.remember(output, Apart(made, merge.axis, merge.sizes, merge.rows))
        return True

    def remember(self, value: int, form: Apart) -> None:
        self.apart[value] = form
        self.unmade.add(value)

    def fresh(self, like: int, shape: Sequence[int]) -> int:
        self.avals.append(struct_like(self.avals[like], tuple(shape)))
        return len(self.avals) - 1

    def reshaped(self, value: int, shape: Shape, made: int | None = None) -> int:
        made = self.fresh(value, shape) if made is None else made
        params = {"new_sizes": shape, "dimensions": None, "sharding": None}
        self.append(FlatEquation(lax.reshape_p, params, (value,), (made,), self.source))
        return made

    def merge(self, values: Collection[int]) -> None:
        """Make these values with the axis as one, where nothing does yet."""
        for v in self.unmade.intersection(values):
            self.unmade.remove(v)
            self.reshaped(self.apart[v].value, self.avals[v].shape, v)

    def taken_apart(self, atom: Atom, axis: int, sizes: Shape) -> int:
        """An operand with one of its axes as several."""
        if not isinstance(atom, int):
            raise Cannot
        form, shape = self.apart.get(atom), self.avals[atom].shape
        if form is not None:
            if (form.axis, form.sizes) != (axis, sizes):
                raise Cannot
            return form.value
        if shape[axis] == 1:
            sizes = (1,) * len(sizes)
        if math.prod(sizes) != shape[axis]:
            raise Cannot
        key = atom, axis, sizes
        if key not in self.asked:
            made_by = self.producer.get(atom)
            made = None if made_by is None else self.made_apart(made_by, axis, sizes)
            apart = (*shape[:axis], *sizes, *shape[axis + 1 :])
            self.asked[key] = self.reshaped(atom, apart) if made is None else made
        return self.asked[key]

    def made_apart(self, equation: FlatEquation, axis: int, sizes: Shape) -> int | None:
        """A broadcast, or numbers, in another shape at once, so that rows of it can be made."""
        (output,), params, more = equation.outputs[:1], equation.params, len(sizes) - 1
        if _is_sharded(equation):
            return None
        shape = self.avals[output].shape
        changed: dict[str, Any] = {"shape": (*shape[:axis], *sizes, *shape[axis + 1 :])}
        inputs = equation.inputs
        if equation.primitive is lax.iota_p and params["dimension"] != axis:
            changed["dimension"] = params["dimension"] + more * (params["dimension"] > axis)
        elif equation.primitive is lax.broadcast_in_dim_p and len(inputs) == 1:
            dims: list[int] = []
            own = inputs[0].shape if isinstance(inputs[0], Literal) else self.avals[inputs[0]].shape
            for source, dim in enumerate(params["broadcast_dimensions"]):
                is_several = dim == axis and own[source] == shape[axis]
                dims += range(dim, dim + more + 1) if is_several else [dim + more * (dim > axis)]
                if is_several:
                    inputs = (self.taken_apart(inputs[0], source, sizes),)
            changed["broadcast_dimensions"] = tuple(dims)
        else:
            return None
        made = self.fresh(output, changed["shape"])
        self.append(
            dataclasses.replace(
                equation, params={**params, **changed}, inputs=inputs, outputs=(made,)
            )
        )
        return made
