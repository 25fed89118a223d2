"""Draws the figures of the documentation, as SVG, from the library and from committed results.

python scripts/figures.py [FOLDER]     default: docs/figures
"""

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib
from jax import lax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lrjax.loop.rowloop import RowLoop, row_loop  # noqa: E402
from lrjax.memory.palette import COLOURS  # noqa: E402
from lrjax.rowgraph.graph import build  # noqa: E402
from lrjax.rowgraph.segments import split  # noqa: E402
from lrjax.rowgraph.tracing import trace  # noqa: E402
from lrjax.rules.geometry import RowMap  # noqa: E402
from lrjax.strategies.base import TOP_DOWN  # noqa: E402

RESULTS = ROOT / "experiments/results"
FOLDER = ROOT / "docs/figures"
INK, MUTED, LINE = "#1b2330", "#5c6778", "#b9c1ca"
KEPT, NEW, BUFFER, HALO = (
    COLOURS[kind] for kind in ("saved maps", "step intermediates", "line buffers", "arguments")
)
GONE = "#eef1f5"
STYLE = {
    "svg.hashsalt": "lrjax",  # the same names of elements in every run
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def panels(number: int, width: float, height: float) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, number, squeeze=False)[0]
    return figure, axes


def rectangle(axes: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", lw=0.6))


def title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11, weight="bold", color=INK)


def convolution(image: Any, kernel: Any) -> Any:
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=layout)


def pool(image: Any) -> Any:
    window = (1, 2, 2, 1)
    return lax.reduce_window(image, -jnp.inf, lax.max, window, window, "VALID")


def loop_of(network: Callable[..., Any], height: int, num_blocks: int) -> tuple[RowLoop, list[int]]:
    """The row loop of a network of kernels and one image, and the values of its operations."""
    kernels = [jnp.ones((3, 3, 1, 1))] * 4
    traced = trace(network, (None, 1), (kernels, jnp.ones((1, height, 8, 1))), {})
    (segment,) = split(traced.program, traced.axes, ())
    graph = build(segment.program, segment.axes)
    (stage,) = graph.loops
    loop = row_loop(graph, stage, order=TOP_DOWN, num_blocks=num_blocks, is_differentiated=False)
    return loop, [node.equation.outputs[0] for node in loop.nodes]


def chain(kernels: Any, image: Any) -> Any:
    for kernel in kernels:
        image = convolution(image, kernel)
    return image


def column_and_rows() -> Figure:
    """What exists in memory in the middle of a forward pass, by column and by rows."""
    height, step = 24, 2
    loop, values = loop_of(chain, height, 6)
    figure, (left, right) = panels(2, 8.6, 3.6)
    layers = len(values) + 1
    for axes in (left, right):
        axes.set_xlim(-0.2, layers)
        axes.set_ylim(height + 0.5, -0.5)
        axes.set_xticks([i + 0.4 for i in range(layers)], ["image", *map(str, range(1, layers))])
        axes.set_xlabel("layer")
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(length=0)
        rectangle(axes, 0, 0, 0.8, height, HALO)
    left.set_ylabel("row")
    for i in range(1, layers):
        rectangle(left, i, 0, 0.8, height if i < 4 else 0.6 * height, KEPT)
        rectangle(right, i, 0, 0.8, height, GONE)
    for i, value in enumerate(values, 1):
        track = loop.track(value)
        start, stop = track.owned(step)
        kept = loop.line_rows(value)
        rectangle(right, i, max(start - kept, 0), 0.8, min(kept, start), BUFFER)
        rectangle(right, i, max(start, 0), 0.8, stop - max(start, 0), NEW)
    title(left, "column: whole maps, all kept")
    title(right, "by rows: one step of six")
    handles = [Rectangle((0, 0), 1, 1, color=c) for c in (HALO, KEPT, NEW, BUFFER, GONE)]
    names = ["the image", "kept map", "rows of this step", "line buffer", "not in memory"]
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def halo() -> Figure:
    """The rows that two output rows need, layer by layer back to the image."""
    maps = [RowMap(extent=3, pad=1), RowMap(extent=3, pad=1), RowMap(stride=2, extent=2),
            RowMap(extent=3, pad=1)]  # fmt: skip
    names = ["image", "conv 3x3", "conv 3x3", "pool 2x2", "conv 3x3"]
    first, stop = 3, 5
    ranges = [(first, stop)]
    for row_map in reversed(maps):
        first, stop = row_map.first(first), row_map.end(stop)
        ranges.append((first, stop))
    ranges.reverse()
    scales = [1, 1, 1, 2, 2]
    owned = [(6, 10), (6, 10), (6, 10), (3, 5), (3, 5)]
    figure, (axes,) = panels(1, 6.4, 3.6)
    for i, ((first, stop), scale, (a, b)) in enumerate(zip(ranges, scales, owned, strict=True)):
        for row in range(first, stop):
            rectangle(axes, i, row * scale, 0.7, scale, NEW if a <= row < b else HALO)
        text = f"{stop - first} rows"
        axes.text(i + 0.35, stop * scale + 0.2, text, ha="center", va="top", fontsize=9)
    axes.set_xlim(-0.3, 5)
    axes.set_ylim(16.2, -0.5)
    axes.set_xticks([i + 0.35 for i in range(5)], names)
    axes.set_ylabel("row of the image")
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="x", length=0)
    handles = [Rectangle((0, 0), 1, 1, color=c) for c in (NEW, HALO)]
    figure.legend(handles, ["rows that the block owns", "halo"], loc="outside lower center",
                  ncols=2, frameon=False, fontsize=9)  # fmt: skip
    return figure


