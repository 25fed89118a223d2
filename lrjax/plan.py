"""``Plan``: how a function runs under a memory budget, as a value that can be printed and saved.

A plan knows the function it was made for by its ``Fingerprint`` and runs no other.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lrjax.files import write_whole
from lrjax.fingerprint import Fingerprint, fingerprint
from lrjax.groups import tree_of
from lrjax.rowgraph.segments import Cuttable
from lrjax.rowgraph.tracing import Traced, trace
from lrjax.rules.geometry import ceil_div
from lrjax.strategies import MicroBatches, Strategy, named
from lrjax.text import MIB, aligned

FORMAT = 5


@dataclasses.dataclass(frozen=True, init=False)
class Choice:
    """How one segment runs.

    Attributes:
      strategy: one of ``lrjax.strategies``; made from its name, too. Of a ``MicroBatches`` the
        strategy within.
      num_blocks: steps of its row loops, where it has any.
      micro_batches: parts of the batch that run one after the other.
      offload: the maps that the segment gives wait for their reader's backward pass in the host's
        memory, where they are written and read by blocks of rows, and so do their gradients.
        Maps that several segments read, or the caller gets, stay on the device.
    """

    strategy: Strategy
    num_blocks: int = 1
    micro_batches: int = 1
    offload: bool = False

    def __init__(
        self,
        strategy: Strategy | str,
        num_blocks: int = 1,
        micro_batches: int = 1,
        offload: bool = False,
    ):
        found = named(strategy)
        if isinstance(found, MicroBatches):
            micro_batches *= found.parts
            found = found.strategy
        values = (found, num_blocks, micro_batches, offload)
        for field, value in zip(dataclasses.fields(self), values, strict=True):
            object.__setattr__(self, field.name, value)

    @property
    def runner(self) -> Strategy:
        """The strategy, around micro-batches where there are several."""
        if self.micro_batches == 1:
            return self.strategy
        return MicroBatches(self.strategy, self.micro_batches)

    @property
    def text(self) -> str:
        """Strategy and micro-batches, for tables."""
        return self.runner.name


class PlanMismatchError(ValueError):
    """A plan was given a function, shapes or a mesh that it was not made for.

    The message has the first difference. Make a plan for this call with ``lrjax.plan``, or call
    what the plan was made for.
    """


@dataclasses.dataclass(frozen=True)
class SegmentPlan:
    """One segment of a plan.

    Attributes:
      start, stop: its operations on rows, counted through the program, ``stop`` exclusive.
      choice: strategy, blocks, micro-batches, offloading.
      inputs: types of the maps that enter it and wait for its backward pass.
      height: rows that its blocks divide, of a device's share; 0 where it runs by whole maps.
      operations: floating-point operations of its passes.
      saved_bytes: what it holds between its passes, without what waits on the host.
      forward_bytes, backward_bytes: the most that is alive while its passes run, without what
        other segments hold, arguments and gradients.
      offloaded_bytes: of the maps it gives, what waits in the host's memory.
      seconds: predicted, of both passes.
    """

    start: int
    stop: int
    choice: Choice
    inputs: tuple[str, ...]
    height: int
    operations: float
    saved_bytes: float
    forward_bytes: float
    backward_bytes: float
    offloaded_bytes: float = 0.0
    seconds: float = 0.0

    @property
    def blocks(self) -> tuple[int, ...]:
        """Where the blocks of rows end; the last may be smaller than the others."""
        if not self.height or not self.choice.strategy.by_rows:
            return ()
        rows = ceil_div(self.height, self.choice.num_blocks)
        return (*range(rows, self.height, rows), self.height)

    @property
    def fate(self) -> str:
        """What becomes of the segment's maps between its passes."""
        kept = self.choice.strategy.fate
        given = f"; {_mib(self.offloaded_bytes)} MiB that it gives wait on the host"
        return kept + given if self.choice.offload else kept


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a function runs under a memory budget; made by ``lrjax.plan``, run by ``lrjax.rowwise``.

    Print it for a table.

    Attributes:
      fingerprint: the function and shapes it was made for.
      wrt: numbers of the flat inputs that the gradient is taken of.
      segments: in order.
      target: the device it was compiled for; None for JAX's default.
      jax_version: that compiled it.
      budget_bytes: what it had to fit in. All bytes, operations and seconds are those of one
        device.
      fixed_bytes: arguments and gradients.
      predicted_peak_bytes: the cost model's peak of the gradient.
      verified_peak_bytes: XLA's peak of the gradient, arguments and gradients included.
      column_operations: floating-point operations of the gradient in ordinary execution.
      compilations: programs compiled to find it.
      host_bytes: what XLA sets aside of the host's memory, for maps that wait there.
      predicted_seconds: the cost model's time of the gradient.
      roofline_seconds: the time of the compiled program by ``lrjax.roofline``; None for targets
        other than GPUs.
      row_mesh_axis: the mesh axis along which devices share the rows; None for one device.
      devices: how many do.
      groups: ranges of segments, ``stop`` exclusive, that run under one checkpoint: the backward
        pass first runs them all again. One may be within another.
    """

    fingerprint: Fingerprint
    wrt: tuple[int, ...]
    segments: tuple[SegmentPlan, ...]
    target: str | None
    jax_version: str
    budget_bytes: int
    fixed_bytes: int
    predicted_peak_bytes: int
    verified_peak_bytes: int | None
    column_operations: float
    compilations: int
    host_bytes: int = 0
    predicted_seconds: float = 0.0
    roofline_seconds: float | None = None
    row_mesh_axis: str | None = None
    devices: int = 1
    groups: tuple[tuple[int, int], ...] = ()

    @property
    def cuts(self) -> tuple[int, ...]:
        """Operations on rows before each cut."""
        return tuple(segment.start for segment in self.segments[1:])

    @property
    def choices(self) -> tuple[Choice, ...]:
        """How each segment runs, in the order of the forward pass."""
        return tuple(segment.choice for segment in self.segments)

    @property
    def operations(self) -> float:
        """Operations as a multiple of ordinary execution's."""
        return sum(s.operations for s in self.segments) / max(self.column_operations, 1.0)

    @property
    def seconds(self) -> float:
        """Of the compiled program, where its time is known; else predicted."""
        return self.predicted_seconds if self.roofline_seconds is None else self.roofline_seconds

    @property
    def is_column(self) -> bool:
        """Nothing is computed by rows, again or in parts."""
        return all(choice == Choice("column") for choice in self.choices)

    def check(self, traced: Traced) -> None:
        """Refuse a call that the plan was not made for.

        Raises:
          PlanMismatchError: with the first difference.
        """
        difference = self.fingerprint.difference(fingerprint(traced))
        operations = len(Cuttable.of(traced.program, traced.axes).operations)
        if difference is None and self.segments[-1].stop != operations:
            difference = (
                f"its segments end at operation {self.segments[-1].stop}, this call has "
                f"{operations} operations on rows"
            )
        if difference is not None:
            raise PlanMismatchError(
                f"plan: it was made for another function or other shapes: {difference}. Make a "
                "plan for this call with lrjax.plan."
            )

    def check_mesh(self, axis: str | None, devices: int | None = None) -> None:
        """Refuse another mesh than the plan was made for.

        Args:
          axis: the mesh axis along which rows are divided; None for one device.
          devices: how many share the rows; None if that is not known yet.

        Raises:
          PlanMismatchError: with what to do.
        """
        if self.row_mesh_axis is None and axis is not None:
            raise PlanMismatchError(
                "plan: it was made for one device, with all rows on it, and "
                f"row_mesh_axis={axis!r} divides them; make one with lrjax.plan(..., mesh=mesh, "
                f"row_mesh_axis={axis!r}), or leave mesh and row_mesh_axis out."
            )
        is_other_axis = axis != self.row_mesh_axis
        if is_other_axis or devices not in (None, self.devices):
            found = f"row_mesh_axis={axis!r}" if is_other_axis else f"{devices} devices along it"
            raise PlanMismatchError(
                f"plan: it was made for {self.devices} devices that share rows along the mesh axis "
                f"{self.row_mesh_axis!r}, not for {found}; give such a mesh, or make a plan for "
                "this one with lrjax.plan(..., mesh=mesh, row_mesh_axis=axis)."
            )

    def to_json(self) -> str:
        """The plan as JSON text."""
        data = {"lrjax_plan": FORMAT, **dataclasses.asdict(self)}
        return json.dumps(data, indent=1, default=lambda strategy: strategy.name) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that ``to_json`` wrote.

        Raises:
          ValueError: the text is truncated, is no plan or is one of another version.
        """
        return _parsed(text, "the text")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a file, whole or not at all."""
        write_whole(path, self.to_json())

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        fun: Callable[..., Any] | None = None,
        *args: Any,
        in_axes: Any = None,
    ) -> Plan:
        """Read a plan.

        Args:
          path: a file that ``save`` wrote.
          fun, args, in_axes: the call it is wanted for; without, that is judged when it runs.

        Raises:
          ValueError: the file is truncated, is no plan or is one of another version.
          PlanMismatchError: it is for another function or other shapes; says what differs.

        Example:
          >>> plan = lrjax.Plan.load("vgg16.json", loss, params, images, in_axes=(None, 1))
        """
        plan = _parsed(Path(path).read_bytes(), os.fspath(path))
        if fun is not None:
            plan.check(trace(fun, in_axes, args, {}))
        return plan

    def __repr__(self) -> str:
        segments = f"{len(self.segments)} segment" + "s" * (len(self.segments) != 1)
        return f"Plan({self.summary}, {segments}; print it for a table)"

    def __str__(self) -> str:
        notes = [
            f"segments {start} to {stop - 1}: a group, run again before its backward pass"
            for start, stop in self.groups
        ]
        return "\n".join([self.summary, *_table(self.segments), *notes])

    @property
    def summary(self) -> str:
        """One line: peak, budget, time, operations."""
        where, each = self.target or "the default device", ""
        if self.row_mesh_axis is not None:
            where += f" x {self.devices} (rows along the mesh axis {self.row_mesh_axis!r})"
            each = " a device"
        verified = self.verified_peak_bytes
        peak = (
            f"predicted {_mib(self.predicted_peak_bytes)}, not compiled"
            if verified is None
            else f"peak {_mib(verified)} (predicted {_mib(self.predicted_peak_bytes)})"
        )
        host = f"{_mib(self.host_bytes)} MiB of the host's, " if self.host_bytes else ""
        return (
            f"plan for {where}, jax {self.jax_version}: {peak} of {_mib(self.budget_bytes)} "
            f"MiB{each}, {host}{self.seconds * 1e3:,.2f} ms"
            f"{' (predicted)' if self.roofline_seconds is None else ' by its roofline'}, "
            f"{self.operations:.3f} x column's operations, {self.compilations} compilations"
        )


