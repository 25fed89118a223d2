"""Predicted memory of plans against XLA's peaks.

    python -m experiments.plan_costs                              # everything
    python -m experiments.plan_costs --target h200 --only vgg16/1024 resnet50/512/column

Training steps in bfloat16 (on CPU float32), batch 1 (ResNet-50: 4), gradients with respect to the
parameters. A plan is written ``network/size/segments``, the segments joined by ``+``:
``stream-32+column`` is a first half in 32 blocks of rows and a second half by whole maps. The
network is cut where the maps are narrowest.

Compiled programs are not compiled again: XLA's peaks are kept, per version of jax, in
``results/plan_costs.json``; predictions are made anew and go with them into ``.md``.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: no device is wanted

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments import report, vgg16_stack
from lrjax import memory, models
from lrjax.graph import size_bytes
from lrjax.inline import evaluate
from lrjax.planner.choice import Choice
from lrjax.planner.cost import peak_bytes, segment_cost
from lrjax.segments import Segment, split
from lrjax.tracing import trace
from lrjax.transform import segment_function

MIB = 2**20
RESULTS = report.RESULTS / "plan_costs.json"


@dataclasses.dataclass(frozen=True)
class Network:
    """A training step's loss, and its arguments: what moves, images, and what does not move."""

    loss: Callable[..., Any]
    arguments: Callable[[int], tuple[Any, ...]]
    in_axes: tuple[int | None, ...]


def _flax(model: nn.Module, batch: int) -> Network:
    """A model in training mode; new batch statistics are among the outputs."""

    def loss(params: Any, images: jax.Array, others: Any) -> Any:
        outputs, updated = model.apply(
            {"params": params, **others}, images, train=True, mutable=["batch_stats"]
        )
        return jnp.mean(jnp.square(outputs.astype(jnp.float32))), updated

    def arguments(size: int) -> tuple[Any, ...]:
        small = jax.ShapeDtypeStruct((1, 64, 64, 3), model.dtype)
        variables = dict(jax.eval_shape(model.init, jax.random.key(0), small))
        images = jax.ShapeDtypeStruct((batch, size, size, 3), model.dtype)
        return variables.pop("params"), images, variables

    return Network(loss, arguments, (None, 1, None))


def _vgg16(dtype: Any) -> Network:
    def loss(params: Any, images: jax.Array) -> Any:
        return vgg16_stack.loss(params, images), ()

    return Network(loss, lambda size: vgg16_stack.structs(size, size, dtype), (None, 1))


