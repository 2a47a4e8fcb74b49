"""Runs notebooks, each in a kernel of its own as a reader would, and stores their outputs.

    python nbs/_build/outputs.py [NOTEBOOK ...]

Without names all of them. Cells that the tests leave out (`eval: false`, `notest`, `slow`, `cuda`) do not run."""
import os
import re
import sys
from pathlib import Path

import nbformat
from lint import notebooks
from nbclient import NotebookClient

SHARP = ["--InlineBackend.figure_formats=retina"]   # figures of twice the pixels
LEFT_OUT = re.compile(r"^#\|\s*(eval:\s*false|notest|slow|cuda)\s*$", re.MULTILINE)


def is_progress_bar(out) -> bool:
    "Whether an output is a widget of tqdm"
    data = out.get("data", {})
    return "application/vnd.jupyter.widget-view+json" in data and "%|" in data.get("text/plain", "")


def run(path: Path):
    "All cells; a cell that fails ends it, and the file stays as it was"
    nb = nbformat.read(path, 4)
    client = NotebookClient(nb, timeout=900, coalesce_streams=True, extra_arguments=SHARP,
                            resources={"metadata": {"path": str(path.parent)}})
    with client.setup_kernel():
        for i, cell in enumerate(nb.cells):
            if cell.cell_type != "code" or LEFT_OUT.search(cell.source): continue
            client.execute_cell(cell, i)
            cell.outputs = [out for out in cell.outputs if not is_progress_bar(out)]
    nbformat.write(nb, path)


if __name__ == "__main__":
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1" # the kernel of this Python
    for path in map(Path, sys.argv[1:] or notebooks()):
        print(path, flush=True)
        run(path)
