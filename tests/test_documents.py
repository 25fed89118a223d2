"""What the documents say is what the scripts print."""

import ast
import dataclasses
import inspect
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lrjax
from marks import COMPILES_FOR_H200


def compiles_for_a_gpu(test):
    for mark in COMPILES_FOR_H200:
        test = mark(test)
    return test


ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()


def test_the_worked_example(capsys):
    runpy.run_path(str(ROOT / "scripts/worked_example.py"), run_name="__main__")
    printed = capsys.readouterr().out.strip()
    assert f"```\n{printed}\n```" in ARCHITECTURE


def test_every_module_has_its_place():
    table = ARCHITECTURE.partition("| module |")[2].partition("\n\n")[0]
    for path in sorted((ROOT / "lrjax").rglob("*.py")):
        folder = path.parent.name
        is_inner = folder in ("commands", "memory", "models", "roofline", "rules")
        if path.stem == "__init__" or (is_inner and path.stem != "geometry"):
            continue
        assert re.search(rf"`{path.stem}`", table), path.relative_to(ROOT)


def test_the_source_distribution_has_what_its_tests_read():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = settings["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    folders = {path.parent.name for path in ROOT.glob("*/*.py")}
    assert {*folders, "docs", "README.md"} <= set(included)


def test_the_walk_from_the_call_to_the_loop_meets_files_that_exist():
    walk = re.findall(r"^\d\. `([a-z_/]+\.py)`", ARCHITECTURE, re.MULTILINE)
    assert 6 <= len(walk) <= 8
    assert len(set(walk)) == len(walk)
    for path in walk:
        assert (ROOT / "lrjax" / path).is_file(), path


def test_functions_fit_a_screen_and_files_a_reader():
    for path in sorted((ROOT / "lrjax").rglob("*.py")):
        source = path.read_text()
        assert source.count("\n") <= 500, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                documented = ast.get_docstring(node) is not None
                start = node.body[0].end_lineno if documented else node.lineno
                signature = node.body[0].lineno - node.lineno if documented else 0
                length = node.end_lineno - start + signature
                assert length <= 60, f"{path}: {node.name} has {length} lines"


def test_everything_public_says_what_it_is():
    for name in set(lrjax.__all__) - {"__version__"}:
        found = getattr(lrjax, name)
        assert inspect.getdoc(found), name
        members = vars(found).items() if inspect.isclass(found) else ()
        for member, value in members:
            is_asked_for = isinstance(value, property | classmethod) or inspect.isfunction(value)
            assert member.startswith("_") or not is_asked_for or value.__doc__, (name, member)
        fields = dataclasses.fields(found) if dataclasses.is_dataclass(found) else ()
        assert not fields or "Attributes:" in found.__doc__, name
    assert "lrjax.plan" in lrjax.PlanMismatchError.__doc__


@pytest.mark.slow
@compiles_for_a_gpu
@pytest.mark.usefixtures("quick_processes")
def test_the_snippets_of_the_readme_run_one_after_the_other(tmp_path):
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 4
    code = "\n".join(snippets) + "\nassert profile.fits and plan.choices and updated"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "profile.html").is_file()
