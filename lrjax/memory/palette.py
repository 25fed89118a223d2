"""Colours and short texts that every picture of a profile shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lrjax.memory.profile import Buffer, MemoryProfile


# In the order in which they are stacked: what is there throughout lies lowest and so lies still.
# Of middle lightness, so that they stand on white and on black; grey is for what has no name.
COLOURS = {
    "arguments": "#5b8fc9",
    "constants": "#ec9cc0",
    "outputs": "#5dbcb4",
    "parameter gradients": "#a685d0",
    "saved maps": "#f0944d",
    "line buffers": "#64b266",
    "step intermediates": "#edc64b",
    "copies": "#b08968",
    "convolution scratch": "#e26d6d",
    "unattributed": "#9aa5b1",
}
OTHER = "#b9c1ca"

# Layers in order of size: neighbours differ in hue.
LAYER_COLOURS = (
    *("#5b8fc9", "#f0944d", "#64b266", "#e26d6d", "#a685d0", "#edc64b", "#5dbcb4", "#ec9cc0"),
    *("#b08968", "#8fc1e8", "#f6bf8b", "#a5d6a2", "#f0a9a6", "#c9b3e6", "#c3b55c", "#7fa08a"),
)

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def kinds(profiles: Sequence[MemoryProfile]) -> list[str]:
    """The kinds that occur, in the order in which they are stacked."""
    present = {b.kind for profile in profiles for b in profile.buffers}
    return [k for k in COLOURS if k in present] + sorted(present.difference(COLOURS))


def colour(kind: str) -> str:
    return COLOURS.get(kind, OTHER)


def array_text(buffer: Buffer) -> str:
    return f"{buffer.dtype}[{', '.join(map(str, buffer.shape))}]" if buffer.dtype else ""


def unit_of(size: float) -> int:
    """The place in ``UNITS`` of the largest unit that ``size`` has one of."""
    unit = 0
    while unit < len(UNITS) - 1 and size >= 1024 ** (unit + 1):
        unit += 1
    return unit


def bytes_text(size: int) -> str:
    """Bytes with three digits and a binary unit."""
    unit = unit_of(size)
    value = size / 1024**unit
    digits = 0 if unit == 0 or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {UNITS[unit]}"


def short(text: str, length: int) -> str:
    """``text`` in at most ``length`` characters; its end says more than its beginning."""
    printable = "".join(c if c.isprintable() else "?" for c in text)
    return printable if len(printable) <= length else "…" + printable[1 - length :]
