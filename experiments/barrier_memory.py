"""Peak memory of modern networks' gradients, compiled for an H200 that need not be there.

    python -m experiments.barrier_memory                                   # everything
    python -m experiments.barrier_memory --only resnet50-batch/stream/64 resnet50-batch/column
    python -m experiments.barrier_memory --compile-turns 3    # stream's compile time over column's

bfloat16, training mode, gradient of the mean square of the logits with respect to the parameters,
new batch statistics among the results. Beside XLA's peak stand

- ``floor``: what any schedule with the same maps held must hold at its worst moment: arguments,
  gradients, and the whole maps around one row loop;
- ``operations``: all operations of the row loops, as a multiple of column's.

The answers, per version of jax, go to ``results/barrier_memory.json`` and, as a table, ``.md``.
"""

import argparse
import functools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: no device is wanted

import flax.linen as nn
import jax
import jax.numpy as jnp

import lrjax
from experiments import report
from lrjax import memory, models
from lrjax.models.convnext import ConvNeXtBlock
from lrjax.models.resnet import ResidualBlock
from lrjax.models.unet import DoubleConv
from lrjax.program.inline import flatten
from lrjax.rowgraph.graph import RowGraph, build, size_bytes
from lrjax.rowgraph.tracing import trace
from lrjax.strategies.stream import stream_programs

MIB = 2**20
BLOCKS = (ResidualBlock, DoubleConv, ConvNeXtBlock)
RESULTS = report.RESULTS / "barrier_memory.json"


@dataclass(frozen=True)
class Network:
    """A model in training mode, and the images it is trained on."""

    model: nn.Module
    batch: int
    size: int

    def __call__(self, variables: Any, images: jax.Array) -> Any:
        rngs = {"dropout": jax.random.key(0)}
        return self.model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)

    def arguments(self) -> tuple[Any, jax.ShapeDtypeStruct]:
        small = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.bfloat16)
        variables = jax.eval_shape(self.model.init, jax.random.key(0), small)
        images = (self.batch, self.size, self.size, 3)
        return variables, jax.ShapeDtypeStruct(images, jnp.bfloat16)


NETWORKS = {
    "resnet50-batch": Network(models.ResNet50(dtype=jnp.bfloat16), 8, 1024),
    "resnet50-frozen": Network(models.ResNet50(norm="frozen", dtype=jnp.bfloat16), 1, 4096),
    "unet-group": Network(models.UNet(norm="group", dtype=jnp.bfloat16), 1, 4096),
    "unet-frozen": Network(models.UNet(norm="frozen", dtype=jnp.bfloat16), 1, 4096),
    "convnext": Network(models.ConvNeXtT(dtype=jnp.bfloat16), 1, 4096),
    "resnet50-frozen-16384": Network(models.ResNet50(norm="frozen", dtype=jnp.bfloat16), 1, 16384),
    "convnext-16384": Network(models.ConvNeXtT(dtype=jnp.bfloat16), 1, 16384),
}


# Maps kept whole between segments: all, or, of the others, only those of the group at work.
CUTS = {
    "resnet50-frozen/stream-cuts": [
        *(f"stage1_block{block}" for block in (1, 2, 3)),
        *(f"stage2_block{block}" for block in (1, 2, 3, 4)),
    ],
    "resnet50-frozen/stream-groups": [
        ("stage1_block1", "stage1_block2"),
        "stage1_block3",
        ("stage2_block1", "stage2_block2", "stage2_block3"),
        "stage2_block4",
    ],
    "convnext/stream-cuts": ["stage2_block3", *(f"stage3_block{block}" for block in (3, 6, 9))],
}


# Of this network, in so many blocks, the time to compile is measured.
COMPILED_IN_TURNS = ("resnet50-frozen", 128)


@dataclass(frozen=True)
class Row:
    """One program: a network by a method, and the peak it may take.

    ``method`` is ``"column"``, ``"remat"`` (``nn.remat`` around every block), ``"remat-stages"``
    (the same, and of the blocks' outputs only those that end a stage are kept) or ``"stream"`` in
    ``num_blocks``, also with ``CUTS``.
    """

    network: str
    method: str
    num_blocks: int | None = None
    limit_mib: int | None = None

    def __str__(self) -> str:
        return "/".join(str(part) for part in (self.network, self.method, self.num_blocks) if part)

    def apply(self) -> Callable[..., Any]:
        network = NETWORKS[self.network]
        if self.method == "remat":
            return functools.partial(with_remat, network)
        if self.method == "remat-stages":
            policy = jax.checkpoint_policies.save_only_these_names(*stage_ends(network.model))
            return jax.checkpoint(functools.partial(with_remat, network), policy=policy)
        if self.num_blocks is not None:
            cuts = CUTS.get(f"{self.network}/{self.method}", ())
            return lrjax.rowwise(network, in_axes=(None, 1), num_blocks=self.num_blocks, cuts=cuts)
        return network


