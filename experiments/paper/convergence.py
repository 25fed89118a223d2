"""Convergence: every strategy's losses and accuracy from one seed coincide with column's.

    python -m experiments.paper.convergence --quick
    python -m experiments.paper.convergence

Small VGG-16 and ResNet-18 on real handwritten digits, scattered over a canvas (scikit-learn's), SGD
with momentum, float32, on this CPU. Beside them ResNet-18 with statistics per block of rows, as
LR-CNN's published code normalises: another network. Accuracy is of canvases that were not trained
on. How far two runs in float32 may be apart says ``shifted``: column from parameters that are moved
by one rounding. Training amplifies that, so that after some tens of steps curves of any two
programs part; over a dozen (``--quick``) they coincide, as over fifty with small steps do
ResNet-50's, also in float64 (``experiments.resnet_curves``).
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import report
from experiments.paper import record
from experiments.paper.programs import METHODS, by_method, loss_of, quick_jit
from lrjax import models
from lrjax.app.data import ScatteredDigits, batches

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "vgg16": functools.partial(
        models.VGG16, head="gap", classifier_init=nn.initializers.zeros, width=1 / 8
    ),
    "resnet18": functools.partial(models.ResNet18, zero_init_residual=True, width=1 / 4),
}
CUTS = {"vgg16": ("pool2", "pool4"), "resnet18": ("stage1_block2", "stage3_block2")}
BY_BLOCK, SHIFTED = "statistics by block", "shifted"
FULL = {"side": 64, "batch": 8, "images": 64, "held_out": 32, "steps": 100, "classes": 2}
QUICK = {"side": 64, "batch": 4, "images": 16, "held_out": 16, "steps": 12, "classes": 4}
RATES = {"vgg16": 0.02, "resnet18": 0.02}
NUM_BLOCKS = 2


def runs_of(network: str) -> tuple[str, ...]:
    """All runs of a network: methods, column with shifted parameters, and per-block statistics."""
    own = (*METHODS, SHIFTED)
    return (*own, BY_BLOCK) if network == "resnet18" else own


def train(network: str, run: str, size: dict[str, int]) -> dict[str, Any]:
    """Losses of all steps, and the accuracy on canvases that were held out."""
    options = {"norm": "block"} if run == BY_BLOCK else {}
    module = NETWORKS[network](num_classes=size["classes"], **options)
    method = run if run in METHODS else "column"
    has_blocks = METHODS[method].rows is not None
    loss = by_method(
        loss_of(module), method, network, NUM_BLOCKS if has_blocks else None, cuts=CUTS[network]
    )
    optimizer = optax.sgd(RATES[network], momentum=0.9)
    train_on, held_out = sources(size)
    images = jnp.zeros((size["batch"], *train_on.image_shape), jnp.uint8)
    params = dict(quick_jit(module.init)(jax.random.key(0), images))
    statistics = {k: params[k] for k in params if k != "params"}
    params = params["params"]
    if run == SHIFTED:
        params = jax.tree.map(lambda leaf: jnp.nextafter(leaf, jnp.full_like(leaf, 9)), params)

    @quick_jit
    def step(params: Any, statistics: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
        (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(
            params, images, labels, statistics
        )
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), dict(statistics), state, value

    state, losses = optimizer.init(params), []
    stream = batches(train_on, size["batch"], seed=0)
    for _, batch in zip(range(size["steps"]), stream, strict=False):
        params, statistics, state, value = step(
            params, statistics, state, batch["image"], batch["label"]
        )
        losses.append(float(value))
    logits = module.apply({"params": params, **statistics}, held_out[0])
    accuracy = float(np.mean(np.argmax(logits, axis=-1) == held_out[1]))
    return {"losses": losses, "accuracy": accuracy}


def sources(size: dict[str, int]) -> tuple[ScatteredDigits, tuple[np.ndarray, np.ndarray]]:
    """Canvases to train on; images and labels of others."""
    shape, classes = (size["side"], size["side"]), tuple(range(size["classes"]))
    train_on = ScatteredDigits(shape, num_images=size["images"], seed=0, classes=classes)
    others = ScatteredDigits(shape, num_images=size["held_out"], seed=1, classes=classes)
    examples = [others[i] for i in range(len(others))]
    return train_on, tuple(np.stack([e[k] for e in examples]) for k in ("image", "label"))


def apart(own: list[float], column: list[float]) -> float:
    """The largest relative difference of any step's loss."""
    return max(abs(a - b) / abs(b) for a, b in zip(own, column, strict=True))


def measure(settings: record.Settings, known: record.Results, save: record.Save) -> record.Results:
    size = QUICK if settings.quick else FULL
    results = {"networks": {}, **known, "size": size}
    for network in NETWORKS:
        if not settings.wants(network):
            continue
        own = results["networks"].setdefault(network, {})
        for run in runs_of(network):
            if run not in own:
                own[run] = train(network, run, size)
                distance = apart(own[run]["losses"], own["column"]["losses"])
                print(network, run, f"{own[run]['losses'][-1]:.4f}, {distance:.1e}", flush=True)
                save(results)
    return results


def table(found: record.Record) -> str:
    results = found["results"]
    size, rows = results["size"], []
    for network, own in results["networks"].items():
        for run, one in own.items():
            losses, column = one["losses"], own["column"]["losses"]
            rows.append(
                [
                    network,
                    METHODS[run].label if run in METHODS else run,
                    f"{losses[0]:.4f}",
                    f"{np.mean(losses[-5:]):.4f}",
                    f"{one['accuracy']:.2f}",
                    "" if run == "column" else f"{apart(losses, column):.1e}",
                ]
            )
    header = ["network", "run", "first loss", "mean of the last 5", "accuracy", "from column"]
    return "\n\n".join(
        [
            "# Losses and accuracy of all strategies",
            f"{size['steps']} steps, batches of {size['batch']} canvases of "
            f"{size['side']}x{size['side']} with digits of {size['classes']} classes, "
            f"{size['images']} to train on and {size['held_out']} held out. `shifted` is column "
            "from parameters moved by one rounding. From column: the largest relative difference "
            "of any step's loss.",
            report.markdown_table(header, rows),
        ]
    )


def draw(found: record.Record, figure: Any) -> None:
    networks = found["results"]["networks"]
    figure.set_size_inches(6 * len(networks), 4)
    for position, (network, own) in enumerate(networks.items(), start=1):
        axes = figure.add_subplot(1, len(networks), position)
        for run, one in own.items():
            if run == SHIFTED:
                continue
            style = "-" if run in ("column", BY_BLOCK) else "--"
            label = METHODS[run].label if run in METHODS else run
            axes.plot(one["losses"], style, label=label, linewidth=1)
        axes.set(title=network, xlabel="step", ylabel="loss")
        axes.legend(fontsize=7)


EXPERIMENT = record.Experiment("convergence", measure, table, draw, tuple(NETWORKS), target="cpu")

if __name__ == "__main__":
    record.main(EXPERIMENT, __doc__)
