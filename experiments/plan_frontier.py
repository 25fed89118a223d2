"""Plans for falling budgets: do they fit, how well do they use them, and what do they cost?

    python -m experiments.plan_frontier                            # everything
    python -m experiments.plan_frontier --only vgg16/4096/1 --steps 20
    python -m experiments.plan_frontier --fractions 0.5 0.25 --only resnet50-frozen/2048/1

Gradients in bfloat16, compiled for an H200 that need not be there: VGG-16's convolutions (mean of
squares) and ResNet-50 with frozen normalisation. Budgets fall in equal ratios from column's peak to
the smallest peak that was found. Per budget: XLA's peak over the budget, operations as a multiple
of column's, and the segments.

The answers, per version of jax, go to ``results/plan_frontier.json`` and, as tables, ``.md``;
curves go to ``.png``. With ``--fractions``: for each of these parts of column's peak one plan, from
nothing, and how long planning took, compilations included.
"""

import argparse
import itertools
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: no device is wanted

import jax
import jax.numpy as jnp

import lrjax
from experiments import report, vgg16_stack
from experiments.barrier_memory import NETWORKS, Network
from lrjax import memory
from lrjax.planner.frontier import Frontier, Point
from lrjax.planner.problem import problem_of
from lrjax.planner.proof import Progress

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
        "points": [_entry(point) for point in curve.points],
        "compilations": len(compiled),
        "wall_s": round(time.perf_counter() - wall, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
    }
    return curve, result


def plan_within(case: str, fraction: float, target: str) -> dict[str, Any]:
    """One plan for a part of column's peak, and what it took to know the peak and to plan."""
    jax.clear_caches()
    wall, cpu = time.perf_counter(), time.process_time()
    model, size, batch = case.split("/")
    fun, args = MODELS[model](int(size), int(batch))
    call: dict[str, Any] = {"in_axes": (None, 1), "target": target, "wrt": 0}
    loss = problem_of(fun, args, (None, 1), target, 0)
    column = memory.peak_bytes(memory.compile_for(loss.gradient(fun), *args, target=target))
    found: dict[str, Any] = {"column_mib": round(column / MIB, 1)}
    found |= {"fixed_mib": round(loss.fixed_bytes / MIB, 1)}
    try:
        plan = lrjax.plan(fun, *args, budget=int(column * fraction), **call)
    except lrjax.BudgetTooSmallError as error:
        smallest = error.smallest_bytes
        found |= {"smallest_mib": None if smallest is None else round(smallest / MIB, 1)}
    else:
        assert plan.verified_peak_bytes is not None
        found |= {
            "peak_mib": round(plan.verified_peak_bytes / MIB, 1),
            "operations": round(plan.operations, 4),
            "segments": " + ".join(choice.strategy.name for choice in plan.choices),
            "compilations": plan.compilations,
        }
    return found | {
        "wall_s": round(time.perf_counter() - wall, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
    }


def _entry(point: Point) -> dict[str, Any]:
    own = {
        "method": point.method,
        "peak_mib": round(point.peak_bytes / MIB, 1),
        "operations": round(point.operations, 4),
        "segments": point.detail,
    }
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
        "Gradients in bfloat16; MiB; operations as a multiple of column's; a star: an image at a "
        "time. Every peak is XLA's. Printed by `python -m experiments.plan_frontier`.",
    ]
    singles = [
        [version, *key.split("@"), *(found.get(name, "") for name in _SINGLE)]
        for version, own in results.items()
        for key, found in own.get("plans", {}).items()
    ]
    if singles:
        header = ["jax", "case", "of column", *(name.replace("_", " ") for name in _SINGLE)]
        parts.append(
            "One plan each, from nothing (`--fractions`). Seconds include every compilation, also "
            "column's, whose peak says the budget; fixed: arguments and gradients.\n\n"
            + report.markdown_table(header, singles)
        )
    for version, own in results.items():
        for case, found in own.get("curves", {}).items():
            parts.append(
                f"## {case}, jax {version}\n\n{found['compilations']} compilations, "
                f"{found['cpu_s']:,.0f} s of processor time for all of the table."
            )
            parts.append(_table(found["points"]))
    return "\n\n".join(parts)


_SINGLE = (
    *("column_mib", "fixed_mib", "peak_mib", "operations", "compilations", "wall_s", "cpu_s"),
    "segments",
)


def _table(points: list[dict[str, Any]]) -> str:
    rows = [
        [
            point["method"],
            "" if "budget_mib" not in point else f"{point['budget_mib']:,.0f}",
            f"{point['peak_mib']:,.0f}",
            f"{point.get('used', '')}",
            f"{point['operations']:.3f}",
            point["segments"],
        ]
        for point in points
    ]
    header = ["method", "budget", "peak", "peak / budget", "operations", "segments"]
    return report.markdown_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=CASES, help="model/size/batch")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--target", default="h200")
    parser.add_argument("--no-write", action="store_true", help="print only; leave results/ alone")
    parser.add_argument("--fractions", nargs="*", type=float, help="plans for parts of column")
    options = parser.parse_args()
    for case, fraction in itertools.product(options.only, options.fractions or ()):
        single = plan_within(case, fraction, options.target)
        print(case, fraction, single, flush=True)
        if not options.no_write and options.target == "h200":
            _write({"plans": {f"{case}@{fraction}": single}})
    if options.fractions:
        return
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
