"""Volumes: the 3-D U-Net's peak by column, checkpoint, stream and plan; the largest cubes.

    python -m experiments.paper.volumes --quick
    python -m experiments.paper.volumes --resume

`lrjax.models.UNet3D` in bfloat16, two classes a voxel, no normalisation (batch and group statistics
need the whole volume first), one cube with a single channel. Rows are slices of the depth, two in a
step under stream; the checkpoint keeps the levels' outputs. Sides are multiples of 16.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lrjax
from experiments import report
from experiments.paper import record
from experiments.paper.programs import MIB, measured
from experiments.paper.search import largest
from lrjax.memory.targets import find
from lrjax.models import UNet3D
from lrjax.planner import inverse
from lrjax.planner.problem import problem_of

IN_AXES = (None, 1, 1)
CUTS = ("down1", "down2", "down3", "bottom", "up3", "up2")
METHODS = ("column", "checkpoint", "stream")
SLICES = 8
STEP = 16
FULL = {"sides": (128, 256, 512), "samples": (64, 128, 192, 256), "width": 1.0}
FULL_BUDGETS = {name: find(name).memory_bytes for name in ("rtx3080", "rtx3090", "a100-80gb")}
QUICK = {"sides": (32, 48, 64), "samples": (32, 48, 64, 80), "width": 0.25}


def loss_and_arguments(side: int, width: float) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The mean cross-entropy of voxels, and shapes of parameters, volumes and labels."""
    model = UNet3D(norm="none", width=width, dtype=jnp.bfloat16)

    def loss(params: Any, volumes: jax.Array, labels: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, volumes, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    shape = (1, side, side, side)
    volumes = jax.ShapeDtypeStruct((*shape, 1), jnp.bfloat16)
    small = jax.ShapeDtypeStruct((1, 16, 16, 16, 1), jnp.bfloat16)
    params = jax.eval_shape(model.init, jax.random.key(0), small)["params"]
    return loss, (params, volumes, jax.ShapeDtypeStruct(shape, jnp.int32))


def by_method(loss: Callable[..., Any], method: str, side: int) -> Callable[..., Any]:
    if method == "column":
        return loss
    if method == "checkpoint":
        return lrjax.rowwise(loss, in_axes=IN_AXES, strategy="checkpoint", cuts=CUTS)
    return lrjax.rowwise(loss, in_axes=IN_AXES, num_blocks=max(1, side // SLICES))


def measure(settings: record.Settings, known: record.Results, save: record.Save) -> record.Results:
    chosen = QUICK if settings.quick else FULL
    budgets = {"256 MiB": 256 * MIB} if settings.quick else FULL_BUDGETS
    results = {"peaks": {}, "largest": {}, **known, "width": chosen["width"], "budgets": budgets}

    def peak(method: str, side: int) -> int:
        own = results["peaks"].setdefault(method, {})
        if str(side) not in own:
            loss, args = loss_and_arguments(side, chosen["width"])
            step = jax.value_and_grad(by_method(loss, method, side))
            own[str(side)] = measured(step, args, settings.target)
            print(method, side, f"{own[str(side)]['peak_bytes'] / MIB:,.0f} MiB", flush=True)
            save(results)
        return own[str(side)]["peak_bytes"]

    for method in METHODS if settings.wants("peaks") else ():
        for side in chosen["sides"]:
            peak(method, side)
    for method in METHODS:
        if method not in results["largest"] and settings.wants("largest"):
            sizes = {side: peak(method, side) for side in chosen["samples"]}
            results["largest"][method] = {
                name: vars(
                    largest(
                        functools.partial(peak, method), budget, step=STEP, known=sizes, degree=3
                    )
                )
                for name, budget in budgets.items()
            }
            save(results)
    if settings.wants("largest"):
        _plan_largest(results, budgets, chosen["width"], settings.target, save)
    return results


def _plan_largest(
    results: record.Results, budgets: dict[str, int], width: float, target: str, save: record.Save
) -> None:
    """The planner's largest cube: searched from the largest that a method reached."""

    def problem(side: int) -> Any:
        loss, args = loss_and_arguments(side, width)
        return problem_of(loss, args, IN_AXES, target, 0)

    own = results["largest"].setdefault("planner", {})
    for name, budget in budgets.items():
        if name in own:
            continue
        start = max(results["largest"][method][name]["size"] for method in METHODS)
        question = inverse.Question(problem, STEP, max(start, STEP), budget, grows_rows=True)
        found = inverse.largest(question, "lrjax", lambda progress: None)
        own[name] = {
            "size": found.size,
            "peak_bytes": found.peak_bytes,
            "segments": found.strategies,
        }
        print("planner", name, own[name], flush=True)
        save(results)


def table(found: record.Record) -> str:
    results = found["results"]
    sides = sorted({int(side) for own in results["peaks"].values() for side in own})
    column = results["peaks"].get("column", {})
    rows = [
        [method, *(_cell(own.get(str(side)), column.get(str(side))) for side in sides)]
        for method, own in results["peaks"].items()
    ]
    lines = [
        "# 3-D U-Net: peaks of cubes, and the largest that fit",
        f"Loss and gradient, bfloat16, one volume, no normalisation, channels times "
        f"{results['width']:g}; stream in blocks of {SLICES} slices. Peak in MiB, and time over "
        "column's by the roofline of the compiled program, where the target is a GPU.",
        report.markdown_table(["method", *(f"{s}³" for s in sides)], rows),
    ]
    if results["largest"]:
        budgets = list(results["budgets"])
        rows = [
            [
                method,
                *(
                    f"{own[b]['size']}³ ({report.mib(own[b]['peak_bytes'])})" if b in own else ""
                    for b in budgets
                ),
            ]
            for method, own in results["largest"].items()
        ]
        lines += [
            "Largest cube (peak MiB), by one target's peaks:",
            report.markdown_table(["method", *budgets], rows),
        ]
    return "\n\n".join(lines)


def _cell(own: dict[str, Any] | None, column: dict[str, Any] | None) -> str:
    if own is None:
        return ""
    text = report.mib(own["peak_bytes"])
    return (
        f"{text} : {own['seconds'] / column['seconds']:.2f}"
        if column and "seconds" in own
        else text
    )


def draw(found: record.Record, figure: Any) -> None:
    figure.set_size_inches(6, 4)
    axes = figure.add_subplot()
    for method, own in found["results"]["peaks"].items():
        points = sorted((int(side), one["peak_bytes"] / 2**30) for side, one in own.items())
        axes.loglog(*zip(*points, strict=True), marker=".", label=method)
    for budget in found["results"]["budgets"].values():
        axes.axhline(budget / 2**30, color="grey", linewidth=0.7, linestyle=":")
    axes.set(title="3-D U-Net, bfloat16", xlabel="side of the cube, voxels", ylabel="peak, GiB")
    axes.legend()


EXPERIMENT = record.Experiment("volumes", measure, table, draw, ("peaks", "largest"))

if __name__ == "__main__":
    record.main(EXPERIMENT, __doc__)
