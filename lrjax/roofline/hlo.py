"""The text of an optimised XLA program as values.

Read are shapes, operands, attributes and metadata of every instruction of every computation; what
an instruction does is ``traffic``'s and ``work``'s business. The text is what
``jax.stages.Compiled.as_text()`` gives.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_WITHOUT_BITS = {"pred": 1, "token": 0, "opaque": 0}  # bytes of types whose names tell none
_BITS = re.compile(r"[a-z]+(\d+)")
_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([\d,]*)\](\{[^{}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-<>]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_COMMENT = re.compile(r"/\*.*?\*/")
_PAIRS = {"(": ")", "{": "}", "[": "]"}
# XLA's number of the host's memory in a layout.
_IN_HOST_MEMORY = "S(5)"


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's type.

    Attributes:
      dtype: as XLA writes it, such as ``"bf16"``.
      sizes: of its axes.
      is_on_host: whether it is in the host's memory.
    """

    dtype: str
    sizes: tuple[int, ...]
    is_on_host: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def bytes(self) -> int:
        return self.elements * _element_bytes(self.dtype)


@functools.cache
def _element_bytes(dtype: str) -> int:
    """Bytes of an element; numbers of less than a byte take one."""
    if dtype in _WITHOUT_BITS:
        return _WITHOUT_BITS[dtype]
    bits = _BITS.match(dtype)
    if bits is None:
        raise ValueError(f"text: no type of XLA's is called {dtype!r}")
    return max(int(bits.group(1)) // 8, 1)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in the program.
      opcode: such as ``"fusion"``.
      shapes: of its result, several for a tuple.
      operands: names; for a parameter none.
      number: of a parameter.
      attributes: the rest of the line.
      is_root: its result is the computation's.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    number: int
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @property
    def elements(self) -> int:
        return sum(shape.elements for shape in self.shapes)

    def attribute(self, name: str) -> str | None:
        """What stands behind ``name=``, without braces and quotes; None without such."""
        found = re.search(rf"\b{name}=(?:\{{([^{{}}]*)\}}|\"([^\"]*)\"|([^,\s]+))", self.attributes)
        return next((group for group in found.groups() if group is not None), "") if found else None

    def called(self, *names: str) -> list[str]:
        """Computations that the attributes of these names call."""
        found = (self.attribute(name) for name in names)
        return [
            computation.strip().lstrip("%")
            for listed in found
            if listed
            for computation in listed.split(",")
        ]

    @functools.cached_property
    def trip_count(self) -> int | None:
        """How often a loop runs, None where XLA does not know."""
        found = re.search(r'known_trip_count"?:\{"n":"(\d+)"', self.attributes)
        return int(found.group(1)) if found else None

    @property
    def name_stack(self) -> str:
        """The JAX name stack that the instruction was traced under."""
        return self.attribute("op_name") or ""

    @property
    def frame(self) -> int | None:
        """The number of its source line among ``Program.sources``."""
        found = re.search(r"\bstack_frame_id=(\d+)", self.attributes)
        return int(found.group(1)) if found else None


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: all by name.
      entry: the name of the first to run.
      sources: ``file:line`` of every stack frame, by its number.
    """

    computations: dict[str, Computation]
    entry: str
    sources: dict[int, str] = dataclasses.field(default_factory=dict)

    def source(self, instruction: Instruction) -> str:
        """``file:line``, ``""`` where it is not known (jax before 0.10)."""
        return self.sources.get(instruction.frame or 0, "")


def parse(text: str) -> Program:
    """Read an optimised program.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    entry = None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header is not None:
            current = computations.setdefault(header.group(2), {})
            entry = header.group(2) if header.group(1) else entry
        elif current is not None and (instruction := _instruction(line)) is not None:
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of a compiled XLA program")
    return Program(computations, entry, _sources(text))


def _sources(text: str) -> dict[int, str]:
    files = dict(re.findall(r'^(\d+) "(.*)"$', text.partition("\nFunctionNames")[0], re.MULTILINE))
    lines = {
        number: f"{files.get(file, '')}:{line}"
        for number, file, line in re.findall(
            r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)", text, re.MULTILINE
        )
    }
    frames = re.findall(r"^(\d+) \{file_location_id=(\d+)", text, re.MULTILINE)
    return {int(frame): lines[location] for frame, location in frames if location in lines}


def _instruction(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if found is None:
        return None
    rest = _COMMENT.sub("", line[found.end() :])
    stop = _closing(rest, 0) + 1 if rest.startswith("(") else _end_of_shape(rest)
    shapes, rest = tuple(_shapes(rest[:stop])), rest[stop:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    opcode, between = rest[:opening], rest[opening + 1 : closing]
    is_parameter = opcode == "parameter"
    return Instruction(
        name=found.group(2),
        opcode=opcode,
        shapes=shapes,
        operands=() if is_parameter else tuple(re.findall(r"%([\w.\-]+)", between)),
        number=int(between) if is_parameter else -1,
        attributes=rest[closing + 1 :],
        is_root=bool(found.group(1)),
    )


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, sizes, layout in _SHAPE.findall(text):
        numbers = tuple(int(size) for size in sizes.split(",") if size)
        yield Shape(dtype, numbers, _IN_HOST_MEMORY in layout)


def _end_of_shape(text: str) -> int:
    found = _SHAPE.match(text)
    if found is None:
        raise ValueError(f"no shape in {text[:60]!r}")
    return found.end()


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at ``start`` closes."""
    closing: list[str] = []
    for i in range(start, len(text)):
        if text[i] in _PAIRS:
            closing.append(_PAIRS[text[i]])
        elif closing and text[i] == closing[-1]:
            closing.pop()
            if not closing:
                return i
    raise ValueError(f"brackets that do not close in {text[start : start + 60]!r}")
