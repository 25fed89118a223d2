"""The notebooks run from the first cell to the last."""

from pathlib import Path

import pytest

from marks import COMPILES_FOR_H200

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
FOR_A_GPU = {"memory"}


def marked(path):
    return pytest.param(
        path, id=path.stem, marks=COMPILES_FOR_H200 if path.stem in FOR_A_GPU else []
    )


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} >= {"rows", *FOR_A_GPU}


@pytest.mark.slow
@pytest.mark.usefixtures("quick_processes")
@pytest.mark.parametrize("path", [marked(path) for path in NOTEBOOKS])
def test_runs_and_prints_as_much_as_is_committed(path, tmp_path, monkeypatch):
    pytest.importorskip("nbclient", reason="pip install 'lrjax[dev]'")
    pytest.importorskip("ipykernel", reason="pip install 'lrjax[dev]'")
    nbformat = pytest.importorskip("nbformat", reason="pip install 'lrjax[dev]'")
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from notebooks import executed

    def kinds(notebook):
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        return [[output.output_type for output in cell.outputs] for cell in cells]

    found = executed(path, tmp_path)
    assert kinds(found) == kinds(nbformat.read(path, as_version=4)), "python scripts/notebooks.py"
