"""What a row-wise gradient costs before it runs: tracing, lowering, compiling, against column.

    python scripts/bench_compile.py --only-trace                       # minutes
    python scripts/bench_compile.py --networks resnet50 --targets h200  # XLA compiles, too

A training step's gradient (bfloat16 for a GPU, float32 for the CPU) under ``stream`` in 16 blocks
and as it is. Times are CPU seconds of this process, XLA's threads among them, so that what else
runs on the machine counts little. ``build`` is how often a row graph was typed and cut into stages,
``traces`` how often ``jax.make_jaxpr`` ran. JAX's caches are empty before each program.

The table is ``experiments/results/compile_times.md``; runs of single networks or targets replace
their own rows; with ``--only-trace`` compile times stay those of the last run that compiled
programs of as many equations. ``--label before`` keeps rows beside those of a later version.
"""

import argparse
import dataclasses
import functools
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

import lrjax
from experiments import report
from lrjax.memory.compile import device_of, peak_bytes
from lrjax.models import registry
from lrjax.rowgraph import graph

BLOCKS = 16
SIZE = 512
BATCH = 2
# What is asked: trace and lower, and all three together, as multiples of column's.
LIMITS = {"trace_ratio": 5.0, "total_ratio": 4.0}


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of the registry, its settings, and whether its kernels are standardised."""

    name: str
    settings: dict[str, Any]
    standardised: bool = False


NETWORKS = {
    "resnet50": Network("resnet50", {"norm": "batch"}),
    "resnet50-frozen": Network("resnet50", {"norm": "frozen"}),
    "resnet50-group-ws": Network("resnet50", {"norm": "group"}, standardised=True),
    "efficientnet_b0": Network("efficientnet_b0", {"norm": "batch"}),
    "unet": Network("unet", {"norm": "batch"}),
    "densenet121": Network("densenet121", {"norm": "batch"}),
}


def standardised(params: Any) -> Any:
    """Kernels of convolutions with zero mean and unit variance per output channel
    (arXiv 1903.10520)."""

    def one(x: jax.Array) -> jax.Array:
        if x.ndim != 4:
            return x
        centred = x - x.mean((0, 1, 2), keepdims=True)
        return centred * jax.lax.rsqrt(jnp.square(centred).mean((0, 1, 2), keepdims=True) + 1e-5)

    return jax.tree.map(one, params)


def step(network: Network, model: nn.Module, blocks: int | None) -> Callable[..., Any]:
    """The gradient of a training step, in blocks of rows or (None) as it is."""

    def loss(params: Any, images: jax.Array, others: Any) -> Any:
        own = standardised(params) if network.standardised else params
        outputs, updated = model.apply(
            {"params": own, **others},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )
        return jnp.mean(jnp.square(outputs.astype(jnp.float32))), updated

    rows = lrjax.rowwise(loss, in_axes=(None, 1, None), num_blocks=blocks) if blocks else loss
    return jax.value_and_grad(rows, has_aux=True)


def arguments(model: nn.Module, size: int) -> tuple[Any, ...]:
    """Types of the parameters, of a batch of images, and of what does not move."""
    small = jax.ShapeDtypeStruct((1, 64, 64, 3), model.dtype)
    variables = dict(jax.eval_shape(model.init, jax.random.key(0), small))
    return (
        variables.pop("params"),
        jax.ShapeDtypeStruct((BATCH, size, size, 3), model.dtype),
        variables,
    )


@contextmanager
def counted(module: Any, name: str, counts: dict[str, int], key: str) -> Iterator[None]:
    """Count the calls of a module's function."""
    function = getattr(module, name)

    @functools.wraps(function)
    def counting(*args: Any, **kwargs: Any) -> Any:
        counts[key] += 1
        return function(*args, **kwargs)

    with mock.patch.object(module, name, counting):
        yield


def equations(jaxpr: Any) -> int:
    """Equations of a program, those of loops, branches and calls counted once."""
    return sum(
        1 + sum(equations(inner) for inner in jaxprs_in_params(eqn.params)) for eqn in jaxpr.eqns
    )


def measured(
    function: Callable[..., Any], args: Any, target: str, only_trace: bool
) -> dict[str, Any]:
    """CPU seconds of every phase, and counts."""
    jax.clear_caches()
    gc.collect()
    device = device_of(target)
    sharding = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    counts = {"build": 0, "traces": 0}
    start = time.process_time()
    with (
        counted(graph, "cut_into_stages", counts, "build"),
        counted(jax, "make_jaxpr", counts, "traces"),
    ):
        traced = jax.jit(function).trace(*placed)
    trace_end = time.process_time()
    lowered = traced.lower()
    lower_end = time.process_time()
    found: dict[str, Any] = {
        "trace_s": trace_end - start,
        "lower_s": lower_end - trace_end,
        "equations": equations(traced.jaxpr.jaxpr),
        **counts,
    }
    if not only_trace:
        options = {"xla_gpu_autotune_level": 0} if device.platform == "gpu" else {}
        start = time.process_time()
        compiled = lowered.compile(compiler_options=options)
        found["compile_s"] = time.process_time() - start
        found["peak_bytes"] = peak_bytes(compiled)
    return found


