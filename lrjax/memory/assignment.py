"""What XLA says of a compiled program's memory: its schedule, its values and where they are put.

The only module that knows XLA's formats. It reads a ``HloProto`` (module and buffer assignment), as
``--xla_dump_to`` with ``--xla_dump_hlo_as_proto`` writes it after optimisation, or the two parts
of one: the module of an executable and ``memory_analysis()``'s serialised buffer assignment.

Field numbers are those of ``xla/service/hlo.proto`` and ``xla/xla_data.proto``. Fields that a
version does not write are left at their defaults; unknown ones are ignored.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from lrjax.memory.wire import DecodeError, Message

# XLA's PrimitiveType, as JAX names it.
_DTYPES = {
    **{1: "bool", 2: "int8", 3: "int16", 4: "int32", 5: "int64"},
    **{6: "uint8", 7: "uint16", 8: "uint32", 9: "uint64", 10: "float16", 11: "float32"},
    **{12: "float64", 13: "tuple", 14: "opaque", 15: "complex64", 16: "bfloat16", 17: "token"},
    **{18: "complex128", 19: "float8_e5m2", 20: "float8_e4m3fn", 21: "int4", 22: "uint4"},
    **{23: "float8_e4m3b11fnuz", 24: "float8_e5m2fnuz", 25: "float8_e4m3fnuz", 26: "int2"},
    **{27: "uint2", 28: "float8_e4m3", 29: "float8_e3m4", 32: "float4_e2m1fn"},
    **{33: "float8_e8m0fnu"},
}

# XLA's colour of a value in the host's memory, on GPU and TPU.
HOST_COLOR = 5

Index = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's shape, or a tuple of shapes."""

    dtype: str
    dimensions: tuple[int, ...]
    elements: tuple[Shape, ...]

    def at(self, index: Index) -> Shape:
        """The shape within a tuple; this one where there is no such element."""
        shape = self
        for i in index:
            if i >= len(shape.elements):
                return self
            shape = shape.elements[i]
        return shape


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One operation of the compiled program.

    Attributes:
      id: unique in its module.
      name: unique in its module.
      opcode: XLA's, e.g. ``"fusion"``.
      shape: of its result.
      op_name: the JAX name stack and primitive, e.g. ``"jit(f)/jvp(Net)/conv1/add"``.
      source: ``"file.py:12"`` or ``""``.
      operands: ids of instructions.
      called: ids of computations.
      tuple_index: of a ``get-tuple-element``.
      parameter: position of a ``parameter``.
    """

    id: int
    name: str
    opcode: str
    shape: Shape
    op_name: str
    source: str
    operands: tuple[int, ...]
    called: tuple[int, ...]
    tuple_index: int
    parameter: int


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of the compiled program; ``instructions`` are ids, in order of execution."""

    id: int
    name: str
    instructions: tuple[int, ...]
    root: int
    is_scheduled: bool


@dataclasses.dataclass(frozen=True)
class Value:
    """One array that needs memory: an element of an instruction's result."""

    id: int
    bytes: int
    color: int
    instruction: int
    index: Index


@dataclasses.dataclass(frozen=True)
class Allocation:
    """A piece of memory that values are put in, as ``(value, offset, bytes)``."""

    index: int
    bytes: int
    color: int
    is_thread_local: bool
    is_parameter: bool
    is_constant: bool
    is_output: bool
    assigned: tuple[tuple[int, int, int], ...]

    @property
    def is_temporary(self) -> bool:
        """Whether it is neither argument nor constant nor output."""
        return not (self.is_thread_local or self.is_parameter or self.is_constant or self.is_output)


@dataclasses.dataclass(frozen=True)
class Event:
    """A step of XLA's heap simulation: ``kind`` is ``"alloc"``, ``"free"`` or ``"share"``."""

    kind: str
    value: int
    instruction: int
    shared_with: int


