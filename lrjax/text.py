"""Tables and sizes as plain text."""

from __future__ import annotations

from collections.abc import Collection, Sequence

MIB = 2**20


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Rows of a table as lines; the columns ``left`` are aligned to the left, others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def size(count: float) -> str:
    """Bytes in the unit that fits: ``"512 bytes"``, ``"1.5 KiB"``, ``"22,529.0 MiB"``."""
    if count < 1024:
        return f"{count:,.0f} bytes"
    return f"{count / 1024:,.1f} KiB" if count < MIB else f"{count / MIB:,.1f} MiB"


def shortened(text: str, most: int) -> str:
    """The text, or its beginning and an ellipsis."""
    return text if len(text) <= most else text[: most - 3] + "..."


def listed(things: Sequence[object], most: int = 5) -> str:
    """The first things with commas between them, and how many more there are."""
    text = ", ".join(map(str, things[:most]))
    more = len(things) - most
    return f"{text} and {more} more" if more > 0 else text


def ends(lines: Sequence[str], most: int, note: str) -> list[str]:
    """The lines, or the first and last of them around ``note``, with the number left out."""
    if len(lines) <= most:
        return list(lines)
    tail = most // 3
    left_out = f"... {len(lines) - most + 1} more: {note}"
    return [*lines[: most - tail - 1], left_out, *lines[len(lines) - tail :]]
