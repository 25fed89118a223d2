"""Step time and memory of VGG-16's gradient on CPU: row strategies against column.

    python scripts/bench_cpu.py                          # 512x512, a few block counts
    python scripts/bench_cpu.py --size 256 --methods column stream/8 2ps/4 --repeats 9

float32, batch 1, gradient of mean(y**2) with respect to the parameters. The methods take turns,
so that what else the machine does meets them all alike; a method's time ratio is the median over
the turns of its time over column's in the same turn. Memory is XLA's: temporaries, and the peak
with arguments and outputs. Every gradient is compared with column's before it is timed.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax

from experiments import report
from experiments.gradcheck import max_error
from experiments.vgg16_stack import COLUMN, init, parse_method
from lrjax import memory

METHODS = (
    "column",
    "checkpoint-block",
    "2ps/2",
    "2ps/4",
    "2ps/8",
    "stream/4",
    "stream/8",
    "stream/16",
    "overl/2",
    "overl/4",
)

# What is asked of the fastest block count of a strategy: time and memory, as ratios to column's.
TIME_LIMITS = {"2ps": 0.95, "stream": 1.05}
MEMORY_LIMIT = 0.75

# What the checker asks of small float32 cases; reported, and no part of the time and memory target.
# At 512x512 column itself is 2.2e-4 from the float64 gradient; the strategies, 1.2e-5 from column.
GRADIENT_LIMIT = 1e-5


@dataclass(frozen=True)
class Program:
    """A compiled gradient, ready to be timed; ``method`` is its name."""

    method: Any
    run: Callable[[], Any]
    compile_s: float
    peak_bytes: int
    temp_bytes: int
    gradient_error: float


def prepare(method: str, size: int) -> Callable[[], Any]:
    """The compiled gradient with its arguments, as ``lrjax.memory.measure_rss`` wants it."""
    args = arguments(size)
    compiled = jax.jit(parse_method(method).gradient()).lower(*args).compile()
    return lambda: compiled(*args)


def arguments(size: int) -> tuple[Any, Any]:
    """Parameters and one image, random, float32."""
    images = jax.random.normal(jax.random.key(1), (1, size, size, 3))
    return jax.block_until_ready((init(jax.random.key(0)), images))


def compile_program(
    method: Any, gradient: Callable[..., Any], args: tuple[Any, ...], reference: Any
) -> Program:
    """Compile ``gradient`` and compare what it gives with ``reference`` (``None``: nothing yet)."""
    start = time.perf_counter()
    compiled = jax.jit(gradient).lower(*args).compile()
    compile_s = time.perf_counter() - start

    def run() -> Any:
        return jax.block_until_ready(compiled(*args))

    return Program(
        method=method,
        run=run,
        compile_s=compile_s,
        peak_bytes=memory.peak_bytes(compiled),
        temp_bytes=memory.temp_bytes(compiled),
        gradient_error=0.0 if reference is None else max_error(run(), reference),
    )


def time_in_turns(programs: list[Program], repeats: int) -> dict[Any, list[float]]:
    """Seconds of each run of each program, one run of every program per turn."""
    seconds: dict[Any, list[float]] = {program.method: [] for program in programs}
    for program in programs:
        program.run()  # the first run also maps its memory in
    for _ in range(repeats):
        for program in programs:
            start = time.perf_counter()
            program.run()
            seconds[program.method].append(time.perf_counter() - start)
    return seconds


def summarise(
    programs: list[Program], seconds: dict[Any, list[float]], rss: dict[Any, int]
) -> list[dict[str, Any]]:
    """One record per program, with ratios to the first, column."""
    column = programs[0]
    records = []
    for program in programs:
        turns = zip(seconds[program.method], seconds[column.method], strict=True)
        record = {
            "method": str(program.method),
            "compile_s": program.compile_s,
            "compile_ratio": program.compile_s / column.compile_s,
            "seconds": seconds[program.method],
            "median_s": statistics.median(seconds[program.method]),
            "time_ratio": statistics.median(own / columns for own, columns in turns),
            "peak_bytes": program.peak_bytes,
            "peak_ratio": program.peak_bytes / column.peak_bytes,
            "temp_bytes": program.temp_bytes,
            "temp_ratio": program.temp_bytes / column.temp_bytes,
            "gradient_error": program.gradient_error,
        }
        if program.method in rss:
            record["rss_bytes"] = rss[program.method]
            record["rss_ratio"] = rss[program.method] / rss[column.method]
        records.append(record)
    return records


def verdicts(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each strategy with a target: its fastest block count, and whether it meets the target."""
    found = []
    for strategy, time_limit in TIME_LIMITS.items():
        own = [record for record in records if record["method"].startswith(strategy + "/")]
        if own:
            best = min(own, key=lambda record: record["time_ratio"])
            met = best["time_ratio"] <= time_limit and best["peak_ratio"] < MEMORY_LIMIT
            found.append(
                {
                    "method": best["method"],
                    "time_ratio": best["time_ratio"],
                    "time_limit": time_limit,
                    "peak_ratio": best["peak_ratio"],
                    "peak_limit": MEMORY_LIMIT,
                    "met": met,
                    "gradient_error": best["gradient_error"],
                    "gradient_limit": GRADIENT_LIMIT,
                    "gradient_within_limit": best["gradient_error"] <= GRADIENT_LIMIT,
                }
            )
    return found


