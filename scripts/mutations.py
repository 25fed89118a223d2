"""Breaks the library on purpose, in one place at a time, and shows that the tests notice.

    python scripts/mutations.py --out experiments/results   # all, into mutations.json and .md
    python scripts/mutations.py --only stale-ring-slot      # one, by name (as often as wanted)
    python scripts/mutations.py --all-tests                 # the whole fast suite for each
    python scripts/mutations.py --check                     # that each has tests, in seconds

Every mutation of ``mutation_table.py`` is applied to a copy of the project in a temporary
directory, where the tests named beside it run, up to the first that fails. The tests that failed
must then pass on an unchanged copy, or nothing was shown. The exit status is 1 if a mutation
survives or a test fails without one, 2 if a mutation does not fit the source any more or selects
no test.
"""

import argparse
import ast
import contextlib
import dataclasses
import datetime
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mutation_table import MUTATIONS, Mutation

from experiments import report

ROOT = Path(__file__).resolve().parents[1]
# What the tests need of the project.
PARTS = ("lrjax", "tests", "experiments", "scripts", "docs", "pyproject.toml", "README.md")
# A mutation may make a loop endless; that counts as caught, under the name "timeout".
TIMEOUT_S = 900

# Runs the tests only if the package is the copy in the working directory.
RUNNER = """
import pathlib, sys
import lrjax, pytest
if pathlib.Path(lrjax.__file__).resolve().parents[1] != pathlib.Path.cwd().resolve():
    sys.exit(f"{lrjax.__file__} is not the copy")
sys.exit(pytest.main(sys.argv[1:]) + 100)
"""
OPTIONS = ("-x", "-q", "-n", "0", "-m", "not slow", "-p", "no:cacheprovider", "--tb=line", "-rfE")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the tests said of a mutation.

    Attributes:
      caught: whether one failed.
      test: the first that failed.
      how: the line of pytest's summary that says why, or "timeout".
      seconds: of the run, start of Python included.
    """

    caught: bool
    test: str
    how: str
    seconds: float


def mutated(mutation: Mutation, root: Path = ROOT) -> str:
    """The source of a mutation's file, changed.

    Raises:
      ValueError: the text to replace is not there exactly once, or what comes out is no Python.
    """
    source = (root / mutation.file).read_text()
    count = source.count(mutation.old)
    if count != 1:
        raise ValueError(
            f"{mutation.name}: {mutation.file} holds {count} times, not once:\n{mutation.old}\n"
            "The code has moved on; write the mutation anew in scripts/mutation_table.py."
        )
    changed = source.replace(mutation.old, mutation.new)
    try:
        ast.parse(changed)
    except SyntaxError as error:
        raise ValueError(f"{mutation.name}: {error}") from error
    return changed


class _Selections:
    """A plugin of pytest that asks which mutations select none of the tests collected."""

    def __init__(self) -> None:
        self.without_tests: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        by_mark_and_name = config.pluginmanager.get_plugin("mark").pytest_collection_modifyitems
        for mutation in MUTATIONS:
            chosen = [i for i in items if i.nodeid.startswith(mutation.tests)]
            config.option.keyword = mutation.select
            by_mark_and_name(chosen, config)
            if not chosen:
                self.without_tests.append(mutation.name)
        config.option.keyword = ""


def without_tests() -> list[str]:
    """The names of mutations whose files and words select no test of the fast suite."""
    selections = _Selections()
    files = sorted({test.partition("::")[0] for mutation in MUTATIONS for test in mutation.tests})
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = pytest.main([*OPTIONS, "--collect-only", *files], plugins=[selections])
    if status != 0:
        raise RuntimeError(f"the tests were not collected:\n{printed.getvalue()[-2000:]}")
    return selections.without_tests


def copy_project(target: Path) -> None:
    """The parts of the project, compiled modules included: unchanged ones stay valid."""
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, target / part)
        else:
            shutil.copy2(source, target / part)


def apply(mutation: Mutation, target: Path) -> None:
    """Change one file of a copy."""
    path = target / mutation.file
    path.write_text(mutated(mutation))
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
        compiled.unlink()


def run_tests(target: Path, arguments: Sequence[str]) -> tuple[int | None, str]:
    """Pytest's exit status in a copy (None: out of time) and what it printed."""
    settings = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(target), "COLUMNS": "200"}
    command = [sys.executable, "-c", RUNNER, *OPTIONS, *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=target,
            env=os.environ | settings,
            timeout=TIMEOUT_S,
            capture_output=True,
            text=True,
        )
    except subprocess.TimeoutExpired:
        return None, ""
    if done.returncode < 100:
        raise RuntimeError(f"the tests did not start in {target}:\n{done.stdout}{done.stderr}")
    return done.returncode - 100, done.stdout + done.stderr


