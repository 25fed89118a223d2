"""Rows of one image over H200s that need not be there: memory, exchanges, operations, time.

    python scripts/bench_rows_over_devices.py                      # every row; needs lrjax[cuda]
    python scripts/bench_rows_over_devices.py --only vgg16/32768x4096/8/stream:16

Loss and gradient of networks in training mode, bfloat16, one image, compiled for one device and for
several. Compared are the peak of a device, its time by ``lrjax.roofline``, the operations of its
library calls and what it exchanges. A row is ``NETWORK/HEIGHTxWIDTH/DEVICES/METHOD``; the method is
a strategy as ``lrjax train`` takes them (``stream:16@pool2``: sixteen blocks on every device, cut
at ``pool2``), or ``plan:4GiB``, the plan of ``lrjax.plan`` for so much memory of each device. Under
``column`` and ``checkpoint`` XLA alone divides the rows.

The answers go to ``experiments/results/rows_over_devices.json``, from which
``scripts/results_page.py`` writes the tables of docs/meshes.md.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: no device is wanted
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

import lrjax
from experiments import report
from lrjax import memory
from lrjax.app import building, planning, profiling
from lrjax.app.config import ModelSection
from lrjax.app.strategy import Planned, Strategy
from lrjax.memory.collectives import KINDS
from lrjax.models import registry

TARGET = "h200"
MIB = 2**20
RESULTS = report.RESULTS / "rows_over_devices.json"
CUTS = "pool1,pool2,pool3,pool4"

WEAK = (
    *("vgg16/{}/stream:16", "resnet50-frozen/{}/stream:8", "resnet50-batch/{}/stream:8"),
    *("unet-none/{}/stream:16", "vgg16/{}/2ps:16", "vgg16/{}/overl:16", "vgg16/{}/column"),
    *(f"vgg16/{{}}/checkpoint@{CUTS}", f"vgg16/{{}}/overl:1@{CUTS}"),
)
STRONG = ((1, 64), (2, 32), (4, 16), (8, 8))  # devices, blocks of each: as many rows a step
LOW = ("stream:4", f"stream:2@{CUTS}", "overl:1", f"overl:1@{CUTS}", "plan:768MiB")
ROWS = (
    *(row.format(at) for row in WEAK for at in ("4096x4096/1", "32768x4096/8")),
    *(f"vgg16/16384x16384/{count}/stream:{blocks}" for count, blocks in STRONG),
    "vgg16/131072x16384/8/stream:64",
    "vgg16/1024x1024/1/column",
    *(f"vgg16/{at}/{method}" for method in LOW for at in ("1024x1024/1", "8192x1024/8")),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One program: a network and its image, the devices that share its rows, and how it runs."""

    network: str
    size: tuple[int, int]
    devices: int
    method: str

    @classmethod
    def parse(cls, text: str) -> "Row":
        network, size, devices, method = text.split("/")
        return cls(network, building.size_of(size), int(devices), method)

    def step(self) -> dict[str, Any]:
        """Arguments of ``planning.training_call``."""
        name, _, norm = self.network.partition("-")
        chosen = ModelSection(name=name, norm=norm or None, dtype="bfloat16")
        return {
            "network": building.network_of(chosen, 1000),
            "image": self.size,
            "batch": 1,
            "dtype": jnp.dtype("bfloat16"),
            "labels_pixels": registry.network(name).labels_pixels,
        }

    def strategy(self) -> Strategy | Planned:
        kind, _, budget = self.method.partition(":")
        if kind != "plan":
            return Strategy.parse(self.method)
        fun, args, in_axes = planning.training_call(**self.step())
        mesh = planning.mesh_of(self.devices)
        call = {"in_axes": in_axes, "target": TARGET, "wrt": 0, "mesh": mesh}
        return Planned(lrjax.plan(fun, *args, budget=budget, **call))


def measure(row: Row) -> dict[str, Any]:
    """Figures of one device."""
    start = time.time()
    strategy = row.strategy()
    program = profiling.gradient_program(
        strategy=strategy, target=TARGET, devices=row.devices, **row.step()
    )
    compiled = memory.compile_for(program.fun, *program.args, target=TARGET, **program.mesh)
    time_of = lrjax.roofline.roofline_of(str(compiled.as_text()), lrjax.roofline.rates_of(TARGET))
    exchanges = [kernel for kernel in time_of.kernels if kernel.kind in KINDS]
    found = {
        "peak_mib": round(memory.peak_bytes(compiled) / MIB, 1),
        "ms": round(time_of.seconds * 1e3, 3),
        "tflop": time_of.operations / 1e12,
        "exchanges": dict(Counter(kernel.kind for kernel in exchanges)),
        "exchanged_mib": round(sum(k.bytes * k.launches for k in exchanges) / MIB, 1),
        "exchanges_in_loops": sum(kernel.launches > 1 for kernel in exchanges),
        "seconds_to_compile": round(time.time() - start, 1),
    }
    if isinstance(strategy, Planned):
        found["plan"] = " + ".join(
            f"{choice.text}:{choice.num_blocks}" if choice.strategy.by_rows else choice.text
            for choice in strategy.plan.choices
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=ROWS, help="rows to measure")
    for text in parser.parse_args().only:
        found = measure(Row.parse(text))
        print(text, found, flush=True)
        report.merge(RESULTS, jax.__version__, {"rows": {text: found}})


if __name__ == "__main__":
    main()
