"""The table of mutations fits the source: each still applies, and its tests exist.

That the tests notice them is shown by ``python scripts/mutations.py``.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_mutation_still_applies(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from mutations import MUTATIONS, mutated

    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 30
    for mutation in MUTATIONS:
        assert mutated(mutation) != (ROOT / mutation.file).read_text()
        assert mutation.tests
        assert all((ROOT / test.partition("::")[0]).exists() for test in mutation.tests)


def test_every_mutation_has_tests_that_are_not_slow():
    command = [sys.executable, "scripts/mutations.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
