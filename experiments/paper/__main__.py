"""All experiments of LR-CNN's evaluation, one after the other; or all tables and figures again.

python -m experiments.paper --quick      # each in a process of its own
python -m experiments.paper --figures    # from the JSON files that are there
"""

import argparse
import importlib
import subprocess
import sys
import time
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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="measure with small settings")
    parser.add_argument("--full", action="store_true", help="measure with full settings: hours")
    parser.add_argument("--figures", action="store_true", help="draw again what is there")
    parser.add_argument("--only", nargs="*", choices=NAMES, default=NAMES)
    parser.add_argument("--out", type=Path, default=record.FOLDER, help="where the results are")
    options = parser.parse_args()
    if not (options.quick or options.full or options.figures):
        parser.error("say what to do: --quick, --full or --figures")
    failed = []
    for name in options.only if options.quick or options.full else ():
        start = time.perf_counter()
        command = [sys.executable, "-m", f"experiments.paper.{name}", "--out", str(options.out)]
        status = subprocess.run([*command, *(["--quick"] if options.quick else [])]).returncode
        print(f"== {name}: status {status}, {time.perf_counter() - start:.0f} s", flush=True)
        failed += [name] if status else []
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