def record_of(name: str, target: str, size: int, only_trace: bool, label: str) -> dict[str, Any]:
    """A row of the table: column, stream and their ratios."""
    network = NETWORKS[name]
    dtype = jnp.float32 if target == "cpu" else jnp.bfloat16
    model = registry.build(network.name, num_classes=10, width=1.0, dtype=dtype, **network.settings)
    args = arguments(model, size)
    record: dict[str, Any] = {
        "network": name,
        "target": target,
        "size": size,
        "batch": BATCH,
        "label": label,
    }
    for way, blocks in (("column", None), ("stream", BLOCKS)):
        record[way] = measured(step(network, model, blocks), args, target, only_trace)
        print(f"{name} for {target}, {way}: {record[way]}", file=sys.stderr, flush=True)
    record["trace_ratio"] = _total(record["stream"], False) / _total(record["column"], False)
    if not only_trace:
        record["total_ratio"] = _total(record["stream"], True) / _total(record["column"], True)
    return record


def _total(times: dict[str, Any], with_compile: bool) -> float:
    phases = ("trace_s", "lower_s", "compile_s") if with_compile else ("trace_s", "lower_s")
    return sum(times[phase] for phase in phases)


def table(records: list[dict[str, Any]]) -> str:
    """The records in Markdown, and which limits are not met."""
    header = ["network", "target", "version", "builds", "traces", "equations", "trace", "lower"]
    header += ["compile", "trace + lower", "all", "peak MiB"]

    def pair(record: dict[str, Any], key: str) -> str:
        column, stream = (record[way].get(key) for way in ("column", "stream"))
        return "—" if stream is None else f"{column:.1f} / {stream:.1f}"

    rows = []
    for r in records:
        peaks = [report.mib(r[way].get("peak_bytes")) for way in ("column", "stream")]
        rows.append(
            [
                r["network"],
                r["target"],
                r["label"],
                r["stream"]["build"],
                r["stream"]["traces"],
                f"{r['column']['equations']:,} / {r['stream']['equations']:,}",
                pair(r, "trace_s"),
                pair(r, "lower_s"),
                pair(r, "compile_s"),
                report.ratio(r["trace_ratio"]),
                report.ratio(r.get("total_ratio")),
                " / ".join(peaks),
            ]
        )
    return report.markdown_table(header, rows)


def page(records: list[dict[str, Any]]) -> str:
    """The table with what it says."""
    limits = [
        f"{what} at most {LIMITS[key]:.0f} times column's: {_verdict(records, key)}"
        for key, what in (("trace_ratio", "trace and lower"), ("total_ratio", "with compiling"))
    ]
    settings = sorted({(r["size"], r["batch"]) for r in records})
    where = ", ".join(f"{batch} images of {size}x{size}" for size, batch in settings)
    return (
        "# What a gradient costs before it runs\n\n"
        f"`python scripts/bench_compile.py`, jax {jax.__version__}: CPU seconds, column / stream\n"
        f"in {BLOCKS} blocks, and stream as a multiple of column; {where}.\n\n"
        f"{table(records)}\n\n" + "".join(f"* {limit}.\n" for limit in limits)
    )


def _verdict(records: list[dict[str, Any]], key: str) -> str:
    found = [r for r in records if r["label"] == "" and key in r]
    missed = [f"{r['network']} ({r['target']}) {r[key]:.1f}" for r in found if r[key] > LIMITS[key]]
    if not found:
        return "not measured"
    return f"NOT MET by {', '.join(missed)}" if missed else "met"


def merged(path: Path, new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of a file, those of the same name, target and label replaced."""

    def key(record: dict[str, Any]) -> tuple[str, ...]:
        return record["network"], record["target"], record["label"]

    old = json.loads(path.read_text())["records"] if path.exists() else []
    found = {key(r): r for r in old}
    found.update((key(r), _with_compile_times(r, found.get(key(r)))) for r in new)
    order = [*NETWORKS]
    return sorted(
        found.values(), key=lambda r: (order.index(r["network"]), r["target"], not r["label"])
    )


def _with_compile_times(record: dict[str, Any], old: dict[str, Any] | None) -> dict[str, Any]:
    """A record of a run that did not compile, with what the last one that did found for programs of
    as many equations."""
    ways = ("column", "stream")
    if old is None or any(record[way]["equations"] != old[way]["equations"] for way in ways):
        return record
    # The ratio of all phases is of times that were measured together.
    return {**old, **record, **{way: {**old[way], **record[way]} for way in ways}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=[*NETWORKS], default=[*NETWORKS])
    parser.add_argument("--targets", nargs="+", default=["cpu", "h200"])
    parser.add_argument("--size", type=int, default=SIZE, help=f"pixels a side (default {SIZE})")
    parser.add_argument("--only-trace", action="store_true", help="do not compile")
    parser.add_argument("--label", default="", help="version whose rows stay beside the present's")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "compile_times.json")
    options = parser.parse_args()

    jax.jit(jax.grad(lambda x: jnp.sum(x**2))).lower(jnp.ones(3)).compile()  # JAX starts
    for name in options.networks:
        for target in options.targets:
            record = record_of(name, target, options.size, options.only_trace, options.label)
            records = merged(options.out, [record])
            report.write_json(options.out, {**report.versions(), "records": records})
            options.out.with_suffix(".md").write_text(page(records))
            print(table([record]), flush=True)


if __name__ == "__main__":
    main()