def _mib(count: float) -> str:
    return f"{count / MIB:,.1f}"


_COLUMNS = (
    *("segment", "operations", "strategy", "blocks"),
    *("ms", "saved MiB", "forward", "backward", ""),
)


def _table(segments: Sequence[SegmentPlan]) -> list[str]:
    rows = [list(_COLUMNS)]
    for i, segment in enumerate(segments):
        choice, blocks = segment.choice, segment.blocks
        size = f"{len(blocks)} of {blocks[0]} rows" if blocks else ""
        numbers = (segment.saved_bytes, segment.forward_bytes, segment.backward_bytes)
        span = f"{segment.start}-{segment.stop - 1}"
        time = f"{segment.seconds * 1e3:,.2f}"
        rows.append([str(i), span, choice.text, size, time, *map(_mib, numbers), segment.fate])
    return aligned(rows, left=(2, 3, 8))


# --- Reading -------------------------------------------------------------------------------------


def _parsed(text: str | bytes, name: str) -> Plan:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, or no text
        raise ValueError(
            f"plan: {name} is truncated or is no JSON ({error}); make the plan again and save it."
        ) from None
    if not isinstance(data, dict) or "lrjax_plan" not in data:
        raise ValueError(f"plan: {name} is no plan of lrjax; give a file that Plan.save wrote.")
    if data["lrjax_plan"] != FORMAT:
        raise ValueError(
            f"plan: {name} has format {data['lrjax_plan']!r}, this version of lrjax reads format "
            f"{FORMAT}; make the plan again."
        )
    try:
        return _plan_of(data)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"plan: {name} is damaged ({type(error).__name__}: {error}); make the plan again."
        ) from None


