"""Peers side by side on this CPU: peak resident memory and step time.

    python -m experiments.paper.peers --quick
    pip install '.[peers]' && python -m experiments.paper.peers      # with PyTorch beside them

The gradient of VGG-16's convolutions (mean of squares), float32, two images: plain JAX, with
``jax.checkpoint`` around every block of the network, with gradient accumulation (one image at a
time), by lrjax's strategies; and, where it is installed, PyTorch eager and with
``torch.utils.checkpoint`` around every block. Memory: growth of a fresh process for each. Time: in
this process, in turns; a ratio is the median over the turns of a peer's time over plain JAX's in
the same turn. Weights are the same numbers everywhere, and so must the gradients be.
"""

import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments import report
from experiments.gradcheck import max_error
from experiments.paper import record
from experiments.vgg16_stack import BLOCKS, Params, init, loss, parse_method
from lrjax import memory

BATCH = 2
JAX_PEERS = ("column", "checkpoint-block", "accumulation", "2ps/8", "stream/8")
TORCH_PEERS = ("torch", "torch-checkpoint")
LABELS = {
    "column": "JAX",
    "checkpoint-block": "JAX, jax.checkpoint",
    "accumulation": "JAX, gradient accumulation",
    "2ps/8": "lrjax, 2PS in 8 blocks",
    "stream/8": "lrjax, stream in 8 blocks",
    "torch": "PyTorch",
    "torch-checkpoint": "PyTorch, torch.utils.checkpoint",
}
FULL = {"side": 256, "turns": 5}
QUICK = {"side": 128, "turns": 3}


def has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def arrays(side: int) -> tuple[Params, jax.Array]:
    """Parameters and images, the same for all peers."""
    images = jax.random.normal(jax.random.key(1), (BATCH, side, side, 3))
    return init(jax.random.key(0)), images


def gradient(peer: str) -> Callable[[Params, jax.Array], Params]:
    """A JAX peer's gradient."""
    if peer != "accumulation":
        return parse_method(peer).gradient()

    def accumulated(params: Params, images: jax.Array) -> Params:
        def add(total: Params, image: jax.Array) -> tuple[Params, None]:
            own = jax.grad(loss)(params, image[None])
            return jax.tree.map(jnp.add, total, own), None

        total, _ = lax.scan(add, jax.tree.map(jnp.zeros_like, params), images)
        return jax.tree.map(lambda g: g / BATCH, total)

    return accumulated


def prepare(peer: str, side: int) -> Callable[[], Any]:
    """A peer's step, ready to run: compiled, and its arguments made."""
    params, images = jax.block_until_ready(arrays(side))
    if peer in TORCH_PEERS:
        return _torch_step(peer, params, images)
    compiled = jax.jit(gradient(peer)).lower(params, images).compile()
    return lambda: jax.block_until_ready(compiled(params, images))


def _torch_step(peer: str, params: Params, images: jax.Array) -> Callable[[], Any]:
    """PyTorch's: NCHW in channels-last memory, as JAX has it here."""
    import torch
    import torch.nn.functional as functions
    from torch.utils.checkpoint import checkpoint

    def tensor(x: jax.Array, axes: tuple[int, ...]) -> Any:
        return torch.tensor(np.ascontiguousarray(np.transpose(np.asarray(x), axes)))

    form = torch.channels_last
    kernels = [tensor(k, (3, 2, 0, 1)).to(memory_format=form) for k, _ in params]
    biases = [tensor(b, (0,)) for _, b in params]
    for leaf in (*kernels, *biases):
        leaf.requires_grad_(True)
    x = tensor(images, (0, 3, 1, 2)).to(memory_format=form)

    def block(x: Any, first: int, count: int) -> Any:
        for number in range(first, first + count):
            x = functions.relu(functions.conv2d(x, kernels[number], biases[number], padding=1))
        return functions.max_pool2d(x, 2)

    def step() -> Any:
        for leaf in (*kernels, *biases):
            leaf.grad = None
        y, first = x, 0
        for channels in BLOCKS:
            count = len(channels)
            if peer == "torch-checkpoint":
                y = checkpoint(block, y, first, count, use_reentrant=False)
            else:
                y = block(y, first, count)
            first += count
        y.square().mean().backward()
        return [
            (np.transpose(k.grad.numpy(), (2, 3, 1, 0)), b.grad.numpy())
            for k, b in zip(kernels, biases, strict=True)
        ]

    return step


