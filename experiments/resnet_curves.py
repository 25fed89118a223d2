"""Loss curves of ResNet-50 with BatchNorm: column, stream, and statistics by blocks of rows.

    python -m experiments.resnet_curves                      # everything, as committed
    python -m experiments.resnet_curves --precisions float32 --runs column stream

Handwritten digits scattered over a canvas, momentum SGD, the same seed for every run. Stream must
give column's losses; BatchNorm by blocks of rows, as LR-CNN's published code has it, is another
network. The yardstick is column in float32 against column in float64: training amplifies rounding,
and no program in float32 can be closer to another than the network is well-conditioned. That is
why the classifier starts at zero, as VGG-16's does in ``lrjax train``: from random logits the
first gradients are large, and column in float32 drifts further than the limit.

The losses go to ``results/resnet_curves.json``, the table to ``.md``, the picture to ``.png``.
"""

import argparse
import dataclasses
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

from experiments import report
from lrjax.app.data import ScatteredDigits
from lrjax.app.training import Strategy, compile_step, train
from lrjax.models import ResNet50

RESULTS = report.RESULTS / "resnet_curves.json"
SIZE, BATCH, IMAGES, STEPS, NUM_BLOCKS = 96, 8, 16, 50, 4
LEARNING_RATE, MOMENTUM = 1e-3, 0.9
# Largest relative difference from column's loss, over all steps.
LIMITS = {"float32": 1e-3, "float64": 1e-9}
COLUMN, STREAM, BY_BLOCK = "column", "stream", "statistics by block"
RUNS = {
    COLUMN: ("batch", Strategy("column")),
    STREAM: ("batch", Strategy("stream", NUM_BLOCKS)),
    BY_BLOCK: ("block", Strategy("column")),
}


def losses(precision: str, run: str) -> list[float]:
    """Losses of one training run."""
    norm, strategy = RUNS[run]
    source = ScatteredDigits((SIZE, SIZE), num_images=IMAGES)
    dtype = jnp.dtype(precision)
    model = ResNet50(
        num_classes=10, norm=norm, zero_init_residual=True, dtype=dtype, param_dtype=dtype
    )
    optimizer = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
    step = compile_step(model, source, optimizer, strategy, batch_size=BATCH, seed=0)
    state = step.state._replace(params=initial_parameters(model, precision))
    step = dataclasses.replace(step, state=state)

    def on_step(number: int, loss: float, seconds: float) -> None:
        if number % 10 == 0:
            print(f"{precision} {run}: step {number}, loss {loss:.4f}, {seconds:.1f} s", flush=True)

    trained = train(step, source, batch_size=BATCH, steps=STEPS, seed=0, on_step=on_step)
    return list(trained.losses)


def initial_parameters(model: nn.Module, precision: str) -> Any:
    """The same numbers in every precision, up to their rounding; the classifier is zero."""
    double = model.clone(dtype=jnp.float64, param_dtype=jnp.float64)
    image = jnp.zeros((1, SIZE, SIZE, 3), jnp.uint8)
    with jax.enable_x64(True):
        key, _ = jax.random.split(jax.random.key(0))
        params = jax.jit(double.init)(key, image)["params"]
    params["classifier"] = jax.tree.map(np.zeros_like, params["classifier"])
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, precision)), params)


def largest_difference(found: list[float], reference: list[float]) -> float:
    """Relative, over all steps."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, reference, strict=True))


def table(curves: dict[str, dict[str, list[float]]]) -> str:
    """Every run's last losses and its distance from column, and the yardstick."""
    rows = []
    for precision, own in curves.items():
        for run, curve in own.items():
            allowed = LIMITS[precision] if run == STREAM else None
            apart = largest_difference(curve, own[COLUMN])
            last = sum(curve[-10:]) / 10
            distance = "" if run == COLUMN else f"{apart:.1e}"
            rows.append([precision, run, f"{curve[0]:.4f}", f"{last:.4f}", distance, allowed or ""])
    header = ["precision", "run", "first loss", "mean of the last 10", "from column", "limit"]
    lines = [
        "# ResNet-50 with BatchNorm: losses by rows and whole",
        f"{STEPS} steps at {SIZE}x{SIZE}, batch {BATCH}, {IMAGES} canvases of digits, SGD at "
        f"{LEARNING_RATE} with momentum {MOMENTUM}; stream in {NUM_BLOCKS} blocks. The largest "
        "relative difference of any step's loss. Printed by `python -m experiments.resnet_curves`.",
        report.markdown_table(header, rows),
    ]
    if {"float32", "float64"} <= curves.keys():
        own = largest_difference(curves["float32"][COLUMN], curves["float64"][COLUMN])
        lines.append(f"Column in float32 is {own:.1e} from column in float64.")
    return "\n\n".join(lines)


def save_plot(curves: dict[str, dict[str, list[float]]]) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    shown = curves.get("float32", next(iter(curves.values())))
    for run, curve in shown.items():
        axes[0].plot(curve, label=run, linestyle="--" if run == STREAM else "-")
    pairs = {
        f"{run}, {precision}": (curve, own[COLUMN])
        for precision, own in curves.items()
        for run, curve in own.items()
        if run != COLUMN
    }
    if {"float32", "float64"} <= curves.keys():
        pairs["column, float32 from float64"] = (
            curves["float32"][COLUMN],
            curves["float64"][COLUMN],
        )
    for label, (curve, reference) in pairs.items():
        apart = [abs(a - b) / abs(b) or 1e-17 for a, b in zip(curve, reference, strict=True)]
        axes[1].semilogy(apart, label=label)
    axes[0].set(xlabel="step", ylabel="loss", title="ResNet-50 with BatchNorm, float32")
    axes[1].set(xlabel="step", title="relative difference from column")
    for ax in axes:
        ax.legend()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=120)


def save(precision: str, run: str, found: list[float]) -> dict[str, dict[str, list[float]]]:
    """Add one run to the results; gives all curves."""
    curves = json.loads(RESULTS.read_text())["curves"] if RESULTS.exists() else {}
    curves.setdefault(precision, {})[run] = found
    curves = {p: {r: curves[p][r] for r in RUNS if r in curves[p]} for p in sorted(curves)}
    settings = {
        "image": SIZE,
        "batch": BATCH,
        "images": IMAGES,
        "learning_rate": LEARNING_RATE,
        "momentum": MOMENTUM,
        "num_blocks": NUM_BLOCKS,
        **report.environment(),
    }
    report.write_json(RESULTS, {"settings": settings, "curves": curves})
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--precisions", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    options = parser.parse_args()
    for precision in options.precisions:
        for run in options.runs:
            with jax.enable_x64(precision == "float64"):
                found = losses(precision, run)
            curves = save(precision, run, found)
    if all(COLUMN in own for own in curves.values()):
        text = table(curves)
        RESULTS.with_suffix(".md").write_text(text + "\n")
        save_plot(curves)
        print(text)


if __name__ == "__main__":
    main()
