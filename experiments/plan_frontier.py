"""Plans for falling budgets: do they fit, how well do they use them, and what do they cost?

    python -m experiments.plan_frontier                            # everything
    python -m experiments.plan_frontier --only vgg16/4096/1 --steps 20

Gradients in bfloat16, compiled for an H200 that need not be there: VGG-16's convolutions (mean of
squares) and ResNet-50 with frozen normalisation. Budgets fall in equal ratios from column's peak to
the smallest peak that was found. Per budget: XLA's peak over the budget, the compiled program's
time by its roofline and its operations as multiples of column's, and the segments.

The answers, per version of jax, go to ``results/plan_frontier.json`` and, as tables, ``.md``;
curves go to ``.png``.
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: no device is wanted

import jax.numpy as jnp

import lrjax
from experiments import report, vgg16_stack
from experiments.barrier_memory import NETWORKS, Network
from lrjax.planner.frontier import Frontier, Point
from lrjax.planner.progress import Progress

MIB = 2**20
RESULTS = report.RESULTS / "plan_frontier.json"
PICTURES = {"vgg16/4096/1": RESULTS.with_suffix(".png")}
STEPS = 20


def vgg16(size: int, batch: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return vgg16_stack.loss, vgg16_stack.structs(size, size, jnp.bfloat16, batch)


def resnet50(size: int, batch: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    network = Network(NETWORKS["resnet50-frozen"].model, batch, size)
    return (lambda variables, images: network(variables, images)[0]), network.arguments()


MODELS = {"vgg16": vgg16, "resnet50-frozen": resnet50}
CASES = ("vgg16/1024/1", "vgg16/4096/1", "vgg16/1024/8", "resnet50-frozen/1024/1")


def measure(case: str, steps: int, target: str) -> tuple[Frontier, dict[str, Any]]:
    """The curve of one case, named ``model/size/batch``."""
    model, size, batch = case.split("/")
    fun, args = MODELS[model](int(size), int(batch))
    wall, cpu = time.perf_counter(), time.process_time()
    compiled: list[float] = []

    def tell(progress: Progress) -> None:
        if progress.verified_bytes is not None:
            compiled.append(progress.verified_bytes / MIB)
            print(
                f"{case}: {' + '.join(progress.strategies)}: {progress.operations:.3f}, predicted "
                f"{progress.predicted_bytes / MIB:,.0f}, XLA {progress.verified_bytes / MIB:,.0f}",
                flush=True,
            )

    curve = lrjax.frontier(
        fun, *args, in_axes=(None, 1), target=target, wrt=0, steps=steps, on_progress=tell
    )
    result = {
        "points": [_entry(curve, point) for point in curve.points],
        "compilations": len(compiled),
        "wall_s": round(time.perf_counter() - wall, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
    }
    return curve, result


def _entry(curve: Frontier, point: Point) -> dict[str, Any]:
    own = {
        "method": point.method,
        "peak_mib": round(point.peak_bytes / MIB, 1),
        "operations": round(point.operations, 4),
        "segments": point.detail,
    }
    time_ratio = curve.time_of(point)
    if time_ratio is not None:
        own["time"] = round(time_ratio, 3)
    if point.budget_bytes is not None:
        own["budget_mib"] = round(point.budget_bytes / MIB, 1)
        own["used"] = round(point.peak_bytes / point.budget_bytes, 3)
    if point.plan is not None:
        own["blocks"] = [choice.num_blocks for choice in point.plan.choices]
    return own


def tables(results: dict[str, Any]) -> str:
    """All results, of every version of jax, as Markdown."""
    parts = [
        "# Plans for falling budgets, compiled for an H200",
        "Gradients in bfloat16; MiB; time, by the roofline of what was compiled, and operations as "
        "multiples of column's; a star: an image at a time. Every peak is XLA's. Printed by "
        "`python -m experiments.plan_frontier`.",
    ]
    for version, own in results.items():
        for case, found in own.get("curves", {}).items():
            parts.append(
                f"## {case}, jax {version}\n\n{found['compilations']} compilations, "
                f"{found['cpu_s']:,.0f} s of processor time for all of the table."
            )
            parts.append(_table(found["points"]))
    return "\n\n".join(parts)


def _table(points: list[dict[str, Any]]) -> str:
    rows = [
        [
            point["method"],
            "" if "budget_mib" not in point else f"{point['budget_mib']:,.0f}",
            f"{point['peak_mib']:,.0f}",
            f"{point.get('used', '')}",
            f"{point.get('time', '')}",
            f"{point['operations']:.3f}",
            point["segments"],
        ]
        for point in points
    ]
    header = ["method", "budget", "peak", "peak / budget", "time", "operations", "segments"]
    return report.markdown_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=CASES, help="model/size/batch")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--target", default="h200")
    parser.add_argument("--no-write", action="store_true", help="print only; leave results/ alone")
    options = parser.parse_args()
    for case in options.only:
        curve, found = measure(case, options.steps, options.target)
        print(curve, flush=True)
        if options.no_write or options.target != "h200":
            continue
        _write({"curves": {case: found}})
        if case in PICTURES:
            curve.save_png(PICTURES[case], f"{case}, bfloat16")


def _write(found: dict[str, Any]) -> None:
    results = report.merge(RESULTS, report.versions()["jax"], found)
    RESULTS.with_suffix(".md").write_text(tables(results) + "\n")


if __name__ == "__main__":
    main()
