"""Peak memory and step time of training steps, by a roofline of what XLA compiles for an H200.

    python -m experiments.step_times                             # every row
    python -m experiments.step_times --only vgg16-4096/stream/16 vgg16-4096/column

bfloat16; classification with global average pooling, a dense head and cross-entropy (U-Net: a class
for every pixel); value and gradient with respect to the parameters, new batch statistics among the
results. Peak and time stand as multiples of column's. The device need not be there: see
``lrjax.roofline`` for what is assumed of it.

The answers go to ``results/step_times.json`` and, as a table, ``.md``.
"""

import argparse
import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: no device is wanted

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import lrjax
from experiments import barrier_memory, report
from lrjax import memory, models

MIB = 2**20
RESULTS = report.RESULTS / "step_times.json"
CLASSES = 1000


@dataclass(frozen=True)
class Task:
    """A model in training mode, and the images and labels that it is trained on."""

    model: nn.Module
    batch: int
    size: int
    labels_pixels: bool = False

    def __call__(self, variables: Any, images: jax.Array, labels: jax.Array) -> Any:
        """The mean cross-entropy, and new batch statistics."""
        network = barrier_memory.Network(self.model, self.batch, self.size)
        return _loss(network(variables, images), labels)

    def with_remat(self, variables: Any, images: jax.Array, labels: jax.Array) -> Any:
        network = barrier_memory.Network(self.model, self.batch, self.size)
        return _loss(barrier_memory.with_remat(network, variables, images), labels)

    def arguments(self) -> tuple[Any, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        variables, images = barrier_memory.Network(self.model, self.batch, self.size).arguments()
        labels = images.shape[:3] if self.labels_pixels else images.shape[:1]
        return variables, images, jax.ShapeDtypeStruct(labels, jnp.int32)

    @property
    def in_axes(self) -> tuple[None, int, int | None]:
        return None, 1, 1 if self.labels_pixels else None


def _loss(result: Any, labels: jax.Array) -> Any:
    logits, updated = result
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    return losses.mean(), updated


def _vgg16(size: int) -> Task:
    return Task(models.VGG16(num_classes=CLASSES, head="gap", dtype=jnp.bfloat16), 1, size)


TASKS = {
    "vgg16-4096": _vgg16(4096),
    "vgg16-2048": _vgg16(2048),
    "vgg16-1024": _vgg16(1024),
    "resnet50-frozen-4096": Task(models.ResNet50(norm="frozen", dtype=jnp.bfloat16), 1, 4096),
    "resnet50-batch-8x1024": Task(models.ResNet50(dtype=jnp.bfloat16), 8, 1024),
    "unet-none-2048": Task(models.UNet(norm="none", dtype=jnp.bfloat16), 1, 2048, True),
    "convnext-4096": Task(models.ConvNeXtT(dtype=jnp.bfloat16), 1, 4096),
}


@dataclass(frozen=True)
class Row:
    """One program: a task, and how it runs.

    ``method`` is ``"column"``, ``"remat"`` (``nn.remat`` around every block), ``"remat-stages"``
    (the same, and of the blocks' outputs only those that end a stage are kept), ``"checkpoint"``
    (``jax.checkpoint`` around everything), ``"plan"`` (``lrjax.plan`` for ``num_blocks`` hundredths
    of column's peak) or a strategy, in ``num_blocks``.
    """

    task: str
    method: str
    num_blocks: int | None = None

    def __str__(self) -> str:
        return "/".join(str(part) for part in (self.task, self.method, self.num_blocks) if part)

    def function(self) -> Callable[..., Any]:
        """The loss, in all ways but by a plan."""
        task = TASKS[self.task]
        if self.method == "remat":
            return task.with_remat
        if self.method == "remat-stages":
            ends = barrier_memory.stage_ends(task.model)
            policy = jax.checkpoint_policies.save_only_these_names(*ends)
            return jax.checkpoint(task.with_remat, policy=policy)
        if self.method == "checkpoint":
            return jax.checkpoint(task)
        if self.num_blocks is None:
            return task
        return lrjax.rowwise(
            task, in_axes=task.in_axes, num_blocks=self.num_blocks, strategy=self.method
        )


ROWS = (
    *(Row("vgg16-4096", *way) for way in (("column",), ("checkpoint",), ("stream", 16))),
    *(Row("vgg16-4096", *way) for way in (("2ps", 16), ("stream", 4), ("stream", 64))),
    *(Row("vgg16-2048", *way) for way in (("column",), ("stream", 8), ("2ps", 8))),
    *(Row("vgg16-1024", *way) for way in (("column",), ("stream", 4), ("2ps", 4))),
    *(Row("resnet50-frozen-4096", *way) for way in (("column",), ("remat",), ("remat-stages",))),
    *(Row("resnet50-frozen-4096", *way) for way in (("stream", 8), ("2ps", 8))),
    *(Row("resnet50-batch-8x1024", *way) for way in (("column",), ("remat",), ("stream", 4))),
    *(Row("unet-none-2048", *way) for way in (("column",), ("stream", 4), ("stream", 16))),
    *(Row("convnext-4096", *way) for way in (("column",), ("remat",), ("stream", 8))),
    *(Row("vgg16-4096", "plan", share) for share in (50, 30, 10, 4)),
    *(Row("vgg16-2048", "plan", share) for share in (50, 30)),
    *(Row("vgg16-1024", "plan", share) for share in (50, 30)),
    *(Row("resnet50-frozen-4096", "plan", share) for share in (50, 30, 12)),
    *(Row("resnet50-batch-8x1024", "plan", share) for share in (50, 25)),
    *(Row("unet-none-2048", "plan", share) for share in (50, 30, 10)),
    *(Row("convnext-4096", "plan", share) for share in (50, 30, 12)),
)


@dataclass(frozen=True)
class Planned:
    """A loss under a plan, and what planning took."""

    function: Callable[..., Any]
    told: dict[str, Any]


def planned(row: Row, target: str) -> Planned:
    """The loss of a row's task by the fastest plan within a share of column's peak."""
    task = TASKS[row.task]
    assert row.num_blocks is not None
    args = split(task.arguments())
    column = jax.value_and_grad(of_params(task), has_aux=True)
    peak = memory.peak_bytes(memory.compile_for(column, *args, target=target))
    in_axes = (None, None, *task.in_axes[1:])
    start = time.perf_counter()
    plan = lrjax.plan(
        of_params(task),
        *args,
        in_axes=in_axes,
        budget=int(peak * row.num_blocks / 100),
        target=target,
        wrt=0,
    )
    ways = [
        one.choice.strategy.name + (f"/{one.choice.num_blocks}" if one.height else "")
        for one in plan.segments
    ]
    told = {
        "planning_s": round(time.perf_counter() - start, 1),
        "compilations": plan.compilations,
        "segments": _counted(ways),
    }
    return Planned(lrjax.rowwise(of_params(task), in_axes=in_axes, plan=plan), told)


def _counted(names: list[str]) -> str:
    """The names in order, equal neighbours as one with their number."""
    groups = [(name, len(list(equal))) for name, equal in itertools.groupby(names)]
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in groups)


