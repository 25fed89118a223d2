"""Tables of memory profiles for the terminal, with ``rich``."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from lrjax.memory.profile import MemoryProfile
from lrjax.text import MIB

if TYPE_CHECKING:
    from rich.table import Table


def new_table(*columns: str) -> Table:
    """An empty table; every column but the first is aligned to the right.

    Raises:
      ImportError: ``rich`` is not installed; the message has the command.
    """
    try:
        from rich.table import Table
    except ModuleNotFoundError as error:
        raise ImportError("tables need rich: pip install 'lrjax[experiments]'") from error
    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    return table


def profile_tables(profile: MemoryProfile, top: int = 12) -> list[Table]:
    """Kinds, layers and the largest buffers at the peak, in MiB."""
    tables = []
    for title, totals in (("kind", profile.by_kind()), ("layer", profile.by_layer())):
        table = new_table(title, "MiB", "of the peak")
        for name, size in list(totals.items())[:top]:
            share = size / max(profile.peak_bytes, 1)
            table.add_row(name, f"{size / MIB:,.1f}", f"{share:.1%}")
        tables.append(table)
    table = new_table("buffer", "MiB", "shape", "operation", "layer", "kind", "line")
    for b in profile.at_peak()[:top]:
        shape = f"{b.dtype}{list(b.shape)}"
        line = b.source.rpartition("/")[2]
        table.add_row(b.name, f"{b.bytes / MIB:,.1f}", shape, b.operation, b.layer, b.kind, line)
    return [*tables, table]


def plain(*tables: Table, width: int = 160) -> str:
    """Tables as text without colours."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width)
    for table in tables:
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
