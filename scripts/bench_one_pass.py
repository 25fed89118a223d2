"""A training step of dense prediction in one pass, on CPU: U-Net without normalisation.

    python scripts/bench_one_pass.py                       # 512x512, a quarter of the channels
    python scripts/bench_one_pass.py --size 768 --blocks 16 32 --out results.json

float32, one image, softmax cross-entropy of a class per pixel. The loss is a sum over rows, so
forward and backward stream together and nothing is recomputed but cheap copies:

- ``loss``: ``jax.value_and_grad(lrjax.rowwise(loss, ...))``;
- ``gradient``: ``lrjax.rowwise(jax.value_and_grad(loss), ...)``.

The programs take turns; a time ratio is the median over the turns of a program's time over
column's in the same turn. Memory is XLA's: temporaries, and the peak with arguments and outputs.
Operations are those of the row graph, as a multiple of column's.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
from bench_cpu import compile_program, summarise, time_in_turns

import lrjax
from experiments import report
from lrjax.app.training import classification_loss
from lrjax.models import UNet
from lrjax.program.inline import evaluate
from lrjax.rowgraph.graph import build
from lrjax.rowgraph.tracing import trace
from lrjax.strategies.base import TOP_DOWN
from lrjax.strategies.programs import row_program, traced_graph
from lrjax.strategies.stream import stream_programs

IN_AXES = (None, 1, 1)
CLASSES = 3
COLUMN = "column"
WAYS = ("loss", "gradient")

# What is asked of the fastest block count: time, memory and operations, as ratios to column's.
LIMITS = {"time_ratio": 1.1, "peak_ratio": 0.25, "operations": 1.02}


def loss_of(model: UNet) -> Callable[..., jax.Array]:
    labelled = classification_loss(model)

    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        return labelled(params, images, labels, {}, jax.random.key(0))[0]

    return loss


def program(method: str, loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Value and gradient by the way and in the number of blocks that ``method`` names."""
    way, _, blocks = method.partition("/")
    if way == COLUMN:
        return jax.value_and_grad(loss)
    rows: dict[str, Any] = {"in_axes": IN_AXES, "num_blocks": int(blocks)}
    if way == "loss":
        return jax.value_and_grad(lrjax.rowwise(loss, **rows))
    return lrjax.rowwise(jax.value_and_grad(loss), **rows)


def operations(method: str, loss: Callable[..., jax.Array], args: Any) -> float:
    """Arithmetic operations of all row loops; column's, as a row graph counts them."""
    way, _, blocks = method.partition("/")
    traced = trace(loss if way == "loss" else jax.value_and_grad(loss), IN_AXES, args, {})
    flat = traced.program
    if way == COLUMN:
        return build(flat, traced.axes).operations(once=True)
    if way == "loss":
        wrt = [i for i, axis in enumerate(traced.axes) if axis is None]
        found = stream_programs(flat, traced.axes, int(blocks), wrt)
        assert found.backward is None, "two passes"
        return found.forward.graph.operations()
    graph = traced_graph(lambda *xs: evaluate(flat, xs), flat.structs, traced.axes)
    return row_program(graph, TOP_DOWN, int(blocks)).graph.operations()


def arguments(model: UNet, size: int) -> tuple[Any, jax.Array, jax.Array]:
    images = jax.random.normal(jax.random.key(0), (1, size, size, 3))
    labels = jax.random.randint(jax.random.key(1), (1, size, size), 0, CLASSES)
    params = jax.jit(model.init)(jax.random.key(2), images)["params"]
    return jax.block_until_ready((params, images, labels))


def print_report(records: list[dict[str, Any]]) -> None:
    header = ["program", "step s", "time", "peak MiB", "memory", "operations", "compile s", "error"]
    rows = [
        [
            record["method"],
            f"{record['median_s']:.3f}",
            report.ratio(record["time_ratio"]),
            report.mib(record["peak_bytes"]),
            report.ratio(record["peak_ratio"]),
            f"{record['operations']:.4f}",
            f"{record['compile_s']:.1f}",
            f"{record['gradient_error']:.1e}",
        ]
        for record in records
    ]
    print(report.markdown_table(header, rows))
    for way in ("loss", "gradient"):
        own = [record for record in records if record["method"].startswith(way)]
        if own:
            best = min(own, key=lambda record: record["time_ratio"])
            missed = [name for name, limit in LIMITS.items() if best[name] > limit]
            verdict = f"NOT MET: {', '.join(missed)}" if missed else "met"
            print(f"{best['method']}: limits {LIMITS}: {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=512, help="pixels a side (default 512)")
    parser.add_argument("--width", type=float, default=0.25, help="multiplier of the channels")
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--repeats", type=int, default=7, help="turns (default 7)")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    options = parser.parse_args()

    model = UNet(norm="none", num_classes=CLASSES, width=options.width)
    loss, args = loss_of(model), arguments(model, options.size)
    methods = [COLUMN, *(f"{way}/{count}" for count in options.blocks for way in options.ways)]
    programs, reference = [], None
    for method in methods:
        print(f"compiling {method}", file=sys.stderr, flush=True)
        programs.append(compile_program(method, program(method, loss), args, reference))
        reference = programs[0].run() if reference is None else reference
    records = summarise(programs, time_in_turns(programs, options.repeats), {})
    columns = operations(COLUMN, loss, args)
    for record in records:
        record["operations"] = operations(record["method"], loss, args) / columns
    print_report(records)
    if options.out:
        settings = {"size": options.size, "width": options.width, "repeats": options.repeats}
        content = {"environment": report.environment(), **settings, "programs": records}
        report.write_json(options.out, content)


if __name__ == "__main__":
    main()
