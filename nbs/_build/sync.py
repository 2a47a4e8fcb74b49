"""Notebooks -> library, cleaned notebooks and README.md.   sync.py [--check]

With --check the same is done to a copy, and every file that would change is named; the work tree is left as it is.
`nbdev-readme` needs Quarto; this needs nbconvert alone."""
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

REPO = Path(__file__).parents[2]
PARTS = ["nbs", "bgrpo_nb", "pyproject.toml", "settings.ini", "setup.py", "_quarto.yml", "README.md"]
HIDDEN = re.compile(r"^#\| *(hide|default_exp|exporti?)\b", re.MULTILINE)


def readme(root):
    "README.md from nbs/index.ipynb: hidden cells gone, links seen from the top of the repository"
    nb = nbformat.read(root / "nbs/index.ipynb", as_version=4)
    nb.metadata["language_info"] = {"name": "python"}
    nb.cells = [c for c in nb.cells if not HIDDEN.search(c.source)]
    for cell in nb.cells: cell.source = re.sub(r"^#\|.*\n", "", cell.source, flags=re.MULTILINE)
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r"\]\((?!https?:|#|\.\./)([^)]+)\)", r"](nbs/\1)", text).replace("](../", "](")
    note = "<!-- Generated from nbs/index.ipynb by `make export`; edit the notebook. -->\n\n"
    (root / "README.md").write_text(note + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")


def sync(root):
    "Export, clean, README"
    run = Path(sys.executable).parent
    for command in ("nbdev-export", "nbdev-clean"):
        done = subprocess.run([run / command], cwd=root, capture_output=True, text=True)
        if done.returncode: sys.exit(f"{command} failed:\n{done.stdout}{done.stderr}")
    if (root / "nbs/index.ipynb").exists(): readme(root)


def files(root):
    "Relative path -> bytes of all that is generated or cleaned"
    found = [p for part in ("nbs", "bgrpo_nb") for p in (root / part).rglob("*") if p.suffix in (".py", ".ipynb", ".txt")]
    kept = [p for p in found if not {"__pycache__", ".ipynb_checkpoints", "_build"} & set(p.parts)]
    return {str(p.relative_to(root)): p.read_bytes() for p in [*kept, root / "README.md"] if p.exists()}


def check():
    "Names of the files that `sync` would change"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / REPO.name
        root.mkdir()
        for part in PARTS:
            source = REPO / part
            if source.is_dir(): shutil.copytree(source, root / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists(): shutil.copy(source, root / part)
        sync(root)
        before, after = files(REPO), files(root)
        return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


if __name__ == "__main__":
    if "--check" not in sys.argv: sync(REPO)
    elif changed := check():
        sys.exit("Not in sync with the notebooks (run `make export` and commit): " + ", ".join(changed))
    else: print("in sync: export, clean and README change nothing")