def frontiers() -> Figure:
    """How far every value has come after each step of a real row loop."""

    def network(kernels: Any, image: Any) -> Any:
        image = convolution(convolution(image, kernels[0]), kernels[1])
        return convolution(convolution(pool(image), kernels[2]), kernels[3])

    height = 32
    loop, values = loop_of(network, height, 8)
    names = ["conv 1", "conv 2", "pool", "conv 3", "conv 4"]
    scales = [1, 1, 2, 2, 2]
    colours = [COLOURS[k] for k in ("arguments", "saved maps", "line buffers", "copies",
                                    "parameter gradients")]  # fmt: skip
    figure, (axes,) = panels(1, 6.4, 3.6)
    for value, name, scale, colour in zip(values, names, scales, colours, strict=True):
        track = loop.track(value)
        reached = [min(max(track.stop(s) * scale, 0), height) for s in range(loop.steps)]
        edges = [s + 0.5 for s in range(-1, loop.steps)]
        label = f"{name}: {loop.line_rows(value)} rows kept"
        width = 5 if name == "conv 2" else 2  # the pool's is the same
        axes.stairs(reached, edges, baseline=None, color=colour, lw=width, label=label)
    axes.axhline(height, color=LINE, lw=1, ls=(0, (4, 3)))
    axes.text(0, height + 0.5, "height of the image", fontsize=9, color=MUTED)
    axes.set_xticks(range(loop.steps))
    axes.set_xlabel("step")
    axes.set_ylabel("frontier, in rows of the image")
    axes.set_ylim(0, height + 3)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def strategies() -> Figure:
    """In which order blocks run, forward and backward."""
    figure, all_axes = panels(3, 9.2, 3.4)
    about = ("OverL", "2PS", "stream")
    details = (
        "blocks are independent,\nhalos are computed twice",
        "the forward pass saves boundary rows,\nthe backward pass walks in reverse",
        "both passes from the top down,\nrows wait in line buffers",
    )
    for axes, name, detail in zip(all_axes, about, details, strict=True):
        axes.set_axis_off()
        axes.set_xlim(0, 10)
        axes.set_ylim(12.6, -1)
        title(axes, name)
        axes.text(5, 11.3, detail, ha="center", va="top", fontsize=9, color=MUTED)
        for block in range(3):
            y = 3.5 * block
            rectangle(axes, 1, y, 3.2, 3.3, NEW)
            rectangle(axes, 5.8, y, 3.2, 3.3, KEPT)
            axes.text(2.6, y + 1.65, f"{block + 1}", ha="center", va="center")
            order = {"2PS": 6 - block, "OverL": 4 + block, "stream": 4 + block}[name]
            axes.text(7.4, y + 1.65, f"{order}", ha="center", va="center")
            if name == "OverL":
                for x in (1, 5.8):
                    for edge in [y + 3.3] if block < 2 else []:
                        rectangle(axes, x, edge - 0.5, 3.2, 1.2, HALO)
            elif block < 2:
                for x in (1, 5.8) if name == "stream" else (1,):
                    rectangle(axes, x, y + 2.85, 3.2, 0.45, BUFFER)
        axes.text(2.6, -0.3, "forward", ha="center", fontsize=9)
        axes.text(7.4, -0.3, "backward", ha="center", fontsize=9)
        for x, reverse in ((0.5, False), (9.5, name == "2PS")):
            ends = ((x, 0.2), (x, 10.1))
            start, stop = ends[::-1] if reverse else ends
            axes.add_patch(
                FancyArrowPatch(start, stop, arrowstyle="-|>", mutation_scale=11, color=MUTED)
            )
    handles = [Rectangle((0, 0), 1, 1, color=c) for c in (HALO, BUFFER)]
    figure.legend(handles, ["halo, computed by both blocks", "rows that are kept"],
                  loc="outside lower center", ncols=2, frameon=False, fontsize=9)  # fmt: skip
    return figure


