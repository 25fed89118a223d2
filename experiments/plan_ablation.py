"""What each part of the memory model is worth: errors of predictions with the part switched off.

    python -m experiments.plan_ablation                  # every plan in results/plan_costs.json
    python -m experiments.plan_ablation --target cpu
    python -m experiments.plan_ablation --again          # after the memory model changed

XLA's peaks are those of ``results/plan_costs.json``; nothing is compiled. Per target, over all
plans: median, mean and worst error with all parts, and with one part off. Some of the parts in the
table are gone since: places found early, the order of a TPU's sums, its copies of rings. Residuals
of branches stayed for plans compiled later (MobileNetV2 in 8 blocks, 2PS: 48% too low without).
"""

import argparse
import contextlib
import json
import os
import statistics
from collections.abc import Iterator
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: no device is wanted

import jax

from experiments import report
from experiments.plans import parse, wrt_of
from lrjax.planner import compilers, cost, loops, reverse, steps, whole
from lrjax.planner.liveness import Liveness
from lrjax.rowgraph.graph import size_bytes

RESULTS = report.RESULTS / "plan_ablation.json"
PEAKS = report.RESULTS / "plan_costs.json"


_line_bytes = loops.line_bytes


def _held_once(loop: Any, *, deep_only: bool = False) -> float:
    return 0.0 if deep_only else _line_bytes(loop)


def _unchanged(operations: Any, *rest: Any) -> Any:
    return tuple(operations)


# Per part: what is replaced by what.
PARTS: dict[str, list[tuple[Any, str, Any]]] = {
    "everything": [],
    "results of the forward pass that XLA keeps": [(compilers, "_computed_once", _unchanged)],
    "gpu: pool gradients": [(compilers, "_with_pool_gradients", _unchanged)],
    "gpu: copies of kernels": [(loops._Events, "_kernel_copies", lambda self, loop: [])],
    "cpu: places, differences": [(compilers, "_on_cpu", _unchanged)],
    "tpu: padding of channels": [(whole, "buffer_bytes", lambda a, target: float(size_bytes(a)))],
    "tpu: vector memory": [
        (loops, "in_main_memory", lambda count, target: count),
        (reverse, "in_main_memory", lambda count, target: count),
    ],
    "scratch of convolutions": [(whole, "convolution_scratch", lambda *args: 0.0)],
    "results in the place of what they read": [(Liveness, "_is_overwritten", lambda *args: False)],
    "gradients lend their places": [
        (Liveness, "hosted", frozenset()),
        (reverse, "bytes_beside", lambda sizes, hosts: sum(sizes)),
    ],
    "residuals of branches": [(reverse, "with_residuals", lambda step, rest: step.operations)],
    "slabs that are read as they are": [(steps.Step, "_is_slab", lambda self, source: False)],
    "line buffers deeper than a slab twice": [(loops, "line_bytes", _held_once)],
}


@contextlib.contextmanager
def without(part: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for owner, name, value in PARTS[part]:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def errors(name: str, target: str, peak_mib: float) -> dict[str, float]:
    """A plan's error per part that is off."""
    plan = parse(name, target)
    args = plan.step.arguments(plan.size)
    fixed = sum(size_bytes(leaf) for leaf in jax.tree.leaves((args, args[0])))
    segments = [(s, c, wrt_of(plan, s)) for s, c in plan.as_compiled()]
    found = {}
    for part in PARTS:
        with without(part):
            costs = [cost.segment_cost(s, c, wrt, target) for s, c, wrt in segments]
            found[part] = cost.peak_bytes(costs, fixed) / (peak_mib * 2**20) - 1
    return found


def table(results: dict[str, Any]) -> str:
    lines = []
    for target, plans in results.items():
        for part in PARTS if plans else ():
            own = [abs(found[part]) for found in plans.values()]
            changed = sum(found[part] != found["everything"] for found in plans.values())
            numbers = (statistics.median(own), statistics.mean(own), max(own))
            lines.append([target, part, len(own), changed, *(f"{x:.1%}" for x in numbers)])
    head = ["target", "without", "plans", "changed", "median", "mean", "worst"]
    about, _, rest = (__doc__ or "").partition("\n")
    about = f"# {about}\n\n{rest[rest.index('XLA') :]}"
    return about + "\n" + report.markdown_table(head, lines)


def of_these_parts(peaks: dict[str, Any]) -> dict[str, Any]:
    """The rows written before of plans that are still compiled, and of the parts there are now."""
    return {
        target: {
            name: found
            for name, found in plans.items()
            if name in peaks.get(target, {}) and found.keys() == PARTS.keys()
        }
        for target, plans in json.loads(RESULTS.read_text()).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", nargs="*")
    parser.add_argument("--again", action="store_true", help="also what was predicted before")
    options = parser.parse_args()
    peaks = json.loads(PEAKS.read_text())[report.versions()["jax"]]
    results = {} if options.again or not RESULTS.exists() else of_these_parts(peaks)
    for target in options.target or peaks:
        for name, known in peaks[target].items():
            if name in results.get(target, {}):
                continue
            found = errors(name, target, known["peak_mib"])
            print(target, name, {k: f"{x:+.1%}" for k, x in found.items()}, flush=True)
            results.setdefault(target, {})[name] = found
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            RESULTS.with_suffix(".md").write_text(table(results) + "\n")


if __name__ == "__main__":
    main()
