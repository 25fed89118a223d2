"""`lrjax compare-strategies`."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lrjax.app.commands.console import FAILED, app, console, stop


@app.command(
    "compare-strategies",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def compare_strategies(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Directory for the runs, the comparison and its plot.")],
    strategy: Annotated[
        list[str],
        typer.Option(
            help="name[:blocks][/parts][@cuts], such as 2ps:8,4@pool2; repeat for each run."
        ),
    ],
    tolerance: Annotated[
        float,
        typer.Option(help="Largest relative difference of the losses from the first strategy's."),
    ] = 1e-4,
) -> None:
    """Train the same network under several strategies and compare them with the first.

    Every other option of `lrjax train` may be given too and holds for every run. Each run is a
    process of its own, one after another, so that its memory is its own. Ends with status 1 where
    losses differ by more than the tolerance.
    """
    from lrjax.app import report, training

    try:
        report.check_writable(out)
        chosen = [training.Strategy.parse(spec) for spec in strategy]
    except ValueError as error:
        stop(error)
    _check_options(context.args)
    places = _directories(out, strategy)
    arguments = {
        spec: _arguments(context.args, places[spec], parsed)
        for spec, parsed in zip(strategy, chosen, strict=True)
    }
    # The last run's bad option is known before the first run has trained.
    for spec, own in arguments.items():
        _succeeded(spec, app(["train", *own, "--check"], standalone_mode=False) or 0)
    for spec, own in arguments.items():
        command = [sys.executable, "-m", "lrjax.app.cli", "train", *own]
        run = subprocess.run(command, env=os.environ, stdin=subprocess.DEVNULL)
        _succeeded(spec, run.returncode)
    runs = [report.read_metrics(places[spec]) for spec in strategy]

    report.write_plot(out / report.COMPARISON_PLOT_FILE, runs)
    differences = [
        report.largest_relative_difference(run["losses"], runs[0]["losses"]) for run in runs
    ]
    report.write_json(
        out / report.COMPARISON_FILE,
        [
            {"largest_loss_difference": difference, **run}
            for difference, run in zip(differences, runs, strict=True)
        ],
    )
    # Files and pipes count as 80 columns, too few for the table.
    Console(width=max(console.width, 110)).print(report.comparison_table(runs))
    console.print(f"plot: {out / report.COMPARISON_PLOT_FILE}", soft_wrap=True, highlight=False)
    if max(differences) > tolerance:
        stop(
            f"losses differ by {max(differences):.1e} from {runs[0]['label']}, "
            f"more than {tolerance:.0e}",
            FAILED,
        )


def _directories(out: Path, specs: list[str]) -> dict[str, Path]:
    """Where the run of each strategy leaves its files."""
    found: dict[str, Path] = {}
    for spec in specs:
        if spec in found:
            stop(f"strategy: {spec} is given twice; give each once")
        name, number = re.sub("[^a-z0-9]+", "-", spec), 1
        place = out / name
        while place in found.values():
            number += 1
            place = out / f"{name}-{number}"
        found[spec] = place
    return found


def _succeeded(spec: str, code: int) -> None:
    if code:
        stop(f"the run {spec} failed with status {code}", code if code > 0 else FAILED)


def _check_options(arguments: list[str]) -> None:
    given = {option.split("=")[0] for option in arguments}
    if given & {"--num-blocks", "--cuts", "--micro-batches"}:
        stop("give these within --strategy, as name[:blocks][/parts][@cuts]")
    if given & {"--processes", "--coordinator", "--process-id"}:
        stop("processes: a comparison runs in one process after the other; use lrjax train")


def _arguments(given: list[str], out: Path, strategy: Any) -> list[str]:
    """Of `lrjax train`. A comparison's runs are not gone on with, unless --keep is given."""
    return ["--keep", "0", *given, "--out", str(out), *_strategy_options(strategy)]


def _strategy_options(strategy: Any) -> list[str]:
    options = ["--strategy", strategy.name]
    if strategy.num_blocks is not None:
        blocks = strategy.num_blocks
        listed = blocks if isinstance(blocks, tuple) else (blocks,)
        options += ["--num-blocks", ",".join(map(str, listed))]
    if strategy.cuts:
        options += ["--cuts", ",".join(strategy.cuts)]
    if strategy.micro_batches > 1:
        options += ["--micro-batches", str(strategy.micro_batches)]
    return options
