"""Pictures of memory profiles: a PNG for a paper, a page to explore, profiles side by side.

PNGs are drawn with matplotlib, which is an extra.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lrjax.files import replacing
from lrjax.memory import drawing, time_drawing
from lrjax.memory.page import page
from lrjax.memory.step_time import check as step_time_check

if TYPE_CHECKING:
    from lrjax.memory.profile import MemoryProfile
    from lrjax.memory.step_time import StepTime


def save_png(
    profile: MemoryProfile, path: str | Path, *, step_time: StepTime | None = None
) -> None:
    """Draw the memory in use over the schedule, stacked by kind, the peak marked, as a PNG.

    Beside it stand the kinds and the largest buffers at the peak. A line shows the device's memory
    where it is within reach of the peak. With a step time, its kinds and longest kernels stand
    below.

    Args:
      profile: what to draw.
      path: the file to write; an existing one is replaced, once the picture is complete.
      step_time: of the same program, as ``lrjax.roofline.estimate`` tells it.

    Raises:
      OSError: ``path`` cannot be written; nothing has been drawn then.
      TypeError: ``step_time`` is no time of a program.
      ImportError: matplotlib is not installed; the message has the command.

    Example::

        save_png(lrjax.memory.profile(jax.grad(loss), params, images, target="h200"), "step.png")
    """
    step_time_check(step_time)
    with replacing(path) as file:
        heights = [5.2] if step_time is None else [5.2, 3.0]
        figure = drawing.new_figure(11.5, sum(heights))
        grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
        axes, notes = figure.add_subfigure(grid[0]).subplots(1, 2, width_ratios=[3.1, 1.35])
        drawing.draw_timeline(axes, profile)
        drawing.draw_notes(notes, profile)
        if step_time is not None:
            kinds, kernels = figure.add_subfigure(grid[1]).subplots(1, 2)
            time_drawing.draw_kinds(kinds, step_time)
            time_drawing.draw_kernels(kernels, step_time)
        drawing.write(figure, file)


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
    with replacing(path) as file:
        figure = drawing.new_figure(11.5, 1.9 + max(0.5 * len(profiles), 2.4))
        peaks, timelines = figure.subplots(1, 2, width_ratios=[1.25, 1])
        drawing.draw_peaks(peaks, profiles)
        drawing.draw_timelines(timelines, profiles)
        drawing.write(figure, file)


def save_html(
    profile: MemoryProfile, path: str | Path, *, step_time: StepTime | None = None
) -> None:
    """Write the profile as a page to explore in a browser: one file, no network.

    Buffers are stacked over the steps of the schedule. The page zooms, shows what a buffer is
    under the pointer, lists what is alive in a step that is clicked, finds buffers by any of their
    texts, and colours them by kind or by layer. It can be used with the keyboard alone. With a step
    time, its kinds, longest kernels and source lines stand at the end.

    Args:
      profile: what to show.
      path: the file to write; an existing one is replaced, once the page is complete.
      step_time: of the same program, as ``lrjax.roofline.estimate`` tells it.

    Raises:
      OSError: ``path`` cannot be written; nothing has been done then.
      TypeError: ``step_time`` is no time of a program.

    Example::

        save_html(lrjax.memory.profile(jax.grad(loss), params, images, target="h200"), "step.html")
    """
    step_time_check(step_time)
    with replacing(path) as file:
        file.write(page(profile, step_time).encode("utf-8"))
