"""Peak memory of VGG-16's gradient, compiled for an H200 that need not be there.

    python -m experiments.vgg16_memory                          # everything
    python -m experiments.vgg16_memory --only peaks --rows 4096/stream/128 4096/column

bfloat16, batch 1, gradient of mean(y**2) with respect to the parameters. Three questions:

- ``peaks``: how much memory column, ``jax.checkpoint`` and lrjax's strategies take;
- ``heights``: whether stream's temporary memory depends on the image's height;
- ``compile``: what the row loops cost in compile time.

The answers, per version of jax, go to ``results/vgg16_memory.json`` and, as tables, ``.md``;
``tests/memory/test_claims.py`` asserts the limits given here.
"""

import argparse
import gc
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: no device is wanted

import jax.numpy as jnp

from experiments import report
from experiments.vgg16_stack import COLUMN, Method, parse_method, structs
from lrjax import memory

MIB = 2**20
RESULTS = report.RESULTS / "vgg16_memory.json"


@dataclass(frozen=True)
class PeakRow:
    """One program: ``method`` on ``size`` x ``size`` pixels, and the peak it may take."""

    size: int
    method: Method
    limit_mib: int | None = None
    image_dtype: str = "bfloat16"

    def __str__(self) -> str:
        suffix = "" if self.image_dtype == "bfloat16" else f"/{self.image_dtype}"
        return f"{self.size}/{self.method}{suffix}"


PEAKS = (
    PeakRow(4096, COLUMN),
    PeakRow(4096, Method("checkpoint-block")),
    PeakRow(4096, Method("checkpoint-layer")),
    PeakRow(4096, Method("stream", 128), limit_mib=600),
    PeakRow(4096, Method("stream-h", 128)),
    PeakRow(4096, Method("stream-offload", 128), limit_mib=300),
    PeakRow(4096, Method("2ps", 64), limit_mib=1_750),
    PeakRow(4096, Method("overl", 16), limit_mib=3_800),
    PeakRow(16384, Method("stream", 256), limit_mib=4_096),
    PeakRow(16384, Method("stream-offload", 256)),
    PeakRow(16384, Method("2ps", 256)),
    PeakRow(16384, Method("overl", 256)),
    PeakRow(32768, Method("stream", 512), limit_mib=12_288),
    PeakRow(32768, Method("stream", 512), limit_mib=9_216, image_dtype="uint8"),
    PeakRow(32768, Method("stream-offload", 512), image_dtype="uint8"),
)
COLUMN_4096_MIB = 22_529

HEIGHTS = (2048, 8192, 32768)
HEIGHTS_WIDTH = 1024
HEIGHTS_ROWS_PER_STEP = 32
HEIGHTS_SPREAD = 1.05

COMPILE_SIZE = 4096
# Few and many blocks. 2PS and OverL divide output rows, of which there are 128.
COMPILE_BLOCKS = {"stream": (32, 256), "2ps": (32, 128), "overl": (32, 128)}
COMPILE_METHODS = tuple(
    Method(strategy, num_blocks)
    for strategy, choices in COMPILE_BLOCKS.items()
    for num_blocks in choices
)
COMPILE_LIMIT = 4.0  # times column's
COMPILE_GROWTH_LIMIT = 1.3  # many blocks over few


@dataclass(frozen=True)
class Compiled:
    """What compiling one program told, and what it took from Python function to program.

    ``cpu_s`` is this process's processor time, all threads: other processes hardly change it.
    """

    peak_bytes: int
    temp_bytes: int
    wall_s: float
    cpu_s: float


def compile_gradient(
    method: Method,
    height: int,
    width: int | None = None,
    target: str = "h200",
    image_dtype: str = "bfloat16",
) -> Compiled:
    """Compile the stack's gradient by ``method``; ``width`` is ``height`` unless given."""
    args = structs(height, width or height, jnp.bfloat16, image_dtype=jnp.dtype(image_dtype))
    gc.collect()  # what earlier compilations left is not this one's to clear away
    wall, cpu = time.perf_counter(), time.process_time()
    compiled = memory.compile_for(method.gradient(), *args, target=target)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak, temporary = memory.peak_bytes(compiled), memory.temp_bytes(compiled)
    return Compiled(peak, temporary, wall, cpu)


