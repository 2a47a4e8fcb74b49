"""Runs notebooks, each in a kernel of its own as a reader would, and stores their outputs.

    python nbs/_build/outputs.py [NOTEBOOK ...]

Without names all of them. Cells that the tests leave out (`eval: false`, `notest`, `slow`, `cuda`) do not run."""
import re
import sys
from pathlib import Path

import nbformat
from lint import notebooks
from nbclient import NotebookClient

LEFT_OUT = re.compile(r"^#\|\s*(eval:\s*false|notest|slow|cuda)\s*$", re.MULTILINE)


def run(path: Path):
    "All cells; a cell that fails ends it, and the file stays as it was"
    nb = nbformat.read(path, 4)
    client = NotebookClient(nb, timeout=600, resources={"metadata": {"path": str(path.parent)}})
    with client.setup_kernel():
        for i, cell in enumerate(nb.cells):
            if cell.cell_type == "code" and not LEFT_OUT.search(cell.source): client.execute_cell(cell, i)
    nbformat.write(nb, path)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or notebooks()):
        print(path, flush=True)
        run(path)
