"""Memory profiles side by side: what each way of running a function needs, and what for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrjax.memory.profile import KINDS, MemoryProfile
from lrjax.text import MIB, aligned

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Several profiles by name; the first is what the others are measured by."""

    profiles: dict[str, MemoryProfile]

    def rows(self) -> list[dict[str, Any]]:
        """Peak, ratio to the first, whether it fits, and bytes at the peak by kind; per profile."""
        first = next(iter(self.profiles.values())).peak_bytes
        return [
            {
                "name": name,
                "target": profile.target,
                "peak_bytes": profile.peak_bytes,
                "ratio": profile.peak_bytes / max(first, 1),
                "fits": profile.fits,
                "by_kind": profile.by_kind(),
            }
            for name, profile in self.profiles.items()
        ]

    def table(self) -> Table:
        """The rows as a ``rich`` table, in MiB; print it with ``rich.print``.

        Raises:
          ImportError: ``rich`` is not installed; the message has the command.
        """
        return kinds_table(self.rows())

    def __repr__(self) -> str:
        return f"Comparison({', '.join(self.profiles)}; print it for a table)"

    def __str__(self) -> str:
        header, rows = _cells(self.rows())
        return "\n".join(aligned([header, *rows], left=(0, 1)))

    def to_json(self) -> str:
        """The rows as JSON text."""
        return json.dumps(self.rows(), indent=1)

    def save_png(self, path: str | Path) -> None:
        """Draw the kinds at the peak of every profile, side by side."""
        from lrjax.memory import pictures

        pictures.save_comparison_png(self.profiles, path)


def compare(profiles: Mapping[str, MemoryProfile]) -> Comparison:
    """Put profiles side by side.

    Args:
      profiles: by name, e.g. ``{"column": ..., "stream": ...}``; ratios are to the first.

    Raises:
      ValueError: there is no profile.

    Example::

        ways = {"column": loss, "stream": lrjax.rowwise(loss, in_axes=(None, 1), num_blocks=64)}
        profiles = {
            name: lrjax.memory.profile(jax.grad(way), params, images, target="rtx3090")
            for name, way in ways.items()
        }
        print(lrjax.memory.compare(profiles))
    """
    if not profiles:
        raise ValueError("profiles is empty: give at least one, as {'name': profile}")
    return Comparison(dict(profiles))


def kinds_table(rows: list[dict[str, Any]]) -> Table:
    """A ``rich`` table of comparison rows; only kinds that occur have a column."""
    from lrjax.memory.text import new_table

    header, lines = _cells(rows)
    table = new_table(*header)
    for line in lines:
        table.add_row(*line)
    return table


def _cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a table of comparison rows, in MiB."""
    kinds = [kind for kind in KINDS if any(row["by_kind"].get(kind) for row in rows)]
    lines = []
    for row in rows:
        fits = {True: "yes", False: "no", None: "?"}[row["fits"]]
        cells = [f"{row['by_kind'].get(kind, 0) / MIB:,.0f}" for kind in kinds]
        peak = f"{row['peak_bytes'] / MIB:,.0f}"
        lines.append([row["name"], row["target"], peak, f"{row['ratio']:.3f}", fits, *cells])
    return ["MiB", "target", "peak", "ratio", "fits", *kinds], lines
