"""Cut a program into segments: between two of them, maps exist whole."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from lrjax.program.compatibility import tag_of
from lrjax.program.inline import FlatEquation, FlatProgram, dependents, values_of
from lrjax.program.references import uses_references
from lrjax.rowgraph.graph import build, size_bytes
from lrjax.rowgraph.row_mesh import RowMesh
from lrjax.rules.dependence import needs_whole_cotangent


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of a program that runs under one strategy.

    Attributes:
      program: its equations, with the values it takes and gives as inputs and outputs.
      axes: row axis of every input.
      made: values of the whole program that it gives, in the order of its outputs.
      row_mesh: the devices that its rows are divided among, None for one device, or where XLA
        divides the work.
    """

    program: FlatProgram
    axes: tuple[int | None, ...]
    made: tuple[int, ...]
    row_mesh: RowMesh | None = None

    @property
    def devices(self) -> int:
        """How many share its rows."""
        return 1 if self.row_mesh is None else self.row_mesh.count


def split(
    program: FlatProgram,
    axes: Sequence[int | None],
    cuts: Sequence[str] | int,
    *,
    in_order: bool = False,
) -> list[Segment]:
    """Cut at named values, or into a number of segments.

    Args:
      program: the whole program.
      axes: row axis of every input.
      cuts: names, or the number of segments.
      in_order: every name must end a segment of its own, in the order given.

    Raises:
      ValueError: for a name that the program does not have, names that are not in order, or too
        many segments.
    """
    whole = Cuttable.of(program, axes, is_cut=bool(cuts))
    if isinstance(cuts, int):
        part = _parts_by_width(whole, cuts)
    else:
        part = _parts_by_name(whole, cuts)
        if in_order:
            _check_order(program, part, cuts)
    count = 1 + max(part.values(), default=0)
    _check_references(program, count)
    return [_segment(program, whole.row_axis, part, index) for index in range(count)]


def split_at(
    program: FlatProgram, axes: Sequence[int | None], positions: Sequence[int]
) -> list[Segment]:
    """Cut behind these numbers of operations on rows, in rising order."""
    whole = Cuttable.of(program, axes)
    bounds = [0, *positions, len(whole.operations)]
    _check_references(program, len(bounds) - 1)
    return [whole.between(start, stop) for start, stop in itertools.pairwise(bounds)]


def _check_references(program: FlatProgram, count: int) -> None:
    """Refuse to cut what is put in order by a mutable array."""
    if count > 1 and uses_references(program.equations):
        raise ValueError(
            f"fun cannot be cut into {count} segments: it uses a mutable array (jax.new_ref), "
            "whose reads and writes keep their order within a segment only. Give no cuts, or carry "
            "the value as an array instead."
        )


@dataclasses.dataclass(frozen=True)
class Cuttable:
    """A program that may be cut between any two of its operations on rows.

    Attributes:
      program: the whole program.
      row_axis: axis of every value that carries rows.
      operations: its equations that depend on rows or on an effect, in order: those of one segment
        alone.
    """

    program: FlatProgram
    row_axis: dict[int, int]
    operations: tuple[FlatEquation, ...]

    @classmethod
    def of(
        cls, program: FlatProgram, axes: Sequence[int | None], *, is_cut: bool = True
    ) -> Cuttable:
        """A program with row axes of its inputs; where it is not cut, those are enough."""
        given = {v: a for v, a in zip(program.inputs, axes, strict=True) if a is not None}
        row_axis = build(program, axes).row_axis if is_cut else given
        effects = (v for e in program.equations if e.has_effects for v in e.outputs)
        depends = dependents(program.equations, {*given, *effects})
        operations = tuple(e for e in program.equations if depends.intersection(e.outputs))
        return cls(program, row_axis, operations)

    def between(self, start: int, stop: int) -> Segment:
        """The segment of operations ``start`` to ``stop`` (exclusive)."""
        part = {e.outputs[0]: 1 + (i >= stop) - (i < start) for i, e in enumerate(self.operations)}
        return _segment(self.program, self.row_axis, part, 1)


def _parts_by_name(whole: Cuttable, names: Sequence[str]) -> dict[int, int]:
    """Segment of every operation (by its first output); effects keep their order."""
    tags = map(tag_of, whole.program.equations)
    found = [tag for tag in tags if tag is not None]
    for name in names:
        if name not in found:
            raise ValueError(
                f"cuts: no value is named {name!r}; names in fun are {sorted(set(found))}. Name a "
                "value with jax.ad_checkpoint.checkpoint_name(value, name)."
            )
    after: dict[int, int] = {}
    part: dict[int, int] = {}
    last_effect = 0
    for equation in whole.operations:
        own = max((after.get(v, 0) for v in equation.values), default=0)
        if equation.has_effects:
            own = last_effect = max(own, last_effect)
        part[equation.outputs[0]] = own
        after.update((v, own + (tag_of(equation) in names)) for v in equation.outputs)
    # A tag that ends the program leaves no segment behind it; the numbers stay without gaps.
    numbers = {own: i for i, own in enumerate(sorted(set(part.values())))}
    return {v: numbers[own] for v, own in part.items()}


