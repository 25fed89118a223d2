"""Loss curves of ResNet-50 with BatchNorm: column, stream, and statistics by blocks of rows.

    python -m experiments.resnet_curves                      # both precisions, as committed
    python -m experiments.resnet_curves --precisions float64 --steps 10

Handwritten digits scattered over a canvas, momentum SGD, the same seed for every run. Stream must
give column's losses; BatchNorm by blocks of rows, as LR-CNN's published code has it, is another
network.
The losses go to ``results/resnet_curves.json``, the picture to ``.png``.
"""

import argparse
import json
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import optax

from experiments import report
from lrjax.data import ScatteredDigits
from lrjax.models import ResNet50
from lrjax.training import Strategy, compile_step, train

RESULTS = report.RESULTS / "resnet_curves.json"
SIZE, BATCH, STEPS, NUM_BLOCKS = 128, 4, 50, 4
LEARNING_RATE = 1e-4
# Largest relative difference from column's loss, over all steps.
LIMITS = {"float32": 1e-3, "float64": 1e-9}
RUNS = {
    "column": ("batch", Strategy("column")),
    "stream": ("batch", Strategy("stream", NUM_BLOCKS)),
    "statistics by block": ("block", Strategy("column")),
}


def losses(precision: str, norm: str, strategy: Strategy, steps: int) -> list[float]:
    """Losses of one training run."""
    source = ScatteredDigits((SIZE, SIZE))
    dtype = jnp.dtype(precision)
    model = ResNet50(
        num_classes=10, norm=norm, zero_init_residual=True, dtype=dtype, param_dtype=dtype
    )
    optimizer = optax.sgd(LEARNING_RATE, momentum=0.9)
    step = compile_step(model, source, optimizer, strategy, batch_size=BATCH, seed=0)
    return list(train(step, source, batch_size=BATCH, steps=steps, seed=0).losses)


def largest_difference(found: list[float], column: list[float]) -> float:
    """Relative, over all steps."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, column, strict=True))


def measure(precision: str, steps: int) -> dict[str, Any]:
    with jax.enable_x64(precision == "float64"):
        curves = {name: losses(precision, *run, steps) for name, run in RUNS.items()}
    differences = {
        name: largest_difference(curve, curves["column"]) for name, curve in curves.items()
    }
    for name, difference in differences.items():
        print(
            f"{precision} {name:>20}: last loss {curves[name][-1]:.4f}, "
            f"from column {difference:.1e}"
        )
    return {"losses": curves, "largest_difference": differences, "limit": LIMITS[precision]}


def save_plot(results: dict[str, Any]) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for precision, own in results.items():
        column = own["losses"]["column"]
        for name, curve in own["losses"].items():
            if precision == "float32":
                axes[0].plot(curve, label=name, linestyle="--" if name == "stream" else "-")
            if name != "column":
                apart = [abs(a - b) / abs(b) or 1e-17 for a, b in zip(curve, column, strict=True)]
                axes[1].semilogy(apart, label=f"{name}, {precision}")
    axes[0].set(xlabel="step", ylabel="loss", title="ResNet-50 with BatchNorm, float32")
    axes[1].set(xlabel="step", title="relative difference from column")
    for ax in axes:
        ax.legend()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--precisions", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    found = {precision: measure(precision, options.steps) for precision in options.precisions}
    earlier = json.loads(RESULTS.read_text())["curves"] if RESULTS.exists() else {}
    results = {**earlier, **found}
    settings = {
        "image": SIZE,
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "num_blocks": NUM_BLOCKS,
        **report.environment(),
    }
    report.write_json(RESULTS, {"settings": settings, "curves": results})
    save_plot(results)


if __name__ == "__main__":
    main()
