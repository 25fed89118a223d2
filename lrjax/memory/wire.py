"""Read protocol buffers without their definitions: fields by number, unknown ones ignored.

The wheels of JAX carry none of XLA's message classes. The wire format is documented and stable
(https://protobuf.dev/programming-guides/encoding), and field numbers never change their meaning.
"""

from __future__ import annotations

from typing import Any

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class DecodeError(ValueError):
    """The bytes are no message, or not the one they are taken for."""


class Message:
    """One message: its fields by number, decoded when asked for."""

    def __init__(self, data: bytes | memoryview):
        self._fields: dict[int, list[Any]] = {}
        data = memoryview(data)
        position = 0
        while position < len(data):
            position = self._read_field(data, position)

    def _read_field(self, data: memoryview, position: int) -> int:
        tag, position = _varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        value: Any
        if wire_type == _VARINT:
            value, position = _varint(data, position)
        elif wire_type == _BYTES:
            size, start = _varint(data, position)
            position = start + size
            value = data[start:position]
        elif wire_type in (_FIXED64, _FIXED32):
            start, position = position, position + (8 if wire_type == _FIXED64 else 4)
            value = data[start:position]
        else:
            raise DecodeError(f"field {number} has the unknown wire type {wire_type}")
        if number == 0 or position > len(data):
            raise DecodeError(f"field {number} runs beyond the end of its message")
        self._fields.setdefault(number, []).append(value)
        return position

    def integer(self, number: int) -> int:
        """The last value of an integer field, as a signed 64-bit number; 0 where it is absent."""
        values = self.integers(number)
        return values[-1] if values else 0

    def integers(self, number: int) -> list[int]:
        """Every value of a repeated integer field, packed or not."""
        values = []
        for value in self._fields.get(number, ()):
            if isinstance(value, int):
                values.append(_signed(value))
                continue
            position = 0
            while position < len(value):
                item, position = _varint(value, position)
                values.append(_signed(item))
        return values

    def text(self, number: int) -> str:
        """The last value of a string field; ``""`` where it is absent."""
        values = self.texts(number)
        return values[-1] if values else ""

    def texts(self, number: int) -> list[str]:
        """Every value of a repeated string field."""
        return [str(_bytes(v, number), "utf-8", "replace") for v in self._fields.get(number, ())]

    def message(self, number: int) -> Message:
        """The last value of a message field; an empty message where it is absent."""
        values = self._fields.get(number, ())
        return Message(_bytes(values[-1], number)) if values else Message(b"")

    def messages(self, number: int) -> list[Message]:
        """Every value of a repeated message field."""
        return [Message(_bytes(v, number)) for v in self._fields.get(number, ())]


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise DecodeError("an integer is cut off or too long")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _bytes(value: Any, number: int) -> memoryview:
    if isinstance(value, int):
        raise DecodeError(f"field {number} holds an integer where a message or text should be")
    return value
