"""What every buffer is for: its layer, the operation and line that made it, and its kind.

XLA's instructions carry JAX's name stack and source line. A fusion or a copy may have lost them;
then what it fuses, reads or feeds tells.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence

from lrjax.memory.assignment import Assignment, Index, Instruction, Shape, Value
from lrjax.memory.lifetimes import Piece
from lrjax.memory.profile import Buffer
from lrjax.scopes import LINE_BUFFERS

NO_SCOPE = "(no scope)"

# Name-stack entries that JAX's own transformations and control flow leave; no layer is called so.
_TRANSFORMED = re.compile(r"(?:jvp|transpose|vmap|linearize|pmap|remat|checkpoint)\((.*)\)")
_CALL = re.compile(r"(?:jit|pjit|xla_call|custom_jvp|custom_vjp)\(.*\)")
_CONTROL = re.compile(
    r"while|body|cond|scan|branch_\d+_fun|checkpoint|remat2?|rematted_computation|closed_call|"
    r"core_call|eval_jaxpr|custom_[jv][jv]p_call|custom_[jv][jv]p_call_jaxpr|shard_map|pjit|jit|"
    + LINE_BUFFERS
)

# Instructions that pass values on, or only hand them out.
_PASSING = {
    *("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("opt-barrier", "optimization-barrier", "async-start", "async-done", "copy-done"),
}
_COPYING = {"copy", "copy-start", "transpose"}
_FILLING = {"broadcast", "constant", "iota"}
_REACH = 8  # how many instructions away a layer is looked for


# --- Name stacks ---------------------------------------------------------------------------------


def _split(stack: str) -> list[str]:
    """Components of a name stack: slashes within parentheses do not separate."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(stack):
        depth += (character == "(") - (character == ")")
        if character == "/" and depth == 0:
            parts.append(stack[start:i])
            start = i + 1
    return [*parts, stack[start:]]


def _scopes(part: str) -> Iterator[str]:
    """The named scopes in one component."""
    while (inside := _TRANSFORMED.fullmatch(part)) is not None:
        part = inside[1]
    if "/" in part:
        for inner in _split(part):
            yield from _scopes(inner)
    elif part and not _CALL.fullmatch(part) and not _CONTROL.fullmatch(part):
        yield part


def layer_of(op_name: str) -> str:
    """Flax module path or named scopes of an instruction; ``""`` where it has none.

    XLA joins the names of operations it merged with semicolons: the first that has a layer counts.
    """
    for stack in op_name.split(";"):
        scopes = [s for part in _split(stack)[:-1] for s in _scopes(part)]
        if "checkpoint" in stack or "rematted_computation" in stack:
            scopes = _without_repetition(scopes)
        if scopes:
            return "/".join(scopes)
    return ""


