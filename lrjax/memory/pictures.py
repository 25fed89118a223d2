"""Pictures of memory profiles: a PNG for a paper, a page to explore, profiles side by side.

The page is one file that needs no network: ``viewer/`` holds its markup, style and script, and
the profile is written into it as JSON. PNGs are drawn with matplotlib, which is an extra.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import json
import os
import stat
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from lrjax.memory.profile import Buffer, MemoryProfile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# In the order in which they are stacked: what is there throughout lies lowest and so lies still.
# Of middle lightness, so that they stand on white and on black; grey is for what has no name.
_COLOURS = {
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
_OTHER = "#b9c1ca"

# Layers in order of size: neighbours differ in hue.
_LAYER_COLOURS = (
    *("#5b8fc9", "#f0944d", "#64b266", "#e26d6d", "#a685d0", "#edc64b", "#5dbcb4", "#ec9cc0"),
    *("#b08968", "#8fc1e8", "#f6bf8b", "#a5d6a2", "#f0a9a6", "#c9b3e6", "#c3b55c", "#7fa08a"),
)

_TOP_BUFFERS = 8
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def save_png(profile: MemoryProfile, path: str | Path) -> None:
    """Draw the memory in use over the schedule, stacked by kind, the peak marked, as a PNG.

    Beside it stand the kinds and the largest buffers at the peak. A line shows the device's memory
    where it is within reach of the peak.

    Args:
      profile: what to draw.
      path: the file to write; an existing one is replaced, once the picture is complete.

    Raises:
      OSError: ``path`` cannot be written; nothing has been drawn then.
      ImportError: matplotlib is not installed; the message has the command.

    Example::

        save_png(lrjax.memory.profile(jax.grad(loss), params, images, target="h200"), "step.png")
    """
    with _replacing(path) as file:
        figure = _new_figure(11.5, 5.2)
        axes, notes = figure.subplots(1, 2, width_ratios=[3.1, 1.35])
        _draw_timeline(axes, profile)
        _draw_notes(notes, profile)
        _write(figure, file)


def save_comparison_png(profiles: Mapping[str, MemoryProfile], path: str | Path) -> None:
    """Draw several profiles side by side as a PNG: peaks stacked by kind, and timelines.

    Args:
      profiles: what to draw, by the name it shall have, e.g. ``{"column": ..., "stream": ...}``.
      path: the file to write; an existing one is replaced, once the picture is complete.

    Raises:
      ValueError: ``profiles`` is empty.
      OSError: ``path`` cannot be written; nothing has been drawn then.
      ImportError: matplotlib is not installed; the message has the command.

    Example::

        save_comparison_png({"column": column, "stream": stream}, "strategies.png")
    """
    if not profiles:
        raise ValueError("profiles={} has nothing to compare: give at least one profile.")
    with _replacing(path) as file:
        figure = _new_figure(11.5, 1.9 + max(0.5 * len(profiles), 2.4))
        peaks, timelines = figure.subplots(1, 2, width_ratios=[1.25, 1])
        _draw_peaks(peaks, profiles)
        _draw_timelines(timelines, profiles)
        _write(figure, file)


def save_html(profile: MemoryProfile, path: str | Path) -> None:
    """Write the profile as a page to explore in a browser: one file, no network.

    Buffers are stacked over the steps of the schedule. The page zooms, shows what a buffer is
    under the pointer, lists what is alive in a step that is clicked, finds buffers by any of their
    texts, and colours them by kind or by layer. It can be used with the keyboard alone.

    Args:
      profile: what to show.
      path: the file to write; an existing one is replaced, once the page is complete.

    Raises:
      OSError: ``path`` cannot be written; nothing has been done then.

    Example::

        save_html(lrjax.memory.profile(jax.grad(loss), params, images, target="h200"), "step.html")
    """
    with _replacing(path) as file:
        viewer = importlib.resources.files("lrjax.memory") / "viewer"
        page = (viewer / "viewer.html").read_text(encoding="utf-8")
        # The profile comes last: nothing in it can be taken for a place to fill in.
        for place, text in (
            ("/*{{style}}*/", (viewer / "viewer.css").read_text(encoding="utf-8")),
            ("/*{{model}}*/", (viewer / "model.js").read_text(encoding="utf-8")),
            ("/*{{picture}}*/", (viewer / "picture.js").read_text(encoding="utf-8")),
            ("/*{{interaction}}*/", (viewer / "interaction.js").read_text(encoding="utf-8")),
            ("{{profile}}", _script_safe(_page_data(profile))),
        ):
            page = page.replace(place, text)
        file.write(page.encode("utf-8"))


# --- Files --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write that takes ``path``'s place when all went well, and is gone otherwise."""
    destination = Path(os.path.realpath(path))  # a link stays a link
    _check_writable(path, destination)
    try:
        file = tempfile.NamedTemporaryFile(  # noqa: SIM115 (closed below, before it is renamed)
            dir=destination.parent, prefix=f".{destination.name[:64]}.", delete=False
        )
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error), type(error)) from error
    try:
        with file:
            yield file
        os.chmod(file.name, _mode(destination))
        os.replace(file.name, destination)
    except BaseException:
        os.unlink(file.name)
        raise


