"""What ``lrjax.explain`` returns: what every segment will do, as values and as text."""

from __future__ import annotations

import dataclasses

from lrjax.plan import Choice
from lrjax.rowgraph.fallbacks import Fallback, counted
from lrjax.rowgraph.row_mesh import RowMesh
from lrjax.text import aligned, ends, size

# Lines of a summary: what fits a screen.
_MOST_SEGMENTS = 16
_MOST_REASONS = 6


@dataclasses.dataclass(frozen=True)
class OperationRow:
    """One operation of a row loop.

    Attributes:
      name: primitive and output shape.
      loop: number of its row loop in the pass.
      rows: rows that it makes, or reduces.
      operations: floating-point operations to do all of them once.
      receptive_field: rows of the segment's inputs that one output row depends on.
      halo: input rows that neighbouring blocks of the operation share.
      rows_per_step: output rows computed in a step.
      line_buffer_rows, line_buffer_bytes: what is kept of the output between steps.
      recomputed_rows: rows of the image that this pass computes again, in it or after another.
    """

    name: str
    loop: int
    rows: int
    operations: float
    receptive_field: int
    halo: int
    rows_per_step: int
    line_buffer_rows: int
    line_buffer_bytes: int
    recomputed_rows: int

    @property
    def recomputed_operations(self) -> float:
        return self.operations * self.recomputed_rows / max(self.rows, 1)


@dataclasses.dataclass(frozen=True)
class Pass:
    """One program (forward or backward) of a segment: its row loops and what fell back.

    Attributes:
      name: "forward", "backward", or "forward and backward" where both stream together.
      steps: steps of every row loop.
      operations: the row operations, in order.
      saved_bytes: what the pass keeps for the backward pass besides its inputs and outputs.
      column: operations on whole values at the boundaries between row loops, in order.
      fallbacks: those among them that have rows but are not local in them, with the reason.
    """

    name: str
    steps: tuple[int, ...]
    operations: tuple[OperationRow, ...]
    saved_bytes: int
    column: tuple[str, ...]
    fallbacks: tuple[Fallback, ...]

    @property
    def line_buffer_bytes(self) -> int:
        """Of the row loop that keeps most; only one runs at a time."""
        totals = [0] * max(len(self.steps), 1)
        for operation in self.operations:
            totals[operation.loop] += operation.line_buffer_bytes
        return max(totals)

    @property
    def recomputed_operations(self) -> float:
        return sum(operation.recomputed_operations for operation in self.operations)

    def __repr__(self) -> str:
        return (
            f"Pass({self.name!r}, {len(self.operations)} operations by rows, {len(self.column)} on "
            f"whole values, {len(self.steps)} row loops)"
        )


