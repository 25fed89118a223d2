"""What the wheel and the source distribution hold, and what the project says of itself."""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import lrjax

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Names of the files in a wheel and a source distribution of this checkout."""
    pytest.importorskip("hatchling", reason="pip install hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [wheel], [source] = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as files, tarfile.open(source) as archive:
        return set(files.namelist()), {n.partition("/")[2] for n in archive.getnames()}


def tracked(folder, pattern):
    return {str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob(pattern)}


def test_the_wheel_holds_the_library_its_types_and_the_viewer_and_nothing_else(distributions):
    wheel, _ = distributions
    assert {"lrjax/py.typed", *tracked("lrjax", "*.py")} <= wheel
    assert tracked("lrjax/memory/viewer", "*.*") <= wheel
    tops = {name.partition("/")[0] for name in wheel}
    assert tops == {"lrjax", f"lrjax-{lrjax.__version__}.dist-info"}


def test_the_source_distribution_has_what_its_tests_and_pages_need(distributions):
    _, source = distributions
    for folder in ("lrjax", "tests", "experiments", "scripts"):
        assert tracked(folder, "*.py") <= source
    wanted = {"CONTRIBUTING.md", ".ci/run", ".github/workflows/ci.yml", "scripts/test.sh"}
    assert {*tracked("docs", "*.md"), *wanted} <= source


def test_versions_agree():
    assert PROJECT["version"] == lrjax.__version__
    assert f"## {lrjax.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_continuous_integration_runs_every_python_that_is_named():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    named = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if " :: 3." in c]
    assert len(named) >= 3
    assert all(f'"{version}"' in workflow for version in named)
    assert "bash .ci/run" in workflow
