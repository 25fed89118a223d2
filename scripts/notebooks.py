"""Runs the notebooks of the documentation and writes what they print into them.

    python scripts/notebooks.py [NOTEBOOK...]      default: all of docs/notebooks

Needs nbclient and ipykernel, of the `dev` extra.
"""

import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs/notebooks"


def executed(path: Path, working_directory: Path) -> Any:
    """The notebook, run in a fresh kernel on the CPU with this checkout's lrjax.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell fails; the message has its traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    client = NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(working_directory)}}
    )
    client.execute(env=environment)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
    return notebook


def main() -> None:
    for path in map(Path, sys.argv[1:]) if sys.argv[1:] else sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(executed(path, path.parent), path)
        print(path)


if __name__ == "__main__":
    main()
