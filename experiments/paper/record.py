"""What the experiments share: their options, the JSON they leave, and drawing from it alone.

An experiment is a module with an ``EXPERIMENT``. Its results are ``results/paper/NAME.json``, or
``results/paper/quick/NAME.json`` for ``--quick``: versions, target, date, and what was measured.
The table (``.md``) and the figure (``.png``) are made of that file and of nothing else.
"""

import argparse
import datetime
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import report
from lrjax import memory

FOLDER = report.RESULTS / "paper"
Results = dict[str, Any]
Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How an experiment was asked to run.

    Attributes:
      quick: small sizes, so that all experiments take minutes on a CPU.
      target: what programs are compiled for, or run on.
      only: names of the parts to measure, as the experiment calls them; none: all.
    """

    quick: bool
    target: str
    only: tuple[str, ...] = ()

    def wants(self, part: str) -> bool:
        return not self.only or part in self.only


Save = Callable[[Results], None]


@dataclass(frozen=True)
class Experiment:
    """One table or figure.

    Attributes:
      name: of its files.
      measure: gives the results; calls ``save`` with what there is so far, and is given what an
        earlier run left (same settings, versions and target), so that it can go on from there.
      table: the record as Markdown.
      draw: draws the record into a matplotlib figure; None: a table is all.
      parts: what may be measured by itself, as ``Settings.only`` names it.
      target: what it compiles for, unless another is named; quick runs without that target's plugin
        compile for the CPU.
      timed: times steps on this machine, so that nothing else should run beside it.
    """

    name: str
    measure: Callable[[Settings, Results, Save], Results]
    table: Callable[[Record], str]
    draw: Callable[[Record, Any], None] | None = None
    parts: tuple[str, ...] = ()
    target: str = "h200"
    timed: bool = False

    def path(self, folder: Path, quick: bool) -> Path:
        return (folder / "quick" if quick else folder) / f"{self.name}.json"


def run(
    experiment: Experiment, settings: Settings, folder: Path = FOLDER, fresh: bool = True
) -> Record:
    """Measure, and write the JSON, the table and the figure.

    Args:
      experiment: what to run.
      settings: how.
      folder: where the files go.
      fresh: measure everything; else what an earlier run of the same target and versions found
        stays.
    """
    path = experiment.path(folder, settings.quick)
    known: Results = {}
    if path.exists() and not (fresh and not settings.only):
        before = json.loads(path.read_text())
        if (before["target"], before["versions"]) == (settings.target, report.versions()):
            known = before["results"]

    def record_of(results: Results) -> Record:
        return {
            "experiment": experiment.name,
            "quick": settings.quick,
            "target": settings.target,
            "versions": report.versions(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "results": results,
        }

    results = experiment.measure(
        settings, known, lambda found: report.write_json(path, record_of(found))
    )
    record = record_of(results)
    report.write_json(path, record)
    render(experiment, path)
    return record


def render(experiment: Experiment, path: Path) -> str:
    """The table and the figure of a JSON file; returns the table.

    Raises:
      ValueError: the file is not this experiment's.
    """
    record = json.loads(path.read_text())
    if record.get("experiment") != experiment.name:
        raise ValueError(
            f"{path}: holds {record.get('experiment')!r}, not {experiment.name!r}; measure it "
            f"again with python -m experiments.paper.{experiment.name}"
        )
    text = "\n\n".join([experiment.table(record), _provenance(record)])
    path.with_suffix(".md").write_text(text + "\n")
    if experiment.draw is not None:
        _save_figure(experiment.draw, record, path.with_suffix(".png"))
    return text


def _provenance(record: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    quick = " --quick" if record["quick"] else ""
    return (
        f"`python -m experiments.paper.{record['experiment']}{quick}`, {record['date']}: target "
        f"{record['target']}, {versions}."
    )


def _save_figure(draw: Callable[[Record, Any], None], record: Record, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(layout="constrained")
    draw(record, figure)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main(experiment: Experiment, description: str | None) -> None:
    """The command line of one experiment."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, on this CPU, in minutes")
    parser.add_argument("--figures", action="store_true", help="only draw again what is there")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="PART",
        choices=experiment.parts,
        help="measure these parts, beside what is there (implies --resume): "
        + (", ".join(experiment.parts) or "this experiment has none"),
    )
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run measured")
    parser.add_argument("--target", help="compile for this device")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where the results are")
    options = parser.parse_args()
    if options.figures:
        print(render(experiment, _existing(experiment, options.out, options.quick)))
        return
    is_installed = memory.is_installed(experiment.target)
    target = options.target or ("cpu" if options.quick and not is_installed else experiment.target)
    settings = Settings(options.quick, target, tuple(options.only))
    run(experiment, settings, options.out, fresh=not options.resume)
    print(render(experiment, experiment.path(options.out, options.quick)))


def _existing(experiment: Experiment, folder: Path, quick: bool) -> Path:
    path = experiment.path(folder, quick)
    if not path.exists():
        raise SystemExit(f"{path} is not there: measure first, without --figures")
    return path