def measure(settings: record.Settings, known: record.Results, save: record.Save) -> record.Results:
    size = QUICK if settings.quick else FULL
    peers = (*JAX_PEERS, *(TORCH_PEERS if has_torch() else ()))
    results = {**known, "size": size, "environment": report.environment()}
    if has_torch():
        results["torch"] = importlib.metadata.version("torch")
    grown = results.setdefault("rss_bytes", {})
    for peer in peers:
        if peer not in grown:
            name = "experiments.paper.peers:prepare"
            grown[peer] = memory.measure_rss(name, peer, size["side"]).growth_bytes
            print(peer, report.mib(grown[peer]), "MiB", flush=True)
            save(results)
    steps = {peer: prepare(peer, size["side"]) for peer in peers}
    first = {peer: step() for peer, step in steps.items()}
    results["differences"] = {
        peer: max_error(jax.tree.map(np.asarray, own), first["column"])
        for peer, own in first.items()
    }
    results["seconds"] = {peer: [] for peer in peers}
    for _ in range(size["turns"]):
        for peer, step in steps.items():
            start = time.perf_counter()
            step()
            results["seconds"][peer].append(time.perf_counter() - start)
        save(results)
    return results


def time_ratio(seconds: dict[str, list[float]], peer: str) -> float:
    """The median over the turns of a peer's time over plain JAX's."""
    return statistics.median(a / b for a, b in zip(seconds[peer], seconds["column"], strict=True))


def table(found: record.Record) -> str:
    results = found["results"]
    seconds, grown, rows = results.get("seconds", {}), results["rss_bytes"], []
    for peer, own in grown.items():
        row = [LABELS[peer], report.mib(own), report.ratio(own / grown["column"])]
        if peer in seconds:  # a run may have been cut short before
            row += [
                f"{statistics.median(seconds[peer]):.2f}",
                report.ratio(time_ratio(seconds, peer)),
                f"{results['differences'][peer]:.1e}",
            ]
        rows.append(row + [""] * (6 - len(row)))
    header = ["peer", "peak RSS MiB", "ratio", "step s", "ratio", "difference"]
    torch = f" PyTorch {results['torch']}." if "torch" in results else " PyTorch is not installed."
    return "\n\n".join(
        [
            "# Peers on a CPU",
            f"VGG-16's convolutions, gradient, float32, {BATCH} images of "
            f"{results['size']['side']}x{results['size']['side']}, on "
            f"{results['environment']['cpus']} cores; ratios to plain JAX; difference: of the "
            f"gradients from plain JAX's.{torch}",
            report.markdown_table(header, rows),
        ]
    )


def draw(found: record.Record, figure: Any) -> None:
    results = found["results"]
    figure.set_size_inches(6, 4)
    axes = figure.add_subplot()
    for peer in results.get("seconds", {}):
        spent = time_ratio(results["seconds"], peer)
        held = results["rss_bytes"][peer] / results["rss_bytes"]["column"]
        axes.scatter(held, spent)
        axes.annotate(LABELS[peer], (held, spent), fontsize=8)
    axes.set(xlabel="peak RSS over plain JAX's", ylabel="time over plain JAX's", title="CPU")


EXPERIMENT = record.Experiment("peers", measure, table, draw, target="cpu")

if __name__ == "__main__":
    record.main(EXPERIMENT, __doc__)