@functools.cache
def network(name: str, target: str) -> Network:
    """A network in the dtype that is usual on the target."""
    dtype = jnp.float32 if target == "cpu" else jnp.bfloat16
    if name == "vgg16":
        return _vgg16(dtype)
    if name == "resnet50":
        return _flax(models.ResNet50(dtype=dtype), 4)
    if name == "unet":
        return _flax(models.UNet(norm="frozen", dtype=dtype), 1)
    return _flax(models.ConvNeXtT(dtype=dtype), 1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A network at a size, and the choice for each of its segments."""

    network: str
    size: int
    choices: tuple[Choice, ...]
    target: str

    @property
    def step(self) -> Network:
        return network(self.network, self.target)

    def __str__(self) -> str:
        return f"{self.network}/{self.size}/{'+'.join(map(_name, self.choices))}"

    def segments(self) -> list[Segment]:
        step = self.step
        traced = trace(step.loss, step.in_axes, step.arguments(self.size), {})
        count = len(self.choices)
        return split(traced.program, traced.axes, count if count > 1 else ())

    def gradient(self) -> Callable[..., Any]:
        """The training step, run as planned."""

        def planned(*args: Any) -> Any:
            traced = trace(self.step.loss, self.step.in_axes, args, {})
            values = dict(zip(traced.program.inputs, traced.inputs, strict=True))
            values.update(traced.program.constants)
            for segment, choice in zip(self.segments(), self.choices, strict=True):
                call = _function(segment, choice)
                outputs = call(*(jnp.asarray(values[v]) for v in segment.program.inputs))
                values.update(zip(segment.made, outputs, strict=True))
            outputs = [values[v] for v in traced.program.outputs]
            return jax.tree.unflatten(traced.out_tree, outputs)

        return jax.grad(planned, has_aux=True)


def _function(segment: Segment, choice: Choice) -> Callable[..., Sequence[Any]]:
    if choice.strategy == "checkpoint":
        return jax.checkpoint(lambda *inputs: evaluate(segment.program, inputs))
    return segment_function(segment, choice.strategy, choice.num_blocks)


def _name(choice: Choice) -> str:
    is_whole = choice.strategy in ("column", "checkpoint")
    return choice.strategy if is_whole else f"{choice.strategy}-{choice.num_blocks}"


def parse(text: str, target: str) -> Plan:
    """A plan for a target from its name."""
    name, size, choices = text.split("/")
    parts = (part.partition("-") for part in choices.split("+"))
    return Plan(name, int(size), tuple(Choice(name, int(n or 1)) for name, _, n in parts), target)


def wrt_of(plan: Plan, segment: Segment) -> list[int]:
    """Inputs of a segment that are differentiated: all but images and statistics."""
    args = plan.step.arguments(plan.size)
    still = range(len(jax.tree.leaves(args[0])), len(jax.tree.leaves(args)))
    avals = segment.program.avals
    return [
        i
        for i, v in enumerate(segment.program.inputs)
        if v not in still and jnp.issubdtype(avals[v].dtype, jnp.inexact)
    ]


def predicted_bytes(plan: Plan) -> float:
    """The peak by the cost model."""
    args = plan.step.arguments(plan.size)
    fixed = sum(size_bytes(leaf) for leaf in jax.tree.leaves((args, args[0])))
    pairs = zip(plan.segments(), plan.choices, strict=True)
    costs = [segment_cost(s, c, wrt_of(plan, s), plan.target) for s, c in pairs]
    return peak_bytes(costs, fixed)


def compiled_bytes(plan: Plan) -> int:
    """The peak by XLA."""
    args = plan.step.arguments(plan.size)
    return memory.peak_bytes(memory.compile_for(plan.gradient(), *args, target=plan.target))


_THREE = "checkpoint+checkpoint+checkpoint"
_FOUR = f"{_THREE}+checkpoint"
# XLA:CPU undoes checkpoints, so there are none for it.
PLANS = {
    "h200": (
        *(f"vgg16/{s}/{p}" for s in (1024, 2048, 4096) for p in ("column", _FOUR)),
        "vgg16/512/column", "vgg16/512/stream-16",
        "vgg16/1024/stream-32", "vgg16/2048/stream-64", "vgg16/4096/stream-128",
        "vgg16/1024/stream-8", "vgg16/2048/stream-16",
        "vgg16/1024/2ps-8", "vgg16/2048/2ps-16", "vgg16/4096/2ps-64",
        "vgg16/1024/overl-8", "vgg16/2048/overl-16", "vgg16/4096/overl-16",
        "vgg16/1024/stream-32+column", "vgg16/2048/stream-64+column",
        "vgg16/4096/stream-128+column",
        *(f"unet/{s}/{p}" for s in (1024, 2048, 4096) for p in ("column", _THREE)),
        "unet/1024/stream-32", "unet/2048/stream-64", "unet/4096/stream-128",
        "unet/1024/stream-32+column", "unet/2048/stream-64+column",
        "unet/4096/stream-128+column",
        "unet/2048/2ps-16", "unet/1024/overl-8", "unet/2048/overl-16",
        *(f"resnet50/{s}/{p}" for s in (512, 1024, 2048) for p in ("column", _THREE)),
        "resnet50/512/stream-16",
        *(f"convnext/{s}/{p}" for s in (512, 1024, 2048) for p in ("column", _THREE)),
        "convnext/512/stream-16", "convnext/1024/stream-32", "convnext/2048/overl-16",
    ),
    "cpu": (
        "vgg16/512/column", "vgg16/1024/column", "vgg16/2048/column",
        "vgg16/512/stream-16", "vgg16/1024/stream-32", "vgg16/2048/stream-64",
        "vgg16/1024/stream-8",
        "vgg16/512/2ps-4", "vgg16/1024/2ps-8", "vgg16/2048/2ps-16",
        "vgg16/512/overl-4", "vgg16/1024/overl-8", "vgg16/2048/overl-16",
        "vgg16/512/stream-16+column", "vgg16/1024/stream-32+column",
        "vgg16/2048/stream-64+column",
        "unet/1024/column", "unet/1024/stream-32", "unet/1024/2ps-8", "unet/1024/overl-8",
        "unet/1024/stream-32+column",
        "resnet50/512/column", "resnet50/512/stream-16", "convnext/1024/column",
    ),
    "tpu-v5e": (
        "vgg16/512/column", "vgg16/512/stream-16", "vgg16/1024/column", "unet/512/column",
    ),
}  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """All results, of every version of jax, as Markdown."""
    lines, summary = [], []
    for version, own in results.items():
        for target, known in own.items():
            found = {name: one for name, one in known.items() if "predicted_mib" in one}
            if not found:
                continue
            errors = sorted(abs(_error(one)) for one in found.values())
            worst = max(found, key=lambda name: abs(_error(found[name])))
            median = statistics.median(errors)
            row = [version, target, len(errors), f"{median:.1%}", f"{errors[-1]:.1%}", worst]
            summary.append(row)
            lines += [
                [
                    version,
                    target,
                    name,
                    one["predicted_mib"],
                    one["peak_mib"],
                    f"{_error(one):+.1%}",
                ]
                for name, one in found.items()
            ]
    return "\n\n".join(
        [
            "# Predicted memory of plans, and XLA's peaks",
            "Training steps, bfloat16 (float32 on CPU), batch 1 (ResNet-50: 4), gradients with "
            "respect to the parameters; ResNet-50 with BatchNorm, U-Net with frozen BatchNorm. "
            "Segments of a plan are joined by `+`. MiB. Printed by "
            "`python -m experiments.plan_costs`.",
            "The model's constants were tuned on plans of this table: there is no held-out set. "
            "Checkpoints on CPU are left out: XLA:CPU undoes them, and three that were tried were "
            "30% under (VGG-16), 10% over (U-Net) and 14% under (ConvNeXt-T).",
            report.markdown_table(
                ["jax", "target", "plans", "median error", "worst error", "worst plan"], summary
            ),
            report.markdown_table(["jax", "target", "plan", "predicted", "XLA", "error"], lines),
        ]
    )


def _error(one: dict[str, Any]) -> float:
    return one["predicted_mib"] / one["peak_mib"] - 1


def measure(plan: Plan, known: dict[str, Any]) -> dict[str, Any]:
    """Both peaks; the compiler's only if it is not known yet."""
    if "peak_mib" not in known:
        known = {"peak_mib": round(compiled_bytes(plan) / MIB, 1)}
        jax.clear_caches()
    start = time.process_time()
    predicted = predicted_bytes(plan)
    return known | {
        "predicted_mib": round(predicted / MIB, 1),
        "predict_cpu_s": round(time.process_time() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", nargs="*", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--only", nargs="*", default=[""], help="beginnings of plans' names")
    options = parser.parse_args()
    version = report.versions()["jax"]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for target in options.target:
        for name in PLANS[target]:
            if not name.startswith(tuple(options.only)):
                continue
            known = results.get(version, {}).get(target, {}).get(name, {})
            found = measure(parse(name, target), known)
            print(target, name, found, f"{_error(found):+.1%}", flush=True)
            results = report.merge(RESULTS, version, {target: {name: found}})
            RESULTS.with_suffix(".md").write_text(table(results) + "\n")


if __name__ == "__main__":
    main()