def height_temp_bytes(height: int, target: str = "h200") -> int:
    """Stream's temporary memory for an image of this height.

    mean(y**2) is a sum over rows, so that not even the stack's output map exists whole, and the
    temporaries hold nothing that grows with the image.
    """
    method = Method("stream", height // HEIGHTS_ROWS_PER_STEP)
    return compile_gradient(method, height, HEIGHTS_WIDTH, target).temp_bytes


def compile_cpu_s(
    methods: Sequence[Method], repeats: int, target: str = "h200"
) -> dict[Method, float]:
    """The least processor time of ``repeats`` compilations each, taken in turns.

    In turns, so that a machine that is busy for a while is so for all of them.
    """
    rounds = [
        [compile_gradient(method, COMPILE_SIZE, target=target).cpu_s for method in methods]
        for _ in range(repeats)
    ]
    return dict(zip(methods, map(min, zip(*rounds, strict=True)), strict=True))


def measure_peaks(rows: list[PeakRow], target: str) -> dict[str, Any]:
    results = {}
    for row in rows:
        compiled = compile_gradient(
            row.method, row.size, target=target, image_dtype=row.image_dtype
        )
        results[str(row)] = {
            "peak_mib": round(compiled.peak_bytes / MIB, 1),
            "temp_mib": round(compiled.temp_bytes / MIB, 1),
            "limit_mib": row.limit_mib,
            "compile_s": round(compiled.wall_s, 1),
        }
        print(
            f"{row!s:>24}  {compiled.peak_bytes / MIB:>10,.1f} MiB  {compiled.wall_s:5.1f} s",
            flush=True,
        )
    return results


def measure_heights(target: str) -> dict[str, Any]:
    results = {}
    for height in HEIGHTS:
        temp = height_temp_bytes(height, target)
        results[str(height)] = {"temp_mib": round(temp / MIB, 1)}
        print(f"height {height:>6}: temporaries {temp / MIB:,.1f} MiB", flush=True)
    return results


def measure_compile_times(repeats: int, target: str) -> dict[str, Any]:
    compile_gradient(COLUMN, COMPILE_SIZE, target=target)  # the first one warms the compiler up
    found = compile_cpu_s((COLUMN, *COMPILE_METHODS), repeats, target)
    results = {}
    for method, seconds in found.items():
        ratio = seconds / found[COLUMN]
        results[str(method)] = {"cpu_s": round(seconds, 2), "ratio": round(ratio, 2)}
        print(f"{method!s:>12}: {seconds:6.2f} s, {ratio:5.2f} x column's", flush=True)
    return results


def tables(results: dict[str, Any]) -> str:
    """All results, of every version of jax, as Markdown."""
    return "\n\n".join(
        [
            "# VGG-16's convolutions: memory of the gradient, compiled for an H200",
            "bfloat16, batch 1, gradient of mean(y²) with respect to the parameters; XLA's peak in "
            "MiB. Printed by `python -m experiments.vgg16_memory`.",
            _peaks_table(results),
            f"Stream, width {HEIGHTS_WIDTH:,}, {HEIGHTS_ROWS_PER_STEP} rows a step: temporary "
            "memory, MiB.",
            _heights_table(results),
            f"Compile time of the gradient at {COMPILE_SIZE}x{COMPILE_SIZE}, seconds of processor "
            "time (times column's).",
            _compile_table(results),
        ]
    )


def _peaks_table(results: dict[str, Any]) -> str:
    rows = []
    for row in PEAKS:
        limit = "" if row.limit_mib is None else f"{row.limit_mib:,}"
        peaks = [_cell(own, "peaks", str(row), "peak_mib") for own in results.values()]
        rows.append([row.size, row.image_dtype, row.method, limit, *peaks])
    return report.markdown_table(
        ["image", "of", "method", "limit", *_version_columns(results)], rows
    )


def _heights_table(results: dict[str, Any]) -> str:
    rows = [
        [height, *(_cell(own, "heights", str(height), "temp_mib") for own in results.values())]
        for height in HEIGHTS
    ]
    return report.markdown_table(["height", *_version_columns(results)], rows)


def _compile_table(results: dict[str, Any]) -> str:
    rows = [
        [method, *(_compile_cell(own, str(method)) for own in results.values())]
        for method in (COLUMN, *COMPILE_METHODS)
    ]
    return report.markdown_table(["method", *_version_columns(results)], rows)


def _version_columns(results: dict[str, Any]) -> list[str]:
    return [f"jax {version}" for version in results]


def _cell(results: dict[str, Any], part: str, row: str, field: str) -> str:
    value = results.get(part, {}).get(row, {}).get(field)
    return "" if value is None else f"{value:,.0f}"


def _compile_cell(results: dict[str, Any], method: str) -> str:
    entry = results.get("compile", {}).get(method)
    return "" if entry is None else f"{entry['cpu_s']:.1f} ({entry['ratio']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("peaks", "heights", "compile"),
        default=("peaks", "heights", "compile"),
        help="which questions to ask",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        metavar="SIZE/METHOD[/BLOCKS]",
        help="peaks of these programs only, e.g. 4096/stream/128 4096/column",
    )
    parser.add_argument("--target", default="h200", help="the device to compile for")
    parser.add_argument("--compile-repeats", type=int, default=3)
    parser.add_argument("--no-write", action="store_true", help="print only; leave results/ alone")
    options = parser.parse_args()

    parts = {}
    if "peaks" in options.only:
        known = {str(row): row for row in PEAKS}
        rows = [known.get(name) or _parse_row(name) for name in options.rows or known]
        parts["peaks"] = measure_peaks(rows, options.target)
    if "heights" in options.only:
        parts["heights"] = measure_heights(options.target)
    if "compile" in options.only:
        parts["compile"] = measure_compile_times(options.compile_repeats, options.target)
    if not options.no_write and options.target == "h200":
        text = tables(report.merge(RESULTS, report.versions()["jax"], parts))
        RESULTS.with_suffix(".md").write_text(text + "\n")
        print("\n" + text)


def _parse_row(text: str) -> PeakRow:
    size, _, method = text.partition("/")
    return PeakRow(int(size), parse_method(method))


if __name__ == "__main__":
    main()
