"""What a training run leaves behind: a metrics file, a plot, the parameters, a table.

Files appear whole or not at all: each is written beside its place and renamed.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import flax.serialization
import jax
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from lrjax.app.evaluation import Evaluation
from lrjax.app.strategy import Execution, Strategy
from lrjax.app.training import Memory, Training
from lrjax.files import replacing, write_whole
from lrjax.memory.text import new_table
from lrjax.text import MIB

METRICS_FILE = "metrics.json"
PLOT_FILE = "training.png"
PARAMETERS_FILE = "params.msgpack"
STATISTICS_FILE = "statistics.msgpack"
RESULT_FILES = (METRICS_FILE, PLOT_FILE, PARAMETERS_FILE, STATISTICS_FILE)
COMPARISON_FILE = "comparison.json"
COMPARISON_PLOT_FILE = "comparison.png"


class Metrics(TypedDict):
    """The metrics file. Times in seconds, sizes in bytes."""

    label: str
    strategy: dict[str, Any]
    options: dict[str, Any]
    environment: dict[str, Any]
    losses: list[float]
    step_seconds: list[float]
    median_step_seconds: float
    compile_seconds: float
    xla_temp_bytes: int
    xla_peak_bytes: int
    rss_peak_bytes: int
    device_peak_bytes: int | None
    skipped_files: list[str]
    validation: dict[str, Any] | None


def metrics_of(
    training: Training,
    strategy: Execution,
    options: Mapping[str, Any],
    skipped_files: Sequence[str] = (),
    evaluation: Evaluation | None = None,
) -> Metrics:
    """Everything measured in a run, and enough of its settings to repeat it."""
    return Metrics(
        label=strategy.label,
        strategy=_strategy_of(strategy),
        options=dict(options),
        environment={
            "jax": jax.__version__,
            "python": platform.python_version(),
            "device": jax.devices()[0].device_kind,
            "cpus": os.cpu_count(),
        },
        losses=list(training.losses),
        step_seconds=list(training.step_seconds),
        median_step_seconds=training.seconds_per_step,
        compile_seconds=training.compile_seconds,
        xla_temp_bytes=training.memory.xla_temp,
        xla_peak_bytes=training.memory.xla_peak,
        rss_peak_bytes=training.memory.rss,
        device_peak_bytes=training.memory.device,
        skipped_files=list(skipped_files),
        validation=validation_numbers(evaluation) if evaluation is not None else None,
    )


def _strategy_of(strategy: Execution) -> dict[str, Any]:
    if not isinstance(strategy, Strategy):
        blocks = [choice.num_blocks for choice in strategy.plan.choices]
        return {"name": "plan", "num_blocks": blocks, "cuts": [str(n) for n in strategy.plan.cuts]}
    return {
        "name": strategy.name,
        "num_blocks": strategy.num_blocks,
        "cuts": list(strategy.cuts),
    }


def validation_numbers(evaluation: Evaluation) -> dict[str, Any]:
    """What the log and `metrics.json` call the numbers of held-out images."""
    return {
        "validation_loss": evaluation.loss,
        "validation_accuracy": evaluation.accuracy,
        "validation_mean_iou": evaluation.mean_iou,
        "validation_accuracy_by_class": [
            None if np.isnan(part) else part for part in evaluation.accuracy_by_class
        ],
    }


def write_run(directory: Path, training: Training, metrics: Metrics) -> None:
    """Writes the metrics, the plot and the trained parameters of one run into `directory`.

    Running statistics go into a file of their own, where the model has any.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / PARAMETERS_FILE, flax.serialization.to_bytes(training.params))
    if training.statistics:
        write_whole(directory / STATISTICS_FILE, flax.serialization.to_bytes(training.statistics))
    write_plot(directory / PLOT_FILE, [metrics])
    write_json(directory / METRICS_FILE, metrics)


def read_metrics(directory: Path) -> Metrics:
    """The metrics file that `write_run` left in `directory`."""
    return json.loads((directory / METRICS_FILE).read_text())


def memory_before(directory: Path, training: Training) -> Memory:
    """The memory of a training without steps of its own: as the metrics file has it, where that is
    of the same steps.
    """
    try:
        before = read_metrics(directory)
        if before["losses"] == list(training.losses):
            rss, device = before["rss_peak_bytes"], before["device_peak_bytes"]
            return replace(training.memory, rss=rss, device=device)
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or it is no such file
        pass
    return training.memory


def check_writable(directory: Path) -> None:
    """Raises `ValueError` where results could not be written to `directory` later on."""
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"out: cannot write to {existing}; give a directory you may write to")


def write_json(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content, indent=1) + "\n")


def largest_relative_difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    """Largest `|loss - reference| / |reference|` over all steps."""
    ours, theirs = np.asarray(losses), np.asarray(reference)
    return float(np.max(np.abs(ours - theirs) / np.maximum(np.abs(theirs), np.finfo(float).tiny)))


def comparison_table(runs: Sequence[Metrics]) -> Table:
    """One row a run; the first run is the one the others are compared with."""
    reference = runs[0]
    columns = ("blocks", "final loss", "largest loss\ndifference", "step time", "ratio")
    table = new_table("strategy", *columns, "XLA peak\nMiB", "RSS peak\nMiB", "ratio")
    table.title = f"{len(reference['losses'])} steps, compared with {reference['label']}"
    for run in runs:
        table.add_row(
            run["label"],
            _blocks(run["strategy"]),
            f"{run['losses'][-1]:.6f}",
            f"{largest_relative_difference(run['losses'], reference['losses']):.1e}",
            f"{run['median_step_seconds']:.3f} s",
            f"{run['median_step_seconds'] / reference['median_step_seconds']:.2f}",
            f"{run['xla_peak_bytes'] / MIB:.0f}",
            f"{run['rss_peak_bytes'] / MIB:.0f}",
            f"{run['rss_peak_bytes'] / max(reference['rss_peak_bytes'], 1):.2f}",
        )
    return table


def _blocks(strategy: Mapping[str, Any]) -> str:
    blocks = strategy["num_blocks"]
    if isinstance(blocks, Sequence):
        blocks = ",".join(map(str, blocks))
    cuts = ",".join(strategy["cuts"])
    return ("-" if blocks is None else str(blocks)) + (f"\n@{cuts}" if cuts else "")


def write_plot(path: Path, runs: Sequence[Metrics]) -> None:
    """Loss curves on the left, peak memory on the right."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    loss_axes, memory_axes = figure.subplots(1, 2)
    for index, run in enumerate(runs):
        # Curves that agree hide each other: later ones are drawn thinner, so that all are seen.
        steps = range(1, len(run["losses"]) + 1)
        thickness = 1.2 * (len(runs) - index)
        loss_axes.plot(steps, run["losses"], label=run["label"], linewidth=thickness)
    loss_axes.set(xlabel="step", ylabel="loss", title="training loss")
    loss_axes.legend()

    positions = np.arange(len(runs))
    bars = [
        (-0.2, [run["xla_peak_bytes"] / MIB for run in runs], "XLA, planned"),
        (0.2, [run["rss_peak_bytes"] / MIB for run in runs], "process RSS, above baseline"),
    ]
    for offset, heights, label in bars:
        container = memory_axes.bar(positions + offset, heights, 0.38, label=label)
        memory_axes.bar_label(container, fmt="%.0f")
    memory_axes.set_xticks(positions, [run["label"] for run in runs])
    memory_axes.set(ylabel="MiB", title="peak memory")
    memory_axes.legend()
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