def _without_repetition(scopes: list[str]) -> list[str]:
    """``jax.checkpoint`` names the scopes around it twice: outside and inside its body."""
    for count in range(len(scopes) // 2, 0, -1):
        if scopes[:count] == scopes[count : 2 * count]:
            return scopes[count:]
    return scopes


def operation_of(op_name: str) -> str:
    """The JAX primitive of an instruction, the last component of its name stack."""
    last = _split(op_name.split(";")[0])[-1]
    return "" if _CALL.fullmatch(last) else last


def _is_backward(op_name: str) -> bool:
    return "transpose(" in op_name or "rematted_computation" in op_name


# --- Instructions --------------------------------------------------------------------------------


class Attribution:
    """Answers for one compiled program."""

    def __init__(self, assignment: Assignment, steps: Sequence[Instruction]):
        self.instructions, self.computations = assignment.instructions, assignment.computations
        self.values = assignment.values
        scheduled = {c.id: c for c in self.computations.values() if c.is_scheduled}
        self.home = {i: c.id for c in scheduled.values() for i in c.instructions}
        self.callers = {
            callee: step for step in steps for callee in step.called if callee in scheduled
        }
        self.in_loops = _called_within_loops(assignment)
        self.users: dict[int, list[Instruction]] = {}
        for step in steps:
            for operand in step.operands:
                self.users.setdefault(operand, []).append(step)
        entry = self.computations[assignment.entry]
        self.argument_shapes = {
            tuple(sorted(i.shape.dimensions))
            for i in map(self.instructions.__getitem__, entry.instructions)
            if i.opcode == "parameter" and i.shape.dimensions
        }

    def buffer(self, piece: Piece) -> Buffer:
        """The piece of memory as a row of a profile."""
        value = self.representative(piece)
        made_by = self.instructions[value.instruction]
        is_argument = piece.allocation is not None and piece.allocation.is_parameter
        origin = made_by if is_argument else self._origin_of_piece(piece, made_by)
        shape = made_by.shape.at(value.index)
        index = "".join(f"{{{i}}}" for i in value.index)
        return Buffer(
            name=made_by.name + index,
            bytes=piece.bytes,
            shape=shape.dimensions,
            dtype=shape.dtype,
            operation=operation_of(origin.op_name) or made_by.opcode,
            layer=self._layer(piece, origin),
            kind=self.kind(piece, value, shape),
            source=origin.source or made_by.source,
            start=piece.start,
            end=piece.end,
        )

    def _layer(self, piece: Piece, origin: Instruction) -> str:
        if piece.allocation is not None and piece.allocation.is_parameter:
            return "(arguments)"
        if piece.allocation is not None and piece.allocation.is_constant:
            return "(constants)"
        return layer_of(origin.op_name) or NO_SCOPE

    def representative(self, piece: Piece) -> Value:
        """Of the values that share a piece of memory, the one that says most about it."""
        values = [self.values[v] for v in piece.values]
        if piece.allocation is not None:
            # An output's memory may serve smaller temporaries before.
            largest = max(v.bytes for v in values)
            values = [v for v in values if v.bytes == largest]
            if piece.allocation.is_output and not piece.allocation.is_parameter:
                values.reverse()
        return max(values, key=self._says)

    def _says(self, value: Value) -> int:
        instruction = self.instructions[value.instruction]
        if instruction.opcode in _PASSING:
            return 0
        if self._is_copy(instruction) or self._root(instruction).opcode in _FILLING:
            return 1
        return 3 if layer_of(self.described(instruction).op_name) else 2

    def _root(self, instruction: Instruction) -> Instruction:
        """What a fusion ends with, layout changes aside."""
        while instruction.opcode == "fusion" and instruction.called:
            computation = self.computations[instruction.called[0]]
            instruction = self.instructions[computation.root]
            while instruction.opcode in ("bitcast", "reshape") and instruction.operands:
                instruction = self.instructions[instruction.operands[0]]
        return instruction

    def _is_copy(self, instruction: Instruction) -> bool:
        return self._root(instruction).opcode in _COPYING

    @functools.cache  # noqa: B019  one object per profile, short-lived
    def described(self, instruction: Instruction) -> Instruction:
        """The instruction, or one fused into it, that has a layer; else itself."""
        if layer_of(instruction.op_name) or instruction.opcode in ("while", "conditional"):
            return instruction
        for callee in instruction.called:
            computation = self.computations[callee]
            for number in (computation.root, *reversed(computation.instructions)):
                inner = self.instructions[number]
                if layer_of(inner.op_name):
                    return inner
        return instruction

    @functools.cache  # noqa: B019
    def origin(self, instruction: Instruction) -> Instruction:
        """The nearest instruction that has a layer: itself, what it reads, or what reads it.

        Where none has, the nearest that has a name stack.
        """
        named = instruction
        for found in self._neighbours(instruction):
            described = self.described(found)
            if layer_of(described.op_name):
                return described
            if "/" in described.op_name and not named.op_name:
                named = described
        return named

    def _origin_of_piece(self, piece: Piece, made_by: Instruction) -> Instruction:
        """Where the memory's representative has no layer, that of another value in it."""
        found = self.origin(made_by)
        for member in self._members(piece):
            if layer_of(found.op_name):
                break
            other = self.origin(member)
            found = other if layer_of(other.op_name) else found
        return found

    def _neighbours(self, instruction: Instruction) -> Iterator[Instruction]:
        yield instruction
        for step in (self._read_by, self._readers_of):
            level, seen = [instruction], {instruction.id}
            for _ in range(_REACH):
                level = [n for i in level for n in step(i) if n.id not in seen]
                seen.update(n.id for n in level)
                yield from level

    def _read_by(self, instruction: Instruction) -> Iterable[Instruction]:
        """The instructions that made what this one reads, on the other side of loops too."""
        if instruction.opcode in ("while", "conditional", "parameter"):
            return []
        if instruction.opcode == "get-tuple-element":
            return self._made(instruction, ())
        found = [self._made(self.instructions[o], ()) for o in instruction.operands]
        # XLA shares one block of zeros among layers, under the name of one of them.
        return [
            made for several in found for made in several if self._root(made).opcode not in _FILLING
        ]

    def _made(self, instruction: Instruction, index: Index) -> list[Instruction]:
        """What made an element of a result: tuples, loops and branches only hand it on."""
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "get-tuple-element":
            inside = self.instructions[operands[0]]
            return self._made(inside, (instruction.tuple_index, *index))
        if opcode == "tuple" and index:
            return self._made(self.instructions[operands[index[0]]], index[1:])
        if opcode == "parameter":
            entered = self._passed_as(instruction)
            return [] if entered is None else self._made(entered, index)
        if opcode == "while":
            body = self.computations[instruction.called[0]]
            root = self.instructions[body.root]
            if root.opcode != "tuple" or not index:
                return []
            made = self.instructions[root.operands[index[0]]]
            return [] if made.opcode in ("get-tuple-element", "while") else [made]
        if opcode == "conditional":
            roots = [self.computations[branch].root for branch in instruction.called]
            found = [self._made(self.instructions[root], index) for root in roots]
            return [made for several in found for made in several]
        return [instruction]

    def _passed_as(self, parameter: Instruction) -> Instruction | None:
        """What the caller of a loop's body, a branch or a call passes as this parameter."""
        home = self.home.get(parameter.id, -1)
        caller = self.callers.get(home)
        if caller is None:
            return None
        position = parameter.parameter
        if caller.opcode == "conditional":
            position = 1 + caller.called.index(home)
        if position >= len(caller.operands):
            return None
        return self.instructions[caller.operands[position]]

    def _readers_of(self, instruction: Instruction) -> Iterable[Instruction]:
        yield from self._readers(instruction, (), set())
        # The result of a call, or of a copy that runs on the side, is its caller's.
        home = self.home.get(instruction.id, -1)
        caller = self.callers.get(home)
        if caller is None or caller.opcode in ("while", "conditional"):
            return
        if self.computations[home].root == instruction.id:
            yield caller

    def _readers(
        self, instruction: Instruction, index: Index, seen: set[tuple[int, Index]]
    ) -> Iterator[Instruction]:
        """What reads an element of a result, within loops and branches too."""
        if (instruction.id, index) in seen:
            return
        seen.add((instruction.id, index))
        for user in self.users.get(instruction.id, ()):
            if user.opcode == "get-tuple-element":
                if not index:
                    yield from self._readers(user, (), seen)
                elif index[0] == user.tuple_index:
                    yield from self._readers(user, index[1:], seen)
            elif user.opcode == "tuple":
                for position, operand in enumerate(user.operands):
                    if operand == instruction.id:
                        yield from self._readers(user, (position, *index), seen)
            elif user.opcode in ("while", "call", "conditional"):
                for number in self._entered(user, instruction.id):
                    yield from self._readers(self.instructions[number], index, seen)
            else:
                yield user

    def _entered(self, caller: Instruction, operand: int) -> Iterator[int]:
        """The parameters through which an operand enters the computations of a caller."""
        for position, number in enumerate(caller.operands):
            if number != operand or (caller.opcode == "conditional" and position == 0):
                continue
            if caller.opcode == "conditional":
                entered, parameter = [caller.called[position - 1]], 0
            else:
                entered, parameter = list(caller.called), position if caller.opcode == "call" else 0
            for computation in entered:
                for inner in self.computations[computation].instructions:
                    found = self.instructions[inner]
                    if found.opcode == "parameter" and found.parameter == parameter:
                        yield inner

    # --- Kinds -----------------------------------------------------------------------------------

    def kind(self, piece: Piece, value: Value, shape: Shape) -> str:
        """What the piece of memory is for; one of ``profile.KINDS``."""
        made_by = self.instructions[value.instruction]
        allocation = piece.allocation
        # XLA may keep a kernel's gradient with its dimensions in another order.
        has_argument_shape = tuple(sorted(shape.dimensions)) in self.argument_shapes
        is_gradient = has_argument_shape and self._backward(made_by)
        if allocation is not None:
            if allocation.is_parameter:
                return "arguments"
            if allocation.is_constant:
                return "constants"
            return "parameter gradients" if is_gradient else "outputs"
        if made_by.opcode == "custom-call" and value.index and shape.dtype in ("uint8", "int8"):
            return "convolution scratch"
        if self._is_line_buffer(piece):
            return LINE_BUFFERS.replace("_", " ")
        if is_gradient:
            return "parameter gradients"
        if self._is_carried(piece) or self._waits_for_backward(piece, made_by):
            return "saved maps"
        if self._is_copy(made_by):
            return "copies"
        return "step intermediates"

    def _members(self, piece: Piece) -> Iterator[Instruction]:
        for v in piece.values:
            yield self.instructions[self.values[v].instruction]

    def _is_line_buffer(self, piece: Piece) -> bool:
        return self._is_carried(piece) and any(
            LINE_BUFFERS in self._copied(member).op_name for member in self._members(piece)
        )

    def _copied(self, instruction: Instruction) -> Instruction:
        """What a copy is a copy of; any other instruction itself."""
        is_copy = instruction.opcode not in _PASSING and self._is_copy(instruction)
        return self.origin(instruction) if is_copy else self.described(instruction)

    def _is_carried(self, piece: Piece) -> bool:
        return any(
            member.opcode == "while" or self._enters_loop(member) for member in self._members(piece)
        )

    @functools.cache  # noqa: B019
    def _enters_loop(self, instruction: Instruction) -> bool:
        """Whether a loop takes the result, alone or in its tuple."""
        users = self.users.get(instruction.id, ())
        inside = [u for t in users if t.opcode == "tuple" for u in self.users.get(t.id, ())]
        return any(user.opcode == "while" for user in (*users, *inside))

    def _backward(self, instruction: Instruction) -> bool:
        return _is_backward(self.origin(instruction).op_name)

    def _waits_for_backward(self, piece: Piece, made_by: Instruction) -> bool:
        """Whether a forward operation made it and a backward one reads it."""
        if self.home.get(made_by.id) in self.in_loops or self._backward(made_by):
            return False
        return any(
            _is_backward(self.described(reader).op_name)
            for member in self._members(piece)
            for reader in self._readers_of(member)
        )


def _called_within_loops(assignment: Assignment) -> set[int]:
    """Computations that run once per step of a loop."""
    found: set[int] = set()
    waiting = [
        callee
        for instruction in assignment.instructions.values()
        if instruction.opcode == "while"
        for callee in instruction.called
    ]
    while waiting:
        number = waiting.pop()
        if number in found:
            continue
        found.add(number)
        for i in assignment.computations[number].instructions:
            waiting += assignment.instructions[i].called
    return found
