"""Plans for half, a quarter and a tenth of column's peak: memory, time, and what planning took.

    python -m experiments.plan_networks                       # every network, at 2048x2048
    python -m experiments.plan_networks --only edsr bit --size 1024 --parts 0.5

Gradients in bfloat16 with respect to the parameters, one image, compiled for an H200 that need not
be there. Six networks of ``lrjax.models``, six written as other people write them
(``other_networks``). Per budget: XLA's peak and the compiled program's time by its roofline, over
column's; programs compiled and seconds of planning, compilations included, from nothing (processor
time beside it: the machine does other things too); and of the simple plans (column, checkpoints at
few cuts, one strategy for all in a few numbers of blocks) the fastest that is predicted to fit,
compiled. Two or three programs shared two cores when this was measured. Where no plan fits: the
smallest peak that was found, over column's; None where arguments and gradients alone are more than
the budget. Results: ``results/plan_networks.json`` and ``.md``.
"""

import argparse
import functools
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: no device is wanted

import jax
import jax.numpy as jnp
from flax import nnx

import lrjax
from experiments import other_networks as other
from experiments import report
from lrjax import models
from lrjax.planner import proof
from lrjax.planner.problem import problem_of
from lrjax.planner.proof import prover_of
from lrjax.planner.search import Limits

RESULTS = report.RESULTS / "plan_networks.json"
PARTS = (0.5, 0.25, 0.1)
TARGET = "h200"
HALF = jnp.bfloat16

LINEN: dict[str, Callable[[], Any]] = {
    "vgg16": lambda: models.VGG16(head="gap", dtype=HALF),
    "resnet50-frozen": lambda: models.ResNet50(norm="frozen", dtype=HALF),
    "resnet50-group": lambda: models.ResNet50(norm="group", dtype=HALF),
    "unet": lambda: models.UNet(dtype=HALF),
    "convnext": lambda: models.ConvNeXtT(dtype=HALF),
    "mobilenet": lambda: models.MobileNetV2(norm="frozen", dropout_rate=0.0, dtype=HALF),
    "edsr": lambda: other.EDSR(HALF),
    "bit": lambda: other.BiT(HALF),
    "keras-unet": lambda: other.KerasUNet(HALF),
    "dense-vgg": lambda: other.DenseVGG(HALF),
    "dncnn": lambda: other.DnCNN(HALF),
}
NETWORKS = (*LINEN, "nnx-resnet")


def number(outputs: jax.Array) -> jax.Array:
    """Cross-entropy with the first class for logits, else a mean of squares."""
    outputs = outputs.astype(jnp.float32)
    if outputs.ndim == 2:
        return -jnp.mean(jax.nn.log_softmax(outputs)[:, 0])
    return jnp.mean(jnp.square(outputs))


def call(name: str, size: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A loss, and its arguments: parameters, images, other variables."""
    images = jax.ShapeDtypeStruct((1, size, size, 3), HALF)
    if name == "nnx-resnet":
        model = nnx.eval_shape(lambda: other.NNXResNet(HALF, nnx.Rngs(0)))
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def nnx_loss(params: Any, images: jax.Array, rest: Any) -> Any:
            model = nnx.merge(graph, params, rest)
            value = number(model(images))
            return value, nnx.split(model, nnx.Param, ...)[2]

        return nnx_loss, (params, images, rest)
    network = LINEN[name]()
    takes_train = name in list(LINEN)[:6]
    options = {"train": True} if takes_train else {}
    variables = dict(jax.eval_shape(network.init, jax.random.key(0), images))

    def loss(params: Any, images: jax.Array, others: Any) -> Any:
        outputs, updated = network.apply(
            {"params": params, **others}, images, mutable=["batch_stats"], **options
        )
        return number(outputs), updated

    return loss, (variables.pop("params"), images, variables)


def measure(name: str, size: int, parts: tuple[float, ...]) -> dict[str, Any]:
    fun, args = call(name, size)
    problem = problem_of(fun, args, (None, 1, None), TARGET, 0)
    silent = functools.partial(lambda progress: None)
    prover = prover_of(problem)
    column = prover.verify(prover.model.column, silent)
    found: dict[str, Any] = {
        "column": {"mib": round(column.peak / 2**20, 1), "ms": round(column.seconds * 1e3, 2)},
        "fixed": round(problem.fixed_bytes / column.peak, 3),
    }
    for part in parts:
        jax.clear_caches()
        proof._PROVERS = OrderedDict()
        wall, cpu, budget = time.perf_counter(), time.process_time(), int(part * column.peak)
        try:
            plan = lrjax.plan(
                fun, *args, in_axes=(None, 1, None), wrt=0, budget=budget, target=TARGET
            )
        except lrjax.BudgetTooSmallError as error:
            smallest = error.smallest_bytes
            own: dict[str, Any] = {"smallest": smallest and round(smallest / column.peak, 3)}
        else:
            own = {
                "peak": round((plan.verified_peak_bytes or 0) / column.peak, 3),
                "time": round(plan.seconds / column.seconds, 3),
                "operations": round(plan.operations, 3),
                "plan": " + ".join(choice.text for choice in plan.choices),
            }
            own |= {"predicted": round(plan.predicted_seconds / plan.seconds, 3)}
            own["compilations"] = plan.compilations
        own |= {
            "wall_s": round(time.perf_counter() - wall, 1),
            "cpu_s": round(time.process_time() - cpu, 1),
        }
        prover = prover_of(problem)
        rung = best_simple(prover, budget)
        if rung is not None:
            own["simple"], own["simple_time"] = rung[0], round(rung[1] / column.seconds, 3)
        found[str(part)] = own
        print(name, part, own, flush=True)
    return found


def best_simple(prover: proof.Prover, budget: int) -> tuple[str, float] | None:
    """The fastest simple plan that fits: by its prediction, confirmed by XLA."""
    limits = Limits(budget)
    for steps in sorted(prover.model.simple_plans, key=lambda steps: prover.model.seconds(*steps)):
        if prover.model.peak_bytes(steps) <= budget:
            known = prover.verify(steps, lambda progress: None)
            if prover.fits(steps, limits.budget):
                name = " + ".join(dict.fromkeys(step.choice.text for step in steps))
                return f"{name} {steps[0].choice.num_blocks} in {len(steps)}", known.seconds
    return None


COLUMNS = (
    *("peak", "time", "operations", "predicted", "compilations", "wall_s", "cpu_s", "smallest"),
    *("simple_time", "simple", "plan"),
)


def table(results: dict[str, Any]) -> str:
    rows = [
        [version, name, part, *(own.get(column, "") for column in COLUMNS)]
        for version, networks in results.items()
        for name, found in networks.items()
        for part, own in found.items()
        if part not in ("column", "fixed")
    ]
    about = (__doc__ or "").rpartition("Gradients in")[2]
    header = ["jax", "network", "budget", *(c.replace("_", " ") for c in COLUMNS)]
    return f"# Plans for parts of column's peak\n\nGradients in{about}\n" + report.markdown_table(
        header, rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--parts", type=float, nargs="*", default=PARTS)
    options = parser.parse_args()
    for name in options.only:
        found = {f"{name}/{options.size}": measure(name, options.size, tuple(options.parts))}
        results = report.merge(RESULTS, report.versions()["jax"], found)
        RESULTS.with_suffix(".md").write_text(table(results) + "\n")


if __name__ == "__main__":
    main()