ROWS = (
    Row("resnet50-batch", "column"),
    Row("resnet50-batch", "remat"),
    Row("resnet50-batch", "stream", 64, limit_mib=1_250),
    Row("resnet50-frozen", "column"),
    Row("resnet50-frozen", "remat"),
    Row("resnet50-frozen", "remat-stages"),
    Row("resnet50-frozen", "stream", 128, limit_mib=1_400),
    Row("resnet50-frozen", "stream-cuts", 32),
    Row("resnet50-frozen", "stream-groups", 32, limit_mib=2_700),
    Row("resnet50-frozen-16384", "remat"),
    Row("resnet50-frozen-16384", "remat-stages"),
    Row("resnet50-frozen-16384", "stream", 512),
    Row("unet-group", "column"),
    Row("unet-group", "remat"),
    Row("unet-group", "stream", 128),
    Row("unet-frozen", "column"),
    Row("unet-frozen", "remat"),
    Row("unet-frozen", "stream", 128),
    Row("convnext", "column"),
    Row("convnext", "remat"),
    Row("convnext", "remat-stages"),
    Row("convnext", "stream", 128),
    Row("convnext", "stream-cuts", 128),
    Row("convnext-16384", "remat"),
    Row("convnext-16384", "remat-stages"),
    Row("convnext-16384", "stream", 512),
)


def stage_ends(model: nn.Module) -> list[str]:
    """Names of the last block of every stage (ResNet and ConvNeXt)."""
    return [f"stage{stage}_block{blocks}" for stage, blocks in enumerate(model.blocks, start=1)]