def _check_writable(path: str | Path, destination: Path) -> None:
    if not destination.parent.exists():
        raise _unwritable(
            path, f"the directory {str(destination.parent)!r} does not exist", FileNotFoundError
        )
    if not destination.parent.is_dir():
        raise _unwritable(
            path, f"{str(destination.parent)!r} is not a directory", NotADirectoryError
        )
    if destination.is_dir():
        raise _unwritable(path, "it is a directory", IsADirectoryError)
    if destination.exists() and not destination.is_file():
        raise _unwritable(path, "it is a device or a pipe, not a file", OSError)
    if destination.exists() and not os.access(destination, os.W_OK):
        raise _unwritable(path, "the file is read-only", PermissionError)


def _unwritable(path: str | Path, reason: str, kind: type[OSError]) -> OSError:
    return kind(
        f"path={str(path)!r} cannot be written: {reason}. "
        "Name a file in a directory that exists and may be written to."
    )


def _mode(destination: Path) -> int:
    """Permissions of the file there, or of a new one; temporary files are private."""
    if destination.exists():
        return stat.S_IMODE(destination.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


# --- The page -----------------------------------------------------------------------------------


def _page_data(profile: MemoryProfile) -> dict[str, Any]:
    """The profile as the page reads it: texts that many buffers share are written once."""
    places: dict[str, int] = {}

    def place(text: str) -> int:
        return places.setdefault(text, len(places))

    rows = [
        [
            b.name,
            b.bytes,
            *map(place, (_array(b), b.operation, b.layer, b.kind, b.source)),
            b.start,
            b.end,
        ]
        for b in profile.buffers
    ]
    return {
        "target": profile.target,
        "peak_bytes": profile.peak_bytes,
        "peak_step": profile.peak_step,
        "temp_bytes": profile.temp_bytes,
        "argument_bytes": profile.argument_bytes,
        "output_bytes": profile.output_bytes,
        "alias_bytes": profile.alias_bytes,
        "host_bytes": profile.host_bytes,
        "generated_code_bytes": profile.generated_code_bytes,
        "allocated_bytes": profile.allocated_bytes,
        "capacity_bytes": profile.capacity_bytes,
        "fits": profile.fits,
        "kinds": [[kind, _colour(kind)] for kind in _kinds([profile])],
        "palette": _LAYER_COLOURS,
        "rest_colour": _OTHER,
        "none_colour": _COLOURS["unattributed"],
        "instructions": profile.instructions,
        "strings": list(places),
        "buffers": rows,
    }


def _script_safe(data: Any) -> str:
    """JSON that nothing in it can end the script element around it, or begin a comment."""
    text = json.dumps(data, separators=(",", ":"))  # ASCII: no line separators to worry about
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# --- What pictures share ------------------------------------------------------------------------


def _kinds(profiles: Sequence[MemoryProfile]) -> list[str]:
    """The kinds that occur, in the order in which they are stacked."""
    present = {b.kind for profile in profiles for b in profile.buffers}
    return [k for k in _COLOURS if k in present] + sorted(present.difference(_COLOURS))


def _colour(kind: str) -> str:
    return _COLOURS.get(kind, _OTHER)


def _array(buffer: Buffer) -> str:
    return f"{buffer.dtype}[{', '.join(map(str, buffer.shape))}]" if buffer.dtype else ""


def _unit_of(size: float) -> int:
    """The place in ``_UNITS`` of the largest unit that ``size`` has one of."""
    unit = 0
    while unit < len(_UNITS) - 1 and size >= 1024 ** (unit + 1):
        unit += 1
    return unit


def _text(size: int) -> str:
    """Bytes with three digits and a binary unit."""
    unit = _unit_of(size)
    value = size / 1024**unit
    digits = 0 if unit == 0 or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {_UNITS[unit]}"


def _short(text: str, length: int) -> str:
    """``text`` in at most ``length`` characters; its end says more than its beginning."""
    printable = "".join(c if c.isprintable() else "?" for c in text)
    return printable if len(printable) <= length else "…" + printable[1 - length :]


# --- PNG ----------------------------------------------------------------------------------------

_INK = "#1b2330"
_MUTED = "#5c6778"
_ALARM = "#a61b1b"


def _new_figure(width: float, height: float) -> Figure:
    """A figure outside pyplot, whose state and backend belong to the user."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing a PNG needs matplotlib, which is not installed: "
            'pip install "lrjax[pictures]". save_html needs nothing.'
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _write(figure: Figure, file: IO[bytes]) -> None:
    with warnings.catch_warnings():
        # A letter that matplotlib's font lacks is drawn as a box; the picture is none the worse.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(file, format="png", dpi=150)


def _timelines_by_kind(profile: MemoryProfile, kinds: Sequence[str]) -> np.ndarray:
    """Bytes in use: a row per kind, a column per step."""
    steps = max(len(profile.instructions), 1)
    changes = np.zeros((len(kinds), steps + 1), np.int64)
    rows = {kind: row for row, kind in enumerate(kinds)}
    for b in profile.buffers:
        changes[rows[b.kind], b.start] += b.bytes
        changes[rows[b.kind], b.end + 1] -= b.bytes
    return changes.cumsum(axis=1)[:, :-1]


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b9c1ca")
    axes.tick_params(colors=_MUTED, labelsize=9, length=3)
    axes.set_axisbelow(True)


def _byte_axis(axis: Any, most: float, limit: float) -> None:
    """Ticks up to ``limit`` at round numbers of the unit that fits ``most`` bytes."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    unit = _unit_of(most)
    scale = 1024**unit
    ticks = MaxNLocator(7, steps=[1, 2, 5, 10]).tick_values(0, limit / scale)
    axis.set_ticks([tick * scale for tick in ticks if tick * scale <= limit])
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / scale:g} {_UNITS[unit]}" if value else "0")
    )