def _check_order(program: FlatProgram, part: dict[int, int], names: Sequence[str]) -> None:
    """Every name ends the segment of its own number."""
    ends: dict[str, set[int | None]] = {name: set() for name in names}
    for equation in program.equations:
        if tag_of(equation) in names:
            ends[equation.params["name"]].add(part.get(equation.outputs[0]))
    if [*ends.values()] != [{i} for i in range(len(names))]:
        raise ValueError(
            f"cuts: with groups, the names {list(names)} must follow one another in fun, each on "
            "what was made from the one before; give them in that order, each once."
        )


def _parts_by_width(whole: Cuttable, count: int) -> dict[int, int]:
    """Cut where the maps that cross are smallest, with no segment under half its fair share."""
    program, equations = whole.program, whole.operations
    if count > len(equations):
        raise ValueError(
            f"cuts={count}: fun has {len(equations)} operations on rows; ask for at most that many "
            "segments."
        )
    size = {v: size_bytes(program.avals[v]) for e in equations for v in e.outputs}
    last_use = {v: i for i, equation in enumerate(equations) for v in equation.values}
    last_use.update(dict.fromkeys(values_of(program.outputs), len(equations)))
    made_at = {v: i for i, e in enumerate(equations) for v in e.outputs}
    width = [
        sum(size[v] for v, made in made_at.items() if made <= i < last_use.get(v, -1))
        for i in range(len(equations) - 1)
    ]
    weight = np.cumsum([sum(size[v] for v in e.outputs) for e in equations])
    cut_after = _lightest_cuts(width, weight, count)
    bounds = [*cut_after, len(equations) - 1]
    return {
        e.outputs[0]: next(p for p, bound in enumerate(bounds) if i <= bound)
        for i, e in enumerate(equations)
    }


def _lightest_cuts(width: list[int], weight: np.ndarray, count: int) -> list[int]:
    """Positions of ``count - 1`` cuts of least total width (dynamic programming)."""
    least = weight[-1] / (2 * count)
    best: dict[int, tuple[float, list[int]]] = {-1: (0.0, [])}
    for _ in range(count - 1):
        extended: dict[int, tuple[float, list[int]]] = {}
        for last, (cost, cuts) in best.items():
            done = weight[last] if last >= 0 else 0
            for position in range(last + 1, len(width)):
                if weight[position] - done < least or weight[-1] - weight[position] < least:
                    continue
                total = cost + width[position]
                if position not in extended or total < extended[position][0]:
                    extended[position] = (total, [*cuts, position])
        best = extended
    if not best:
        step = (len(width) + 1) // count
        return [step * (i + 1) - 1 for i in range(count - 1)]
    return min(best.values())[1]


def _segment(
    program: FlatProgram, row_axis: dict[int, int], part: dict[int, int], index: int
) -> Segment:
    """Equations of one part, and what they need that no row touches (made again in each part)."""
    part = _with_operations_done_once(program, part)
    is_last = index == max(part.values(), default=0)
    home = index if is_last else -1  # of what no row touches and the program gives
    read_outside = set(values_of(program.outputs))
    for equation in program.equations:
        if part.get(equation.outputs[0], -1) > index:
            read_outside.update(equation.values)
    made = tuple(
        v
        for e in program.equations
        if part.get(e.outputs[0], home) == index
        for v in e.outputs
        if v in read_outside
    )
    needed = set(made)
    equations = []
    for equation in reversed(program.equations):
        is_effect = equation.has_effects and part.get(equation.outputs[0], home) == index
        is_needed = is_effect or needed.intersection(equation.outputs)
        if is_needed and part.get(equation.outputs[0], index) == index:
            equations.append(equation)
            needed.update(equation.values)
    equations.reverse()
    local = {v for e in equations for v in e.outputs} | set(program.constants)
    inputs = tuple(sorted(needed - local))
    return Segment(
        FlatProgram(program.avals, tuple(equations), inputs, made, program.constants),
        tuple(row_axis.get(v) for v in inputs),
        made,
    )


def _with_operations_done_once(program: FlatProgram, part: dict[int, int]) -> dict[int, int]:
    """The parts also of what no row touches, and which is made once, where it is needed first.

    Made again in every part its derivative would see the cotangents of each alone. What is made
    of its results is made once as well.
    """
    free = [e for e in program.equations if e.outputs[0] not in part]
    whole = {v for e in free if needs_whole_cotangent(program, e) for v in e.outputs}
    if not whole:
        return part
    once, found = dependents(free, whole), dict(part)
    needed_in: dict[int, int] = {}  # the first part that reads a value
    for equation in reversed(program.equations):
        head = equation.outputs[0]
        if head not in part and head in once:
            readers = [needed_in[v] for v in equation.outputs if v in needed_in]
            if readers:
                found[head] = min(readers)
        if head in found:
            for v in equation.values:
                needed_in[v] = min(needed_in.get(v, found[head]), found[head])
    return found