def stages() -> Figure:
    """Batch statistics end a stage: what follows needs all rows of what comes before."""
    figure, (axes,) = panels(1, 8.6, 2.5)
    axes.set_axis_off()
    axes.set_xlim(0, 21.4)
    axes.set_ylim(0, 6)
    boxes = [
        (0.2, "image", HALO),
        (3.4, "conv 1", NEW),
        (6.6, "mean and\nvariance", KEPT),
        (9.8, "normalise\nconv 2", NEW),
        (13.0, "mean and\nvariance", KEPT),
        (16.2, "normalise\nconv 3", NEW),
        (19.0, "loss", KEPT),
    ]
    for x, text, colour in boxes:
        rectangle(axes, x, 2.2, 2.2, 1.7, colour)
        axes.text(x + 1.1, 3.05, text, ha="center", va="center", fontsize=9)
    for (x, *_), (to, *_) in itertools.pairwise(boxes):
        axes.add_patch(FancyArrowPatch((x + 2.2, 3.05), (to, 3.05), arrowstyle="-|>",
                                       mutation_scale=9, color=MUTED))  # fmt: skip
    for start, stop, name in ((3.1, 9.1, "stage 1: one row loop"), (9.5, 15.5, "stage 2"),
                              (15.9, 21.3, "stage 3")):  # fmt: skip
        axes.plot([start, stop], [4.7, 4.7], color=INK, lw=1.4)
        axes.text((start + stop) / 2, 5.0, name, ha="center", fontsize=9)
    for x in (9.3, 15.7):
        axes.plot([x, x], [0.9, 4.3], color=LINE, lw=1.2, ls=(0, (4, 3)))
        text = "crosses: a map that is held,\nor computed again from the image"
        axes.text(x, 0.7, text, ha="center", va="top", fontsize=8.5, color=MUTED)
    return figure


def peaks() -> Figure:
    """Peak memory of VGG-16's gradient over the side of the image: results of vgg16_memory."""
    version, found = sorted(json.loads((RESULTS / "vgg16_memory.json").read_text()).items())[-1]
    methods = {
        "column": ("column", "saved maps"),
        "checkpoint-layer": ("jax.checkpoint", "copies"),
        "overl": ("OverL", "arguments"),
        "2ps": ("2PS", "parameter gradients"),
        "stream": ("stream", "line buffers"),
        "stream-offload": ("stream, maps on the host", "outputs"),
    }
    figure, (axes,) = panels(1, 6.4, 4.4)
    for key, (name, kind) in methods.items():
        points = sorted(
            (int(side), row["peak_mib"] / 1024)
            for program, row in found["peaks"].items()
            for side, method, *_ in [program.split("/")]
            if method == key and not program.endswith("uint8")
        )
        axes.plot(*zip(*points, strict=True), marker="o", ms=5, lw=1.8, label=name,
                  color=COLOURS[kind])  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks([4096, 16384, 32768], ["4,096", "16,384", "32,768"])
    axes.set_yticks([0.25, 1, 4, 16], ["256 MiB", "1 GiB", "4 GiB", "16 GiB"])
    axes.minorticks_off()
    axes.set_xlabel(f"side of the square image (compiled for an H200, jax {version})")
    axes.grid(axis="y", color="#e9edf2")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    title(axes, "Peak memory of VGG-16's gradient, bfloat16, batch 1")
    return figure


def times() -> Figure:
    """Time over peak memory, as multiples of column's: results of step_times."""
    found = json.loads((RESULTS / "step_times.json").read_text())
    version, results = sorted(found.items())[-1]
    networks = {
        "vgg16-4096": ("VGG-16", "line buffers"),
        "resnet50-frozen-4096": ("ResNet-50, frozen statistics", "arguments"),
        "unet-none-2048": ("U-Net", "parameter gradients"),
    }
    figure, (axes,) = panels(1, 6.4, 4.4)
    for key, (name, kind) in networks.items():
        rows = {p: r for p, r in results["steps"].items() if p.startswith(key + "/")}
        column = rows[f"{key}/column"]
        for is_plan, marker in ((True, "o"), (False, "x")):
            points = [
                (r["peak_mib"] / column["peak_mib"], r["ms"] / column["ms"])
                for program, r in rows.items()
                if ("/plan/" in program) == is_plan and not program.endswith("/column")
            ]
            label = f"{name}{': plans' if is_plan else ': one strategy for all'}"
            axes.plot(*zip(*sorted(points), strict=True), marker=marker, ls="", ms=6.5,
                      color=COLOURS[kind], label=label)  # fmt: skip
    axes.plot([1], [1], marker="s", ms=7, color=INK, ls="", label="column")
    axes.set_xscale("log")
    axes.set_xticks([0.03, 0.1, 0.3, 1], ["0.03", "0.1", "0.3", "1"])
    axes.minorticks_off()
    axes.set_xlabel(f"peak memory over column's (compiled for an H200, jax {version})")
    axes.set_ylabel("time over column's, by a roofline")
    axes.grid(axis="y", color="#e9edf2")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    title(axes, "What less memory costs in time")
    return figure


FIGURES = {
    "column-and-rows": column_and_rows,
    "halo": halo,
    "frontiers": frontiers,
    "strategies": strategies,
    "stages": stages,
    "peaks": peaks,
    "times": times,
}


def main(folder: Path = FOLDER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, draw in FIGURES.items():
            # No date, and no version of matplotlib: files change where the figure does.
            metadata = {"Date": None, "Creator": None}
            draw().savefig(folder / f"{name}.svg", metadata=metadata)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