def print_report(records: list[dict[str, Any]]) -> None:
    header = ["method", "step s", "time ratio", "peak MiB", "peak ratio", "temp MiB", "temp ratio",
              "RSS growth MiB", "compile s", "gradient error"]  # fmt: skip
    rows = [
        [
            record["method"],
            f"{record['median_s']:.3f}",
            report.ratio(record["time_ratio"]),
            report.mib(record["peak_bytes"]),
            report.ratio(record["peak_ratio"]),
            report.mib(record["temp_bytes"]),
            report.ratio(record["temp_ratio"]),
            report.mib(record.get("rss_bytes")),
            f"{record['compile_s']:.1f}",
            f"{record['gradient_error']:.1e}",
        ]
        for record in records
    ]
    print(report.markdown_table(header, rows))
    for verdict in verdicts(records):
        print(
            f"{verdict['method']}: {verdict['time_ratio']:.2f} of column's time (at most "
            f"{verdict['time_limit']}) at {verdict['peak_ratio']:.2f} of its memory (under "
            f"{verdict['peak_limit']}): {'met' if verdict['met'] else 'NOT MET'}; "
            f"gradient {verdict['gradient_error']:.1e} from column's (checker's limit "
            f"{verdict['gradient_limit']:.0e}): "
            f"{'within' if verdict['gradient_within_limit'] else 'OVER'}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=512, help="pixels a side (default 512)")
    parser.add_argument(
        "--repeats", type=int, default=7, help="turns (default 7, at least 5 count)"
    )
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD[/BLOCKS]")
    parser.add_argument("--rss", action="store_true", help="also measure resident memory")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    options = parser.parse_args()

    methods = list(dict.fromkeys([COLUMN, *map(parse_method, options.methods)]))
    args = arguments(options.size)
    programs: list[Program] = []
    reference = None
    for method in methods:
        print(f"compiling {method}", file=sys.stderr, flush=True)
        programs.append(compile_program(method, method.gradient(), args, reference))
        if method == COLUMN:
            reference = programs[-1].run()
    seconds = time_in_turns(programs, options.repeats)
    rss = {}
    if options.rss:
        this = f"{Path(__file__).stem}:prepare"
        rss = {m: memory.measure_rss(this, str(m), options.size).growth_bytes for m in methods}

    records = summarise(programs, seconds, rss)
    print_report(records)
    if options.out:
        report.write_json(
            options.out,
            {
                "environment": report.environment(),
                "size": options.size,
                "dtype": "float32",
                "repeats": options.repeats,
                "methods": records,
                "targets": verdicts(records),
            },
        )


if __name__ == "__main__":
    main()