@dataclasses.dataclass(frozen=True)
class SegmentReport:
    """What a segment will do.

    Attributes:
      choice: how it runs.
      passes: of its row loops, on one micro-batch where there are several; none for whole maps.
      group: the segments of its group: the backward pass first runs them all again.
      forward_operations: floating-point operations of its row operations, forward, done once.
      hosted_bytes: of the maps it gives, what waits in the host's memory.
      row_mesh: the devices that its rows are divided among: blocks, steps and line buffers are
        those of each; None for one device.
      halo_rows: the most rows of a map that a device fetches from its neighbours on one side.
      kept_operations: of whole maps that are computed again, those whose results are kept.
    """

    choice: Choice
    passes: tuple[Pass, ...]
    group: tuple[int, ...]
    forward_operations: float
    hosted_bytes: int = 0
    row_mesh: RowMesh | None = None
    halo_rows: int = 0
    kept_operations: float = 0.0

    @property
    def strategy(self) -> str:
        return self.choice.strategy.name

    @property
    def num_blocks(self) -> int:
        return self.choice.num_blocks

    @property
    def line_buffer_bytes(self) -> int:
        """The most that the line buffers of one row loop take."""
        return max((one.line_buffer_bytes for one in self.passes), default=0)

    @property
    def saved_bytes(self) -> int | None:
        """What waits for the backward pass besides inputs and outputs; None for whole maps."""
        if not self.passes:
            return None
        return sum(one.saved_bytes for one in self.passes) * self.choice.micro_batches

    @property
    def recomputed(self) -> float:
        """Operations done again, as a multiple of the forward pass's."""
        if not self.passes:
            again = 1 - self.kept_operations / max(self.forward_operations, 1.0)
            return again * self.choice.strategy.recomputes
        # A micro-batch has its share of the operations.
        again = sum(one.recomputed_operations for one in self.passes) * self.choice.micro_batches
        return again / max(self.forward_operations, 1.0)

    def __repr__(self) -> str:
        return f"SegmentReport({self.choice}, {len(self.passes)} passes)"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The answer of ``explain``; print it for a summary, and ``tables()`` for every operation.

    Attributes:
      segments: what each will do, in the order of the forward pass; one where there are no cuts.
    """

    segments: tuple[SegmentReport, ...]

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Every operation that fell back to column, with the reason."""
        return tuple(dict.fromkeys(map(str, self._fallbacks())))

    def _fallbacks(self) -> list[Fallback]:
        passes = (p for segment in self.segments for p in segment.passes)
        return [fallback for one in passes for fallback in one.fallbacks]

    def __repr__(self) -> str:
        return f"Explanation({_count(len(self.segments), 'segment')}; print it for a summary)"

    def __str__(self) -> str:
        rows = [_summary(i, segment) for i, segment in enumerate(self.segments)]
        title, *lines = aligned([_SUMMARY, *rows], left=(1,))
        lines = [*self._total(), title, *ends(lines, _MOST_SEGMENTS, "tables() has all of them")]
        lines += self._notes()
        reasons = counted(self._fallbacks(), _MOST_REASONS, 118)
        if reasons:
            lines.append("column-wise, because not local in rows:")
            lines.extend(f"  {reason}" for reason in reasons)
        legend = "forward + backward; 2 x 4-5 steps are two row loops of 4 to 5"
        return "\n".join([*lines, f"({legend}; tables() has every operation)"])

    def _total(self) -> list[str]:
        passes = [one for segment in self.segments for one in segment.passes]
        whole = sum(segment.forward_operations for segment in self.segments)
        again = sum(s.recomputed * s.forward_operations for s in self.segments) / max(whole, 1.0)
        saved = sum(segment.saved_bytes or 0 for segment in self.segments)
        most = max(segment.line_buffer_bytes for segment in self.segments)
        return [
            f"{_count(len(self.segments), 'segment')}: "
            f"{_count(sum(len(one.operations) for one in passes), 'operation')} by rows, "
            f"{len(self._fallbacks())} that have rows and run column-wise",
            f"line buffers at most {size(most)}, saved for the backward pass {size(saved)}, "
            f"computed again {again:.2f} x the forward pass's operations",
        ]

    def _notes(self) -> list[str]:
        found = [
            f"group of segments {group[0]} to {group[-1]}, run again for the backward pass"
            for group in dict.fromkeys(segment.group for segment in self.segments)
            if len(group) > 1
        ]
        hosted = [segment.hosted_bytes for segment in self.segments if segment.hosted_bytes]
        if hosted:
            givers = _count(len(hosted), "segment")
            found.append(
                f"offload: {size(sum(hosted))} given by {givers} wait in the host's memory"
            )
        row_mesh = self.segments[0].row_mesh
        if row_mesh is not None:
            halo = max(segment.halo_rows for segment in self.segments)
            found.append(
                f"rows divided among {row_mesh.count} devices, along the mesh axis "
                f"{row_mesh.axis!r}: blocks, steps and line buffers are those of each; at most "
                f"{_count(halo, 'row')} fetched of each neighbour before a loop"
            )
        return found

    def tables(self) -> str:
        """Every segment and pass: all row operations, and all that fell back to column."""
        lines: list[str] = []
        for index, segment in enumerate(self.segments):
            title = f"segment {index}: {_strategy(segment)}"
            if segment.passes:
                title += f", {_count(segment.num_blocks, 'block')}"
            if segment.hosted_bytes:
                title += f", {segment.hosted_bytes:,} bytes that it gives wait on the host"
            if len(segment.group) > 1:
                first, *_, last = segment.group
                title += f"; group of segments {first} to {last}, run again for the backward pass"
            lines.append(title)
            for one in segment.passes:
                lines.extend(_table(one))
        if self.fallbacks:
            lines.append("column-wise, because not local in rows:")
            lines.extend(f"  {fallback}" for fallback in self.fallbacks)
        return "\n".join(lines)


_SUMMARY = (
    *("segment", "strategy", "blocks", "steps", "by rows", "column", "line buffers", "saved"),
    "recomputed",
)


def _summary(index: int, segment: SegmentReport) -> list[str]:
    passes = segment.passes
    cells = [str(index), _strategy(segment), str(segment.num_blocks)]
    if not passes:
        cells = [*cells[:2], "", "", "0", "all", "", ""]
    else:
        cells += [
            " + ".join(map(_steps, passes)),
            " + ".join(str(len(one.operations)) for one in passes),
            " + ".join(str(len(one.fallbacks)) for one in passes),
            size(segment.line_buffer_bytes),
            size(segment.saved_bytes or 0),
        ]
    return [*cells, f"{segment.recomputed:.2f}"]


def _strategy(segment: SegmentReport) -> str:
    return segment.choice.text + (", offload" if segment.hosted_bytes else "")


def _steps(one: Pass) -> str:
    """Of one loop its steps, of several the fewest and the most, and how many loops."""
    if not one.steps:
        return "no loop"
    least, most = min(one.steps), max(one.steps)
    steps = str(most) if least == most else f"{least}-{most}"
    return steps if len(one.steps) == 1 else f"{len(one.steps)} x {steps}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


_COLUMNS = (
    ("operation", "name"),
    ("field", "receptive_field"),
    ("halo", "halo"),
    ("rows/step", "rows_per_step"),
    ("line rows", "line_buffer_rows"),
    ("line bytes", "line_buffer_bytes"),
    ("recomputed", "recomputed_rows"),
)


def _table(one: Pass) -> list[str]:
    steps = " + ".join(map(str, one.steps)) or "no"
    lines = [
        f"  {one.name}: {steps} steps, line buffers {one.line_buffer_bytes:,} bytes"
        f", saved for the backward pass {one.saved_bytes:,} bytes"
    ]
    rows = [[str(getattr(o, field)) for _, field in _COLUMNS] for o in one.operations]
    table = [[title for title, _ in _COLUMNS], *rows]
    return [*lines, *(f"    {line}" for line in aligned(table))]
