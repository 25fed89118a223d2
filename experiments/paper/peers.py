"""Peers side by side on this CPU: peak resident memory and step time.

    python -m experiments.paper.peers --quick
    pip install '.[peers]' && python -m experiments.paper.peers      # with PyTorch beside them

The gradient of VGG-16's convolutions (mean of squares), float32, two images: plain JAX, with
``jax.checkpoint`` around every block of the network, with gradient accumulation (one image at a
time), by lrjax's strategies; and, where it is installed, PyTorch eager and with
``torch.utils.checkpoint`` around every block. Memory: growth of a fresh process for each. Time: in
this process, in turns; a ratio is the median over the turns of a peer's time over plain JAX's in
the same turn. Weights are the same numbers everywhere, and so are the gradients in float64 (tests);
in float32 another order of additions moves a unit across the kink of its ReLU here and there.
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

from experiments import report
from experiments.gradcheck import max_error
from experiments.paper import record
from experiments.vgg16_stack import BLOCKS, Params, init, loss, parse_method
from lrjax import memory

BATCH = 2
JAX_PEERS = ("column", "checkpoint-block", "accumulation")
BY_ROWS = ("2ps", "stream")
TORCH_PEERS = ("torch", "torch-checkpoint")
LABELS = {
    "column": "JAX",
    "checkpoint-block": "JAX, jax.checkpoint",
    "accumulation": "JAX, gradient accumulation",
    "2ps": "lrjax, 2PS",
    "stream": "lrjax, stream",
    "torch": "PyTorch",
    "torch-checkpoint": "PyTorch, torch.utils.checkpoint",
}
FULL = {"side": 256, "blocks": 8, "turns": 5}
QUICK = {"side": 128, "blocks": 4, "turns": 3}


def has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def peers_of(size: dict[str, int]) -> tuple[str, ...]:
    """All peers that can run here; those by rows with their number of blocks."""
    by_rows = (f"{strategy}/{size['blocks']}" for strategy in BY_ROWS)
    return (*JAX_PEERS, *by_rows, *(TORCH_PEERS if has_torch() else ()))


def label(peer: str) -> str:
    name, _, blocks = peer.partition("/")
    return f"{LABELS[name]} in {blocks} blocks" if blocks else LABELS[name]


def arrays(side: int) -> tuple[Params, jax.Array]:
    """Parameters and images, the same for all peers."""
    images = jax.random.normal(jax.random.key(1), (BATCH, side, side, 3))
    return init(jax.random.key(0)), images


def accumulated(params: Params, images: jax.Array) -> Callable[[], Params]:
    """Gradient accumulation, ready to run: a compiled step for every image.

    A loop around the steps and not ``lax.scan``, in which XLA runs convolutions on CPUs through a
    path that is tens of times slower (https://github.com/jax-ml/jax/issues/12868).
    """

    def add(total: Params, params: Params, image: jax.Array) -> Params:
        own = jax.grad(loss)(params, image)
        return jax.tree.map(lambda all_so_far, one: all_so_far + one / BATCH, total, own)

    zeros = jax.jit(lambda: jax.tree.map(jnp.zeros_like, params))
    step = jax.jit(add, donate_argnums=0).lower(params, params, images[:1]).compile()

    def run() -> Params:
        total = zeros()
        for i in range(BATCH):
            total = step(total, params, images[i : i + 1])
        return total

    return run


def prepare(peer: str, side: int) -> Callable[[], Any]:
    """A peer's step, ready to run: compiled, and its arguments made."""
    params, images = jax.block_until_ready(arrays(side))
    if peer in TORCH_PEERS:
        return torch_step(peer, params, images)
    if peer == "accumulation":
        run = accumulated(params, images)
        return lambda: jax.block_until_ready(run())
    compiled = jax.jit(parse_method(peer).gradient()).lower(params, images).compile()
    return lambda: jax.block_until_ready(compiled(params, images))


def torch_step(peer: str, params: Params, images: jax.Array) -> Callable[[], Any]:
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
    peers = peers_of(size)
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
        row = [label(peer), report.mib(own), report.ratio(own / grown["column"])]
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
            "gradients from plain JAX's, in float32, where another order of additions moves a unit "
            f"across the kink of its ReLU here and there.{torch}",
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
        axes.annotate(label(peer), (held, spent), fontsize=8)
    axes.set(xlabel="peak RSS over plain JAX's", ylabel="time over plain JAX's", title="CPU")


EXPERIMENT = record.Experiment("peers", measure, table, draw, target="cpu", timed=True)

if __name__ == "__main__":
    record.main(EXPERIMENT, __doc__)
