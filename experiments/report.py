"""How experiments and benchmarks name where they ran, and write down what they found."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib

RESULTS = Path(__file__).parent / "results"


def versions() -> dict[str, str]:
    """The versions a result depends on, without touching a device."""
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
    }


def environment() -> dict[str, Any]:
    """The versions, and the device the programs run on."""
    device = jax.devices()[0]
    return versions() | {
        "platform": device.platform,
        "device": device.device_kind,
        "cpus": len(os.sched_getaffinity(0)),
    }


def mib(size: float | None) -> str:
    """Bytes as whole MiB, with thousands separated; an em dash for ``None``."""
    return "—" if size is None else f"{size / 2**20:,.0f}"


def mib_exact(size: float) -> str:
    """Bytes as MiB with two decimals and the unit, for programs of a few MiB."""
    return f"{size / 2**20:,.2f} MiB"


def ratio(value: float | None) -> str:
    """A ratio with two decimals; an em dash for ``None``."""
    return "—" if value is None else f"{value:.2f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown, columns padded so that it reads well as text too."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` to ``path`` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


def append_json_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line, whole even where several processes write."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def json_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a file, which need not be there; one cut short by a kill is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def merge(path: Path, version: str, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Put ``parts`` (part -> row -> result) of one version of jax into the results at ``path``.

    Results of other versions and rows stay as they are. Returns all of them.
    """
    results = json.loads(path.read_text()) if path.exists() else {}
    own = results.setdefault(version, {})
    for part, rows in parts.items():
        own.setdefault(part, {}).update(rows)
    results = dict(sorted(results.items()))
    write_json(path, results)
    return results
