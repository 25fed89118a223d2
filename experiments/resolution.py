"""Held-out accuracy against image side, at a fixed memory budget: why resolution matters.

    python -m experiments.resolution            # as committed; about an hour on two CPU cores
    python -m experiments.resolution --quick    # lrjax against column alone; minutes
    python -m experiments.resolution --quick --seed 1 --out FILE.json   # other parameters, canvases
    python -m experiments.resolution --redraw   # table and figure from the JSON alone

Two handwritten digits of varied size lie on a large canvas, and the label is their sum
(`experiments/digit_sums.py`). The budget is what lrjax's training step takes at full resolution,
as XLA plans it. Within it: column on the largest image that fits, at the best of several learning
rates; gradients accumulated over patches; PatchGD; lrjax (`experiments/resolution_methods.py`). All
train the same network, from the same parameters, for the same number of steps.

Results go to ``results/resolution.json``, ``.md`` and ``.png``. Status 1 where lrjax stays under
90% of the held-out canvases, or less than 20 points above column.
"""

import argparse
import dataclasses
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from experiments import report
from experiments import resolution_methods as methods
from experiments.digit_sums import DigitSums, shrunk
from experiments.resolution_methods import COLUMN, LRJAX, PATCHES, PATCHGD, CompiledMethod

LEAST_ACCURACY, LEAST_LEAD = 0.9, 0.2
COLOURS = {LRJAX: "C0", COLUMN: "C1", PATCHGD: "C2", PATCHES: "C3"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is trained, and for how long.

    Attributes:
      canvas: side of the canvases in pixels.
      sizes: smallest and largest side of a digit.
      sides: sides that lrjax is given the canvases at, apart from the whole.
      with_patches: whether PatchGD and accumulation over patches take part, on whole canvases.
      steps: updates of the parameters.
      batch: images whose gradients make one update.
      rate: learning rate of Adam, which falls to zero along a cosine.
      column_rates: those tried with column; the best on held-out canvases counts.
      held_out: canvases that are judged.
      seed: of parameters and canvases.
    """

    canvas: int = 384
    sizes: tuple[int, int] = (8, 13)
    sides: tuple[int, ...] = (96, 192)
    with_patches: bool = True
    steps: int = 350
    batch: int = 8
    rate: float = 1e-2
    column_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    held_out: int = 600
    seed: int = 0


# Twice as many updates of half as many images each are learnt in the time of a quickstart, and from
# smaller digits, of which column sees next to nothing.
QUICK = Settings(sizes=(7, 10), sides=(), with_patches=False, steps=800, batch=4, held_out=600)


class Experiment:
    """Data, network and optimizer of some settings."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        canvas, sizes, seed = settings.canvas, settings.sizes, settings.seed
        self.train = DigitSums(canvas, "train", sizes=sizes, seed=seed)
        self.held_out = DigitSums(canvas, "held-out", sizes=sizes, seed=seed)
        self.network = methods.SumNetwork(len(self.train.sums))
        image = jnp.zeros((1, methods.STRIDE, methods.STRIDE, 1), jnp.uint8)
        self.params = jax.jit(self.network.init)(jax.random.key(settings.seed), image)

    def optimizer(self, rate: float) -> optax.GradientTransformation:
        adam = optax.adam(optax.cosine_decay_schedule(rate, self.settings.steps))
        return optax.MultiSteps(adam, self.settings.batch).gradient_transformation()

    def compiled(self, method: methods.Method, rate: float | None = None) -> CompiledMethod:
        optimizer = self.optimizer(rate or self.settings.rate)
        return methods.compile_method(method, self.params, optimizer)

    def whole_image(self, side: int, *, by_rows: bool) -> CompiledMethod:
        return self.compiled(methods.whole_image(self.network, side, by_rows=by_rows))

    def column_within(self, budget_bytes: int) -> CompiledMethod:
        candidates = methods.column_candidates(self.network, self.settings.canvas)
        return methods.largest_fitting(candidates, budget_bytes, self.compiled)

    def patches_within(self, side: int, budget_bytes: int) -> CompiledMethod:
        candidates = methods.patchwise_candidates(self.network, side)
        return methods.largest_fitting(candidates, budget_bytes, self.compiled)

    def patchgd_within(self, side: int, budget_bytes: int) -> CompiledMethod:
        patch = self.patches_within(side, budget_bytes).method.patch
        candidates = methods.patchgd_candidates(self.network, side, patch)
        return methods.largest_fitting(candidates, budget_bytes, self.compiled)

    def trained(self, compiled: CompiledMethod, rate: float) -> dict[str, Any]:
        """Train, judge, and tell everything about it."""
        settings, method = self.settings, compiled.method
        params = jax.tree.map(jnp.copy, self.params)
        state = self.optimizer(rate).init(params)
        losses, seconds = [], 0.0
        for number in range(settings.steps * settings.batch):
            image, label = self.example(self.train, number, method.side)
            key = jax.random.fold_in(jax.random.key(settings.seed), number)
            start = time.perf_counter()
            params, state, loss = compiled.step(params, state, image, label, key)
            losses.append(float(loss))
            seconds += time.perf_counter() - start
            if (number + 1) % (50 * settings.batch) == 0:
                recent = np.mean(losses[-50 * settings.batch :])
                print(
                    f"  step {(number + 1) // settings.batch}, mean loss of 50 {recent:.3f}, "
                    f"{seconds:.0f} s",
                    flush=True,
                )
        found = {
            "method": method.name,
            "side": method.side,
            "patch": method.patch,
            "sampled": method.sampled,
            "rate": rate,
            "peak_bytes": compiled.peak_bytes,
            "seconds_per_image": seconds / len(losses),
            "losses": np.mean(np.reshape(losses, (settings.steps, -1)), 1).tolist(),
            "accuracy": self.accuracy(method, params),
        }
        print(f"  {found['accuracy']:.1%} of {settings.held_out} held-out canvases", flush=True)
        return found

    def example(self, source: DigitSums, index: int, side: int) -> tuple[np.ndarray, np.ndarray]:
        """A canvas reduced to `side`, [1, side, side, 1], and its label, [1]."""
        canvas = source[index]
        return shrunk(canvas.image, side)[None, ..., None], np.array([canvas.label], np.int32)

    def accuracy(self, method: methods.Method, params: Any) -> float:
        """Part of the held-out canvases whose sum is told."""
        logits = jax.jit(method.logits)
        right = 0
        for index in range(self.settings.held_out):
            image, label = self.example(self.held_out, index, method.side)
            right += int(jnp.argmax(logits(params, image)) == label[0])
        return right / self.settings.held_out


def measure(
    settings: Settings, save: Callable[[dict[str, Any]], None] = lambda results: None
) -> dict[str, Any]:
    """Everything the table and the figure show; `save` gets it after every run."""
    experiment = Experiment(settings)
    canvas = settings.canvas
    full = experiment.whole_image(canvas, by_rows=True)
    budget = full.peak_bytes
    sides = sorted({*settings.sides, canvas})
    column = {side: experiment.whole_image(side, by_rows=False).peak_bytes for side in sides}
    largest = experiment.column_within(budget)
    _say(f"budget {report.mib_exact(budget)}: what lrjax takes at {canvas}")
    _say(f"column takes {report.mib_exact(column[canvas])} there; {largest.method.side} fits")
    results: dict[str, Any] = {
        "settings": dataclasses.asdict(settings),
        "environment": report.environment(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "sums": experiment.train.sums,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(experiment.params)),
        "budget_bytes": budget,
        "column_peak_bytes": {str(side): peak for side, peak in column.items()},
        "runs": [],
    }
    for compiled, rate in _planned(experiment, full, largest):
        _announce(compiled, rate)
        results["runs"].append(experiment.trained(compiled, rate))
        save(results)
    return results


def _planned(
    experiment: Experiment, full: CompiledMethod, largest_column: CompiledMethod
) -> Iterator[tuple[CompiledMethod, float]]:
    """Every run with its learning rate, what matters most first; compiled when it is its turn."""
    settings, budget = experiment.settings, full.peak_bytes
    yield full, settings.rate
    for rate in settings.column_rates:
        yield experiment.compiled(largest_column.method, rate), rate
    if settings.with_patches:
        yield experiment.patchgd_within(settings.canvas, budget), settings.rate
        yield experiment.patches_within(settings.canvas, budget), settings.rate
    for side in settings.sides:
        if side != settings.canvas:
            yield experiment.whole_image(side, by_rows=True), settings.rate


def _announce(compiled: CompiledMethod, rate: float) -> None:
    method = compiled.method
    patch = f" in patches of {method.patch}" if method.patch else ""
    drawn = f", {method.sampled} at a time" if method.sampled else ""
    peak = report.mib_exact(compiled.peak_bytes)
    _say(f"{method.name} at {method.side}{patch}{drawn}: {peak}, learning rate {rate:g}")


def _say(text: str) -> None:
    print(text, flush=True)


# --- What the results say -------------------------------------------------------------------------


def best(runs: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """The run of a method that tells most held-out canvases."""
    own = [run for run in runs if run["method"] == name]
    return max(own, key=lambda run: run["accuracy"]) if own else None


def shortfalls(results: dict[str, Any]) -> list[str]:
    """What does not hold of what is claimed, in words; empty where all does."""
    canvas = results["settings"]["canvas"]
    full = [run for run in results["runs"] if run["method"] == LRJAX and run["side"] == canvas]
    column = best(results["runs"], COLUMN)
    found = []
    if not full or full[0]["accuracy"] < LEAST_ACCURACY:
        found.append(f"lrjax at {canvas} is below {LEAST_ACCURACY:.0%}")
    if full and column and full[0]["accuracy"] < column["accuracy"] + LEAST_LEAD:
        found.append(f"lrjax leads column by less than {100 * LEAST_LEAD:.0f} points")
    if results["column_peak_bytes"][str(canvas)] <= results["budget_bytes"]:
        found.append(f"column fits the budget at {canvas}")
    found += [
        f"{run['method']} at {run['side']} takes more than the budget"
        for run in results["runs"]
        if run["peak_bytes"] > results["budget_bytes"]
    ]
    return found


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    settings, runs = results["settings"], results["runs"]
    rows = []
    for run in runs:
        patch = f"{run['patch']}" if run["patch"] else ""
        if run["sampled"]:
            patch += f", {run['sampled']} at a time"
        rows.append(
            [
                run["method"],
                run["side"],
                patch,
                f"{run['rate']:g}",
                f"{run['peak_bytes'] / 2**20:.2f}",
                f"{1e3 * run['seconds_per_image']:.0f}",
                f"{run['accuracy']:.1%}",
            ]
        )
    header = [
        "method",
        "image side",
        "patches",
        "learning rate",
        "peak MiB",
        "ms/image",
        "held-out",
    ]
    sides = ", ".join(
        f"{side}: {report.mib_exact(peak)}" for side, peak in results["column_peak_bytes"].items()
    )
    first_map = settings["canvas"] ** 2 * methods.SumNetwork.channels[0] * 4
    size = 1 / np.sqrt(settings["held_out"])
    lines = [
        "# Held-out accuracy at a fixed memory budget",
        f"Two digits of {settings['sizes'][0]} to {settings['sizes'][1]} pixels on a canvas of "
        f"{settings['canvas']} x {settings['canvas']}; "
        f"{len(results['sums'])} sums, equally frequent (chance {1 / len(results['sums']):.1%}); "
        f"{settings['held_out']} canvases of scans that training never draws (95% of the time an "
        f"accuracy is within {100 * size:.0f} points). {results['parameters']:,} parameters, "
        f"{settings['steps']} steps of {settings['batch']} images, Adam. The budget, "
        f"{report.mib_exact(results['budget_bytes'])}, is what lrjax's step takes at full "
        f"resolution, as XLA plans it, one image at a time. Column's step takes, by side: {sides}; "
        f"the first map alone is {report.mib_exact(first_map)} at full resolution. "
        f"Printed by `python -m experiments.resolution` on {results['date']}, "
        f"jax {results['environment']['jax']}, {results['environment']['cpus']} CPU cores, on "
        "which other programs may have run: times are an upper bound.",
        report.markdown_table(header, rows),
    ]
    return "\n\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy by side, and what fits."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    accuracy, memory = figure.subplots(1, 2)
    runs, canvas = results["runs"], results["settings"]["canvas"]
    for name in dict.fromkeys(run["method"] for run in runs):
        own = [
            best([r for r in runs if r["side"] == s], name)
            for s in sorted({r["side"] for r in runs})
        ]
        own = [run for run in own if run]
        label = f"{name} (all that fits: {own[-1]['side']})" if name == COLUMN else name
        sides = [run["side"] for run in own]
        heights = [100 * run["accuracy"] for run in own]
        accuracy.plot(sides, heights, "o-", label=label, color=COLOURS[name])
    accuracy.axhline(100 / len(results["sums"]), color="0.6", linestyle=":", label="chance")
    accuracy.set(xscale="log", xlabel="image side given to the method, pixels", ylabel="%")
    accuracy.set(title="held-out accuracy within the budget", ylim=(0, 102))
    accuracy.legend(loc="lower right")
    peaks = [(int(side), peak) for side, peak in results["column_peak_bytes"].items()]
    peaks += [(run["side"], run["peak_bytes"]) for run in runs if run["method"] == COLUMN]
    peaks = sorted(set(peaks))
    memory.plot(
        [s for s, _ in peaks],
        [p / 2**20 for _, p in peaks],
        "o-",
        label=COLUMN,
        color=COLOURS[COLUMN],
    )
    own = sorted((run["side"], run["peak_bytes"]) for run in runs if run["method"] == LRJAX)
    memory.plot(
        [s for s, _ in own], [p / 2**20 for _, p in own], "o-", label=LRJAX, color=COLOURS[LRJAX]
    )
    memory.axhline(results["budget_bytes"] / 2**20, color="0.6", linestyle=":", label="budget")
    memory.set(xscale="log", ylim=(0, None), xlabel="image side, pixels", ylabel="MiB")
    memory.set(title="peak of a training step, one image")
    memory.legend(loc="upper left")
    ticks = sorted({canvas, *(run["side"] for run in runs), *(side for side, _ in peaks)})
    for axes in (accuracy, memory):
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
    figure.savefig(path, dpi=120)


def write(results: dict[str, Any], path: Path) -> None:
    """The JSON, and table and figure beside it."""
    report.write_json(path, results)
    path.with_suffix(".md").write_text(table(results) + "\n")
    draw(results, path.with_suffix(".png"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="lrjax and column alone")
    parser.add_argument("--redraw", action="store_true", help="from the JSON; nothing is trained")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and canvases")
    parser.add_argument("--out", type=Path, help="the JSON file")
    options = parser.parse_args(arguments)
    is_committed = not (options.quick or options.seed)
    if not (is_committed or options.out or options.redraw):
        parser.error("--quick, --seed: give --out, so that the committed results stay")
    if options.seed < 0:
        parser.error(f"--seed: got {options.seed}; use 0 or more")
    out = options.out or report.RESULTS / "resolution.json"
    if out.suffix != ".json":
        parser.error(f"--out: got {out}; name a .json file, table and figure go beside it")
    if options.redraw and not out.is_file():
        parser.error(f"--redraw: {out} is not there; run the experiment first, or give --out")
    if options.redraw:
        results = json.loads(out.read_text())
        write(results, out)
    else:
        settings = QUICK if options.quick else Settings()
        settings = dataclasses.replace(settings, seed=options.seed)
        results = measure(settings, lambda results: write(results, out))
    print(table(results))
    missing = shortfalls(results)
    for shortfall in missing:
        print(f"NOT AS CLAIMED: {shortfall}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
