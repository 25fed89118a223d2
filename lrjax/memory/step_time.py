"""What pictures show of a step's time beside its memory.

The time itself is ``lrjax.roofline``'s, which stands above this folder: pictures take whatever
answers to ``StepTime``, and a ``lrjax.roofline.Roofline`` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

MOST_ROWS = 12  # of each table


class DeviceRates(Protocol):
    """What was assumed of a device."""

    @property
    def target(self) -> str: ...

    def assumptions(self) -> str: ...


class KernelTime(Protocol):
    """A kernel, and the seconds of all its launches."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def layer(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def launches(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def bound(self) -> str: ...


class StepTime(Protocol):
    """The time of one run of a program, as ``lrjax.roofline.Roofline`` tells it."""

    @property
    def seconds(self) -> float: ...
    @property
    def launches(self) -> int: ...
    @property
    def operations(self) -> float: ...
    @property
    def bytes(self) -> float: ...
    @property
    def rates(self) -> DeviceRates: ...
    @property
    def kernels(self) -> Sequence[KernelTime]: ...
    def by_kind(self) -> Mapping[str, float]: ...
    def by_source(self) -> Mapping[str, float]: ...
    def by_bound(self) -> Mapping[str, float]: ...


def check(time: StepTime | None) -> None:
    """Before anything is drawn.

    Raises:
      TypeError: it is no time of a program.
    """
    if time is not None and not callable(getattr(time, "by_kind", None)):
        raise TypeError(
            f"step_time={time!r:.60} is a {type(time).__name__}; give what "
            "lrjax.roofline.estimate returns for the same program."
        )


def seconds_text(seconds: float) -> str:
    """Three digits and a unit: ``"83.5 ms"``, ``"1.24 s"``, ``"3.00 us"``."""
    scale, unit = next(
        ((scale, unit) for scale, unit in ((1, "s"), (1e3, "ms")) if seconds * scale >= 0.9995),
        (1e6, "us"),
    )
    value = seconds * scale
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:,.{digits}f} {unit}"


def summary(time: StepTime) -> str:
    """Launches, operations and bytes in a line."""
    return (
        f"{time.launches:,} launches, {time.operations / 1e12:,.2f} TFLOP, "
        f"{time.bytes / 1e9:,.1f} GB"
    )


def longest(seconds: Mapping[str, float], most: int = MOST_ROWS) -> list[tuple[str, float]]:
    """Names and seconds, the longest first; what is beyond ``most`` rows is one row."""
    rows = sorted(seconds.items(), key=lambda item: -item[1])
    if len(rows) <= most:
        return rows
    rest = rows[most - 1 :]
    return [*rows[: most - 1], (f"{len(rest)} others", sum(s for _, s in rest))]


def longest_kernels(time: StepTime, most: int = MOST_ROWS) -> list[KernelTime]:
    """The kernels that take the longest, all launches of each together."""
    return sorted(time.kernels, key=lambda kernel: (-kernel.seconds, kernel.name))[:most]


def page_data(time: StepTime) -> dict[str, Any]:
    """The time as the page reads it."""
    return {
        "target": time.rates.target,
        "seconds": time.seconds,
        "text": seconds_text(time.seconds),
        "summary": summary(time),
        "bounds": [[name, seconds_text(s)] for name, s in longest(time.by_bound())],
        "kinds": _shares(time, longest(time.by_kind())),
        "sources": _shares(time, longest(time.by_source())),
        "kernels": [
            [k.name, k.kind, k.layer, k.source, k.launches, k.bound, seconds_text(k.seconds)]
            for k in longest_kernels(time)
        ],
        "number_of_kernels": len(time.kernels),
        "assumptions": time.rates.assumptions(),
    }


def _shares(time: StepTime, rows: Sequence[tuple[str, float]]) -> list[list[Any]]:
    return [[name, seconds_text(s), s / time.seconds if time.seconds else 0.0] for name, s in rows]