def outcome(mutation: Mutation, all_tests: bool) -> Outcome:
    """Apply a mutation to a copy of the project and run its tests."""
    with tempfile.TemporaryDirectory(prefix=f"lrjax-{mutation.name}-") as name:
        target = Path(name)
        copy_project(target)
        apply(mutation, target)
        selected = ("-k", mutation.select) if mutation.select else ()
        arguments = ("tests",) if all_tests else (*mutation.tests, *selected)
        start = time.perf_counter()
        status, printed = run_tests(target, arguments)
        seconds = time.perf_counter() - start
    if status is None:
        return Outcome(True, "", "timeout", seconds)
    if status == 0:
        return Outcome(False, "", "survived", seconds)
    failed = re.search(r"^(?:FAILED|ERROR) (tests/.*?)(?: - (.*))?$", printed, re.MULTILINE)
    if failed is None:
        raise RuntimeError(f"{mutation.name}: pytest gave status {status}:\n{printed}")
    return Outcome(True, failed[1], (failed[2] or "").strip(), seconds)


def control(tests: Sequence[str]) -> None:
    """The tests that caught something pass where nothing was changed.

    Raises:
      RuntimeError: they do not, so that the mutations may not be what they failed for.
    """
    if not tests:
        return
    with tempfile.TemporaryDirectory(prefix="lrjax-unchanged-") as name:
        copy_project(Path(name))
        status, printed = run_tests(Path(name), sorted(set(tests)))
    if status != 0:
        raise RuntimeError(f"tests that caught a mutation fail without one:\n{printed}")


def record(mutation: Mutation, found: Outcome) -> dict[str, Any]:
    return {
        "name": mutation.name,
        "file": mutation.file,
        "stands_for": mutation.stands_for,
        "caught": found.caught,
        "test": found.test,
        "how": found.how,
        "seconds": round(found.seconds, 1),
    }


def markdown(content: dict[str, Any]) -> str:
    """The results as a page."""
    records = content["mutations"]
    caught = sum(r["caught"] for r in records)
    environment = content["environment"]
    rows = [
        [
            r["name"],
            r["stands_for"],
            r["file"].removeprefix("lrjax/"),
            f"`{r['test'].removeprefix('tests/')}`" if r["test"] else "",
            _shortened(r["how"]),
        ]
        for r in records
    ]
    table = report.markdown_table(
        ("mutation", "what is wrong then", "in lrjax/", "caught by", "which says"), rows
    )
    return (
        "# Mutations\n\n"
        f"{caught} of {len(records)} errors made on purpose are caught by the tests that are not "
        f"marked slow; jax {environment['jax']}, Python {environment['python']}, "
        f"{content['date']}, {content['seconds']:.0f} seconds with {content['jobs']} at a time. "
        "Printed by `python scripts/mutations.py`.\n\n" + table + "\n"
    )


def _shortened(how: str, width: int = 60) -> str:
    text = how.removeprefix("AssertionError: ").rstrip(":").replace("|", "/")
    return text if len(text) <= width else text[: width - 3] + "..."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="this mutation alone")
    parser.add_argument("--jobs", type=int, default=2, help="mutations at a time (2)")
    parser.add_argument("--all-tests", action="store_true", help="run the whole fast suite")
    parser.add_argument("--check", action="store_true", help="only that each fits and has tests")
    parser.add_argument("--out", type=Path, help="where to write mutations.json and mutations.md")
    options = parser.parse_args()
    names = [m.name for m in MUTATIONS]
    unknown = set(options.only or ()) - set(names)
    if unknown:
        parser.error(f"--only: no mutation is named {', '.join(sorted(unknown))}")
    chosen = [m for m in MUTATIONS if not options.only or m.name in options.only]
    try:
        for mutation in chosen:
            mutated(mutation)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if missing := set(without_tests()) & {m.name for m in chosen}:
        print("no test of the fast suite is selected by:", *sorted(missing), file=sys.stderr)
        return 2
    if options.check:
        return 0
    start = time.perf_counter()

    def one(mutation: Mutation) -> Outcome:
        found = outcome(mutation, options.all_tests)
        print(f"{mutation.name:32} {found.seconds:6.1f} s  {found.test} {found.how}", flush=True)
        return found

    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = list(pool.map(one, chosen))
    control([found.test for found in outcomes if found.test])
    content = {
        "environment": report.versions(),
        "date": datetime.date.today().isoformat(),
        "jobs": options.jobs,
        "seconds": round(time.perf_counter() - start),
        "mutations": [record(m, o) for m, o in zip(chosen, outcomes, strict=True)],
    }
    survivors = [m.name for m, o in zip(chosen, outcomes, strict=True) if not o.caught]
    if options.out:
        report.write_json(options.out / "mutations.json", content)
        (options.out / "mutations.md").write_text(markdown(content))
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} caught", *survivors)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
