"""All experiments of LR-CNN's evaluation, each in a process; or all tables and figures again.

python -m experiments.paper --quick      # two at a time, and one where steps are timed
python -m experiments.paper --quick --jobs 1
python -m experiments.paper --quick --resume     # what an earlier run measured stays
python -m experiments.paper --figures    # from the JSON files that are there
"""

import argparse
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments.paper import record

NAMES = (
    "limits",
    "granularity",
    "volumes",
    "frozen",
    "reversible",
    "inference",
    "combinations",
    "convergence",
    "step_times",
    "peers",
)


def experiment(name: str) -> record.Experiment:
    return importlib.import_module(f"experiments.paper.{name}").EXPERIMENT


def render_all(folder: Path) -> list[Path]:
    """Every table and figure of the results in a folder; returns the JSON files."""
    found = []
    for name in NAMES:
        own = experiment(name)
        for path in (own.path(folder, quick) for quick in (False, True)):
            if path.exists():
                record.render(own, path)
                found.append(path)
    return found


def measured(name: str, options: argparse.Namespace) -> int:
    """An experiment in a process of its own; prints what it took, and returns its status."""
    command = [sys.executable, "-m", f"experiments.paper.{name}", "--out", str(options.out)]
    command += ["--quick"] * options.quick + ["--resume"] * options.resume
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)  # tells what it used, whatever runs beside it
    process.returncode = os.waitstatus_to_exitcode(status)
    print(
        f"== {name}: status {process.returncode}, {time.perf_counter() - start:.0f} s, "
        f"{used.ru_utime + used.ru_stime:.0f} s of a processor",
        flush=True,
    )
    return process.returncode


def all_measured(names: Sequence[str], options: argparse.Namespace) -> list[str]:
    """Runs experiments, those that time steps last and by themselves; returns which failed."""
    timed = [name for name in names if experiment(name).timed]
    together = [name for name in names if name not in timed]
    with ThreadPoolExecutor(options.jobs) as pool:
        statuses = list(pool.map(lambda name: measured(name, options), together))
    statuses += [measured(name, options) for name in timed]
    return [name for name, status in zip(together + timed, statuses, strict=True) if status]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="measure with small settings")
    parser.add_argument("--full", action="store_true", help="measure with full settings: hours")
    parser.add_argument("--figures", action="store_true", help="draw again what is there")
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run measured")
    parser.add_argument(
        "--jobs", type=int, default=2, help="experiments at a time, where no steps are timed"
    )
    parser.add_argument("--only", nargs="*", choices=NAMES, default=NAMES)
    parser.add_argument("--out", type=Path, default=record.FOLDER, help="where the results are")
    options = parser.parse_args()
    if not (options.quick or options.full or options.figures):
        parser.error("say what to do: --quick, --full or --figures")
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least one experiment runs at a time")
    names = options.only if options.quick or options.full else ()
    failed = all_measured(names, options)
    drawn = render_all(options.out)
    for path in drawn:
        print(f"drawn from {path}")
    if not drawn:
        print(f"no results in {options.out}: measure first, with --quick", file=sys.stderr)
        return 1
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