@dataclasses.dataclass(frozen=True)
class Assignment:
    """A compiled program's instructions, values and allocations.

    Attributes:
      instructions: by id.
      computations: by id.
      entry: the id of the computation that is the program.
      values: by id.
      allocations: all of them.
      traces: XLA's simulations of its heaps, where it kept them.
    """

    instructions: dict[int, Instruction]
    computations: dict[int, Computation]
    entry: int
    values: dict[int, Value]
    allocations: tuple[Allocation, ...]
    traces: tuple[tuple[Event, ...], ...]

    def __repr__(self) -> str:
        return (
            f"Assignment({len(self.instructions)} instructions, {len(self.values)} values, "
            f"{len(self.allocations)} allocations)"
        )


def read_dump(path: str | Path) -> Assignment:
    """The assignment in a dump file, or in the directory given to ``--xla_dump_to``.

    Raises:
      FileNotFoundError: no such file, or none with a buffer assignment in the directory.
      ValueError: the file is not a ``HloProto`` with a buffer assignment.
    """
    file = _dump_file(Path(path))
    try:
        proto = Message(file.read_bytes())
        return parse(proto.message(1), proto.message(3))
    except DecodeError as error:
        raise ValueError(
            f"{file} is not an XLA dump lrjax can read: {error}. Write one with "
            "XLA_FLAGS='--xla_dump_to=DIRECTORY --xla_dump_hlo_as_proto'."
        ) from error


def _dump_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(path.rglob("*after_optimizations.hlo.pb"), key=lambda f: f.stat().st_size)
    if not found:
        raise FileNotFoundError(
            f"{path} has no *after_optimizations.hlo.pb: dump with "
            "XLA_FLAGS='--xla_dump_to=DIRECTORY --xla_dump_hlo_as_proto' and compilation cache off."
        )
    return found[-1]


def parse(module: Message, assignment: Message) -> Assignment:
    """Decode a ``HloModuleProto`` and its ``BufferAssignmentProto``.

    Raises:
      DecodeError: the bytes are something else, or the two do not belong together.
    """
    instructions, computations, entry = _parse_module(module)
    values = [_parse_value(m, instructions) for m in assignment.messages(1)]
    if not values or not instructions:
        raise DecodeError("there is no program with a buffer assignment in it")
    by_name = {i.name: i.id for i in instructions.values()}
    return Assignment(
        instructions,
        computations,
        entry,
        {v.id: v for v in values},
        tuple(_parse_allocation(m) for m in assignment.messages(3)),
        tuple(_parse_trace(m, by_name) for m in assignment.messages(4)),
    )


# --- The module ----------------------------------------------------------------------------------


def _parse_module(
    module: Message,
) -> tuple[dict[int, Instruction], dict[int, Computation], int]:
    schedule = {e.integer(1): e.message(2).integers(1) for e in module.message(7).messages(1)}
    frames = _Frames(module.message(17))
    instructions: dict[int, Instruction] = {}
    computations: dict[int, Computation] = {}
    for proto in module.messages(3):
        own = [_parse_instruction(m, frames) for m in proto.messages(2)]
        instructions.update((i.id, i) for i in own)
        number = proto.integer(5)
        order = schedule.get(number, [i.id for i in own])
        computations[number] = Computation(
            number, proto.text(1), tuple(order), proto.integer(6), number in schedule
        )
    entry = module.integer(6)
    if entry not in computations:
        raise DecodeError("the program has no entry computation")
    return instructions, computations, entry


def _parse_instruction(proto: Message, frames: _Frames) -> Instruction:
    metadata = proto.message(7)
    file, line = metadata.text(3), metadata.integer(4)
    source = frames.source(metadata.integer(15)) or (f"{file}:{line}" if file else "")
    return Instruction(
        id=proto.integer(35),
        name=proto.text(1),
        opcode=proto.text(2),
        shape=_parse_shape(proto.message(3)),
        op_name=metadata.text(2),
        source=source,
        operands=tuple(proto.integers(36)),
        called=tuple(proto.integers(38)),
        tuple_index=proto.integer(13),
        parameter=proto.integer(9),
    )