def measure(row: Row, target: str) -> dict[str, Any]:
    """Peak, time and what they are made of."""
    if row.method == "plan":
        found = planned(row, target)
        return {**_measured(found.function, row, target), **found.told}
    return _measured(of_params(row.function()), row, target)


def _measured(function: Callable[..., Any], row: Row, target: str) -> dict[str, Any]:
    step = jax.value_and_grad(function, has_aux=True)
    compiled = memory.compile_for(step, *split(TASKS[row.task].arguments()), target=target)
    found = lrjax.roofline.roofline_of(compiled.as_text(), lrjax.roofline.rates_of(target))
    return {
        "peak_mib": round(memory.peak_bytes(compiled) / MIB, 1),
        "ms": round(found.seconds * 1e3, 2),
        "launches": found.launches,
        "tflop": round(found.operations / 1e12, 2),
        "gb": round(found.bytes / 1e9, 1),
        "conditionals": found.conditionals,
        "kinds_ms": {kind: round(s * 1e3, 2) for kind, s in found.by_kind().items()},
    }


def of_params(function: Callable[..., Any]) -> Callable[..., Any]:
    def of_params(params: Any, others: Any, images: Any, labels: Any) -> Any:
        return function({**others, "params": params}, images, labels)

    return of_params


def split(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    variables, *rest = arguments
    others = {name: value for name, value in variables.items() if name != "params"}
    return variables["params"], others, *rest


def table(results: dict[str, Any]) -> str:
    """All results, of every version of jax, as Markdown."""
    lines = []
    for version, own in results.items():
        for name, found in own["steps"].items():
            column = own["steps"].get(f"{name.split('/')[0]}/column", {})
            ratios = [
                f"{found[key] / column[key]:.3f}" if column else "" for key in ("peak_mib", "ms")
            ]
            kinds = ", ".join(f"{kind} {ms}" for kind, ms in [*found["kinds_ms"].items()][:4])
            if "segments" in found:
                kinds = f"{found['segments']} (planned in {found['planning_s']} s)"
            keys = ("peak_mib", "ms", "launches", "tflop", "gb", "conditionals")
            lines.append([version, name, *ratios, *(found[key] for key in keys), kinds])
    header = ["jax", "program", "peak / column", "time / column", "peak MiB", "ms", "launches"]
    header += ["TFLOP", "GB", "conditionals", "longest kinds, ms; a plan's segments"]
    return "\n\n".join(
        [
            "# Step time and peak memory, compiled for an H200",
            "bfloat16, classification, value and gradient. Time by the roofline of the compiled "
            f"program: {lrjax.roofline.rates_of('h200').assumptions()}",
            report.markdown_table(header, lines),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", help="rows to measure, as the table names them")
    parser.add_argument("--target", default="h200")
    options = parser.parse_args()
    chosen = [_parsed(name) for name in options.only] if options.only else ROWS
    for row in chosen:
        found = measure(row, options.target)
        print(row, found, flush=True)
        if options.target == "h200":
            own = {"steps": {str(row): found}}
            results = report.merge(RESULTS, report.versions()["jax"], own)
            RESULTS.with_suffix(".md").write_text(table(results) + "\n")


def _parsed(text: str) -> Row:
    task, method, *blocks = text.split("/")
    return Row(task, method, *map(int, blocks))


if __name__ == "__main__":
    main()