def _draw_timeline(axes: Axes, profile: MemoryProfile) -> None:
    kinds = _kinds([profile])
    stacked = _timelines_by_kind(profile, kinds)
    edges = np.arange(stacked.shape[1] + 1)
    below = np.zeros(stacked.shape[1])
    for kind, row in zip(kinds, stacked, strict=True):
        axes.stairs(below + row, edges, baseline=below, fill=True, color=_colour(kind), lw=0)
        below = below + row
    most = max(float(below.max()), profile.peak_bytes, 1.0)
    capacity = profile.capacity_bytes
    if capacity is not None and capacity <= 1.5 * most:
        most = max(most, capacity)
        axes.axhline(capacity, color=_ALARM, lw=1.2, ls=(0, (6, 3)))
        axes.annotate(
            f"{profile.target}: {_text(capacity)}",
            (0, capacity),
            xytext=(6, 7),
            textcoords="offset points",
            color=_ALARM,
            fontsize=9,
            bbox={"boxstyle": "round,pad=0.25", "fc": "white", "ec": "none", "alpha": 0.85},
            parse_math=False,
        )
    _style(axes)
    axes.grid(axis="y", color="#e9edf2")
    axes.set_xlim(0, stacked.shape[1])
    axes.set_ylim(0, 1.12 * most)
    _byte_axis(axes.yaxis, most, 1.12 * most)
    axes.set_xlabel("step of the schedule", color=_MUTED, fontsize=9)
    _mark_peak(axes, profile, stacked.shape[1])
    axes.set_title(
        _headline(profile), loc="left", color=_INK, fontsize=12, weight="bold", parse_math=False
    )


def _mark_peak(axes: Axes, profile: MemoryProfile, steps: int) -> None:
    x, y = profile.peak_step + 0.5, profile.peak_bytes
    axes.plot([x, x], [0, y], color=_INK, lw=0.9, ls=(0, (3, 3)))
    axes.plot([x], [y], marker="o", color=_INK, ms=4, clip_on=False)
    right = x > 0.6 * steps
    axes.annotate(
        f"peak {_text(y)}",
        (x, y),
        xytext=(-7 if right else 7, 5),
        textcoords="offset points",
        ha="right" if right else "left",
        color=_INK,
        fontsize=10,
        weight="bold",
    )


def _headline(profile: MemoryProfile) -> str:
    verdict = {True: ": fits", False: ": does not fit", None: ""}[profile.fits]
    return f"Memory in use{_on_device(profile.target, profile.capacity_bytes)}{verdict}"


def _on_device(target: str, capacity: int | None) -> str:
    return f" on {target}" + (f" ({_text(capacity)})" if capacity is not None else "")