def _parse_shape(proto: Message) -> Shape:
    dtype = _DTYPES.get(proto.integer(2), f"type {proto.integer(2)}")
    elements = tuple(map(_parse_shape, proto.messages(4)))
    return Shape(dtype, tuple(proto.integers(3)), elements)


# Files whose lines are no answer to "which line of mine": libraries that call JAX for their users.
_LIBRARIES = re.compile(r"/(?:flax|optax|chex|equinox|haiku|jax|lrjax(?!/models/))/[^:]*\.py$")


class _Frames:
    """Stack frames, numbered from 1, innermost first by their parents."""

    def __init__(self, proto: Message):
        self.files = proto.texts(1)
        self.locations = [(m.integer(1), m.integer(3)) for m in proto.messages(3)]
        self.frames = [(m.integer(1), m.integer(2)) for m in proto.messages(4)]

    def source(self, number: int) -> str:
        """``file:line`` of the innermost frame outside libraries; ``""`` where there is none."""
        innermost = ""
        for _ in range(len(self.frames)):
            if not 0 < number <= len(self.frames):
                break
            location, number = self.frames[number - 1]
            if not 0 < location <= len(self.locations):
                break
            file, line = self.locations[location - 1]
            if 0 < file <= len(self.files):
                name = self.files[file - 1]
                if not _LIBRARIES.search(name):
                    return f"{name}:{line}"
                innermost = innermost or f"{name}:{line}"
        return innermost


# --- The buffer assignment -----------------------------------------------------------------------


def _parse_value(proto: Message, instructions: dict[int, Instruction]) -> Value:
    place = proto.message(3)
    number = place.integer(4)
    if number not in instructions:
        raise DecodeError(f"a value is made by instruction {number}, which is not in the program")
    return Value(
        proto.integer(1), proto.integer(2), proto.integer(4), number, tuple(place.integers(3))
    )


def _parse_allocation(proto: Message) -> Allocation:
    return Allocation(
        index=proto.integer(1),
        bytes=proto.integer(2),
        color=proto.integer(8),
        is_thread_local=bool(proto.integer(3)),
        is_parameter=bool(proto.integer(5)),
        is_constant=bool(proto.integer(12)),
        is_output=bool(proto.integer(7)),
        assigned=tuple((m.integer(1), m.integer(2), m.integer(3)) for m in proto.messages(9)),
    )


_EVENTS = ("alloc", "free", "share")


def _parse_trace(proto: Message, by_name: dict[str, int]) -> tuple[Event, ...]:
    events = []
    for m in proto.messages(1):
        kind, name = m.integer(1), m.text(4)
        if kind >= len(_EVENTS) or name not in by_name:
            raise DecodeError(f"event {kind} at {name!r} of the heap simulation is unknown")
        events.append(Event(_EVENTS[kind], m.integer(2), by_name[name], m.integer(5)))
    return tuple(events)


# --- The order of execution ----------------------------------------------------------------------


def schedule(assignment: Assignment) -> tuple[Instruction, ...]:
    """Every scheduled instruction in order of execution; bodies of loops and calls appear once.

    A body comes before the instruction that calls it, as in XLA's heap simulation; a loop's
    condition comes before its body.
    """
    steps: list[Instruction] = []
    visited: set[int] = set()

    def visit(computation: Computation) -> None:
        if computation.id in visited:
            return
        visited.add(computation.id)
        for number in computation.instructions:
            instruction = assignment.instructions[number]
            for callee in _callees(instruction):
                if assignment.computations[callee].is_scheduled:
                    visit(assignment.computations[callee])
            steps.append(instruction)

    visit(assignment.computations[assignment.entry])
    return tuple(steps)


def _callees(instruction: Instruction) -> Sequence[int]:
    return instruction.called[::-1] if instruction.opcode == "while" else instruction.called