def with_remat(network: Network, variables: Any, images: jax.Array) -> Any:
    """The network with ``nn.remat`` around every block."""
    inside: set[tuple[str, ...]] = set()

    def around(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        is_block = isinstance(module, BLOCKS) and context.method_name == "__call__"
        if not is_block or module.path in inside:
            return call(*args, **kwargs)
        inside.add(module.path)
        try:
            return nn.remat(lambda module, x: module(x, **kwargs))(module, *args)
        finally:
            inside.remove(module.path)

    with nn.intercept_methods(around):
        return network(variables, images)


def gradient(fun: Callable[..., Any]) -> Callable[..., Any]:
    """Gradients and updated statistics."""

    def step(variables: Any, images: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            outputs, updated = fun({**variables, "params": params}, images)
            return jnp.mean(jnp.square(outputs.astype(jnp.float32))), updated

        return jax.grad(loss, has_aux=True)(variables["params"])

    return step


def operations_and_floor(network: Network, num_blocks: int) -> tuple[float, float]:
    """Stream's operations as a multiple of column's, and the bytes its plan must hold."""
    args = network.arguments()
    traced = trace(network, (None, 1), args, {})
    structs = traced.program.structs
    moving = [i for i, axis in enumerate(traced.axes) if axis is None]
    wrt = [i for i in moving if jnp.issubdtype(structs[i].dtype, jnp.inexact)]
    found = stream_programs(traced.program, traced.axes, num_blocks, wrt)
    graphs = [p.graph for p in (found.forward, found.backward) if p is not None]
    axes = [*(None for _ in jax.tree.leaves(args[0])), 1]
    column = build(flatten(jax.make_jaxpr(gradient(network))(*args)), axes)
    ratio = sum(graph.operations() for graph in graphs) / column.operations(once=True)
    fixed = sum(size_bytes(leaf) for leaf in jax.tree.leaves(args[0]))
    fixed += sum(size_bytes(leaf) for leaf in jax.tree.leaves(args[0]["params"]))
    return ratio, fixed + max(map(_whole_bytes, graphs))


def _whole_bytes(graph: RowGraph) -> float:
    """Bytes of maps that exist whole around a row loop, at its worst."""
    stages, avals = graph.stages, graph.program.avals
    last_use = {v: -1 for v in graph.program.inputs if v in graph.row_axis}
    for stage in range(len(stages.members)):
        for node in (*graph.stage_nodes(stage), *graph.column_nodes(stage)):
            values = (v for v in node.equation.inputs if isinstance(v, int))
            last_use.update((v, stage) for v in values if v in last_use)
    most, outputs = 0, set()
    for stage, after in enumerate(stages.crossing):
        before = stages.crossing[stage - 1] if stage else frozenset()
        outputs |= stages.made_whole[stage].intersection(graph.program.outputs)
        inputs = {v for v, last in last_use.items() if last >= stage}
        most = max(most, sum(size_bytes(avals[v]) for v in before | after | outputs | inputs))
    return most


def measure(row: Row, target: str) -> dict[str, Any]:
    network = NETWORKS[row.network]
    start = time.process_time()
    compiled = memory.compile_for(gradient(row.apply()), *network.arguments(), target=target)
    result: dict[str, Any] = {
        "peak_mib": round(memory.peak_bytes(compiled) / MIB, 1),
        "compile_cpu_s": round(time.process_time() - start, 1),
        "limit_mib": row.limit_mib,
    }
    if row.method == "stream" and row.num_blocks is not None:
        ratio, floor = operations_and_floor(network, row.num_blocks)
        result |= {"operations": round(ratio, 3), "floor_mib": round(floor / MIB, 1)}
    return result


def compile_times(network: str, num_blocks: int, turns: int, target: str) -> dict[str, Any]:
    """Processor seconds to trace and compile column and stream: medians of ``turns``, taken in
    turns, each in a process of its own so that nothing is cached."""
    rows = {"column": Row(network, "column"), "stream": Row(network, "stream", num_blocks)}
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for _ in range(turns):
            for name, row in rows.items():
                found = pool.submit(measure, row, target).result()
                seconds[name].append(found["compile_cpu_s"])
    column, stream = (statistics.median(seconds[name]) for name in rows)
    ratio = round(stream / column, 2)
    return {"turns": turns, "column_s": column, "stream_s": stream, "ratio": ratio}


def tables(results: dict[str, Any]) -> str:
    """All results, of every version of jax, as Markdown."""
    lines = []
    for version, own in results.items():
        for name, found in own["peaks"].items():
            cells = [found.get(k, "") for k in ("limit_mib", "peak_mib", "floor_mib", "operations")]
            lines.append([version, name, *("" if c is None else c for c in cells)])
            lines[-1].append(found["compile_cpu_s"])
    header = ["jax", "program", "limit", "peak", "floor", "operations", "compile s"]
    times = [
        [version, network, found["turns"], found["column_s"], found["stream_s"], found["ratio"]]
        for version, own in results.items()
        for network, found in own.get("compile", {}).items()
    ]
    return "\n\n".join(
        [
            "# Memory of modern networks' gradients, compiled for an H200",
            "bfloat16, training mode; ResNet-50 with BatchNorm at batch 8, 1024x1024, the others "
            "at batch 1, 4096x4096 unless named. MiB; operations as a multiple of column's. "
            "Printed by `python -m experiments.barrier_memory`.",
            report.markdown_table(header, lines),
            "Processor seconds to trace and compile, each in a process of its own, in turns; "
            "medians. Printed by `python -m experiments.barrier_memory --compile-turns 3`.",
            report.markdown_table(["jax", "network", "turns", "column", "stream", "ratio"], times),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", help="rows to measure, as the table names them")
    parser.add_argument("--target", default="h200")
    parser.add_argument("--compile-turns", type=int, help="measure compile times instead")
    options = parser.parse_args()
    if options.compile_turns:
        network, num_blocks = COMPILED_IN_TURNS
        times = compile_times(network, num_blocks, options.compile_turns, options.target)
        print(network, times)
        _write({"compile": {network: times}})
        return
    chosen = [_parse_row(name) for name in options.only] if options.only else ROWS
    found = {}
    for row in chosen:
        found[str(row)] = measure(row, options.target)
        print(row, found[str(row)], flush=True)
    if options.target == "h200":
        _write({"peaks": found})


def _write(found: dict[str, Any]) -> None:
    results = report.merge(RESULTS, report.versions()["jax"], found)
    RESULTS.with_suffix(".md").write_text(tables(results) + "\n")


def _parse_row(text: str) -> Row:
    known = {str(row): row for row in ROWS}
    network, method, *blocks = text.split("/")
    return known.get(text) or Row(network, method, *map(int, blocks))


if __name__ == "__main__":
    main()
