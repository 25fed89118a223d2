"""A profile drawn with matplotlib: timelines, peaks and notes on axes."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from lrjax.memory import palette
from lrjax.memory.lifetimes import usage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lrjax.memory.profile import MemoryProfile

_TOP_BUFFERS = 8

INK = "#1b2330"
MUTED = "#5c6778"
_ALARM = "#a61b1b"
_LIMIT: dict[str, Any] = {"color": _ALARM, "lw": 1.2, "ls": (0, (6, 3))}


def new_figure(width: float, height: float) -> Figure:
    """A figure outside pyplot, whose state and backend belong to the user."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing a PNG needs matplotlib, which is not installed: "
            'pip install "lrjax[pictures]". save_html needs nothing.'
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def write(figure: Figure, file: IO[bytes]) -> None:
    with warnings.catch_warnings():
        # A letter that matplotlib's font lacks is drawn as a box; the picture is none the worse.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(file, format="png", dpi=150)


def _timelines_by_kind(profile: MemoryProfile, kinds: Sequence[str]) -> np.ndarray:
    """Bytes in use: a row per kind, a column per step."""
    steps = max(len(profile.instructions), 1)
    of_kind = ([b for b in profile.buffers if b.kind == kind] for kind in kinds)
    return np.array([usage(found, steps) for found in of_kind]).reshape(len(kinds), steps)


def style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b9c1ca")
    axes.tick_params(colors=MUTED, labelsize=9, length=3)
    axes.set_axisbelow(True)


def title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", color=INK, fontsize=12, weight="bold", parse_math=False)