def _plan_of(data: dict[str, Any]) -> Plan:
    segments = tuple(map(_segment_of, _list(data, "segments")))
    stops = [0, *(segment.stop for segment in segments)]
    if not segments or stops[:-1] != [segment.start for segment in segments]:
        raise ValueError("its segments do not follow each other")
    if stops != sorted(set(stops)):
        raise ValueError("its segments are empty")
    found = {name: _list(data["fingerprint"], name) for name in ("inputs", "operations")}
    groups = tuple((int(start), int(stop)) for start, stop in _list(data, "groups"))
    tree_of(groups, len(segments))
    verified, roofline = data["verified_peak_bytes"], data["roofline_seconds"]
    target, axis, devices = data["target"], data["row_mesh_axis"], _count(data, "devices")
    if not (axis is None or isinstance(axis, str)) or (axis is None and devices > 1):
        raise ValueError(f"{devices} devices share rows along {axis!r}")
    return Plan(
        fingerprint=Fingerprint(**{name: tuple(map(str, x)) for name, x in found.items()}),
        wrt=tuple(map(int, _list(data, "wrt"))),
        segments=segments,
        target=None if target is None else str(target),
        jax_version=str(data["jax_version"]),
        verified_peak_bytes=None if verified is None else int(verified),
        column_operations=float(data["column_operations"]),
        predicted_seconds=float(data["predicted_seconds"]),
        roofline_seconds=None if roofline is None else float(roofline),
        row_mesh_axis=axis,
        devices=devices,
        groups=groups,
        **{
            name: int(data[name])
            for name in (
                *("budget_bytes", "fixed_bytes", "predicted_peak_bytes"),
                *("compilations", "host_bytes"),
            )
        },
    )


def _list(data: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(data[name], list):
        raise TypeError(f"{name} is no list")
    return data[name]


def _count(data: dict[str, Any], name: str) -> int:
    count = data[name]
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{name} is {count!r}")
    return count


def _segment_of(data: dict[str, Any]) -> SegmentPlan:
    for name in ("num_blocks", "micro_batches"):
        _count(data["choice"], name)
    choice = Choice(**data["choice"])
    if choice.strategy.by_rows and choice.num_blocks > max(int(data["height"]), 1):
        raise ValueError(f"{choice.num_blocks} blocks of {data['height']} rows")
    if not isinstance(choice.offload, bool):
        raise ValueError(f"offload is {choice.offload!r}, neither true nor false")
    numbers = (
        *("operations", "saved_bytes", "forward_bytes"),
        *("backward_bytes", "seconds", "offloaded_bytes"),
    )
    return SegmentPlan(
        start=int(data["start"]),
        stop=int(data["stop"]),
        choice=choice,
        inputs=tuple(map(str, _list(data, "inputs"))),
        height=int(data["height"]),
        **{name: float(data[name]) for name in numbers},
    )