def _draw_notes(axes: Axes, profile: MemoryProfile) -> None:
    """Kinds and largest buffers at the peak, as two small tables."""
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    by_kind = profile.by_kind()
    top = [b for b in profile.at_peak() if b.kind != "unattributed"][:_TOP_BUFFERS]
    # Lines from the top down, in units of one line.
    axes.set_ylim(len(_COLOURS) + 2 * _TOP_BUFFERS + 4.5, -0.5)
    line = 0.0
    _note(axes, line, "At the peak", heading=True)
    for kind in reversed(_kinds([profile])):  # as they are stacked, uppermost first
        line += 1.15
        _note(axes, line, kind, colour=_colour(kind), size=by_kind.get(kind, 0))
    line += 2.2
    _note(axes, line, "Largest buffers at the peak", heading=True)
    for b in top:
        line += 1.2
        _note(axes, line, _short(b.layer or b.name, 30), colour=_colour(b.kind), size=b.bytes)
        line += 0.85
        detail = f"{b.operation or b.name}  {_array(b)}"
        axes.text(0.07, line, _short(detail, 58), va="center", color=_MUTED, fontsize=6.8).set(
            parse_math=False
        )


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
        color=_INK,
        fontsize=9.5 if heading else 8.5,
        weight="bold" if heading else "normal",
        parse_math=False,
    )
    if size is not None:
        axes.text(
            1.0,
            line,
            _text(size) if size else "-",
            ha="right",
            va="center",
            color=_INK,
            fontsize=8.5,
        )


def _draw_peaks(axes: Axes, profiles: Mapping[str, MemoryProfile]) -> None:
    kinds = _kinds(list(profiles.values()))
    names = list(profiles)
    left = np.zeros(len(names))
    for kind in kinds:
        sizes = np.array([p.by_kind().get(kind, 0) for p in profiles.values()], float)
        axes.barh(range(len(names)), sizes, left=left, height=0.62, color=_colour(kind), label=kind)
        left += sizes
    most = max(float(left.max()), *(p.peak_bytes for p in profiles.values()), 1.0)
    for row, (end, profile) in enumerate(zip(left, profiles.values(), strict=True)):
        text = _text(profile.peak_bytes) + (" (does not fit)" if profile.fits is False else "")
        axes.annotate(
            text,
            (end, row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=_ALARM if profile.fits is False else _INK,
        )
    capacities = {p.capacity_bytes for p in profiles.values()}
    if len(capacities) == 1 and (capacity := capacities.pop()) and capacity <= 1.3 * most:
        axes.axvline(capacity, color=_ALARM, lw=1.2, ls=(0, (6, 3)))
    _style(axes)
    axes.set_yticks(range(len(names)), [_short(name, 28) for name in names])
    axes.invert_yaxis()
    for label in axes.get_yticklabels():
        label.set(parse_math=False, color=_INK, fontsize=10)
    exceeds = any(p.fits is False for p in profiles.values())
    limit = (1.5 if exceeds else 1.2) * most  # room for the text behind the longest bar
    axes.set_xlim(0, limit)
    _byte_axis(axes.xaxis, most, limit)
    devices = {(p.target, p.capacity_bytes) for p in profiles.values()}
    axes.set_title(
        f"Peak{_on_device(*devices.pop()) if len(devices) == 1 else ''}",
        loc="left",
        color=_INK,
        fontsize=12,
        weight="bold",
        parse_math=False,
    )
    if kinds:
        axes.figure.legend(
            loc="outside lower left", ncols=4, frameon=False, fontsize=8.5, handlelength=1
        )


def _draw_timelines(axes: Axes, profiles: Mapping[str, MemoryProfile]) -> None:
    """Every profile's memory in use over its own schedule, from 0 to 100 %."""
    most = 1.0
    for colour, (name, profile) in zip(_cycled(len(profiles)), profiles.items(), strict=True):
        in_use = np.asarray(profile.timeline() or [0], float)
        most = max(most, float(in_use.max()))
        edges = np.linspace(0, 100, len(in_use) + 1)
        axes.stairs(in_use, edges, baseline=None, color=colour, lw=1.5, label=_short(name, 28))
    _style(axes)
    axes.grid(axis="y", color="#e9edf2")
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 1.12 * most)
    _byte_axis(axes.yaxis, most, 1.12 * most)
    axes.set_xlabel("share of the schedule, %", color=_MUTED, fontsize=9)
    axes.set_title("Memory in use", loc="left", color=_INK, fontsize=12, weight="bold")
    legend = axes.figure.legend(
        handles=axes.patches, loc="outside lower right", ncols=3, frameon=False, fontsize=8.5
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _cycled(count: int) -> list[str]:
    return [_LAYER_COLOURS[i % len(_LAYER_COLOURS)] for i in range(count)]