def _byte_axis(axis: Any, most: float, limit: float) -> None:
    """Ticks up to ``limit`` at round numbers of the unit that fits ``most`` bytes."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    unit = palette.unit_of(most)
    scale = 1024**unit
    ticks = MaxNLocator(7, steps=[1, 2, 5, 10]).tick_values(0, limit / scale)
    axis.set_ticks([tick * scale for tick in ticks if tick * scale <= limit])
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / scale:g} {palette.UNITS[unit]}" if value else "0")
    )


def _byte_limit(axes: Axes, most: float, steps: float, label: str) -> None:
    """Axes of bytes in use over a schedule of so many steps."""
    style(axes)
    axes.grid(axis="y", color="#e9edf2")
    axes.set_xlim(0, steps)
    axes.set_ylim(0, 1.12 * most)
    _byte_axis(axes.yaxis, most, 1.12 * most)
    axes.set_xlabel(label, color=MUTED, fontsize=9)


def draw_timeline(axes: Axes, profile: MemoryProfile) -> None:
    kinds = palette.kinds([profile])
    stacked = _timelines_by_kind(profile, kinds)
    edges = np.arange(stacked.shape[1] + 1)
    below = np.zeros(stacked.shape[1])
    for kind, row in zip(kinds, stacked, strict=True):
        axes.stairs(below + row, edges, baseline=below, fill=True, color=palette.colour(kind), lw=0)
        below = below + row
    most = max(float(np.max(below)), profile.peak_bytes, 1.0)
    capacity = profile.capacity_bytes
    if capacity is not None and capacity <= 1.5 * most:
        most = max(most, capacity)
        axes.axhline(capacity, **_LIMIT)
        axes.annotate(
            f"{profile.target}: {palette.bytes_text(capacity)}",
            (0, capacity),
            xytext=(6, 7),
            textcoords="offset points",
            color=_ALARM,
            fontsize=9,
            bbox={"boxstyle": "round,pad=0.25", "fc": "white", "ec": "none", "alpha": 0.85},
            parse_math=False,
        )
    _byte_limit(axes, most, stacked.shape[1], "step of the schedule")
    _mark_peak(axes, profile, stacked.shape[1])
    title(axes, _headline(profile))


def _mark_peak(axes: Axes, profile: MemoryProfile, steps: int) -> None:
    x, y = profile.peak_step + 0.5, profile.peak_bytes
    axes.plot([x, x], [0, y], color=INK, lw=0.9, ls=(0, (3, 3)))
    axes.plot([x], [y], marker="o", color=INK, ms=4, clip_on=False)
    right = x > 0.6 * steps
    axes.annotate(
        f"peak {palette.bytes_text(y)}",
        (x, y),
        xytext=(-7 if right else 7, 5),
        textcoords="offset points",
        ha="right" if right else "left",
        color=INK,
        fontsize=10,
        weight="bold",
    )


def _headline(profile: MemoryProfile) -> str:
    verdict = {True: ": fits", False: ": does not fit", None: ""}[profile.fits]
    return f"Memory in use{_on_device(profile.target, profile.capacity_bytes)}{verdict}"


def _on_device(target: str, capacity: int | None) -> str:
    return f" on {target}" + (f" ({palette.bytes_text(capacity)})" if capacity is not None else "")


def draw_notes(axes: Axes, profile: MemoryProfile) -> None:
    """Kinds and largest buffers at the peak, as two small tables."""
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    by_kind = profile.by_kind()
    top = [b for b in profile.at_peak() if b.kind != "unattributed"][:_TOP_BUFFERS]
    # Lines from the top down, in units of one line.
    axes.set_ylim(len(palette.COLOURS) + 2 * _TOP_BUFFERS + 4.5, -0.5)
    line = 0.0
    _note(axes, line, "At the peak", heading=True)
    for kind in reversed(palette.kinds([profile])):  # as they are stacked, uppermost first
        line += 1.15
        _note(axes, line, kind, colour=palette.colour(kind), size=by_kind.get(kind, 0))
    line += 2.2
    _note(axes, line, "Largest buffers at the peak", heading=True)
    for b in top:
        line += 1.2
        _note(
            axes,
            line,
            palette.short(b.layer or b.name, 30),
            colour=palette.colour(b.kind),
            size=b.bytes,
        )
        line += 0.85
        detail = f"{b.operation or b.name}  {palette.array_text(b)}"
        axes.text(
            0.07, line, palette.short(detail, 58), va="center", color=MUTED, fontsize=6.8
        ).set(parse_math=False)


def _note(
    axes: Axes,
    line: float,
    text: str,
    *,
    heading: bool = False,
    colour: str | None = None,
    size: int | None = None,
) -> None:
    if colour is not None:
        axes.plot([0.02], [line], marker="s", ms=6.5, color=colour, clip_on=False)
    axes.text(
        0.0 if heading else 0.07,
        line,
        text,
        va="center",
        color=INK,
        fontsize=9.5 if heading else 8.5,
        weight="bold" if heading else "normal",
        parse_math=False,
    )
    if size is not None:
        axes.text(
            1.0,
            line,
            palette.bytes_text(size) if size else "-",
            ha="right",
            va="center",
            color=INK,
            fontsize=8.5,
        )


def draw_peaks(axes: Axes, profiles: Mapping[str, MemoryProfile]) -> None:
    kinds = palette.kinds(list(profiles.values()))
    names = list(profiles)
    left = np.zeros(len(names))
    for kind in kinds:
        sizes = np.array([p.by_kind().get(kind, 0) for p in profiles.values()], float)
        axes.barh(
            range(len(names)), sizes, left=left, height=0.62, color=palette.colour(kind), label=kind
        )
        left += sizes
    most = max(float(np.max(left)), *(p.peak_bytes for p in profiles.values()), 1.0)
    for row, (end, profile) in enumerate(zip(left, profiles.values(), strict=True)):
        verdict = " (does not fit)" if profile.fits is False else ""
        axes.annotate(
            palette.bytes_text(profile.peak_bytes) + verdict,
            (end, row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=_ALARM if profile.fits is False else INK,
        )
    capacities = {p.capacity_bytes for p in profiles.values()}
    if len(capacities) == 1 and (capacity := capacities.pop()) and capacity <= 1.3 * most:
        axes.axvline(capacity, **_LIMIT)
    style(axes)
    axes.set_yticks(range(len(names)), [palette.short(name, 28) for name in names])
    axes.invert_yaxis()
    for label in axes.get_yticklabels():
        label.set(parse_math=False, color=INK, fontsize=10)
    exceeds = any(p.fits is False for p in profiles.values())
    limit = (1.5 if exceeds else 1.2) * most  # room for the text behind the longest bar
    axes.set_xlim(0, limit)
    _byte_axis(axes.xaxis, most, limit)
    devices = {(p.target, p.capacity_bytes) for p in profiles.values()}
    title(axes, f"Peak{_on_device(*devices.pop()) if len(devices) == 1 else ''}")
    if kinds:
        axes.figure.legend(
            loc="outside lower left", ncols=4, frameon=False, fontsize=8.5, handlelength=1
        )


def draw_timelines(axes: Axes, profiles: Mapping[str, MemoryProfile]) -> None:
    """Every profile's memory in use over its own schedule, from 0 to 100 %."""
    most = 1.0
    colours = itertools.cycle(palette.LAYER_COLOURS)
    for colour, (name, profile) in zip(colours, profiles.items(), strict=False):
        in_use = np.asarray(profile.timeline() or [0], float)
        most = max(most, float(in_use.max()))
        edges = np.linspace(0, 100, len(in_use) + 1)
        axes.stairs(
            in_use, edges, baseline=None, color=colour, lw=1.5, label=palette.short(name, 28)
        )
    _byte_limit(axes, most, 100, "share of the schedule, %")
    title(axes, "Memory in use")
    legend = axes.figure.legend(
        handles=axes.patches, loc="outside lower right", ncols=3, frameon=False, fontsize=8.5
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
