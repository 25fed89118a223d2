"""Time of a training step by every method: measured on this CPU, and by a roofline for a GPU.

    python -m experiments.paper.step_times --quick
    python -m experiments.paper.step_times --only gpu --resume

On the CPU a small VGG-16 in float32; the methods take turns, so that what else the machine does
meets them all, and a ratio is the median over the turns of a method's time over column's (and over
the checkpoint's) in the same turn. For the GPU: VGG-16 and ResNet-50 at full width, compiled; see
``lrjax.roofline`` for what is assumed.
"""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments import report
from experiments.paper import record
from experiments.paper.programs import METHODS, Program, measured_program
from lrjax.memory.targets import GpuTarget, find

CPU_FULL = {"side": 256, "width": 0.5, "blocks": 4, "turns": 7}
CPU_QUICK = {"side": 128, "width": 0.25, "blocks": 4, "turns": 5}
GPU = {"side": 2048, "blocks": 16, "networks": ("vgg16", "resnet50")}


def seconds_in_turns(size: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of every turn of every method."""
    ready = {}
    for method in METHODS:
        program = Program("vgg16", method, 1, size["side"], size["blocks"], size["width"])
        shapes = program.arguments()
        params = jax.jit(program.module.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))[
            "params"
        ]
        images = jax.random.normal(jax.random.key(1), shapes[1].shape)
        args = (params, images, jnp.zeros(1, jnp.int32), {})
        step = jax.jit(jax.value_and_grad(program.loss(), has_aux=True)).lower(*args).compile()
        jax.block_until_ready(step(*args))  # maps its memory in
        ready[method] = step, args
    seconds: dict[str, list[float]] = {method: [] for method in ready}
    for _ in range(size["turns"]):
        for method, (step, args) in ready.items():
            start = time.perf_counter()
            jax.block_until_ready(step(*args))
            seconds[method].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], method: str, base: str) -> float:
    """The median over the turns of a method's time over another's."""
    pairs = zip(seconds[method], seconds[base], strict=True)
    return statistics.median(own / other for own, other in pairs)


def measure(settings: record.Settings, known: record.Results, save: record.Save) -> record.Results:
    size = CPU_QUICK if settings.quick else CPU_FULL
    results: record.Results = {"gpu": {}, **known, "cpu_size": size, "gpu_size": GPU}
    if "cpu" not in results and settings.wants("cpu"):
        results["cpu"] = seconds_in_turns(size)
        results["environment"] = report.environment()
        save(results)
    if settings.quick or not settings.wants("gpu"):
        return results
    if not isinstance(find(settings.target), GpuTarget):
        raise ValueError(f"target: got {settings.target!r}; use a GPU, or --only cpu")
    for network in GPU["networks"]:
        own = results["gpu"].setdefault(network, {})
        for method in METHODS:
            if method not in own:
                blocks = GPU["blocks"] * (2 if method == "stream" else 1)
                program = Program(network, method, 1, GPU["side"], blocks)
                own[method] = measured_program(program, settings.target)
                print(network, method, f"{own[method]['seconds'] * 1e3:.1f} ms", flush=True)
                save(results)
    return results


def table(found: record.Record) -> str:
    results = found["results"]
    lines = ["# Time of a training step"]
    if "cpu" in results:
        size, seconds = results["cpu_size"], results["cpu"]
        rows = [
            [
                METHODS[method].label,
                f"{statistics.median(own) * 1e3:.0f}",
                *(f"{ratio(seconds, method, base):.2f}" for base in ("column", "checkpoint")),
            ]
            for method, own in seconds.items()
        ]
        lines += [
            f"VGG-16, channels times {size['width']:g}, float32, one image of "
            f"{size['side']}x{size['side']}, {size['blocks']} blocks, on "
            f"{results['environment']['cpus']} CPU cores: medians of {size['turns']} turns.",
            report.markdown_table(["method", "ms", "over column", "over checkpoint"], rows),
        ]
    for network, own in results["gpu"].items():
        rows = [
            [
                METHODS[method].label,
                one["blocks"] or "",
                f"{one['seconds'] * 1e3:.1f}",
                *(
                    f"{one['seconds'] / own[b]['seconds']:.2f}" if b in own else ""
                    for b in ("column", "checkpoint")
                ),
                report.mib(one["peak_bytes"]),
            ]
            for method, one in own.items()
        ]
        header = ["method", "blocks", "ms", "over column", "over checkpoint", "peak MiB"]
        lines += [
            f"{network}, float32, one image of {results['gpu_size']['side']} a side, roofline of "
            f"the program compiled for {found['target']}:",
            report.markdown_table(header, rows),
        ]
    return "\n\n".join(lines)


def draw(found: record.Record, figure: Any) -> None:
    results = found["results"]
    panels: list[tuple[str, dict[str, float]]] = []
    if "cpu" in results:
        panels.append(
            (
                "vgg16 (small), CPU, measured",
                {m: ratio(results["cpu"], m, "column") for m in results["cpu"]},
            )
        )
    for network, own in results["gpu"].items():
        base = own["column"]["seconds"]
        panels.append(
            (
                f"{network}, {found['target']}, roofline",
                {m: one["seconds"] / base for m, one in own.items()},
            )
        )
    figure.set_size_inches(5 * max(1, len(panels)), 3.5)
    for position, (title, ratios) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), position)
        axes.barh([METHODS[m].label for m in ratios], list(ratios.values()))
        axes.axvline(1, color="black", linewidth=0.7)
        axes.invert_yaxis()
        axes.set(title=title, xlabel="time over Base's")


EXPERIMENT = record.Experiment("step_times", measure, table, draw, ("cpu", "gpu"), timed=True)

if __name__ == "__main__":
    record.main(EXPERIMENT, __doc__)
