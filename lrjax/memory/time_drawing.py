"""A step's time drawn with matplotlib, beneath the memory of the same program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lrjax.memory import drawing, palette
from lrjax.memory.step_time import longest, longest_kernels, seconds_text, summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lrjax.memory.step_time import StepTime

MOST_BARS = 8


def draw_kinds(axes: Axes, time: StepTime) -> None:
    """Seconds by kind of kernel, under the total."""
    _bars(axes, longest(time.by_kind(), MOST_BARS), time.seconds)
    drawing.title(
        axes, f"{seconds_text(time.seconds)} a step on {time.rates.target}, by a roofline"
    )
    axes.set_xlabel(summary(time), color=drawing.MUTED, fontsize=9)


def draw_kernels(axes: Axes, time: StepTime) -> None:
    """The kernels that take the longest, with the layer or source line they are of."""
    rows = [
        (" ".join(filter(None, (k.kind, palette.short(k.layer or k.source, 24)))), k.seconds)
        for k in longest_kernels(time, MOST_BARS)
    ]
    _bars(axes, rows, time.seconds)
    drawing.title(axes, "Longest kernels")
    axes.set_xlabel("all launches of each", color=drawing.MUTED, fontsize=9)


def _bars(axes: Axes, rows: Sequence[tuple[str, float]], total: float) -> None:
    places = range(len(rows))
    seconds = [s for _, s in rows]
    axes.barh(places, seconds, height=0.62, color=palette.LAYER_COLOURS[0])
    most = max(seconds, default=0.0) or 1.0
    for place, s in zip(places, seconds, strict=True):
        axes.annotate(
            f"{seconds_text(s)}  {s / total:.0%}" if total else seconds_text(s),
            (s, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=drawing.INK,
            fontsize=8.5,
        )
    drawing.style(axes)
    axes.set_xlim(0, 1.4 * most)  # room for the text behind the longest bar
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_yticks(places, [palette.short(name or "(none)", 40) for name, _ in rows])
    for label in axes.get_yticklabels():
        label.set(parse_math=False, color=drawing.INK, fontsize=8.5)
    axes.invert_yaxis()
